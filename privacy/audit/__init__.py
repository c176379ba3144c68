"""Audit: leakage that attacks measure on released numbers, evidence against the claim and never for it."""

"""Measured leakage: what an attack on the released numbers shows, as evidence against the claim and never for it."""

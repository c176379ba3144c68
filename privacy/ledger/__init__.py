"""Ledger: durable, hash-chained releases, held against a budget."""

"""Ledger: a durable, hash-chained record of releases, with a budget."""

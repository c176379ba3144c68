"""Populations: who a run's clients are, where their ledgers lie, and what of them is known and may be shown."""

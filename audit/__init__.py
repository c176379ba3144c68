"""Audit of a run: what its released sums show about its claims, measured by canaries and checked for free."""

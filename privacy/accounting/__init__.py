"""Accounting: events, and the epsilon that they compose to."""

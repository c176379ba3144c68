"""Accounting: events of privacy mechanisms, and the epsilon that they compose to."""

"""Modes of privacy: what a run promises to whom, and what that asks of clients, server and ledgers."""

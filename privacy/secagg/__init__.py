"""Secure aggregation: the server learns only the sum of a cohort's vectors."""

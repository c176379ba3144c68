"""Secure aggregation: the server learns the sum of a cohort's vectors and nothing else about any of them."""

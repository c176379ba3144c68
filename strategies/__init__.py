"""Strategies: cohorts, Flower's averaging strategies, and the wire formats of a cohort's sum."""

"""Strategies: who takes part in a round, which strategy averages, and how a cohort's sum travels."""

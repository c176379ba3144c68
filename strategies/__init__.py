"""Combining: who takes part in a round, which strategy averages, and how a cohort travels as one vector."""

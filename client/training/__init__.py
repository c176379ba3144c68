"""Local training without record-level privacy: one client, a cohort, arrays alone."""

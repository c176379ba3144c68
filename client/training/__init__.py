"""Local training without record-level privacy: for one client, for a whole cohort, and without torch."""

"""Local training without record-level privacy: of one client, of a whole cohort, and without torch."""

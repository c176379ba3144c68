"""Statistics that clients are asked for: what each counts of its rows, and what the noisy sum says, with an interval."""

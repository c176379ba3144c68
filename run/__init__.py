"""Run of a federation, simulated or deployed: from settings to a run folder."""

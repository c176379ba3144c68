"""Edge device: its agent, its owner's policy, its own ledger, and when it may run."""

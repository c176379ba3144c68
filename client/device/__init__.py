"""Edge device: its agent, its owner's policy, its own ledger, what it may run on."""

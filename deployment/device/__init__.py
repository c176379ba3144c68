"""Edge device: agent, owner's policy, own ledger, and conditions for training."""

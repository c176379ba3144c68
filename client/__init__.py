"""Client: its data, its training, its own ledger, and its half of the private sum."""

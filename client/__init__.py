"""Client: data, training, own ledger, and the client's half of the private sum."""

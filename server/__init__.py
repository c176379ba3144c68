"""Server: a grid that sums privately, the round loop, checkpoints."""

"""DP-SGD at the client: per-example gradients, clipping, noise, steps of all clients together, canary records."""

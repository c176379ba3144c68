"""DP-SGD at the client: per-example gradients, clipping, noise, canary records."""

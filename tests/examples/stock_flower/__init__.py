"""stock_flower."""

"""Shipped tasks: public data to begin with."""

"""Base: refusals, durable files, bounded decoding, and what else every room needs; it knows no other room."""

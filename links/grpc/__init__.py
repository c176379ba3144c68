"""gRPC link, both ends: one stream for each device."""

"""gRPC link: one stream a device, both ends."""

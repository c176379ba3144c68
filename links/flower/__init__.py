"""Flower link, both ends: a SuperLink at the server, SuperNodes at the devices."""

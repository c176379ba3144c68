"""Flower's link: SuperLink and SuperNodes, both ends."""

"""Deployment of a federation on real machines: its authority, its bundles, its server.

It contains the operator's desk (`fedveil provision`) and the code that needs both ends.
"""

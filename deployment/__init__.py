"""Deployment of a federation on real machines: its authority, its bundles, its server.

The operator's desk (`fedveil provision`) and what needs both ends stand here.
"""

"""From one file to a federation on real machines: its authority, a bundle for its server and one for every client.

What runs on the operator's desk (`fedveil provision`), and what needs both ends.
"""

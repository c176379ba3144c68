"""NVFLARE: jobs of its recipes, with fedveil's clip, noise and ledger in the place of its privacy filters."""

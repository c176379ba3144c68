"""Mechanisms that add the noise: a cryptographic generator, an exact discrete Gaussian, and the lattice between them."""

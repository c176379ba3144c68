"""Binding of a run to its ledger and its signers, and the verification of both; no torch, Flower or Hydra."""

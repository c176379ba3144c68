"""Binding of a run to its ledger and to those who sign it, and the check of both; no torch, Flower or Hydra."""

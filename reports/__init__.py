"""Reports of runs: what a run folder tells, as JSON and as one page; no torch, Flower or Hydra."""

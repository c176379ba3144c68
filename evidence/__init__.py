"""Reports of runs: the content of a run folder, as JSON and as one page; no torch, Flower or Hydra."""

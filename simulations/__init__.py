"""Running a federation on one machine: engines, faults, plans, benchmarks."""

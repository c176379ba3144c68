"""Simulation of a federation on one machine: engines, faults, the app for ``flwr run``, attacks on a finished run."""

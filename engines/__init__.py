"""Engines of a simulation on other machines."""

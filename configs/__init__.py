"""Configuration: Hydra groups in YAML, composed, checked and frozen before anything else runs.

``schema`` defines the values, ``settings`` reads them, ``checks`` validates against the data and the model, ``compose``
is the interface to Hydra.
"""

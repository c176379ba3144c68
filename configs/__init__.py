"""Configuration: Hydra groups in YAML, composed, checked and frozen before anything else runs.

``schema`` holds the values, ``reader`` and ``settings`` make them, ``checks`` asks what needs the data or the
model, ``compose`` and ``files`` speak with Hydra.
"""

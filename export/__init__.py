"""Export of a model to the formats of other runtimes."""

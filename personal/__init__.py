"""Personal models: after a run, each client's choice among the released model, that model trained on, and one of its own."""

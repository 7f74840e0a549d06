"""The model that the real engine runs: one stage's layers, weights, cache and forward pass. Start with ``stage.py``."""

"""Systems whose point is where the model lies: over which GPUs, in which shapes, for which requests."""

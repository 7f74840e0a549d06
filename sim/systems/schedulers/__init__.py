"""Systems whose point is the scheduler of one engine: what goes into the next batch, and how KV is kept."""

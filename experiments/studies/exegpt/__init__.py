"""ExeGPT (ASPLOS 2024), section 7: schedules under latency bounds against FasterTransformer."""

"""One group of real runs or tables a file, each with its rows and bars. Start with ``kv_bound.py``."""

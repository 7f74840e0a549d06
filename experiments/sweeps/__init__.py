"""One scenario over rates, seeds and systems: ``sweep.py``."""

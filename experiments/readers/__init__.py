"""Results of load generators, each read by its own name: one tool a file; ``read.py`` tells them apart."""

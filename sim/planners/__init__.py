"""Who is on which GPU, in which phase: one search per file. ``pools.py`` first, which searches nothing; then
``provisioning.py`` (how many), and the published searches by their systems' names.
"""

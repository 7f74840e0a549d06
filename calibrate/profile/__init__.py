"""Latency profiles: the files, what they hold, and how well they fit.

``file.py`` reads and writes them, ``shipped/`` has those that come with the package, ``schema.py`` checks foreign
ones. ``relatives.py`` and ``scaling.py`` make a profile for a GPU that nobody measured; ``report.py`` judges one.
"""

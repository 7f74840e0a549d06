"""A published paper each: its tables and figures beside ours. Evidence, not product: nothing outside imports this room.

``python -m experiments.studies.NAME --out docs/studies/NAME`` writes a page, a table and figures. ``published.py`` says
what a compared figure is; a folder has the paper's setting (``world.py``) beside its ``study.py``.
"""

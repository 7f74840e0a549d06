"""Figures of finished runs: they read ``experiments.runs.rundir.Run`` objects or run directories, never the simulator.

Every figure function takes a mapping from label to ``Run`` and returns a ``Drawing``: the figure and the table behind
it. ``style.save`` writes PNG, SVG and CSV. ``gallery.save_all`` makes them all.
"""

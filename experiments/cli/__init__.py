"""The command ``phasewise``, one file a command, options only. ``app.py`` is the entrance: run, compare, plot."""

from experiments.cli.app import app, main

__all__ = ["app", "main"]

"""Figures of one or several finished runs. ``overview.py`` is the one for a slide, ``gallery.py`` makes them all."""

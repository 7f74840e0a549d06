"""A result as one HTML file that people pass on: ``phasewise report DIR``.

``folder.py`` reads whatever a command has written, ``sections.py`` says what a report of each kind has, ``charts.py``
and ``tables.py`` draw it with Bokeh, whose script is embedded, and ``page.py`` puts it together: no network, no script
of ours.
"""

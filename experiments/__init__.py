"""What users run, in rooms. Product: ``cli`` (the command), ``scenario`` (the file), ``runs`` (what a run leaves),
``planning``, ``sweeps`` and the ``jobs`` under them that survive, ``validation`` (predictions against execution and
real servers), ``plots``, ``reports`` (a result as one HTML file), ``pages`` (documents written from the code).
Evidence, which no other room imports: ``fidelity`` (errors against real runs), ``studies`` (a paper each) and
``benchmarks`` (speed). Follow a run from ``cli/app.py`` to ``scenario/resolve.py``.
"""

"""Long jobs that survive: one executor under sweeps, goodput and studies.

``executor.py`` is a ``concurrent.futures.Executor`` (read it first): it keeps every answer in a ``journal.py``, asks a
lost worker's point again, and runs where ``workers.py`` says: here, in processes, or on Dask. ``content.py`` says when
two points are the same; ``run.py`` is a job from its command, stopped or finished.
"""

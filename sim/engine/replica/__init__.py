"""One replica: its state (``state.py``; read it first), the requests in it (``job.py``, ``cohort.py``), the draft that
a batcher fills (``batch.py``), the iterations in flight (``flight.py``), what its scheduler does not see yet
(``veil.py``).
"""

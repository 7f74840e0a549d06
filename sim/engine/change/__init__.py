"""What changes a running cluster: faults, notices and new plans (``changes.py``), the weights that these fetch
(``loading.py``) and the requests that keep their KV (``keeping.py``).
"""

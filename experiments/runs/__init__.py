"""What a finished run leaves: ``rundir.py`` (the directory; read it first), ``tables.py`` (for people),
``comparison.py`` (several systems), and exports for other tools (``perfetto.py``, ``vllm_bench.py``,
``request_log.py``). ``progress.py`` is the log on stderr that every command shares.
"""

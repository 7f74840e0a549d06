"""The scenario file: what it may say (``file.py``, with its parts ``cluster.py``, ``workload.py`` and ``system.py``;
``part.py`` is what they share), what is said of a wrong one (``complaints.py``), and what the simulator gets
(``resolve.py``; read it first). ``planfile.py`` is a layout as a file.
"""

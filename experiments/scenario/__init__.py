"""The scenario file: what it may say (``file.py``, ``workload.py``, ``part.py``), what is said of a wrong one
(``complaints.py``), and what the simulator gets (``resolve.py``; read it first). ``planfile.py`` is a layout as a file.
"""

"""The processes that run a plan's stages: who they are (``crew.py``), started and ended (``fleet.py``), what one does
(``process.py``), and how they speak and send KV (``wire.py``, ``peers.py``, ``carriers.py``).
"""

"""Whether a prediction holds. ``validate.py`` executes a scenario on real kernels and compares; ``replay.py`` sends a
trace to a real server (``completions.py``, ``dialect.py``); ``measured.py`` sets a server's result file beside a
prediction. ``results/`` keeps our own validations, ``scenarios/`` what they ran.
"""

"""Microbenchmarks of one decoder layer on the device at hand. Start with ``family.py``, then ``runner.py``.

``family``: what is measured where. ``grid``: which point next. ``journal``: what is measured already, on disk.
``runner``: the order and the budget. None of these imports torch; ``device``, ``timer`` and the files of operators
(``layer``, ``attention``, ``cache``, ``transfers``, ``collectives``) do.
"""

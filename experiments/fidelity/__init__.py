"""How far predictions are from real runs: ``python -m experiments.fidelity --data DIR --out DIR``.

Real runs judge and are never fitted on, but for the constants in ``constants.py``, which no kernel table can give: each
is fitted on a stated part of the cells of one study (at most half), and the rest judges. One module per group of runs;
``table.py`` says what a row is, ``__main__.py`` writes tables and plots. ``unseen.py`` predicts any other run from its
metadata (``metadata.py``, ``recorded.py``); what such a prediction rests on is judged by leaving tables out
(``crossed.py``: operators; ``left_out.py``: steps; ``links.py``; ``memory.py``: KV). Start with ``kv_bound.py``.
"""

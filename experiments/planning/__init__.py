"""For whoever asks what to rent and how to lay it out: ``plan.py`` ranks a planner's candidates in the engine,
``goodput.py`` finds the highest rate within the SLO, ``budget.py`` chooses the GPUs. The plan file itself is in
``scenario/planfile.py``, since a scenario may name one.
"""

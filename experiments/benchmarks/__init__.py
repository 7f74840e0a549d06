"""How fast phasewise itself is: ``bench_engine`` (the engine and its process) and ``bench_plan`` (the planners)."""

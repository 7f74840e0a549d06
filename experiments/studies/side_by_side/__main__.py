"""``python -m experiments.studies.side_by_side``."""

from experiments.studies.side_by_side.study import main

main()

"""``python -m experiments.studies.thunderserve``."""

from experiments.studies.thunderserve.study import main

main()

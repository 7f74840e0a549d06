"""``python -m experiments.studies.distserve``."""

from experiments.studies.distserve.study import main

main()

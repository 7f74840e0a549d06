"""``python -m experiments.studies.spotserve``."""

from experiments.studies.spotserve.study import STUDY

STUDY.main()

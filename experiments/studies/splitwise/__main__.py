"""``python -m experiments.studies.splitwise``."""

from experiments.studies.splitwise.study import STUDY

STUDY.main()

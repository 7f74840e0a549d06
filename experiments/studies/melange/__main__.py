"""``python -m experiments.studies.melange``."""

from experiments.studies.melange.study import STUDY

STUDY.main()

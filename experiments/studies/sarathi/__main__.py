"""``python -m experiments.studies.sarathi``."""

from experiments.studies.sarathi.study import STUDY

STUDY.main()

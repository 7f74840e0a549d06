"""``python -m experiments.studies.exegpt``."""

from experiments.studies.exegpt.study import main

main()

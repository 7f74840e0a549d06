"""``python -m experiments.studies.vllm``."""

from experiments.studies.vllm.study import STUDY

STUDY.main()

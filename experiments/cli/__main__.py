"""``python -m experiments.cli``: the command ``phasewise``."""

from experiments.cli.app import main

main()

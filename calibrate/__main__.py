"""``python -m calibrate``: the same as ``phasewise calibrate``."""

import sys

from calibrate.cli import app
from sim.types import ConfigError, SimulationError

if __name__ == "__main__":
    try:
        app()
    except SimulationError as error:
        print(f"phasewise: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)

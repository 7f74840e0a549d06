"""Other projects' public measurements as profiles: ``phasewise calibrate import FORMAT PATH``, a format a file."""

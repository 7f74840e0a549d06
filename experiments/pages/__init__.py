"""Pages under ``docs/`` that are written from the code, so that they cannot be out of date; tests compare them."""

"""Trains everything that ships in the toybox: `loratorio-lab train --help`."""

"""Trains everything that ships in the toybox: `python -m loratorio.toybox.train --help`."""

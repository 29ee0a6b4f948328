"""State and the current model."""

from types import SimpleNamespace

state = SimpleNamespace(interrupted=False)
sd_model = None

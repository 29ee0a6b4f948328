"""What all tests share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Busy machines are slow at times; what is too slow on the whole, pytest's own timeout stops.
settings.register_profile("loratorio", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loratorio")

"""What all tests share."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

# Busy machines are slow at times; what is too slow on the whole, pytest's own timeout stops.
settings.register_profile("loratorio", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loratorio")

# The tests' tensors are tiny: threads that wait for each other on a busy machine make them many times slower.
torch.set_num_threads(1)

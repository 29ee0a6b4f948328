"""What is drawn at random within the model (Forge Neo's token merging does): the same in each of a step's calls."""

from __future__ import annotations

import torch


class RandomState:
    """The state of torch's own generators, for the CPU and for this device, where a step begins.

    The host makes one call where we make several, and rows of several mixes must differ by their LoRAs alone. Rewound before every call,
    the generators are after the step where the host's own call leaves them. Nothing here waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def rewind(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

"""What every part's training shares: a clock, an optimiser, averaged weights, resumable state, a log."""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loratorio_lab.toybox.world import Scene, random_elements, random_scene, render


@dataclass
class Run:
    """How long to train, where, and where to keep the state. Stops at `minutes` or `steps`, whichever comes first."""

    part: str
    work: Path
    log: Path
    device: str = "cpu"
    minutes: float = math.inf
    steps: float = math.inf
    seed: int = 0
    batch: int = 16
    spent: float = 0.0
    step: int = 0

    def __post_init__(self) -> None:
        self._since = time.monotonic()
        self.work.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)

    @property
    def state_file(self) -> Path:
        return self.work / f"{self.part}.pt"

    def tick(self) -> float:
        """Count one step and the time since the last; return progress in [0, 1]."""
        now = time.monotonic()
        self.spent += now - self._since
        self._since = now
        self.step += 1
        return self.progress

    @property
    def progress(self) -> float:
        return min(1.0, max(self.spent / 60 / self.minutes, self.step / self.steps))

    def say(self, text: str) -> None:
        """Append a line to the log that ships, and show it."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.part}: {text}"
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")

    def announce(self, model: nn.Module) -> None:
        """Say what begins, and start the clock: preparing the pictures doesn't count."""
        self._since = time.monotonic()
        count = sum(p.numel() for p in model.parameters())
        where = (
            torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
        )
        self.say(
            f"{count:,} parameters, batch {self.batch}, seed {self.seed}, torch {torch.__version__}, {where}, step {self.step}"
        )

    def save(self, **parts: Any) -> None:
        """Keep the state so that a killed run goes on where it was. The file is replaced in one move."""
        state = {name: p.state_dict() if hasattr(p, "state_dict") else p for name, p in parts.items()}
        temporary = self.state_file.with_suffix(".tmp")
        torch.save({"step": self.step, "spent": self.spent, **state}, temporary)
        os.replace(temporary, self.state_file)

    def resume(self, **parts: Any) -> bool:
        """Load the state of an earlier run of this part, if there is one."""
        if not self.state_file.exists():
            return False
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.step, self.spent = state["step"], state["spent"]
        self._since = time.monotonic()
        return True


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def seed_everything(seed: int) -> random.Random:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    return random.Random(seed)


def learning_rate(progress: float, warm: float = 0.03, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine down to `floor`; a factor on the optimiser's own rates."""
    if progress < warm:
        return (progress + 1e-3) / warm
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def _orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, by the quintic Newton-Schulz iteration of Muon (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    flip = x.size(0) > x.size(1)
    x = x.T if flip else x
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    made: Tensor = x.T if flip else x
    return made


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for weight matrices and convolution kernels. Learns small nets in fewer steps than Adam."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(mean, group["momentum"]).flatten(1)
                scale = 0.2 * math.sqrt(max(direction.shape))
                p.add_(_orthogonal(direction).view_as(p), alpha=-group["lr"] * scale)


class Optimisers:
    """Muon for the inner matrices, Adam for the rest, one learning-rate factor for both.

    Muon's step has the size of an Adam step of the same rate (0.2·√max(rows, columns); Liu et al. 2025).
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], lr: float, muon: bool = True) -> None:
        inner = [p for n, p in named if muon and p.ndim >= 2 and "embedding" not in n and "conv_in" not in n]
        ids = {id(p) for p in inner}
        outer = [p for _, p in named if id(p) not in ids]
        self.rate = lr
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        ]
        if inner:
            self.all.append(Muon(inner, lr=lr))
        self.params = [p for _, p in named]

    def step(self, factor: float, clip: float = 1.0) -> None:
        nn.utils.clip_grad_norm_(self.params, clip)
        for optimiser in self.all:
            for group in optimiser.param_groups:
                group["lr"] = self.rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimiser.state_dict() for i, optimiser in enumerate(self.all)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, optimiser in enumerate(self.all):
            optimiser.load_state_dict(state[str(i)])


class Average:
    """An exponential moving average of a model's weights, shorter at the start."""

    def __init__(self, model: nn.Module, decay: float = 0.998) -> None:
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, p in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(p, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)


def any_scene(rng: random.Random) -> Scene:
    """A scene of the whole world: a quarter of the base domain, the rest with one to five elements."""
    count = rng.choices((0, 1, 2, 3, 4, 5), (5, 8, 3, 2, 1, 1))[0]
    return random_scene(rng, *random_elements(rng, count))


def pictures(scenes: Iterable[Scene]) -> Tensor:
    """Rendered scenes as (B, 3, 64, 64) float32 in [-1, 1]."""
    stack = np.stack([render(scene) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

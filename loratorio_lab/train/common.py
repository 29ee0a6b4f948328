"""What every part's training shares: a clock, an optimiser, averaged weights, resumable state, a log."""

from __future__ import annotations

import math
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from loratorio.errors import LoratorioError
from loratorio_lab.toybox.world import World


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
    bf16: bool = False
    spent: float = 0.0
    cpu: float = 0.0
    step: int = 0
    loss: float = math.nan

    def __post_init__(self) -> None:
        self._start_clock()
        self.work.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)

    @property
    def state_file(self) -> Path:
        return self.work / f"{self.part}.pt"

    def lower_precision(self) -> torch.autocast:
        """Forward in bfloat16 if the run says so: nearly twice as fast for the autoencoder where the processor has it."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def _start_clock(self) -> None:
        self._since, self._cpu_since = time.monotonic(), time.process_time()

    def tick(self) -> None:
        """Count one step, the time and the processor's time since the last."""
        self.spent += time.monotonic() - self._since
        self.cpu += time.process_time() - self._cpu_since
        self._start_clock()
        self.step += 1

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
        """Log what begins, and start the clock: preparing the pictures does not count."""
        self._start_clock()
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
        numbers = {"step": self.step, "spent": self.spent, "cpu": self.cpu, "loss": self.loss}
        torch.save({**numbers, **state}, temporary)
        os.replace(temporary, self.state_file)

    def resume(self, **parts: Any) -> bool:
        """Load the state of an earlier run of this part, if there is one."""
        if not self.state_file.exists():
            return False
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        self.step, self.spent = int(state["step"]), state["spent"]
        self.cpu, self.loss = state["cpu"], state["loss"]
        self._start_clock()
        return True

    def rng(self) -> random.Random:
        """The random state after this many steps; torch's as well."""
        torch.manual_seed(self.seed + self.step)
        return random.Random(self.seed + self.step)


def is_trained(part: str, work: Path) -> bool:
    """Whether `averaged` finds this part."""
    return (work / f"{part}.pt").exists()


def averaged(part: str, work: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A part's averaged weights, from its state in `work`, and the numbers with them (step, loss, scale)."""
    if not is_trained(part, work):
        raise LoratorioError(f"{part} has not been trained: there is no {work / f'{part}.pt'}.")
    state = torch.load(work / f"{part}.pt", map_location="cpu", weights_only=True)
    return state["average"], {name: n for name, n in state.items() if isinstance(n, int | float)}


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


Model = TypeVar("Model", bound=nn.Module)


class Average(Generic[Model]):
    """An exponential moving average of a model's weights, shorter at the start."""

    def __init__(self, model: Model, decay: float = 0.998) -> None:
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, p in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(p, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)


def run_steps(
    run: Run,
    model: nn.Module,
    average: Average[Any],
    optimisers: Optimisers,
    losses_of: Callable[[], Mapping[str, Tensor]],
    every: int = 50,
    **numbers: float,
) -> None:
    """Train to the run's end; log the mean losses and keep the state after `every` steps and at the end.

    losses_of: the losses of a new batch, by name; `loss` is the one to go down.
    numbers: what is kept with the state.
    """
    run.announce(model)
    totals: Counter[str] = Counter()
    begun = run.step
    while (progress := run.progress) < 1:
        losses = losses_of()
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        optimisers.step(learning_rate(progress))
        average.update(model, run.step)
        run.tick()
        totals.update({name: loss.item() for name, loss in losses.items()})
        if run.step % every == 0 or run.progress >= 1:
            means = {name: total / (run.step - begun) for name, total in totals.items()}
            run.loss = means["loss"]
            said = " ".join(f"{name} {mean:.4f}" for name, mean in means.items())
            each = run.cpu / (run.step * run.batch)
            run.say(
                f"step {run.step} {said} minutes {run.spent / 60:.1f}, CPU seconds per picture {each:.3f}"
            )
            run.save(model=model, average=average, optimisers=optimisers, **numbers)
            totals.clear()
            begun = run.step


def pictures(world: World, scenes: Iterable[Any]) -> Tensor:
    """Rendered scenes of one size as (B, 3, H, W) float32 in [-1, 1]."""
    stack = np.stack([world.render(scene) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

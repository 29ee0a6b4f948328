"""Run as a program: every method, knob and role once on a pretended accelerator.

PyTorch's fake tensors have a device, a dtype and a shape, but no numbers. An operation on tensors of two devices fails as
on a real GPU, so a machine without one can tell whether everything is brought to the device that it is used on. It runs
in a process of its own: a pretended backend stays registered for good.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter, Dense, LowRank
from loratorio.compose.methods import METHODS
from loratorio.compose.mixes import Participants
from loratorio.compose.regions import Box, Place
from loratorio.compose.search import Layout
from loratorio.sampling import place_search
from loratorio.sampling.calls import Row
from loratorio.sampling.engine import Engine
from loratorio.sampling.step import Step
from loratorio.settings import Settings

DEVICE = "gpu:0"
LATENTS = {"pictures": (4, 9, 7), "frames": (4, 2, 9, 7)}
KNOBS: tuple[dict[str, Any], ...] = (
    {},
    {"adaptive": True, "blend": "interpolated", "top_k": 1, "rescale": 0.5, "weight_maps": True},
    {"share": 0.3},
    {"share": 0.3, "reuse": 1, "recentre": 0.5},
    {"reuse": 3, "recentre": 0.5, "weight_maps": True},
    {"blend": "overlapping", "recentre": 1.0, "start": 0.3, "end": 0.9},
    {"recentre": 0.0, "patch_size": 1},
)
PARTICIPANTS = {
    "contents": Participants.of(3),
    "a style": Participants.of(3, styles=[1]),
    "styles": Participants.of(3, styles=[0, 1, 2]),
    "always": Participants.of(3, always=[2]),
    "importance": Participants.of(3, importance={0: 2.0}),
    "sought places": Participants.of(
        3, places=dict.fromkeys((0, 2), Place((Box(0, 0, 1, 1),), 0.1, sought=True))
    ),
    "a pool": Participants.of(3, pooled=[0, 1, 2]),
}


class Model(nn.Module):
    """A convolution, a norm, a Linear layer and a 1×1 convolution."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
        self.first = nn.Conv2d(4, 8, 3, padding=1, **where)
        self.norm = nn.GroupNorm(2, 8, **where)
        self.linear = nn.Linear(8, 8, **where)
        self.last = nn.Conv2d(8, 4, 1, **where)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = self.norm(self.first(pictures))
        result: Tensor = self.last(self.linear(hidden.movedim(1, -1)).movedim(-1, 1))
        return result

    def layers(self) -> dict[str, nn.Module]:
        return dict(self.named_children())


def adapter(name: str) -> Adapter:
    """A LoRA that waits in main memory, as the hosts keep them."""
    return Adapter(
        name,
        {
            "first": [LowRank(torch.randn(4, 4, 3, 3), torch.randn(8, 4))],
            "linear": [
                LowRank(torch.randn(4, 8), torch.randn(8, 4)),
                Dense(torch.randn(8, 8), torch.randn(8)),
            ],
            "norm": [Dense(torch.randn(8), torch.randn(8))],
            "last": [Dense(torch.randn(4, 8, 1, 1), None)],
        },
    )


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: numbers read off it, and copies from the one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        ):
            self.count += 1
        elif isinstance(result, Tensor):
            devices = {
                each.device.type for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)
            }
            self.count += bool(devices - {result.device.type})
        return result

    def number(self, tensor: Tensor) -> None:
        """Called where Python asks a tensor for its numbers."""
        self.count += tensor.device.type != "cpu"


WAITS = Waits()


def compose(
    model: Model, settings: Settings, participants: Participants, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Sixteen steps of two pictures. With rows that were run together before, nothing may wait for the device: what lasts is made then."""
    together: list[tuple[Row, ...]] = []

    def predict(rows: list[Row]) -> Tensor:
        together.append(tuple(rows))
        frames = shape[1] if len(shape) == 4 else 1
        each = model(torch.randn(len(rows) * frames, 4, *shape[-2:], device=DEVICE, dtype=dtype))
        return each.unflatten(0, (len(rows), frames)).movedim(1, 2) if frames > 1 else each

    bank = Bank([adapter(name) for name in "abc"])
    engine = Engine(settings, bank, participants)
    # Which of a pool's candidates are run is decided by numbers.
    allowed = int(settings.method in ("loratorio", "relative") and participants.has_pool)
    total = 16
    with bank.attached(model.layers()), torch.inference_mode():
        bank.prepare(torch.device(DEVICE), dtype)
        for index in range(total):
            latents = torch.randn(2, *shape, device=DEVICE, dtype=dtype)
            before = WAITS.count
            composed = engine.step(Step(index, total, latents, 2, guidance=5.0), predict)  # type: ignore[arg-type]
            waited = WAITS.count - before
            # Where composing begins or ends a method has its own first step.
            begins = (
                index <= 1
                or (participants.seeks_places and index == settings.find_after)
                or index - 1 <= settings.start * total <= index + 1
            )
            is_known = together[-1] in together[:-1]
            if is_known and not begins and waited > allowed:
                raise AssertionError(f"step {index} waits {waited} times for the device")
            for part in (composed.cond, composed.uncond):
                assert part is not None
                assert (str(part.device), part.dtype) == (DEVICE, torch.float32)
                assert part.shape == latents.shape


def main() -> None:
    _setup_privateuseone_for_python_backend("gpu")

    # Fake tensors have no numbers: where the code asks for one it gets some number.
    def asked(answer: Callable[[Tensor], Any]) -> Any:
        def numbers(self: Tensor) -> Any:
            WAITS.number(self)
            return answer(self)

        return numbers

    FakeTensor.tolist = asked(lambda self: list(range(len(self))) if self.ndim == 1 else 0)  # type: ignore[method-assign]
    Tensor.item = asked(lambda self: 1.0)  # type: ignore[method-assign]
    Tensor.__bool__ = asked(lambda self: True)  # type: ignore[method-assign]
    Tensor.__float__ = asked(lambda self: 1.0)  # type: ignore[method-assign]
    Tensor.__int__ = asked(lambda self: 1)  # type: ignore[method-assign]
    halves = Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)
    place_search.layout = lambda *_: Layout(halves, 1.0, True, (1.0, 1.0))  # type: ignore[assignment]
    count = 0
    with FakeTensorMode(), WAITS:
        # The check itself must tell two devices apart.
        try:
            torch.ones(2, device=DEVICE) + torch.ones(2)
        except RuntimeError:
            pass
        else:
            raise AssertionError("fake tensors of two devices were added")
        # And the count must see what it is to count.
        for waiting in (
            lambda each: each.cpu(),
            lambda each: each.tolist(),
            lambda each: bool(each.sum()),
            lambda each: float(each[0]),
        ):
            before = WAITS.count
            waiting(torch.ones(2, device=DEVICE))
            assert WAITS.count == before + 1
        before = WAITS.count
        torch.ones(2).to(DEVICE)
        assert WAITS.count == before + 1
        dtype = torch.float16
        model = Model(dtype)
        for method, knobs, participants in itertools.product(METHODS, KNOBS, PARTICIPANTS):
            # What only LoRAtorio reads need not be tried with the others; `relative` is what users get by default.
            if method not in ("loratorio", "relative") and (
                knobs is not KNOBS[1] or participants not in ("contents", "importance")
            ):
                continue
            if PARTICIPANTS[participants].seeks_places and "start" in knobs:
                continue  # places must be composed in every step
            for kind, shape in LATENTS.items() if knobs is KNOBS[0] else [("pictures", LATENTS["pictures"])]:
                try:
                    settings = Settings(enabled=True, method=method, **knobs)
                    compose(model, settings, PARTICIPANTS[participants], shape, dtype)
                except Exception as problem:
                    raise AssertionError(f"{method}, {knobs}, {participants}, {kind}") from problem
                count += 1
    print(f"{count} compositions")


if __name__ == "__main__":
    main()

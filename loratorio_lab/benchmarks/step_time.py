"""What one denoising step costs: composed by LoRAtorio, and by the other ways to ask a model under several LoRAs.

Run: loratorio-lab step-time [--quick] [--json FILE]

The model is a UNet of Stable Diffusion 1.5's size with random weights (nothing is downloaded), the LoRAs are random
ones on the layers that kohya's trainer takes. All variants see the same rows; they take turns within a round, so that
whatever else the machine does hits all of them alike. Times are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter, LowRank
from loratorio.compose.guidance import compose, guide, recentre
from loratorio.compose.methods.loratorio import by_similarity, spatial_weights
from loratorio.sampling.calls import Row
from loratorio.sampling.engine import Engine
from loratorio.sampling.step import Step
from loratorio.settings import PRESET, PRESETS, Settings
from loratorio_lab.knobs import measured, said

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
"""Stable Diffusion 1.5's UNet is diffusers' default but for these."""

TINY = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "layers_per_block": 1,
}
"""For a check that this script runs, not for figures."""

CFG_SCALE = 7.0
TOKENS = 77

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

VARIANTS = {
    "plain": "plain step, 2 rows",
    "ours": "LoRAtorio",
    "bare": "LoRAtorio's rows without LoRAs",
    "passes": "N+1 plain steps",
    "remerge": "N+1 passes, weights re-merged",
    "set_adapters": "N+1 passes, diffusers' set_adapters",
}


def lora_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers of a kohya LoRA: linear and 1×1 convolution layers inside the transformers."""
    return {
        name: layer
        for name, layer in unet.named_modules()
        if "attentions" in name and isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def random_adapter(name: str, layers: dict[str, nn.Module], rank: int, generator: torch.Generator) -> Adapter:
    """A LoRA of some rank on all these layers, with numbers of a trained one's order of magnitude."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    deltas = {}
    for layer_name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        down = normal(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5
        deltas[layer_name] = [LowRank(down, normal(weight.shape[0], rank) * 0.02)]
    return Adapter(name, deltas)


@dataclass
class Workbench:
    """A model, as often as a variant needs its own hooks or wrappers (the weights are shared), and its LoRAs."""

    unet: nn.Module
    hooked_unet: nn.Module
    peft_unet: Any
    layers: dict[str, nn.Module]
    adapters: list[Adapter]
    merge_backup: dict[str, Tensor]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def make(
        cls, config: dict[str, Any], count: int, rank: int, device: torch.device, dtype: torch.dtype
    ) -> Workbench:
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config).eval().requires_grad_(False).to(device, dtype)
        peft_unet = _twin(unet)
        layers = lora_layers(unet)
        generator = torch.Generator().manual_seed(1)
        adapters = [random_adapter(f"lora{number}", layers, rank, generator) for number in range(count)]
        for adapter in adapters:
            _add_to_peft(peft_unet, adapter, rank)
        backup = {name: layer.weight.detach().clone() for name, layer in layers.items()}  # type: ignore[operator]
        on_device = [_moved(adapter, device, dtype) for adapter in adapters]
        return cls(unet, _twin(unet), peft_unet, layers, on_device, backup, device, dtype)

    def predict(self, unet: nn.Module, latents: Tensor, texts: Tensor) -> Tensor:
        sample: Tensor = unet(latents, 500, texts, return_dict=False)[0]
        return sample


def _twin(model: nn.Module) -> Any:
    """Modules of its own, to hook or wrap, over the same weights."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _moved(adapter: Adapter, device: torch.device, dtype: torch.dtype) -> Adapter:
    deltas = {
        name: [LowRank(delta.down.to(device, dtype), delta.up.to(device, dtype), delta.scale)]
        for name, (delta,) in adapter.deltas.items()
        if isinstance(delta, LowRank)
    }
    return Adapter(adapter.name, deltas, adapter.strength)


def _add_to_peft(unet: Any, adapter: Adapter, rank: int) -> None:
    targets = list(adapter.deltas)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter.name)
    modules = dict(unet.named_modules())
    for name, (delta,) in adapter.deltas.items():
        assert isinstance(delta, LowRank)
        down, up = modules[name].lora_A[adapter.name].weight, modules[name].lora_B[adapter.name].weight
        down.data.copy_(delta.down.reshape(down.shape))
        up.data.copy_(delta.up.reshape(up.shape))


class Variants:
    """Every way to do one step with N LoRAs at one picture size; each method makes a whole step with guidance."""

    def __init__(self, bench: Workbench, count: int, pixels: int) -> None:
        self.bench = bench
        self.adapters = bench.adapters[:count]
        self.bank = Bank(self.adapters)
        self.engine = Engine(measured({PRESET: "paper"}), self.bank)
        self.at = (10, 20)
        self.rows = 0
        generator = torch.Generator().manual_seed(2)
        side = pixels // 8

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(bench.device, bench.dtype)

        self.latents = normal(1, 4, side, side)
        self.texts = normal(2, TOKENS, bench.unet.config.cross_attention_dim)  # type: ignore[union-attr,arg-type]

    def run(self, name: str) -> Tensor:
        with torch.inference_mode():
            result: Tensor = getattr(self, name)()
        return result

    def plain(self) -> Tensor:
        return self._pass(self.bench.unet)

    def ours(self) -> Tensor:
        step = Step(*self.at, self.latents, 1, denoised=False)
        composition = self.engine.step(step, lambda rows: self._predict(self.bench.hooked_unet, rows))
        assert composition.uncond is not None
        return guide(composition.cond, composition.uncond, CFG_SCALE)

    def bare(self) -> Tensor:
        rows = [Row((), cond, 0) for cond in (True, False) for _ in range(len(self.adapters) + 1)]
        return self._predict(self.bench.unet, rows)

    def passes(self) -> Tensor:
        return self._composed([self._pass_pair(self.bench.unet) for _ in range(len(self.adapters) + 1)])

    def remerge(self) -> Tensor:
        """As AUTOMATIC1111's WebUI switches LoRAs: weights out of their backup, and the LoRA's product onto them.

        The arithmetic is its `network_apply_weights` and `finalize_updown`, step by step.
        """
        pairs = [self._pass_pair(self.bench.unet)]
        for adapter in self.adapters:
            for name, (delta,) in adapter.deltas.items():
                assert isinstance(delta, LowRank)
                weight = self._restored(name)
                updown = (delta.up @ delta.down.flatten(1)).reshape(weight.shape)
                updown = updown * delta.scale
                updown = updown * adapter.strength
                weight.copy_(weight + updown)
            pairs.append(self._pass_pair(self.bench.unet))
        for name in self.bench.layers:
            self._restored(name)
        return self._composed(pairs)

    def _restored(self, name: str) -> Tensor:
        weight = self.bench.layers[name].weight
        assert isinstance(weight, Tensor)
        return weight.copy_(self.bench.merge_backup[name])

    def set_adapters(self) -> Tensor:
        unet = self.bench.peft_unet
        unet.disable_lora()
        pairs = [self._pass_pair(unet)]
        unet.enable_lora()
        for adapter in self.adapters:
            unet.set_adapters(adapter.name)
            pairs.append(self._pass_pair(unet))
        return self._composed(pairs)

    def _predict(self, unet: nn.Module, rows: Sequence[Row]) -> Tensor:
        self.rows += len(rows)
        texts = self.texts[[0 if row.cond else 1 for row in rows]]
        return self.bench.predict(unet, self.latents.expand(len(rows), -1, -1, -1), texts)

    def _pass_pair(self, unet: nn.Module) -> tuple[Tensor, Tensor]:
        cond, uncond = self.bench.predict(unet, self.latents.expand(2, -1, -1, -1), self.texts).chunk(2)
        return cond, uncond

    def _pass(self, unet: nn.Module) -> Tensor:
        return guide(*self._pass_pair(unet), CFG_SCALE)

    def _composed(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Compose a base's and N LoRAs' predictions, to see that all variants answer the same."""
        settings = self.engine.settings
        (base_cond, base_uncond), *solos = pairs
        return composed(
            base_cond,
            base_uncond,
            torch.stack([c for c, _ in solos]),
            torch.stack([u for _, u in solos]),
            settings,
        )


def composed(
    base_cond: Tensor, base_uncond: Tensor, conds: Tensor, unconds: Tensor, settings: Settings
) -> Tensor:
    weights = spatial_weights(
        base_cond, conds, by_similarity(settings.temperature), settings.patch_size, settings.top_k
    )
    if len(conds) == 1:
        weights = torch.ones_like(weights)
    return guide(
        compose(conds, weights), recentre(base_uncond, unconds, weights, settings.recentre), CFG_SCALE
    )


def timed(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    _synchronise(device)
    begin = clock()
    work()
    _synchronise(device)
    return clock() - begin


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def measure(bench: Workbench, count: int, pixels: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """Median seconds per step of every variant, how far their results are apart, and our ratios."""
    variants = Variants(bench, count, pixels)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    order = list(VARIANTS)
    with variants.bank.attached(lora_layers(bench.hooked_unet)):
        # The first step stacks the LoRAs, chooses kernels and so on; a picture has twenty more that do not.
        ours, reference = variants.run("ours"), variants.run("remerge")
        for number in range(rounds):
            first = number % len(order)
            for name in order[first:] + order[:first]:
                seconds[name].append(timed(partial(variants.run, name), bench.device, clock))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "loras": count,
        "pixels": pixels,
        "seconds": median,
        "all_seconds": seconds,
        "relative_error": float((ours - reference).norm() / reference.norm()),
        "ours_over_plain": median["ours"] / median["plain"],
        "ours_over_passes": median["ours"] / median["passes"],
        "ours_over_remerge": median["ours"] / median["remerge"],
        "ours_over_set_adapters": median["ours"] / median["set_adapters"],
        "hooks_share": 1 - median["bare"] / median["ours"],
    }


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that are dispatched while it is entered: about what a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Views compute nothing.
        self.count += not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))


def measure_presets(
    bench: Workbench,
    presets: Sequence[str],
    count: int,
    pixels: int,
    rounds: int,
    clock: Clock,
    steps: int = 20,
) -> dict[str, Any]:
    """Whole schedules by each of these presets, step by step in turns with plain steps.

    Returns:
        seconds, rows and operations of a mean step, and the seconds over a plain step's.
    """
    variants = {name: Variants(bench, count, pixels) for name in presets}
    plain = Variants(bench, count, pixels)
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *presets)}
    with ExitStack() as attached:
        layers = lora_layers(bench.hooked_unet)
        for variant in variants.values():
            attached.enter_context(variant.bank.attached(layers))
            variant.bank.prepare(bench.device, bench.dtype)
        for variant in (plain, *variants.values()):
            variant.run("ours" if variant is not plain else "plain")  # chooses kernels and so on
            variant.rows = 0
        for number in range(rounds):
            for name, variant in variants.items():
                variant.engine = Engine(measured({PRESET: name}), variant.bank)
            for index in range(steps):
                order = list(seconds)
                first = (number + index) % len(order)
                for name in order[first:] + order[:first]:
                    if name == "plain":
                        work = partial(plain.run, "plain")
                    else:
                        variants[name].at = (index, steps)
                        work = partial(variants[name].run, "ours")
                    seconds[name].append(timed(work, bench.device, clock))
        rows = {name: variant.rows / rounds / steps for name, variant in variants.items()}
        operations = {"plain": _dispatched(partial(plain.run, "plain"))}
        for name, variant in variants.items():
            # What the middle of the schedule dispatches; it comes round every few steps.
            counts = []
            for index in range(8, 12):
                variant.at = (index, steps)
                counts.append(_dispatched(partial(variant.run, "ours")))
            operations[name] = statistics.mean(counts)
    mean = {name: statistics.mean(values) for name, values in seconds.items()}
    return {
        "loras": count,
        "pixels": pixels,
        "seconds": mean,
        "all_seconds": seconds,
        "rows": {"plain": 2.0, **rows},
        "operations": operations,
        "over_plain": {name: value / mean["plain"] for name, value in mean.items()},
        "peak_bytes": _peak(bench.device),
    }


def _dispatched(work: Callable[[], object]) -> float:
    with Dispatched() as operations:
        work()
    return float(operations.count)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def compose_share(bench: Workbench, pixels: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """What composing the predictions of 5 LoRAs takes, as part of a plain two-row step at the same size."""
    variants = Variants(bench, 5, pixels)
    side = pixels // 8
    predictions = torch.randn(12, 1, 4, side, side, device=bench.device).to(bench.dtype)
    settings = measured({PRESET: "paper"})

    def work() -> None:
        composed(predictions[0], predictions[6], predictions[1:6], predictions[7:], settings)

    work()
    composing = statistics.median(timed(work, bench.device, clock) for _ in range(20))
    variants.run("plain")
    step = statistics.median(
        timed(partial(variants.run, "plain"), bench.device, clock) for _ in range(rounds)
    )
    return {
        "loras": 5,
        "pixels": pixels,
        "compose_seconds": composing,
        "plain_seconds": step,
        "share": composing / step,
    }


def machine(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


RATIOS = ("ours_over_plain", "ours_over_passes", "ours_over_remerge", "ours_over_set_adapters")


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['pixels']} px, {result['loras']} LoRAs (relative error {result['relative_error']:.1e})")
    for name, label in VARIANTS.items():
        print(f"  {label:<38}{result['seconds'][name] * 1000:10.0f} ms")
    ratios = ", ".join(f"{ratio.replace('_', ' ')} {result[ratio]:.2f}" for ratio in RATIOS)
    print(f"  {ratios}, hooks {result['hooks_share']:.1%} of the step", flush=True)


def report_presets(result: dict[str, Any]) -> None:
    print(f"\n{result['pixels']} px, {result['loras']} LoRAs, a mean step of 20")
    print(f"  {'':<12}{'plain steps':>12}{'ms':>10}{'rows':>8}{'operations':>12}")
    for name, mean in result["seconds"].items():
        ratio, rows, count = (result[key][name] for key in ("over_plain", "rows", "operations"))
        print(f"  {name:<12}{ratio:12.2f}{mean * 1000:10.0f}{rows:8.2f}{count:12.0f}")
    if result["peak_bytes"]:
        print(f"  most memory allocated: {result['peak_bytes'] / 2**30:.2f} GiB")
    sys.stdout.flush()


def report_compose(share: dict[str, Any]) -> None:
    print(
        f"\ncomposing at {share['pixels']} px with 5 LoRAs: {share['compose_seconds'] * 1000:.2f} ms, "
        f"{share['share']:.2%} of a plain step ({share['plain_seconds'] * 1000:.0f} ms)",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="loratorio-lab step-time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and one round: does the script run?"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256], metavar="PX")
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2, 3, 5], metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--preset-counts",
        type=int,
        nargs="*",
        default=[3],
        metavar="N",
        help="LoRAs, for the presets' schedules",
    )
    parser.add_argument("--presets", nargs="+", choices=tuple(PRESETS), default=list(PRESETS))
    parser.add_argument("--preset-rounds", type=int, default=1, help="how many schedules of each preset")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--compose-size",
        type=int,
        default=512,
        metavar="PX",
        help="for the share of composing; 0 leaves it out",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's own choice)")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: this process's own time, for a machine with other work on it",
    )
    options = parser.parse_args(arguments)
    clock = CLOCKS[options.clock]
    if options.threads:
        torch.set_num_threads(options.threads)
    rounds = 1 if options.quick else options.rounds
    sizes = [64] if options.quick else options.sizes
    most = max(5, *options.counts, *options.preset_counts)
    bench = Workbench.make(
        TINY if options.quick else SD15, most, options.rank, options.device, getattr(torch, options.dtype)
    )
    summary: dict[str, Any] = {
        "machine": machine(options.device),
        "model": "tiny" if options.quick else "SD 1.5",
        "dtype": options.dtype,
        "rank": options.rank,
        "rounds": rounds,
        "clock": options.clock,
        "steps": [],
    }

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(summary, indent=1) + "\n")

    for name in ("paper", *options.presets):
        summary.setdefault("knobs", {})[name] = said(measured({PRESET: name}))
    for name, knobs in summary["knobs"].items():
        print(f"{name}: {knobs}")
    print(f"{summary['machine']}, {summary['model']}, {options.dtype}, rank {options.rank}", flush=True)
    for pixels in sizes:
        for count in options.counts:
            summary["steps"].append(measure(bench, count, pixels, rounds, clock))
            report(summary["steps"][-1])
            save()
    summary["presets"] = []
    for pixels in sizes:
        for count in options.preset_counts:
            summary["presets"].append(
                measure_presets(bench, options.presets, count, pixels, options.preset_rounds, clock)
            )
            report_presets(summary["presets"][-1])
            save()
    if options.compose_size:
        summary["compose"] = compose_share(
            bench, 64 if options.quick else options.compose_size, min(rounds, 3), clock
        )
        report_compose(summary["compose"])
        save()
    return 0

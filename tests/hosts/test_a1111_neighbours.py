"""Beside extensions that change LoRAs while A1111 samples, against the stand-in of tests/standin/a1111."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.hosts.test_a1111 import JOBS, close, compose, slowly, trace
from tests.published import paper


@contextmanager
def by_step(
    a1111: Any, networks: Sequence[Any], schedule: Any, seen: list[Any] | None = None
) -> Iterator[None]:
    """An extension that sets strengths at every evaluation, as LoRA Block Weight does: schedule(step, network) → strength."""

    def change(params: Any) -> None:
        if seen is not None:
            seen.append([net.name for net in a1111.networks.loaded_networks])
        for net in networks:
            strength = schedule(params.denoiser.step, net)
            net.te_multiplier = net.unet_multiplier = strength

    a1111.callbacks.on_cfg_denoiser(change)
    try:
        yield
    finally:
        a1111.callbacks.remove_callbacks_for_function(change)


SCHEDULES = {
    "stops": lambda step, net: 1.0 if step < 2 else 0.0,
    "starts": lambda step, net: 0.0 if step < 2 else 0.7,
    "glides": lambda step, net: 1.0 - 0.3 * step,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("method", ["loratorio", "merge", "frequency"])
def test_one_lora_and_merge_follow_the_strengths(a1111: Any, standin: Any, name: str, method: str) -> None:
    """The text encoder's part keeps the strength that it had when the WebUI made its conditioning, as without us."""
    loras = [standin.lora("a", 1)] if method != "merge" else [standin.lora("a", 1), standin.full("b", 2)]
    with by_step(a1111, loras[-1:], SCHEDULES[name]):
        wanted = standin.run(standin.job(*loras))
        found, _ = compose(standin.job(*loras), method=method, recentre=0.0, reuse=3)
    still, _ = compose(standin.job(*loras), method=method, recentre=0.0)
    if method == "frequency":  # has its own way with a single LoRA: only that it is not the constant one's
        assert not close(found, still)
        return
    assert close(found, wanted)
    assert not close(found, still)


def test_two_are_the_slow_reference(a1111: Any, standin: Any) -> None:
    """One of two LoRAs stops after two steps: from there on the other is alone."""
    a, b = standin.lora("a", 1), standin.lora("b", 2, text=False)
    seen: list[Any] = []
    before = trace(a1111, standin)[:-1]  # the caches of conditioning are the WebUI's
    with by_step(a1111, [b], SCHEDULES["stops"], seen):
        found, job = compose(standin.job(a, b), recentre=0.5, reuse=1)
    b.te_multiplier = b.unet_multiplier = 1.0
    with torch.no_grad():
        assert close(found, slowly(a1111, standin, [a, b], paper(recentre=0.5), until=2), 1e-3)
    # What another extension finds activated is what the WebUI has activated.
    assert seen == [["a", "b"]] * 4
    assert [(use.strength, use.most) for use in job.passes[0].uses] == [(1.0, 1.0), (0.0, 1.0)]
    a1111.networks.loaded_networks.clear()
    assert trace(a1111, standin)[:-1] == before


def test_a_strength_that_is_worked_out_anew_is_followed(a1111: Any, standin: Any, monkeypatch: Any) -> None:
    """loractl makes the strength a property of the WebUI's class, 0 at the first step; and it takes a tag's arguments away."""
    step = SimpleNamespace(now=0)

    def now(net: Any) -> float:
        return 0.4 * step.now if net.name == "b" else net.__dict__["_own"]

    def keep(net: Any, value: float) -> None:
        net.__dict__["_own"] = value

    a, b = standin.lora("a", 1), standin.lora("b", 2, text=False)
    for net in (a, b):
        net.__dict__.pop("te_multiplier")
        net.__dict__.pop("unet_multiplier")
        net.__dict__["_own"] = 1.0
    for name in ("te_multiplier", "unet_multiplier"):
        monkeypatch.setattr(a1111.networks.Network, name, property(now, keep), raising=False)

    def count(params: Any) -> None:
        step.now = params.denoiser.step

    a1111.callbacks.on_cfg_denoiser(count)
    try:
        for method, loras in (("merge", (a, b)), ("loratorio", (b,))):
            step.now = 0
            wanted = standin.run(standin.job(*loras))
            step.now = 0
            found, job = compose(standin.job(*loras), method=method, recentre=0.0)
            assert close(found, wanted), method
            assert str(job.passes[0].uses[-1]) == "b:0 to 1.2"
    finally:
        a1111.callbacks.remove_callbacks_for_function(count)


def test_arguments_that_another_extension_takes_away_still_count(a1111: Any, standin: Any) -> None:
    Tag = a1111.run.Tag
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    tag = Tag(b)
    tag.items = ["b", "1@0,0@1", "role=style", "a=b=c"]
    taken, job = compose(standin.job(a, tag))
    written, _ = compose(standin.job(a, Tag(b, named={"role": "style"})))
    assert torch.equal(taken, written)
    assert job.notes == []


def attention_of(path: str) -> Any:
    """A function as if it stood in this file."""
    made: dict[str, Any] = {}
    exec(compile("def forward(x, context=None):\n    return x\n", path, "exec"), made)
    return made["forward"]


class CrossAttention(torch.nn.Module):
    def forward(self, x: Any, context: Any = None) -> Any:
        return x


@pytest.mark.parametrize(
    "path", ["/webui/extensions/sd-webui-negpip/scripts/negpip.py", "/webui/modules/x.py"]
)
def test_replaced_attention_is_left_to_the_webui(a1111: Any, standin: Any, path: str) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    attention = CrossAttention()
    standin.model.model.diffusion_model.attn2 = attention
    attention.forward = attention_of(path)
    for loras in ((a, b), (a,)):
        found, job = compose(standin.job(*loras), recentre=0.0)
        if "extensions" in path:
            assert torch.equal(found, standin.run(standin.job(*loras)))
            assert job.notes == [
                "LoRAtorio did not compose the LoRAs, and the WebUI merged them: the extension sd-webui-negpip replaces the model's "
                "attention and depends on the WebUI's own rows."
            ]
        else:  # the WebUI's own ways to put a function there look at one row at a time
            assert job.notes == []


def test_arguments_that_nobody_reads_are_said(a1111: Any, standin: Any) -> None:
    Tag = a1111.run.Tag
    a, b = standin.lora("a", 1), Tag(standin.lora("b", 2), named={"rolle": "style", "lbw": "XYZ", "dyn": "4"})
    _, job = compose(standin.job(a, b))
    assert job.notes == [
        "Unknown options in LoRA tags, which have no effect: rolle= of LoRA b (did you mean role?), lbw= of LoRA b."
    ]
    block_weight = SimpleNamespace(filename="/webui/extensions/x/scripts/lora_block_weight.py")
    _, job = compose(standin.job(a, b, scripts=SimpleNamespace(alwayson_scripts=[block_weight])))
    assert job.notes == [
        "Unknown options in LoRA tags, which have no effect: rolle= of LoRA b (did you mean role?)."
    ]


def tiled(forward: Callable[..., torch.Tensor], at_once: int) -> Callable[..., torch.Tensor]:
    """Halves of the picture that overlap, so many in a call, the whole batch repeated for each: as Tiled Diffusion does."""

    def tile_by_tile(x: torch.Tensor, sigma: torch.Tensor, cond: dict[str, Any]) -> torch.Tensor:
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        places = [(0, 4), (2, 6), (4, 8)]
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]

            def repeated(value: Any, times: int = len(some)) -> Any:
                if isinstance(value, list):
                    return [repeated(each) for each in value]
                return value.repeat(times, *[1] * (value.ndim - 1))

            answer = forward(
                torch.cat([x[..., a:b] for a, b in some]),
                repeated(sigma),
                cond={key: repeated(value) for key, value in cond.items()},
            )
            for (a, b), part in zip(some, answer.split(len(x)), strict=True):
                total[..., a:b] += part
                count[..., a:b] += 1
        return total / count

    return tile_by_tile


@pytest.mark.parametrize("where", ["the sampler's wrapper", "the model"])
@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("job", ["plain", "batch", "AND in a batch", "long prompt", "timestep sampler"])
@pytest.mark.parametrize("is_xl", [False, True], ids=["SD 1", "SDXL"])
def test_tiles(a1111: Any, where: str, at_once: int, job: str, is_xl: bool) -> None:
    """The same LoRA as two files is the WebUI with it once."""
    standin = a1111.run.Standin(xl=is_xl)
    one, twin = standin.lora("a", 1), standin.lora("twin", 1)
    fields = JOBS[job]

    def install(p: Any) -> None:
        model = p.sampler.model_wrap_cfg.inner_model
        model.forward = tiled(model.forward, at_once)

    if where == "the model":
        standin.model.apply_model = tiled(standin.model.apply_model, at_once)
    events = [("process_before_every_sampling", install)] if where != "the model" else []
    p = standin.job(one, **fields)
    p.events = events
    own = standin.run(p)
    p = standin.job(one, twin, **fields)
    found, done = compose(p, before=events, recentre=0.0)
    assert done.notes == []
    assert close(found, own)
    if where == "the model":
        del standin.model.apply_model
    assert not close(own, standin.run(standin.job(one, **fields)))


@pytest.mark.parametrize(
    "info", [{"Region control": {}}, '{"Region control": {}}', {"Method": "MultiDiffusion"}]
)
def test_tiled_diffusions_regions_are_left_to_the_webui(standin: Any, info: Any) -> None:
    """They count on the WebUI's own rows, and activate LoRAs in the middle of a step."""
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    p = standin.job(a, b)
    p.extra_generation_params["Tiled Diffusion"] = info
    found, job = compose(p)
    merges = "Region control" in info
    assert torch.equal(found, standin.run(standin.job(a, b))) == merges
    assert ["Region Prompt Control" in note for note in job.notes] == [True] * merges

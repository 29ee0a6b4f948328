"""The adapter for the Forge family, against the stand-in of tests/standin/forge."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loratorio.compose import search
from loratorio.compose.methods import METHODS
from loratorio.compose.methods.loratorio import by_similarity, spatial_weights
from loratorio.errors import LoratorioError
from loratorio.job import Job
from tests.hosts.conftest import assert_encoded_once
from tests.published import paper

STANDIN = Path(__file__).parent.parent / "standin" / "forge"
PACKAGES = ("modules", "networks", "backend", "ldm_patched", "modules_forge", "run")


@pytest.fixture(scope="module")
def webui() -> Iterator[Any]:
    """The stand-in's modules, importable as the WebUI's are, for this file only."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in PACKAGES}
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, str(STANDIN))
    try:
        import networks
        import run  # type: ignore[import-not-found, unused-ignore]
        from backend import memory_management
        from modules import processing, prompt_parser, shared

        yield SimpleNamespace(
            run=run,
            shared=shared,
            networks=networks,
            memory=memory_management,
            parser=prompt_parser,
            processing=processing,
        )
    finally:
        sys.path.remove(str(STANDIN))
        for name in list(sys.modules):
            if name.split(".")[0] in PACKAGES:
                del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture(params=["neo", "forge", "reforge"])
def standin(webui: Any, request: Any) -> Any:
    made = webui.run.Standin(request.param)
    made.lora("a", 1)
    made.lora("b", 2, text=False)
    made.lora("c", 3, full=True)
    return made


def host(standin: Any) -> Any:
    from loratorio.hosts.forge import Forge
    from loratorio.hosts.forge.variants import Neo, ReForge, Variant

    return Forge({"neo": Neo, "forge": Variant, "reforge": ReForge}[standin.model.variant]())


def compose(
    standin: Any,
    p: Any,
    before: Callable[[Any], None] | None = None,
    after: Callable[[Any], None] | None = None,
    **knobs: Any,
) -> tuple[torch.Tensor, Job]:
    """The job's samples with LoRAtorio ticked; `before` and `after` are other extensions' events before sampling."""
    job = Job(p, paper(enabled=True, **knobs), tell=p.comment)
    ours = host(standin)
    event = "process_before_every_sampling"
    p.events = []
    p.events += [(event, before)] if before else []
    p.events += [(event, lambda p: ours.before_sampling(job))]
    p.events += [(event, after)] if after else []
    return standin.run(p), job


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-4) -> bool:
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def trace(standin: Any) -> list[Any]:
    """What composing must leave as it was, once the host has loaded its own weights again."""
    objects = standin.model.forge_objects_original
    objects.unet.load()
    objects.clip.patcher.load()
    models = objects.unet.model, objects.clip.patcher.model
    return [
        *(value.clone() for model in models for value in model.state_dict().values()),
        torch.tensor([len(layer._forward_hooks) for model in models for layer in model.modules()]),
        torch.tensor(len(objects.unet.model_options)),
    ]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def slow_reference(standin: Any, p: Any, names: list[str], recentre: float, **knobs: Any) -> torch.Tensor:
    """Every prediction by the host's own merging of one LoRA, composed by the paper's formulas. No AND."""
    import networks
    from backend.sampling import sampling_function
    from backend.sampling.condition import compile_conditions
    from modules import prompt_parser

    original = standin.model.forge_objects_original
    states = [(original.unet, original.clip)]
    for name in names:
        file = dict(networks.files[f"/loras/{name}"])
        states.append(networks.load_lora_for_models(original.unet, original.clip, file, 1.0, 1.0, name))
    generator = torch.Generator().manual_seed(p.seed)
    x = torch.randn(len(p.prompts), *p.shape, generator=generator) * 10
    sigmas = torch.linspace(10, 0, p.steps + 1)
    for step, (now, then) in enumerate(itertools.pairwise(sigmas.tolist())):
        rows = []
        for unet, clip in states:
            standin.model.forge_objects.clip = clip
            texts = []
            for prompts in (p.prompts, p.negative_prompts):
                schedules = prompt_parser.get_learned_conditioning(standin.model, prompts, p.steps)
                texts.append(compile_conditions(prompt_parser.reconstruct_cond_batch(schedules, step)))
            unet.load()
            sigma = torch.full((len(x),), now)
            rows.append(
                sampling_function.calc_cond_uncond_batch(unet.model, *texts, x, sigma, unet.model_options)
            )
        conds, unconds = (torch.stack(part) for part in zip(*rows, strict=True))
        weights = spatial_weights(
            x - conds[0], x - conds[1:], by_similarity(knobs["temperature"]), knobs["patch_size"]
        )[:, :, None]
        cond = (weights * conds[1:]).sum(dim=0)
        uncond = recentre * unconds[0] + (1 - recentre) * (weights * unconds[1:]).sum(dim=0)
        denoised = uncond + p.cfg_scale * (cond - uncond)
        x = x + (x - denoised) / now * (then - now)
    return x


KNOBS: dict[str, Any] = {"method": "loratorio", "patch_size": 2, "temperature": 0.05, "adaptive": False}


@pytest.mark.parametrize("strengths", [(1.0, 0.5), (1.0, 1.0)])
def test_a_lora_that_two_tags_name_acts_as_in_the_host(
    webui: Any, standin: Any, strengths: tuple[float, float]
) -> None:
    """Forge keeps one of two with the same strength."""
    tags = [webui.run.tag("a", 0.5, strengths[0]), webui.run.tag("a", 1.0, strengths[1])]
    composed, job = compose(standin, standin.job(*tags), recentre=0.0)
    assert close(composed, standin.run(standin.job(*tags)))
    total = sum(set(strengths)) if standin.model.variant == "forge" else sum(strengths)
    uses = [str(use) for use in job.passes[0].uses]
    assert uses == ["a:1.5" if total == 1.5 else f"a:{total:g} text 1.5"]
    merged, _ = compose(standin, standin.job(*tags, "b"), method="merge")
    assert close(merged, standin.run(standin.job(*tags, "b")))
    both, _ = compose(standin, standin.job(*tags, "b"))
    assert close(both, compose(standin, standin.job(webui.run.tag("a", 1.5, total), "b"))[0])


@pytest.mark.parametrize(
    ("landmarks", "found"),
    [
        ({"modules"}, "last"),
        ({"modules", "modules_forge"}, "different"),
        ({"modules", "modules_forge", "modules_forge.packages"}, "each"),
        ({"modules", "modules_forge", "ldm_patched"}, "each"),
    ],
)
def test_the_page_knows_how_the_webui_adds_up_tags(monkeypatch: Any, landmarks: set[str], found: str) -> None:
    from loratorio.hosts import sum_of_tags

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in landmarks else None)
    assert sum_of_tags() == found


def test_a_lora_in_two_places_has_two_strengths(webui: Any, standin: Any) -> None:
    tag = webui.run.tag
    standin.lora("twin", 1)

    def made(other: str) -> tuple[torch.Tensor, list[str]]:
        tags = tag("a", 0.5, 1.0, at="left"), tag(other, 1.0, 0.25, at="right", words="sea"), "b"
        samples, job = compose(standin, standin.job(*tags), reuse=1)
        return samples, [str(use).partition(":")[2] for use in job.passes[0].uses]

    (samples, uses), (separate, of_two) = made("a"), made("twin")
    assert uses == of_two == ["1 text 0.5 at left", "0.25 text 1 at right", "1"]
    assert close(samples, separate)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_one_lora_without_recentring_is_the_hosts_own_picture(standin: Any, name: str) -> None:
    own = standin.run(standin.job(name))
    composed, job = compose(standin, standin.job(name), recentre=0, **KNOBS)
    assert close(composed, own)
    assert not close(composed, standin.run(standin.job()))
    assert [each.loras for each in job.passes] == [(name,)]


@pytest.mark.parametrize("prompts", [("a red circle",), ("one", "quite another prompt of several chunks")])
def test_several_loras_are_what_merging_one_at_a_time_composes(
    standin: Any, prompts: tuple[str, ...]
) -> None:
    names = ["a", "b", "c"]
    composed, _ = compose(standin, standin.job(*names, prompts=prompts[:1]), recentre=0.5, **KNOBS)
    with torch.no_grad():
        reference = slow_reference(
            standin, standin.job(*names, prompts=prompts[:1]), names, 0.5, patch_size=2, temperature=0.05
        )
    assert close(composed, reference, 1e-3)


def test_nothing_is_left_behind(standin: Any) -> None:
    before = trace(standin)
    plain, merged = standin.run(standin.job()), standin.run(standin.job("a", "b"))
    composed, _ = compose(standin, standin.job("a", "b", "c"), **KNOBS)
    again, _ = compose(standin, standin.job("a", "b", "c"), **KNOBS)
    assert torch.equal(composed, again)
    assert torch.equal(standin.run(standin.job("a", "b")), merged)
    assert torch.equal(standin.run(standin.job()), plain)
    assert same(trace(standin), before)


@pytest.mark.parametrize("failing", ["model", "memory", "interrupt"])
def test_nothing_is_left_behind_when_sampling_ends_early(webui: Any, standin: Any, failing: str) -> None:
    before = trace(standin)
    plain, merged = standin.run(standin.job()), standin.run(standin.job("a"))
    model = standin.model.model

    def fail(rows: int) -> None:
        if failing == "model":
            raise ValueError("broken")
        if failing == "memory":
            raise RuntimeError("CUDA out of memory")
        webui.shared.state.interrupted = True

    model.fails = fail
    if failing == "interrupt":
        _, job = compose(standin, standin.job("a", "b"), **KNOBS)
        webui.shared.state.interrupted = False
        assert [each.loras for each in job.passes] == [("a", "b")]
    else:
        with pytest.raises(ValueError if failing == "model" else LoratorioError):
            compose(standin, standin.job("a", "b"), **KNOBS)
    model.fails = None
    assert torch.equal(standin.run(standin.job()), plain)
    assert torch.equal(standin.run(standin.job("a")), merged)
    assert same(trace(standin), before)


def test_lets_go_of_the_loras(standin: Any, left_over: Any) -> None:
    def fail(rows: int) -> None:
        raise ValueError("broken")

    p = standin.job("a", "b", "c")
    _, job = compose(standin, p, **KNOBS)
    job.release()
    assert left_over() == 0
    assert p.sampler
    standin.model.model.fails, failing = fail, standin.job("a", "c")
    with contextlib.suppress(ValueError):
        compose(standin, failing, **KNOBS)
    assert left_over() == 0
    assert failing.sampler


def test_text_caches_stay_true(standin: Any) -> None:
    own = standin.run(standin.job("a"))
    compose(standin, standin.job("a"), **KNOBS)
    assert torch.equal(standin.run(standin.job("a")), own)


def test_memory_running_out_makes_the_calls_smaller_and_not_the_picture_another(standin: Any) -> None:
    names = ["a", "b", "c"]
    expected, _ = compose(standin, standin.job(*names), **KNOBS)

    def fail(rows: int) -> None:
        if rows > 3:
            raise RuntimeError("out of memory")

    standin.model.model.fails = fail
    composed, _ = compose(standin, standin.job(*names), **KNOBS)
    assert close(composed, expected)


@pytest.mark.parametrize("free", [1.5, 2.5, 4.5, 7.5])
def test_rows_a_call_follow_the_hosts_estimate(webui: Any, standin: Any, free: float) -> None:
    """Also splits the host's own step in two calls, the unconditional one first."""
    names, prompts = ["a", "b", "c"], ("one", "two")
    expected, _ = compose(standin, standin.job(*names, prompts=prompts), **KNOBS)
    standin.model.model.calls.clear()
    webui.memory.free = free
    composed, _ = compose(standin, standin.job(*names, prompts=prompts), **KNOBS)
    assert close(composed, expected)
    assert max(standin.model.model.calls) < max(free, 2)


@pytest.mark.parametrize(
    "prompts",
    [
        ("a red circle AND a blue square :0.4",),
        ("one AND two", "three AND four :0.5"),
        ("short AND a prompt that is longer than one chunk is AND x",),
        ("a [red:blue:2] circle",),
        (
            "a prompt that is so much longer than one chunk that the host cannot batch it with the short negative one",
        ),
    ],
)
def test_one_lora_is_the_hosts_own_picture_for_any_prompt(standin: Any, prompts: tuple[str, ...]) -> None:
    own = standin.run(standin.job("a", prompts=prompts))
    composed, _ = compose(standin, standin.job("a", prompts=prompts), recentre=0, **KNOBS)
    assert close(composed, own)


@pytest.mark.parametrize("method", METHODS)
def test_a_sampler_that_lasts_for_all_batches(standin: Any, method: str) -> None:
    """img2img makes one: every batch is composed once, as it is alone, also where another extension has wrapped the loop meanwhile."""

    def wrap(p: Any) -> None:
        launch = p.sampler.launch_sampling
        p.sampler.launch_sampling = lambda steps, func: launch(steps, func)

    def batches(seed: int, count: int) -> tuple[torch.Tensor, Job]:
        p = standin.img2img("a", "b", prompts=("a red circle", "a blue square"), seed=seed, n_iter=count)
        return compose(standin, p, after=wrap, method=method)

    found, job = batches(1, 3)
    assert [(each.batch, each.loras) for each in job.passes] == [(i, ("a", "b")) for i in range(3)]
    assert torch.equal(found, torch.cat([batches(seed, 1)[0] for seed in (1, 2, 3)]))


def test_batches_compose_each_picture_alone(standin: Any) -> None:
    names, prompts = ["a", "b"], ("one", "quite another")
    both, _ = compose(standin, standin.job(*names, prompts=prompts, shape=(4, 8, 8)), **KNOBS)
    first, _ = compose(standin, standin.job(*names, prompts=prompts[:1]), **KNOBS)
    assert close(both[:1], first)


def test_cfg_1_has_no_unconditional_rows(standin: Any) -> None:
    own = standin.run(standin.job("a", cfg_scale=1))
    standin.model.model.calls.clear()
    composed, _ = compose(standin, standin.job("a", cfg_scale=1), recentre=0.5, **KNOBS)
    assert close(composed, own)
    assert set(standin.model.model.calls) == {1}


def test_video_latents(standin: Any) -> None:
    own = standin.run(standin.job("c", shape=(4, 3, 8, 8)))
    composed, job = compose(
        standin, standin.job("c", shape=(4, 3, 8, 8)), recentre=0, weight_maps=True, **KNOBS
    )
    assert composed.shape == (1, 4, 3, 8, 8)
    assert job.passes[0].history.weights[0].shape == (1, 3, 8, 8)
    assert close(composed, own)


def test_hires_fix_composes_both_passes(standin: Any) -> None:
    def job() -> Any:
        return standin.job("a", hires=(["another prompt"], ["b"]), hr_cfg=3.0)

    own = standin.run(job())
    composed, done = compose(standin, job(), recentre=0, **KNOBS)
    assert close(composed, own)
    assert [(each.loras, each.hires) for each in done.passes] == [(("a",), False), (("b",), True)]


def test_the_refiner_is_composed_too(webui: Any, standin: Any) -> None:
    refiner = webui.run.Model(standin.model.variant, "refiner", seed=2)

    def traces() -> list[list[Any]]:
        found = []
        for model in (standin.model, refiner):
            objects = model.forge_objects_original
            objects.unet.load()
            layers = list(objects.unet.model.modules())
            found.append([*(value.clone() for value in objects.unet.model.state_dict().values())])
            found[-1].append(torch.tensor(sum(len(layer._forward_hooks) for layer in layers)))
        return found

    def job(*names: str) -> Any:
        return standin.job(*names, refiner=refiner)

    before = traces()
    plain, own, merged = standin.run(job()), standin.run(job("a")), standin.run(job("a", "c"))
    assert not close(own, standin.run(standin.job("a")))
    composed, done = compose(standin, job("a"), recentre=0, **KNOBS)
    assert close(composed, own)
    assert close(compose(standin, job("a", "c"), **{**KNOBS, "method": "merge"})[0], merged)
    both, done = compose(standin, job("a", "c"), weight_maps=True, **KNOBS)
    assert not close(both, merged)
    assert [each.loras for each in done.passes] == [("a", "c")]
    assert done.passes[0].history.steps == [0, 1, 2, 3]
    assert not done.notes
    assert all(same(one, other) for one, other in zip(before, traces(), strict=True))
    assert torch.equal(standin.run(job()), plain)
    assert torch.equal(standin.run(job("a", "c")), merged)


def test_a_refiner_is_not_the_next_batch_s_model(webui: Any, standin: Any) -> None:
    """img2img's sampler serves all batches, and would go on with the refiner."""
    fields = {"refiner": webui.run.Model(standin.model.variant, "refiner", seed=2)}
    both, _ = compose(standin, standin.img2img("a", "c", n_iter=2, **fields), **KNOBS)
    second, done = compose(standin, standin.img2img("a", "c", seed=2, **fields), **KNOBS)
    assert same(both[1:], second)
    assert not done.notes


def test_loras_that_do_not_fit_the_refiner_are_left_out_there(webui: Any, standin: Any) -> None:
    class Other(torch.nn.Module):
        """Without any layer that the LoRAs know."""

        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Any, t: Any, context: Any, *rest: Any) -> Any:
            return self.conv(x) + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    refiner = webui.run.Model(standin.model.variant, "refiner", seed=2, unet=Other)
    own = standin.run(standin.job("b", refiner=refiner))
    composed, done = compose(standin, standin.job("b", refiner=refiner), recentre=0, **KNOBS)
    assert close(composed, own)
    assert done.notes == ["No LoRA of the prompt matches the refiner, so its steps have no LoRAs."]
    # The one with a text encoder part is composed by that.
    merged = standin.run(standin.job("a", "b", refiner=refiner))
    knobs = {**KNOBS, "method": "merge"}
    composed, done = compose(standin, standin.job("a", "b", refiner=refiner), **knobs)
    assert close(composed, merged)
    assert done.notes == [
        "LoRA b does not match the refiner, so its steps do not use it.",
        "Refiner: LoRA a: only its text encoder part is used. The other part does not match this model.",
    ]


def test_a_hires_pass_is_made_without_a_lora_that_does_not_fit(webui: Any, standin: Any) -> None:
    other = webui.networks.files["/loras/other"] = {"elsewhere.weight": ("lora", torch.ones(2, 2))}

    def job() -> Any:
        return standin.job("a", hires=(["another prompt"], ["b", "other"]), hr_cfg=3.0)

    composed, done = compose(standin, job(), method="merge")
    assert close(composed, standin.run(job()))
    assert [each.loras for each in done.passes] == [("a",), ("b",)]
    (note,) = done.notes
    assert note.startswith("LoRA other does not match this model")
    assert note.endswith("The hires pass does not use it.")
    with pytest.raises(LoratorioError, match="does not match this model"):
        compose(standin, standin.job("a", "other"))
    other["double_blocks.0.processor.qkv_lora1.down.weight"] = other["elsewhere.weight"]
    with pytest.raises(LoratorioError, match="LoRA other uses XLabs' layer names"):
        compose(standin, standin.job("a", "other"))


def test_second_order_samplers(standin: Any) -> None:
    own = standin.run(standin.job("a", second_order=True))
    composed, job = compose(
        standin, standin.job("a", second_order=True), recentre=0, weight_maps=True, **KNOBS
    )
    assert close(composed, own)
    assert job.passes[0].history.steps == [0, 1, 2, 3]


def test_always_loras_act_on_every_row(webui: Any, standin: Any) -> None:
    """With one LoRA to compose and λ = 0, both are in every row that counts: what the host merges."""
    own = standin.run(standin.job("a", "c"))
    tags = webui.run.tag("a"), webui.run.tag("c", role="always")
    composed, job = compose(standin, standin.job(*tags), recentre=0, **KNOBS)
    assert close(composed, own)
    assert job.passes[0].loras == ("a",)


def test_strengths(webui: Any, standin: Any) -> None:
    tags = (webui.run.tag("a", 0.5, -0.7),)
    own = standin.run(standin.job(*tags))
    composed, job = compose(standin, standin.job(*tags), recentre=0, **KNOBS)
    assert close(composed, own)
    assert [use.strength for use in job.passes[0].uses] == [-0.7]


def test_part_of_the_steps(standin: Any) -> None:
    merged = standin.run(standin.job("a", "b"))
    composed, _ = compose(standin, standin.job("a", "b"), start=1, end=1, **KNOBS)
    assert close(composed, merged)


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_extensions_wrapper_is_chained(standin: Any, when: str) -> None:
    seen: list[list[int]] = []

    def wrapper(apply_model: Any, args: Any) -> torch.Tensor:
        assert len(args["input"]) % len(args["cond_or_uncond"]) == 0
        assert args["c"]["transformer_options"]["cond_or_uncond"] == args["cond_or_uncond"]
        seen.append(args["cond_or_uncond"])
        result: torch.Tensor = apply_model(args["input"] * 1.1, args["timestep"], **args["c"])
        return result

    def install(p: Any) -> None:
        unet = p.sd_model.forge_objects.unet.clone()
        unet.model_options["model_function_wrapper"] = wrapper
        p.sd_model.forge_objects.unet = unet

    p = standin.job("a")
    p.events = [("process_before_every_sampling", install)]
    own = standin.run(p)
    seen.clear()
    composed, _ = compose(standin, standin.job("a"), **{when: install}, recentre=0, **KNOBS)
    assert seen
    assert close(composed, own)


def tiles(at_once: int) -> Callable[..., torch.Tensor]:
    """Halves of the picture that overlap, so many in a call, the whole batch repeated for each: as MultiDiffusion does."""

    def wrapper(apply_model: Any, args: Any) -> torch.Tensor:
        x, sigma, c = args["input"], args["timestep"], args["c"]
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        places = [(0, 4), (2, 6), (4, 8)]
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]
            tile = torch.cat([x[..., a:b] for a, b in some])
            text = c["c_crossattn"].repeat(len(some), 1, 1)
            answer = apply_model(tile, sigma.repeat(len(some)), **{**c, "c_crossattn": text})
            for (a, b), part in zip(some, answer.split(len(x)), strict=True):
                total[..., a:b] += part
                count[..., a:b] += 1
        return total / count

    return wrapper


def row_by_row(apply_model: Any, args: Any) -> torch.Tensor:
    c = args["c"]
    return torch.cat([
        apply_model(x[None], sigma[None], **{**c, "c_crossattn": text[None]})
        for x, sigma, text in zip(args["input"], args["timestep"], c["c_crossattn"], strict=True)
    ])  # fmt: skip


class Patched:
    """The stand-in's UNet with two places for others' functions within it, as Forge's transformer blocks have them."""

    def __new__(cls, unet: type[torch.nn.Module]) -> Any:
        def forward(
            self: Any, x: Any, t: Any, context: Any, control: Any = None, transformer_options: Any = None
        ) -> Any:
            patches = transformer_options.get("patches", {})
            for patch in patches.get("attn2_patch", ()):
                context = patch(context, transformer_options)
            k, v = self.kv(context).chunk(2, dim=-1)
            text = (torch.softmax(k, dim=1) * v).sum(dim=1)
            for patch in patches.get("attn2_output_patch", ()):
                text = patch(text, transformer_options)
            h = torch.tanh(self.conv_in(x)) + (text + t[:, None] / 20)[..., None, None]
            for replace in transformer_options.get("patches_replace", {}).values():
                h = replace(h, transformer_options)
            return self.conv_out(h + torch.nn.functional.interpolate(self.down(h), scale_factor=2.0))

        return type("PatchedUNet", (unet,), {"forward": forward})


def regions(text: torch.Tensor, options: Any) -> torch.Tensor:
    """Conditional rows once more with the region's text, and an entry to make their number even: as sd-forge-couple does."""
    parts = []
    for kind, part in zip(options["cond_or_uncond"], text.chunk(len(options["cond_or_uncond"])), strict=True):
        parts += [part] if kind else [part, torch.ones_like(part)]
    together = torch.cat(parts)
    return torch.cat([together, torch.zeros_like(together[:1])]) if len(together) % 2 else together


def joined(text: torch.Tensor, options: Any) -> torch.Tensor:
    kinds = options["cond_or_uncond"]
    images = len(text) // sum(1 if kind else 2 for kind in kinds)
    parts, start = [], 0
    for kind in kinds:
        own = text[start : start + images]
        parts.append(own if kind else own * 0.3 + text[start + images : start + 2 * images] * 0.7)
        start += images * (1 if kind else 2)
    return torch.cat(parts)


def aligned(h: torch.Tensor, options: Any) -> torch.Tensor:
    """All pictures of a batch see each other: as StyleAlign does."""
    indices = {0: options["cond_indices"], 1: options["uncond_indices"]}
    parts = [h[indices[kind]] for kind in options["cond_or_uncond"]]
    return torch.cat([part + part.mean(dim=0, keepdim=True) for part in parts])


REGROUPED: dict[str, Any] = {
    **{f"{count} tiles a call": {"model_function_wrapper": tiles(count)} for count in (1, 2, 3)},
    "row by row": {"model_function_wrapper": row_by_row},
    "regions": {"patches": {"attn2_patch": [regions], "attn2_output_patch": [joined]}},
    "pictures see each other": {"patches_replace": {"attn1": aligned}},
}


@pytest.mark.parametrize("name", REGROUPED)
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("free", [1e12, 3.5], ids=["", "little memory"])
def test_rows_that_others_regroup(webui: Any, standin: Any, name: str, pictures: int, free: float) -> None:
    """The same LoRA as two files is the host with it once, whatever others do to the rows of a call."""
    standin.model = webui.run.Model(standin.model.variant, unet=Patched(webui.run.UNet))
    standin.lora("twin", 1)

    def install(p: Any) -> None:
        unet = p.sd_model.forge_objects.unet.clone()
        own = dict(REGROUPED[name])
        wrapper = own.pop("model_function_wrapper", None)
        unet.model_options = {**unet.model_options, "transformer_options": own}
        if wrapper is not None:
            unet.model_options["model_function_wrapper"] = wrapper
        p.sd_model.forge_objects.unet = unet

    def job(*loras: str) -> Any:
        return standin.job(*loras, prompts=("a red circle", "a blue square")[:pictures])

    p = job("a")
    p.events = [("process_before_every_sampling", install)]
    own = standin.run(p)
    assert close(own, standin.run(job("a"))) == (name == "row by row")
    webui.memory.free = free
    composed, done = compose(standin, job("a", "twin"), before=install, recentre=0, **KNOBS)
    assert done.notes == []
    assert close(composed, own)


def test_control_net(webui: Any, standin: Any) -> None:
    net = webui.run.ControlNet()

    def install(p: Any) -> None:
        unet = p.sd_model.forge_objects.unet.clone()
        unet.controlnet_linked_list = net
        p.sd_model.forge_objects.unet = unet

    p = standin.job("a", prompts=("one", "two"))
    p.events = [("process_before_every_sampling", install)]
    own = standin.run(p)
    composed, _ = compose(
        standin, standin.job("a", prompts=("one", "two")), before=install, recentre=0, **KNOBS
    )
    assert close(composed, own)
    assert all(rows == 2 * blocks for rows, blocks in net.batches)


def test_a_wrapper_that_passes_us_by_is_an_error(standin: Any) -> None:
    def evict(p: Any) -> None:
        unet = p.sd_model.forge_objects.unet.clone()
        unet.model_options[host(standin)._variant.hook_option] = []
        p.sd_model.forge_objects.unet = unet

    with pytest.raises(LoratorioError, match="calls the model without LoRAtorio"):
        compose(standin, standin.job("a"), after=evict, **KNOBS)


def test_patches_of_other_extensions_stay(standin: Any) -> None:
    change = torch.full((8, 4, 3, 3), 0.1)

    def install(p: Any) -> None:
        unet = p.sd_model.forge_objects.unet.clone()
        unet.add_patches("inpaint head", {"diffusion_model.conv_in.weight": ("diff", (change,))}, 1.0)
        p.sd_model.forge_objects.unet = unet

    p = standin.job("a")
    p.events = [("process_before_every_sampling", install)]
    own = standin.run(p)
    composed, _ = compose(standin, standin.job("a"), before=install, recentre=0, **KNOBS)
    assert close(composed, own)
    plain = standin.run(standin.job("a"))
    assert not close(plain, own)


def test_candidates_of_a_pool(webui: Any, standin: Any) -> None:
    """What does not fit is left out, with a sentence; what fits is chosen from while sampling."""
    webui.networks.files["/loras/strange"] = {"diffusion_model.nowhere.weight": ("diff", torch.ones(3))}
    tags = [webui.run.tag(name, pool="1") for name in ("a", "b", "c", "strange")]
    composed, job = compose(standin, standin.job(*tags), pool_size=2, **KNOBS)
    assert not close(composed, standin.run(standin.job()))
    assert "strange" in job.notes[0]
    with pytest.raises(LoratorioError, match="No LoRA of the pool"):
        compose(standin, standin.job(webui.run.tag("strange", pool="1")), **KNOBS)


def test_trigger_words_weigh_a_w_composite(webui: Any, standin: Any) -> None:
    prompts = ("a sks thing on a table",)

    def tags(phrase: str) -> list[Any]:
        phrases = {"a": phrase, "b": "table"}
        return [webui.run.tag(name, metadata={"modelspec.trigger_phrase": phrases[name]}) for name in phrases]

    told, _ = compose(standin, standin.job(*tags("sks"), prompts=prompts), method="w_composite")
    plain, _ = compose(standin, standin.job(*tags("elsewhere"), prompts=prompts), method="w_composite")
    assert not close(told, plain)


def test_speed_loras_are_recognised_and_said(webui: Any, standin: Any) -> None:
    standin.lora("lcm", 9)
    _, job = compose(standin, standin.job("a", "lcm"), **KNOBS)
    assert job.passes[0].loras == ("a",)
    assert "speed LoRA" in job.notes[0]
    composed, job = compose(standin, standin.job("lcm"), **KNOBS)
    assert torch.equal(composed, standin.run(standin.job("lcm")))
    assert "LoRAtorio composed nothing: every LoRA of the prompt acts on every row" in job.notes[-1]


def test_text_that_sees_pictures_is_left_as_the_host_made_it(standin: Any, monkeypatch: Any) -> None:
    from backend.args import dynamic_args

    if standin.model.variant != "neo":
        pytest.skip("Forge Neo's only")
    monkeypatch.setattr(dynamic_args, "ref_latents", [torch.zeros(1)])
    _, job = compose(standin, standin.job("a", "b"), **KNOBS)
    assert "text encoder parts are merged" in job.notes[0]


def test_the_hook_is_not_copied_with_the_patcher() -> None:
    from loratorio.hosts.forge.sampling import Hook

    hook = Hook(lambda *args: args)
    assert copy.deepcopy({"hooks": [hook]})["hooks"][0] is hook
    hook.function = None
    assert hook(1, 2) == (1, 2)


def test_without_a_lora_the_picture_is_the_hosts_and_the_job_says_so(standin: Any) -> None:
    own = standin.run(standin.job())
    composed, job = compose(standin, standin.job(), **KNOBS)
    assert torch.equal(composed, own)
    assert "names no LoRA" in job.notes[0]
    assert not job.passes


def test_a_lora_for_another_model_is_a_sentence(webui: Any, standin: Any) -> None:
    webui.networks.files["/loras/strange"] = {"diffusion_model.nowhere.weight": ("diff", torch.ones(3))}
    with pytest.raises(LoratorioError, match="LoRA strange does not match this model") as caught:
        compose(standin, standin.job("a", "strange"), **KNOBS)
    assert caught.value.status_code == 422  # type: ignore[attr-defined]


def test_a_lora_of_which_only_the_text_fits_is_told(webui: Any, standin: Any) -> None:
    half = standin.lora("half", 7, unet=False)
    webui.networks.files["/loras/half"]["diffusion_model.nowhere.weight"] = ("diff", torch.ones(3))
    own = standin.run(standin.job(half))
    composed, job = compose(standin, standin.job(half), recentre=0, **KNOBS)
    assert close(composed, own)
    assert job.notes == [
        "LoRA half: only its text encoder part is used. The other part does not match this model."
    ]
    standin.lora("text alone", 8, unet=False)
    _, job = compose(standin, standin.job("text alone"), **KNOBS)
    assert not job.notes


def test_a_damaged_lora_is_a_sentence(webui: Any, standin: Any) -> None:
    webui.networks.files["/loras/nan"] = {
        "diffusion_model.norm.weight": ("diff", torch.full((8,), float("nan")))
    }
    with pytest.raises(LoratorioError, match="LoRA nan contains NaN"):
        compose(standin, standin.job("nan"), **KNOBS)


def test_regions_of_other_extensions_are_refused(standin: Any) -> None:
    def narrowed(cond: Any) -> list[Any]:
        return [{**cond[0], "area": (4, 4, 0, 0)}]

    def narrow(model: Any, cond: Any, *rest: Any) -> tuple[Any, ...]:
        return model, narrowed(cond), *rest

    def narrow_in_reforge(
        model: Any, x: Any, sigma: Any, uncond: Any, cond: Any, *rest: Any
    ) -> tuple[Any, ...]:
        return model, x, sigma, uncond, narrowed(cond), *rest

    def install(p: Any) -> None:
        unet = p.sd_model.forge_objects.unet.clone()
        option = host(standin)._variant.hook_option
        unet.model_options[option] = [narrow_in_reforge if standin.model.variant == "reforge" else narrow]
        p.sd_model.forge_objects.unet = unet

    with pytest.raises(LoratorioError, match="its own area of the picture"):
        compose(standin, standin.job("a"), before=install, **KNOBS)


def test_a_clip_skip_that_changes_while_sampling_is_left_to_the_host(standin: Any) -> None:
    if standin.model.variant != "reforge":
        pytest.skip("reForge's only")
    own = standin.run(standin.job("a"))
    composed, job = compose(standin, standin.job("a", dynamic_clip_skip_schedule=[3, 2]), **KNOBS)
    assert torch.equal(composed, own)
    assert "clip skip" in job.notes[0]


def test_nunchaku_is_left_to_the_host(webui: Any, standin: Any, monkeypatch: Any) -> None:
    from backend.args import dynamic_args

    if standin.model.variant != "neo":
        pytest.skip("Forge Neo's only")
    monkeypatch.setattr(dynamic_args, "nunchaku", True)
    own = standin.run(standin.job("a"))
    composed, job = compose(standin, standin.job("a"), **KNOBS)
    assert torch.equal(composed, own)
    assert "Nunchaku" in job.notes[0]


class Blocks(torch.nn.Parameter):
    """As the hosts' GGUF weights: bytes in blocks, which `bake` rearranges once, in place, before they can be read."""

    real_shape = torch.Size((2, 2))

    def __new__(cls, data: torch.Tensor) -> Blocks:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: torch.Tensor) -> None:
        self.gguf_cls, self.baked = Blocks, False

    def copy_with_data(self, data: torch.Tensor) -> Blocks:
        other = Blocks(data)
        other.baked = self.baked
        return other

    @staticmethod
    def bake(weight: Blocks) -> None:
        if not weight.baked:
            weight.data, weight.baked = weight.data.flip(0), True

    @staticmethod
    def dequantised(weight: Blocks) -> torch.Tensor:
        assert weight.baked, "GGUF Tensor is not baked!"
        return weight.data.view(Blocks.real_shape).to(torch.float16)


@pytest.mark.parametrize("used_before", [False, True])
def test_blocks_of_a_low_bit_weight_are_read_before_the_host_has_arranged_them(
    webui: Any, monkeypatch: Any, used_before: bool
) -> None:
    from loratorio.hosts.forge.variants import Variant

    monkeypatch.setitem(
        sys.modules, "backend.operations_gguf", SimpleNamespace(dequantize_tensor=Blocks.dequantised)
    )
    layer: Any = torch.nn.Module()
    layer.weight = Blocks(torch.tensor([4, 3, 2, 1], dtype=torch.int8))
    if used_before:
        Blocks.bake(layer.weight)
    bytes_before = layer.weight.data.clone()
    patcher = SimpleNamespace(model=SimpleNamespace(layer=layer, lora_loader=SimpleNamespace(backup={})))
    read = Variant().base_weight(patcher, "layer.weight")
    assert read.dtype == torch.float32
    assert read.tolist() == [[1, 2], [3, 4]]
    assert torch.equal(layer.weight.data, bytes_before)
    assert layer.weight.baked is used_before


# -- places and own words ---------------------------------------------------------------------------------------------


def test_own_words_are_a_longer_prompt_for_the_loras_own_rows(webui: Any, standin: Any) -> None:
    tag = webui.run.tag
    for prompts, longer in (
        (("a red circle",), ("{}, a red circle",)),
        (("a AND b :0.6",), ("{}, a AND {}, b :0.6",)),
        (("a red circle", "a blue square"), ("{}, a red circle", "{}, a blue square")),
    ):
        for words in ("dress", "one two three four five six seven"):
            own, _ = compose(standin, standin.job(tag("a", words=words), prompts=prompts), recentre=0.0)
            wanted = standin.run(
                standin.job("a", prompts=tuple(each.replace("{}", words) for each in longer))
            )
            assert close(own, wanted)
            assert not close(own, standin.run(standin.job("a", prompts=prompts)))


@pytest.mark.parametrize(
    ("prompts", "left", "right"),
    [
        (("a sks and wug",), ("a sks and ",), ("a  and wug",)),
        (("sks hat AND wug sea :0.6",), ("sks hat AND  sea :0.6",), (" hat AND wug sea :0.6",)),
        (("sks hat, sea", "a wug"), ("sks hat, sea", "a "), (" hat, sea", "a wug")),
    ],
)
def test_each_half_is_the_hosts_own_picture_of_what_its_lora_reads(
    webui: Any, standin: Any, prompts: tuple[str, ...], left: tuple[str, ...], right: tuple[str, ...]
) -> None:
    """In one step, at λ = 0: nothing of the other half has come over."""
    tag = webui.run.tag
    standin.lora("d", 4)
    tags = [
        tag("a", metadata={"modelspec.trigger_phrase": "sks"}, at="left~0"),
        tag("d", metadata={"modelspec.trigger_phrase": "wug"}, at="right~0"),
    ]

    def halves(p: Any, **knobs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        p.steps = 1
        samples = compose(standin, p, recentre=0.0, **knobs)[0] if knobs else standin.run(p)
        one, other = samples.chunk(2, dim=-1)
        return one, other

    own = halves(standin.job(*tags, prompts=prompts), own_words=True)
    common = halves(standin.job(*tags, prompts=prompts), own_words=False)
    for side, name, read in ((0, "a", left), (1, "d", right)):
        assert close(own[side], halves(standin.job(name, prompts=read))[side])
        assert close(common[side], halves(standin.job(name, prompts=prompts))[side])
        assert not close(own[side], common[side])
    _, job = compose(standin, standin.job(*tags, prompts=prompts))
    assert [str(use) for use in job.passes[0].uses] == [
        "a:1 at left~0 without wug",
        "d:1 at right~0 without sks",
    ]


def test_a_place_that_is_the_picture_is_no_place(webui: Any, standin: Any) -> None:
    tag = webui.run.tag
    plain, _ = compose(standin, standin.job("a", "b"))
    placed, job = compose(standin, standin.job(tag("a", at="0,0,1,1"), tag("b", at="left+right")))
    assert torch.equal(plain, placed)
    assert tuple(use.place for use in job.passes[0].uses) == ("0,0,1,1", "left+right")
    left, _ = compose(standin, standin.job(tag("a", at="left"), tag("b", at="right")))
    assert not close(left, plain)


def test_places_are_found_for_each_picture_and_kept_for_the_hires_pass(
    webui: Any, standin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "APART", 0.0)  # the stand-in's model draws no figures
    tags = [webui.run.tag(name, at="auto") for name in ("a", "b")]
    prompts = ("b on the left, a", "b on the left, a")

    def made() -> tuple[torch.Tensor, Job]:
        return compose(standin, standin.job(*tags, prompts=prompts, hires=(list(prompts), tags), hr_cfg=3.0))

    composed, job = made()
    first, second = job.passes
    assert [[name for name, _ in each] for each in first.found] == [["a", "b"]] * 2
    assert second.found == first.found
    assert job.notes == []
    assert torch.equal(composed, made()[0])
    monkeypatch.setattr(search, "APART", 1e9)
    _, job = made()
    assert [note.startswith("One figure was found for a and b") for note in job.notes] == [True]
    assert job.passes[1].found == ((), ())


def test_a_bad_place_and_a_method_without_rows_stop_the_job(webui: Any, standin: Any) -> None:
    tag = webui.run.tag
    for options, knobs, sentence in (
        ({"at": "lefft"}, {}, "did you mean left"),
        ({"at": "left"}, {"method": "merge"}, "do not work with Merge"),
    ):
        before = trace(standin)
        with pytest.raises(LoratorioError, match=sentence):
            compose(standin, standin.job(tag("a", **options), "b"), **knobs)
        assert same(trace(standin), before)


def test_a_lora_without_effect_takes_no_weight(webui: Any, standin: Any) -> None:
    found, job = compose(standin, standin.job("a", webui.run.tag("b", 0.0, 0.0), "c"))
    wanted, _ = compose(standin, standin.job("a", "c"))
    assert close(found, wanted, 1e-6)
    assert job.passes[0].loras == ("a", "c")
    assert any("LoRA b has no effect" in note for note in job.notes)


# -- files, and what other extensions do to them -----------------------------------------------------------------------


def test_of_a_pool_only_the_candidate_of_another_shape_is_left_out(webui: Any, standin: Any) -> None:
    low_rank = ("lora", torch.ones(8, 2, 1, 1), torch.ones(2, 5, 3, 3), 1.0, None, None, None)
    webui.networks.files["/loras/wide"] = {"diffusion_model.conv_in.weight": low_rank}
    tags = [webui.run.tag(name, pool="1") for name in ("a", "wide", "b")]
    composed, job = compose(standin, standin.job(*tags), **KNOBS)
    alone, _ = compose(standin, standin.job(tags[0], tags[2]), **KNOBS)
    assert torch.equal(composed, alone)
    assert job.notes[0] == "Not used from the pool, because they cannot be read or do not fit: wide."
    assert "the pool" in job.notes[1]
    with pytest.raises(LoratorioError, match="LoRA wide does not fit the layer"):
        compose(standin, standin.job("a", "wide"), **KNOBS)


def test_a_file_that_cannot_be_read_is_left_out_with_a_note(
    webui: Any, standin: Any, monkeypatch: Any
) -> None:
    original = webui.networks.load_lora_state_dict
    standin.lora("broken", 7)

    def load(path: str) -> Any:
        if path.endswith("broken"):
            raise OSError("header too large")
        return original(path)

    wanted, _ = compose(standin, standin.job("a", "b"), **KNOBS)
    # The host made its patches before the file went bad.
    job = standin.job("a", "broken", "b")
    composed, done = compose(
        standin,
        job,
        before=lambda p: monkeypatch.setattr(webui.networks, "load_lora_state_dict", load),
        **KNOBS,
    )
    assert torch.equal(composed, wanted)
    assert done.notes == [
        "LoRA broken was not used: the WebUI found no such file, or could "
        "not read it. Check the name, or get the file again."
    ]


def test_a_lora_that_the_host_does_not_have_is_said(webui: Any, standin: Any) -> None:
    def forget(p: Any) -> None:
        p.extra_network_data["lora"].append(webui.run.tag("gone"))

    wanted, _ = compose(standin, standin.job("a", "b"), **KNOBS)
    composed, done = compose(standin, standin.job("a", "b"), before=forget, **KNOBS)
    assert torch.equal(composed, wanted)
    assert done.notes == [
        "LoRA gone was not used: the WebUI found no such file, or could "
        "not read it. Check the name, or get the file again."
    ]


def test_a_lora_that_fits_in_part_says_how_much(webui: Any, standin: Any) -> None:
    webui.networks.files["/loras/a"]["somewhere.lora_up.weight"] = ("diff", torch.ones(3))
    _, done = compose(standin, standin.job("a", "b"), **KNOBS)
    assert done.notes == [
        "LoRA a: only 4 of 5 layers match this model. Either it was made for another kind of model, or this WebUI does not know the "
        "names of the other layers."
    ]


def test_strengths_that_another_extension_changed_are_left_to_the_host(webui: Any, standin: Any) -> None:
    """LoRA Block Weight changes them layer by layer after the host has made its patches; we would read the file again."""

    def halve(p: Any) -> None:
        unet = p.sd_model.forge_objects_after_applying_lora.unet
        holders = unet.lora_patches.values() if standin.model.variant == "forge" else [unet.patches]
        for patches in holders:
            for key in patches:
                patches[key] = [[0.5 * float(patch[0]), *patch[1:]] for patch in patches[key]]

    def job() -> Any:
        return standin.job("a", "b")

    composed, done = compose(standin, job(), before=halve, **KNOBS)
    assert done.passes == []
    assert "changed the LoRAs' strengths layer by layer" in done.notes[0]
    standin.model.current_lora_hash = ""  # so does the extension, and the host makes its patches anew
    own = job()
    own.events = [("process_before_every_sampling", halve)]
    assert torch.equal(composed, standin.run(own))
    standin.model.current_lora_hash = ""


@pytest.mark.parametrize("option", ["start", "stop", "step"])
def test_strengths_by_step_are_left_to_the_host(webui: Any, standin: Any, option: str) -> None:
    script = SimpleNamespace(filename="/webui/extensions/lbw/scripts/lora_block_weight.py")
    job = standin.job(
        webui.run.tag("a", **{option: "2"}), "b", scripts=SimpleNamespace(alwayson_scripts=[script])
    )
    composed, done = compose(standin, job, **KNOBS)
    if standin.model.variant == "neo":  # where the extension does nothing
        assert close(composed, compose(standin, standin.job("a", "b"), **KNOBS)[0])
        assert done.notes == [f"Unknown options in LoRA tags, which have no effect: {option}= of LoRA a."]
        return
    assert torch.equal(composed, standin.run(standin.job("a", "b")))
    assert "LoRA Block Weight changes a LoRA's strength" in done.notes[0]


def test_replaced_attention_is_left_to_the_host(webui: Any, standin: Any) -> None:
    class CrossAttention(torch.nn.Module):
        pass

    attention = CrossAttention()
    made: dict[str, Any] = {}
    exec(
        compile("def forward(x):\n    return x\n", "/webui/extensions/negpip/scripts/negpip.py", "exec"), made
    )
    attention.forward = made["forward"]
    standin.model.model.diffusion_model.attn2 = attention
    composed, done = compose(standin, standin.job("a"), recentre=0, **KNOBS)
    assert torch.equal(composed, standin.run(standin.job("a")))
    assert "the extension negpip replaces the model's attention" in done.notes[0]


def test_a_strength_that_is_no_number_is_a_sentence(webui: Any, standin: Any) -> None:
    def spoil(p: Any) -> None:
        p.sd_model.current_lora_hash = "[['/loras/a', nan, nan, False]]"

    with pytest.raises(LoratorioError, match="is not a number"):
        compose(standin, standin.job("a"), before=spoil, **KNOBS)
    standin.model.current_lora_hash = ""


# -- what guidance extensions do to a step ---------------------------------------------------------------------------


def run_again(args: Any, cond: Any, x: torch.Tensor, options: Any) -> torch.Tensor:
    """The model's prediction of `cond` on other latents or with other options, as extensions ask the host's functions for it."""
    from backend.sampling.sampling_function import calc_cond_uncond_batch

    result: torch.Tensor = calc_cond_uncond_batch(args["model"], cond, None, x, args["sigma"], options)[0]
    return result


def attention_replaced(options: Any, function: Any) -> dict[str, Any]:
    transformer = options["transformer_options"]
    replaced = {**transformer.get("patches_replace", {}), "attn1": {("middle", 0): function}}
    return {**options, "transformer_options": {**transformer, "patches_replace": replaced}}


def own_guidance(args: Any) -> torch.Tensor:
    """As Dynamic Thresholding and Latent Modifier: guidance in the host's place."""
    result: torch.Tensor = args["uncond"] + args["cond_scale"] * torch.tanh(args["cond"] - args["uncond"])
    return result


def rescaled(args: Any) -> torch.Tensor:
    """As Mahiro: another look at what was guided."""
    result: torch.Tensor = args["denoised"] * args["cond_denoised"].std() / args["denoised"].std()
    return result


def perturbed_attention(args: Any) -> torch.Tensor:
    options = attention_replaced(args["model_options"], lambda q, k, v, to: v.mean(1, keepdim=True) + 0 * v)
    degraded = run_again(args, args["cond"], args["input"], options)
    result: torch.Tensor = args["denoised"] + 3 * (args["cond_denoised"] - degraded)
    return result


def self_attention(args: Any) -> torch.Tensor:
    blurred = torch.nn.functional.avg_pool2d(args["uncond_denoised"], 3, 1, 1)
    x = blurred + args["input"] - args["uncond_denoised"]
    result: torch.Tensor = args["denoised"] + 0.5 * (
        blurred - run_again(args, args["uncond"], x, args["model_options"])
    )
    return result


def aligned(q: Any, k: Any, v: Any, options: Any) -> torch.Tensor:
    """As StyleAlign: all pictures of a kind share what they attend to."""
    kinds = options["cond_or_uncond"]
    by_row = [kind for kind in kinds for _ in range(len(v) // len(kinds))]
    own = [v[[row for row, other in enumerate(by_row) if other == kind]] for kind in kinds]
    return torch.cat([part.mean((0, 1), keepdim=True) + part / 2 for part in own])


def with_options(**options: Any) -> Callable[[Any], None]:
    def install(p: Any) -> None:
        unet = p.sd_model.forge_objects.unet.clone()
        unet.model_options.update({name: value for name, value in options.items() if name != "attention"})
        if "attention" in options:
            unet.model_options = attention_replaced(unet.model_options, options["attention"])
        p.sd_model.forge_objects.unet = unet

    return install


GUIDANCE: dict[str, Callable[[Any], None]] = {
    "own guidance": with_options(sampler_cfg_function=own_guidance),
    "after guidance": with_options(sampler_post_cfg_function=[rescaled]),
    "perturbed attention": with_options(sampler_post_cfg_function=[perturbed_attention]),
    "self attention": with_options(sampler_post_cfg_function=[self_attention]),
    "both": with_options(sampler_post_cfg_function=[perturbed_attention, self_attention]),
    "pictures look at each other": with_options(attention=aligned),
}


def with_events(p: Any, *events: Callable[[Any], None]) -> Any:
    p.events = [("process_before_every_sampling", event) for event in events]
    return p


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", GUIDANCE)
@pytest.mark.parametrize("names", [("a",), ("b", "b again")])
def test_guidance_extensions_act_as_without_us(
    standin: Any, names: tuple[str, ...], kind: str, when: str
) -> None:
    standin.lora("b again", 2, text=False)
    prompts = ("a red circle", "a green square")
    own = standin.run(with_events(standin.job(names[0], prompts=prompts), GUIDANCE[kind]))
    composed, job = compose(
        standin, standin.job(*names, prompts=prompts), **{when: GUIDANCE[kind]}, recentre=0, **KNOBS
    )
    assert close(composed, own, 1e-3)
    assert not close(composed, standin.run(standin.job(names[0], prompts=prompts)), 1e-2)
    assert not job.notes


def test_perturbed_attention_of_several_loras_is_that_of_each_by_its_weights(standin: Any) -> None:
    """At λ = 1 and one step, cond + scale·(cond − degraded) has the very weights of the step."""
    seen: list[dict[str, Any]] = []

    def watched(args: Any) -> torch.Tensor:
        seen.append({**args, "result": perturbed_attention(args)})
        result: torch.Tensor = seen[-1]["result"]
        return result

    watch = with_options(sampler_post_cfg_function=[watched])
    names = ("b", "c")
    for each in names:
        standin.run(with_events(standin.job(each, steps=1), watch))
    alone, seen[:] = list(seen), []
    _, job = compose(
        standin, standin.job(*names, steps=1), after=watch, recentre=0, weight_maps=True, **KNOBS
    )
    (weights,) = job.passes[0].history.weights
    degraded = seen[0]["cond_denoised"] - (seen[0]["result"] - seen[0]["denoised"]) / 3
    parts = torch.stack([each["cond_denoised"] - (each["result"] - each["denoised"]) / 3 for each in alone])
    expected = (weights.to(torch.float32)[:, :, None] * parts).sum(0)
    assert close(degraded, expected, 5e-3)


def test_what_is_changed_before_guidance_is_seen(standin: Any) -> None:
    """As ControlNet's inpaint_only: other latents for the step."""

    def changed(model: Any, cond: Any, uncond: Any, x: Any, sigma: Any, options: Any) -> tuple[Any, ...]:
        return model, cond, uncond, x * 0.5, sigma, options

    def in_reforge(model: Any, x: Any, *rest: Any) -> tuple[Any, ...]:
        return model, x * 0.5, *rest

    def install(p: Any) -> None:
        unet = p.sd_model.forge_objects.unet.clone()
        option = host(standin)._variant.hook_option
        function = in_reforge if standin.model.variant == "reforge" else changed
        unet.model_options[option] = [*unet.model_options.get(option, []), function]
        p.sd_model.forge_objects.unet = unet

    own = standin.run(with_events(standin.job("a"), install))
    for when in ("before", "after"):
        composed, _ = compose(standin, standin.job("a"), **{when: install}, recentre=0, **KNOBS)
        assert close(composed, own)


@pytest.mark.parametrize("past", ["the model itself", "without our options", "an evaluation of its own"])
def test_what_runs_the_model_past_us_is_refused(standin: Any, past: str) -> None:
    def after(args: Any) -> torch.Tensor:
        if past == "the model itself":
            text = args["cond"][0]["model_conds"]["c_crossattn"].cond
            args["model"].apply_model(args["input"], args["sigma"], c_crossattn=text)
        elif past == "without our options":
            cond = [{**each, "model_conds": {**each["model_conds"]}} for each in args["cond"]]
            cond[0]["model_conds"].pop("loratorio_block")
            run_again(args, cond, args["input"], {"transformer_options": {}})
        else:
            nested()
        result: torch.Tensor = args["denoised"]
        return result

    def nested() -> None:
        p.sampler.model_wrap_cfg(torch.zeros(1, 4, 8, 8), torch.ones(1), p.c, p.uc, 1)

    p, before = standin.job("a"), trace(standin)
    with pytest.raises(LoratorioError, match="calls the model without LoRAtorio"):
        compose(standin, p, after=with_options(sampler_post_cfg_function=[after]), **KNOBS)
    assert same(before, trace(standin))


# -- a LoRA's file that is replaced -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["all", "text", "unet"])
@pytest.mark.parametrize("names", [("a",), ("a", "c")])
def test_a_replaced_file_is_read_whole(webui: Any, standin: Any, names: tuple[str, ...], part: str) -> None:
    old = dict(webui.networks.files["/loras/a"])

    def new_model() -> Any:
        """Another WebUI, which has never read the old file."""
        made = webui.run.Standin(standin.model.variant)
        made.lora("c", 3, full=True)
        made.lora("a", 77)
        new = webui.networks.files["/loras/a"]
        kept = {"all": "-", "text": "diffusion_model.", "unet": "text."}[part]
        new.update({key: value for key, value in old.items() if key.startswith(kept)})
        return made

    ticked = {**KNOBS, "recentre": 0.5}
    standin.run(standin.job(*names))
    compose(standin, standin.job(*names), **ticked)
    fresh = new_model()
    expected, told = compose(fresh, fresh.job(*names), **ticked)
    own = fresh.run(fresh.job(*names))
    assert not told.notes
    composed, job = compose(standin, standin.job(*names), **ticked)
    assert close(composed, expected)
    assert job.notes == [
        "The file of LoRA a has changed on disk since the WebUI read it. From now on the new contents are used."
    ]
    # And from now on, ticked or not.
    assert torch.equal(standin.run(standin.job(*names)), own)
    composed, job = compose(standin, standin.job(*names), **ticked)
    assert close(composed, expected)
    assert not job.notes


def test_an_unchanged_file_is_read_once(webui: Any, standin: Any, monkeypatch: Any) -> None:
    from loratorio.hosts import forget
    from loratorio.hosts.forge import variants as variants

    written = {"/loras/a": (1, 1), "/loras/b": (1, 1)}
    read: list[str] = []

    def load(path: str) -> Any:
        read.append(path)
        return webui.networks.read_file(path)

    monkeypatch.setattr(variants, "_written", written.get)
    monkeypatch.setattr(webui.networks, "load_lora_state_dict", load)
    forget()
    standin.run(standin.job("a", "b"))  # now the host has read them
    read.clear()
    ticked = {**KNOBS, "recentre": 0.5, "share": 0.2}
    first, _ = compose(standin, standin.job("a", "b"), **ticked)
    assert read == ["/loras/a", "/loras/b"]
    again, _ = compose(standin, standin.job("a", "b"), **ticked)
    assert len(read) == 2
    assert torch.equal(again, first)
    standin.lora("a", 77)
    written["/loras/a"] = (2, 1)
    other, _ = compose(standin, standin.job("a", "b"), **ticked)
    assert read[2:] == ["/loras/a"]
    assert not close(other, first, 1e-2)
    forget()
    compose(standin, standin.job("b"), **ticked)
    assert read[-1] == "/loras/b"
    forget()


def test_kept_files_have_a_limit() -> None:
    from loratorio.hosts.forge.files import Files

    read: list[str] = []

    def load(path: str) -> Any:
        read.append(path)
        return {"weight": torch.zeros(25)}  # 100 bytes

    files = Files(most=250)
    for path in ("a", "b", "a", "c", "a", "b"):
        files.of(path, (1, 1), load)
    assert read == ["a", "b", "c", "b"]  # c took the place of b, which was used longest ago
    for _ in range(2):
        Files(most=99).of("a", (1, 1), load)
        files.of("d", (0, 0), load)  # when it was written is unknown
    assert read[4:] == ["a", "d", "a", "d"]


def test_texts_are_kept_for_the_four_latest_passes() -> None:
    from loratorio.hosts.shared.text import KeptTexts

    class Pass:
        pass

    kept, first, hires = KeptTexts(), Pass(), Pass()
    many = [(number, ()) for number in range(200)]
    for state in many:
        kept.of(first, state)["what"] = [state]
    kept.of(hires, "hires")["what"] = ["hires"]
    # The next job's passes find all of it again, however much it is.
    again, later = Pass(), Pass()
    assert all(kept.of(again, state)["what"] == [state] for state in many[:100])
    assert kept.of(later, "hires")["what"] == ["hires"]
    # By the fifth pass, what the first alone has used is gone; what two passes used is not.
    fifth = Pass()
    assert kept.of(fifth, many[150]) == {}
    assert kept.of(fifth, many[0])["what"] == [many[0]]
    kept.forget()
    assert kept.of(fifth, many[0]) == {}


def test_texts_of_a_grid_are_kept_from_row_to_row() -> None:
    """Twelve cells in a row, each a pass with states of its own; the next row has the same ones."""
    from loratorio.hosts.shared.text import KeptTexts

    class Pass:
        pass

    kept = KeptTexts()
    rows: list[list[bool]] = []
    for _ in range(3):
        known = []
        for cell in range(12):
            user = Pass()
            for state in range(5):
                text = kept.of(user, (cell, state))
                known.append("what" in text)
                text["what"] = [state]
        rows.append(known)
    assert not any(rows[0])
    assert all(rows[1])
    assert all(rows[2])


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_text_is_encoded_once_for_all_batches(
    standin: Any, webui: Any, monkeypatch: Any, share: float
) -> None:
    def make(count: int) -> Any:
        return compose(standin, standin.job("a", "c", n_iter=count), share=share, **KNOBS)

    assert_encoded_once(monkeypatch, webui.parser, make)


def test_text_of_many_possible_styles_is_encoded_once(standin: Any, webui: Any, monkeypatch: Any) -> None:
    """Each of four LoRAs may turn out to be a style: more states of the text encoder than one job without styles has."""
    names = ("a", "c", "d", "e")
    for seed, name in enumerate(names[2:], 4):
        standin.lora(name, seed)

    def make(count: int) -> Any:
        return compose(standin, standin.job(*names, n_iter=count), method="relative", find_styles=True)

    assert_encoded_once(monkeypatch, webui.parser, make)


def test_a_file_replaced_between_two_batches_is_read_whole(
    webui: Any, standin: Any, monkeypatch: Any
) -> None:
    from loratorio.hosts.forge import variants as variants

    written = [(1, 1)]
    monkeypatch.setattr(variants, "_written", lambda path: written[0])
    job = Job(standin.job("a"), paper(enabled=True, recentre=0, **KNOBS))

    def batch() -> torch.Tensor:
        job.p.events = [("process_before_every_sampling", lambda p: host(standin).before_sampling(job))]
        result: torch.Tensor = standin.run(job.p)
        return result

    before = batch()
    standin.lora("a", 77)
    written[0] = (2, 1)
    composed = batch()
    own = standin.run(standin.job("a"))
    assert close(composed, own)
    assert not close(composed, before, 1e-2)

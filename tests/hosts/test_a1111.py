"""The adapter for AUTOMATIC1111's WebUI, against the stand-in of tests/standin/a1111."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from loratorio.adapters.delta import Adapter
from loratorio.compose import search
from loratorio.compose.methods import METHODS
from loratorio.errors import LoratorioError
from loratorio.job import Job
from loratorio.prompt.places import written
from loratorio.settings import Settings
from loratorio.webui import infotext_fields
from tests.hosts.conftest import assert_encoded_once
from tests.published import paper


@pytest.fixture(params=[False, True], ids=["SD 1", "SDXL"])
def either(a1111: Any, request: Any) -> Any:
    return a1111.run.Standin(xl=request.param)


def compose(p: Any, before: Sequence[Any] = (), **knobs: Any) -> tuple[torch.Tensor, Job]:
    """The job's samples with LoRAtorio ticked; `before` are other extensions' events."""
    from loratorio.hosts.a1111 import HOST

    job = Job(p, paper(enabled=True, **knobs), tell=p.comment)
    p.events = [*before, ("process_before_every_sampling", lambda p: HOST.before_sampling(job))]
    from modules import processing

    return processing.process_images(p), job


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-4) -> bool:
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def trace(a1111: Any, standin: Any) -> list[Any]:
    """What composing must leave as it was."""
    processing = a1111.processing.StableDiffusionProcessingTxt2Img
    models = (standin.model, standin.refiner)
    return [
        [net.name for net in a1111.networks.loaded_networks],
        [(net.te_multiplier, net.unet_multiplier) for net in a1111.networks.loaded_networks],
        [list(each) for each in a1111.callbacks.callback_map.values()],
        [
            len(layer._forward_hooks) + len(layer._forward_pre_hooks)
            for model in models
            for layer in model.network_layer_mapping.values()
        ],
        sorted(a1111.hijack.embedding_db.word_embeddings),
        [cache[0] for cache in (processing.cached_c, processing.cached_uc)],
    ]


# -- equal to the WebUI's own picture --------------------------------------------------------------------------------

JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch": {"prompts": ("a red circle", "a blue square")},
    "AND": {"prompts": ("a red circle AND green field :0.6",)},
    "AND in a batch": {"prompts": ("a AND b :0.6 AND c", "d AND e AND f :2")},
    "prompt editing": {"prompts": ("a [red:blue:2] circle",)},
    "long prompt": {"prompts": ("one two three four five six seven",)},
    "long negative": {"negative": "one two three four five six"},
    "CFG 1": {"cfg_scale": 1.0},
    "timestep sampler": {"sampler_name": "DDIM"},
    "odd size": {"size": (6, 10)},
    "NGMS": {"s_min_uncond": 8.0},
}

OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "one row a call": {"batch_cond_uncond": False},
    "padded": {"pad_cond_uncond": True},
    "skip early CFG": {"skip_early_cond": 0.4},
    "NGMS on all steps": {"s_min_uncond_all": True},
}


ROWS_DIFFER = ("AND in a batch", "long prompt", "long negative", "NGMS")
"""The jobs that go other ways through a step when an option is set."""


@pytest.mark.parametrize(
    ("job", "option"),
    [(job, option) for option in OPTIONS for job in JOBS if not option or job in ROWS_DIFFER],
)
def test_one_lora_and_merge_are_the_webuis_own(a1111: Any, either: Any, job: str, option: str) -> None:
    fields = JOBS[job]
    for name, value in OPTIONS[option].items():
        setattr(a1111.shared.opts, name, value)
    a, b = either.lora("a", 1), either.lora("b", 2, rank=3)
    alone, done = compose(either.job(a, **fields), recentre=0.0)
    assert [each.loras for each in done.passes] == [("a",)]
    assert close(alone, either.run(either.job(a, **fields)))
    merged, _ = compose(either.job(a, b, **fields), method="merge")
    assert close(merged, either.run(either.job(a, b, **fields)))
    assert not close(merged, alone)


def test_kinds_and_strengths(a1111: Any, standin: Any) -> None:
    Tag = a1111.run.Tag
    loras = [standin.lora("a", 1), standin.full("f", 2), standin.ia3("i", 3)]
    loras[0].dyn_dim = 1
    for lora in loras:
        for te, unet in ((1.0, 1.0), (0.5, -0.7), (0.0, 1.2), (1.0, 0.0)):
            fields = {"prompts": ("a red circle",)}
            alone, _ = compose(standin.job(Tag(lora, te, unet), **fields), recentre=0.0)
            assert close(alone, standin.run(standin.job(Tag(lora, te, unet), **fields))), (
                lora.name,
                te,
                unet,
            )


def test_a_lora_that_two_tags_name_acts_as_in_the_webui(a1111: Any, standin: Any) -> None:
    """Which adds it twice, at the strengths of the last tag."""
    Tag = a1111.run.Tag
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    tags = Tag(a, 1.0, 1.0), Tag(a, 0.25, 0.5, {"role": "content"})
    composed, job = compose(standin.job(*tags), recentre=0.0)
    assert close(composed, standin.run(standin.job(*tags)))
    assert not close(composed, standin.run(standin.job(Tag(a, 0.25, 0.5))))
    assert [str(use) for use in job.passes[0].uses] == ["a:1 text 0.5"]
    merged, _ = compose(standin.job(*tags, b), method="merge")
    assert close(merged, standin.run(standin.job(*tags, b)))
    both, _ = compose(standin.job(*tags, b))
    assert close(both, compose(standin.job(Tag(a, 0.5, 1.0), b))[0])


def test_a_lora_in_two_places_has_two_strengths(a1111: Any, standin: Any) -> None:
    Tag = a1111.run.Tag
    a, twin, b = standin.lora("a", 1), standin.lora("twin", 1), standin.lora("b", 2)
    left, right = {"at": "left"}, {"at": "right", "words": "sea"}

    def made(other: Any) -> tuple[torch.Tensor, list[str]]:
        tags = Tag(a, 0.5, 1.0, left), Tag(other, 1.0, 0.25, right), Tag(b)
        samples, job = compose(standin.job(*tags), reuse=1)
        return samples, [str(use).partition(":")[2] for use in job.passes[0].uses]

    (samples, uses), (separate, of_two) = made(a), made(twin)
    assert uses == of_two == ["1 text 0.5 at left", "0.25 text 1 at right", "1"]
    assert close(samples, separate)
    assert (a.te_multiplier, a.unet_multiplier) == (0.5, 1.0)  # as the last job has set them


def test_a_place_smaller_than_a_latent_pixel_is_said(a1111: Any, standin: Any) -> None:
    Tag = a1111.run.Tag
    a, b = standin.lora("a", 1), standin.lora("b", 2)

    def notes(at: str, **fields: Any) -> list[str]:
        return compose(standin.job(Tag(a, named={"at": at}), b, **fields))[1].notes

    (note,) = notes("0.4,0.4,0.5,0.5~0")
    assert note.startswith("LoRA a (at=0.4,0.4,0.5,0.5~0) has almost no effect")
    assert notes("0.4,0.4,0.55,0.55~0") == []
    # Inpainting "only masked" samples a part of the picture, at its own size.
    whole = Image.new("RGB", (64, 64))
    assert notes("0.4,0.4,0.5,0.5~0", paste_to=(16, 16, 32, 32), overlay_images=[whole]) == []
    assert len(notes("left~0", paste_to=(32, 0, 32, 64), overlay_images=[whole])) == 1


@pytest.mark.parametrize("title", ["SD upscale", "SD Upscale", "Outpainting mk2", "Poor man's outpainting"])
def test_places_are_refused_where_a_script_samples_parts_of_the_picture(
    a1111: Any, standin: Any, title: str
) -> None:
    Tag = a1111.run.Tag
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    scripts = [SimpleNamespace(title=lambda: "Loopback"), SimpleNamespace(title=lambda: title)]
    runner = SimpleNamespace(selectable_scripts=scripts, alwayson_scripts=[])

    def made(*tags: Any, chosen: Any) -> Any:
        return compose(standin.job(*tags, scripts=runner, script_args=[chosen, 1.0]))[0]

    placed = Tag(a, named={"at": "left"})
    with pytest.raises(LoratorioError, match=f"{title} samples the picture in parts"):
        made(placed, b, chosen=2)
    for chosen in (0, 1, None, 3, "x"):
        assert torch.equal(made(placed, b, chosen=chosen), compose(standin.job(placed, b))[0])
    assert torch.equal(made(a, b, chosen=2), compose(standin.job(a, b))[0])


def test_places_are_not_looked_for_in_each_tile_of_ultimate_sd_upscale(a1111: Any, standin: Any) -> None:
    Tag = a1111.run.Tag
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    scripts = [SimpleNamespace(title=lambda: "Ultimate SD upscale")]
    runner = SimpleNamespace(selectable_scripts=scripts, alwayson_scripts=[])

    def made(*tags: Any) -> Any:
        return compose(standin.job(*tags, scripts=runner, script_args=[1]))[0]

    with pytest.raises(LoratorioError, match="at=auto would find other places in each tile"):
        made(Tag(a, named={"at": "auto"}), Tag(b, named={"at": "auto"}))
    drawn = (Tag(a, named={"at": "left"}), Tag(b, named={"at": "right"}))
    assert torch.equal(made(*drawn), compose(standin.job(*drawn))[0])


def test_half_precision_files_work_on_a_cpu(standin: Any) -> None:
    """Where the WebUI itself silently leaves such a LoRA out."""
    half, single = standin.full("half", 2, torch.float16), standin.full("single", 2)
    composed, _ = compose(standin.job(half), recentre=0.0)
    assert not close(composed, standin.run(standin.job()))
    assert close(composed, standin.run(standin.job(single)), 5e-3)


# -- equal to passes made one by one ---------------------------------------------------------------------------------


def slowly(
    a1111: Any, standin: Any, loras: list[Any], settings: Settings, steps: int = 4, until: int | None = None
) -> torch.Tensor:
    """One picture by the paper's formulas in float64, switching the WebUI's LoRAs for every pass.

    until: from this step on the last LoRA is off.
    """
    model = standin.model
    torch.manual_seed(0)
    states = []
    for active in [[], *[[lora] for lora in loras]]:
        a1111.networks.loaded_networks[:] = active
        states.append((active, model.encode("a red circle"), model.encode("blurry")))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double() * 10
    sigmas = torch.linspace(10, 0, steps + 1).double()
    for step, (sigma, then) in enumerate(pairwise(sigmas)):
        acting = len(loras) - (until is not None and step >= until)
        noise: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for active, cond, uncond in states[: acting + 1]:
            a1111.networks.loaded_networks[:] = active
            for kind, text in ((True, cond), (False, uncond)):
                crossattn = {"c_crossattn": [text[None]], "c_concat": [torch.zeros(1, 1, 1, 1)]}
                noise[kind].append(model.apply_model(x.float(), sigma.float().view(1), crossattn).double())
        weights = torch.zeros(acting, 8, 8).double()
        size = settings.patch_size
        for top in range(0, 8, size):
            for left in range(0, 8, size):
                patch = (0, slice(None), slice(top, top + size), slice(left, left + size))
                base = noise[True][0][patch].flatten()
                near = [torch.cosine_similarity(e[patch].flatten(), base, dim=0) for e in noise[True][1:]]
                shares = torch.softmax(-torch.stack(near) / settings.temperature, dim=0)
                weights[:, top : top + size, left : left + size] = shares[:, None, None]
        cond, uncond = (
            sum(w * e for w, e in zip(weights, noise[kind][1:], strict=True)) for kind in (True, False)
        )
        uncond = settings.recentre * noise[False][0] + (1 - settings.recentre) * uncond
        x = x + (uncond + 5.0 * (cond - uncond)) * (then - sigma)
    a1111.networks.loaded_networks.clear()
    return x.float()


@pytest.mark.parametrize("text", [True, False], ids=["text", "no text"])
def test_equals_switching_loras_for_every_pass(a1111: Any, standin: Any, text: bool) -> None:
    loras = [standin.lora("a", 1, text=text), standin.lora("b", 2, rank=3, text=text), standin.full("f", 3)]
    knobs = {"patch_size": 3, "temperature": 0.05, "recentre": 0.3, "adaptive": False, "blend": "hard"}
    knobs = {name: value for name, value in knobs.items() if name in Settings.__dataclass_fields__}
    for count in (2, 3):
        composed, _ = compose(standin.job(*loras[:count]), **knobs)
        with torch.no_grad():
            assert close(composed, slowly(a1111, standin, loras[:count], paper(**knobs)), 2e-3)


def test_a_bundled_word_belongs_to_its_lora_alone(standin: Any) -> None:
    a, b = standin.lora("a", 1, text=False), standin.lora("b", 2, text=False)
    standin.bundle(a, "circle", 3)
    prompts = ("a red circle by night",)
    merged, _ = compose(standin.job(a, b, prompts=prompts), method="merge")
    assert close(merged, standin.run(standin.job(a, b, prompts=prompts)))
    # b alone does not know the word: three vectors more or less are another text length, hence calls of their own.
    composed, _ = compose(standin.job(a, b, prompts=prompts))
    assert not close(composed, merged)


# -- passes ----------------------------------------------------------------------------------------------------------


def test_hires_fix_composes_its_own_loras(standin: Any) -> None:
    a, b, c = (standin.lora(name, seed) for seed, name in enumerate("abc"))
    fields = {"hires": (["a blue square"], [c])}
    alone, job = compose(standin.job(a, **fields), recentre=0.0)
    assert close(alone, standin.run(standin.job(a, **fields)))
    assert [(each.loras, each.hires) for each in job.passes] == [(("a",), False), (("c",), True)]
    _, job = compose(standin.job(a, b, hires=(["x"], [])))
    assert [each.hires for each in job.passes] == [False]
    assert any("names no LoRA" in note for note in job.notes)


@pytest.mark.parametrize("name", ["Euler", "DDIM"])
def test_the_refiner_is_composed_too(standin: Any, name: str) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    fields = {"refiner": standin.refiner, "refiner_switch_at": 0.5, "sampler_name": name}
    alone, _ = compose(standin.job(a, **fields), recentre=0.0)
    assert close(alone, standin.run(standin.job(a, **fields)))
    merged, _ = compose(standin.job(a, b, **fields), method="merge")
    assert close(merged, standin.run(standin.job(a, b, **fields)))
    assert standin.run(standin.job(a, b)).shape == merged.shape


@pytest.mark.parametrize("name", ["Euler", "DDIM"])
def test_a_refiner_that_stays_in_memory_is_not_the_next_batch_s_model(standin: Any, name: str) -> None:
    """img2img's sampler serves all batches, and would go on with the refiner."""
    fields = {"refiner": standin.refiner, "refiner_switch_at": 0.5, "sampler_name": name}
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    both, _ = compose(standin.img2img(a, b, n_iter=2, **fields))
    second, _ = compose(standin.img2img(a, b, seed=2, **fields))
    assert torch.equal(both[1:], second)


def test_a_refiner_without_a_loras_text_encoder_is_said(standin: Any) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2, text=False)
    layers = standin.refiner.network_layer_mapping
    layers["another_text"] = layers.pop("transformer_text")
    standin.refiner.text.network_layer_name = "another_text"
    fields = {"refiner": standin.refiner, "refiner_switch_at": 0.5}
    composed, job = compose(standin.job(a, b, **fields), method="merge")
    assert close(composed, standin.run(standin.job(a, b, **fields)))
    assert job.notes == [
        "The text encoder part of LoRA a does not match the refiner, so its steps do not use it."
    ]
    del layers["diffusion_model_down"]
    _, job = compose(standin.job(b, **fields))
    assert len(job.notes) == 1
    assert job.notes[0].startswith("Refiner: LoRA b: only 3 of 4 layers match this model.")


def test_a_hires_pass_takes_what_fits_of_a_lora(standin: Any) -> None:
    """The first pass is made by then."""
    a, b, c = standin.lora("a", 1), standin.lora("b", 2), standin.lora("c", 3, text=False)
    b.modules["diffusion_model_gone"] = b.modules["diffusion_model_down"]
    c.modules = {"diffusion_model_gone": c.modules["diffusion_model_down"]}
    with pytest.raises(LoratorioError, match="has no such layer"):
        compose(standin.job(a, b))
    fields = {"hires": (["a blue square"], [a, b, c])}
    composed, job = compose(standin.job(a, **fields), method="merge")
    assert close(composed, standin.run(standin.job(a, **fields)))
    assert [(each.loras, each.hires) for each in job.passes] == [(("a",), False), (("a", "b"), True)]
    assert any(
        "LoRA b cannot be applied" in note and note.endswith("uses the parts that match.")
        for note in job.notes
    )
    assert any("LoRA c cannot be applied" in note and note.endswith("does not use it.") for note in job.notes)
    none, job = compose(standin.job(a, hires=(["a blue square"], [c])), method="merge")
    assert close(none, standin.run(standin.job(a, hires=(["a blue square"], [c]))))
    assert [each.hires for each in job.passes] == [False]


def test_roles_come_from_the_tags(a1111: Any, standin: Any) -> None:
    Tag = a1111.run.Tag
    a, b = standin.lora("a", 1), standin.lora("lcm", 2)
    _, job = compose(standin.job(Tag(a), Tag(b)))
    assert job.passes[0].loras == ("a",)
    assert any("lcm" in note for note in job.notes)
    _, job = compose(standin.job(Tag(a), Tag(b, named={"role": "content"})))
    assert job.passes[0].loras == ("a", "lcm")
    _, job = compose(standin.job(Tag(b)))
    assert job.passes == []


# -- nothing stays behind --------------------------------------------------------------------------------------------


def test_leaves_no_trace(a1111: Any, standin: Any) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    standin.bundle(a, "night", 3)
    plain = [standin.run(standin.job()), standin.run(standin.job(a)), standin.run(standin.job(a, b))]
    before = trace(a1111, standin)
    for knobs in ({}, {"method": "composite"}, {"start": 0.3, "end": 0.6}, {"weight_maps": True}):
        compose(standin.job(a, b), **knobs)
        assert trace(a1111, standin) == before
    for model_failing in (RuntimeError("boom"), LoratorioError("no")):

        def fail(rows: int, problem: Exception = model_failing) -> None:
            raise problem

        standin.model.fails = fail
        with pytest.raises(type(model_failing)):
            compose(standin.job(a, b))
        standin.model.fails = None
        assert trace(a1111, standin) == before
    again = [standin.run(standin.job()), standin.run(standin.job(a)), standin.run(standin.job(a, b))]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_wrapped", [False, True], ids=["", "with another extension around the loop"])
def test_a_sampler_that_lasts_for_all_batches(standin: Any, method: str, is_wrapped: bool) -> None:
    """img2img makes one: every batch is composed once, as it is alone."""
    a, b = standin.lora("a", 1), standin.lora("b", 2)

    def batches(seed: int, count: int) -> tuple[torch.Tensor, Job]:
        p = standin.img2img(a, b, prompts=("a red circle", "a blue square"), seed=seed, n_iter=count)
        job = Job(p, paper(enabled=True, method=method), tell=p.comment)
        p.events = [("process_before_every_sampling", lambda p: HOST.before_sampling(job))]
        if is_wrapped:
            p.events.append(("process_before_every_sampling", wrapped))
        samples = standin.run(p)
        assert is_wrapped or "launch_sampling" not in vars(p.sampler)
        return samples, job

    def wrapped(p: Any) -> None:
        launch = p.sampler.launch_sampling
        p.sampler.launch_sampling = lambda steps, func: launch(steps, func)

    from loratorio.hosts.a1111 import HOST

    found, job = batches(1, 3)
    assert [(each.batch, each.loras) for each in job.passes] == [(i, ("a", "b")) for i in range(3)]
    assert torch.equal(found, torch.cat([batches(seed, 1)[0] for seed in (1, 2, 3)]))


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_text_is_encoded_once_for_all_batches(
    a1111: Any, standin: Any, monkeypatch: Any, share: float
) -> None:
    from modules import prompt_parser

    a, b = standin.lora("a", 1), standin.full("b", 2)
    assert_encoded_once(
        monkeypatch, prompt_parser, lambda count: compose(standin.job(a, b, n_iter=count), share=share)
    )


def test_lets_go_of_the_loras(standin: Any, left_over: Any) -> None:
    a, b = standin.lora("a", 1), standin.full("b", 2)
    samples, job = compose(standin.job(a, b))
    job.release()
    assert left_over() == 0
    assert samples.shape == (1, 4, 8, 8)

    def fail(rows: int) -> None:
        raise RuntimeError("boom")

    standin.model.fails, p = fail, standin.job(a, b)
    with contextlib.suppress(RuntimeError):
        compose(p)
    standin.model.fails = None
    assert left_over() == 0
    assert p.sampler


def test_a_refusal_lets_go_of_the_loras(a1111: Any, standin: Any) -> None:
    """They are read before the tags are: a WebUI's server keeps the error, and with its frames what is in them."""
    tags = a1111.run.Tag(standin.lora("a", 1), named={"role": "stile"}), standin.lora("b", 2)
    gc.collect()
    before = {id(each) for each in gc.get_objects() if type(each) is Adapter}
    with pytest.raises(LoratorioError, match="role of LoRA a") as kept:
        compose(standin.job(*tags))
    assert not [each for each in gc.get_objects() if type(each) is Adapter and id(each) not in before]
    del kept


@pytest.mark.parametrize("named", [{}, {"at": "auto"}])
def test_an_interruption_gives_the_last_latent_and_leaves_no_trace(
    a1111: Any, standin: Any, named: dict[str, str]
) -> None:
    """Nor a remark on places that it left no time to find."""
    a, b = (a1111.run.Tag(standin.lora(name, seed), named=named) for name, seed in (("a", 1), ("b", 2)))
    standin.run(standin.job(a, b, steps=20))
    before = trace(a1111, standin)

    def interrupt(rows: int) -> None:
        a1111.shared.state.interrupted = len(standin.model.calls) >= 2

    standin.model.calls, standin.model.fails = [], interrupt
    samples, job = compose(standin.job(a, b, steps=20))
    standin.model.fails, a1111.shared.state.interrupted = None, False
    assert samples.shape == (1, 4, 8, 8)
    assert job.passes[0].loras == ("a", "b")  # the picture's infotext says what was composed in it
    assert (job.passes[0].found, job.notes) == ((), [])
    assert trace(a1111, standin) == before


def test_a_pools_misfits_are_left_out(a1111: Any, standin: Any) -> None:
    """Neither the picture nor its text shows that they were among the candidates."""
    Tag = a1111.run.Tag
    loras = [standin.lora(name, seed) for seed, name in enumerate("abx")]
    loras[2].modules["diffusion_model_other"] = loras[2].modules["diffusion_model_to_k"]
    tags = [Tag(lora, named={"pool": "1"}) for lora in loras]
    samples, job = compose(standin.job(*tags), pool_size=2)
    assert job.passes[0].loras == ("a", "b")
    assert job.notes[0] == "Not used from the pool, because they cannot be read or do not fit: x."
    assert "the pool" in job.notes[1]
    alone, _ = compose(standin.job(*tags[:2]), pool_size=2)
    assert torch.equal(samples, alone)
    with pytest.raises(LoratorioError, match="No LoRA of the pool matches"):
        compose(standin.job(tags[2]))
    with pytest.raises(LoratorioError, match="another kind of model"):
        compose(standin.job(tags[0], Tag(loras[2])))


# -- memory ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_rows(standin: Any) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    whole, _ = compose(standin.job(a, b))

    def small(rows: int) -> None:
        if rows > 2:
            raise RuntimeError("CUDA out of memory")

    standin.model.fails = small
    halved, _ = compose(standin.job(a, b))
    assert close(whole, halved)

    def none(rows: int) -> None:
        raise RuntimeError("CUDA out of memory")

    standin.model.fails = none
    with pytest.raises(LoratorioError, match="memory"):
        compose(standin.job(a, b))


def test_all_rows_run_in_one_call(a1111: Any, standin: Any) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    standin.model.calls = []
    compose(standin.job(a, b))
    assert standin.model.calls == [6] * 4
    a1111.shared.opts.batch_cond_uncond = False
    standin.model.calls = []
    compose(standin.job(a, b, prompts=("x", "y")))
    assert set(standin.model.calls) == {2}


# -- what cannot be composed says so ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["no LoRA", "edit", "SD 3", "ControlNet", "Regional Prompter", "UNet"])
def test_obstacles_leave_the_picture_to_the_webui(
    a1111: Any, standin: Any, what: str, monkeypatch: Any
) -> None:
    import modules.sd_unet

    loras = [] if what == "no LoRA" else [standin.lora("a", 1), standin.lora("b", 2)]
    fields: dict[str, Any] = {}
    if what == "edit":
        standin.model.cond_stage_key = "edit"
    elif what == "SD 3":
        standin.model.is_sd3 = True
    elif what == "ControlNet":
        standin.model.model.diffusion_model._original_forward = None
    elif what == "Regional Prompter":
        fields["extra_generation_params"] = {"RP Active": True}
    elif what == "UNet":
        monkeypatch.setattr(modules.sd_unet, "current_unet", object())
    composed, job = compose(standin.job(*loras, **fields))
    assert torch.equal(composed, standin.run(standin.job(*loras)))
    assert job.passes == []
    assert len(job.notes) == 1
    assert "LoRAtorio" in job.notes[0]


def test_changed_text_is_left_to_the_webui(a1111: Any, standin: Any) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)

    def louder(params: Any) -> None:
        params.text_cond = params.text_cond * 2

    a1111.callbacks.on_cfg_denoiser(louder)
    try:
        composed, job = compose(standin.job(a, b))
        assert torch.equal(composed, standin.run(standin.job(a, b)))
        assert "text conditioning" in job.notes[0]
        # LoRAs without text share what the other extension made of it.
        c = standin.lora("c", 3, text=False)
        alone, job = compose(standin.job(c), recentre=0.0)
        assert job.passes
        assert close(alone, standin.run(standin.job(c)))
    finally:
        a1111.callbacks.remove_callbacks_for_function(louder)


def test_a_lora_for_another_model_stops_the_job(a1111: Any, standin: Any) -> None:
    a, odd = standin.lora("a", 1), standin.lora("odd", 2)
    key = "diffusion_model_to_k"
    odd.modules[key] = a1111.networks.NetworkModuleLora(odd, key, torch.randn(2, 99), torch.randn(8, 2))
    with pytest.raises(LoratorioError, match=r"odd.*to_k"):
        compose(standin.job(a, odd))
    bad = standin.lora("bad", 3)
    bad.modules[key].up_model.weight[0, 0] = float("nan")
    with pytest.raises(LoratorioError, match="bad contains NaN"):
        compose(standin.job(a, bad))


def test_a_model_called_past_the_callback_stops_the_job(a1111: Any, standin: Any, monkeypatch: Any) -> None:
    import modules.sd_samplers_cfg_denoiser as module

    monkeypatch.setattr(module, "cfg_denoiser_callback", lambda params: None)
    with pytest.raises(LoratorioError, match="calls the model without LoRAtorio"):
        compose(standin.job(standin.lora("a", 1)))


# -- places and own words ---------------------------------------------------------------------------------------------


def test_own_words_are_a_longer_prompt_for_the_loras_own_rows(a1111: Any, either: Any) -> None:
    """With one LoRA at λ = 0 it is the WebUI's own picture of that prompt, in batches, with AND, editing and long words."""
    Tag = a1111.run.Tag
    a = either.lora("a", 1)
    for prompts, longer in (
        (("a red circle",), ("{}, a red circle",)),
        (("a AND b :0.6", "c AND d :2"), ("{}, a AND {}, b :0.6", "{}, c AND {}, d :2")),
        (("a [red:blue:2] circle",), ("{}, a [red:blue:2] circle",)),
    ):
        for words in ("dress", "one two three four five six seven"):
            own, job = compose(either.job(Tag(a, named={"words": words}), prompts=prompts), recentre=0.0)
            wanted = either.run(either.job(a, prompts=tuple(each.replace("{}", words) for each in longer)))
            assert close(own, wanted)
            assert not close(own, either.run(either.job(a, prompts=prompts)))
            assert job.p.prompts == list(prompts)


def test_a_place_that_is_the_picture_is_no_place(a1111: Any, either: Any) -> None:
    Tag = a1111.run.Tag
    a, b = either.lora("a", 1), either.lora("b", 2)
    plain, _ = compose(either.job(a, b))
    placed, job = compose(either.job(Tag(a, named={"at": "0,0,1,1"}), Tag(b, named={"at": "left+right"})))
    assert torch.equal(plain, placed)
    assert tuple(use.place for use in job.passes[0].uses) == ("0,0,1,1", "left+right")
    left, _ = compose(either.job(Tag(a, named={"at": "left"}), Tag(b, named={"at": "right"})))
    right, _ = compose(either.job(Tag(a, named={"at": "right"}), Tag(b, named={"at": "left"})))
    assert not close(left, plain)
    assert not close(left, right)


def test_places_are_found_for_each_picture_and_kept_for_the_hires_pass(
    a1111: Any, standin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "APART", 0.0)  # the stand-in's model draws no figures
    a, b = (
        a1111.run.Tag(standin.lora(name, seed), named={"at": "auto"}) for name, seed in (("a", 1), ("b", 2))
    )
    prompts = ("b on the left, a", "b on the left, a")
    composed, job = compose(standin.job(a, b, prompts=prompts, hires=(list(prompts), [a, b])))
    first, second = job.passes
    assert [[name for name, _ in each] for each in first.found] == [["a", "b"]] * 2
    assert second.found == first.found
    assert tuple(use.place for use in first.uses) == ("auto", "auto")
    assert job.notes == []
    again, _ = compose(standin.job(a, b, prompts=prompts, hires=(list(prompts), [a, b])))
    assert torch.equal(composed, again)
    fields: dict[str, Any] = {}
    job.p.batch_size, job.p.n_iter = 2, 1
    infotext_fields.write(fields, job.settings, job)
    assert fields["LoRAtorio places"] == [
        ", ".join(f"{name} at {written(place)}" for name, place in each) for each in first.found
    ]
    # Another hires prompt's LoRAs have places of their own.
    _, job = compose(standin.job(a, b, prompts=prompts, hires=(list(prompts), [b, a])))
    assert [name for name, _ in job.passes[1].found[0]] == ["b", "a"]


def test_fewer_figures_are_said(a1111: Any, standin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "APART", 1e9)
    a, b = (
        a1111.run.Tag(standin.lora(name, seed), named={"at": "auto"}) for name, seed in (("a", 1), ("b", 2))
    )
    _, job = compose(standin.job(a, b))
    (note,) = job.notes
    assert note.startswith("One figure was found for a and b")
    fields: dict[str, Any] = {}
    infotext_fields.write(fields, job.settings, job)
    assert "LoRAtorio places" not in fields
    assert fields["LoRAtorio note"] == note


def test_a_bad_place_and_a_method_without_rows_stop_the_job(a1111: Any, standin: Any) -> None:
    Tag = a1111.run.Tag
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    for named, knobs, sentence in (
        ({"at": "lefft"}, {}, "did you mean left"),
        ({"at": "left"}, {"method": "merge"}, "do not work with Merge"),
        ({"words": "red"}, {"method": "switch"}, "do not work with Switch"),
        ({"at": "left"}, {"start": 0.5}, "every step"),
    ):
        calls = len(standin.model.calls)
        with pytest.raises(LoratorioError, match=sentence):
            compose(standin.job(Tag(a, named=named), b), **knobs)
        assert len(standin.model.calls) == calls  # nothing was sampled
        assert sum(trace(a1111, standin)[3]) == 0  # no hook


def test_only_masked_places_are_cut_with_the_picture(a1111: Any, standin: Any) -> None:
    """Inpainting "only masked": the LoRA whose place lies outside of what is sampled has no say in it."""
    from PIL import Image

    Tag = a1111.run.Tag
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    cut = {"paste_to": (64, 0, 64, 64), "overlay_images": [Image.new("RGBA", (128, 64))]}
    right, _ = compose(standin.job(Tag(a, named={"at": "left~0"}), Tag(b, named={"at": "right~0"}), **cut))
    alone, _ = compose(standin.job(Tag(b, named={"at": "right~0"}), **cut))
    assert close(right, alone)
    assert not close(right, compose(standin.job(a))[0])


@pytest.mark.parametrize("ticked_before", [True, False])
def test_a_replaced_file_is_used_whole(a1111: Any, standin: Any, ticked_before: bool) -> None:
    """The WebUI reads it anew under the old name, and has conditioning and merged text of that name already."""
    name = f"a {ticked_before}"  # what is remembered goes by the name
    wanted = standin.run(standin.job(standin.lora(name, 2)))
    standin = a1111.run.Standin()
    former, replaced = standin.lora(name, 1), standin.lora(name, 2)
    former.mtime, replaced.mtime = 1.0, 2.0
    compose(standin.job(former)) if ticked_before else standin.run(standin.job(former))
    for _ in range(2):
        found, _ = compose(standin.job(replaced), recentre=0.0)
        assert close(found, wanted)
    if ticked_before:
        assert close(standin.run(standin.job(replaced)), wanted)


@pytest.mark.parametrize("loras", [1, 2])
def test_loras_that_always_act_in_a_place_are_weighed_against_none(
    a1111: Any, standin: Any, loras: int
) -> None:
    """There is a reference then, and no LoRA that any weights are of."""
    Tag = a1111.run.Tag
    tags = [
        Tag(standin.lora(name, seed), named={"role": "always", "at": "left"})
        for seed, name in enumerate("ab"[:loras], 1)
    ]
    found, job = compose(standin.job(*tags), weight_maps=True)
    assert not close(found, standin.run(standin.job()))
    assert [str(use) for use in job.passes[0].uses] == [f"{name}:1 at left" for name in "ab"[:loras]]
    assert job.passes[0].history.weights == []
    assert job.notes == ["There are no weight maps: LoRAs with role=always have no weight."]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (
            {"start": 0.5, "end": 0.5},
            "The LoRAs were merged: start = 0.5 and end = 0.5 leave none of the 4 steps",
        ),
        ({"method": "merge", "weight_maps": True}, "There are no weight maps: Merge does not weight"),
        ({"weight_maps": True}, ""),
        ({"start": 0.5, "weight_maps": True}, ""),
        ({"method": "merge"}, ""),
    ],
)
def test_settings_that_had_no_effect_are_said(
    a1111: Any, standin: Any, knobs: dict[str, Any], said: str
) -> None:
    a, b = standin.lora("a", 1), standin.lora("b", 2)
    _, job = compose(standin.job(a, b, steps=4), **knobs)
    assert [note.partition(said)[1] for note in job.notes] == ([said] if said else [])


# -- LoRAs without effect ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["strength 0", "nothing fits", "zeros"])
@pytest.mark.parametrize("method", ["loratorio", "composite", "cmlora", "frequency"])
def test_a_lora_without_effect_takes_no_weight(a1111: Any, standin: Any, kind: str, method: str) -> None:
    Tag = a1111.run.Tag
    a, c, b = standin.lora("a", 1), standin.lora("c", 3), standin.lora("b", 2)
    tag = Tag(b)
    if kind == "strength 0":
        tag = Tag(b, 0.0, 0.0)
    elif kind == "nothing fits":
        b.modules.clear()
    else:
        for module in b.modules.values():
            module.up_model.weight.data.zero_()
        del b.modules["transformer_text"]
    found, job = compose(standin.job(a, tag, c), method=method)
    wanted, _ = compose(standin.job(a, c), method=method)
    assert torch.equal(found, wanted)
    assert job.passes[0].loras == ("a", "c")
    assert any("LoRA b has no effect" in note for note in job.notes)


def test_when_none_has_an_effect_it_is_the_webuis_picture(a1111: Any, standin: Any) -> None:
    tag = a1111.run.Tag(standin.lora("a", 1), 0.0, 0.0)
    found, job = compose(standin.job(tag))
    assert torch.equal(found, standin.run(standin.job()))
    assert job.passes == []
    assert len(job.notes) == 1


WORDS = (
    # prompts, and what the LoRA at the left (sks) and the one at the right (wug) read of them
    (("a sks and wug",), ("a sks and ",), ("a  and wug",)),
    (("sks hat AND wug sea :0.6",), ("sks hat AND  sea :0.6",), (" hat AND wug sea :0.6",)),
    (("sks hat, sea", "a wug"), ("sks hat, sea", "a "), (" hat, sea", "a wug")),
    (("a [sks:wug:2] hat",), ("a [sks::2] hat",), ("a [:wug:2] hat",)),
)


@pytest.mark.parametrize(("prompts", "left", "right"), WORDS)
def test_each_half_is_the_webuis_own_picture_of_what_its_lora_reads(
    a1111: Any, either: Any, prompts: tuple[str, ...], left: tuple[str, ...], right: tuple[str, ...]
) -> None:
    """In one step, at λ = 0: nothing of the other half has come over."""
    Tag = a1111.run.Tag
    a = either.lora("a", 1, **{"modelspec.trigger_phrase": "sks"})
    b = either.lora("b", 2, **{"modelspec.trigger_phrase": "wug"})
    tags = Tag(a, named={"at": "left~0"}), Tag(b, named={"at": "right~0"})

    def halves(samples: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return samples.chunk(2, dim=-1)

    own, job = compose(either.job(*tags, prompts=prompts, steps=1), recentre=0.0)
    assert close(halves(own)[0], halves(either.run(either.job(a, prompts=left, steps=1)))[0])
    assert close(halves(own)[1], halves(either.run(either.job(b, prompts=right, steps=1)))[1])
    assert [str(use) for use in job.passes[0].uses] == [
        "a:1 at left~0 without wug",
        "b:1 at right~0 without sks",
    ]
    assert job.p.prompts == list(prompts)
    common, job = compose(either.job(*tags, prompts=prompts, steps=1), recentre=0.0, own_words=False)
    assert close(halves(common)[0], halves(either.run(either.job(a, prompts=prompts, steps=1)))[0])
    assert [str(use) for use in job.passes[0].uses] == ["a:1 at left~0", "b:1 at right~0"]
    assert not close(own, common)

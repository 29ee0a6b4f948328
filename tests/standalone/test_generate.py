"""From request to pictures, with models of random weights: samplers, kinds of model, and what must give the same picture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from loratorio import toybox
from loratorio.compose.methods import METHODS
from loratorio.errors import LoratorioError
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.generate import Request, generate
from loratorio.standalone.request import whole
from loratorio.standalone.samplers import SAMPLERS
from loratorio.standalone.schedule import SamplingSchedule
from tests import tiny
from tests.published import paper

PROMPT = "a red (circle:1.2) <lora:one:0.8> <lora:two:0.5:1>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    saved = {
        "eps": tiny.save_sd(root / "eps"),
        "v": tiny.save_sd(root / "v", prediction_type="v_prediction"),
        "sdxl": tiny.save_sdxl(root / "sdxl"),
    }
    for kind, folder in saved.items():
        model = load_checkpoint(folder)
        for seed, name in enumerate(("one", "two")):
            text = model.text_encoders[0] if name == "one" else None
            tiny.save_kohya(
                root / f"loras-{kind}" / f"{name}.safetensors", model.unet, text, size=0.15, seed=seed
            )
    return saved


@pytest.fixture(scope="module")
def load(folders: dict[str, Path]) -> Callable[[str], tuple[Checkpoint, Path]]:
    known: dict[str, Checkpoint] = {}

    def loaded(kind: str) -> tuple[Checkpoint, Path]:
        if kind not in known:
            known[kind] = load_checkpoint(folders[kind])
        return known[kind], folders[kind].with_name(f"loras-{kind}")

    return loaded


def request(prompt: str = PROMPT, steps: int = 3, **changes: object) -> Request:
    return replace(
        Request(prompt, "bad", paper(enabled=True), steps=steps, cfg=4.0, width=64, height=64, seed=3),
        **changes,
    )


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def psnr(first: Image.Image, second: Image.Image) -> float:
    error = ((pixels(first) - pixels(second)) ** 2).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["eps", "v", "sdxl"])
def test_a_batch_is_the_single_pictures(
    load: Callable[[str], tuple[Checkpoint, Path]], kind: str, sampler: str
) -> None:
    model, loras = load(kind)
    both = generate(model, loras, request(batch=2, sampler=sampler))
    second = generate(model, loras, request(seed=4, sampler=sampler))
    assert both.seeds == [3, 4]
    assert psnr(both.images[1], second.images[0]) >= 45
    assert psnr(both.images[0], both.images[1]) < 40


@pytest.mark.parametrize("kind", ["eps", "v", "sdxl"])
def test_one_lora_without_recentring_is_that_lora_merged(
    load: Callable[[str], tuple[Checkpoint, Path]], kind: str
) -> None:
    model, loras = load(kind)
    prompt = "a red circle <lora:one:0.7>"
    composed = generate(model, loras, request(prompt, settings=paper(enabled=True, recentre=0)))
    merged = generate(model, loras, request(prompt, settings=paper(enabled=True, method="merge")))
    plain = generate(model, loras, request("a red circle"))
    assert psnr(composed.images[0], merged.images[0]) >= 60
    assert psnr(plain.images[0], merged.images[0]) < 40


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "unipc", "dpmpp-2m-karras"])
def test_without_loras_it_is_diffusers_own_picture(
    load: Callable[[str], tuple[Checkpoint, Path]], folders: dict[str, Path], kind: str, name: str
) -> None:
    """Diffusers' pipeline with the same scheduler, start and prompt."""
    model, _ = load(kind)
    ours = generate(model, None, request("a red circle", sampler=name, steps=4)).images[0]
    pipe = StableDiffusionPipeline.from_pretrained(folders[kind], safety_checker=None)
    pipe.scheduler = SAMPLERS[name].make(model.schedule)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    theirs = pipe(
        "a red circle", negative_prompt="bad", num_inference_steps=4, guidance_scale=4.0, latents=noise, height=64, width=64
    ).images[0]  # fmt: skip
    assert psnr(ours, theirs) >= 45


def test_guidance_of_one_runs_no_unconditional_rows(load: Callable[[str], tuple[Checkpoint, Path]]) -> None:
    model, loras = load("eps")
    rows = []
    forward = model.unet.forward
    hook = model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        generate(model, loras, request(cfg=1.0, steps=1))
        generate(model, loras, request(steps=1))
    finally:
        hook.remove()
    assert rows == [3, 6]
    assert model.unet.forward == forward


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_img2img(load: Callable[[str], tuple[Checkpoint, Path]], sampler: str) -> None:
    model, loras = load("eps")
    start = Image.linear_gradient("L").convert("RGB")
    told: list[tuple[int, int]] = []
    little, much = (
        generate(
            model,
            loras,
            request(init_image=start, strength=strength, steps=10, sampler=sampler),
            lambda *at: told.append(at),
        ).images[0]
        for strength in (0.2, 0.9)
    )
    decoded = generate(
        model, None, request("a", init_image=start, strength=0.01, steps=1000, sampler=sampler, cfg=1.0)
    ).images[0]
    assert told[0] == (0, 2)
    assert told[-1] == (9, 9)
    assert psnr(little, decoded) > psnr(much, decoded)


def test_heun_runs_the_model_twice_in_each_step_but_the_last(
    load: Callable[[str], tuple[Checkpoint, Path]],
) -> None:
    model, _ = load("eps")
    rows: list[int] = []
    told: list[tuple[int, int]] = []
    hook = model.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        generate(model, None, request("a", steps=3, sampler="heun"), lambda *at: told.append(at))
    finally:
        hook.remove()
    assert rows == [2] * 5
    assert told == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (3, 3)]


def test_a_schedule_that_a_sampler_does_not_know_is_an_error() -> None:
    schedule = {"num_train_timesteps": 1000, "rescale_betas_zero_snr": True}
    with pytest.raises(
        LoratorioError, match=r"Heun has no schedule .*rescale_betas_zero_snr.*another sampler"
    ):
        SAMPLERS["heun"].make(schedule)
    SAMPLERS["heun"].make({**schedule, "rescale_betas_zero_snr": False})


def test_courses_end_without_noise() -> None:
    schedule = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    for sampler in SAMPLERS.values():
        for prediction_type in ("epsilon", "v_prediction"):
            course = SamplingSchedule.of(
                sampler, {**schedule, "prediction_type": prediction_type}, 10, 0.55, "cpu"
            )
            assert course.steps == 5
            alphas = [course.alpha_sigma(i) for i in range(5)]
            assert all(alpha**2 + sigma**2 == pytest.approx(1, abs=1e-5) for alpha, sigma in alphas)
            assert [sigma for _, sigma in alphas] == sorted((sigma for _, sigma in alphas), reverse=True)


def test_half_precision(folders: dict[str, Path]) -> None:
    model = load_checkpoint(folders["eps"], dtype=torch.bfloat16)
    outcome = generate(model, folders["eps"].with_name("loras-eps"), request())
    assert outcome.images[0].size == (64, 64)


def test_a_picture_that_is_not_square_with_maps(load: Callable[[str], tuple[Checkpoint, Path]]) -> None:
    model, loras = load("eps")
    settings = paper(enabled=True, weight_maps=True, patch_size=3)
    outcome = generate(model, loras, request(settings=settings, width=72, height=104))
    assert outcome.images[0].size == (72, 104)
    assert [step.shape for step in outcome.history.weights] == [(2, 1, 13, 9)] * 3
    assert outcome.composed == ["one", "two"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 60}, "width must be divisible by 8, not 60: the nearest is 64"),
        ({"height": 0}, "height must be from 8 to 8192, not 0"),
        (
            {"settings": paper(patch_size=9)},
            "patch_size is 9, but the latent of a 64×64 picture is only 8×8",
        ),
        ({"sampler": "eular"}, "sampler must be one of .*; did you mean euler"),
        ({"steps": 0}, "steps must be from 1 to 1000, not 0"),
        ({"batch": 0}, "batch must be from 1"),
        ({"cfg": 0.5}, "cfg must be from 1"),
        ({"strength": 1.5}, "strength must be from"),
        ({"seed": -1}, "seed must be from 0"),
        ({"prompt": "<lora:three>"}, "LoRA three is not in"),
    ],
)
def test_requests_that_cannot_be_made(
    load: Callable[[str], tuple[Checkpoint, Path]], changes: dict[str, object], says: str
) -> None:
    model, loras = load("eps")
    with pytest.raises(LoratorioError, match=says):
        generate(model, loras, request(**changes))  # type: ignore[arg-type]


def test_a_lora_but_no_folder(load: Callable[[str], tuple[Checkpoint, Path]]) -> None:
    with pytest.raises(LoratorioError, match="there is no LoRA folder: give lora_dir"):
        generate(load("eps")[0], None, request())


def test_numbers_that_overflow(load: Callable[[str], tuple[Checkpoint, Path]]) -> None:
    model, loras = load("eps")
    with pytest.raises(LoratorioError, match="NaN or infinite"):
        generate(model, loras, request("a <lora:one:1e30>", settings=paper(enabled=True, method="merge")))


def test_nothing_is_left_behind(load: Callable[[str], tuple[Checkpoint, Path]]) -> None:
    """After a picture with LoRAs, and after one that failed, the plain picture is the plain picture."""
    model, loras = load("eps")
    before = generate(model, None, request("a red circle")).images[0]
    generate(model, loras, request())
    with pytest.raises(KeyboardInterrupt):
        generate(model, loras, request(), stop)
    after = generate(model, None, request("a red circle")).images[0]
    assert np.array_equal(pixels(before), pixels(after))
    assert not any(module._forward_hooks for module in model.unet.modules())


def stop(done: int, total: int) -> None:
    if done == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("method", METHODS)
def test_8_bit_files_in_every_method_and_a_pool(
    load: Callable[[str], tuple[Checkpoint, Path]], tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    """One of the LoRAs as fp8, named and out of a pool: the picture of its values in float32."""
    checkpoint, folder = load("eps")
    one = {key: tensor.to(dtype) for key, tensor in load_file(folder / "one.safetensors").items()}
    pictures = []
    for kind in (dtype, torch.float32):
        own = tmp_path / str(kind)
        own.mkdir()
        save_file({key: tensor.to(kind) for key, tensor in one.items()}, own / "one.safetensors")
        shutil.copy(folder / "two.safetensors", own)
        prompts = (PROMPT, "a red (circle:1.2) <lora:two:0.5:1><pool:one:0.8>")
        settings = paper(enabled=True).with_values({"method": method})
        pictures.append(
            [generate(checkpoint, own, request(each, settings=settings)).images[0] for each in prompts]
        )
    for first, second in zip(*pictures, strict=True):
        assert psnr(first, second) > 60


def test_two_threads_on_one_checkpoint_take_turns(load: Callable[[str], tuple[Checkpoint, Path]]) -> None:
    """LoRAs are attached to the model itself: at the same time both pictures would have all of them."""
    model, folder = load("eps")
    requests = [request("a <lora:one:0.8>"), request("a <lora:two:1>")]
    wanted = [generate(model, folder, each).images[0] for each in requests]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda each: generate(model, folder, each).images[0], requests * 3))
    for image, expected in zip(found, wanted * 3, strict=True):
        assert (pixels(image) == pixels(expected)).all()


def test_what_is_plain_text_here_is_said(load: Callable[[str], tuple[Checkpoint, Path]]) -> None:
    model, folder = load("eps")
    made = request("a AND b <lora:one:0.8>", steps=1)
    outcome = generate(model, folder, replace(made, negative="<lora:two:1>"))
    assert [note.split()[0] for note in outcome.notes] == ["AND", "The"]
    assert not generate(model, folder, request("sandy BAND <lora:one:0.8>", steps=1)).notes


def test_what_a_request_leaves_out_is_the_models_own(load: Callable[[str], tuple[Checkpoint, Path]]) -> None:
    """The toybox says 128×128, CFG 3 and 20 steps; a model that says nothing has CFG 7."""
    box = load_checkpoint(toybox.CHECKPOINT)
    made = whole(Request("a"), box)
    assert (made.width, made.height, made.cfg, made.steps) == (128, 128, 3.0, 20)
    model, _ = load("eps")
    made = whole(Request("a", steps=3, width=72), model)
    assert (made.width, made.height, made.cfg, made.steps) == (72, model.native_size, 7.0, 3)
    outcome = generate(box, str(toybox.LORA_DIR), Request("boolio <lora:ghost>", steps=1))
    assert outcome.images[0].size == (128, 128)
    assert outcome.request.cfg == 3.0


def test_paths_as_text(folders: dict[str, Path]) -> None:
    model = load_checkpoint(str(folders["eps"]))
    made = generate(model, str(folders["eps"].with_name("loras-eps")), request(steps=1))
    assert made.composed == ["one", "two"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda"}, "This machine, or its torch, has no cuda: choose the device cpu"),
        ({"device": "cuda:9"}, "has no cuda|There is no device cuda:9 on this machine"),
        ({"device": "tpu"}, "The device must be auto, cpu, cuda, cuda:1 or mps, not 'tpu'"),
        ({"dtype": "int8"}, "The dtype must be auto, fp32, fp16 or bf16, not 'int8'"),
    ],
)
def test_no_such_device_is_a_sentence(folders: dict[str, Path], options: dict[str, str], says: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(LoratorioError, match=says):
        load_checkpoint(folders["eps"], **options)


def test_memory_that_does_not_do_is_a_sentence(
    load: Callable[[str], tuple[Checkpoint, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load("eps")

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(model.vae, "decode", full)
    with pytest.raises(LoratorioError, match="64×64 pixels do not fit into memory"):
        generate(model, None, request("a circle", steps=1))


def test_a_bar_in_a_terminal_and_nowhere_else(
    load: Callable[[str], tuple[Checkpoint, Path]],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, loras = load("eps")
    generate(model, loras, request(steps=2))
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    generate(model, loras, request(steps=2))
    # Whether a later state is drawn depends on the time that passes.
    assert " 0/2 [" in capfd.readouterr().err
    generate(model, loras, request(steps=2), progress=False)
    assert capfd.readouterr().err == ""
    told: list[tuple[int, int]] = []
    generate(model, loras, request(steps=2), lambda done, total: told.append((done, total)))
    assert told == [(0, 2), (1, 2), (2, 2)]

"""``loratorio demo --serve``: a page for playing, in the browser, on this machine alone."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from .. import toybox
from ..errors import LoratorioError
from ..pictures.colours import COLOURS
from ..pictures.sheet import draw_text, enlarged, text_size
from ..settings import PRESETS, Knob, Settings, panel_rows
from ..webui.components import component, shown
from . import example
from .describe import describe
from .generate import generate
from .lora_lookup import list_loras
from .model import weight_maps
from .output import png
from .prompt import split_loras
from .request import Request
from .samplers import SAMPLERS

if TYPE_CHECKING:
    from .generate import Outcome
    from .model import LoadedModel

_SECONDS = 15
"""How long an error message stays."""

_PICTURE_ENDINGS = (".png", ".preview.png", ".jpg", ".jpeg", ".webp")

_CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#title h1 { margin: 0; font-weight: 650; letter-spacing: -0.01em; }
#title p { margin: 0; opacity: .75; }
.heading p { margin: 0; font-weight: 600; }
.heading p em { font-weight: 400; font-style: normal; opacity: .7; }
#cards { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 8px; max-height: 380px;
  overflow-y: auto; }
#cards button.card { flex-direction: column; gap: 4px; padding: 6px; min-width: 0; font-size: 12px; font-weight: 500; line-height: 1.2;
  overflow-wrap: anywhere; }
#cards button.card img { width: 100%; height: auto; aspect-ratio: 1; object-fit: cover; border-radius: 6px; margin: 0; }
#cards button.card.in-prompt { outline: 2px solid var(--primary-500); outline-offset: -2px; background: var(--primary-500); color: white; }
#generate.busy { opacity: .7; }
#generate.busy::after { content: "…"; }
#pictures img { image-rendering: auto; }
#maps .thumbnail-item, #pictures .thumbnail-item { aspect-ratio: auto; }
#maps .grid-wrap, #pictures .grid-wrap { max-height: none; }
footer { display: none !important; }
@media (max-width: 820px) { #main { flex-direction: column; } #main > * { min-width: 0 !important; width: 100%; } }
@media (max-width: 520px) {
  #cards { grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); }
  #maps .grid-container { grid-template-columns: repeat(2, 1fr) !important; }
}
"""

_TOGGLE = """(prompt) => {
  const name = %s;
  const tag = new RegExp("\\\\s*<lora:" + name.replace(/[.*+?^${}()|[\\]\\\\]/g, "\\\\$&") + "(:[^<>]*)?>", "g");
  return tag.test(prompt) ? prompt.replace(tag, "").trim() : (prompt.trimEnd() + " <lora:" + name + ":1>").trim();
}"""
"""In the browser: put a LoRA's tag at the prompt's end, or take it out where it is there."""

_MARK = """(prompt) => {
  const named = [...prompt.matchAll(/<(?:lora|lyco):([^:<>]*)/gi)].map((tag) => tag[1].trim().toLowerCase());
  document.querySelectorAll("#cards button.card").forEach((card, number) => {
    const there = named.includes(%s[number].toLowerCase());
    card.classList.toggle("in-prompt", there);
    card.setAttribute("aria-pressed", there);
  });
}"""
"""In the browser: mark the cards of the LoRAs that the prompt names."""

_BUSY = """() => document.querySelector("#generate").classList.%s("busy")"""
"""In the browser: show on the button that pictures are being made, as on a phone they are far below."""

_TO_PICTURES = """() => {
  const pictures = document.querySelector("#pictures");
  if (pictures.getBoundingClientRect().top > window.innerHeight / 2)
    pictures.scrollIntoView({ behavior: "smooth", block: "start" });
}"""
"""In the browser: scroll to the pictures if they are below, as on a phone."""


def serve(model: LoadedModel, port: int) -> None:
    """Open the page on http://127.0.0.1:`port` and stay until Ctrl-C. Raises LoratorioError when the port is taken."""
    import gradio as gr

    page = build(model)
    page.queue(default_concurrency_limit=1)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            quiet=True,
            prevent_thread_lock=True,
            css=_CSS,
            theme=_theme(),
        )
    except OSError as problem:
        raise LoratorioError(
            f"Port {port} is not available, perhaps because another program uses it ({problem}): choose another --port."
        ) from problem
    print(f"Open http://127.0.0.1:{port} in a browser. Ctrl-C stops it.", flush=True)
    try:
        page.block_thread()
    finally:
        gr.close_all(verbose=False)


def _theme() -> Any:
    import gradio as gr

    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    return gr.themes.Soft(primary_hue="teal", secondary_hue="orange", radius_size="md", font=fonts)


def build(model: LoadedModel) -> Any:
    """The page, not yet served."""
    import gradio as gr

    loras = list_loras(model.lora_dir) if model.lora_dir else {}
    with gr.Blocks(title="LoRAtorio", analytics_enabled=False) as page:
        gr.Markdown("# LoRAtorio\nSeveral LoRAs in one picture, each where it fits best.", elem_id="title")
        with gr.Row(equal_height=False, elem_id="main"):
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(
                    _first_prompt(loras), label="Prompt", lines=3, max_lines=8, elem_id="prompt",
                    placeholder="text with <lora:name:strength> tags",
                )  # fmt: skip
                gr.Markdown(
                    "LoRAs *· click to add one to the prompt, or to remove it*", elem_classes="heading"
                )
                _cards(gr, loras, prompt)
                button = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
                knobs = _knobs(gr)
                with gr.Accordion("Picture", open=False):
                    negative = gr.Textbox("", label="Negative prompt", lines=1)
                    with gr.Row():
                        steps = gr.Slider(1, 60, 20, step=1, label="Steps", min_width=140)
                        cfg = gr.Slider(
                            1, 15, model.checkpoint.cfg, step=0.5, label="CFG scale", min_width=140
                        )
                    with gr.Row():
                        size = model.checkpoint.native_size
                        width, height = (
                            gr.Slider(size // 2, 4 * size, size, step=8, label=label, min_width=140)
                            for label in ("Width", "Height")
                        )
                    with gr.Row():
                        sampler = gr.Dropdown(
                            [(each.label, each.name) for each in SAMPLERS.values()], value="euler", label="Sampler", min_width=140,
                        )  # fmt: skip
                        seed = gr.Number(
                            0, label="Seed", precision=0, info="-1: a random one each time", min_width=140
                        )
                        batch = gr.Slider(1, 4, 1, step=1, label="Pictures", min_width=140)
            with gr.Column(scale=6, min_width=320):
                gr.Markdown("Pictures", elem_classes="heading")
                pictures = gr.Gallery(
                    show_label=False, columns=2, height="auto", object_fit="contain", elem_id="pictures",
                    format="png", buttons=["download", "fullscreen"],
                )  # fmt: skip
                note = gr.Markdown("", elem_id="note")
                gr.Markdown("Weight maps *· where and when each LoRA was used*", elem_classes="heading")
                maps = gr.Gallery(
                    show_label=False, columns=3, height="auto", object_fit="contain", elem_id="maps",
                    format="png", buttons=["download", "fullscreen"],
                )  # fmt: skip
                with gr.Accordion("Infotext, for a WebUI's PNG Info", open=False):
                    infotext = gr.Textbox(show_label=False, lines=4, buttons=["copy"], elem_id="infotext")

        def run(
            text: str, unwanted: str, steps: int, cfg: float, width: int, height: int, sampler: str, seed: float, batch: int,
            *values: Any,
            progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it in the signature
        ) -> tuple[Any, ...]:  # fmt: skip
            try:
                with_maps = Settings(enabled=True, weight_maps=True, single_maps=True, naming="label")
                request = Request(
                    text,
                    unwanted or "",
                    with_maps.with_values(dict(zip(knobs, values, strict=True))),
                    int(steps),
                    float(cfg),
                    sampler,
                    random.randrange(2**32) if seed is None or seed < 0 else int(seed),
                    int(width),
                    int(height),
                    int(batch),
                )
                outcome = generate(
                    model.checkpoint,
                    model.lora_dir,
                    request,
                    lambda done, total: progress((done, total), unit="steps"),
                )
            except LoratorioError as problem:
                raise gr.Error(
                    str(problem),
                    duration=_SECONDS,
                    title="This picture cannot be made",
                    print_exception=False,
                ) from problem
            return _shown(model, outcome)

        inputs = [prompt, negative, steps, cfg, width, height, sampler, seed, batch, *knobs.values()]
        for event in (button.click, prompt.submit):
            event(None, None, None, js=_BUSY % "add", api_visibility="private")
            made = event(
                run,
                inputs,
                [pictures, maps, infotext, note],
                show_progress_on=[pictures],
                api_name="generate",
            )
            made.then(None, None, None, js=_BUSY % "remove", api_visibility="private")
            made.success(None, None, None, js=_TO_PICTURES, api_visibility="private")
        mark = _MARK % json.dumps(sorted(loras))
        for seen in (page.load, prompt.change):
            seen(None, prompt, None, js=mark, api_visibility="private")
    return page


def _cards(gr: Any, loras: Mapping[str, Path], prompt: Any) -> None:
    """A button with a picture for every LoRA."""
    pictures = Path(tempfile.mkdtemp(prefix="loratorio-cards-"))
    with gr.Row(elem_id="cards"):
        for number, (name, lora) in enumerate(sorted(loras.items())):
            file = pictures / f"{number}.png"
            _card(lora, name).save(file)
            card = gr.Button(name, icon=str(file), elem_classes="card", min_width=0, size="sm")
            card.click(None, prompt, prompt, js=_TOGGLE % json.dumps(name), api_visibility="private")


def _knobs(gr: Any) -> dict[str, Any]:
    """A component for every knob, made from the list in the settings and placed as in a WebUI's panel."""
    made: dict[str, Any] = {}
    with gr.Row(elem_id="presets"):
        presets = {name: gr.Button(preset.label, size="sm") for name, preset in PRESETS.items()}
    with gr.Accordion("All settings", open=False):
        for row in panel_rows()[1:]:
            with gr.Row():
                made |= {knob.name: _component(gr, knob) for knob in row}
    for name, button in presets.items():
        values = PRESETS[name].values
        outputs = [made[knob] for knob in values]
        button.click(
            None, None, outputs, js=f"() => {json.dumps(list(values.values()))}", api_visibility="private"
        )
    return made


def _component(gr: Any, knob: Knob) -> Any:
    name, values = component(knob)
    return getattr(gr, name)(
        value=shown(knob, knob.default), label=knob.label, info=knob.help, min_width=220, **values
    )


def _first_prompt(names: Collection[str]) -> str:
    return example.prompt(":1") if set(example.LORAS) <= set(names) else ""


def _card(file: Path, name: str) -> Image.Image:
    """The LoRA's preview picture (a file of its name beside it, or the toybox's thumbnail), or its name on a coloured card."""
    candidates = [file.with_suffix(ending) for ending in _PICTURE_ENDINGS]
    candidates += [toybox.THUMBNAIL_DIR / f"{name}.png"]
    for candidate in candidates:
        if candidate.is_file():
            return enlarged(Image.open(candidate).convert("RGB"), 128)
    card = Image.new("RGB", (128, 128), COLOURS[sum(name.encode()) % len(COLOURS)])
    width, height = text_size(name[:12], 16)
    draw_text(ImageDraw.Draw(card), (64 - width / 2, 64 - height / 2), name[:12], 16, (255, 255, 255))
    return card


def _shown(model: LoadedModel, outcome: Outcome) -> tuple[Any, ...]:
    """What the page shows: pictures (with their infotext in the file), maps, the infotext, notes."""
    folder = Path(tempfile.mkdtemp(prefix="loratorio-"))
    files, texts = [], []
    for i, (image, seed) in enumerate(zip(outcome.images, outcome.seeds, strict=True)):
        texts.append(describe(model.checkpoint, outcome, i))
        file = folder / f"{seed}.png"
        file.write_bytes(png(enlarged(image, 384), texts[-1]))
        files.append((str(file), f"seed {seed}"))
    maps = [picture for i in range(len(outcome.images)) for picture in weight_maps(outcome, i)]
    notes = list(outcome.notes)
    if not split_loras(outcome.request.prompt)[1]:
        notes.append("There is no LoRA in the prompt, so nothing was composed.")
    return files, maps, texts[0], "\n\n".join(notes)

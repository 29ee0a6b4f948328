"""The page of ``loratorio demo --serve``: built from the settings, and used in a browser where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loratorio.errors import LoratorioError
from loratorio.settings import KNOBS
from loratorio.standalone import serve
from loratorio.standalone.checkpoint import load_checkpoint
from loratorio.standalone.model import LoadedModel
from tests import tiny


@pytest.fixture(scope="module")
def model_and_loras(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    root = tmp_path_factory.mktemp("model_and_loras")
    model = load_checkpoint(tiny.save_sd(root / "sd"))
    for seed, name in enumerate(("rose", "dusk.v1+(x)")):
        tiny.save_kohya(root / "loras" / f"{name}.safetensors", model.unet, size=0.1, seed=seed)
    return LoadedModel(model, root / "loras")


def test_every_knob_is_on_the_page(model_and_loras: LoadedModel) -> None:
    page = serve.build(model_and_loras)
    labels = {component["props"].get("label") for component in page.get_config_file()["components"]}
    assert {knob.label for knob in KNOBS if knob.row > 1} <= labels


def test_a_port_that_is_taken(model_and_loras: LoadedModel) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LoratorioError, match="another program uses it"):
            serve.serve(model_and_loras, taken.getsockname()[1])


@pytest.fixture
def page(model_and_loras: LoadedModel, browser: Any) -> Iterator[Any]:
    blocks = serve.build(model_and_loras)
    blocks.queue()
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", quiet=True, prevent_thread_lock=True, css=serve._CSS, theme=serve._theme()
    )
    try:
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(240_000)
        opened.goto(address, timeout=240_000)
        opened.wait_for_selector("#generate")
        yield opened
        opened.close()
    finally:
        blocks.close(verbose=False)


def test_cards_and_pictures_in_a_browser(page: Any, tmp_path: Path) -> None:
    prompt = page.locator("#prompt textarea")
    prompt.fill("a cat")
    for card, expected in (
        (0, "a cat <lora:dusk.v1+(x):1>"),
        (1, "a cat <lora:dusk.v1+(x):1> <lora:rose:1>"),
        (0, "a cat <lora:rose:1>"),
    ):
        page.locator("#cards button.card").nth(card).click()
        page.wait_for_function(f"document.querySelector('#prompt textarea').value === {expected!r}")
    page.locator("#cards button.card").nth(0).click()
    page.locator("#generate").click()
    page.wait_for_selector("#maps img")
    assert page.locator("#pictures img").count() == 1
    assert page.locator("#maps img").count() == 3
    assert page.locator("#generate.busy").count() == 0
    for width in (1280, 420):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (
            f"scrolls sideways at {width} px"
        )


def test_cards_show_what_is_in_the_prompt(page: Any) -> None:
    marked = page.locator("#cards button.card.in-prompt")
    for text, names in (
        ("a <lora:ROSE:0.5>", ["rose"]),
        ("a <lora:dusk.v1+(x)> <lora:rose:1:role=style>", ["dusk.v1+(x)", "rose"]),
        ("a rose", []),
    ):
        page.locator("#prompt textarea").fill(text)
        page.wait_for_function(
            f"document.querySelectorAll('#cards button.card.in-prompt').length === {len(names)}"
        )
        assert [each.strip() for each in marked.all_inner_texts()] == names


def test_on_a_phone_it_goes_to_the_pictures_of_the_size_that_was_asked_for(page: Any) -> None:
    page.set_viewport_size({"width": 420, "height": 900})
    page.locator("#prompt textarea").fill("a cat <lora:rose:1>")
    page.get_by_text("Picture", exact=True).click()
    page.get_by_label("number input for Width").fill("128")
    page.get_by_label("number input for Width").press("Tab")
    # The page has taken the number when its slider shows it.
    page.wait_for_function("document.querySelector('[aria-label=\"range slider for Width\"]').value == 128")
    page.locator("#generate").click()
    page.wait_for_selector("#pictures img")
    page.wait_for_function("document.querySelector('#pictures').getBoundingClientRect().top < 450")
    picture = page.locator("#pictures img").first
    assert picture.evaluate("each => each.naturalWidth / each.naturalHeight") == 2


def test_a_wrong_name_is_a_sentence_that_goes(page: Any, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    page.locator("#prompt textarea").fill("a <lora:rosa:1>")
    page.locator("#generate").click()
    page.wait_for_selector("text=LoRA rosa is not in")
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    page.wait_for_selector("text=LoRA rosa is not in", state="detached", timeout=1000 * (serve._SECONDS + 60))

"""The page of the running WebUI, driven by headless Chromium: the panel, pasting, PNG Info, the X/Y/Z plot, the settings page.

Beside LORATORIO_WEBUI_URL these need playwright and Chromium (LORATORIO_CHROMIUM, or on the PATH).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from loratorio.pictures.infotext import LORAS_KEY, params, text
from loratorio.settings import KNOBS, Settings
from loratorio.webui import xyz
from loratorio.webui.gallery import MARK

pytestmark = pytest.mark.timeout(900)

NONE_YET = "No LoRA in the prompt yet, so nothing is composed. Add one, for example <lora:name:0.8>."
PROMPT = "a red circle <lora:{0}:0.8> <lora:{1}:0.65>"
CHOSEN = Settings(
    enabled=True,
    method="loratorio",  # which alone has a temperature
    blend="interpolated",
    patch_size=5,
    temperature=0.0371,
    top_k=2,
    recentre=0.35,
    start=0.25,
    end=0.85,
    weight_maps=True,
)

AS_PUBLISHED = Settings(enabled=True, method="loratorio")
"""The method that has a temperature."""


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    """The WebUI's page, loaded once: that can take a minute. What is not on this machine is not reached: fonts and the like."""
    url = os.environ["LORATORIO_WEBUI_URL"].rstrip("/")
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_default_timeout(120_000)
    context.route(
        "**/*", lambda each: each.continue_() if each.request.url.startswith((url, "data:")) else each.abort()
    )
    page = context.new_page()
    page.goto(url, timeout=120_000)
    page.wait_for_selector("#loratorio_txt2img-visible-checkbox", state="attached")
    page.wait_for_selector("#loratorio_txt2img .loratorio-folded", state="attached")
    yield page
    context.close()


def go_to(page: Any, tab: str) -> None:
    page.locator("#tabs > .tab-nav > button", has_text=tab).first.click()


def open_panel(page: Any, tab: str) -> None:
    """Unfold the panel and its settings without ticking it: its arrow does both, its tick box is put back. (Pasting a tick unfolds
    the panel, too.)"""
    if not page.locator(f"#loratorio_{tab}_preset").is_visible():
        ticked = page.locator(f"#loratorio_{tab}-visible-checkbox").is_checked()
        page.locator(f"#loratorio_{tab} > .label-wrap").click()
        page.locator(f"#loratorio_{tab}_preset").wait_for()
        page.locator(f"#loratorio_{tab}-visible-checkbox").set_checked(ticked)
    if not page.locator(f"#loratorio_{tab}_method").is_visible():
        page.locator(f"#loratorio_{tab}_more > .label-wrap").click()
        page.locator(f"#loratorio_{tab}_method").wait_for()


def shown(page: Any, tab: str) -> dict[str, Any]:
    """What the panel shows, for the knobs that `CHOSEN` changes."""
    values: dict[str, Any] = {"enabled": page.locator(f"#loratorio_{tab}-visible-checkbox").is_checked()}
    for knob in KNOBS:
        place = page.locator(f"#loratorio_{tab}_{knob.name}")
        if knob.kind == "bool" and knob.name != "enabled":
            values[knob.name] = place.locator("input").is_checked()
        elif knob.kind == "choice":
            values[knob.name] = place.locator("input").first.input_value()
        elif knob.kind in ("int", "float"):
            values[knob.name] = float(place.locator("input[type=number]").input_value())
    return values


def wait_until(page: Any, tab: str, settings: Settings) -> None:
    """Wait until the panel shows these settings, and check that it does."""
    expected = {knob.name: text(knob, getattr(settings, knob.name)) for knob in KNOBS}
    expected = {
        knob.name: getattr(settings, knob.name) if knob.kind != "choice" else expected[knob.name]
        for knob in KNOBS
    }
    for _ in range(240):
        if shown(page, tab) == expected:
            break
        page.wait_for_timeout(250)
    assert shown(page, tab) == expected


def written(prompt: str, settings: Settings, loras: list[str]) -> str:
    """The infotext of a picture, as the WebUI writes it."""
    fields = params(settings, [(loras[0], 0.8, ""), (loras[1], 0.65, "")])
    fields[LORAS_KEY] = '"' + fields[LORAS_KEY] + '"'
    head = "Steps: 4, Sampler: Euler, CFG scale: 5, Seed: 7, Size: 128x128, "
    return f"{prompt}\n{head}" + ", ".join(f"{key}: {value}" for key, value in fields.items())


def wait_for_line(page: Any, tab: str, text: str) -> None:
    """Wait until the line about the prompt's LoRAs says `text` (without its drop-downs)."""
    page.wait_for_function(
        """([id, text]) => {
            const copy = document.querySelector(id).cloneNode(true);
            copy.querySelectorAll("select").forEach(menu => menu.remove());
            return copy.textContent.trim().split(/\\s+/).join(" ") === text;
        }""",
        arg=[f"#loratorio_{tab}_loras", text],
    )


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_line_and_paste_button(page: Any, tab: str, loras: list[str]) -> None:
    go_to(page, tab)
    prompt = page.locator(f"#{tab}_prompt textarea")
    assert page.locator(f"#loratorio_{tab} .loratorio-folded").text_content() == "no LoRA yet"
    prompt.fill(written(PROMPT.format(*loras), CHOSEN, loras))
    page.locator("#paste:visible").click()
    wait_until(page, tab, CHOSEN)
    wait_for_line(page, tab, f"Will compose {loras[0]} 0.8 {loras[1]} 0.65")
    # A picture that was made without unticks the box.
    prompt.fill("a red circle\nSteps: 4, Sampler: Euler, CFG scale: 5, Seed: 7, Size: 128x128")
    page.locator("#paste:visible").click()
    page.wait_for_function(f"!document.querySelector('#loratorio_{tab}-visible-checkbox').checked")
    wait_for_line(page, tab, NONE_YET)


def test_tooltips_and_narrow_page(page: Any, loras: list[str]) -> None:
    go_to(page, "txt2img")
    open_panel(page, "txt2img")
    page.fill("#txt2img_prompt textarea", PROMPT.format(*loras))
    for width in (420, 1400):
        page.set_viewport_size({"width": width, "height": 1000})
        for knob in KNOBS[1:]:
            place = page.locator(f"#loratorio_txt2img_{knob.name}")
            assert place.get_attribute("title") == knob.help
            box = place.bounding_box()
            assert box is not None, knob.name
            assert box["x"] >= 0, knob.name
            assert box["x"] + box["width"] <= width, knob.name


def test_png_info_sends_everything(page: Any, loras: list[str], tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", written(PROMPT.format(*loras), CHOSEN, loras))
    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png", pnginfo=info)
    go_to(page, "PNG Info")
    page.locator("#pnginfo_image input[type=file]").set_input_files(str(tmp_path / "picture.png"))
    page.locator("#tab_pnginfo").get_by_text("LoRAtorio temperature").first.wait_for()
    page.locator("#tab_pnginfo #img2img_tab").click()
    page.locator("#img2img_prompt textarea").wait_for()
    wait_until(page, "img2img", CHOSEN)


def test_a_picture_from_the_page_comes_back(page: Any, loras: list[str]) -> None:
    """Tick, move, generate with the page's own button; its infotext, pasted into the other tab, is the same panel."""
    go_to(page, "txt2img")
    # Whatever the tests before have left in the panel.
    page.fill("#txt2img_prompt textarea", written(PROMPT.format(*loras), AS_PUBLISHED, loras))
    page.locator("#paste:visible").click()
    wait_until(page, "txt2img", AS_PUBLISHED)
    page.fill("#txt2img_steps input[type=number]", "2")
    page.fill("#txt2img_width input[type=number]", "64")
    page.fill("#txt2img_height input[type=number]", "64")
    page.locator("#loratorio_txt2img-visible-checkbox").check()
    open_panel(page, "txt2img")
    page.fill("#loratorio_txt2img_temperature input", "0.0371")
    page.locator("#loratorio_txt2img_temperature input").blur()
    page.fill("#loratorio_txt2img_recentre input[type=number]", "0.35")
    page.locator("#loratorio_txt2img_recentre input[type=number]").blur()
    page.click("#txt2img_generate")
    text = page.locator("#html_info_txt2img").first  # there are two of that id in A1111
    text.get_by_text("LoRAtorio LoRAs").wait_for(timeout=600_000)
    made = text.inner_text()
    assert f"{loras[0]}:0.8, {loras[1]}:0.65" in made
    go_to(page, "img2img")
    page.locator("#img2img_prompt textarea").fill(made.strip())
    page.locator("#paste:visible").click()
    wait_until(page, "img2img", replace(AS_PUBLISHED, temperature=0.0371, recentre=0.35))
    # "Send to img2img" takes the panel along.
    go_to(page, "txt2img")
    page.fill("#loratorio_txt2img_top_k input[type=number]", "3")
    page.locator("#loratorio_txt2img_top_k input[type=number]").blur()
    page.locator("#txt2img_send_to_img2img").click()
    page.locator("#img2img_prompt textarea").wait_for()
    wait_until(page, "img2img", replace(AS_PUBLISHED, temperature=0.0371, recentre=0.35, top_k=3))


def infotexts(page: Any) -> list[str]:
    """Of the gallery's pictures."""
    info = page.locator("#generation_info_txt2img textarea").input_value()
    texts: list[str] = json.loads(info)["infotexts"] if info else []
    return texts


def test_hires_button_puts_the_new_map_in_the_old_one_s_place(page: Any, loras: list[str]) -> None:
    """Two pictures and their maps; the second picture through the gallery's button for hires fix, then the first from its map."""
    go_to(page, "txt2img")
    settings = Settings(enabled=True, weight_maps=True)
    page.fill("#txt2img_prompt textarea", written(PROMPT.format(*loras), settings, loras))
    page.locator("#paste:visible").click()
    wait_until(page, "txt2img", settings)
    for field, value in {"steps": 2, "width": 64, "height": 64, "batch_size": 2}.items():
        page.fill(f"#txt2img_{field} input[type=number]", str(value))
        page.locator(f"#txt2img_{field} input[type=number]").blur()
    page.click("#txt2img_generate")
    page.wait_for_function(
        "document.querySelector('#generation_info_txt2img textarea').value.includes('LoRAtorio map')",
        timeout=600_000,
    )
    before = infotexts(page)
    # The second picture, then the first one's map (where there is a grid, it is before them).
    for chosen in (-3, -1):
        pictures = page.locator("#txt2img_gallery .preview .thumbnail-item")
        if not pictures.count():
            pictures = page.locator("#txt2img_gallery .thumbnail-item")
        pictures.nth(len(before) + chosen).click()
        page.wait_for_function(f"selected_gallery_index() === {len(before) + chosen}")
        text = before[chosen].removesuffix(MARK)
        page.locator("#txt2img_upscale").click()
        page.wait_for_function(
            """text => {
                const info = document.querySelector("#generation_info_txt2img textarea").value;
                return info && !JSON.parse(info).infotexts.slice(1).includes(text);
            }""",
            arg=text,
            timeout=600_000,
        )
        after = infotexts(page)
        assert len(after) == len(before)
        assert text + MARK not in after
        maps = [each.removesuffix(MARK) for each in after if each.endswith(MARK)]
        assert len(maps) == 2
        assert set(maps) <= set(after)
        shown = page.locator("#txt2img_gallery .preview .thumbnail-item")
        assert shown.count() == len(after)
        before = after


def test_xyz_has_an_axis_for_every_knob(page: Any) -> None:
    go_to(page, "txt2img")
    page.locator("#script_list:visible input").click()
    page.locator("#script_list:visible li", has_text="X/Y/Z plot").click()
    page.locator("#script_txt2img_xyz_plot_x_type input").click()
    axes = page.locator("#script_txt2img_xyz_plot_x_type li").all_inner_texts()
    for knob in KNOBS:
        assert any(xyz.PREFIX + knob.label in each for each in axes), knob.label
    page.keyboard.press("Escape")
    page.locator("#script_list:visible input").click()
    page.locator("#script_list:visible li", has_text="None").click()


def test_a_plot_s_empty_cell_has_a_reason(page: Any, loras: list[str]) -> None:
    """The plot itself continues after a picture that stops, and says nothing."""
    go_to(page, "txt2img")
    page.fill("#txt2img_prompt textarea", written(PROMPT.format(*loras), AS_PUBLISHED, loras))
    page.locator("#paste:visible").click()
    wait_until(page, "txt2img", AS_PUBLISHED)
    page.fill("#txt2img_steps input[type=number]", "1")
    page.locator("#script_list:visible input").click()
    page.locator("#script_list:visible li", has_text="X/Y/Z plot").click()
    page.locator("#script_txt2img_xyz_plot_x_type input").click()
    page.locator("#script_txt2img_xyz_plot_x_type li", has_text="Prompt S/R").click()
    page.locator("#script_txt2img_xyz_plot_x_values").locator("textarea, input").first.fill("0.65, abc")
    page.click("#txt2img_generate")
    page.get_by_text("abc is not a number").first.wait_for(timeout=600_000)
    page.wait_for_function(
        "document.querySelector('#generation_info_txt2img textarea').value.includes('X/Y/Z plot')",
        timeout=600_000,
    )
    page.locator("#script_list:visible input").click()
    page.locator("#script_list:visible li", has_text="None").click()


def test_settings_page(page: Any) -> None:
    go_to(page, "Settings")
    page.locator("#settings .tab-nav > button", has_text="LoRAtorio").click()
    for knob in KNOBS[1:]:
        assert page.locator(f"#setting_loratorio_{knob.name}").is_visible(), knob.name


def test_canvas_preset_and_documentation(page: Any, loras: list[str]) -> None:
    """By mouse: two places drawn one after the other and undone, the canvas turned; a preset chosen and left."""
    go_to(page, "txt2img")
    prompt = page.locator("#txt2img_prompt textarea")
    prompt.fill(PROMPT.format(*loras))
    open_panel(page, "txt2img")
    canvas = page.locator("#loratorio_txt2img_places .loratorio-places-canvas")
    if not canvas.is_visible():
        page.locator("#loratorio_txt2img_places summary").click()
    canvas.scroll_into_view_if_needed()
    before = canvas.bounding_box()

    def drag(start: tuple[float, float], end: tuple[float, float]) -> None:
        area = canvas.bounding_box()
        points = [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in (start, end)]
        page.mouse.move(*points[0])
        page.mouse.down()
        page.mouse.move(*points[1], steps=5)
        page.mouse.up()

    drag((0.1, 0.1), (0.4, 0.9))
    first = prompt.input_value()
    assert f"<lora:{loras[0]}:at=0.1,0.1,0.4,0.9:0.8>" in first
    drag((0.6, 0.1), (0.9, 0.9))
    assert f"<lora:{loras[1]}:at=0.6,0.1,0.9,0.9:0.65>" in prompt.input_value()
    assert canvas.bounding_box() == before
    page.locator("#loratorio_txt2img_places .loratorio-places-box").first.press("Control+z")
    assert prompt.input_value() == first

    page.fill("#txt2img_width input[type=number]", "128")
    page.fill("#txt2img_height input[type=number]", "64")
    assert canvas.bounding_box()["width"] > canvas.bounding_box()["height"]
    page.click("#txt2img_res_switch_btn")
    page.wait_for_function("document.querySelector('#txt2img_height input[type=number]').value === '128'")
    assert canvas.bounding_box()["width"] < canvas.bounding_box()["height"]

    def wait_for_preset(label: str) -> None:
        page.wait_for_function(
            "label => document.querySelector('#loratorio_txt2img_preset input:checked')?.value === label",
            arg=label,
        )

    page.locator("#loratorio_txt2img_preset label", has_text="Paper").click()
    page.wait_for_function("document.querySelector('#loratorio_txt2img_method input').value === 'LoRAtorio'")
    page.wait_for_function(
        "document.querySelector('#loratorio_txt2img_cost').innerText.includes('3.0 times')"
    )
    page.fill("#loratorio_txt2img_reuse input[type=number]", "7")
    page.locator("#loratorio_txt2img_reuse input[type=number]").blur()
    wait_for_preset("Custom")
    page.locator("#loratorio_txt2img_reset").click()
    wait_for_preset("Balanced")

    link = page.locator("#loratorio_txt2img_line a").first.get_attribute("href")
    if not link.startswith("https://"):
        answer = page.request.get(f"{os.environ['LORATORIO_WEBUI_URL'].rstrip('/')}/{link}")
        assert "<h1" in answer.text()

"""The canvas of places in a real Gradio 3.41.2 and 4.40 page: drawn with mouse, touch and keyboard, typed, and the WebUI's own editing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .test_panel import Tab

pytestmark = pytest.mark.timeout(300)


class Places(Tab):
    """What a user does with the canvas of a tab."""

    def canvas(self) -> Any:
        return self.find("_places .loratorio-places-canvas")

    def boxes(self) -> Any:
        return self.find("_places .loratorio-places-box")

    def lora(self, lora: str) -> Any:
        return self.find(f"_places .loratorio-places-name:has-text('{lora}')")

    def menu(self, lora: str) -> Any:
        return self.find(f"_places select[aria-label='Place of {lora}']")

    def marked(self) -> list[str]:
        """For which LoRA the next place is drawn."""
        return self.find("_places [aria-pressed=true]").all_inner_texts()

    def unfold(self) -> Places:
        if not self.canvas().is_visible():
            self.find("_places summary").click()
        self.canvas().scroll_into_view_if_needed()
        return self

    def written(self) -> str:
        value: str = self.page.input_value(f"#{self.name}_prompt textarea")
        return value

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """From one place of the canvas to another, both as parts of it."""
        area = self.canvas().bounding_box()
        points = [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in (start, end)]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        self.page.mouse.move(*points[1], steps=5)
        self.page.mouse.up()


@pytest.fixture
def places(page: Any) -> Places:
    tab = Places(page, "txt2img")
    tab.open()
    tab.prompt("two friends <lora:fox:0.8> <lora:ink:1>")
    return tab.unfold()


def test_a_place_is_chosen_moved_resized_and_taken(places: Places) -> None:
    assert places.boxes().count() == 0
    places.menu("fox").select_option("left")
    assert places.written() == "two friends <lora:fox:at=left:0.8> <lora:ink:1>"
    places.menu("ink").select_option("right")
    assert places.written() == "two friends <lora:fox:at=left:0.8> <lora:ink:at=right:1>"
    assert places.boxes().count() == 2
    places.drag((0.75, 0.02), (0.75, 0.5))  # ink's upper edge
    assert "<lora:ink:at=bottom-right:1>" in places.written()
    places.drag((0.75, 0.75), (0.75, 0.3))  # the whole box
    assert "<lora:ink:at=0.5,0.05,1,0.55:1>" in places.written()
    places.boxes().nth(1).dblclick()
    assert places.written() == "two friends <lora:fox:at=left:0.8> <lora:ink:1>"
    places.menu("fox").select_option("everywhere")
    assert places.written() == "two friends <lora:fox:0.8> <lora:ink:1>"


def test_two_drags_draw_a_place_for_each_of_two_loras(places: Places) -> None:
    """And a click on a name, which alone changes nothing, draws for that one."""
    assert places.marked() == ["fox"]
    places.drag((0.1, 0.1), (0.4, 0.9))
    assert places.written() == "two friends <lora:fox:at=0.1,0.1,0.4,0.9:0.8> <lora:ink:1>"
    assert places.marked() == ["ink"]
    # To set the first one right is not to draw for it again.
    places.drag((0.2, 0.5), (0.3, 0.5))
    assert places.marked() == ["ink"]
    places.drag((0.6, 0.1), (0.9, 0.4))
    assert places.written() == "two friends <lora:fox:at=0.2,0.1,0.5,0.9:0.8> <lora:ink:at=0.6,0.1,0.9,0.4:1>"
    before = places.written()
    places.lora("fox").click()
    assert (places.written(), places.marked()) == (before, ["fox"])
    places.drag((0.6, 0.6), (0.9, 0.9))
    assert "<lora:fox:at=0.2,0.1,0.5,0.9+0.6,0.6,0.9,0.9:0.8>" in places.written()
    assert [places.menu(name).input_value() for name in ("fox", "ink")] == ["2 places", "drawn"]
    assert places.find("_places summary").inner_text() == "Places: fox 2 places · ink drawn"


def test_the_canvas_stays_where_it_is(places: Places) -> None:
    """Whatever is drawn, and however long that makes what is written beside it."""
    for width in (1280, 420):
        places.page.set_viewport_size({"width": width, "height": 900})
        places.prompt(" ".join(f"<lora:a long name {i}:1>" for i in range(4)))
        places.canvas().scroll_into_view_if_needed()
        before = places.canvas().bounding_box()
        for i in range(4):
            places.drag((0.03 + 0.25 * i, 0.13), (0.22 + 0.25 * i, 0.91))
            assert places.canvas().bounding_box() == before
        assert places.written().count("at=0.") == 4


def test_ctrl_z_undoes_what_was_drawn_and_chosen(places: Places) -> None:
    page = places.page
    area = page.locator("#txt2img_prompt textarea")
    area.press("End")
    area.press_sequentially(", here")
    typed = places.written()
    places.drag((0.1, 0.1), (0.4, 0.9))
    places.drag((0.6, 0.1), (0.9, 0.4))
    both = places.written()
    places.boxes().first.press("Control+z")
    assert places.written() == typed.replace("<lora:fox:", "<lora:fox:at=0.1,0.1,0.4,0.9:")
    assert places.boxes().count() == 1
    places.boxes().first.press("Control+Shift+z")
    assert places.written() == both
    places.role("fox").select_option("style")
    assert "role=style" in places.written()
    places.role("fox").press("Control+z")
    assert places.written() == both
    # In the prompt itself the same steps go back, down to what was typed; Gradio has what is shown.
    area.press("Control+z")
    area.press("Control+z")
    assert places.written() == typed
    assert places.generate()[1].startswith(typed)
    area.press("Control+z")
    assert places.written() != typed


def test_writing_neither_scrolls_the_page_nor_takes_the_focus(places: Places) -> None:
    page = places.page
    page.set_viewport_size({"width": 420, "height": 400})
    places.menu("fox").scroll_into_view_if_needed()
    before = page.evaluate("window.scrollY")
    assert before > 0
    places.menu("fox").focus()
    places.menu("fox").select_option("left")
    assert page.evaluate("window.scrollY") == before
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Place of fox"


def test_the_keyboard_moves_resizes_and_deletes(places: Places) -> None:
    places.menu("fox").select_option("left")
    box = places.boxes().first
    box.focus()
    for _ in range(2):
        places.page.keyboard.press("ArrowRight")
    assert "at=0.1,0,0.6,1:0.8" in places.written()
    places.page.keyboard.press("Shift+ArrowUp")
    assert "at=0.1,0,0.6,0.95:0.8" in places.written()
    assert "across" in places.boxes().first.get_attribute("aria-label")
    places.page.keyboard.press("Delete")
    assert places.written() == "two friends <lora:fox:0.8> <lora:ink:1>"


def test_the_canvas_turns_with_the_picture_s_sides(places: Places) -> None:
    page = places.page

    def ratio() -> float:
        box = places.canvas().bounding_box()
        return float(box["width"] / box["height"])

    page.fill("#txt2img_width input[type=number]", "768")
    assert ratio() == pytest.approx(1.5, abs=0.02)
    page.click("#txt2img_switch")
    page.wait_for_function("document.querySelector('#txt2img_height input[type=number]').value === '768'")
    assert ratio() == pytest.approx(1 / 1.5, abs=0.02)


def test_what_is_typed_is_shown(places: Places) -> None:
    places.prompt(
        "<lora:fox:at=0.25,0.5,0.75,1~0.05:0.8> <pool:anime/*:at=top+left> <lora:ink:1:at=somewhere>"
    )
    area, box = places.canvas().bounding_box(), places.boxes().first.bounding_box()
    assert box["x"] - area["x"] == pytest.approx(area["width"] / 4, abs=3)
    assert box["height"] == pytest.approx(area["height"] / 2, abs=3)
    assert places.boxes().count() == 3
    assert places.menu("ink").input_value() == "at=somewhere cannot be read"
    summary = places.find("_places summary").inner_text()
    assert summary == "Places: fox drawn, soft · anime/* 2 places · ink at=somewhere cannot be read"
    # What the canvas writes keeps the soft edge that was typed.
    places.boxes().first.focus()
    places.page.keyboard.press("ArrowUp")
    assert "<lora:fox:at=0.25,0.45,0.75,0.95~0.05:0.8>" in places.written()


def test_an_answer_about_the_names_leaves_the_boxes(places: Places) -> None:
    """What the WebUI says of names comes a moment later: a box that is being clicked or dragged stays the same element."""
    held = []
    places.page.route("**/loratorio/found", lambda route: held.append(route))
    places.prompt("<lora:fox:at=left:1> <pool:late/*:at=right>")
    places.boxes().first.evaluate("box => { box.sameElement = true; }")
    places.page.wait_for_timeout(100)
    assert len(held) == 1
    held[0].fulfill(json={"missing": ["fox"], "pools": {"late/*": 3}})
    places.wait_for_line("Off. If ticked, it composes fox 1 not found pool late/* 1 3 LoRAs")
    assert places.boxes().first.evaluate("box => box.sameElement") is True
    # A prompt that changes while a box is held is shown when it is let go.
    area = places.canvas().bounding_box()
    places.page.mouse.move(area["x"] + area["width"] / 4, area["y"] + area["height"] / 2)
    places.page.mouse.down()
    places.prompt("<lora:fox:at=left:1> <lora:ink:at=top-right:1>")
    places.page.mouse.up()
    label = places.boxes().nth(1).get_attribute("aria-label")
    assert label.startswith("Place of ink: from 50 to 100 % across, 0 to 50 %")


def show_gallery(page: Any, info: dict[str, Any]) -> None:
    """A gallery as the WebUI has it after a job, with what it knows of the pictures."""
    page.evaluate(
        """info => {
            const made = document.createElement("div");
            const thumbnails = info.infotexts.map((_, i) => `<button class="thumbnail-item"><img src="data:,${i}"></button>`);
            made.innerHTML = `<div id="txt2img_gallery"><img src="data:,chosen"><div class="thumbnails">${thumbnails.join("")}</div></div>
                <div id="generation_info_txt2img"><textarea></textarea></div>`;
            document.body.append(made);
            made.querySelector("textarea").value = JSON.stringify(info);
        }""",
        info,
    )


def test_found_places_are_shown_and_kept(page: Any, places: Places) -> None:
    """Of the chosen picture, as its infotext has them; *Keep* writes them into the tags."""
    places.prompt("a <lora:fox:at=auto:0.8> <lora:x, y at 1:at=auto~0.05:1> <lora:ink:0.5>")
    box = places.find("_places .loratorio-places-box.found")
    assert places.menu("fox").input_value() == "found"
    assert places.menu("x, y at 1").input_value() == "found, soft"
    assert box.count() == 0
    assert not places.find("_places_keep").is_visible()
    texts = [
        'fox at 0,0,1,1\nLoRAtorio LoRAs: "a:1 at auto", LoRAtorio places: '
        + json.dumps(f"fox at 0,0,{line},1, x, y at 1 at {line},0,1,1~0.05")
        + ", Version: 1"
        for line in (0.517, 0.25)
    ]
    show_gallery(page, {"index_of_first_image": 0, "infotexts": [*texts, "a\nSteps: 4"]})
    for chosen, edge in ((0, 0.517), (1, 0.25), (2, None)):
        page.evaluate(
            """chosen => document.querySelectorAll("#txt2img_gallery .thumbnail-item").forEach(
                (each, i) => each.classList.toggle("selected", i === chosen))""",
            chosen,
        )
        page.evaluate("updated.forEach(each => each())")
        assert box.count() == (2 if edge else 0)
        if edge:
            area, own = places.canvas().bounding_box(), box.first.bounding_box()
            assert own["width"] / area["width"] == pytest.approx(edge, abs=0.02)
            assert box.first.get_attribute("aria-label").startswith("Found: Place of fox: from 0 to")
    page.evaluate(
        "document.querySelectorAll('#txt2img_gallery .thumbnail-item')[0].classList.add('selected')"
    )
    page.evaluate("updated.forEach(each => each())")
    places.find("_places_keep").click()
    assert places.written() == (
        "a <lora:fox:at=0,0,0.517,1:0.8> <lora:x, y at 1:at=0.517,0,1,1~0.05:1> <lora:ink:0.5>"
    )
    assert places.boxes().count() == 2
    assert box.count() == 0
    assert not places.find("_places_keep").is_visible()


def test_each_gets_its_own_place_found_or_drawn(page: Any, places: Places) -> None:
    """One choice for all characters; without a picture, *drawn* begins side by side."""
    places.find("_places_found").click()
    assert places.written() == "two friends <lora:fox:at=auto:0.8> <lora:ink:at=auto:1>"
    assert places.find("_places_found").get_attribute("aria-checked") == "true"
    places.find("_places_drawn").click()
    assert places.written() == "two friends <lora:fox:at=left:0.8> <lora:ink:at=right:1>"
    assert places.find("_places_drawn").get_attribute("aria-checked") == "true"
    # A LoRA that has no place next to some that have is no character.
    places.menu("ink").select_option("found")
    places.prompt(places.written() + " <lora:night:1> <lora:wash:1:role=style> <pool:many/*:1>")
    places.find("_places_found").click()
    assert places.written().startswith(
        "two friends <lora:fox:at=auto:0.8> <lora:ink:at=auto:1> <lora:night:1>"
    )
    # A box that is drawn replaces the place that was to be found.
    places.lora("fox").click()
    places.drag((0.1, 0.1), (0.4, 0.9))
    assert "<lora:fox:at=0.1,0.1,0.4,0.9:0.8> <lora:ink:at=auto:1>" in places.written()
    places.prompt("<lora:fox:1>")
    assert not places.find("_places_found").is_visible()


def test_the_picture_lies_under_the_boxes_and_not_its_map(page: Any, places: Places) -> None:
    """Of two pictures with their maps, behind a grid."""
    places.prompt("<lora:fox:at=left:1>")
    info = {
        "index_of_first_image": 1,
        "infotexts": ["one", "one", "two", *(f"{each}, LoRAtorio map: True" for each in ("one", "two"))],
    }
    show_gallery(page, info)
    for chosen, shown in ((0, 1), (1, 1), (2, 2), (3, 1), (4, 2), (None, 1)):
        page.evaluate(
            """chosen => document.querySelectorAll("#txt2img_gallery .thumbnail-item").forEach(
                (each, i) => { each.classList.toggle("selected", i === chosen); each.title = chosen; })""",
            chosen,
        )
        page.evaluate("updated.forEach(each => each())")
        canvas = page.locator("#loratorio_txt2img_places .loratorio-places-canvas")
        assert canvas.evaluate("each => each.style.backgroundImage") == f'url("data:,{shown}")'


def test_names_are_text_and_colours_those_of_the_maps(places: Places) -> None:
    places.prompt("<lora:<img src=x onerror=window.hit=1:at=left:1> <lora:fast:1> <lora:ink:at=right:1>")
    assert places.page.evaluate("window.hit") is None
    colours = places.boxes().evaluate_all("boxes => boxes.map(box => box.style.getPropertyValue('--colour'))")
    # `fast` always acts: it has no colour on the maps, and no name here.
    assert colours == ["rgb(230,159,0)", "rgb(0,114,178)"]
    assert places.lora("fast").count() == 0


def test_touch(page: Any, browser: Any, server: str) -> None:
    context = browser.new_context(viewport={"width": 420, "height": 900}, has_touch=True, is_mobile=True)
    try:
        touched = context.new_page()
        touched.goto(server)
        touched.wait_for_function("window.updates >= 1")
        places = Places(touched, "txt2img")
        places.open()
        places.prompt("<lora:fox:0.8> <lora:ink:1>")
        places.unfold()
        places.lora("ink").tap()
        places.lora("fox").tap()
        places.menu("fox").select_option("left")
        assert "<lora:fox:at=left:0.8>" in places.written()
        area = places.canvas().bounding_box()
        assert area["x"] >= 0
        assert area["x"] + area["width"] <= 420
        # A finger's pointer events, which Chromium's touch input makes of touches.
        session = context.new_cdp_session(touched)
        at = [(area["x"] + x * area["width"], area["y"] + area["height"] / 2) for x in (0.2, 0.5, 0.7)]
        for kind, points in (
            ("touchStart", at[:1]),
            ("touchMove", at[1:2]),
            ("touchMove", at[2:]),
            ("touchEnd", []),
        ):
            touch = [{"x": x, "y": y} for x, y in points]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touch})
        touched.wait_for_function(
            "document.querySelector('#txt2img_prompt textarea').value.includes('at=right')"
        )
    finally:
        context.close()


def test_the_webuis_own_editing_of_tags(places: Places) -> None:
    """A click on a LoRA's card takes out a tag with options; Ctrl+Up changes a strength that stands before options."""
    page = places.page
    places.prompt("a fox <lora:fox:at=left:0.8> <lora:ink:1:at=right:words=red dress>")
    removed = """() => tryToRemoveExtraNetworkFromPrompt(
        document.querySelector('#txt2img_prompt textarea'), '<lora:fox:1>', false)"""
    assert page.evaluate(removed) is True
    assert places.written() == "a fox <lora:ink:1:at=right:words=red dress>"
    assert page.evaluate(removed) is False
    area = page.locator("#txt2img_prompt textarea")
    area.evaluate("area => { area.focus(); area.setSelectionRange(12, 12); }")
    page.keyboard.press("Control+ArrowUp")
    assert places.written() == "a fox <lora:ink:1.05:at=right:words=red dress>"
    page.keyboard.press("Control+ArrowDown")
    page.keyboard.press("Control+ArrowDown")
    assert places.written() == "a fox <lora:ink:0.95:at=right:words=red dress>"

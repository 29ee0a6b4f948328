"""The panel in a real Gradio 3.41.2 page and in a Gradio 4.40 page: tick, move, generate, paste, see."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratorio.compose.methods import METHODS
from loratorio.pictures.infotext import params
from loratorio.settings import KNOB_BY_NAME, KNOBS, PRESETS, Settings

from .host_infotext import written

pytestmark = pytest.mark.timeout(300)

HOSTILE = "<img src=x onerror=window.hit=1"  # a prompt's LoRA name cannot have a > or a :
NONE_YET = "No LoRA in the prompt yet"


class Tab:
    """What a user does in one of the tabs."""

    def __init__(self, page: Any, name: str) -> None:
        self.page, self.name = page, name

    def open(self) -> Tab:
        self.page.locator(".tab-nav > button", has_text=self.name).click()
        if not self.find("_method").is_visible():
            self.page.locator(
                f"#loratorio_{self.name} button.label-wrap, #loratorio_{self.name} .label-wrap"
            ).first.click()
        if not self.find("_rescale").is_visible():
            self.page.locator(f"#loratorio_{self.name}_more .label-wrap").click()
        return self

    def find(self, suffix: str) -> Any:
        return self.page.locator(f"#loratorio_{self.name}{suffix}")

    def tick(self) -> None:
        self.find("-checkbox input").check()

    def prompt(self, value: str) -> None:
        self.page.fill(f"#{self.name}_prompt textarea", value)

    def line(self) -> str:
        """Its text, without the drop-downs."""
        script = """line => {
            const copy = line.cloneNode(true);
            copy.querySelectorAll("select").forEach(each => each.remove());
            return copy.textContent;
        }"""
        return " ".join(self.find("_loras").evaluate(script).split())

    def wait_for_line(self, text: str) -> None:
        """Until it is this: what the WebUI says of names and pools comes a moment later."""
        for _ in range(100):
            if self.line() == text:
                return
            self.page.wait_for_timeout(100)
        assert self.line() == text

    def role(self, lora: str) -> Any:
        return self.page.locator(f"#loratorio_{self.name}_loras select[aria-label='Role of {lora}']")

    def choose(self, knob: str, label: str) -> None:
        self.find(f"_{knob} input").first.click()
        self.find(f"_{knob} li[aria-label='{label}']").click()

    def preset(self, label: str) -> Any:
        return self.find(f"_preset label:has-text('{label}')")

    def in_force(self) -> str:
        """The preset that is chosen."""
        return str(self.find("_preset input:checked").input_value())

    def wait_for_preset(self, label: str) -> None:
        self.page.wait_for_function(
            "([id, label]) => document.querySelector(id)?.value === label",
            arg=[f"#loratorio_{self.name}_preset input:checked", label],
        )

    def as_published(self) -> None:
        """The method that has a temperature."""
        self.choose("method", "LoRAtorio")
        self.page.wait_for_function(
            "id => !document.querySelector(id).disabled", arg=f"#loratorio_{self.name}_temperature input"
        )

    def number(self, knob: str, value: float) -> None:
        box = self.find(f"_{knob} input[type=number]")
        box.fill(str(value))
        box.blur()

    def wait_for_recentring(self, value: float) -> None:
        self.page.wait_for_function(
            "([id, value]) => Number(document.querySelector(id).value) === value",
            arg=[f"#loratorio_{self.name}_recentre input[type=number]", value],
        )

    def generate(self) -> tuple[dict[str, Any], str]:
        """The knobs that arrived in Python, and the infotext."""
        result = self.page.locator(f"#{self.name}_result textarea, #{self.name}_result input")
        before = result.input_value()
        self.page.click(f"#{self.name}_generate")
        self.page.wait_for_function(
            "([id, before]) => { const now = document.querySelector(id).value; return now && now !== before; }",
            arg=[f"#{self.name}_result :is(textarea, input)", before],
        )
        return json.loads(result.input_value()), self.page.input_value(f"#{self.name}_infotext textarea")

    def paste(self, infotext: str) -> None:
        """Until the answer is on the page: a click on Generate before it sends what stood there before."""
        pastes = f"#{self.name}_pastes :is(textarea, input)"
        before = self.page.input_value(pastes)
        self.page.fill(f"#{self.name}_source textarea", infotext)
        self.page.click(f"#{self.name}_paste")
        self.page.wait_for_function(
            "([id, before]) => document.querySelector(id).value !== before", arg=[pastes, before]
        )


def as_dict(settings: Settings) -> dict[str, Any]:
    return {knob.name: getattr(settings, knob.name) for knob in KNOBS}


def test_tick_move_generate(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    assert tab.generate()[0] == as_dict(Settings())
    tab.tick()
    tab.find("_patch_size input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    tab.as_published()
    tab.number("temperature", 0.0123)
    tab.find("_weight_maps input").check()
    tab.choose("method", "Merge")
    tab.wait_for_recentring(0)
    tab.number("recentre", 0.35)
    chosen = Settings(
        enabled=True,
        method="merge",
        patch_size=Settings().patch_size + 1,
        temperature=0.0123,
        recentre=0.35,
        weight_maps=True,
    )
    assert tab.generate()[0] == as_dict(chosen)
    # The other tab's panel is its own.
    assert Tab(page, "img2img").open().generate()[0] == as_dict(Settings())


def test_presets_set_their_knobs_in_this_tab_alone(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    tab.as_published()
    tab.number("temperature", 0.5)
    for preset in PRESETS.values():
        assert tab.preset(preset.label).get_attribute("title") == preset.help
        tab.preset(preset.label).click()
        expected = Settings(enabled=True, temperature=0.5).with_values(preset.values)
        arrived, infotext = tab.generate()
        assert arrived == as_dict(expected)
        assert (f"LoRAtorio reuse: {expected.reuse}" in infotext) is (expected.reuse != Settings().reuse)
        assert tab.in_force() == preset.label
    # What is moved afterwards counts.
    tab.number("reuse", 7)
    assert tab.generate()[0]["reuse"] == 7
    assert Tab(page, "img2img").open().generate()[0] == as_dict(Settings())


def test_a_method_chosen_by_hand_brings_its_own_default(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    for method, recentre in (("Merge", 0), ("LoRAtorio", 0.5)):
        tab.choose("method", method)
        tab.wait_for_recentring(recentre)
        assert tab.generate()[0]["recentre"] == recentre
    # What is pasted stays as it was.
    made = Settings(enabled=True, method="merge", recentre=0.5)
    tab.paste(written("a fox", params(made, [])))
    page.wait_for_function("document.querySelector('#loratorio_txt2img_top_k input').disabled")
    assert tab.generate()[0] == as_dict(made)
    tab.paste(
        written(
            "a fox",
            {"LoRAtorio": "True", "LoRAtorio version": "0.3.0", "LoRAtorio method": "Composite, re-centred"},
        )
    )
    of_0_3 = Settings(enabled=True, method="composite", recentre=0.5, find_styles=False)
    assert tab.generate()[0] == as_dict(of_0_3)


def test_the_preset_in_force_follows_the_knobs(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    assert tab.in_force() == "Balanced"
    tab.number("reuse", 7)
    tab.wait_for_preset("Custom")
    tab.number("reuse", 3)
    tab.wait_for_preset("Balanced")
    # A knob that no preset has leaves it as it is; all that one has make it that one.
    tab.number("patch_size", 5)
    tab.number("recentre", 1)
    tab.wait_for_preset("Fast")
    tab.tick()
    picture = written("a fox", params(Settings.from_mapping({"enabled": True, "preset": "paper"}), []))
    tab.paste(picture)
    tab.wait_for_preset("Paper")
    tab.find("_reset").click()
    tab.wait_for_preset("Balanced")


def test_custom_opens_the_settings_and_is_none_by_itself(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.find("_more > .label-wrap").click()
    page.wait_for_function("!document.querySelector('#loratorio_txt2img_rescale')?.offsetParent")
    tab.preset("Custom").click()
    page.wait_for_function("document.querySelector('#loratorio_txt2img_rescale').offsetParent")
    tab.wait_for_preset("Balanced")
    assert tab.generate()[0] == as_dict(Settings())


def test_reset_brings_back_what_the_page_began_with(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    tab.as_published()
    tab.number("temperature", 0.5)
    tab.number("rescale", 0.3)
    tab.find("_weight_maps input").check()
    tab.choose("method", "Merge")
    page.wait_for_function("document.querySelector('#loratorio_txt2img_top_k input').disabled")
    tab.find("_reset").click()
    page.wait_for_function("!document.querySelector('#loratorio_txt2img_top_k input').disabled")
    assert tab.generate()[0] == as_dict(Settings(enabled=True))


def test_the_list_has_loratorio_s_methods_and_any_can_be_pasted_and_sent(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    tab.find("_method input").first.click()
    shown = [each for each in tab.find("_method li").all() if each.is_visible()]
    assert [each.get_attribute("aria-label") for each in shown] == [
        "LoRAtorio, relative", "LoRAtorio", "LoRAtorio by divergence", "Merge",
    ]  # fmt: skip
    page.keyboard.press("Escape")
    tab.paste(written("<lora:fox:1>", params(Settings(enabled=True, method="klora"), [])))
    page.wait_for_function("document.querySelector('#loratorio_txt2img_method input').value === 'K-LoRA'")
    assert tab.generate()[0]["method"] == "klora"
    page.click("#send")
    other = Tab(page, "img2img").open()
    page.wait_for_function("document.querySelector('#loratorio_img2img_method input').value === 'K-LoRA'")
    assert other.generate()[0]["method"] == "klora"


def test_greyed_knobs_look_greyed(page: Any) -> None:
    tab = Tab(page, "txt2img").open()

    def opacity(knob: str) -> float:
        script = """each => {
            let seen = 1;
            for (; each; each = each.parentElement) seen *= Number(getComputedStyle(each).opacity);
            return seen;
        }"""
        return float(tab.find(f"_{knob} input").first.evaluate(script))

    assert opacity("temperature") <= 0.5
    assert opacity("adaptive") <= 0.5
    assert opacity("patch_size") == opacity("reuse") == 1
    tab.as_published()
    assert opacity("temperature") == 1


def test_the_documentation_is_a_page_to_read(page: Any, server: str) -> None:
    tab = Tab(page, "txt2img").open()
    link = tab.find("_line a").get_attribute("href")
    page.goto(f"{server}/{link}")
    assert page.locator("h1").first.inner_text() == "LoRAtorio"
    assert page.locator("table tr").count() > 5
    page.locator("a[href='docs/WEBUI.md']").first.click()
    page.get_by_text("Weight maps").first.wait_for()
    picture = page.locator("img").first
    page.wait_for_function("each => each.naturalWidth > 0", arg=picture.element_handle())
    assert "**" not in page.locator("body").inner_text()
    for hostile in (
        "..%2f..%2fpyproject.toml",
        "pyproject.toml",
        "loratorio/errors.py",
        "docs/../pyproject.toml",
    ):
        assert page.request.get(f"{server}/loratorio/docs/{hostile}").status == 404


def test_the_method_says_what_it_does_and_greys_what_it_ignores(page: Any) -> None:
    tab = Tab(page, "txt2img").open()

    def disabled(knob: str) -> bool:
        return bool(tab.find(f"_{knob} input").first.is_disabled())

    for method in map(METHODS.__getitem__, ("loratorio", "merge", "divergence", "relative")):
        tab.choose("method", method.entry.label)
        page.wait_for_function(
            "text => document.querySelector('#loratorio_txt2img_about').textContent.includes(text)",
            arg=method.entry.summary,
        )
        for knob in KNOBS[1:]:
            ignored = knob.ignored_by(method.entry.name)
            page.wait_for_function(
                "([id, off]) => document.querySelector(id).disabled === off",
                arg=[f"#loratorio_txt2img_{knob.name} input", ignored],
            )
            assert disabled(knob.name) is ignored, knob.name


def test_unticked_the_line_promises_nothing(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.prompt("a <lora:fox:0.8> <lora:gone:0.5>")
    tab.wait_for_line("Off. If ticked, it composes fox 0.8 gone 0.5 not found")
    tab.tick()
    tab.wait_for_line("Will compose fox 0.8 gone 0.5 not found")
    tab.paste(written("a <lora:fox:0.8>", {}))
    page.wait_for_function(
        "document.querySelector('#loratorio_txt2img_loras').textContent.startsWith('Off. If ticked')"
    )


def test_the_line_says_what_a_placed_lora_does_not_read(page: Any) -> None:
    tab, other = Tab(page, "txt2img").open(), Tab(page, "img2img")
    tab.tick()
    tags = "<lora:fox:at=left:1> <lora:ink:at=right:1>"
    tab.prompt(f"vulpo, inkash {tags}")
    said = "fox reads the prompt without inkash; ink reads the prompt without vulpo."
    tab.wait_for_line(f"Will compose fox 1 ink 1 {said}")
    tab.prompt(f"vulpo, a hill {tags}")
    tab.wait_for_line("Will compose fox 1 ink 1 ink reads the prompt without vulpo.")
    tab.find("_own_words input").uncheck()
    tab.wait_for_line("Will compose fox 1 ink 1")
    tab.find("_own_words input").check()
    tab.wait_for_line("Will compose fox 1 ink 1 ink reads the prompt without vulpo.")
    # Each tab asks for its own prompt, once.
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/found" in request.url else None)
    other.open().prompt(f"inkash, a hill {tags}")
    other.wait_for_line("Off. If ticked, it composes fox 1 ink 1 fox reads the prompt without inkash.")
    page.wait_for_timeout(500)
    assert len(asked) == 1
    tab.open().wait_for_line("Will compose fox 1 ink 1 ink reads the prompt without vulpo.")


def test_a_pool_says_how_many_it_finds(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    for prompt, said in (
        ("a <pool:*:0.5>", "Will compose pool * 0.5 12 LoRAs"),
        ("a <Pool:one>", "Will compose pool one 1 1 LoRA"),
        ("a <pool:none>", "Will compose pool none 1 No LoRA matches 'none'."),
    ):
        tab.prompt(prompt)
        tab.wait_for_line(said)


def test_a_role_chosen_by_keyboard_keeps_the_focus(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.prompt("a <lora:fox:0.8> <lora:fast:0.5>")
    tab.role("fox").focus()
    page.keyboard.press("ArrowDown")
    assert page.input_value("#txt2img_prompt textarea") == "a <lora:fox:role=style:0.8> <lora:fast:0.5>"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Role of fox"
    page.keyboard.press("ArrowDown")
    assert "role=always" in page.input_value("#txt2img_prompt textarea")


def test_line_follows_the_prompt(page: Any) -> None:
    tab = Tab(page, "txt2img")
    title = page.locator("#loratorio_txt2img .loratorio-folded")
    assert title.inner_text() == "no LoRA yet"
    tab.prompt("<lora:fox:0.8> <lora:ink:1>")
    assert title.inner_text() == "fox 0.8 · ink 1"
    tab.open()
    tab.tick()
    assert not title.is_visible()
    tab.prompt("a fox")
    assert NONE_YET in tab.line()
    tab.prompt("a fox <lora:fox:0.80>")
    assert tab.line() == (
        "One LoRA fox 0.8 With a single LoRA, only Re-centring, Reuse and Guidance rescale change the picture."
    )
    tab.prompt("a fox <lora:fox:0.8> in <lora:ink:1:0.6> <lora:dog> <pool:animals/*:0.7>")
    tab.wait_for_line("Will compose fox 0.8 ink 0.6 text 1 dog 1 pool animals/* 0.7 1 LoRA")
    tab.prompt("a fox <lora:fox:te=0.5:unet=0.7>\n# <lora:ink:1>")
    assert tab.line().startswith("One LoRA fox 0.7 text 0.5")
    # Names are text, whatever they contain.
    tab.prompt(f"<lora:{HOSTILE}:1> <lora:__proto__:0.5> <lora:&amp;\"'`:0.1>")
    for name in (f"{HOSTILE} 1", "__proto__ 0.5", "&amp;\"'` 0.1"):
        assert name in tab.line()
    assert tab.find("_loras img").count() == 0
    assert page.evaluate("window.hit") is None
    other = Tab(page, "img2img").open()
    assert NONE_YET in other.line()
    other.prompt("<lora:dog:0.3>")
    assert other.line().startswith("Off. If ticked, it composes dog 0.3")
    # An update of the page that changes nothing for us does not touch the page, or it would call itself for ever.
    page.wait_for_timeout(600)
    before = page.evaluate("window.updates")
    page.wait_for_timeout(1000)
    assert page.evaluate("window.updates") == before


def test_the_line_says_what_is_wrong_with_a_tag(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    tab.prompt("<lora:fox:1> <lora:cat:0,8> <lora:dog:words=(mimsy:1.2), hat:0.5>")
    cat = "cat The tag <lora:cat:0,8> cannot be read: 0,8 is not a number: write <lora:cat:0.8>."
    tab.wait_for_line(f"Will compose fox 1 {cat} dog 0.5")
    assert tab.role("cat").count() == 0
    tab.role("dog").select_option("style")
    written = page.input_value("#txt2img_prompt textarea")
    assert written.endswith("<lora:dog:words=(mimsy:1.2), hat:role=style:0.5>")
    tab.prompt("<lora:fox:1> <lora:cat:0.8>")
    tab.wait_for_line("Will compose fox 1 cat 0.8")


def test_a_lora_of_several_tags_is_one(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    tab.prompt("<lora:fox:1> <lora:ink:0.3> <lora:fox:0.4:0.6>")
    # As A1111 has it: both with the last one's strength.
    tab.wait_for_line("Will compose fox 1.2 text 0.8 ink 0.3")
    tab.role("fox").select_option("style")
    written = page.input_value("#txt2img_prompt textarea")
    assert written == "<lora:fox:role=style:1> <lora:ink:0.3> <lora:fox:role=style:0.4:0.6>"
    tab.prompt("<lora:fox:at=left:1> <lora:ink:0.3> <lora:fox:at=right:0.5> <lora:fox:at=left:0.25>")
    tab.wait_for_line("Will compose fox 1.25 ink 0.3 fox 0.5")
    page.evaluate(
        "const line = document.querySelector('#loratorio_txt2img_loras');"
        "line.dataset.names = JSON.stringify({...JSON.parse(line.dataset.names), repeats: 'each'})"
    )
    tab.prompt("<lora:fox:1> <lora:ink:0.3> <lora:fox:0.4:0.6>")
    tab.wait_for_line("Will compose fox 1.6 text 1.4 ink 0.3")
    page.evaluate(
        "const line = document.querySelector('#loratorio_txt2img_loras');"
        "line.dataset.names = JSON.stringify({...JSON.parse(line.dataset.names), repeats: 'different'})"
    )
    tab.prompt("<lora:fox:1> <lora:ink:0.3> <lora:fox:1:0.5> <lora:ink:0.3>")
    tab.wait_for_line("Will compose fox 1.5 text 1 ink 0.3")


def test_places_with_a_method_that_has_none_are_said(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    tab.prompt("<lora:fox:at=left:1> <lora:ink:1>")
    assert "Places" not in tab.line()
    tab.choose("method", "Merge")
    tab.wait_for_line(
        "Will compose fox 1 ink 1 Places and own words do not work with Merge: the job will stop. Choose LoRAtorio, relative, "
        "LoRAtorio, LoRAtorio by divergence, Composite or W-Composite."
    )
    tab.prompt("<lora:fox:1> <lora:ink:1>")
    tab.wait_for_line("Will compose fox 1 ink 1")


def test_roles_are_written_into_the_prompt(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    prompt = page.locator("#txt2img_prompt textarea")
    tab.prompt("# <lora:ink:1>\n<lora:fox:0.8>, <lora:ink:1:role=style:te=0.5>, <lora:fast:1>")
    assert [tab.role(name).input_value() for name in ("fox", "ink", "fast")] == ["content", "style", "always"]
    tab.role("fox").select_option("always")
    tab.role("ink").select_option("content")
    tab.role("fast").select_option("content")
    text = "# <lora:ink:1>\n<lora:fox:role=always:0.8>, <lora:ink:te=0.5:1>, <lora:fast:role=content:1>"
    assert prompt.input_value() == text
    assert [tab.role(name).input_value() for name in ("fox", "ink", "fast")] == [
        "always",
        "content",
        "content",
    ]
    # Python has the prompt that the drop-downs wrote.
    assert tab.generate()[1].startswith(text)
    tab.role("fast").select_option("always")
    assert "<lora:fast:1>" in prompt.input_value()
    tab.prompt("<lora:fast:1>")
    assert "nothing to compose" in tab.line()


def test_paste_brings_everything_back(page: Any) -> None:
    """Every knob away from its default, through the infotext, into the other tab's panel, and out again."""
    away = {knob.name: elsewhere(knob) for knob in KNOBS}
    # What the method does not look at is not written.
    settings = Settings.from_mapping(
        {name: value for name, value in away.items() if not KNOB_BY_NAME[name].ignored_by(away["method"])}
    )
    prompt = "a fox <lora:fox:0.8> <lora:ink:0.65>"
    picture = written(prompt, params(settings, [("fox", 0.8, ""), ("ink", 0.65, "")]))
    tab = Tab(page, "img2img").open()
    tab.paste(picture)
    # The line follows what the page itself writes into the prompt, too.
    page.wait_for_function("document.querySelector('#loratorio_img2img_loras').innerText.includes('ink')")
    assert tab.line() == "Will compose fox 0.8 ink 0.65"
    knobs, again = tab.generate()
    assert knobs == as_dict(settings)
    assert again == picture


def test_paste_of_a_plain_picture_unticks(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    tab.number("patch_size", 7)
    tab.paste(written("a fox", {}))
    page.wait_for_function("!document.querySelector('#loratorio_txt2img-checkbox input').checked")
    assert tab.generate()[0] == as_dict(Settings(patch_size=7))
    # A pair of knobs that cannot be is answered with a sentence.
    tab.tick()
    tab.number("start", 0.8)
    tab.number("end", 0.2)
    page.click("#txt2img_generate")
    page.wait_for_function(
        "document.querySelector('#txt2img_result :is(textarea, input)').value.startsWith('error')"
    )
    assert "Active from (0.8) is after Active to (0.2)" in page.input_value(
        "#txt2img_result :is(textarea, input)"
    )


def test_a_number_out_of_range_is_our_own_sentence(page: Any) -> None:
    """Ticked; unticked it is no matter, and the page goes on in both."""
    tab = Tab(page, "txt2img").open()
    tab.as_published()
    tab.number("temperature", 20)
    assert tab.generate()[0]["enabled"] is False
    tab.tick()
    page.click("#txt2img_generate")
    page.wait_for_function(
        "document.querySelector('#txt2img_result :is(textarea, input)').value.includes('Temperature must be from 0.0001 to 10')"
    )
    tab.number("temperature", 0.2)
    assert tab.generate()[0]["temperature"] == 0.2


def test_send_to_img2img(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.tick()
    tab.number("top_k", 2)
    tab.choose("method", "Merge")
    tab.prompt("<lora:fox:1> <lora:ink:1>")
    page.click("#send")
    page.wait_for_function("document.querySelector('#img2img_prompt textarea').value.includes('ink')")
    other = Tab(page, "img2img").open()
    assert other.generate()[0] == as_dict(Settings(enabled=True, method="merge", top_k=2))
    assert other.line() == "Will compose fox 1 ink 1"


def test_nothing_is_cut_off(page: Any) -> None:
    """Every knob is inside the page, whatever its width and however long a LoRA's name."""
    tab = Tab(page, "txt2img").open()
    tab.prompt(
        "<lora:"
        + "a_very_long_name" * 12
        + ":0.8> "
        + " ".join(f"<lora:number {i}:0.{i}>" for i in range(1, 30))
    )
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        for knob in KNOBS:
            box = tab.find("-checkbox" if knob.name == "enabled" else f"_{knob.name}").bounding_box()
            assert box is not None, knob.name
            assert box["x"] >= 0, knob.name
            assert box["x"] + box["width"] <= width, knob.name
            assert box["width"] > 100, knob.name
        line = tab.find("_loras")
        assert line.evaluate("each => each.scrollWidth <= each.clientWidth")
        assert line.bounding_box()["height"] < 500


def test_twelve_loras_are_all_in_sight(page: Any) -> None:
    """On a narrow page, each with its role."""
    page.set_viewport_size({"width": 420, "height": 900})
    tab = Tab(page, "txt2img").open()
    tab.tick()
    tab.prompt(" ".join(f"<lora:character number {i}:0.{i}5>" for i in range(12)))
    line = tab.find("_loras").bounding_box()
    for i in range(12):
        menu = tab.role(f"character number {i}").bounding_box()
        assert line["y"] <= menu["y"]
        assert menu["y"] + menu["height"] <= line["y"] + line["height"]
        assert menu["x"] + menu["width"] <= 420


def test_a_role_that_there_is_not_is_marked(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.prompt("<lora:fox:role=stile:1> <lora:ink:role=style:1>")
    assert tab.role("fox").locator("option:checked").inner_text() == "stile: unknown role"
    assert tab.role("fox").get_attribute("aria-invalid") == "true"
    assert tab.role("ink").get_attribute("aria-invalid") == "false"
    assert tab.find("_loras .loratorio-wrong").count() == 1
    tab.role("fox").select_option("style")
    assert page.input_value("#txt2img_prompt textarea") == "<lora:fox:role=style:1> <lora:ink:role=style:1>"


ANSWER_COST = """() => {
    const own = window.fetch;
    window.fetch = (url, options) => {
        if (url !== "./loratorio/cost") return own(url, options);
        const {values, count, steps, cfg} = JSON.parse(options.body);
        window.asked = values;
        window.askedFor = [steps, cfg];
        const isOld = values[0] === "Merge";
        return new Promise(done => setTimeout(() => done(new Response(isOld ? "1" : String(count + 1))), isOld ? 1500 : 0));
    };
}"""
"""Python's answers: one more than the LoRAs, and late for *Merge*."""


def test_the_cost_counts_loras_that_will_be_composed(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    page.evaluate(ANSWER_COST)
    for prompt, said in (
        ("<lora:fox:1> <lora:ink:1>", "With 2 LoRAs, a step costs about 3.0 times as much as a plain one."),
        ("<lora:fox:1> <lora:ink:0> <lora:dog:te=1:unet=0>", "With 1 LoRA, a step costs about 2.0 times as much as a plain one."),
        ("<lora:fox:1> <lora:gone:1> <lora:dog:1>", "With 2 LoRAs, a step costs about 3.0 times as much as a plain one."),
        ("<lora:gone:1>", ""),
    ):  # fmt: skip
        tab.prompt(prompt)
        page.wait_for_function(
            "said => document.querySelector('#loratorio_txt2img_cost .loratorio-cost').textContent === said",
            arg=said,
        )


def test_the_cost_is_that_of_the_present_settings(page: Any) -> None:
    """An answer to older settings that comes later is ignored."""
    tab = Tab(page, "txt2img").open()
    tab.prompt("<lora:fox:1> <lora:ink:1>")
    page.evaluate(ANSWER_COST)
    tab.choose("method", "Merge")
    page.wait_for_function("window.asked?.[0] === 'Merge'")
    tab.choose("method", "LoRAtorio")
    page.wait_for_function("window.asked?.[0] === 'LoRAtorio'")
    page.wait_for_timeout(2000)
    said = tab.find("_cost .loratorio-cost").text_content()
    assert said == "With 2 LoRAs, a step costs about 3.0 times as much as a plain one."


def elsewhere(knob: Any) -> Any:
    """A value of the knob that is not its default, and on a slider's step."""
    if knob.kind == "bool":
        return not knob.default
    if knob.kind == "choice":
        return next(name for name, _ in reversed(knob.choices) if name != knob.default)
    special = {"start": 0.25, "end": 0.85, "temperature": 0.0371, "patch_size": 5}
    if knob.name in special:
        return special[knob.name]
    up = knob.default + 3 * knob.step
    return knob.check(up if up <= knob.maximum else knob.default - 3 * knob.step)


MAP = ", LoRAtorio map: True"
# Infotexts, index of the first picture, the chosen index, whether it stays; what is left of the gallery, and the chosen index in it.
HIRES_BUTTON: list[tuple[list[Any], int, int, bool, list[int], int]] = [
    (["a", "b", "a" + MAP, "b" + MAP, "a" + MAP], 0, 0, False, [0, 1, 3], 0),
    (["a", "b", "a" + MAP, "b" + MAP], 0, 1, False, [0, 1, 2], 1),
    # A grid has the first picture's infotext.
    (["a", "a", "b", "a" + MAP, "b" + MAP], 1, 1, False, [0, 1, 2, 4], 1),
    (["a", "a", "b", "a" + MAP, "b" + MAP], 1, 0, False, [0, 1, 2, 3, 4], 0),
    # A map means its picture.
    (["a", "a", "b", "a" + MAP, "b" + MAP], 1, 4, False, [0, 1, 2, 3], 2),
    # After an earlier hires fix its maps stand beside the new picture, before the next.
    (["A", "A" + MAP, "b", "b" + MAP], 0, 2, False, [0, 1, 2], 2),
    (["A", "A" + MAP, "b", "A" + MAP, "b" + MAP], 0, 2, False, [0, 1, 2, 3], 2),
    (["b" + MAP, "a", "b", "b" + MAP], 0, 2, False, [1, 2], 1),
    (["a", "b", "a" + MAP, "b" + MAP], 0, 0, True, [0, 1, 2, 3], 0),
    # A ControlNet's picture has no infotext; nothing is known of an index beyond.
    (["a", "a" + MAP, None], 0, 0, False, [0, 2], 0),
    (["a", "a" + MAP], 0, 2, False, [0, 1, 2], 2),
    (["a", "b"], 0, 1, False, [0, 1], 1),
    (["a", "a" + MAP], 0, -1, False, [0, 1], -1),
]


def test_the_hires_button_takes_the_small_picture_s_maps_away(page: Any) -> None:
    for texts, first, chosen, stays, left, index in HIRES_BUTTON:
        gallery = list(range(max(len(texts), chosen + 1)))
        info = json.dumps({"infotexts": texts, "index_of_first_image": first, "seed": 7})
        sent = page.evaluate(
            """([stays, ...given]) => {
                opts.hires_button_gallery_insert = stays;
                return window.submit_txt2img_upscale(...given);
            }""",
            [stays, "id", gallery, chosen, info, "prompt"],
        )
        case = (texts, first, chosen, stays)
        assert (sent[0], sent[4]) == ("id", "prompt"), case
        assert (sent[1], sent[2]) == (left, index), case
        assert json.loads(sent[3]) == {
            "infotexts": [texts[place] for place in left if place < len(texts)],
            "index_of_first_image": first,
            "seed": 7,
        }, case


def test_the_hires_button_sends_what_it_would_where_nothing_is_known(page: Any) -> None:
    for info in ("", "null", "[]", "{", "3", '{"infotexts": 4}'):
        sent = page.evaluate("given => window.submit_txt2img_upscale(...given)", ["id", [0, 1], 1, info])
        assert sent == ["id", [0, 1], 1, info]


def test_self_check(page: Any) -> None:
    tab = Tab(page, "txt2img").open()
    tab.prompt("a <lora:fox:0.8>")
    checking = page.locator(".loratorio-checking[data-tab=txt2img]")
    assert not checking.is_visible()
    tab.find("_check").click()
    table = page.locator("#tab_txt2img .loratorio-check").first
    checking.wait_for()
    table.locator("table").wait_for()
    checking.wait_for(state="hidden")
    assert "1 of 2 checks failed. Please copy this table into a bug report." in table.inner_text()
    assert json.loads(table.locator(".loratorio-pass td").nth(2).inner_text()) == {
        "prompt": "a <lora:fox:0.8>",
        "width": 512,
        "height": 512,
    }
    assert table.locator(".loratorio-fail td").nth(2).inner_text() == "<i>wrong</i> | bad"
    page.evaluate("navigator.clipboard.writeText = async text => { window.copied = text; }")
    table.locator(".loratorio-copy").click()
    page.wait_for_function("window.copied")
    assert "| Two | FAIL | <i>wrong</i> \\| bad |" in page.evaluate("window.copied")
    assert table.locator(".loratorio-copy").inner_text() == "Copied"

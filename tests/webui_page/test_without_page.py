"""Infotext, API arguments, X/Y/Z axes and the settings page, without a page."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratorio import __version__
from loratorio.compose.methods import METHODS
from loratorio.compose.mixes import Participants
from loratorio.errors import LoratorioError
from loratorio.job import Job, PassRecord
from loratorio.pictures.infotext import HIRES_LORAS_KEY, LORAS_KEY, VERSION_KEY, LoraUse, number, params
from loratorio.prompt.places import read_place
from loratorio.sampling.engine import check_places
from loratorio.sampling.history import WeightHistory
from loratorio.settings import KNOB_BY_NAME, KNOBS, PRESET_KNOBS, PRESETS, Knob, Settings
from loratorio.webui import api, docs, options, xyz
from loratorio.webui import infotext_fields as infotext
from loratorio.webui import lookup as found
from loratorio.webui.components import component

from .host_infotext import read, written


def values_of(knob: Knob) -> st.SearchStrategy[Any]:
    if knob.kind == "bool":
        return st.booleans()
    if knob.kind == "choice":
        return st.sampled_from([name for name, _ in knob.choices])
    if knob.kind == "int":
        return st.integers(math.ceil(knob.minimum), math.floor(knob.maximum))
    return st.floats(knob.minimum, knob.maximum)


@st.composite
def settings(draw: st.DrawFn) -> Settings:
    values = {knob.name: draw(values_of(knob)) for knob in KNOBS}
    values["start"], values["end"] = sorted((values["start"], values["end"]))
    return Settings.from_mapping({**values, "enabled": True})


# What a file may be called, as far as a prompt can name it.
names = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters=":>\r\n"), min_size=1, max_size=30
)


PLACES = ("", "left", "0,0,0.5,1~0.05", "top-left+bottom-right")


@given(settings(), st.lists(st.tuples(names, st.floats(-4, 4), st.sampled_from(PLACES)), max_size=5))
def test_every_knob_comes_back_exactly(chosen: Settings, loras: list[tuple[str, float, str]]) -> None:
    text = written("a fox", params(chosen, loras))
    fields = read(text)
    assert fields["Seed"] == "1"
    assert fields["Prompt"] == "a fox"
    shown = {knob.name: infotext.value_from(knob, fields) for knob in KNOBS}
    ignored = {knob.name: knob.default for knob in KNOBS if knob.ignored_by(chosen.method)}
    assert Settings.from_mapping(shown) == chosen.with_values(ignored)


@given(st.lists(st.tuples(names, st.floats(-4, 4), st.sampled_from(PLACES)), min_size=1, max_size=5))
def test_lora_names_survive_the_hosts_quoting(loras: list[tuple[str, float, str]]) -> None:
    fields = read(written("", params(Settings(enabled=True), loras, loras)))
    expected = ", ".join(
        f"{name}:{number(strength)}" + (f" at {place}" if place else "") for name, strength, place in loras
    )
    assert fields[LORAS_KEY] == expected
    assert fields[HIRES_LORAS_KEY] == expected


def test_only_what_matters_to_the_picture_is_written() -> None:
    loras = [
        ("fox", 0.8, ""),
        ("ink", 1.0, "left~0.2"),
        ("cat", 0.0, "", 1.0),
        LoraUse("dog", 1.0, share=0.341),
    ]
    fields = params(Settings(enabled=True), loras)
    assert fields == {
        "LoRAtorio": "True",
        "LoRAtorio version": __version__,
        "LoRAtorio LoRAs": "fox:0.8, ink:1 at left~0.2, cat:0 to 1, dog:1 (34 %)",
    }
    # Knobs that were changed, but for those that the method does not look at.
    changed = params(Settings(enabled=True, method="composite", recentre=0.25, temperature=0.5), loras)
    knobs = {key.removeprefix("LoRAtorio ") for key in changed} - {"LoRAtorio", "version", "LoRAs"}
    read_by_composite = {KNOB_BY_NAME[name].label.lower() for name in METHODS["composite"].knobs}
    assert knobs == {"method"} | ({"re-centring", "temperature"} & read_by_composite)
    assert "temperature" not in read_by_composite
    # Of a pool those that had a part of the picture.
    pool = [
        LoraUse("dog", 1.0, share=0.341),
        LoraUse("cat", 1.0, share=0.001),
        LoraUse("emu", 1.0, share=0.0),
    ]
    fields = params(Settings(enabled=True), pool)
    assert fields[LORAS_KEY] == "dog:1 (34 %)"
    assert fields[f"{LORAS_KEY} unused"] == "2 of the pool"


def test_a_picture_is_exact_although_defaults_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A knob that is not mentioned has the default of the version that made the picture."""
    knob = KNOB_BY_NAME["reuse"]
    assert (knob.default_in(""), knob.default_in("0.1.0"), knob.default_in(__version__)) == (
        1,
        1,
        knob.default,
    )
    later = replace(knob, default=5, former=(*knob.former, (__version__, knob.default)))
    made = read(written("a fox", params(Settings(enabled=True), [])))
    assert infotext.value_from(later, made) == knob.default
    assert infotext.value_from(later, {**made, VERSION_KEY: "99.0.0"}) == 5
    assert infotext.value_from(later, {**made, VERSION_KEY: "0.1.0"}) == 1


OF_0_2 = {
    "recentre": 0.5,
    "share": 0.15,
    "reuse": 3,
    "temperature": 0.1,
    "patch_size": 2,
    "top_k": 0,
    "method": "loratorio",
    "find_styles": False,
}
OF_0_3 = {**OF_0_2, "top_k": 2, "method": "relative"}
OF_0_4 = {**OF_0_3, "find_styles": True}
DEFAULTS = {
    "0.2.0": OF_0_2,
    "0.3.0": OF_0_3,
    "0.4.0": OF_0_4,
    "0.4.1": OF_0_4,
    "0.5.0": OF_0_4,
    "0.5.1": OF_0_4,
    "0.5.2": OF_0_4,
    "0.5.3": OF_0_4,
}
"""By version. Where one changes, the version must, and the knob's `former` must say what it was."""


@pytest.mark.parametrize("version", DEFAULTS)
def test_defaults_are_those_of_their_version(version: str) -> None:
    made_with = {name: KNOB_BY_NAME[name].default_in(version) for name in OF_0_2}
    assert made_with == DEFAULTS[version]


def test_the_newest_version_has_the_defaults_of_now() -> None:
    assert DEFAULTS[__version__] == {name: KNOB_BY_NAME[name].default for name in OF_0_2}


def test_keys_are_ones_that_the_hosts_can_read() -> None:
    keys = [knob.infotext_key for knob in KNOBS]
    assert len(set(keys)) == len(keys)
    fields = read(written("", dict.fromkeys(keys, "x")))
    assert all(fields[key] == "x" for key in keys)


def test_unticked_leaves_no_trace() -> None:
    assert params(Settings(), [("fox", 1.0, "")]) == {}


def job_of(*passes: PassRecord, batch: int = 0) -> Job:
    """A job that has come as far as this batch."""
    job = Job(SimpleNamespace(iteration=batch), Settings(enabled=True), passes=list(passes))
    job.begun = {(each.batch, each.hires) for each in passes}
    return job


def sampled(name: str, batch: int = 0, hires: bool = False) -> PassRecord:
    return PassRecord((LoraUse(name, 1.0),), batch, hires, WeightHistory())


def test_hires_pass_is_named_only_if_it_differs() -> None:
    def fields(job: Job) -> dict[str, Any]:
        made = {"Seed": 1, HIRES_LORAS_KEY: "of the batch before"}
        infotext.write(made, job.settings, job)
        assert made["Seed"] == 1
        return made

    assert HIRES_LORAS_KEY not in fields(job_of(sampled("fox"), sampled("fox", hires=True)))
    assert fields(job_of(sampled("fox"), sampled("ink", hires=True)))[HIRES_LORAS_KEY] == "ink:1"
    second = fields(job_of(sampled("fox"), sampled("ink", hires=True), sampled("dog", batch=1), batch=1))
    assert HIRES_LORAS_KEY not in second
    assert second[LORAS_KEY] == "dog:1"
    # What the batch before had is no matter of one that has not been composed.
    assert LORAS_KEY not in fields(job_of(sampled("fox"), batch=1))


def test_notes_belong_to_their_batch_and_pass() -> None:
    job = job_of()
    comments: dict[str, Any] = {"the WebUI's own": 1}
    shown = infotext.Comments(comments)

    def note_of_batch(batch: int, *passes: tuple[bool, tuple[str, ...]]) -> str:
        job.p.iteration = batch
        for hires, sentences in passes:
            job.p.is_hr_pass = hires
            job.begin_pass()
            for sentence in sentences:
                job.note(sentence)
        fields: dict[str, Any] = {}
        infotext.write(fields, job.settings, job)
        shown.update(job)
        return str(fields.get(infotext.NOTE_KEY, ""))

    assert note_of_batch(0, (False, ("None.",))) == "None."
    assert list(comments) == ["the WebUI's own", "None."]
    assert note_of_batch(1, (False, ())) == ""
    assert list(comments) == ["the WebUI's own", "Batch 1: None."]
    assert note_of_batch(2, (False, ("None.", "Both.")), (True, ("Both.", "Late."))) == (
        "First pass: None. Both. Hires pass: Late."
    )
    assert set(comments) == {
        "the WebUI's own",
        "Batch 1: None.",
        "Batch 3: First pass: None.",
        "Batch 3: Both.",
        "Batch 3: Hires pass: Late.",
    }
    # Another job of the same script leaves them where they are.
    other = infotext.Comments(comments)
    other.update(job_of())
    assert len(comments) == 5
    assert job.notes == ["None.", "Both.", "Late."]


def test_knobs_are_written_when_the_job_begins() -> None:
    """The paste button reads a file that is written before the first picture; the cells of a plot share one mapping."""
    fields: dict[str, Any] = {
        "Seed": 1,
        "LoRAtorio note": "of the cell before",
        "LoRAtorio LoRAs": "fox:1",
        "LoRA": "x",
    }
    infotext.write(fields, Settings(enabled=True, patch_size=5), None)
    assert fields["LoRAtorio"] == "True"
    assert fields["LoRAtorio patch size"] == "5"
    # Until a batch begins, the WebUI makes an infotext only if it is interrupted.
    assert fields["LoRAtorio note"] == "LoRAtorio composed nothing: interrupted before the first step."
    assert "LoRAtorio LoRAs" not in fields
    infotext.write(fields, Settings(), None)
    assert fields == {"Seed": 1, "LoRA": "x"}


def test_pasting() -> None:
    def shown(text: str) -> dict[str, Any]:
        return {knob.name: infotext.value_from(knob, read(text)) for knob in KNOBS}

    assert set(shown("only a prompt").values()) == {None}
    plain = shown(written("a fox", {}))
    assert plain.pop("enabled") is False
    assert set(plain.values()) == {None}
    # A picture from before most of the knobs were there.
    old = shown(written("a fox", {"LoRAtorio": "True", "LoRAtorio method": "composite"}))
    assert old["enabled"] is True
    assert old["method"] == "Composite"
    assert old["recentre"] == 0
    broken = shown(written("a fox", {"LoRAtorio": "True", "LoRAtorio temperature": "warm"}))
    assert broken["temperature"] is None


def test_arguments_by_position_and_by_name() -> None:
    assert api.settings_from_args([]) == Settings()
    assert api.settings_from_args([True, "switch"]) == Settings(enabled=True, method="switch")
    assert api.settings_from_args([True, None, 3]) == Settings(enabled=True, patch_size=3)
    named = {"enabled": True, "method": "LoRAtorio", "temperature": 0.05}
    # The WebUI puts the panel's defaults behind the arguments that came.
    filled = [named, *(knob.default for knob in KNOBS[1:])]
    assert api.settings_from_args(filled) == Settings(enabled=True, method="loratorio", temperature=0.05)


def test_what_a_call_names_in_vain_is_said_of_every_pass() -> None:
    named = [{"enabled": True, "temperature": 0.05}]
    settings = api.settings_from_args(named)
    p = SimpleNamespace(iteration=0, is_hr_pass=False)
    (sentence,) = api.standing(settings, named, p)
    assert sentence.startswith("temperature = 0.05 has no effect with ")
    # In the panel that knob is grey.
    panel = [getattr(settings, knob.name) for knob in KNOBS]
    assert api.standing(settings, panel, p) == []
    job = Job(p, settings, standing=[sentence])
    for p.iteration in (0, 1):
        job.begin_pass()
    assert job.notes_of(0) == job.notes_of(1) == [sentence]


@pytest.mark.parametrize("name", ["all_negative_prompts", "all_hr_negative_prompts"])
def test_loras_of_the_negative_prompt_are_said_to_be_text(name: str) -> None:
    p = SimpleNamespace(**{name: ["blurry", "bad <lora:bad hands:1>"]})
    (sentence,) = api.standing(Settings(enabled=True), [True], p)
    assert "in the negative prompt has no effect" in sentence
    p = SimpleNamespace(**{name: ["a < b", "<hypernet:x:1>"]})
    assert api.standing(Settings(enabled=True), [True], p) == []


@pytest.mark.parametrize(
    ("args", "mistaken"),
    [
        ([{"preset": "fast"}], True),
        ([{"top_k": 3}], True),
        ([{"enabled": False, "top_k": 3}], False),
        ([{"enabled": True, "top_k": 3}], False),
        ([{}], False),
        ([], False),
        ([False, "relative", 3], False),
    ],
)
def test_a_call_that_forgets_to_switch_it_on(args: list[Any], mistaken: bool) -> None:
    assert api.is_off_by_mistake(api.settings_from_args(args), args) is mistaken


def test_what_is_typed_into_a_panel_that_is_off_is_nobodys_matter() -> None:
    panel = [knob.default for knob in KNOBS]
    bad = {knob.name: i for i, knob in enumerate(KNOBS)}
    for name, label, value in (
        ("temperature", "Temperature", 20.0),
        ("temperature", "Temperature", 0),
        ("patch_size", "Patch size", 1e9),
        ("start", "Active from", 2),
    ):
        values = list(panel)
        values[bad[name]] = value
        assert api.settings_from_args(values) == Settings()
        with pytest.raises(LoratorioError, match=f"{label} must be"):
            api.settings_from_args([True, *values[1:]])


def test_gradio_refuses_no_number_before_we_do() -> None:
    """A component with limits raises before any script runs, also where the box is unticked: knobs that are typed have none."""
    for knob in KNOBS:
        name, arguments = component(knob)
        if name == "Number":
            assert not {"minimum", "maximum"} & arguments.keys()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([{"temprature": 1}], "temperature"),
        ([{"enabled": "maybe"}], "enabled must be true or false"),
        ([{"method": "lora-torio"}], "did you mean loratorio"),
        ([{"patch_size": 1.5}], "patch_size must be a whole number"),
        ([{"temperature": 99}], "temperature must be from"),
        ([{"start": 0.9, "end": 0.1}], "start"),
        ([True, "loratorio", "big"], "Patch size"),
        ([True] * 99, "arguments"),
        ([[1, 2]], "Enable must be true or false"),
    ],
)
def test_bad_arguments_are_sentences(args: list[Any], sentence: str) -> None:
    with pytest.raises(LoratorioError, match=sentence):
        api.settings_from_args(args)


def test_sentences_name_the_knobs_as_the_caller_does() -> None:
    """The panel's labels to the panel, the names to a call with names: when they are read, and later, of a job or a plot."""
    placed = Participants.of(2, places={0: read_place("left", "fox")})

    def said(args: list[Any], p: Any = None) -> str:
        settings = api.settings_from_args(args, p)
        try:
            check_places(settings, placed)
        except LoratorioError as problem:
            return str(problem)
        return " ".join(api.standing(settings, args, p))

    panel = [{"enabled": True, "start": 0.5}.get(knob.name, knob.default) for knob in KNOBS]
    assert "Set Active from to 0 and Active to to 1" in said(panel)
    assert "Set start to 0 and end to 1" in said([{"enabled": True, "start": 0.5}])
    assert said([{"enabled": True, "temperature": 0.5}]).startswith("temperature = 0.5 has no effect with ")
    plot = SimpleNamespace(loratorio_xyz={"temperature": 0.5})
    defaults = [knob.default for knob in KNOBS]
    assert said(defaults, plot).startswith("Temperature = 0.5 has no effect with ")


def test_what_a_preset_sets_every_preset_sets() -> None:
    assert all(set(preset.values) == set(PRESET_KNOBS) for preset in PRESETS.values())


@pytest.fixture
def webui(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Just enough of a WebUI's modules for the axes and the settings page."""
    modules, scripts, shared = (ModuleType(name) for name in ("modules", "modules.scripts", "modules.shared"))
    grid = ModuleType("scripts.xyz_grid")
    grid.__dict__.update(
        axis_options=[],
        AxisOption=lambda label, kind, apply, confirm=None, choices=None, prepare=None: SimpleNamespace(
            label=label, type=kind, apply=apply, confirm=confirm, choices=choices, prepare=prepare
        ),
        csv_string_to_list_strip=lambda text: [part.strip() for part in text.split(",")],
        re_range_float=re.compile(
            r"\s*([+-]?\s*\d+(?:.\d*)?)\s*-\s*([+-]?\s*\d+(?:.\d*)?)(?:\s*\(([+-]\d+(?:.\d*)?)\s*\))?\s*"
        ),
        re_range_count_float=re.compile(
            r"\s*([+-]?\s*\d+(?:.\d*)?)\s*-\s*([+-]?\s*\d+(?:.\d*)?)(?:\s*\[(\d+(?:.\d*)?)\s*])?\s*"
        ),
    )
    script_class = type("Script", (), {"__module__": "scripts.xyz_grid"})
    scripts.scripts_data = [SimpleNamespace(script_class=script_class, module=grid)]
    shared.opts = SimpleNamespace(data={})
    for module in (modules, scripts, shared):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return SimpleNamespace(grid=grid, stored=shared.opts.data)


def axis(webui: SimpleNamespace, name: str) -> Any:
    label = xyz.PREFIX + KNOB_BY_NAME[name].label
    return next(each for each in webui.grid.axis_options if each.label == label)


def test_an_axis_for_every_knob_once(webui: SimpleNamespace) -> None:
    xyz.add_axes()
    xyz.add_axes()
    labels = [each.label for each in webui.grid.axis_options]
    assert labels == [*(xyz.PREFIX + knob.label for knob in KNOBS), xyz.PREFIX + "Preset"]


def test_the_axis_of_presets_sets_their_knobs_and_leaves_the_others(webui: SimpleNamespace) -> None:
    xyz.add_axes()
    (presets,) = [each for each in webui.grid.axis_options if each.label == "[LoRAtorio] Preset"]
    assert presets.choices() == ["Paper", "Balanced", "Fast"]
    presets.confirm(SimpleNamespace(), ["fast", "Paper"])
    with pytest.raises(
        LoratorioError, match=r"X/Y/Z plot.*preset must be one of paper, balanced, fast, not 'x'"
    ):
        presets.confirm(SimpleNamespace(), ["Paper", "x"])
    p = SimpleNamespace()
    axis(webui, "temperature").apply(p, 0.3, [])
    presets.apply(p, "Fast", [])
    expected = Settings(enabled=True, temperature=0.3).with_values(PRESETS["fast"].values)
    assert api.settings_from_args([False], p) == expected


def test_an_api_call_names_a_preset_and_knobs_beside_it() -> None:
    made = api.settings_from_args([{"enabled": True, "preset": "Paper", "reuse": 3}])
    assert made == Settings(enabled=True).with_values({**PRESETS["paper"].values, "reuse": 3})


def test_pictures_of_before_reuse_are_pasted_without_it() -> None:
    old = {"Steps": "20", "LoRAtorio": "True", "LoRAtorio re-centring": "0.5"}
    assert infotext.value_from(KNOB_BY_NAME["reuse"], old) == 1
    assert infotext.value_from(KNOB_BY_NAME["yielding"], old) == KNOB_BY_NAME["yielding"].default


def test_axes_set_knobs_for_their_picture_only(webui: SimpleNamespace) -> None:
    xyz.add_axes()
    plain = SimpleNamespace()
    first = SimpleNamespace(**vars(plain))
    axis(webui, "method").apply(first, "Composite", [])
    second = SimpleNamespace(**vars(first))
    axis(webui, "temperature").apply(second, 0.3, [])
    off = SimpleNamespace(**vars(first))
    axis(webui, "enabled").apply(off, "False", [])
    args = [False, "merge", 4]
    assert api.settings_from_args(args, plain) == Settings(method="merge", patch_size=4)
    assert api.settings_from_args(args, first) == Settings(enabled=True, method="composite", patch_size=4)
    assert api.settings_from_args(args, second) == Settings(
        enabled=True, method="composite", patch_size=4, temperature=0.3
    )
    assert not api.settings_from_args(args, off).enabled


def test_axes_refuse_bad_values_before_the_first_picture(webui: SimpleNamespace) -> None:
    xyz.add_axes()
    axis(webui, "temperature").confirm(None, [0.1, 0.2])
    with pytest.raises(LoratorioError, match="Temperature must be from"):
        axis(webui, "temperature").confirm(None, [0.1, 20.0])
    with pytest.raises(LoratorioError, match="did you mean composite"):
        axis(webui, "method").confirm(None, ["composit"])
    for name in ("method", "temperature"):
        with pytest.raises(LoratorioError, match="the axis has no values"):
            axis(webui, name).confirm(None, [])
    (presets,) = (each for each in webui.grid.axis_options if each.label == f"{xyz.PREFIX}Preset")
    for values, why in (([], "the axis has no values"), (["Fast", ""], "preset must be one of")):
        with pytest.raises(LoratorioError, match=why):
            presets.confirm(None, values)


def test_ranges_end_where_they_say(webui: SimpleNamespace) -> None:
    xyz.add_axes()
    expand = axis(webui, "recentre").prepare
    assert [float(each) for each in expand("0-1 (+0.1)")] == [i / 10 for i in range(11)]
    assert expand("0.5, 0-1, 1-0 (-0.5), 0-1 [3]") == ["0.5", "0", "1", "1", "0.5", "0", "0", "0.5", "1"]
    size = axis(webui, "patch_size")
    assert [size.type(each) for each in size.prepare("1-5 (+2), 8, 2-4 [2]")] == [1, 3, 5, 8, 2, 4]


def test_text_in_an_axis_of_numbers_is_a_sentence_with_the_knob(webui: SimpleNamespace) -> None:
    """The plot makes each value one of the axis' type before it asks whether they are good."""
    xyz.add_axes()
    for knob in KNOBS:
        own = axis(webui, knob.name)
        values = [own.type(each) for each in (own.prepare or str.split)("warm")]
        with pytest.raises(
            LoratorioError, match=rf"X/Y/Z plot, .*{re.escape(knob.label)}: {re.escape(knob.label)} must be"
        ):
            own.confirm(None, values)


def test_null_is_the_default_by_name_as_by_position() -> None:
    assert api.settings_from_args([{"enabled": True, "top_k": None, "preset": None}]) == Settings(
        enabled=True
    )
    with pytest.raises(LoratorioError, match="no knob 'topk'"):
        api.settings_from_args([{"topk": None}])


def test_no_xyz_script_is_no_error(webui: SimpleNamespace) -> None:
    sys.modules["modules.scripts"].scripts_data.clear()
    xyz.add_axes()


def test_settings_page_gives_the_defaults(webui: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    webui.stored |= {"loratorio_method": "Composite", "loratorio_temperature": 0.2, "loratorio_top_k": -3}
    assert options.defaults() == Settings(method="composite", temperature=0.2)
    assert "Top-k must be from" in capsys.readouterr().out
    assert api.settings_from_args([{"enabled": True}]).method == "composite"
    webui.stored |= {"loratorio_start": 0.9, "loratorio_end": 0.1}
    assert options.defaults() == Settings()


def test_what_the_line_asks_of_the_webui(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = ModuleType("networks")
    networks.__dict__.update(available_network_aliases={"fox": 1, "alias": 1}, available_networks={"emu": 1})
    monkeypatch.setitem(sys.modules, "networks", networks)

    def count(pattern: str) -> int:
        if pattern == "gone":
            raise LoratorioError("No LoRA matches 'gone'.")
        return 7

    answer = found.found(["fox", "dog", "emu", "alias", "<b>", "fresh"], ["*", "gone"], count, "fresh".__eq__)
    assert answer == {"missing": ["dog", "<b>"], "pools": {"*": 7, "gone": "No LoRA matches 'gone'."}}
    # Without the WebUI's extension nothing is known to be missing.
    monkeypatch.delitem(sys.modules, "networks")
    assert found.found(["dog"], [], count, "fresh".__eq__) == {"missing": [], "pools": {}}


@pytest.mark.parametrize(
    ("config", "link"),
    [
        ('[core]\n\tbare = false\n[remote "origin"]\n\turl = https://host/me/it.git\n\tfetch = +x\n', "https://host/me/it#readme"),
        ('[remote "origin"]\n\tfetch = +x\n\turl = https://host/me/it\n[branch "main"]\n', "https://host/me/it#readme"),
        ('[remote "origin"]\n\tfetch = +x\n[remote "other"]\n\turl = https://host/me/it\n', "./loratorio/docs/README.md"),
        ('[remote "origin"]\n\turl = git@host:me/it.git\n', "./loratorio/docs/README.md"),
        # What is secret is not put into a page.
        ('[remote "origin"]\n\turl = https://me:secret@host/me/it.git\n', "./loratorio/docs/README.md"),
        (None, "./loratorio/docs/README.md"),
    ],
)  # fmt: skip
def test_the_documentation_is_where_the_extension_came_from(
    config: str | None, link: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "config").write_text(config)
    assert docs.link(tmp_path) == link


def test_the_documentation_renders_what_it_uses_of_markdown() -> None:
    text = (
        "# A <b>\n\nOne\n*two* **three** `<lora:a*b*>` [x](y.md#z)\n- an item\n  goes on\n\n"
        "| a | b\\|c |\n| --- | --- |\n| 1 | 2 |\n\n```sh\n# <x>\n```\n"
    )
    assert docs.page(text).partition("</style>")[2] == (
        '<h1 id="a-b">A &lt;b&gt;</h1>'
        '<p>One <em>two</em> <b>three</b> <code>&lt;lora:a*b*&gt;</code> <a href="y.md#z">x</a></p>'
        '<li style="margin-left: 1em">an item goes on</li>'
        "<table><tr><td>a</td><td>b|c</td></tr><tr><td>1</td><td>2</td></tr></table>"
        "<pre><code># &lt;x&gt;</code></pre>"
    )


def test_what_a_lora_does_not_read_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dog.json").write_text('{"activation text": "vuffo"}')
    known = {
        "fox": SimpleNamespace(
            metadata={"modelspec.trigger_phrase": "red tail"}, filename=str(tmp_path / "fox.safetensors")
        ),
        "dog": SimpleNamespace(metadata={}, filename=str(tmp_path / "dog.safetensors")),
    }
    monkeypatch.setitem(sys.modules, "networks", SimpleNamespace(available_network_aliases=known))
    tags = "<lora:fox:at=left:1> <lora:dog:at=right:1> <lora:gone:1>"
    assert found.unread_words(f"vuffo, a Red tail {tags}") == (
        "fox reads the prompt without vuffo; dog reads the prompt without red tail."
    )
    assert found.unread_words(f"a hill {tags}") == ""
    assert found.unread_words(f"vuffo {tags.replace('at=left', 'at=left:words=hat')}") == ""


def test_the_route_takes_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    routes: dict[str, Any] = {}
    app = SimpleNamespace(add_api_route=lambda path, call, methods: routes.update({path: call}))
    found.add_route(None, app)
    call = routes[found.PATH]
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    for asked in ({}, {"loras": 3, "pools": None}, {"loras": [1, {}, "x" * 9], "pools": []}):
        assert call(asked) == {"missing": [], "pools": {}, "wrong": {}, "reads": ""}
    assert (
        call({"prompt": ["a"]})["reads"] == call({"prompt": "<lora:a:at=no> <lora:b:at=left>"})["reads"] == ""
    )
    wrong = "<lora:cat:0,8>"
    why = "The tag <lora:cat:0,8> cannot be read: 0,8 is not a number: write <lora:cat:0.8>."
    tags = [wrong, "<lora:cat:words=(red:1.2):1>", 7]
    assert call({"tags": tags})["wrong"] == {wrong: why}
    # An extension reads strengths that change from step to step.
    tags.append("<lora:cat:1@0,0@1>")
    assert set(call({"tags": tags})["wrong"]) == {wrong, tags[-1]}
    scripts = SimpleNamespace(scripts_data=[SimpleNamespace(path="/extensions/loractl/scripts/loractl.py")])
    monkeypatch.setitem(sys.modules, "modules.scripts", scripts)
    assert call({"tags": tags})["wrong"] == {wrong: why}


def test_the_cost_of_any_values() -> None:
    pytest.importorskip("torch")
    routes: dict[str, Any] = {}
    app = SimpleNamespace(add_api_route=lambda path, call, methods: routes.update({path: call}))
    found.add_route(None, app)
    cost = routes[found.COST_PATH]

    def of(values: object, count: object = 2, steps: object = 20, cfg: object = 7) -> object:
        return cost({"values": values, "count": count, "steps": steps, "cfg": cfg})

    every_row = ["LoRAtorio", 0.5, 0, 1, 0, 1]
    assert [of(every_row, count) for count in (2, 3, 4)] == [3.0, 4.0, 5.0]
    assert of(every_row, cfg=1) == 3.0  # three rows where a plain step has one
    assert [of(["Merge", recentre, 0, 1, 0, 1], 3) for recentre in (0, 0.5, 1)] == [1.0, 1.5, 1.0]
    assert of(["LoRAtorio, relative", 0.5, 0.15, 3, 0, 1], steps=4) > of(
        ["LoRAtorio, relative", 0.5, 0.15, 3, 0, 1], steps=40
    )
    assert (
        of(["no method"])
        is of(["LoRAtorio", "x"])
        is of(every_row, "two")
        is of(every_row, steps=float("nan"))
        is cost({})
        is None
    )
    assert of(3) == of([])
    assert of(every_row, 10**9, 10**9) == of(every_row, 24, 60)


def test_options_that_were_never_changed_follow_new_defaults(webui: SimpleNamespace) -> None:
    """The WebUI stores all options when any is changed."""
    for name in ("reuse", "share", "blend"):
        webui.stored[options.option_name(KNOB_BY_NAME[name])] = {"reuse": 1, "share": 0.0, "blend": "Hard"}[
            name
        ]
    webui.stored["loratorio_recentre"] = 0.25
    options._follow_new_defaults(webui.stored)
    assert options.defaults() == Settings(recentre=0.25)
    assert webui.stored["loratorio_reuse"] == KNOB_BY_NAME["reuse"].default
    # What is chosen under this version stays, also where it was an older one's default.
    webui.stored["loratorio_reuse"] = 1
    options._follow_new_defaults(webui.stored)
    assert options.defaults() == Settings(recentre=0.25, reuse=1)


def test_a_webuis_start_waits_for_nothing_heavy() -> None:
    """What `scripts/loratorio_script.py` imports, but for the page's part, which needs the WebUI's Gradio."""
    code = (
        "import sys; import loratorio.hosts, loratorio.hosts.shared.host, loratorio.job, loratorio.webui.api, loratorio.webui.lookup, "
        "loratorio.webui.infotext_fields, loratorio.webui.options, loratorio.webui.pools, "
        "loratorio.webui.self_check, loratorio.webui.xyz; "
        "heavy = ('torch', 'numpy', 'gradio', 'PIL', 'loratorio.sampling', 'loratorio.adapters', 'loratorio.standalone'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""Every knob, and what is said when it is set to nonsense."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratorio.compose.methods import METHODS
from loratorio.errors import LoratorioError
from loratorio.settings import FORMER_METHODS, KNOB_BY_NAME, KNOBS, PRESETS, Knob, Settings, find_preset


def test_the_promised_knobs_are_there() -> None:
    promised = (
        "enabled",
        "method",
        "patch_size",
        "temperature",
        "top_k",
        "recentre",
        "start",
        "end",
        "weight_maps",
    )
    assert set(promised) <= set(KNOB_BY_NAME)


def test_names_are_distinct_on_every_surface() -> None:
    for names in (
        [each.label for each in KNOBS],
        [each.infotext_key for each in KNOBS],
        [each.option for each in KNOBS],
    ):
        assert len(set(names)) == len(KNOBS)
    assert KNOB_BY_NAME["patch_size"].option == "--patch-size"
    assert KNOB_BY_NAME["patch_size"].infotext_key == "LoRAtorio patch size"
    # Infotext separates entries by commas, names from values by colons.
    assert not any(sign in each.infotext_key for each in KNOBS for sign in ",:")


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_every_knob_is_explained_and_its_default_is_valid(knob: Knob) -> None:
    assert knob.help.endswith(".")
    assert knob.check(knob.default) == knob.default
    assert type(knob.check(knob.default)) is type(knob.default)
    assert knob.check(str(knob.default)) == knob.default
    if knob.kind == "choice":
        for name, label in knob.choices:
            assert knob.check(name) == knob.check(label.upper()) == name


def test_a_methods_file_has_its_name() -> None:
    assert [method.entry.name for method in METHODS.values()] == list(METHODS)


def test_merge_and_composite_are_plain_unless_they_are_told_to_re_centre() -> None:
    assert Settings(method="merge").recentre == 0
    assert Settings(method="merge", recentre=0.5).recentre == 0.5
    usual = Settings(recentre=0.7)
    assert usual.with_values({"method": "loratorio"}).recentre == 0.7
    merged = usual.with_values({"method": "Merge"})
    assert (merged.method, merged.recentre) == ("merge", 0)
    assert merged.with_values({"top_k": 1}).recentre == 0
    assert merged.with_values({"method": "relative"}).recentre == 0.5
    assert usual.with_values({"method": "merge", "recentre": 0.3}).recentre == 0.3
    assert merged.with_values({"preset": "fast"}).recentre == 1
    assert Settings.from_mapping({"preset": "paper", "method": "merge"}).recentre == 0


@pytest.mark.parametrize(("former", "method"), FORMER_METHODS.items())
def test_the_former_re_centred_methods_still_mean_the_same(former: str, method: str) -> None:
    for values, recentre in (({}, 0.5), ({"recentre": 0.3}, 0.3)):
        settings = Settings.from_mapping({"method": former, **values})
        assert (settings.method, settings.recentre) == (method, recentre)


def test_positional_arguments_keep_their_places() -> None:
    """New knobs come behind these, whatever their place in the panel."""
    weights = "enabled method patch_size temperature adaptive top_k blend"
    rest = "recentre rescale share pool_size pool_interval start end weight_maps"
    assert [knob.name for knob in KNOBS][:15] == [*weights.split(), *rest.split()]


def test_methods_read_only_knobs_that_there_are() -> None:
    for method in METHODS.values():
        assert set(method.knobs) <= set(KNOB_BY_NAME)
    assert KNOB_BY_NAME["temperature"].ignored_by("merge")
    assert not KNOB_BY_NAME["temperature"].ignored_by("loratorio")
    assert not KNOB_BY_NAME["start"].ignored_by("merge")


def test_every_method_can_be_chosen() -> None:
    assert [name for name, _ in KNOB_BY_NAME["method"].choices] == list(METHODS)


NUMBERS = [knob for knob in KNOBS if knob.kind in ("int", "float")]


@given(st.sampled_from(NUMBERS), st.floats() | st.integers() | st.text())
def test_a_number_is_either_taken_or_refused_in_a_sentence(knob: Knob, value: Any) -> None:
    try:
        taken: Any = knob.check(value)
    except LoratorioError as refused:
        taken = str(refused)
    if isinstance(taken, str):
        assert taken.startswith(f"{knob.name} must be ")
        assert taken.endswith(".")
    else:
        assert isinstance(taken, int if knob.kind == "int" else float)
        assert knob.minimum <= taken <= knob.maximum
        assert taken == float(value)


SENTENCES = [
    ({"temperature": 0}, "temperature must be from 0.0001 to 10, not 0."),
    ({"temperature": -0.5}, "temperature must be from 0.0001 to 10, not -0.5."),
    ({"temperature": "warm"}, "temperature must be a number, not 'warm'."),
    ({"temperature": float("nan")}, "temperature must be a number, not nan."),
    ({"temperature": None}, "temperature must be a number, not None."),
    ({"temperature": 10**400}, "temperature must be a number, not 1000"),
    ({"patch_size": 0}, "patch_size must be from 1 to 64, not 0."),
    ({"patch_size": 2.5}, "patch_size must be a whole number, not 2.5."),
    ({"patch_size": True}, "patch_size must be a whole number, not True."),
    ({"top_k": -1}, "top_k must be from 0 to 100, not -1."),
    ({"recentre": 1.5}, "recentre must be from 0 to 1, not 1.5."),
    ({"enabled": "maybe"}, "enabled must be true or false, not 'maybe'."),
    ({"enabled": 2}, "enabled must be true or false, not 2."),
    ({"method": "mergee"}, "did you mean merge?"),
    ({"method": "x"}, "method must be one of relative, loratorio, divergence, "),
    ({"start": 0.8, "end": 0.2}, "start (0.8) is after end (0.2)"),
    ({"patchsize": 2}, "There is no knob 'patchsize'; did you mean patch_size?"),
    ({"": 2}, "There is no knob ''; the knobs are enabled, method, "),
]


@pytest.mark.parametrize(("values", "words"), SENTENCES, ids=lambda each: str(each)[:40])
def test_what_is_said(values: dict[str, Any], words: str) -> None:
    with pytest.raises(LoratorioError) as raised:
        Settings.from_mapping(values)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_text_as_an_infotext_or_a_command_line_has_it() -> None:
    settings = Settings.from_mapping(
        {"enabled": "True", "patch_size": "4", "temperature": "1e-3", "method": "LoRAtorio"}
    )
    assert settings == Settings(enabled=True, patch_size=4, temperature=0.001, method="loratorio")


def test_some_knobs_change_and_the_rest_stay() -> None:
    settings = Settings(patch_size=4).with_values({"top_k": 2})
    assert (settings.patch_size, settings.top_k) == (4, 2)
    assert Settings() == Settings.from_mapping({})


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_composed_steps_are_one_run(total: int, a: float, b: float) -> None:
    settings = Settings(start=min(a, b), end=max(a, b))
    active = [settings.active_at(index, total) for index in range(total)]
    text = "".join("x" if each else " " for each in active)
    assert " " not in text.strip()
    assert abs(sum(active) - (settings.end - settings.start) * total) <= 1
    assert all(Settings().active_at(index, total) for index in range(total))


def test_the_defaults_are_the_balanced_preset() -> None:
    assert Settings() == Settings.from_mapping({"preset": "balanced"})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_set_the_same_knobs_and_nothing_else(name: str) -> None:
    assert set(PRESETS[name].values) == {"method", "top_k", "recentre", "share", "reuse", "find_styles"}
    changed = Settings(temperature=0.5, patch_size=3).with_values({"preset": name})
    assert (changed.temperature, changed.patch_size) == (0.5, 3)
    assert {knob: getattr(changed, knob) for knob in PRESETS[name].values} == PRESETS[name].values
    # What stands beside a preset counts, in whatever order.
    assert Settings.from_mapping({"reuse": 5, "preset": name}).reuse == 5


def test_knobs_that_change_nothing_are_said() -> None:
    settings = Settings(temperature=0.05, top_k=1)
    (sentence,) = settings.without_effect(["temperature", "top_k", "enabled", "nothing"])
    assert sentence.startswith(
        "temperature = 0.05 has no effect with LoRAtorio, relative. The methods that use it: LoRAtorio."
    )
    assert settings.without_effect(["top_k"]) == []
    # At its default nobody meant anything by it.
    assert Settings().without_effect(["temperature"]) == []
    assert Settings(temperature=0.05, method="loratorio").without_effect(["temperature"]) == []
    single = Settings(single_maps=True)
    assert single.without_effect(["single_maps"]) == ["single_maps has no effect without weight_maps."]
    assert Settings(single_maps=True, weight_maps=True).without_effect(["single_maps"]) == []
    assert len(Settings(method="switch", recentre=1.0, share=0.5).without_effect(["recentre", "share"])) == 2


def test_a_preset_by_name_or_label_and_none_is_none() -> None:
    assert find_preset(" Fast ") is PRESETS["fast"]
    assert Settings.from_mapping({"preset": None, "reuse": 3}) == Settings(reuse=3)
    with pytest.raises(LoratorioError, match="preset must be one of paper, balanced, fast, not 3"):
        Settings.from_mapping({"preset": 3})

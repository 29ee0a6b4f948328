"""Roles: what a tag says, what a file looks like, and the participants that come of it."""

from __future__ import annotations

import pytest
import torch

from loratorio.adapters.bank import Bank
from loratorio.adapters.delta import Adapter
from loratorio.errors import LoratorioError
from loratorio.prompt.roles import (
    TaggedLora,
    assigned_roles,
    looks_like_speed_lora,
    participants_of,
    recognised_note,
    unknown_options_note,
)
from loratorio.sampling.engine import Engine
from loratorio.sampling.step import Step
from tests.published import paper


@pytest.mark.parametrize(
    "name",
    [
        "lcm-lora-sdv1-5",
        "LCM_LoRA_Weights_SD15",
        "sdxl_lightning_4step_lora",
        "Hyper-SD15-8steps-CFG-lora",
        "hyper-flux-8steps",
        "sd_xl_turbo_lora_v1",
        "FLUX.1-Turbo-Alpha",
        "dmd2_sdxl_4step_lora",
        "speed/SDXL-Lightning-8steps",
        "Qwen-Image-Lightning-8steps-V1.0",
        "flux_turbo_8step",
        "Lightning LoRA",
    ],
)
def test_speed_loras_are_known_by_name(name: str) -> None:
    assert looks_like_speed_lora(name)


@pytest.mark.parametrize(
    "name",
    [
        "calcmovies",
        "lightning_bolt",
        "hyperrealism_v2",
        "porsche_turbo",
        "add_detail",
        "hyper detailer",
        "robot",
        "lcmx",
        "hyper-realistic_xl",
        "Lightning power SDXL",
        "hyperdetail_8steps",
        "turbo charger style flux",
    ],
)
def test_other_loras_are_not(name: str) -> None:
    assert not looks_like_speed_lora(name)


def test_speed_loras_are_known_by_metadata() -> None:
    assert looks_like_speed_lora("pytorch_lora_weights", {"modelspec.title": "LCM LoRA for SD 1.5"})
    assert looks_like_speed_lora("a", {"ss_output_name": "sdxl_lightning_2step"})
    assert not looks_like_speed_lora("a", {"ss_output_name": "my_dog"})


def test_the_tag_has_the_last_word() -> None:
    parts = assigned_roles(
        [
            TaggedLora("lcm-lora"),
            TaggedLora("lcm-dog", {"role": "content"}),
            TaggedLora("ink", {"role": " Style "}),
            TaggedLora("cat", {"role": "always"}),
        ]
    )
    assert [part.role for part in parts] == ["always", "content", "style", "always"]
    assert [part.recognised for part in parts] == [True, False, False, False]
    note = recognised_note(parts)
    assert "lcm-lora" in note
    assert "role=content" in note
    assert recognised_note(parts[1:]) == ""


def test_unknown_arguments_of_a_tag_are_said() -> None:
    loras = [
        TaggedLora("ink", {"rolle": "style", "role": "style"}),
        TaggedLora("cat", {"lbw": "x", "at": "left"}),
    ]
    assert unknown_options_note(loras, ["lbw"]) == (
        "Unknown options in LoRA tags, which have no effect: rolle= of LoRA ink (did you mean role?)."
    )
    assert "lbw= of LoRA cat" in unknown_options_note(loras)
    assert unknown_options_note(loras[1:], ["lbw"]) == ""


def test_an_unknown_role_is_a_sentence() -> None:
    with pytest.raises(LoratorioError, match=r"role of LoRA ink .* did you mean style"):
        assigned_roles([TaggedLora("ink", {"role": "styl"})])


def test_cast() -> None:
    loras = [
        TaggedLora("lcm-lora"),
        TaggedLora("robot"),
        TaggedLora("ink", {"role": "style"}),
        TaggedLora("hat", pooled=True),
    ]
    participants = participants_of(loras)
    assert participants.base == (1.0, 0.0, 0.0, 0.0)
    assert participants.mixes == [(1.0, 1.0, 0.0, 0.0), (1.0, 0.0, 1.0, 0.0), (1.0, 0.0, 0.0, 1.0)]
    assert [lora.style for lora in participants.loras] == [False, True, False]
    assert [lora.pooled for lora in participants.loras] == [False, False, True]
    assert participants.numbers == [1, 2, 3]
    assert participants.named == (1.0, 1.0, 1.0, 0.0)


def test_speed_loras_alone_are_simply_merged() -> None:
    loras = Bank([Adapter("lcm-lora", {})])
    engine = Engine(paper(), loras, participants_of([TaggedLora("lcm-lora")]))
    result = engine.step(Step(0, 4, torch.zeros(1, 4, 2, 2), 1), lambda rows: torch.ones(len(rows), 4, 2, 2))
    assert bool((result.cond == 1).all())

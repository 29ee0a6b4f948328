"""The layers in a LoRA file by its tensors' names."""

from __future__ import annotations

import pytest

from loratorio.hosts.shared.lora_layers import layers, unread_magnitudes_note


@pytest.mark.parametrize(
    "suffixes",
    [
        ("alpha", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"),
        ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"),
        ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"),
        ("lora_A.mine.weight", "lora_B.mine.weight", "lora_B.mine.bias", "lora_magnitude_vector.mine"),
        ("lora_down.weight", "lora_up.weight", "magnitude", "alpha"),
        ("hada_w1_a.mine", "hada_w1_b.mine"),
        ("lokr_w1.mine", "lokr_w2_a.mine"),
        ("lora.down.weight", "lora.up.weight"),
        ("hada_w1_a", "hada_w1_b", "hada_t1", "alpha"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha"),
        ("a1.weight", "b2.weight"),
        ("diff", "diff_b"),
        ("w_norm", "b_norm"),
        ("oft_blocks", "oft_diag", "rescale"),
        ("weight", "on_input"),
        ("alpha", "lora_down.bias", "lora_up.bias"),
    ],
)
@pytest.mark.parametrize("layer", ["lora_unet_down_blocks_0", "diffusion_model.double_blocks.0.img_attn.qkv"])
def test_the_tensors_of_a_layer_are_of_one(layer: str, suffixes: tuple[str, ...]) -> None:
    names = [f"{layer}.{suffix}" for suffix in suffixes]
    assert layers([*names, "bundle_emb.word.string_to_param.*"]) == {layer}
    assert len(layers([*names, f"{layer}_other.alpha"])) == 2


@pytest.mark.parametrize(
    "tail",
    [
        "magnitude",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.mine.weight",
    ],
)
def test_magnitudes_that_no_webui_reads_are_named(tail: str) -> None:
    names = ["lora_unet_mid_block.lora_up.weight", f"lora_unet_mid_block.{tail}"]
    said = unread_magnitudes_note("x", names)
    assert "LoRA x is a DoRA" in said
    assert names[1] in said
    assert not unread_magnitudes_note("x", [names[0], "lora_unet_mid_block.dora_scale"])

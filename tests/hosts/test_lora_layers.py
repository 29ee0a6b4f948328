"""The layers in a LoRA file by its tensors' names."""

from __future__ import annotations

import pytest

from loratorio.hosts.shared.lora_layers import layers


@pytest.mark.parametrize(
    "suffixes",
    [
        ("alpha", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale"),
        ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"),
        ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"),
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

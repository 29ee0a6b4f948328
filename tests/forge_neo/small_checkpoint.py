"""Writes a small random DiT, as one file that Forge Neo loads whole, and LoRAs for it as its trainers write them.

    NEO/venv/bin/python tests/forge_neo/small_checkpoint.py NEO MODEL

MODEL: one of `MODELS`. Into NEO/models/Stable-diffusion goes small-MODEL.safetensors, into NEO/models/Lora MODEL-FORMAT.safetensors.
Text encoders have two layers, or narrow ones: the host reads their size off a config.json of its own, which is changed (and kept as
config.json.whole).
For language models the host needs the extension `tests/forge_neo/small_encoders`, too.
`tests/webui/test_dits.py` says how to run on them.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

neo, model_name = Path(sys.argv[1]).resolve(), sys.argv[2]
sys.argv = ["launch.py", "--cpu", "--force-fp32", "--use-pytorch-cross-attention", "--disable-gpu-warning"]
sys.path[:0] = [str(neo), str(neo / "modules_forge" / "packages")]

import torch  # noqa: E402
from modules_forge.initialization import initialize_forge  # noqa: E402

initialize_forge()

from backend import operations  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

CPU = torch.device("cpu")
CONFIGS = neo / "backend" / "huggingface"
State = dict[str, torch.Tensor]


def shrink_language_models() -> dict[str, dict[str, int]]:
    """What the extension does in the host. Returns its `SIZES`."""
    extension = Path(__file__).parent / "small_encoders" / "scripts" / "small_encoders.py"
    sizes: dict[str, dict[str, int]] = runpy.run_path(str(extension))["SIZES"]
    return sizes


def shrunk(folder: Path, **changes: Any) -> dict[str, Any]:
    """A component's configuration with these numbers, which from now on is the host's, too."""
    file, whole = folder / "config.json", folder / "config.json.whole"
    if not whole.exists():
        whole.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    config: dict[str, Any] = {**json.loads(whole.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return config


def random_state(make: Any, prefix: str, seed: int) -> State:
    """A module's weights in bfloat16, of the size that keeps numbers as large as they came in; norms are whole."""
    with operations.using_forge_operations(device=CPU, dtype=torch.float32, manual_cast_enabled=False):
        module = make()
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            state[prefix + name] = tensor
        elif tensor.ndim < 2:
            last = name.rsplit(".", 1)[-1]
            whole = ("norm" in name and last != "bias") or "scale" in last or last == "running_var"
            made = torch.randn(tensor.shape, generator=generator) * 0.05 + (1.0 if whole else 0.0)
            state[prefix + name] = made.to(torch.bfloat16)
        else:
            made = torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5
            state[prefix + name] = made.to(torch.bfloat16)
    return state


def vae(folder: Path, prefix: str) -> State:
    from backend.nn.vae import IntegratedAutoencoderKL

    config = IntegratedAutoencoderKL.load_config(str(folder))
    return random_state(lambda: IntegratedAutoencoderKL.from_config(config), prefix, 2)


def wan_vae(folder: Path, prefix: str) -> State:
    from backend.nn.wan_vae import WanVAE

    config = WanVAE.load_config(str(folder))
    return random_state(lambda: WanVAE.from_config(config), prefix, 2)


def flux() -> tuple[State, State]:
    """A Flux of 512 channels, two double and two single blocks; its VAE and CLIP-L of full size, T5 of two layers."""
    from backend.nn.clip import IntegratedCLIP
    from backend.nn.flux import IntegratedFluxTransformer2DModel
    from backend.nn.t5 import IntegratedT5
    from transformers import CLIPTextConfig, CLIPTextModel

    home = CONFIGS / "black-forest-labs" / "FLUX.1-dev"
    t5 = shrunk(home / "text_encoder_2", d_model=256, d_kv=64, d_ff=512, num_heads=4, num_layers=2)
    config = {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 256, "hidden_size": 512, "mlp_ratio": 4.0,
        "num_heads": 4, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip
    clip = CLIPTextConfig.from_pretrained(str(home / "text_encoder"))
    dit = random_state(lambda: IntegratedFluxTransformer2DModel(**config), "", 1)
    text = random_state(
        lambda: IntegratedCLIP(CLIPTextModel, clip, add_text_projection=True), "text_encoders.clip_l.", 3
    )
    return dit, {
        **text,
        **random_state(lambda: IntegratedT5(t5), "text_encoders.t5xxl.", 4),
        **vae(home / "vae", "vae."),
    }


def z_image() -> tuple[State, State]:
    """A Z-Image of its full width, which the host insists on, with two layers; a narrow Qwen3; its VAE of full size."""
    from backend.nn.llm.llama import Qwen3_4B
    from backend.nn.lumina import NextDiT

    home = CONFIGS / "Tongyi-MAI" / "Z-Image-Turbo"
    qwen = shrunk(home / "text_encoder", **shrink_language_models()["Qwen3_4BConfig"])
    config = {
        "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 2, "qk_norm": True, "n_heads": 30,
        "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True, "time_scale": 1000.0,
    }  # fmt: skip
    dit = random_state(lambda: NextDiT(**config), "", 1)
    text = random_state(lambda: Qwen3_4B(qwen), "text_encoders.qwen3_4b.transformer.", 3)
    return dit, {**text, **vae(home / "vae", "vae.")}


def qwen_image() -> tuple[State, State]:
    """A Qwen-Image of its full width, which its class fixes, with two layers; a narrow Qwen2.5-VL of two layers; its VAE of full size."""
    from backend.nn.llm.llama import Qwen25_7BVLI
    from backend.nn.qwen import QwenImageTransformer2DModel

    home = CONFIGS / "Qwen" / "Qwen-Image"
    text = shrunk(home / "text_encoder", **shrink_language_models()["Qwen25_7BVLI_Config"])
    dit = random_state(lambda: QwenImageTransformer2DModel(num_layers=2), "", 1)
    return dit, {
        # Without the others' "transformer.": under that name the host finds no weight, and says so in its log only.
        **random_state(lambda: Qwen25_7BVLI(text), "text_encoders.qwen25_7b.", 3),
        **wan_vae(home / "vae", "vae."),
    }


def lumina() -> tuple[State, State]:
    """A Lumina 2 of its full width, which the host insists on, with two layers; Gemma 2 of two layers; its VAE of full size."""
    from backend.nn.llm.llama import Gemma2_2B
    from backend.nn.lumina import NextDiT

    shrink_language_models()
    home = CONFIGS / "neta-art" / "Neta-Lumina"
    text = shrunk(home / "text_encoder", num_hidden_layers=2)
    config = {
        "patch_size": 2, "in_channels": 16, "dim": 2304, "cap_feat_dim": 2304, "n_layers": 2, "qk_norm": True, "n_heads": 24,
        "n_kv_heads": 8, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512], "rope_theta": 10000.0,
        "ffn_dim_multiplier": 4.0,
    }  # fmt: skip
    dit = random_state(lambda: NextDiT(**config), "", 1)
    return dit, {
        **random_state(lambda: Gemma2_2B(text), "text_encoders.gemma2_2b.transformer.", 3),
        **vae(home / "vae", "vae."),
    }


def flux2() -> tuple[State, State]:
    """A Flux 2 (klein, 4 B) of its full width, which the host insists on, with one double and one single block; a narrow Qwen3."""
    from backend.nn.flux import IntegratedFluxTransformer2DModel
    from backend.nn.llm.llama import Qwen3_4B
    from backend.nn.vae import AutoencoderKLFlux2

    home = CONFIGS / "black-forest-labs" / "FLUX.2-klein-4B"
    qwen = shrunk(home / "text_encoder", **shrink_language_models()["Qwen3_4BConfig"])
    config = {
        "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 3 * 2560, "hidden_size": 3072,
        "mlp_ratio": 3.0, "num_heads": 24, "depth": 1, "depth_single_blocks": 1, "axes_dim": [32, 32, 32, 32], "theta": 2000,
        "patch_size": 1, "qkv_bias": False, "guidance_embed": False, "txt_ids_dims": [3], "global_modulation": True,
        "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0,
    }  # fmt: skip
    dit = random_state(lambda: IntegratedFluxTransformer2DModel(**config), "", 1)
    vae_config = AutoencoderKLFlux2.load_config(str(home / "vae"))
    return dit, {
        **random_state(lambda: Qwen3_4B(qwen), "text_encoders.qwen3_4b.transformer.", 3),
        **random_state(lambda: AutoencoderKLFlux2.from_config(vae_config), "vae.", 2),
    }


def krea() -> tuple[State, State]:
    """A Krea 2 of 512 channels with two blocks; a narrow Qwen3-VL whose vision is of full size; its VAE of full size."""
    from backend.nn.krea import SingleStreamDiT
    from backend.nn.llm.llama import Qwen3VL

    width = shrink_language_models()["Qwen3VL_4BConfig"]["hidden_size"]
    config = {"features": 512, "heads": 4, "kvheads": 2, "layers": 2, "txtlayers": 12, "txtdim": width}
    dit = random_state(lambda: SingleStreamDiT(**config), "", 1)
    return dit, {
        **random_state(lambda: Qwen3VL({}), "text_encoders.qwen3vl_4b.transformer.", 3),
        **wan_vae(CONFIGS / "krea" / "Krea-2-Raw" / "vae", "vae."),
    }


def chroma() -> tuple[State, State]:
    """A Chroma of its full width, which the host insists on, with two double and two single blocks; T5 of two layers."""
    from backend.nn.chroma import IntegratedChromaTransformer2DModel
    from backend.nn.t5 import IntegratedT5

    home = CONFIGS / "Chroma"
    tokenizer = "tokenizer.json"  # T5's, which the host's folder for Chroma is without
    shutil.copy(CONFIGS / "black-forest-labs" / "FLUX.1-dev" / "tokenizer_2" / tokenizer, home / "tokenizer")
    t5 = shrunk(home / "text_encoder", d_model=256, d_kv=64, d_ff=512, num_heads=4, num_layers=2)
    config = {
        "in_channels": 64, "out_channels": 64, "context_in_dim": 256, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
        "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
        "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5, "txt_ids_dims": [], "vec_in_dim": None,
    }  # fmt: skip
    dit = random_state(lambda: IntegratedChromaTransformer2DModel(**config), "", 1)
    # By this name the host tells a Chroma from a Flux.
    dit = {
        re.sub(r"(distilled_guidance_layer\.norms\.\d)\.weight", r"\1.scale", name): dit[name] for name in dit
    }
    return dit, {
        **random_state(lambda: IntegratedT5(t5), "text_encoders.t5xxl.", 4),
        **vae(home / "vae", "vae."),
    }


def anima() -> tuple[State, State]:
    """An Anima of its full size, which the host insists on; Qwen3 of two layers; its VAE of full size."""
    from backend.nn.anima import Anima
    from backend.nn.llm.llama import Qwen3_06B

    shrink_language_models()
    home = CONFIGS / "circlestone-labs" / "Anima"
    text = shrunk(home / "text_encoder")
    config = {
        "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 2048,
        "concat_padding_mask": True, "crossattn_emb_channels": 1024, "adaln_lora_dim": 256, "num_blocks": 28, "num_heads": 16,
        "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
    }  # fmt: skip
    dit = random_state(lambda: Anima(**config), "", 1)
    prefix = "text_encoders.qwen3_06b.transformer."
    encoder = random_state(lambda: Qwen3_06B(text), prefix, 3)
    # By the adapter between both, which files have among the DiT's weights, the host knows an Anima.
    dits = {
        name.replace(f"{prefix}llm_adapter", "model.diffusion_model.llm_adapter"): name for name in encoder
    }
    return dit, {
        **{theirs: encoder[name] for theirs, name in dits.items()},
        **wan_vae(home / "vae", "vae."),
    }


# -- LoRAs ---------------------------------------------------------------------------------------------------------------

RANK, STRENGTH = 2, 0.3
"""How large a LoRA's change is by the weight's norm."""


def matrices(dit: State, parts: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the linear layers whose names have one of these parts."""
    for name, weight in dit.items():
        if name.endswith(".weight") and weight.ndim == 2 and any(part in name for part in parts):
            yield name.removesuffix(".weight"), weight


def pair(weight: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Up (out, rank) and down (rank, in), whose product has `STRENGTH` of the weight's norm."""
    up = torch.randn(len(weight), RANK, generator=generator)
    down = torch.randn(RANK, weight.shape[1], generator=generator)
    return up, down * (STRENGTH * weight.norm() / (up @ down).norm())


def kohya(dit: State, parts: tuple[str, ...], generator: torch.Generator) -> State:
    made = {}
    for name, weight in matrices(dit, parts):
        up, down = pair(weight, generator)
        key = f"lora_unet_{name.replace('.', '_')}"
        made |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        made[f"{key}.alpha"] = torch.tensor(float(RANK))
    return made


def named_as_peft(weights: Iterable[tuple[str, torch.Tensor]], generator: torch.Generator) -> State:
    """A pair for each of these layers, under the names that peft gives to the two."""
    made = {}
    for key, weight in weights:
        up, down = pair(weight, generator)
        made |= {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down}
    return made


def comfy(dit: State, parts: tuple[str, ...], generator: torch.Generator) -> State:
    own = ((f"diffusion_model.{name}", weight) for name, weight in matrices(dit, parts))
    return named_as_peft(own, generator)


def lokr(dit: State, parts: tuple[str, ...], generator: torch.Generator) -> State:
    """LyCORIS' Kronecker products, under kohya's names."""
    made = {}
    for name, weight in matrices(dit, parts):
        out, width = weight.shape
        one = torch.randn(4, 4, generator=generator)
        two = torch.randn(out // 4, width // 4, generator=generator)
        two *= STRENGTH * weight.norm() / (one.norm() * two.norm())
        key = f"lora_unet_{name.replace('.', '_')}"
        made |= {f"{key}.lokr_w1": one, f"{key}.lokr_w2": two, f"{key}.alpha": torch.tensor(1.0)}
    return made


def flux_diffusers(dit: State, generator: torch.Generator) -> State:
    """As diffusers and ai-toolkit name a Flux, or a Chroma: q, k and v apart, which here are rows of one layer."""
    width = dit["img_in.weight"].shape[0]

    def layers() -> Iterator[tuple[str, torch.Tensor]]:
        for block in range(2):
            for own, theirs in (
                ("img_attn", ("to_q", "to_k", "to_v")),
                ("txt_attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                for part, rows in zip(
                    theirs, dit[f"double_blocks.{block}.{own}.qkv.weight"].split(width), strict=True
                ):
                    yield f"transformer.transformer_blocks.{block}.attn.{part}", rows
            yield (
                f"transformer.transformer_blocks.{block}.ff.net.0.proj",
                dit[f"double_blocks.{block}.img_mlp.0.weight"],
            )
            fused = dit[f"single_blocks.{block}.linear1.weight"]
            single = f"transformer.single_transformer_blocks.{block}"
            for number, part in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
                yield f"{single}.{part}", fused[number * width : (number + 1) * width]
            yield f"{single}.proj_mlp", fused[3 * width :]

    return named_as_peft(layers(), generator)


def z_image_diffusers(dit: State, generator: torch.Generator) -> State:
    """As diffusers names a Z-Image: q, k and v apart."""

    def layers() -> Iterator[tuple[str, torch.Tensor]]:
        for block in range(2):
            fused = dit[f"layers.{block}.attention.qkv.weight"]
            for part, rows in zip(("to_q", "to_k", "to_v"), fused.chunk(3), strict=True):
                yield f"diffusion_model.layers.{block}.attention.{part}", rows

    return named_as_peft(layers(), generator)


def flux2_diffusers(dit: State, generator: torch.Generator) -> State:
    """As diffusers names a Flux 2: q, k and v apart in double blocks, with the hidden layer together in single ones."""
    width = dit["img_in.weight"].shape[0]

    def layers() -> Iterator[tuple[str, torch.Tensor]]:
        fused = dit["double_blocks.0.img_attn.qkv.weight"].split(width)
        for part, rows in zip(("to_q", "to_k", "to_v"), fused, strict=True):
            yield f"transformer.transformer_blocks.0.attn.{part}", rows
        yield "transformer.transformer_blocks.0.ff.linear_in", dit["double_blocks.0.img_mlp.0.weight"]
        single = "transformer.single_transformer_blocks.0.attn"
        yield f"{single}.to_qkv_mlp_proj", dit["single_blocks.0.linear1.weight"]
        yield f"{single}.to_out", dit["single_blocks.0.linear2.weight"]

    return named_as_peft(layers(), generator)


def krea_diffusers(dit: State, generator: torch.Generator) -> State:
    """As diffusers names a Krea 2."""
    names = {
        "attn.wq": "attn.to_q",
        "attn.wk": "attn.to_k",
        "attn.wv": "attn.to_v",
        "attn.wo": "attn.to_out.0",
    }
    names |= {"mlp.gate": "ff.gate", "mlp.up": "ff.up", "mlp.down": "ff.down"}

    def layers() -> Iterator[tuple[str, torch.Tensor]]:
        for block in range(2):
            for own, theirs in names.items():
                yield f"transformer.transformer_blocks.{block}.{theirs}", dit[f"blocks.{block}.{own}.weight"]

    return named_as_peft(layers(), generator)


def own_names(dit: State, generator: torch.Generator) -> State:
    """As diffusers and ai-toolkit name a model whose file has diffusers' own names, or names that are nobody's but its own."""
    strange = ("adaln", "mod", "llm_adapter")
    layers = (
        (f"transformer.{name}", weight)
        for name, weight in matrices(dit, ("attn", "mlp"))
        if "blocks." in name and not any(part in name for part in strange)
    )
    return named_as_peft(layers, generator)


MODELS = {
    "flux": (flux, ("double_blocks", "single_blocks"), flux_diffusers),
    "z_image": (z_image, ("layers.",), z_image_diffusers),
    "lumina": (lumina, ("layers.",), None),
    "qwen_image": (qwen_image, ("attn", "mlp"), own_names),
    "krea": (krea, ("attn", "mlp"), krea_diffusers),
    "flux2": (flux2, ("double_blocks", "single_blocks"), flux2_diffusers),
    "chroma": (chroma, ("double_blocks", "single_blocks"), flux_diffusers),
    "anima": (
        anima,
        ("self_attn.",),
        own_names,
    ),  # the host and LoRAtorio hold a LoKr as whole matrices: of all layers 8 GB
}


def main() -> None:
    make, parts, diffusers = MODELS[model_name]
    dit, others = make()
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in dit.items()} | others
    checkpoint = neo / "models" / "Stable-diffusion" / f"small-{model_name}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, checkpoint)
    print(checkpoint)
    for seed, (name, tensors) in enumerate(
        (
            ("kohya", kohya(dit, parts, torch.Generator().manual_seed(11))),
            ("comfy", comfy(dit, parts, torch.Generator().manual_seed(12))),
            ("lokr", lokr(dit, parts, torch.Generator().manual_seed(13))),
            ("diffusers", diffusers and diffusers(dit, torch.Generator().manual_seed(14))),
        )
    ):
        if not tensors:  # the host cannot read this model's LoRAs in that form
            continue
        file = neo / "models" / "Lora" / f"{model_name}-{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        print(seed, file, len(tensors))


main()

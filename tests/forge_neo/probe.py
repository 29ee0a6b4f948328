"""Runs inside Forge Neo's Python, in its folder: one of its model classes, tiny and random, composed and merged.

    python probe.py FOLDER_OF_LORATORIO MODEL [STORAGE]

prints one line of JSON: relative errors of one LoRA to the host's own merge, of all to merging one at a time, and what is left.
STORAGE is how the matrices of linear layers are stored: float32, float8 or gguf (Q8_0). The host merges into
low-bit weights by rounding them again, so what LoRAtorio draws is then compared with a float32 model of the very same weights.
"""

import json
import os
import sys
import tempfile
from types import SimpleNamespace

project, model_name, storage = (*sys.argv[1:], "float32")[:3]
scratch = tempfile.mkdtemp()
sys.argv = ["launch.py", "--cpu", "--force-fp32", "--use-pytorch-cross-attention", "--disable-gpu-warning"]
sys.argv += ["--lora-dir", scratch]
here = os.getcwd()
sys.path[:0] = [here, f"{here}/extensions-builtin/sd_forge_lora", f"{here}/modules_forge/packages", project]

from modules_forge.initialization import initialize_forge  # noqa: E402

initialize_forge()

import torch  # noqa: E402
from modules import initialize  # noqa: E402

initialize.imports()

import networks  # noqa: E402
from backend import operations  # noqa: E402
from backend.modules.k_prediction import PredictionDiscreteFlow, PredictionFlux  # noqa: E402
from backend.operations_gguf import ParameterGGUF  # noqa: E402
from backend.patcher.unet import UnetPatcher  # noqa: E402
from backend.sampling import sampling_function as host_sampling  # noqa: E402
from backend.sampling.condition import compile_conditions, compile_weighted_conditions  # noqa: E402
from modules_forge.packages import gguf  # noqa: E402
from modules_forge.packages.huggingface_guess import model_list  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from loratorio.compose.methods.loratorio import by_similarity, spatial_weights  # noqa: E402
from loratorio.hosts.forge import Forge  # noqa: E402
from loratorio.job import Job  # noqa: E402
from loratorio.settings import Settings  # noqa: E402

CPU = torch.device("cpu")
QKV = ("to_q", "to_v")


class DictWithShape(dict):
    """As the host's prompt parser makes it for models with pooled text."""

    @property
    def shape(self):
        return self["crossattn"].shape

    def advanced_indexing(self, item):
        return DictWithShape({key: value[item] for key, value in self.items()})


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def is_matrix(name, tensor):
    return name.endswith("weight") and tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "embed" not in name


def stored(state):
    """The weights as they are stored, and as they read."""
    kept, read = dict(state), dict(state)
    for name, weight in state.items():
        if not is_matrix(name, weight):
            continue
        if storage == "float8":
            kept[name] = weight.to(torch.float8_e4m3fn)
            read[name] = kept[name].to(torch.float32)
        elif storage == "gguf":
            kind = gguf.GGMLQuantizationType.Q8_0
            kept[name] = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
            read[name] = ParameterGGUF(kept[name], tensor_type=kind, tensor_shape=weight.shape)
            read[name] = read[name].dequantize_as_pytorch_parameter().data.to(torch.float32)
    if storage == "gguf":
        # As its loader makes them: all parameters are of this class, the small ones with no blocks.
        kept = {
            name: ParameterGGUF(
                tensor,
                tensor_type=kind if is_matrix(name, state[name]) else gguf.GGMLQuantizationType.F32,
                tensor_shape=state[name].shape,
            )
            for name, tensor in kept.items()
        }
    return kept, read


def patcher(make, config, guess, predictor):
    """The model as it is stored, and in float32."""

    def built(dtype, manual_cast=False, kind=None):
        with operations.using_forge_operations(
            device=CPU, dtype=dtype, manual_cast_enabled=manual_cast, bnb_dtype=kind
        ):
            return make(**config)

    model = built(torch.float32).to(torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            shift = 1.0 if parameter.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + shift)
    if storage == "float32":
        unet = patched(model, config, guess, predictor)
        return unet, unet
    kept, read = stored({name: tensor.clone() for name, tensor in model.state_dict().items()})
    model.load_state_dict(read)
    if storage == "gguf":
        low = built(torch.float32, kind="gguf")
        low.load_state_dict(kept)
    else:
        low = built(torch.float32, manual_cast=True)
        low.load_state_dict(read)
        for name, layer in low.named_modules():
            if isinstance(layer, torch.nn.Linear) and kept[f"{name}.weight"].dtype != torch.float32:
                layer.weight = torch.nn.Parameter(kept[f"{name}.weight"], requires_grad=False)
    return patched(low, config, guess, predictor), patched(model, config, guess, predictor)


def patched(model, config, guess, predictor):
    model.config = config
    model.storage_dtype = model.computation_dtype = torch.float32
    model.load_device = model.offload_device = model.initial_device = CPU
    config = SimpleNamespace(
        huggingface_repo=guess.huggingface_repo,
        memory_usage_factor=1.0,
        sampling_settings=guess.sampling_settings,
        inpaint_model=lambda: False,
    )
    return UnetPatcher.from_model(model, None, config, k_predictor=predictor(config))


def lora(unet, seed, low_rank):
    generator, tensors, rank = torch.Generator().manual_seed(seed), {}, 2
    for name, layer in unet.model.diffusion_model.named_modules():
        weight = getattr(layer, "weight", None)
        if weight is None or weight.ndim != 2 or (not low_rank and "mod" in name):
            continue
        out, width = weight.shape
        one, two, three, four = (
            torch.randn(*shape, generator=generator) for shape in ((out, rank), (rank, width)) * 2
        )
        key = f"diffusion_model.{name}"
        if low_rank:
            tensors[f"{key}.lora_B.weight"] = one
            tensors[f"{key}.lora_A.weight"] = two * (0.4 * weight.norm() / (one @ two).norm())
        else:
            scale = (0.3 * weight.norm() / ((one @ two) * (three @ four)).norm()) ** 0.25
            for part, matrix in zip(("w1_a", "w1_b", "w2_a", "w2_b"), (one, two, three, four), strict=True):
                tensors[f"{key}.hada_{part}"] = matrix * scale
    return tensors


def diffusers_lora(names, width):
    """A LoRA with the names that diffusers gives to parts of fused layers."""
    return {
        f"{name}.{part}.weight": seeded(*shape) * 0.3
        for name, out in names.items()
        for part, shape in (("lora_B", (out, 2)), ("lora_A", (2, width)))
    }


def flux():
    from backend.nn.flux import IntegratedFluxTransformer2DModel

    config = {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 48, "hidden_size": 64, "mlp_ratio": 4.0,
        "num_heads": 4, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip
    unet = patcher(IntegratedFluxTransformer2DModel, config, model_list.Flux, PredictionFlux)
    names = {f"transformer.transformer_blocks.{b}.attn.{part}": 64 for b in range(2) for part in QKV}
    names |= {f"transformer.single_transformer_blocks.{b}.proj_mlp": 256 for b in range(2)}
    text = {"crossattn": seeded(2, 8, 48), "vector": seeded(2, 32), "guidance": torch.tensor([3.5, 3.5])}
    return unet, DictWithShape(text), None, seeded(2, 16, 8, 8), diffusers_lora(names, 64)


def z_image():
    from backend.nn.lumina import NextDiT

    config = {
        "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4,
        "multiple_of": 32, "ffn_dim_multiplier": 8 / 3, "qk_norm": True, "cap_feat_dim": 48, "axes_dims": [16, 24, 24],
        "axes_lens": [64, 64, 64], "rope_theta": 256.0, "z_image_modulation": True, "time_scale": 1000.0,
        "pad_tokens_multiple": 4,
    }  # fmt: skip
    unet = patcher(NextDiT, config, model_list.ZImage, PredictionDiscreteFlow)
    names = {f"diffusion_model.layers.{b}.attention.{part}": 256 for b in range(2) for part in QKV}
    return unet, seeded(2, 8, 48), seeded(2, 8, 48) * 0.5, seeded(2, 16, 8, 8), diffusers_lora(names, 256)


def qwen_image():
    from backend.nn.qwen import QwenImageTransformer2DModel

    config = {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 4, "joint_attention_dim": 48, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    unet = patcher(QwenImageTransformer2DModel, config, model_list.QwenImage, PredictionDiscreteFlow)
    return unet, seeded(2, 8, 48), seeded(2, 8, 48) * 0.5, seeded(2, 16, 1, 8, 8), None


def anima():
    from backend.nn.anima import Anima

    config = {
        "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64,
        "crossattn_emb_channels": 48, "adaln_lora_dim": 16, "num_blocks": 2, "num_heads": 4,
    }  # fmt: skip
    unet = patcher(Anima, config, model_list.Anima, PredictionDiscreteFlow)
    return unet, seeded(2, 8, 48), seeded(2, 8, 48) * 0.5, seeded(2, 16, 1, 8, 8), None


def wan():
    from backend.nn.wan import WanModel

    config = {
        "model_type": "t2v", "patch_size": (1, 2, 2), "text_len": 8, "in_dim": 16, "dim": 64, "ffn_dim": 128, "freq_dim": 32,
        "text_dim": 48, "out_dim": 16, "num_heads": 4, "num_layers": 2,
    }  # fmt: skip
    unet = patcher(WanModel, config, model_list.Flux, PredictionDiscreteFlow)
    return unet, seeded(1, 8, 48), seeded(1, 8, 48) * 0.5, seeded(1, 16, 3, 8, 8), None


class Probe:
    def __init__(self, unets, cond, uncond, x, fused):
        self.unet, self.twin = unets
        self.cond, self.uncond, self.x = cond, uncond, x
        self.clip = SimpleNamespace(cond_stage_model=torch.nn.Module())
        self.files = []
        for number, tensors in enumerate(
            [lora(self.twin, 1, True), lora(self.twin, 2, False), fused or lora(self.twin, 3, True)]
        ):
            self.files.append(f"{scratch}/{number}.safetensors")
            save_file({key: value.contiguous() for key, value in tensors.items()}, self.files[-1])

    def merged(self, *files, into=None):
        unet = into or self.twin
        for file in files:
            tensors = networks.load_lora_state_dict(file)
            # This host's merging into GGUF's blocks leaves the model unusable: its users choose "on the fly".
            unet, _ = networks.load_lora_for_models(
                unet,
                self.clip,
                tensors,
                1.0,
                1.0,
                filename=file,
                online_mode=into is not None and storage == "gguf",
            )
        return unet

    def host(self, unet):
        """The host's guided, conditional and unconditional D."""
        host_sampling.sampling_prepare(unet, x=self.x)
        cond = compile_weighted_conditions(self.cond, [[(i, 1.0)] for i in range(len(self.x))])
        scale = 1.0 if self.uncond is None else 3.0
        sigma = torch.full((len(self.x),), 0.7)
        return host_sampling.sampling_function_inner(
            unet.model,
            self.x,
            sigma,
            compile_conditions(self.uncond),
            cond,
            scale,
            unet.model_options,
            return_full=True,
        )

    def composed(self, *files, merged_before=True, **knobs):
        def objects(unet):
            return SimpleNamespace(unet=unet, clip=self.clip)

        loaded = self.merged(*files, into=self.unet)
        if merged_before:
            host_sampling.sampling_prepare(loaded, x=self.x)  # a former merge stands in the weights
        sd_model = SimpleNamespace(
            forge_objects=objects(loaded),
            forge_objects_original=objects(self.unet),
            forge_objects_after_applying_lora=objects(loaded),
            current_lora_hash=str([[file, 1.0, 1.0, False] for file in files]),
        )
        denoiser = SimpleNamespace(step=0, steps=4, total_steps=4, update_inner_model=lambda: None)
        sampler = SimpleNamespace(model_wrap_cfg=denoiser, launch_sampling=lambda steps, func: func())
        p = SimpleNamespace(
            sd_model=sd_model,
            sampler=sampler,
            extra_network_data={},
            cfg_scale=3.0,
            iteration=0,
            extra_generation_params={},
        )
        settings = Settings(
            enabled=True, method="loratorio", patch_size=2, temperature=0.05, adaptive=False, **knobs
        )
        Forge().before_sampling(Job(p, settings))

        def step():
            result = self.host(sd_model.forge_objects.unet)
            denoiser.step += 1
            return result

        return sampler.launch_sampling(4, step)[0]

    def reference(self):
        """The paper's formulas on what the host predicts with one LoRA merged at a time, λ = 0.5."""
        base, *solos = [self.host(self.merged(*files)) for files in ([], *([file] for file in self.files))]
        conds = torch.stack([solo[1] for solo in solos])

        def fold(latents):
            return latents.movedim(2, 1).flatten(0, 1) if latents.ndim == 5 else latents

        noise = torch.stack([fold(self.x - cond) for cond in conds])
        weights = spatial_weights(fold(self.x - base[1]), noise, by_similarity(0.05), 2)
        if self.x.ndim == 5:
            weights = weights.unflatten(1, (len(self.x), self.x.shape[2]))
        weights = weights[:, :, None]
        cond = (weights * conds).sum(0)
        if self.uncond is None:
            return cond
        unconds = torch.stack([solo[2] for solo in solos])
        uncond = 0.5 * base[2] + 0.5 * (weights * unconds).sum(0)
        return uncond + 3 * (cond - uncond)


def error(one, other):
    return float((one - other).norm() / other.norm())


with torch.inference_mode():
    probe = Probe(*globals()[model_name]())
    # First of all, when the host has not sampled with this model yet.
    fresh = [probe.composed(file, merged_before=False, recentre=0) for file in probe.files]
    before = probe.host(probe.unet)[0]
    own = [probe.host(probe.merged(file))[0] for file in probe.files]
    solo = [error(one, other) for one, other in zip(fresh, own, strict=True)]
    solo += [
        error(probe.composed(file, recentre=0), other) for file, other in zip(probe.files, own, strict=True)
    ]
    all_three = error(probe.composed(*probe.files, recentre=0.5), probe.reference())
    effect = [error(probe.host(probe.merged(file))[0], before) for file in probe.files]
    after = probe.host(probe.unet)[0]
    hooks = sum(len(layer._forward_hooks) for layer in probe.unet.model.modules())
print(
    json.dumps(
        {
            "plain": error(before, probe.host(probe.twin)[0]),
            "solo": solo,
            "all": all_three,
            "effect": effect,
            "same": bool(torch.equal(before, after)),
            "hooks": hooks,
        }
    )
)

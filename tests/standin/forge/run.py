"""A stand-in WebUI to put jobs to: `Standin("neo")`, `Standin("forge")` or `Standin("reforge")`, its LoRAs and its jobs."""

import functools
import zlib
from types import SimpleNamespace

import networks
import torch
from backend import memory_management
from backend.patcher import CLIP, ForgePatcher, NeoPatcher, ReForgePatcher
from modules import processing, shared

WIDTH = 6


class Linear(torch.nn.Module):
    """Forge's own, which is not torch's."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = torch.nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = torch.nn.Parameter(torch.randn(out_features) * 0.1)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


class UNet(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.kv = linear(WIDTH, 16)
        self.down = torch.nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.conv_out = torch.nn.Conv2d(8, 4, 1)

    def forward(self, x, t, context, control=None, transformer_options=None, **kwargs):
        assert not kwargs, kwargs
        frames = x.shape[2] if x.ndim == 5 else 1
        h = x.movedim(2, 1).flatten(0, 1) if x.ndim == 5 else x
        h = torch.nn.functional.silu(self.norm(self.conv_in(h)))
        k, v = self.kv(context).chunk(2, dim=-1)
        text = (torch.softmax(k, dim=1) * v).sum(dim=1) + t[:, None] / 20
        h = h + text.repeat_interleave(frames, 0)[..., None, None]
        if control is not None:
            h = h + control
        middle = torch.tanh(self.down(h))
        replaced = (transformer_options or {}).get("patches_replace", {}).get("attn1", {})
        if ("middle", 0) in replaced:
            tokens = middle.flatten(2).transpose(1, 2)
            tokens = replaced["middle", 0](tokens, tokens, tokens, transformer_options)
            middle = tokens.transpose(1, 2).reshape(middle.shape)
        h = h + torch.nn.functional.interpolate(middle, scale_factor=2.0)
        h = self.conv_out(h)
        return h.reshape(-1, frames, *h.shape[1:]).movedim(1, 2) if x.ndim == 5 else h


class KModel(torch.nn.Module):
    computation_dtype = torch.float32
    manual_cast_dtype = None

    def __init__(self, unet):
        super().__init__()
        self.diffusion_model = unet
        self.calls = []
        self.fails = None

    def apply_model(
        self, x, t, c_crossattn=None, control=None, control_model=None, transformer_options=None, **kwargs
    ):
        self.calls.append(len(x))
        if self.fails is not None:
            self.fails(len(x))
        sigma = t.view(-1, *[1] * (x.ndim - 1))
        noise = self.diffusion_model(x / (1 + sigma), t, c_crossattn, control, transformer_options, **kwargs)
        return x - sigma * noise

    def get_dtype(self):
        return torch.float32

    def memory_required(self, shape, cond_shapes=None):
        return shape[0]


class TextEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.text = torch.nn.Linear(WIDTH, WIDTH)


class ForgeObjects:
    def __init__(self, unet, clip):
        self.unet, self.clip = unet, clip

    def shallow_copy(self):
        return ForgeObjects(self.unet, self.clip)


class Model:
    def __init__(self, variant, name="base", seed=1, unet=UNet):
        torch.manual_seed(seed)
        patcher = {"neo": NeoPatcher, "forge": ForgePatcher, "reforge": ReForgePatcher}[variant]
        self.name, self.variant = name, variant
        self.forge_objects = ForgeObjects(
            patcher(KModel(unet(Linear if variant == "forge" else torch.nn.Linear))),
            CLIP(patcher(TextEncoder())),
        )
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()
        self.current_lora_hash = str([])

    @property
    def model(self):
        return self.forge_objects_original.unet.model

    def encode(self, text):
        """Four tokens a chunk, as many chunks as it takes."""
        self.forge_objects.clip.patcher.load()
        vectors = [self.vector(word) for word in text.split()]
        vectors += [torch.zeros(WIDTH)] * (-len(vectors) % 4 or (0 if vectors else 4))
        return self.forge_objects.clip.patcher.model.text(torch.stack(vectors))

    @staticmethod
    def vector(word):
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


class ControlNet:
    """Sees every row's latent and text."""

    previous_controlnet = None

    def __init__(self):
        self.batches = []

    def get_control(self, x, sigma, cond, batched_number, transformer_options=None):
        self.batches.append((len(x), batched_number))
        return cond["c_crossattn"].mean(dim=(1, 2)).view(-1, 1, 1, 1) + x.mean(dim=1, keepdim=True) / 50


def tag(name, text=1.0, unet=1.0, metadata=None, **named):
    """<lora:name:text:unet:key=value>"""
    return SimpleNamespace(positional=[name, text, unet], named=named, metadata=metadata or {})


class Standin:
    def __init__(self, variant):
        shared.state.interrupted = False
        memory_management.free = 1e12
        networks.loaded_networks.clear()
        networks.files.clear()
        keeps = variant != "neo"
        networks.load_lora_state_dict = (
            functools.lru_cache(5)(networks.read_file) if keeps else networks.read_file
        )
        for cache in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
            setattr(processing.StableDiffusionProcessing, cache, [None, None, None])
        self.model = shared.sd_model = Model(variant)

    def lora(self, name, seed, text=True, unet=True, full=False):
        """A file with a low-rank part for the convolutions and for one half of a fused layer, and one for text."""
        generator = torch.Generator().manual_seed(seed)

        def low_rank(out, into, *kernel, rank=2):
            up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * 0.4
            return (
                "lora",
                up,
                torch.randn(rank, into, *kernel, generator=generator) * 0.4,
                1.0,
                None,
                None,
                None,
            )

        file = {}
        if unet:
            file = {
                "diffusion_model.conv_in.weight": low_rank(8, 4, 3, 3),
                "diffusion_model.down.weight": low_rank(8, 8, 3, 3),
                "diffusion_model.kv.weight|0,8,8": low_rank(8, WIDTH),
            }
        if full:
            file["diffusion_model.norm.weight"] = "diff", torch.randn(8, generator=generator) * 0.3
            file["diffusion_model.conv_out.bias"] = "diff", torch.randn(4, generator=generator) * 0.3
            file["diffusion_model.kv.weight"] = "diff", torch.randn(16, WIDTH, generator=generator) * 0.3
        if text:
            file["text.weight"] = low_rank(WIDTH, WIDTH)
        networks.files[f"/loras/{name}"] = file
        return name

    def job(self, *tags, prompts=("a red circle",), negative="blurry", hires=None, **fields):
        tags = [tag(each) if isinstance(each, str) else each for each in tags]
        if hires is not None:
            prompts2, tags2 = hires
            tags2 = [tag(each) if isinstance(each, str) else each for each in tags2]
            fields.update(hr_prompts=list(prompts2), hr_extra_network_data={"lora": tags2})
        data = {"lora": tags} if tags else {}
        return processing.StableDiffusionProcessing(prompts, negative, extra_network_data=data, **fields)

    def img2img(self, *tags, prompts=("a red circle",), negative="blurry", **fields):
        data = {"lora": [tag(each) if isinstance(each, str) else each for each in tags]}
        return processing.StableDiffusionProcessingImg2Img(
            prompts, negative, extra_network_data=data, **fields
        )

    def run(self, p):
        shared.sd_model = self.model
        return processing.process_images(p)

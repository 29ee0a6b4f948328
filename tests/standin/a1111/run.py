"""A stand-in WebUI to put jobs to: `Standin()`, its LoRAs and its jobs."""

import zlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import networks
import torch
from modules import processing, sd_hijack, shared

WIDTH = 6


class UNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = networks.Conv2d(4, 8, 3, padding=1)
        self.norm = networks.GroupNorm(2, 8)
        self.to_k = networks.Linear(WIDTH, 8)
        self.down = networks.Conv2d(8, 8, 3, stride=2, padding=1)
        self.conv_out = networks.Conv2d(8, 4, 1)

    def forward(self, x, t, text, image):
        h = torch.nn.functional.silu(self.norm(self.conv_in(x)))
        h = h + torch.tanh(self.to_k(text)).mean(dim=1)[..., None, None] + t.view(-1, 1, 1, 1) / 20
        h = h + torch.nn.functional.interpolate(torch.tanh(self.down(h)), scale_factor=2.0)
        return self.conv_out(h) + image.mean(dim=(1, 2, 3), keepdim=True)


class Model:
    """Seeded, and with as little as the adapter touches of a WebUI's model."""

    def __init__(self, name, seed, xl=False):
        torch.manual_seed(seed)
        self.name, self.xl = name, xl
        self.sd_checkpoint_info = SimpleNamespace(filename=name)
        self.cond_stage_key, self.is_sd3 = "txt", False
        unet, self.text = UNet(), networks.Linear(WIDTH, WIDTH)
        self.model = SimpleNamespace(diffusion_model=unet, conditioning_key="crossattn")
        layers = {f"diffusion_model_{name}": layer for name, layer in unet.named_children()}
        self.network_layer_mapping = {**layers, "transformer_text": self.text}
        for name, layer in self.network_layer_mapping.items():
            layer.network_layer_name = name
        self.calls = []
        self.fails = None

    def apply_model(self, x, sigma, cond):
        self.calls.append(len(x))
        if self.fails is not None:
            self.fails(len(x))
        text = cond["crossattn"] if self.xl else cond["c_crossattn"][0]
        if self.xl:
            text = text + cond["vector"][:, None, :]
        return self.model.diffusion_model(x / (1 + sigma.view(-1, 1, 1, 1)), sigma, text, cond["c_concat"][0])

    def encode(self, text):
        """Four tokens a chunk, as many chunks as it takes."""
        vectors = []
        for word in text.split():
            embedding = sd_hijack.model_hijack.embedding_db.word_embeddings.get(word)
            vectors += [self.vector(word)] if embedding is None else list(embedding.vec)
        vectors += [torch.zeros(WIDTH)] * (-len(vectors) % 4 or (0 if vectors else 4))
        encoded = self.text(torch.stack(vectors))
        return {"crossattn": encoded, "vector": encoded.mean(dim=0)} if self.xl else encoded

    @staticmethod
    def vector(word):
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


@dataclass
class Tag:
    """<lora:name:te:unet:key=value>"""

    net: networks.Network
    te: float = 1.0
    unet: float = 1.0
    named: dict = field(default_factory=dict)

    @property
    def positional(self):
        return [self.net.mentioned_name, self.te, self.unet]


class Standin:
    def __init__(self, xl=False):
        for name, value in shared.DEFAULTS.items():
            setattr(shared.opts, name, value)
        shared.state.interrupted = False
        networks.loaded_networks.clear()
        sd_hijack.model_hijack.embedding_db.word_embeddings.clear()
        for holder in (processing.StableDiffusionProcessing, processing.StableDiffusionProcessingTxt2Img):
            holder.cached_c, holder.cached_uc = [None, None], [None, None]
        processing.StableDiffusionProcessingTxt2Img.cached_hr_c = [None, None]
        processing.StableDiffusionProcessingTxt2Img.cached_hr_uc = [None, None]
        self.model = shared.sd_model = Model("base", 1, xl)
        self.refiner = Model("refiner", 2, xl)

    def lora(self, name, seed, rank=2, text=True, layers=("conv_in", "to_k", "down", "conv_out"), **metadata):
        """A LoRA with a low-rank part for each of these UNet layers, and for the text encoder."""
        torch.manual_seed(seed)
        net = networks.Network(name, metadata)
        keys = [f"diffusion_model_{layer}" for layer in layers] + (["transformer_text"] if text else [])
        for key in keys:
            weight = self.model.network_layer_mapping[key].weight
            down = torch.randn(rank, *weight.shape[1:]) * 0.4
            up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2)) * 0.4
            net.modules[key] = networks.NetworkModuleLora(net, key, down, up, alpha=rank / 2)
        return net

    def full(self, name, seed, dtype=torch.float32):
        """A LoRA of a dense kind, with biases and a norm."""
        torch.manual_seed(seed)
        net = networks.Network(name)
        for layer in ("conv_in", "norm", "to_k"):
            key = f"diffusion_model_{layer}"
            target = self.model.network_layer_mapping[key]
            net.modules[key] = networks.NetworkModuleFull(
                net, key, torch.randn(target.weight.shape).to(dtype) * 0.3, torch.randn(8) * 0.3
            )
        return net

    def ia3(self, name, seed):
        torch.manual_seed(seed)
        net = networks.Network(name)
        for layer in ("to_k", "conv_out"):
            key = f"diffusion_model_{layer}"
            target = self.model.network_layer_mapping[key]
            net.modules[key] = networks.NetworkModuleIa3(net, key, torch.randn(target.weight.shape[0]) * 0.5)
        return net

    def bundle(self, net, word, seed, vectors=5):
        """Put a textual inversion into a LoRA; like the WebUI, it is known while the LoRA is active: here, from now on."""
        torch.manual_seed(seed)
        embedding = SimpleNamespace(name=word, vec=torch.randn(vectors, WIDTH), loaded=True)
        net.bundle_embeddings[word] = embedding
        sd_hijack.model_hijack.embedding_db.register_embedding(embedding, self.model)

    def job(self, *tags, prompts=("a red circle",), negative="blurry", hires=None, **fields):
        tags = [tag if isinstance(tag, Tag) else Tag(tag) for tag in tags]
        data = {"lora": tags} if tags else {}
        if hires is not None:
            prompts2, tags2 = hires
            fields.update(
                hr_prompts=list(prompts2),
                hr_negative_prompts=[negative] * len(prompts2),
                hr_extra_network_data={"lora": [net if isinstance(net, Tag) else Tag(net) for net in tags2]},
            )
        shared.sd_model = self.model
        return processing.StableDiffusionProcessingTxt2Img(
            prompts, negative, extra_network_data=data, **fields
        )

    def img2img(self, *tags, prompts=("a red circle",), negative="blurry", **fields):
        data = {"lora": [tag if isinstance(tag, Tag) else Tag(tag) for tag in tags]}
        shared.sd_model = self.model
        return processing.StableDiffusionProcessingImg2Img(
            prompts, negative, extra_network_data=data, **fields
        )

    @staticmethod
    def run(p):
        return processing.process_images(p)

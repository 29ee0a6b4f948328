"""The built-in extension sd_forge_lora. A LoRA file is a dict: name of weight, or "name|axis,start,length", to (kind, tensors…)."""

from types import SimpleNamespace

from backend.patcher import Adapter
from modules import shared

loaded_networks = []
files = {}


def read_file(path):
    return files[path]


load_lora_state_dict = read_file
"""Forge's and reForge's keep the last five files, whatever becomes of them."""


def load_lora_for_models(model, clip, lora, strength_model, strength_clip, filename="default", **online_mode):
    """reForge's takes no `online_mode`, and clones a patcher whether or not the LoRA has something for it."""
    reforge = model.variant == "reforge"
    assert not (reforge and online_mode)
    made = []
    for patcher, part, strength in (
        (model, "diffusion_model.", strength_model),
        (clip.patcher, "text.", strength_clip),
    ):
        patches = {}
        for key, (kind, *tensors) in lora.items():
            name, _, offset = key.partition("|")
            if name.startswith(part):
                is_adapter = patcher.variant != "forge" and kind == "lora"
                place = (name, tuple(map(int, offset.split(",")))) if offset else name
                patches[place] = Adapter(kind, tensors) if is_adapter else (kind, tuple(tensors))
        clone = patcher.clone()
        loaded = clone.add_patches(filename, patches, strength)
        made.append(clone if loaded or reforge else patcher)
    if made[1] is not clip.patcher:
        clip = clip.clone(made[1])
    return made[0], clip


def activate(data):
    """`data`: {"lora": [tag, …]}, a tag with `positional` (name, text strength, UNet strength) and `named`."""
    model = shared.sd_model
    loaded_networks.clear()
    targets = []
    for tag in (data or {}).get("lora", ()):
        name, text, unet = tag.positional
        on_disk = SimpleNamespace(filename=f"/loras/{name}", metadata=tag.metadata)
        loaded_networks.append(SimpleNamespace(network_on_disk=on_disk, mentioned_name=name))
        targets.append([on_disk.filename, unet, text, *([] if model.variant == "reforge" else [False])])
    if model.current_lora_hash == str(targets):
        return
    model.current_lora_hash = str(targets)
    model.forge_objects.unet = model.forge_objects_original.unet
    model.forge_objects.clip = model.forge_objects_original.clip
    for path, unet, text, *online in targets:
        model.forge_objects.unet, model.forge_objects.clip = load_lora_for_models(
            model.forge_objects.unet,
            model.forge_objects.clip,
            dict(load_lora_state_dict(path)),
            unet,
            text,
            path,
            **({"online_mode": online[0]} if online else {}),
        )
    model.forge_objects_after_applying_lora = model.forge_objects.shallow_copy()

"""Neo's (and reForge's) and Forge's patchers: what differs is where patches stand, and when weights are merged anew."""

import copy
import uuid
from types import SimpleNamespace

import torch
from backend.patcher.lora import merge_lora_to_weight
from backend.utils import get_attr


class Adapter:
    """Of Neo's `weight_adapter`: up, down, alpha, mid, DoRA scale, new shape."""

    def __init__(self, name, weights):
        self.name, self.weights = name, weights

    def calculate_weight(self, weight, strength, function):
        up, down, alpha = self.weights[:3]
        scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
        weight += function((up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * scale)
        return weight


class Patcher:
    variant = None

    def __init__(self, model):
        self.model = model
        self.model_options = {"transformer_options": {}}
        self.load_device = torch.device("cpu")
        self.controlnet_linked_list = None
        self.preserved = 0

    def clone(self):
        n = type(self)(self.model)
        n.model_options = copy.deepcopy(self.model_options)
        n.controlnet_linked_list = self.controlnet_linked_list
        n.preserved = self.preserved
        return n

    def add_extra_preserved_memory_during_sampling(self, size):
        self.preserved += size

    def by_weight(self, patches, strength):
        sorted_patches = {}
        for key, value in patches.items():
            name, offset = (key, None) if isinstance(key, str) else key
            if name in self.model.state_dict():
                sorted_patches.setdefault(name, []).append((strength, value, 1.0, offset, None, False))
        return sorted_patches

    def write(self, key, weight):
        with torch.no_grad():
            get_attr(self.model, key).copy_(weight)

    def merge(self, patches, backup):
        for key, own in patches.items():
            backup[key] = get_attr(self.model, key).detach().clone()
            self.write(key, merge_lora_to_weight(own, backup[key].clone(), key))


class NeoPatcher(Patcher):
    variant = "neo"

    def __init__(self, model):
        super().__init__(model)
        self.patches, self.backup = {}, {}
        self.patches_uuid = uuid.uuid4()
        if not hasattr(model, "current_weight_patches_uuid"):
            model.current_weight_patches_uuid = None

    def clone(self):
        n = super().clone()
        n.patches = {key: patches[:] for key, patches in self.patches.items()}
        n.patches_uuid, n.backup = self.patches_uuid, self.backup
        return n

    def add_patches(self, filename, patches, strength):
        own = self.by_weight(patches, strength)
        for key, value in own.items():
            self.patches[key] = self.patches.get(key, []) + value
        self.patches_uuid = uuid.uuid4()
        return own

    def load(self):
        if self.model.current_weight_patches_uuid == self.patches_uuid:
            return
        for key, backup in self.backup.items():
            self.write(key, backup.weight)
        self.backup.clear()
        plain = {}
        self.merge(self.patches, plain)
        self.backup.update({key: SimpleNamespace(weight=weight) for key, weight in plain.items()})
        self.model.current_weight_patches_uuid = self.patches_uuid


class ReForgePatcher(NeoPatcher):
    variant = "reforge"


class ForgePatcher(Patcher):
    variant = "forge"

    def __init__(self, model):
        super().__init__(model)
        self.lora_patches = {}
        if not hasattr(model, "lora_loader"):
            model.lora_loader = SimpleNamespace(backup={}, loaded_hash=str([]))

    def clone(self):
        n = super().clone()
        n.lora_patches = self.lora_patches.copy()
        return n

    def add_patches(self, filename, patches, strength):
        own = self.by_weight(patches, strength)
        self.lora_patches[(filename, strength, 1.0, False)] = own
        return own

    def load(self):
        loader = self.model.lora_loader
        hashes = str(list(self.lora_patches))
        if hashes == loader.loaded_hash:
            return
        for key, weight in loader.backup.items():
            self.write(key, weight)
        loader.backup = {}
        together = {}
        for patches in self.lora_patches.values():
            for key, own in patches.items():
                together[key] = together.get(key, []) + own
        self.merge(together, loader.backup)
        loader.loaded_hash = hashes


class CLIP:
    def __init__(self, patcher):
        self.patcher = patcher

    def clone(self, patcher=None):
        return CLIP(patcher or self.patcher.clone())

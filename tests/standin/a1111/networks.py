"""The built-in extension Lora: `loaded_networks` is merged into layers when they run."""

import torch
from network import NetworkOnDisk

loaded_networks = []
available_networks, available_network_aliases, forbidden_network_aliases = {}, {}, {}


class Network:
    """A LoRA. `modules` by layer name; multipliers are set when it is activated."""

    def __init__(self, name, metadata=None):
        self.name = self.mentioned_name = name
        self.network_on_disk = NetworkOnDisk(name, None, metadata)
        self.te_multiplier = self.unet_multiplier = 1.0
        self.dyn_dim = None
        self.mtime = 0.0
        self.modules = {}
        self.bundle_embeddings = {}


class NetworkModule:
    def __init__(self, net, key):
        self.network, self.sd_key, self.network_key = net, key, f"lora_{key}.alpha"
        self.bias = self.dora_scale = None

    def multiplier(self):
        return (
            self.network.te_multiplier if "transformer" in self.sd_key[:20] else self.network.unet_multiplier
        )

    def calc_scale(self):
        return 1.0


class NetworkModuleLora(NetworkModule):
    def __init__(self, net, key, down, up, alpha=None):
        super().__init__(net, key)
        self.down_model, self.up_model = _holder(down), _holder(up)
        self.mid_model = None
        self.alpha = alpha

    def calc_scale(self):
        return 1.0 if self.alpha is None else self.alpha / self.down_model.weight.shape[0]

    def calc_updown(self, weight):
        up, down = self.up_model.weight.flatten(1), self.down_model.weight.flatten(1)
        if self.network.dyn_dim is not None:
            up, down = up[:, : self.network.dyn_dim], down[: self.network.dyn_dim]
        return (up @ down).reshape(weight.shape) * self.calc_scale() * self.multiplier(), None


class NetworkModuleFull(NetworkModule):
    """Also stands for every other kind without a low rank; like LoHa it needs a matrix product, which a CPU lacks in fp16."""

    def __init__(self, net, key, diff, diff_b=None):
        super().__init__(net, key)
        self.weight, self.ex_bias = diff, diff_b

    def calc_updown(self, weight):
        if self.weight.dtype == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        bias = None if self.ex_bias is None else self.ex_bias * self.multiplier()
        return self.weight.reshape(weight.shape) * self.multiplier(), bias


class NetworkModuleIa3(NetworkModule):
    """Depends on the base weight."""

    def __init__(self, net, key, w):
        super().__init__(net, key)
        self.w = w

    def calc_updown(self, weight):
        return weight * self.w.reshape(-1, *[1] * (weight.ndim - 1)) * self.multiplier(), None


def _holder(weight):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def network_apply_weights(layer):
    name = getattr(layer, "network_layer_name", None)
    if name is None:
        return
    wanted = tuple((x.name, x.te_multiplier, x.unet_multiplier, x.dyn_dim) for x in loaded_networks)
    if getattr(layer, "network_current_names", ()) == wanted:
        return
    if getattr(layer, "network_weights_backup", None) is None:
        layer.network_weights_backup = layer.weight.detach().clone(), layer.bias.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(layer.network_weights_backup[0])
        layer.bias.copy_(layer.network_weights_backup[1])
        for net in loaded_networks:
            if name in net.modules:
                try:
                    weight, bias = net.modules[name].calc_updown(layer.weight)
                    layer.weight += weight
                    if bias is not None:
                        layer.bias += bias
                except RuntimeError:
                    pass  # the WebUI counts it
    layer.network_current_names = wanted


class Linear(torch.nn.Linear):
    def forward(self, x):
        network_apply_weights(self)
        return super().forward(x)


class Conv2d(torch.nn.Conv2d):
    def forward(self, x):
        network_apply_weights(self)
        return super().forward(x)


class GroupNorm(torch.nn.GroupNorm):
    def forward(self, x):
        network_apply_weights(self)
        return super().forward(x)

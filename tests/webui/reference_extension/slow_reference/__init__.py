"""LoRAtorio the slow way: the composition as a loop over patches in float64, as METHOD.md's formulas read. One file for each kind of host.

Shares no code with LoRAtorio.
"""

import torch

run = {}
"""The job that is composed (`p`), its `knobs`, and what a host's part remembers; empty for all other jobs."""


def omega(noise, patch_size, temperature, top_k):
    """Weights (images, H, W) of every LoRA; `noise`: the base's prediction, then the LoRAs', (images, C, H, W) each.

    Latents with frames, (images, C, frames, H, W): every frame for itself, weights (images, frames, H, W).
    """
    if noise[0].ndim == 5:
        frames = zip(*(each.unbind(2) for each in noise), strict=True)
        by_frame = [omega(frame, patch_size, temperature, top_k) for frame in frames]
        return [torch.stack(each, dim=1) for each in zip(*by_frame, strict=True)]
    base, adapters = noise[0], noise[1:]
    batch, _, height, width = base.shape
    weights = [torch.zeros(batch, height, width, dtype=torch.float64, device=base.device) for _ in adapters]
    for b in range(batch):
        for y in range(0, height, patch_size):
            for x in range(0, width, patch_size):
                patch = (b, slice(None), slice(y, y + patch_size), slice(x, x + patch_size))
                near = [
                    torch.nn.functional.cosine_similarity(
                        e[patch].flatten(), base[patch].flatten(), dim=0, eps=1e-30
                    )
                    for e in adapters
                ]
                shares = torch.softmax(-torch.stack(near) / temperature, dim=0)
                if top_k:
                    shares[torch.argsort(shares, descending=True)[top_k:]] = 0
                    shares = shares / shares.sum()
                for w, share in zip(weights, shares, strict=True):
                    w[b, y : y + patch_size, x : x + patch_size] = share
    return weights

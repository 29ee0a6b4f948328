"""LoRAtorio the slow way: the composition as a loop over patches in float64, as the paper's formulas read (arXiv
2508.11624). One file for each kind of host.

Shares no code with LoRAtorio.
"""

import torch

run = {}
"""The job that is composed (`p`), its `knobs`, and what a host's part remembers; empty for all other jobs."""


def omega(noise, knobs):
    """Weights (images, H, W) of every LoRA; `noise`: the base's prediction, then the LoRAs', (images, C, H, W) each.

    Latents with frames, (images, C, frames, H, W): every frame for itself, weights (images, frames, H, W).
    """
    if noise[0].ndim == 5:
        frames = zip(*(each.unbind(2) for each in noise), strict=True)
        by_frame = [omega(frame, knobs) for frame in frames]
        return [torch.stack(each, dim=1) for each in zip(*by_frame, strict=True)]
    base, adapters, size = noise[0], noise[1:], knobs["patch_size"]
    batch, _, height, width = base.shape
    weights = [torch.zeros(batch, height, width, dtype=torch.float64, device=base.device) for _ in adapters]
    for b in range(batch):
        corners = [(y, x) for y in range(0, height, size) for x in range(0, width, size)]
        near = {
            (y, x): similarities(base, adapters, (b, slice(None), slice(y, y + size), slice(x, x + size)))
            for y, x in corners
        }
        far = sum(1 - each for each in near.values()) / len(near)
        for y, x in corners:
            if knobs.get("method") == "relative":
                own = 1 - near[y, x]
                parts = own**0.5 * (own / far) ** 1.5
                shares = parts / parts.sum()
            else:
                shares = torch.softmax(-near[y, x] / knobs["temperature"], dim=0)
            if knobs["top_k"]:
                shares[torch.argsort(shares, descending=True)[knobs["top_k"] :]] = 0
                shares = shares / shares.sum()
            for w, share in zip(weights, shares, strict=True):
                w[b, y : y + size, x : x + size] = share
    return weights


def similarities(base, adapters, patch):
    """The cosine of each LoRA's patch to the base's, (N,)."""
    one = base[patch].flatten()
    return torch.stack(
        [torch.nn.functional.cosine_similarity(e[patch].flatten(), one, dim=0, eps=1e-30) for e in adapters]
    )

"""One layer's tensors of every kind of LoRA, by kohya's and LyCORIS' tails, and what they add to its weight by the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = (
    *("lora", "loha", "lokr", "lokr-one-factored", "lokr-full", "diff"),
    *("lora-tucker", "loha-tucker", "lokr-tucker"),
    *("lora-dora", "loha-dora", "lokr-dora"),
)
BY_BLOCKS = "oft"
"""kohya's and LyCORIS' OFT; its rank is the number of blocks, its alpha a limit."""

ALPHAS = (None, 0.5, 1.0, 3.0, 0.0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def weights_of(
    kind: str, shape: tuple[int, ...], rank: int, alpha: float | None, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """One layer's tensors by kohya's and LyCORIS' tails."""
    random = torch.Generator().manual_seed(seed)
    out, inside = shape[0], torch.Size(shape[1:]).numel()

    def normal(*sides: int) -> Tensor:
        return (torch.randn(*sides, generator=random) * 0.3).to(dtype)

    base, tucker = kind.removesuffix("-dora").removesuffix("-tucker"), kind.endswith("-tucker")
    kernel = shape[2:]
    own: dict[str, Tensor] = {}
    if base == "lora":
        own = {
            "lora_down.weight": normal(rank, *shape[1:]),
            "lora_up.weight": normal(out, rank, *[1] * len(kernel)),
        }
        if tucker:
            own["lora_down.weight"] = normal(rank, shape[1], 1, 1)
            own["lora_mid.weight"] = normal(rank, rank, *kernel)
    elif base == "loha" and tucker:
        own = {f"hada_w{i}_a": normal(rank, out) for i in (1, 2)}
        own |= {f"hada_w{i}_b": normal(rank, shape[1]) for i in (1, 2)}
        own |= {f"hada_t{i}": normal(rank, rank, *kernel) for i in (1, 2)}
    elif base == "loha":
        own = {f"hada_w{i}_a": normal(out, rank) for i in (1, 2)}
        own |= {f"hada_w{i}_b": normal(rank, inside) for i in (1, 2)}
    elif base == "lokr" and tucker:
        own = {"lokr_w1": normal(4, 4), "lokr_t2": normal(rank, rank, *kernel)}
        own |= {"lokr_w2_a": normal(rank, out // 4), "lokr_w2_b": normal(rank, shape[1] // 4)}
    elif base == "lokr":
        own = {"lokr_w1_a": normal(4, rank), "lokr_w1_b": normal(rank, 4)}
        own |= {"lokr_w2_a": normal(out // 4, rank), "lokr_w2_b": normal(rank, inside // 4)}
    elif base == "lokr-one-factored":
        own = {
            "lokr_w1": normal(4, 4),
            "lokr_w2_a": normal(out // 4, rank),
            "lokr_w2_b": normal(rank, inside // 4),
        }
    elif base == "lokr-full":
        # Kernels whole, as trainers save them.
        own = {"lokr_w1": normal(4, 4), "lokr_w2": normal(out // 4, shape[1] // 4, *kernel)}
    elif base == "diff":
        return {"diff": normal(*shape)}
    elif base == BY_BLOCKS:
        own = {"oft_blocks": normal(rank, out // rank, out // rank)}
    if alpha is not None:
        own["alpha"] = torch.tensor(alpha)
    if kind.endswith("dora"):
        own["dora_scale"] = (torch.rand(out, *[1] * (len(shape) - 1), generator=random) + 0.5).to(dtype)
    return own


def formula(own: dict[str, Tensor], before: Tensor) -> Tensor:
    """What these tensors add to the weight `before`, float64."""
    given = {tail: tensor.double() for tail, tensor in own.items()}
    shape = before.shape

    def scale(rank: int) -> float:
        return float(given["alpha"]) / rank if "alpha" in given else 1.0

    if "diff" in given:
        return given["diff"].reshape(shape)
    if "oft_blocks" in given:
        limit = float(given["alpha"]) * shape[0] if "alpha" in given else float("inf")
        return _turned(given["oft_blocks"], limit, before.double())
    if "lora_mid.weight" in given:
        up, down = (given[f"lora_{end}.weight"].flatten(1) for end in ("up", "down"))
        # W[o,i,k,l] = Σ_rs up[o,r] mid[r,s,k,l] down[s,i]
        change = torch.einsum("or,rskl,si->oikl", up, given["lora_mid.weight"], down) * scale(len(down))
    elif "lora_up.weight" in given:
        down = given["lora_down.weight"].flatten(1)
        change = given["lora_up.weight"].flatten(1) @ down * scale(len(down))
    elif "hada_t1" in given:
        # W[o,i,k,l] = Σ_rs a[r,o] t[r,s,k,l] b[s,i]
        first, second = (
            torch.einsum(
                "ro,rskl,si->oikl", given[f"hada_w{i}_a"], given[f"hada_t{i}"], given[f"hada_w{i}_b"]
            )
            for i in (1, 2)
        )
        change = first * second * scale(len(given["hada_w1_b"]))
    elif "hada_w1_a" in given:
        first, second = (given[f"hada_w{i}_a"] @ given[f"hada_w{i}_b"] for i in (1, 2))
        change = first * second * scale(len(given["hada_w1_b"]))
    elif "lokr_t2" in given:
        second = torch.einsum("ro,rskl,si->oikl", given["lokr_w2_a"], given["lokr_t2"], given["lokr_w2_b"])
        # W[(a,o),(b,i)] = w1[a,b] w2[o,i], at every place of the kernel.
        change = torch.einsum("ab,oikl->aobikl", given["lokr_w1"], second) * scale(len(given["lokr_w2_b"]))
    else:
        factors, ranks = [], []
        for i in (1, 2):
            if f"lokr_w{i}" in given:
                factors.append(given[f"lokr_w{i}"].flatten(1))
            else:
                factors.append(given[f"lokr_w{i}_a"] @ given[f"lokr_w{i}_b"])
                ranks.append(len(given[f"lokr_w{i}_b"]))
        # Of a convolution the second factor has the kernel in its columns, as the weight laid flat has.
        change = torch.kron(*factors) * (scale(ranks[0]) if ranks else 1.0)
    change = change.reshape(shape)
    if "dora_scale" in given:
        merged = before.double() + change
        norm = merged.flatten(1).norm(dim=1).reshape(-1, *[1] * (len(shape) - 1))
        return merged / norm * given["dora_scale"] - before.double()
    return change


def _turned(blocks: Tensor, limit: float, before: Tensor) -> Tensor:
    """R = (I + Q)(I − Q)⁻¹ with the norm of Q = B − Bᵀ at most `limit`; R's columns times the weight's rows, block by block."""
    skew = blocks - blocks.transpose(1, 2)
    norm = float(skew.norm())
    skew = skew * min(norm, limit) / norm if norm else skew
    result, size = before.clone(), blocks.shape[1]
    one = torch.eye(size, dtype=torch.float64)
    for number, block in enumerate(skew):
        rows = slice(number * size, (number + 1) * size)
        rotation = (one + block) @ torch.linalg.inv(one - block)
        result[rows] = torch.tensordot(rotation.T, before[rows], dims=1)
    return result - before

"""LoRA-LEGO: the ranks of all LoRAs, clustered; one merged LoRA of the clusters' centroids (arXiv 2409.16167)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..lazy_torch import torch
from .base import Entry, Weights
from .merge import OneMix

if TYPE_CHECKING:
    from torch import Tensor

UNITS = 1.0
"""How many units the merged LoRA has, by the LoRAs' mean rank."""
ROUNDS = 100
"""At most so many rounds of k-means; it settles in a dozen."""


class Product(NamedTuple):
    """ΔW = upᵀ · down: down (r, in, …), up (r, out)."""

    down: Tensor
    up: Tensor


class Lego(OneMix):
    """LoRA-LEGO, for two LoRAs or more.

    Taken from the paper, as its abstract and summaries tell: rank by rank, a LoRA's row of `down` and column of `up` are one unit, a
    minimal semantic unit; all LoRAs' units of a layer are clustered by k-means, and the centroids are the merged LoRA's units. Both
    reweightings: each centroid is brought to the mean norm of its cluster's units (an average is shorter), and the product is scaled
    by √(r/k).
    Left open there: k (here the mean rank r), how a unit's scale is split between its halves (here evenly: both have one norm, so that
    α and the file's own split do not matter), where k-means starts (here at the units farthest apart, so that a seed is one picture),
    and what is no product of matrices, as LoHa, norms and biases (here merged).
    The text encoder's part of the LoRAs is merged.
    """

    def assembled(self, weights: Weights, numbers: Collection[int]) -> Mapping[str, Product]:
        made = {}
        for layer, by_number in weights.products():
            present = [Product(*product) for number, product in by_number.items() if number in numbers]
            if present:
                made[layer] = assembled(present) if len(present) > 1 else present[0]
        return made


def assembled(products: Sequence[Product], units: float = UNITS) -> Product:
    """One product of `units` times the mean rank of these, out of the centroids of their ranks' clusters.

    Args:
        products: of one layer: down (r, in, …) and up (r, out), float32 or float64.
    """
    halves = [_balanced(product) for product in products]
    downs, ups = (torch.cat(each) for each in zip(*halves, strict=True))
    mean_rank = sum(len(product.down) for product in products) / len(products)
    count = min(len(downs), max(1, round(units * mean_rank)))
    points = torch.cat([downs.flatten(1), ups], dim=1)
    mean = _means(clusters(points, count), count, points)
    length = (mean @ points).norm(dim=1)
    longer = torch.where(length > 0, (mean @ points.norm(dim=1)) / length, torch.zeros_like(length))
    filled = mean.any(dim=1).to(points.dtype).sum()
    # Both halves have the centroid's new norm, and the product's scale is shared out between them.
    factor = (longer * (mean_rank / filled) ** 0.25).unsqueeze(1)
    down = (factor * (mean @ downs.flatten(1))).reshape(-1, *downs.shape[1:])
    return Product(down, factor * (mean @ ups))


def _balanced(product: Product) -> tuple[Tensor, Tensor]:
    """Its matrices, each rank's two halves at one norm; a rank with a half that is zero is zero."""
    downs, ups = product.down.flatten(1).norm(dim=1), product.up.norm(dim=1)
    one_norm = (downs * ups).sqrt()
    down, up = (
        half * torch.where(length > 0, one_norm / length, one_norm).view(-1, *[1] * (half.ndim - 1))
        for half, length in ((product.down, downs), (product.up, ups))
    )
    return down, up


def _means(cluster: Tensor, count: int, like: Tensor) -> Tensor:
    """Each cluster's mean as weights of the points, (k, n); zeros where it has none."""
    numbers = torch.arange(count, device=like.device).unsqueeze(1)
    member = (numbers == cluster).to(like.dtype)
    return member / member.sum(dim=1, keepdim=True).clamp(min=1)


def clusters(points: Tensor, count: int) -> Tensor:
    """k-means after Lloyd: the cluster of each point, (n,), from 0 to count − 1.

    It starts at points that are far apart: the longest, then, one after another, that which is farthest from all chosen ones.

    Args:
        points: (n, d). count: from 1 to n.
    """
    # Distances are read off the inner products, which are few where points are long.
    products = points @ points.T
    squares = products.diagonal()
    chosen = [int(squares.argmax())]
    nearest = squares + squares[chosen[0]] - 2 * products[chosen[0]]
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, squares + squares[chosen[-1]] - 2 * products[chosen[-1]])
    # Centroids as weights of the points, (k, n).
    weights = torch.eye(len(points), dtype=points.dtype, device=points.device)[chosen]
    before = torch.full((len(points),), -1, device=points.device)
    for _ in range(ROUNDS):
        across = weights @ products  # a centroid's inner product with each point, (k, n)
        distances = (across * weights).sum(dim=1, keepdim=True) - 2 * across
        now = distances.argmin(dim=0)
        if bool((now == before).all()):
            break
        before = now
        means = _means(now, count, points)
        # A cluster that lost all its points stays where it was.
        weights = torch.where(means.any(dim=1, keepdim=True), means, weights)
    return before


LEGO = Lego(
    Entry(
        "lego",
        "LoRA-LEGO",
        "arXiv 2409.16167",
        "Builds one LoRA by clustering the ranks of all LoRAs and averaging each cluster.",
    )
)

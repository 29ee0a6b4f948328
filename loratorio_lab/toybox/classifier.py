"""A small network that recognises elements in a picture. The toybox and the benchmark are measured with it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratorio import toybox

WIDTH = 128
"""Length of a picture's feature vector."""

FILE = Path(__file__).parent / "classifier.safetensors"


def classifier_file(folder: Path) -> Path:
    """The classifier's file for a toybox in `folder`; for the one that ships, next to this file."""
    return FILE if folder == toybox.FOLDER else folder / "model" / FILE.name


Pictures = Tensor | np.ndarray | Sequence[Image.Image]


class Classifier(nn.Module):
    """Presence of each name, judged independently. forward: (B, 3, H, W) in [-1, 1] to logits (B, names).

    pixels: height of the pictures that it is trained on.
    """

    def __init__(self, names: Sequence[str], pixels: int) -> None:
        super().__init__()
        self.names, self.pixels = tuple(names), pixels
        sizes = (3, 32, 64, 96, WIDTH)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            layers += [
                nn.Conv2d(a, b, 5 if i == 0 else 3, stride=2, padding=2 if i == 0 else 1),
                nn.GroupNorm(8, b),
                nn.SiLU(),
            ]
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTH, len(self.names))

    def features(self, images: Tensor) -> Tensor:
        """(B, WIDTH): mean and peak of each channel over the picture, averaged."""
        h = self.body(images)
        pooled: Tensor = (h.mean(dim=(2, 3)) + h.amax(dim=(2, 3))) / 2
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def load_classifier(file: Path = FILE) -> Classifier:
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    model = Classifier(json.loads(about["names"]), int(about["pixels"]))
    model.load_state_dict({name: value.float() for name, value in load_file(file).items()})
    return model.eval().requires_grad_(False)


def save_classifier(model: Classifier, file: Path) -> None:
    """Write it in half precision, with its names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(weights, file, metadata={"names": json.dumps(model.names), "pixels": str(model.pixels)})


def as_tensor(pictures: Pictures, pixels: int) -> Tensor:
    """(B, 3, pixels, W) in [-1, 1] from PIL pictures, uint8 (B, H, W, 3) or a tensor that is one already. Other sizes are resized."""
    if isinstance(pictures, Tensor):
        return pictures.float()
    array = np.stack([np.asarray(p.convert("RGB") if isinstance(p, Image.Image) else p) for p in pictures])
    images = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
    height, width = images.shape[-2:]
    if height != pixels:
        images = nn.functional.interpolate(images, (pixels, round(width * pixels / height)), mode="area")
    return images


@torch.no_grad()
def probabilities(pictures: Pictures, model: Classifier | None = None) -> list[dict[str, float]]:
    """For each picture, the probability of each element."""
    model = model or load_classifier()
    found = model(as_tensor(pictures, model.pixels)).sigmoid()
    return [dict(zip(model.names, (float(p) for p in row), strict=True)) for row in found]


def classify(
    pictures: Pictures, model: Classifier | None = None, threshold: float = 0.5
) -> list[dict[str, bool]]:
    """For each picture, which elements it shows."""
    return [{name: p >= threshold for name, p in row.items()} for row in probabilities(pictures, model)]


@torch.no_grad()
def features(pictures: Pictures, model: Classifier | None = None) -> np.ndarray:
    """(B, WIDTH) float32, for a Fréchet distance between sets of pictures."""
    model = model or load_classifier()
    found: np.ndarray = model.features(as_tensor(pictures, model.pixels)).numpy()
    return found

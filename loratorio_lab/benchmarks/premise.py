"""The method's premise on the toybox: does a LoRA that the prompt asks for diverge from the base further than one that it does not?

loratorio-lab premise                     the toybox that ships
loratorio-lab premise --toybox FOLDER     another one, as `loratorio-lab train` writes it; with --unregularised its LoRAs in unregularised/
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from loratorio.compose.candidates import CALLED
from loratorio.settings import Settings
from loratorio.standalone.checkpoint import Checkpoint, load_checkpoint
from loratorio.standalone.generate import Request, generate
from loratorio_lab.bench.plan import combinations, sample
from loratorio_lab.chosen_toybox import ChosenToybox, add_toybox, toybox_of
from loratorio_lab.knobs import measured, said
from loratorio_lab.toybox.unlabelled import without_metadata
from loratorio_lab.toybox.world import World

STEPS, CFG, SEEDS = 12, 2.0, 2

PUBLISHED = measured(
    {
        "method": "loratorio", "patch_size": 2, "temperature": 1.0, "top_k": 0, "recentre": 0.5, "share": 0.0, "reuse": 1,
        "weight_maps": True,
    }
)  # fmt: skip
"""All LoRAs in every patch, each weighted by its similarity alone: else no logarithm of a weight is its divergence."""

POOL = measured({"method": "relative", "top_k": 2, "recentre": 0.5, "share": 0.15, "reuse": 3})
"""For the reactions of a pool, which are measured before anything is weighted."""

EARLY = 3
"""Only the first steps count: later ones show what was already composed."""


def divergence_auc(
    checkpoint: Checkpoint, toybox: ChosenToybox, combination: Sequence[str]
) -> list[tuple[float, float]]:
    """How well divergence tells a combination's LoRAs from the others of the toybox, per early step.

    All LoRAs are composed under the combination's prompt. A LoRA's divergence is its mean over the patches of 1 − cos to the base's noise,
    up to a constant of the step: at temperature 1 the logarithm of its weight is that (arXiv 2508.11624, SoftMin over similarities).

    Returns:
        The probability that a LoRA that is asked for diverges further than one that is not, and than one of its category; 0.5 is
        chance.
    """
    tags = " ".join(f"<lora:{element.name}>" for element in toybox.world.elements)
    request = _request(toybox.world, combination, tags, PUBLISHED)
    outcome = generate(checkpoint, toybox.loras, request, progress=False)
    wanted = np.array([name in combination for name in outcome.composed])
    alike = [
        np.isin(outcome.composed, names)
        for names in toybox.categories().values()
        if not set(names).isdisjoint(combination)
    ]
    found = []
    for weights in outcome.history.weights[:EARLY]:
        scores = np.log(np.asarray(weights.float())).mean(axis=(2, 3))  # (LoRAs, pictures)
        of_all, of_kind = [], []
        for image in range(SEEDS):
            of_all.append(auc(scores[:, image], wanted))
            of_kind += [auc(scores[kind, image], wanted[kind]) for kind in alike]
        found.append((float(np.mean(of_all)), float(np.mean(of_kind))))
    return found


def reaction_scores(
    checkpoint: Checkpoint, unlabelled: Path, world: World, combination: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """How much a combination's prompt moves each LoRA of a pool of all (`loratorio.compose.candidates.reactions`), and which it asks for.

    unlabelled: folder of the LoRAs, whose files do not say what calls them.
    """
    request = replace(_request(world, combination, "<pool:*>", POOL), steps=1)
    moved = generate(checkpoint, unlabelled, request, progress=False).reactions
    return np.array([*moved.values()]), np.array([name in combination for name in moved])


def _request(world: World, combination: Sequence[str], tags: str, settings: Settings) -> Request:
    scene = world.random_scene(random.Random("+".join(combination)), *combination, width=world.pixels)
    return Request(
        f"{world.caption(scene)} {tags}",
        settings=settings,
        steps=STEPS,
        cfg=CFG,
        batch=SEEDS,
        width=world.pixels,
        height=world.pixels,
    )


def auc(scores: NDArray[np.float64], wanted: NDArray[np.bool_]) -> float:
    """Share of the pairs of one that is wanted and one that is not in which the wanted one scores higher; ties count half.

    Raises:
        ValueError: a score is not finite: it is none that another could be higher than.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite: {scores}")
    differences = scores[wanted][:, None] - scores[~wanted][None, :]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="loratorio-lab premise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_toybox(parser)
    parser.add_argument("--combinations", type=int, default=6, help="how many of each N; 0: all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    toybox = toybox_of(options)
    categories = toybox.categories()
    combos = [
        combo
        for count in (2, 3, 4)
        for combo in sample(combinations(categories, count), options.combinations)
    ]
    checkpoint = load_checkpoint(toybox.checkpoint)
    every = np.array([divergence_auc(checkpoint, toybox, combo) for combo in combos])
    print(f"{STEPS} steps, CFG {CFG:g}, {said(PUBLISHED)}")
    print(
        f"Divergence of the LoRAs that are asked for and of the others, {len(combos)} combinations, {SEEDS} seeds: AUC"
    )
    for step in range(EARLY):
        of_all, of_kind = every[:, step].T
        print(
            f"  step {step + 1} of {STEPS}: {of_all.mean():.2f} (least of a combination {of_all.min():.2f}), "
            f"within a category {of_kind.mean():.2f}"
        )
    print(f"  all {EARLY}: {every[..., 0].mean():.2f}, within a category {every[..., 1].mean():.2f}")
    with TemporaryDirectory(prefix="loratorio-premise-") as folder:
        unlabelled = without_metadata(toybox.loras, Path(folder))
        moved = [reaction_scores(checkpoint, unlabelled, toybox.world, combo) for combo in combos]
    scores, wanted = (np.concatenate(each) for each in zip(*moved, strict=True))
    mean, of_all = np.mean([auc(*each) for each in moved]), auc(scores, wanted)
    right, wrong = (scores[wanted] >= CALLED).mean(), (scores[~wanted] >= CALLED).mean()
    print(f"1 step, CFG {CFG:g}, {said(POOL)}")
    print(f"Reaction to the prompt at the first step: AUC {mean:.2f}, of all pairs {of_all:.2f}")
    print(f"  at least {CALLED}: {right:.1%} of those that are asked for, {wrong:.1%} of the others")
    for name, own in (("asked for", scores[wanted]), ("others", scores[~wanted])):
        print(
            f"  {name}: {', '.join(f'{value:.2f}' for value in np.quantile(own, (0, 0.1, 0.5, 0.9, 1)))} (0, 10, 50, 90, 100 %)"
        )

"""Which toybox a measurement is of: its model and one of its sets of LoRAs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratorio import toybox
from loratorio.errors import LoratorioError
from loratorio_lab.toybox.world import World, add_art, open_world


@dataclass(frozen=True)
class ChosenToybox:
    """A toybox in a folder. loras: where its LoRAs are."""

    world: World
    folder: Path
    loras: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "model" / "toybox.safetensors"

    def categories(self) -> Mapping[str, Sequence[str]]:
        """The names of the elements that have a LoRA, by category, characters first. Raises LoratorioError if none has."""
        present = [
            each for each in self.world.elements if (self.loras / f"{each.name}.safetensors").is_file()
        ]
        if not present:
            raise LoratorioError(f"The toybox is not whole: no LoRA is in {self.loras}.")
        order = dict.fromkeys(["character", *(element.category for element in self.world.elements)])
        return {kind: [element.name for element in present if element.category == kind] for kind in order}


def add_toybox(parser: argparse.ArgumentParser) -> None:
    """The options that `toybox_of` takes."""
    add_art(parser)
    parser.add_argument(
        "--toybox", type=Path, default=toybox.FOLDER, help="folder of model/ and lora/ (those that ship)"
    )
    parser.add_argument(
        "--unregularised",
        action="store_true",
        help="with the LoRAs in unregularised/ of that folder, trained without regularisation (`loratorio-lab train unregularised`)",
    )


def toybox_of(options: argparse.Namespace) -> ChosenToybox:
    """The toybox that these options name; without any, the one that ships."""
    return chosen_toybox(options.art, options.toybox, options.unregularised)


def chosen_toybox(
    art: Path | None = None, folder: Path = toybox.FOLDER, unregularised: bool = False
) -> ChosenToybox:
    return ChosenToybox(open_world(art), folder, folder / ("unregularised" if unregularised else "lora"))

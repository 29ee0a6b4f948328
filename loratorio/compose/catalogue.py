"""The names of the ways to compose, without the torch they run on: what panel, API, CLI and infotext need to know of them.

The methods themselves are in `methods/`; a test holds the two lists together.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """A method as a user sees it. `source`: the paper it comes from."""

    name: str
    label: str
    source: str


CATALOGUE: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("loratorio", "LoRAtorio", "arXiv 2508.11624"),
        Entry("merge", "Merge", "the hosts' own way"),
        Entry("composite", "Composite", "arXiv 2402.16843"),
        Entry("switch", "Switch", "arXiv 2402.16843"),
        Entry("cmlora", "CMLoRA", "arXiv 2502.04923"),
        Entry("klora", "K-LoRA", "arXiv 2502.18461"),
        Entry("frequency", "Frequency bands", "after MultLFG, arXiv 2505.20525"),
        Entry("w_composite", "W-Composite", "arXiv 2606.03792"),
        Entry("merge_anchored", "Merge, re-centred", "re-centring after arXiv 2508.11624"),
        Entry("composite_anchored", "Composite, re-centred", "re-centring after arXiv 2508.11624"),
    )
}
"""Every way to compose, by name, in the order in which a user sees them."""

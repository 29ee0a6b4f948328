"""An extension for tests on Forge Neo: its language models have two layers, as `tests/forge_neo/small_checkpoint.py` writes them.

The host takes their other numbers from a config.json, but refuses one that has other layers than its own code. Link the folder
`tests/forge_neo/small_encoders` into the host's `extensions`.
"""

import dataclasses
from functools import partialmethod

LAYERS = 2


def shrink():
    from backend.nn.llm import llama

    for kind in vars(llama).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and hasattr(kind, "num_hidden_layers"):
            kind.__init__ = partialmethod(kind.__init__, num_hidden_layers=LAYERS)


shrink()

"""An extension for tests on Forge Neo: its language models are as small as `tests/forge_neo/small_checkpoint.py` writes them.

The host takes their other numbers from a config.json, but refuses one that has other sizes than its own code. Link the folder
`tests/forge_neo/small_encoders` into the host's `extensions`.
"""

import dataclasses
from functools import partialmethod

FEW_LAYERS = {"num_hidden_layers": 2}
NARROW = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
SIZES = {
    # Flux 2 takes text from layers 9, 18 and 27, Krea from twelve layers up to the last: they keep their layers.
    "Qwen3_4BConfig": NARROW,
    "Qwen3VL_4BConfig": {**NARROW, "hidden_size": 640},
    "Qwen25_7BVLI_Config": {**NARROW, **FEW_LAYERS},
}
"""What is smaller than the host's own; of language models that are not named, the number of layers."""


def shrink():
    from backend.nn.llm import llama

    for name, kind in vars(llama).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and hasattr(kind, "num_hidden_layers"):
            kind.__init__ = partialmethod(kind.__init__, **SIZES.get(name, FEW_LAYERS))


shrink()

"""Writes a checkpoint's UNet in few bits, as a GGUF file of the whole checkpoint, by Forge Neo's own package.

    NEO/venv/bin/python tests/forge_neo/quantised_checkpoint.py NEO CHECKPOINT.safetensors KIND OUT.gguf

KIND is one of GGUF's, such as Q8_0 or Q4_0. The UNet's linear layers are quantised, as far as their rows have whole blocks;
all else is float16 or float32. `tests/webui/test_quantised.py` uses it.
"""

from __future__ import annotations

import sys
from pathlib import Path

neo, checkpoint, kind_name, out = sys.argv[1:]
# The host names the package both ways.
sys.path[:0] = [neo, str(Path(neo) / "modules_forge" / "packages")]

import torch  # noqa: E402
from modules_forge.packages import gguf  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

UNET = "model.diffusion_model."
BLOCK = 32

kind = gguf.GGMLQuantizationType[kind_name]
writer = gguf.GGUFWriter(out, "sd1")
count = 0
for name, tensor in load_file(checkpoint).items():
    embeds = any(part in name for part in ("time_embed", "emb_layers"))
    if name.startswith(UNET) and tensor.ndim == 2 and tensor.shape[1] % BLOCK == 0 and not embeds:
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        count += 1
    elif tensor.is_floating_point():
        dtype = torch.float16 if tensor.ndim > 1 else torch.float32
        writer.add_tensor(name, tensor.to(dtype).numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
print(f"{out}: {count} layers as {kind_name}")

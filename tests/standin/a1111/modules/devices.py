from contextlib import nullcontext as autocast  # noqa: F401

import torch

device = torch.device("cpu")
dtype_inference = torch.float32

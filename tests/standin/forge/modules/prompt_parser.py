"""The same as in AUTOMATIC1111's WebUI, but for an argument, and for parts of unequal length."""

from pathlib import Path

import torch

_there = Path(__file__).parents[2] / "a1111" / "modules" / "prompt_parser.py"
exec(compile(_there.read_text(encoding="utf8"), str(_there), "exec"))


class SdConditioning(list):
    def __init__(self, prompts, is_negative_prompt=False):
        super().__init__(prompts)
        self.is_negative_prompt = is_negative_prompt


def _stacked(conds):
    length = max(len(cond) for cond in conds)
    return torch.stack([torch.cat([cond, cond[-1:].repeat(length - len(cond), 1)]) for cond in conds])

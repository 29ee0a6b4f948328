"""Pools of LoRAs in a WebUI's prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..pool import expanded

if TYPE_CHECKING:
    from ..job import Job


def expand(job: Job, prompts: list[str]) -> None:
    """Replace each `<pool:…>` in a batch's prompts, and in those of its hires pass, by the LoRAs it stands for.

    Raises:
        LoratorioError: a pool that leaves the LoRA folder, or that no LoRA fits.
    """
    from modules import shared

    p = job.p
    hires = getattr(p, "all_hr_prompts", None) or []
    if not any("<pool:" in prompt for prompt in (*prompts, *hires)):
        return
    # The infotext keeps the tag: it is made of the job's prompts, of which these are copies.
    folder = Path(shared.cmd_opts.lora_dir)
    prompts[:] = [expanded(prompt, folder) for prompt in prompts]
    if hires:
        own = slice(p.iteration * p.batch_size, (p.iteration + 1) * p.batch_size)
        # These are no copies, and so have to be put back.
        job.hires_prompts = hires
        p.all_hr_prompts = list(hires)
        p.all_hr_prompts[own] = [expanded(prompt, folder) for prompt in hires[own]]


def restore(job: Job) -> None:
    """Once the WebUI has read the batch's prompts: the job's prompts for the infotext are as the user wrote them."""
    if job.hires_prompts is not None:
        job.p.all_hr_prompts, job.hires_prompts = job.hires_prompts, None

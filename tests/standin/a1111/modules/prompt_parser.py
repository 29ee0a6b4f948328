"""Prompts with ` AND `, weights after a colon, and `[a:b:step]`; schedules of conditioning."""

import re
from collections import namedtuple

import torch

ScheduledPromptConditioning = namedtuple("ScheduledPromptConditioning", ["end_at_step", "cond"])


class SdConditioning(list):
    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None):
        super().__init__(prompts)
        self.is_negative_prompt, self.width, self.height = is_negative_prompt, width, height


class DictWithShape(dict):
    @property
    def shape(self):
        return self["crossattn"].shape


class ComposableScheduledPromptConditioning:
    def __init__(self, schedules, weight=1.0):
        self.schedules, self.weight = schedules, weight


class MulticondLearnedConditioning:
    def __init__(self, shape, batch):
        self.shape, self.batch = shape, batch


def schedule_of(prompt, steps):
    match = re.search(r"\[(.*?):(.*?):(\d+)\]", prompt)
    if match is None:
        return [(steps, prompt)]
    before, after, when = match.groups()
    return [
        (min(int(when), steps), prompt.replace(match.group(0), before)),
        (steps, prompt.replace(match.group(0), after)),
    ]


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    return [
        [
            ScheduledPromptConditioning(end, model.encode(text))
            for end, text in schedule_of(prompt, hires_steps or steps)
        ]
        for prompt in prompts
    ]


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    batch = []
    for prompt in prompts:
        parts = [re.fullmatch(r"(.*?)(?::\s*([\d.]+))?\s*", part) for part in prompt.split(" AND ")]
        schedules = get_learned_conditioning(model, [part.group(1) for part in parts], steps, hires_steps)
        batch.append(
            [
                ComposableScheduledPromptConditioning(schedule, float(part.group(2) or 1))
                for schedule, part in zip(schedules, parts, strict=True)
            ]
        )
    return MulticondLearnedConditioning((len(prompts),), batch)


def _current(schedule, step):
    return next((entry.cond for entry in schedule if step <= entry.end_at_step), schedule[0].cond)


def _stacked(conds):
    if isinstance(conds[0], dict):
        return DictWithShape({key: torch.stack([cond[key] for cond in conds]) for key in conds[0]})
    return torch.stack(conds)


def reconstruct_cond_batch(schedules, step):
    return _stacked([_current(schedule, step) for schedule in schedules])


def reconstruct_multicond_batch(multicond, step):
    conds, parts = [], []
    for composable in multicond.batch:
        parts.append([])
        for part in composable:
            parts[-1].append((len(conds), part.weight))
            conds.append(_current(part.schedules, step))
    return parts, _stacked(conds)

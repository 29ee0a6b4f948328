"""Conditions that are batched by the host."""

import math

import torch


class Condition:
    def __init__(self, cond):
        self.cond = cond

    def _copy_with(self, cond):
        return self.__class__(cond)

    def process_cond(self, batch_size, device, **kwargs):
        times = math.ceil(batch_size / len(self.cond))
        return self._copy_with(self.cond.repeat(times, *[1] * (self.cond.ndim - 1))[:batch_size])

    def can_concat(self, other):
        return self.cond.shape == other.cond.shape

    def concat(self, others):
        return torch.cat([self.cond, *(other.cond for other in others)])


def compile_conditions(cond):
    if cond is None:
        return None
    return [{"cross_attn": cond, "model_conds": {"c_crossattn": Condition(cond)}}]


def compile_weighted_conditions(cond, weights):
    results = []
    for part in zip(*weights, strict=False):
        h = compile_conditions(cond[[index for index, _ in part]])
        h[0]["strength"] = part[0][1]
        results += h
    return results

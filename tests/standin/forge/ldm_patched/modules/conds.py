"""Conditions that are batched by the host; text of several lengths too, where repeating makes them equal."""

import math

from backend.sampling.condition import Condition


class CONDRegular(Condition):
    def size(self):
        return list(self.cond.shape)


class CONDCrossAttn(CONDRegular):
    def can_concat(self, other):
        one, two = self.cond.shape[1], other.cond.shape[1]
        return math.lcm(one, two) // min(one, two) <= 4

    def concat(self, others):
        length = math.lcm(*(each.cond.shape[1] for each in (self, *others)))
        same = [CONDRegular(each.cond.repeat(1, length // each.cond.shape[1], 1)) for each in (self, *others)]
        return same[0].cond if len(same) == 1 else Condition.concat(same[0], same[1:])

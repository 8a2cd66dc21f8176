"""Sources of the tests."""

import math

import torch

from twotower.negatives import Sampled, Uniform


class SamePart(Sampled):
    """Uniform draws from the part of the catalog that the positive of the row is in; parts are `width` items long.

    `factor` multiplies the claimed count, to plant a fault.
    """

    varies_by_row = True
    factor = 1.0

    def __init__(self, num_items, width, size, *, unique=False):
        super().__init__(Uniform(num_items), size, unique=unique, per_row=True)
        self.width = width

    def part(self, positives):
        return positives // self.width

    def draw(self, request):
        return self.part(request.positives)[:, None] * self.width + super().draw(request) % self.width

    def log_prob(self, items, request):
        own = self.part(request.own_positives).reshape(-1, *[1] * (items.ndim - 1))
        return torch.where(items // self.width == own, math.log(self.factor / self.width), -math.inf).double()

"""Losses as pure functions, and the objectives that pair them with candidates."""

from twotower.losses.objectives import ExpectedCount, Objective
from twotower.losses.softmax import full_softmax, sampled_softmax

__all__ = ["ExpectedCount", "Objective", "full_softmax", "sampled_softmax"]

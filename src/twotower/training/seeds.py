"""Seeds of a training step as a function of seed, step and rank, so that no generator state has to be synchronized."""

from __future__ import annotations

import numpy as np
import torch

#: Purposes of random numbers. Draws and the rounding of tables are the same on every rank; dropout is not.
DRAWS, ROUNDING, DROPOUT = 0, 1, 2


def step_seed(seed: int, step: int, purpose: int, rank: int = 0) -> int:
    """Return a 63-bit seed for one purpose in one step."""
    state = np.random.SeedSequence([seed, step, purpose, rank]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def draws_of(seed: int, step: int, device: torch.device | str) -> torch.Generator:
    """Return the generator for a step's candidates: the same on every rank, and for any number of ranks."""
    return torch.Generator(device).manual_seed(step_seed(seed, step, DRAWS))

"""Walker's alias table: draws from any weights in constant time, one memory access each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Acceptance thresholds are kept in 31 bits, so that threshold and alias share one 64-bit word.
_BITS = 31

#: Draws at a time on the CPU: what lies between the random number and the item stays in the cache.
_BLOCK = 1 << 16


class AliasTable(nn.Module):
    """Draws item j with probability w_j / sum w (Walker 1977).

    Built by prefix sums, after Hübschle-Schneider and Sanders 2019, "Parallel Weighted Random Sampling".
    With the weights scaled to mean 1, an item below 1 (light) keeps its own slot with probability w and gives the rest
    to a heavy one. Sweeping lights and heavies in order, the heavy item that fills light i is the first whose
    cumulated excess exceeds the deficit cumulated before i; where a heavy item is used up, the next one fills it.

    Args:
        weights: float64 [N], >= 0, not all zero; fewer than 2^31 items.
    """

    packed: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        threshold, alias = build_alias(weights)
        quantised = (threshold * (1 << _BITS)).round().long().clamp_(0, (1 << _BITS) - 1)
        # A slot that always keeps its own item must not lose it to rounding: its alias is itself.
        own = torch.arange(len(weights), device=weights.device)
        alias = torch.where(threshold >= 1.0, own, alias)
        self.register_buffer("packed", (quantised << 32) | alias, persistent=False)

    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, int64 codes of shape `size`."""
        drawn = torch.empty(size, dtype=torch.int64, device=self.packed.device)
        flat = drawn.view(-1)
        for part in torch.split(flat, _BLOCK if flat.device.type == "cpu" else max(len(flat), 1)):
            self._fill(part.random_(generator=generator))
        return drawn

    def _fill(self, bits: Tensor) -> None:
        """Turn numbers of 63 random bits into draws, in place.

        One number u of [0, 1) tells slot and coin: the whole part of N u and its fraction. With u = bits / 2^63 the
        product is taken in two halves, so that it is exact to 32 places behind the point; a remainder or a product of
        32 random bits would prefer some slots by N / 2^32.
        """
        slots = len(self.packed)
        scaled = (bits & 0x7FFFFFFF).mul_(slots).bitwise_right_shift_(31)
        scaled.add_((bits >> 31).mul_(slots))
        torch.bitwise_right_shift(scaled, 32, out=bits)
        coin = scaled.bitwise_and_(0xFFFFFFFF).bitwise_right_shift_(1)
        word = self.packed.index_select(0, bits)
        moved = coin >= word >> 32
        torch.where(moved, word.bitwise_and_(0xFFFFFFFF), bits, out=bits)


def build_alias(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds in [0, 1] and aliases of Walker's table, (float64 [N], int64 [N]), without a loop over items."""
    # The largest becomes 1 first, so that neither the smallest doubles nor the largest overflow.
    scaled = weights.double() / weights.double().max()
    scaled = scaled * (len(weights) / scaled.sum())
    light, heavy = torch.nonzero(scaled < 1.0)[:, 0], torch.nonzero(scaled >= 1.0)[:, 0]
    threshold, alias = torch.ones_like(scaled), torch.arange(len(weights), device=weights.device)
    if len(light) == 0 or len(heavy) == 0:
        return threshold, alias
    deficit = (1.0 - scaled[light]).cumsum(0)
    excess = (scaled[heavy] - 1.0).cumsum(0)
    before = torch.cat([deficit.new_zeros(1), deficit[:-1]])
    # right=True: a heavy item whose excess is used up exactly fills nothing more.
    filler = torch.searchsorted(excess, before, right=True).clamp_(max=len(heavy) - 1)
    threshold[light], alias[light] = scaled[light], heavy[filler]
    # The light item at whose filling a heavy one runs short, if any, tells what is left of the heavy one's own slot.
    # right=False: one that is used up exactly, or has no excess to begin with, keeps its slot whole.
    short = torch.searchsorted(deficit, excess)
    runs_short = (short < len(deficit)) & (excess > 0)
    runs_short[-1] = False  # rounding alone can do that to the last one
    left = 1.0 - (deficit[short.clamp(max=len(deficit) - 1)] - excess)
    following = heavy[torch.arange(len(heavy), device=heavy.device).add(1).clamp(max=len(heavy) - 1)]
    threshold[heavy] = torch.where(runs_short, left, threshold[heavy])
    alias[heavy] = torch.where(runs_short, following, alias[heavy])
    return threshold.clamp_(0.0, 1.0), alias

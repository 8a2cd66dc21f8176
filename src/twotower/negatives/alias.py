"""Walker's alias table: draws from any weights in constant time, one memory access each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Acceptance thresholds have 31 bits, so that threshold and alias share one 64-bit word.
_BITS = 31

#: Draws per block on the CPU: small enough for the intermediate results to stay in cache.
_BLOCK = 1 << 16


class AliasTable(nn.Module):
    """A sampler that draws item j with probability w_j / sum w (Walker 1977).

    Built with prefix sums, after Hübschle-Schneider and Sanders 2019, "Parallel Weighted Random Sampling".
    With weights scaled to mean 1, an item below 1 (light) keeps its own slot with probability w and yields the rest of
    the slot to a heavy item. Light and heavy items are matched in order: light item i is filled by the first heavy item
    whose cumulative excess exceeds the cumulative deficit before i. A heavy item whose excess runs out is itself
    filled by the next heavy item.

    Args:
        weights: float64 [N], >= 0, not all zero; fewer than 2^31 items.
    """

    packed: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        threshold, alias = build_alias(weights)
        quantised = (threshold * (1 << _BITS)).round().long().clamp_(0, (1 << _BITS) - 1)
        # A slot that always keeps its own item must not lose it to rounding, so its alias is the item itself.
        own = torch.arange(len(weights), device=weights.device)
        alias = torch.where(threshold >= 1.0, own, alias)
        self.register_buffer("packed", (quantised << 32) | alias, persistent=False)

    def sample(self, size: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Draw independently; return int64 codes of shape `size`."""
        drawn = torch.empty(size, dtype=torch.int64, device=self.packed.device)
        flat = drawn.view(-1)
        for part in torch.split(flat, _BLOCK if flat.device.type == "cpu" else max(len(flat), 1)):
            self._fill(part.random_(generator=generator))
        return drawn

    def _fill(self, bits: Tensor) -> None:
        """Turn numbers of 63 random bits into draws, in place.

        One number u in [0, 1) gives both slot and coin: the integer part of N u and its fraction. With u = bits / 2^63
        the product is computed in two halves, so that it is exact to 32 binary places. A remainder, or a product with
        only 32 random bits, would bias some slots by N / 2^32.
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
    """Compute Walker's thresholds in [0, 1] and aliases, (float64 [N], int64 [N]), without a loop over items."""
    # Scale the largest weight to 1 first, so that neither the smallest nor the largest doubles overflow.
    scaled = weights.double() / weights.double().max()
    scaled = scaled * (len(weights) / scaled.sum())
    light, heavy = torch.nonzero(scaled < 1.0)[:, 0], torch.nonzero(scaled >= 1.0)[:, 0]
    threshold, alias = torch.ones_like(scaled), torch.arange(len(weights), device=weights.device)
    if len(light) == 0 or len(heavy) == 0:
        return threshold, alias
    deficit = (1.0 - scaled[light]).cumsum(0)
    excess = (scaled[heavy] - 1.0).cumsum(0)
    before = torch.cat([deficit.new_zeros(1), deficit[:-1]])
    # right=True: a heavy item whose excess is used up exactly fills no further slot.
    filler = torch.searchsorted(excess, before, right=True).clamp_(max=len(heavy) - 1)
    threshold[light], alias[light] = scaled[light], heavy[filler]
    # `short`: the light item at which a heavy item runs out, if any; it determines what the heavy item keeps of its own
    # slot. right=False: an item that is used up exactly, or has no excess to begin with, keeps its whole slot.
    short = torch.searchsorted(deficit, excess)
    runs_short = (short < len(deficit)) & (excess > 0)
    runs_short[-1] = False  # the last heavy item can run short only by rounding
    left = 1.0 - (deficit[short.clamp(max=len(deficit) - 1)] - excess)
    following = heavy[torch.arange(len(heavy), device=heavy.device).add(1).clamp(max=len(heavy) - 1)]
    threshold[heavy] = torch.where(runs_short, left, threshold[heavy])
    alias[heavy] = torch.where(runs_short, following, alias[heavy])
    return threshold.clamp_(0.0, 1.0), alias

"""The inputs of a tiled loss, checked once and passed on as one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.losses.softmax import _check_row_shapes, _check_shapes, check_temperature
from twotower.negatives import NegativeMask

#: The inputs without gradients: counts, weights and offsets that do not depend on the model.
CONSTANT = ("log_expected_count", "row_log_expected_count", "row_offset", "own_offset", "weights", "multiplicity")
#: The inputs that get gradients.
DIFFERENTIABLE = ("query", "positive", "candidates", "row_candidates", "temperature", "bias")


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a tiled loss: as in the plain losses, but with the mask as pairs.

    Attributes:
        query: query embeddings, [B, D].
        positive: embeddings of the rows' positives, [B, D]; None if `positive_places` is given.
        candidates: embeddings of the shared candidates, [M, D].
        log_expected_count: subtracted from the shared candidates' logits, [M]; None for nothing.
        mask: mask of the shared candidates: a `NegativeMask`, or bool [B, M].
        row_candidates: embeddings of per-row candidates, [B, R, D].
        row_log_expected_count: subtracted from the per-row candidates' logits, [B, R].
        row_mask: bool [B, R], True where a per-row candidate is not a negative for its row.
        temperature: divides every score.
        weights: weight of each row in the returned sum, [B], constants; None for the mean, 1/B each.
        row_offset: also subtracted from all candidate logits of a row, [B].
        own_offset: subtracted from the positive's logit, [B].
        bias: a scalar added to every logit, including the positive's.
        multiplicity: how many equal candidates each shared candidate represents, [M]; None for one each. Only for
            losses that do not sum exponentials; otherwise the log count includes it (`Candidates.collapse`).
        positive_places: positions of the positives among the candidates, int64 [B]; these then get the positives'
            gradient.
        repeated_queries: find rows whose queries are bitwise equal, and compute their logits once.
        low_precision: compute products in bfloat16 and sums in float32.
    """

    query: Tensor
    positive: Tensor | None
    candidates: Tensor
    log_expected_count: Tensor | None
    mask: NegativeMask | Tensor | None = None
    row_candidates: Tensor | None = None
    row_log_expected_count: Tensor | None = None
    row_mask: Tensor | None = None
    temperature: float | Tensor = 1.0
    weights: Tensor | None = None
    row_offset: Tensor | None = None
    own_offset: Tensor | None = None
    bias: Tensor | None = None
    multiplicity: Tensor | None = None
    positive_places: Tensor | None = None
    repeated_queries: bool = False
    low_precision: bool = False

    def checked(self) -> LossInputs:
        """Return the inputs with their defaults filled in: all weights, the mask as pairs, the precision of autocast.

        Raises:
            InputError: shapes do not fit, the temperature is not above 0, or an input in `CONSTANT` requires a
                gradient.
        """
        check_temperature(self.temperature)
        for name in CONSTANT:
            given = getattr(self, name)
            if given is not None and given.requires_grad:
                raise InputError(
                    f"{name}: expected constants, found a tensor that requires a gradient, which the tiled losses do "
                    "not compute; detach it, or use the plain losses (sampled_softmax, logistic, ...)"
                )
        query, candidates, mask = self.query, self.candidates, self.mask
        if self.positive is not None and self.log_expected_count is not None:
            dense = mask if isinstance(mask, Tensor) else None
            _check_shapes(query, self.positive, candidates, self.log_expected_count, dense)
        if self.row_candidates is not None:
            _check_row_shapes(query, self.row_candidates, self.row_log_expected_count, self.row_mask)
        if isinstance(mask, Tensor):
            mask = NegativeMask.of(mask)
        if mask is not None and mask.shape != (len(query), len(candidates)):
            raise InputError(f"mask: expected shape [{len(query)}, {len(candidates)}], found {list(mask.shape)}")
        for name, offset in (("row_offset", self.row_offset), ("own_offset", self.own_offset)):
            if offset is not None and offset.shape != query.shape[:1]:
                raise InputError(f"{name}: expected [{len(query)}], found {list(offset.shape)}")
        if self.multiplicity is not None and self.multiplicity.shape != candidates.shape[:1]:
            raise InputError(f"multiplicity: expected [{len(candidates)}], found {list(self.multiplicity.shape)}")
        multiplicity = self.multiplicity
        if multiplicity is not None and multiplicity.device.type == "cpu" and bool((multiplicity == 1).all()):
            multiplicity = None  # the sums are cheaper without weights
        temperature = self.temperature
        if not isinstance(temperature, Tensor):
            temperature = torch.tensor(temperature, dtype=accumulation_dtype(query))
        return replace(
            self,
            mask=mask,
            weights=_row_weights(self.weights, query),
            multiplicity=multiplicity,
            temperature=temperature.to(query.device),
            low_precision=_low_precision(query),
        )

    def tensors(self) -> list[Tensor | None]:
        """Return the inputs that get gradients, in the order of `DIFFERENTIABLE`."""
        return [getattr(self, name) for name in DIFFERENTIABLE]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> LossInputs:
        """Replace the inputs that get gradients, given in the order of `DIFFERENTIABLE`."""
        named: dict[str, Tensor | None] = dict(zip(DIFFERENTIABLE, tensors, strict=True))
        return replace(self, **named)  # type: ignore[arg-type]


def accumulation_dtype(query: Tensor) -> torch.dtype:
    """Return the precision of the sums: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _row_weights(weights: Tensor | None, query: Tensor) -> Tensor:
    rows = len(query)
    if weights is None:
        return torch.full((rows,), 1.0 / max(rows, 1), dtype=torch.float64, device=query.device)
    if weights.shape != (rows,):
        raise InputError(f"weights: expected [{rows}], found {list(weights.shape)}")
    return weights


def _low_precision(query: Tensor) -> bool:
    device = query.device.type
    if not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16

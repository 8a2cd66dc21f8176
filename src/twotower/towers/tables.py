"""Embedding tables: one row of D numbers for each code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.process import advise_huge_pages

#: Tables with more rows than this get sparse gradients, so that a step's cost does not grow with the catalog. Below,
#: a dense gradient is cheaper than sorting the ids that a step touched.
SPARSE_ABOVE = 100_000


class EmbeddingTable(nn.Embedding):
    """A table of `rows` vectors of width `dimension`, initialised N(0, scale^2).

    Its gradient is sparse above 100,000 rows. The memory of a large table is asked for in pages of 2 MiB, where the
    system has them: rows far apart are then found faster.

    Args:
        rows: number of codes.
        dimension: D.
        scale: standard deviation of the start; with it unset 1/sqrt(D), so that vectors start with length 1.
    """

    def __init__(self, rows: int, dimension: int, *, scale: float | None = None) -> None:
        weight = torch.empty(rows, dimension)
        if weight.device.type == "cpu":
            advise_huge_pages(weight.data_ptr(), weight.nbytes)  # before it is written to
        super().__init__(rows, dimension, sparse=rows > SPARSE_ABOVE, _weight=weight)
        nn.init.normal_(self.weight, std=dimension**-0.5 if scale is None else scale)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that nn.Embedding gives it
        """Codes int64 [...] -> float32 [..., D], whatever the rows are stored in."""
        embedded = super().forward(input)
        return embedded.float() if embedded.dtype == torch.bfloat16 else embedded

    def to_bfloat16(self) -> None:
        """Store the rows in bfloat16: half the memory. Call before an optimizer is made.

        The gradient becomes sparse at any size: the optimizer then sums what a row gets in float32.
        """
        self.weight = nn.Parameter(self.weight.detach().to(torch.bfloat16), requires_grad=self.weight.requires_grad)
        self.sparse = True


def store_tables(model: nn.Module, precision: str) -> None:
    """Keep every embedding table of a model in "float32", as it is made, or in "bfloat16"."""
    if precision == "bfloat16":
        for module in list(model.modules()):
            if isinstance(module, EmbeddingTable):
                module.to_bfloat16()

"""Embedding tables: one row of D numbers for each code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.process import advise_huge_pages
from twotower.towers.parts import Columns, fill_normal, part_of
from twotower.towers.shards import RowsAtHand, ask, fetch_rows

#: Tables with more rows than this get sparse gradients, so that a step's cost does not grow with the catalog. Below,
#: a dense gradient is cheaper than sorting the ids that a step touched.
SPARSE_ABOVE = 100_000

_in_memory: ContextVar[bool] = ContextVar("in_memory", default=True)


@contextmanager
def tables_without_memory() -> Iterator[None]:
    """Tables made in the block have a shape alone: for a model of which nothing is looked up."""
    token = _in_memory.set(False)
    try:
        yield
    finally:
        _in_memory.reset(token)


class EmbeddingTable(nn.Embedding):
    """A table of `rows` vectors of width `dimension`, initialised N(0, scale^2).

    Its gradient is sparse above 100,000 rows. The memory of a large table is asked for in pages of 2 MiB, where the
    system has them: rows far apart are then found faster.

    Made inside `placed_tables` under a name that is placed there, it holds this rank's part alone (`part`), and `fetch`
    has to come before a lookup; without it a rank finds its own rows, and no others.

    Args:
        rows: number of codes.
        dimension: D.
        scale: standard deviation of the start; with it unset 1/sqrt(D), so that vectors start with length 1.
        name: what placements call it; a table without a name is whole on every rank.
    """

    def __init__(self, rows: int, dimension: int, *, scale: float | None = None, name: str | None = None) -> None:
        part = part_of(name, rows)
        held = (rows, dimension)
        if part is not None:
            place = part.place(dimension)
            held = (place[0].stop - place[0].start, place[1].stop - place[1].start)
        weight = torch.empty(held, device=None if _in_memory.get() else "meta")
        if weight.device.type == "cpu":
            advise_huge_pages(weight.data_ptr(), weight.nbytes)  # before it is written to
        super().__init__(*held, sparse=rows > SPARSE_ABOVE, _weight=weight)
        self.num_embeddings, self.embedding_dim = rows, dimension
        self.name, self.part = name, part
        self.at_hand: RowsAtHand | None = None
        fill_normal(self.weight, dimension**-0.5 if scale is None else scale, self.part)

    def fetch(self, codes: Tensor) -> None:
        """Have these rows at hand until `release`; collective, and nothing where the table is whole."""
        if self.part is not None:
            self.at_hand = fetch_rows(self.weight, self.part, ask(self.part, codes))

    def release(self) -> None:
        """Let go of what was fetched."""
        self.at_hand = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that nn.Embedding gives it
        """Codes int64 [...] -> float32 [..., D], whatever the rows are stored in.

        Raises:
            RuntimeError: a part of a table, and a row that this rank neither holds whole nor has fetched.
        """
        if self.at_hand is not None:
            return F.embedding(self.at_hand.place(input), self.at_hand.rows)
        if self.part is not None:
            own = self.part.own
            is_here = not input.numel() or own.start <= input.min() <= input.max() < own.stop
            if torch.is_grad_enabled() or isinstance(self.part, Columns) or not is_here:
                raise RuntimeError("rows of a shared table are looked up before they were fetched")
            input = input - own.start  # noqa: A001
        embedded = super().forward(input)
        return embedded.float() if embedded.dtype == torch.bfloat16 else embedded

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *told: Any) -> None:
        """Of a table that was saved whole a rank takes its part."""
        saved = state_dict.get(f"{prefix}weight")
        if self.part is not None and saved is not None:
            state_dict = {**state_dict, f"{prefix}weight": self.part.cut(saved)}
        super()._load_from_state_dict(state_dict, prefix, *told)

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

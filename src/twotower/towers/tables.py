"""Embedding tables: one row of D numbers per code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twotower.distributed.partition import fill_normal, shard_of_table
from twotower.distributed.row_exchange import FetchedRows, fetch_rows, request_rows
from twotower.system.tuning import advise_huge_pages

#: Tables with more rows than this get sparse gradients, so that a step's cost does not grow with the catalog. For
#: smaller tables a dense gradient is cheaper than sorting the ids that a step touched.
SPARSE_ABOVE = 100_000

_in_memory: ContextVar[bool] = ContextVar("in_memory", default=True)


@contextmanager
def tables_without_memory() -> Iterator[None]:
    """Create tables without memory, on the meta device, inside the block, for a model whose tables are never read."""
    token = _in_memory.set(False)
    try:
        yield
    finally:
        _in_memory.reset(token)


def is_without_memory() -> bool:
    """Return whether the caller is inside a `tables_without_memory` block."""
    return not _in_memory.get()


class EmbeddingTable(nn.Embedding):
    """A table of `rows` vectors of width `dimension`, initialised N(0, scale^2).

    Its gradient is sparse above 100,000 rows. The memory of a large table is requested in pages of 2 MiB, if the system
    supports them, which makes random lookups faster.

    A table created inside `placed_tables` under a name with a placement has only this rank's part (`part`), in
    TorchRec's memory if TorchRec is the `engine`. Rows of other ranks can be looked up only after `fetch`.

    Args:
        rows: number of codes.
        dimension: width of the vectors, D.
        scale: standard deviation of the initial values; default 1/sqrt(D), so that vectors start with length about 1.
        name: name in placements; a table without a name is whole on every rank.
    """

    def __init__(self, rows: int, dimension: int, *, scale: float | None = None, name: str | None = None) -> None:
        part, engine = shard_of_table(name, rows)
        if engine is None or name is None:
            held = rows if part is None else len(part)
            weight = torch.empty(held, dimension, device=None if _in_memory.get() else "meta")
        else:
            weight = engine.weight(name)
        if weight.device.type == "cpu":
            advise_huge_pages(weight.data_ptr(), weight.nbytes)  # before it is written to
        super().__init__(weight.shape[0], weight.shape[1], sparse=rows > SPARSE_ABOVE, _weight=weight)
        self.num_embeddings, self.embedding_dim = rows, dimension
        self.name, self.part, self.engine = name, part, engine
        self.fetched: FetchedRows | None = None
        fill_normal(self.weight, dimension**-0.5 if scale is None else scale, self.part)

    @classmethod
    def of(cls, rows: Tensor, *, name: str | None = None) -> EmbeddingTable:
        """Return a whole table with these vectors, [rows, D]."""
        with tables_without_memory():
            table = cls(*rows.shape)
        table.name, table.weight = name, nn.Parameter(rows.detach().clone())
        return table

    def fetch(self, codes: Tensor) -> None:
        """Fetch the rows of some codes and hold them until `release`; collective; a no-op if the table is whole."""
        if self.part is not None:
            self.fetched = fetch_rows(self.weight, self.part, request_rows(self.part, codes))

    def release(self) -> None:
        """Release the fetched rows."""
        self.fetched = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the parameter name of nn.Embedding
        """Look up codes int64 [...] -> float32 [..., D], whatever the precision of the table.

        Raises:
            RuntimeError: the table is shared, and the row was not fetched. Without gradient, a rank may look up its own
                rows unfetched.
        """
        if self.fetched is not None:
            return F.embedding(self.fetched.place(input), self.fetched.rows)
        if self.part is not None:
            own = self.part.own
            is_here = not input.numel() or own.start <= input.min() <= input.max() < own.stop
            if torch.is_grad_enabled() or not is_here:
                raise RuntimeError("rows of a shared table were looked up before they were fetched (internal error)")
            input = input - own.start  # noqa: A001
        embedded = super().forward(input)
        return embedded.float() if embedded.dtype == torch.bfloat16 else embedded

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load this rank's part of a table that was saved whole."""
        saved = state_dict.get(f"{prefix}weight")
        if self.part is not None and saved is not None:
            state_dict = {**state_dict, f"{prefix}weight": self.part.cut(saved)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def to_bfloat16(self) -> None:
        """Store the rows in bfloat16, which halves the memory. Call this before creating an optimizer.

        The gradient becomes sparse at any size, so that the optimizer can sum a row's gradients in float32.
        """
        self.weight = nn.Parameter(self.weight.detach().to(torch.bfloat16), requires_grad=self.weight.requires_grad)
        self.sparse = True


def store_tables(model: nn.Module, precision: str) -> None:
    """Store every embedding table of a model in "float32", the default, or in "bfloat16"."""
    if precision == "bfloat16":
        for module in list(model.modules()):
            if isinstance(module, EmbeddingTable):
                module.to_bfloat16()

"""Exact search over a whole catalog by inner product."""

import copy
from functools import cached_property

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.index import bf16_screen
from twotower.index.ties import tie_order
from twotower.index.topk import Exclusion, Progress, RowFilter, top_k


class ExactIndex:
    """Exact search that scores every item; the index used by evaluation.

    The score of item j for a query q is

        s_j = <q, x_j> + b_j

    in float32. Results are ordered by score, then by `tie_order`. The items are stored once, in tie order, so that ties
    need no extra work and the catalog is scanned in random order, which keeps the top-k filter effective even if codes
    follow popularity.

    On processors with bfloat16 matrix units, a large search is screened (`twotower.index.bf16_screen`), which is faster
    and still exact.

    Two scores are equal if their float32 values are. A matrix product may round the last bit differently for a
    different tile shape, so *different* computations need not agree on which scores are equal; the order of equal
    scores is guaranteed.

    Args:
        items: [N, D] item embeddings, float16, bfloat16, float32 or float64. Stored as float32 on the same device.
        bias: [N] added to each item's score, or None.
        first: code of the first item, if `items` is a contiguous part of a larger catalog. Ties are broken as in the
            whole catalog; results and exclusions are relative to `first`.
        in_tie_order: the items are already float32 in tie order; they are then shared, not copied.

    Raises:
        InputError: shapes disagree, or an embedding or bias is NaN.

    Example:
        >>> import torch
        >>> import twotower as tt
        >>> index = tt.index.ExactIndex(torch.eye(3))
        >>> scores, items = index.search(torch.tensor([[0.1, 0.9, 0.5]]), k=2)
        >>> items.tolist()
        [[1, 2]]
    """

    is_exact = True

    def __init__(
        self, items: Tensor, bias: Tensor | None = None, *, first: int = 0, in_tie_order: bool = False
    ) -> None:
        if items.ndim != 2:
            raise InputError(f"items must have shape [N, D], got {list(items.shape)}")
        if bias is not None and bias.shape != items.shape[:1]:
            raise InputError(f"bias must have shape [{len(items)}], got {list(bias.shape)}")
        self._order = tie_order(len(items), first).to(items.device)
        self._items = (items.detach() if in_tie_order else items.detach()[self._order]).to(torch.float32)
        self._bias = None if bias is None else bias.detach().to(items.device)[self._order].to(torch.float32)
        if bool(self._items.isnan().any()) or (self._bias is not None and bool(self._bias.isnan().any())):
            raise InputError("an item embedding or bias is NaN: the model has diverged")

    @property
    def num_items(self) -> int:
        """N, the size of the catalog."""
        return len(self._items)

    @property
    def dim(self) -> int:
        """D, the width of the embeddings."""
        return int(self._items.shape[1])

    def with_bias(self, bias: Tensor) -> "ExactIndex":
        """Return an index with a different bias [N]; the items are shared, not copied.

        Raises:
            InputError: the shape is wrong, or a bias is NaN.
        """
        if bias.shape != self._items.shape[:1]:
            raise InputError(f"bias must have shape [{self.num_items}], got {list(bias.shape)}")
        if bool(bias.isnan().any()):
            raise InputError("an item bias is NaN")
        other = copy.copy(self)
        other._bias = bias.detach().to(self._items.device)[self._order].to(torch.float32)
        return other

    @torch.no_grad()
    def search(
        self,
        queries: Tensor,
        k: int,
        exclude: Exclusion | None = None,
        *,
        eligible: RowFilter | None = None,
        row_block: int | None = None,
        column_tile: int | None = None,
        progress: Progress | None = None,
        screened: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Find the K items with the highest scores for each query.

        Args:
            queries: [B, D] query embeddings, any floating dtype, any device.
            k: K, number of items. May exceed N.
            exclude: compressed rows `(offsets int64 [B+1], items)` of item codes to leave out, or None.
            eligible: the items that may be found for each query; None for all. The scores are then not screened.
            row_block: rows per tile, automatic if None; the result does not depend on it.
            column_tile: columns per tile, automatic if None; the result does not depend on it.
            progress: `progress(done, total)` is called after every tile.
            screened: estimate all scores in bfloat16 first, and compute in float32 only those that may be among the
                best (`twotower.index.bf16_screen`). None does so where it is faster: on a processor with bfloat16
                matrix units, for a large catalog without bias and more than a few queries.

        Returns:
            scores: [B, K] float32, descending, -inf where no item was left.
            items: [B, K] int64 item codes, -1 where no item was left.

        Raises:
            InputError: a shape is wrong, a score is NaN, or an exclusion is out of range.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(f"queries must have shape [B, {self.dim}], got {list(queries.shape)}")
        vectors = queries.detach().to(self._items.device, torch.float32)
        if eligible is None and self._screened(len(vectors), screened):
            result = self._screen.search(
                vectors, k, exclude, row_block=row_block, column_tile=column_tile, progress=progress
            )
            if result is not None:
                return result
        buffer: dict[tuple[int, int], Tensor] = {}  # one output per tile shape: at most four

        def score_tile(rows: slice, columns: slice) -> Tensor:
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            if shape not in buffer:
                buffer[shape] = torch.empty(shape, dtype=torch.float32, device=self._items.device)
            tile, items = buffer[shape], self._items[columns].T
            if self._bias is None:
                return torch.mm(vectors[rows], items, out=tile)
            return torch.addmm(self._bias[columns], vectors[rows], items, out=tile)

        return top_k(
            score_tile,
            len(vectors),
            self._order,
            k,
            exclude,
            eligible=eligible,
            row_block=row_block,
            column_tile=column_tile,
            progress=progress,
        )

    @cached_property
    def _screen(self) -> bf16_screen.Bf16Screen:
        return bf16_screen.Bf16Screen(self._items, self._order)

    def _screened(self, queries: int, requested: bool | None) -> bool:
        possible = self._bias is None and self._items.device.type == "cpu" and self.num_items > 0 and queries > 0
        if requested is not None:
            return requested and possible
        return (
            possible
            and queries >= bf16_screen.LEAST_QUERIES
            and self.num_items >= bf16_screen.LEAST_ITEMS
            and bool(bf16_screen.serves())
        )

"""Sums of gradients over ranks: layers in one buffer, tables by the rows that a step touched."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from twotower.distributed.communicator import Communicator
from twotower.distributed.row_exchange import scatter_gradients
from twotower.towers import EmbeddingTable
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.training.optimizer import combine_rows


class GradientExchange:
    """Summation of every gradient over all ranks.

    Layers and small tables are reduced together in one flat buffer per data type. For a sparse gradient, each rank
    sends its P_r rows of D numbers, so the traffic depends on the rows that a step touched, not on the N rows of the
    table. The gradients of a sharded table are sent to the rank that owns the row; TorchRec does this in the
    optimizer's step. torch's DistributedDataParallel is not used: NCCL cannot reduce sparse gradients whose rows differ
    by rank, and the gradient cache embeds again inside the backward pass, which DDP's hooks would count as a second
    gradient.

    In the first step, the ranks agree on which parameters have gradients, so that a rank without rows sends gradients
    of the same parameters.

    Args:
        model: its sparse `nn.Embedding` modules are the tables with sparse gradients.
        ranks: the processes of the run.
    """

    def __init__(self, model: nn.Module, ranks: Communicator) -> None:
        self.ranks = ranks
        self.shared = shared_tables_of(model)
        held = {id(table.weight) for table in self.shared}
        sparse = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse}
        trained = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
        self.tables = [p for p in trained if id(p) in sparse]
        self.layers = [p for p in trained if id(p) not in sparse]
        self._used: list[nn.Parameter] | None = None

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Replace every parameter's `grad` with the sum over ranks; collective.

        Raises:
            RuntimeError: a parameter without a gradient in the first step has one now, so ranks would disagree.
        """
        if self.ranks.size == 1:
            return
        layers = self._layers_in_use()
        for dtype in sorted({p.dtype for p in layers}, key=str):
            self._sum_layers([p for p in layers if p.dtype == dtype])
        for table in self.tables:
            self._gather_rows(table)
        for shared in self.shared:
            self._hand_back(shared)

    def _layers_in_use(self) -> list[nn.Parameter]:
        if self._used is None:
            if not self.layers:
                return []
            flags = torch.tensor([float(p.grad is not None) for p in self.layers], device=self.layers[0].device)
            anywhere = self.ranks.sum(flags).tolist()
            self._used = [p for p, count in zip(self.layers, anywhere, strict=True) if count]
        known = {id(p) for p in self._used}
        if any(p.grad is not None and id(p) not in known for p in self.layers):
            raise RuntimeError("a parameter without a gradient in the first step has one now; ranks would disagree")
        return self._used

    def _sum_layers(self, layers: list[nn.Parameter]) -> None:
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in layers])
        total = self.ranks.sum_in_place(flat)
        for parameter, part in zip(layers, torch.split(total, [p.numel() for p in layers]), strict=True):
            parameter.grad = part.view_as(parameter)

    def _gather_rows(self, table: nn.Parameter) -> None:
        rows, values = _touched(table)
        sizes = self.ranks.sizes(len(rows), table.device)
        if not sum(sizes):
            return
        every = self.ranks.gather(rows, sizes), self.ranks.gather(values, sizes)
        table.grad = _sparse(every[0], every[1], table.shape)

    def _hand_back(self, table: EmbeddingTable) -> None:
        """Set the gradient of this rank's part of a sharded table, summed over all ranks that fetched its rows."""
        fetched, weight, part = table.fetched, table.weight, table.part
        table.release()
        weight.grad = None
        if fetched is None or part is None:
            return
        if table.engine is not None:  # the engine sends the gradients back in the optimizer's step
            table.engine.keep(table.name or "", fetched)
            return
        # Keep an empty gradient too: the optimizer must count the same steps for all parts of a table.
        rows, values = scatter_gradients(fetched, part)
        if not table.sparse:  # dense Adam moves all rows of a small table in every step, as in a single process
            weight.grad = torch.zeros_like(weight).index_add_(0, rows, values)
            return
        if weight.dtype != values.dtype:  # 16-bit sums of several ranks' gradients would lose precision
            rows, values = combine_rows(_sparse(rows, values, weight.shape))
        weight.grad = _sparse(rows, values.to(weight.dtype), weight.shape)


def _sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=False, check_invariants=False)


def _touched(table: nn.Parameter) -> tuple[Tensor, Tensor]:
    if table.grad is None:
        width = table.shape[1]
        return torch.empty(0, dtype=torch.int64, device=table.device), table.new_empty(0, width)
    rows, values = combine_rows(table.grad)
    return rows, values.to(table.dtype)


def same_start(model: nn.Module, ranks: Communicator) -> None:
    """Copy the parameters and buffers of rank 0, except for parts of sharded tables, to every rank; collective."""
    held = {id(table.weight) for table in shared_tables_of(model)}
    tensors: Iterable[Tensor] = (p for p in (*model.parameters(), *model.buffers()) if id(p) not in held)
    ranks.copy_first([tensor.detach() for tensor in tensors])

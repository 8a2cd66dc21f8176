"""Communication between the processes of a run: codes, embeddings with gradients, sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from twotower.errors import RankLost

# Newer versions of torch renamed these collectives, and warn about the old names.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Communicator:
    """The W processes that train one model, and this process among them.

    A single process (`Communicator()`) exchanges nothing, so callers need not check for other processes. All methods
    that communicate are collective: every rank must call them, in the same order. `shares`, `part` and `within` do not
    communicate.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes, W.
        group: the process group of torch.distributed; None for the default group.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def current(cls, group: Any = None) -> Communicator:
        """Return all processes of torch.distributed, or of a group; a single process without torch.distributed."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Communicator:
        """Return itself: a copy of a model has the same processes, and a process group cannot be copied."""
        return self

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which writes files and prints."""
        return self.rank == 0

    def shares(self, total: int) -> list[int]:
        """Split `total` things among the ranks; return W numbers that differ by at most one."""
        return [total // self.size + (rank < total % self.size) for rank in range(self.size)]

    def part(self, total: int) -> slice:
        """Return the range of this rank's share of `total` things, in rank order."""
        return self.within(self.shares(total))

    def within(self, sizes: list[int]) -> slice:
        """Return the range of this rank's rows in the concatenation over ranks."""
        return slice(sum(sizes[: self.rank]), sum(sizes[: self.rank + 1]))

    def sizes(self, count: int, device: torch.device | str = "cpu") -> list[int]:
        """Gather `count` from every rank; return W numbers. Synchronizes with an accelerator."""
        if self.size == 1:
            return [count]
        found = torch.empty(self.size, dtype=torch.int64, device=device)
        with self.exchange():
            _all_gather(found, torch.tensor([count], device=device), group=self.group)
        numbers: list[int] = found.tolist()
        return numbers

    def gather(self, values: Tensor, sizes: list[int] | None = None) -> Tensor:
        """Concatenate the rows of all ranks, in rank order, without gradient.

        Args:
            values: this rank's rows, [n, ...]; n may differ between ranks and may be 0.
            sizes: n of every rank, if known from `sizes`; None to exchange the sizes first.

        Returns:
            The rows of all ranks, [sum of sizes, ...].
        """
        if self.size == 1:
            return values
        sizes = self.sizes(len(values), values.device) if sizes is None else sizes
        most = max(sizes)
        if len(values) < most:
            padding = values.new_zeros(most - len(values), *values.shape[1:])
            values = torch.cat([values, padding])
        every = values.new_empty(self.size * most, *values.shape[1:])
        if most:
            with self.exchange():
                _all_gather(every, values.detach().contiguous(), group=self.group)
        if min(sizes) == most:
            return every
        return torch.cat([every[rank * most : rank * most + size] for rank, size in enumerate(sizes)])

    def gather_with_gradient(self, values: Tensor) -> Tensor:
        """Concatenate the rows of all ranks: [n, D] on each rank -> [W n, D]; n must be the same on all ranks.

        The backward pass sums the gradients of all ranks' losses with respect to a row, and returns the sum to the rank
        that contributed the row (reduce-scatter), so the result is the gradient of the *sum* of the ranks' losses.
        """
        if self.size == 1:
            return values
        every: Tensor = _Gathered.apply(values, self)  # type: ignore[no-untyped-call]
        return every

    def swap(self, values: Tensor, sent: list[int] | None = None, received: list[int] | None = None) -> Tensor:
        """Send rows to every rank and receive rows from every rank (all-to-all), in rank order, without gradient.

        Args:
            values: the rows to send, [n, ...]; dtype and trailing shape must be the same on every rank.
            sent: number of rows to send to each rank, W numbers that sum to n; None for equal numbers.
            received: number of rows to receive from each rank, W numbers; None for equal numbers.

        Returns:
            The received rows, [sum of received, ...].
        """
        if self.size == 1:
            return values
        found = values.new_empty(len(values) if received is None else sum(received), *values.shape[1:])
        with self.exchange():
            dist.all_to_all_single(found, values.detach().contiguous(), received, sent, group=self.group)
        return found

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks into a new tensor without gradient, same shape as `values`."""
        return self.sum_in_place(values.detach().clone())

    def sum_in_place(self, values: Tensor) -> Tensor:
        """Sum over ranks in place."""
        if self.size > 1:
            with self.exchange():
                dist.all_reduce(values, group=self.group)
        return values

    def agree(self, said: bool) -> bool:  # one boolean argument reads well positionally
        """Return whether any rank passed True."""
        return said if self.size == 1 else bool(self.sum(torch.tensor([float(said)], device=self.device)) > 0)

    def copy_first(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors on every rank with the tensors of rank 0; shapes must be equal."""
        if self.size > 1:
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            with self.exchange():
                for tensor in tensors:
                    dist.broadcast(tensor, source, group=self.group)

    def wait(self) -> None:
        """Wait until every rank has called this method."""
        self.agree(False)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Wrap an exchange, to report a rank that has ended or does not respond.

        Raises:
            RankLost: torch.distributed has failed; replaces its error.
        """
        try:
            yield
        except RuntimeError as error:
            raise self.lost(error) from error

    def lost(self, error: RuntimeError) -> RankLost:
        """Build the error to raise after a failure of torch.distributed."""
        reason = " ".join(str(error).split())
        return RankLost(
            f"rank {self.rank} of {self.size}: another rank is gone or did not respond in time; "
            f"`torchrun --max-restarts` restarts all ranks from what they have saved ({reason[:200]})"
        )

    @property
    def device(self) -> torch.device:
        """The device that tensors must be on for an exchange in this group; NCCL handles only device memory."""
        on_cuda = self.size > 1 and "nccl" in str(dist.get_backend(self.group))
        return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")


def comes_from_exchange(error: RuntimeError) -> bool:
    """Return whether an error is from torch.distributed; exchanges made by Lightning are not wrapped."""
    # gloo and aborted NCCL communicators raise plain RuntimeErrors with source paths in the text.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("/gloo/", "ProcessGroup", "NCCL"))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Communicator) -> Tensor:
        ctx.ranks, ctx.rows = ranks, len(values)
        every = values.new_empty(ranks.size * len(values), *values.shape[1:])
        if len(values):
            with ranks.exchange():
                _all_gather(every, values.contiguous(), group=ranks.group)
        return every

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        own = grad.new_empty(ctx.rows, *grad.shape[1:])
        if ctx.rows:
            with ctx.ranks.exchange():
                _reduce_scatter(own, grad.contiguous(), group=ctx.ranks.group)
        return own, None

"""Sharded tables in TorchRec: placement by its planner; lookup, exchange and update of rows by its sharded modules.

TorchRec and FBGEMM are the extra `distributed`. They are imported only when a run uses them, because the import takes
seconds.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from twotower.distributed.communicator import Communicator, comes_from_exchange
from twotower.distributed.partition import RowShard
from twotower.distributed.row_exchange import FetchedRows
from twotower.errors import InputError

#: How the planner may place a table: on one rank, by rows over all ranks, or whole on every rank.
Way = Literal["table-wise", "row-wise", "replicated"]

INSTALL = "pip install --no-deps torchrec fbgemm-gpu, then pip install 'twotower[distributed]'"


def is_installed() -> bool:
    """Return whether TorchRec and FBGEMM are installed, without importing them."""
    return find_spec("torchrec") is not None and find_spec("fbgemm_gpu") is not None


@cache
def library() -> SimpleNamespace:
    """Import TorchRec quietly and return the names that are used here.

    Raises:
        InputError: TorchRec is not installed, or is incompatible with the installed torch.
    """
    if not is_installed():
        raise InputError(f"torchrec: not installed; run {INSTALL}, or use training.table_engine=builtin")
    try:
        with _quiet():
            import fbgemm_gpu  # noqa: PLC0415  # all of these take seconds
            from fbgemm_gpu.split_embedding_configs import EmbOptimType  # noqa: PLC0415
            from torchrec.distributed import comm_ops, sharding_plan  # noqa: PLC0415
            from torchrec.distributed.embedding import EmbeddingCollectionSharder  # noqa: PLC0415
            from torchrec.distributed.planner import planners, storage_reservations, types  # noqa: PLC0415
            from torchrec.distributed.types import BoundsCheckMode, ShardingEnv  # noqa: PLC0415
            from torchrec.modules.embedding_configs import EmbeddingConfig  # noqa: PLC0415
            from torchrec.modules.embedding_modules import EmbeddingCollection  # noqa: PLC0415
            from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: PLC0415
    except (ImportError, OSError, AttributeError) as error:
        raise InputError(
            f"torchrec: cannot be imported with torch {torch.__version__} ({type(error).__name__}: {error}); install "
            "the versions in constraints.txt, or use training.table_engine=builtin"
        ) from error
    # Otherwise torch warns in the first lookup about a function that TorchRec calls.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    return SimpleNamespace(
        variant=fbgemm_gpu.__variant__,
        EmbOptimType=EmbOptimType,
        comm_ops=comm_ops,
        sharding_plan=sharding_plan,
        EmbeddingCollectionSharder=EmbeddingCollectionSharder,
        planners=planners,
        storage_reservations=storage_reservations,
        types=types,
        BoundsCheckMode=BoundsCheckMode,
        ShardingEnv=ShardingEnv,
        EmbeddingConfig=EmbeddingConfig,
        EmbeddingCollection=EmbeddingCollection,
        KeyedJaggedTensor=KeyedJaggedTensor,
    )


def cuda_fault() -> str | None:
    """Explain why TorchRec cannot use a CUDA device, and what to install; return None if it can."""
    try:
        variant = library().variant
    except InputError as error:
        return str(error)
    return "FBGEMM is the build for CPUs; use pip install --no-deps fbgemm-gpu" if variant == "cpu" else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings and log entries of TorchRec, and undo its changes of the root logger."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


@dataclass(frozen=True)
class PlannedTable:
    """The placement of one table by TorchRec's planner, with its estimates.

    Attributes:
        way: how it is placed.
        holder: the rank of a table-wise table; None otherwise.
        milliseconds: the planner's estimate of the time of lookup, update and exchange, on the slowest rank.
        bytes_per_rank: the planner's estimate of the memory, on the rank that needs the most.
    """

    way: Way
    holder: int | None
    milliseconds: float
    bytes_per_rank: int

    def part(self, ranks: Communicator, rows: int) -> RowShard | None:
        """Return a rank's part of the table; None for a whole table."""
        return None if self.way == "replicated" else RowShard(ranks, rows, self.holder)


def plan_tables(
    tables: Mapping[str, int],
    width: int,
    allowed: Mapping[str, tuple[Way, ...]],
    *,
    size: int,
    lookups: int,
    device: Literal["cpu", "cuda"],
    memory: int | None,
    local_size: int | None = None,
    link: float | None = None,
) -> dict[str, PlannedTable] | None:
    """Place tables with TorchRec's planner; nothing is allocated, and the result is the same on every rank.

    Args:
        tables: rows of each table, by name.
        width: width of the tables, D.
        allowed: the placements to choose from, by name.
        size: number of ranks, W.
        lookups: number of distinct rows of a table that a rank looks up in a step.
        device: where the tables are.
        memory: bytes for tables and their state on a rank; None if there is no limit.
        local_size: number of ranks per machine; None if all W are on one machine.
        link: bytes per second between machines; None for the planner's default.

    Returns:
        The placement by name; None if the tables do not fit.
    """
    lib = library()
    names = {"table-wise": "table_wise", "row-wise": "row_wise", "replicated": "data_parallel"}
    words = {name: word for word, name in names.items()}
    types = lib.types
    capacity = (1 << 62) if memory is None else memory
    hardware = {} if link is None else {"inter_host_bw": link / 1000}  # bytes per millisecond
    topology = types.TopologyFactory.create_topology(
        trainer_config=types.TrainerConfig(
            world_size=size,
            local_world_size=local_size or size,
            hbm_cap_bytes=capacity if device == "cuda" else 0,
            ddr_cap_bytes=capacity,
        ),
        hardware_config=types.HardwareConfig(**hardware),
        kernel_config=types.KernelConfig(compute_device=device),
    )
    constraints = {
        name: types.ParameterConstraints(
            sharding_types=[names[one] for one in ways],
            compute_kernels=["dense" if one == "replicated" else "fused" for one in ways],
            pooling_factors=[float(lookups)],
        )
        for name, ways in allowed.items()
    }
    stats = _Options()
    planner = lib.planners.EmbeddingShardingPlanner(
        topology=topology,
        batch_size=1,
        constraints=constraints,
        storage_reservation=lib.storage_reservations.FixedPercentageStorageReservation(0.0),
        stats=stats,
        debug=False,
    )
    try:
        with _quiet():
            planner.plan(_collection(tables, width), [_sharder(1e-8)])
    except types.PlannerError:
        return None
    found = {}
    for option in stats.options:
        way: Way = words[option.sharding_type]  # type: ignore[assignment]
        held = [shard.storage.hbm + shard.storage.ddr for shard in option.shards]
        slowest = max(shard.perf.total for shard in option.shards)
        holder = option.shards[0].rank if way == "table-wise" else None
        found[option.name] = PlannedTable(way, holder, float(slowest), max(held))
    return found


class _Options:
    """A record of the planner's chosen options, which contain its estimates."""

    options: list[Any]

    def log(self, *_: Any, best_plan: list[Any], **__: Any) -> None:
        self.options = best_plan


def _collection(tables: Mapping[str, int], width: int) -> Any:
    lib = library()
    configs = [
        # The default would draw initial values from the generator of the other weights.
        lib.EmbeddingConfig(
            name=name, embedding_dim=width, num_embeddings=rows, feature_names=[name], init_fn=lambda _: None
        )
        for name, rows in tables.items()
    ]
    return lib.EmbeddingCollection(tables=configs, device=torch.device("meta"))


def _sharder(eps: float) -> Any:
    lib = library()
    return lib.EmbeddingCollectionSharder(
        fused_params={
            "optimizer": lib.EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "eps": eps,
            "bounds_check_mode": lib.BoundsCheckMode.FATAL,  # the default looks up row 0 for a wrong code
        }
    )


class TorchRecTables:
    """All sharded id tables of a model in one `ShardedEmbeddingCollection`, with row-wise Adagrad fused into it.

    `fetch` looks up the distinct codes of a step in one exchange for all tables. `update` sends one gradient per row
    back and updates each row once, with the sum over ranks. Weights and accumulators are in FBGEMM's memory, and
    `weight` and `accumulator` are views of it, so that initial values, checkpoints, search and model folders treat
    these tables like the tables of the built-in exchange.

    Args:
        parts: this rank's parts of the tables, by name; all shared by the same ranks.
        width: D, a multiple of 4.
        eps: added to the root of the accumulator.
    """

    def __init__(self, parts: Mapping[str, RowShard], width: int, *, eps: float = 1e-8) -> None:
        lib = library()
        self.ranks = next(iter(parts.values())).ranks
        self.parts, self.eps, self.device = dict(parts), eps, self.ranks.device
        #: Loads the accumulators and returns the learning rate; set by the optimizer. FBGEMM takes both in the lookup.
        self.before_lookup: Callable[[], float] = lambda: 0.0
        plan = lib.sharding_plan
        ways = {
            name: plan.row_wise(compute_kernel="fused")
            if part.holder is None
            else plan.table_wise(rank=part.holder, compute_kernel="fused")
            for name, part in parts.items()
        }
        collection, sharder = _collection({name: part.rows for name, part in parts.items()}, width), _sharder(eps)
        group: Any = torch.distributed.group.WORLD if self.ranks.group is None else self.ranks.group
        sharding = plan.construct_module_sharding_plan(
            collection,
            ways,
            sharder=sharder,
            local_size=self.ranks.size,
            world_size=self.ranks.size,
            device_type=self.device.type,
        )
        env = lib.ShardingEnv(self.ranks.size, self.ranks.rank)
        env.process_group = group  # in the constructor, TorchRec would create a mesh with a new, unused group
        with _quiet(), torch.random.fork_rng():  # FBGEMM draws values, which are overwritten
            self._module = sharder.shard(collection, sharding, env, self.device)
        no_rows = torch.empty(0, width, device=self.device)
        self._memory = dict.fromkeys(parts, (no_rows, no_rows[:, 0]))
        for lookup in self._module._lookups:
            for held in lookup._emb_modules:
                kernel = held.emb_module
                each = zip(
                    held.config.embedding_tables,
                    kernel.split_embedding_weights(),
                    kernel.split_optimizer_states(),
                    strict=True,
                )
                for table, weight, (accumulator,) in each:
                    self._memory[table.name] = (weight.detach(), accumulator.detach().view(-1))
        for name, part in parts.items():
            assert self.weight(name).shape == (len(part), width), (name, self.weight(name).shape)
        self._pending: dict[str, tuple[Tensor, Tensor]] = {}
        self._rows: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copy of a model, such as its moving average, has its own tables, which no step updates."""

    def weight(self, name: str) -> Tensor:
        """Return the rows of this rank, [n, D], without a copy."""
        return self._memory[name][0]

    def accumulator(self, name: str) -> Tensor:
        """Return the sums of squares of row-wise Adagrad for the rows of this rank, [n], without a copy."""
        return self._memory[name][1]

    def fetch(self, codes: Mapping[str, Tensor]) -> dict[str, FetchedRows]:
        """Look up rows of every table and exchange them; collective.

        Args:
            codes: int64 by name of the table, any shape and order, duplicates allowed; may be empty.

        Returns:
            The distinct rows of each table.
        """
        lib, rate = library(), self.before_lookup()
        for group in self._module.fused_optimizer.param_groups:
            group["lr"] = rate
        self._module.fused_optimizer.step()  # only passes the learning rate on
        distinct = {name: torch.unique(codes[name]) for name in self.parts}
        lengths = torch.tensor([len(one) for one in distinct.values()], dtype=torch.int32, device=self.device)
        asked = lib.KeyedJaggedTensor(
            keys=list(distinct), values=torch.cat(list(distinct.values())).to(self.device), lengths=lengths
        )
        with torch.enable_grad(), self._exchange():
            found = self._module(asked)
            self._rows = {name: found[name].values() for name in distinct}
        return {
            name: FetchedRows(one, self._rows[name].detach().requires_grad_(), None) for name, one in distinct.items()
        }

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Report a rank that has ended; other errors of TorchRec are raised unchanged."""
        try:
            yield
        except RuntimeError as error:
            raise (self.ranks.lost(error) if comes_from_exchange(error) else error) from error

    def keep(self, name: str, fetched: FetchedRows) -> None:
        """Keep the gradients of a table's fetched rows until `update`."""
        found = fetched.rows.grad
        self._pending[name] = (self._rows.pop(name), torch.zeros_like(fetched.rows) if found is None else found)

    def update(self) -> bool:
        """Send the gradients of all tables back and update their rows; collective. Return whether there were any."""
        if not self._pending:
            return False
        rows, gradients = zip(*self._pending.values(), strict=True)
        self._pending = {}
        comm_ops = library().comm_ops
        divides = comm_ops.get_gradient_division()
        comm_ops.set_gradient_division(False)  # shares of the loss add up to the loss: gradients are summed
        try:
            with self._exchange():
                torch.autograd.backward(list(rows), list(gradients))
        finally:
            comm_ops.set_gradient_division(divides)
        return True

"""Estimates for a distributed run before any machine is rented: memory per rank, bytes exchanged, step time.

The amounts per step follow the code in training/: the bytes gathered and reduced, and the rows touched. Rates are
measured on the local machine (`measure_rates`); a plan for other machines is only as good as the rates supplied for
them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from twotower.config.towers import nested_widths
from twotower.errors import InputError

if TYPE_CHECKING:
    from twotower.distributed.torchrec_tables import PlannedTable

F4, I8 = 4, 8
#: Size in bytes of a tile of logits on a CPU and on an accelerator (losses/tiled/blocks.py).
TILES = {"cpu": 8 << 20, "cuda": 256 << 20}
#: Entries of `ScalePlan.memory` that exist throughout; the others exist only during a step.
HELD = ("process", "tables", "optimizer state", "layers and their state")


@dataclass(frozen=True)
class Workload:
    """The size of a training run.

    Attributes:
        items: number of items, N.
        dimension: width of the embeddings, D.
        batch: rows of a step over all ranks.
        ranks: number of ranks, W.
        queries: rows of the query table; 0 if there is none.
        history: length of the histories, L; 0 if there are none.
        sampled: candidates drawn in addition to the positives of the batch.
        hidden: widths of the query tower's hidden layers.
        optimizer: update rule of the tables.
        precision: type in which tables are stored.
        layout: `replicated`: whole tables on every rank; `row-wise`: 1/W of the rows per rank; `table-wise`: each table
            on one rank.
        device: "cpu" or "cuda".
        nested: nested widths as in `item_tower.nested`; the loss is computed at each of them and at D.
    """

    items: int
    dimension: int = 64
    batch: int = 8192
    ranks: int = 1
    queries: int = 0
    history: int = 50
    sampled: int = 1024
    hidden: tuple[int, ...] = (128,)
    optimizer: Literal["adam", "rowwise-adagrad"] = "adam"
    precision: Literal["float32", "bfloat16"] = "float32"
    layout: Literal["replicated", "row-wise", "table-wise"] = "replicated"
    device: Literal["cpu", "cuda"] = "cpu"
    nested: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Reject impossible sizes.

        Raises:
            InputError: a size is out of range.
        """
        for name in ("items", "dimension", "batch", "ranks"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}: expected at least 1, found {getattr(self, name)}")
        if self.batch < self.ranks:
            raise InputError(f"--batch: {self.batch} rows for {self.ranks} ranks; expected at least one row per rank")
        wrong = [width for width in self.nested if not 1 <= width <= self.dimension]
        if wrong or list(self.nested) != sorted(set(self.nested)):
            raise InputError(
                f"--nested: expected ascending widths from 1 to --dimension {self.dimension}, found {list(self.nested)}"
            )

    @property
    def all_widths(self) -> int:
        """Sum of the widths at which the loss is computed, as in memory_plan.py."""
        return sum(nested_widths(self.nested, self.dimension))

    @property
    def rows(self) -> int:
        """Rows of a step on the rank with the most rows."""
        return -(-self.batch // self.ranks)

    @property
    def candidates(self) -> int:
        """Upper bound on M: the batch's items and the drawn items, each counted once."""
        return min(self.batch + self.sampled, self.items)

    @property
    def held(self) -> float:
        """Number of table rows on the rank that has the most."""
        if self.layout == "row-wise":
            return (self.items + self.queries) / self.ranks
        if self.layout == "table-wise" and self.ranks > 1:
            return float(max(self.items, self.queries))
        return float(self.items + self.queries)

    @property
    def serves_all(self) -> bool:
        """Whether a rank handles the touched rows of all ranks, because it has the whole item table."""
        return self.ranks > 1 and self.layout in ("replicated", "table-wise")

    @property
    def layers(self) -> int:
        """Number of parameters in the query tower's layers."""
        widths = [self.dimension * (bool(self.history) + bool(self.queries)), *self.hidden, self.dimension]
        return sum(a * b + b for a, b in pairwise(widths))

    def distinct(self, draws: float) -> float:
        """Return the expected number of distinct items among uniform draws, an upper bound for any distribution."""
        return self.items * -math.expm1(-draws / self.items)

    @property
    def touched(self) -> float:
        """Table rows that a rank touches in a step: its share of the candidates, its histories and its queries."""
        own = self.candidates / self.ranks
        return own + self.distinct(self.rows * self.history) + (self.rows if self.queries else 0)


@dataclass(frozen=True)
class Rates:
    """Speed of a machine, and memory used before training.

    Attributes:
        products: floating-point operations (2 per multiply-add) per second in the loss, float32, forward and backward.
        layers: operations per second in the towers' layers.
        updates: table values (rows times D) that the optimizer updates per second.
        lookups: table values looked up per second, including the backward pass.
        link: bytes that one rank sends and receives per second.
        latency: latency of one exchange, in seconds.
        process: memory of the process with its libraries, in bytes.
    """

    products: float
    layers: float
    updates: float
    lookups: float
    link: float
    latency: float
    process: int


def read_rates(path: Path) -> Rates:
    """Read rates from the output of `twotower plan --json`, possibly run on another machine.

    Raises:
        InputError: the file does not exist or is not JSON, or a rate is missing.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Rates(**{field.name: document.get("rates", document)[field.name] for field in fields(Rates)})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: no rates found ({type(error).__name__}: {error}); expected the output of `twotower plan --json`"
        ) from error


@dataclass(frozen=True)
class ScalePlan:
    """Memory, traffic and step time of one rank.

    Attributes:
        workload: the planned workload.
        rates: the rates from which times are computed.
        memory: bytes by name, at the peak of a training step.
        ranking: bytes by name that validation needs while it ranks the catalog, in place of a step's bytes.
        exchanged: bytes that a rank sends in a step, by name; it receives the same number.
        seconds: duration of each part of a step, by name; the parts run one after the other.
        device_memory: bytes available to a rank; None if unknown.
        planned: the placement of each table by TorchRec's planner, with its estimates; None if it was not used.
    """

    workload: Workload
    rates: Rates
    memory: dict[str, float]
    ranking: dict[str, float]
    exchanged: dict[str, float]
    seconds: dict[str, float]
    device_memory: float | None
    planned: dict[str, PlannedTable] | None = None

    @property
    def moments(self) -> dict[str, float]:
        """Total bytes during a step and during a ranking."""
        held = sum(self.memory[name] for name in HELD)
        return {"step": sum(self.memory.values()), "ranking": held + sum(self.ranking.values())}

    @property
    def peak(self) -> float:
        """The larger total of `moments`."""
        return max(self.moments.values())

    @property
    def checkpoint(self) -> float:
        """Bytes of main memory for a copy of the state, while a checkpoint is written in the background."""
        layers = 3.0 * F4 * self.workload.layers  # weights and two state values for each
        return self.memory["tables"] + self.memory["optimizer state"] + layers

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def bottleneck(self) -> str:
        """The slowest part of a step, or the largest part of the memory if the run does not fit."""
        if self.fits is False:
            parts = self.memory
            if self.moments["ranking"] == self.peak:
                parts = {name: parts[name] for name in HELD} | {"ranking": sum(self.ranking.values())}
            return f"memory ({max(parts, key=lambda name: parts[name])})"
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def fits(self) -> bool | None:
        """Whether steps and rankings fit into a rank's memory; None if its size is unknown."""
        return None if self.device_memory is None else self.peak <= self.device_memory

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values: bytes and seconds."""
        names = ("memory", "ranking", "moments", "peak", "checkpoint", "exchanged", "seconds", "step")
        named = {name: getattr(self, name) for name in (*names, "device_memory", "fits", "bottleneck")}
        planned = None if self.planned is None else {name: asdict(one) for name, one in self.planned.items()}
        return {"workload": asdict(self.workload), "rates": asdict(self.rates), **named, "planned": planned}


def plan_scale(workload: Workload, rates: Rates, device_memory: float | None = None) -> ScalePlan:
    """Compute a plan; nothing is allocated.

    In an exchange of n bytes by all ranks, each rank sends n (W - 1) / W bytes, as in a ring; to sum gradients, each
    sends twice that. Exchanges and computation are assumed to run one after the other, as in the code.
    """
    memory, ranking, exchanged = _memory(workload, rates), _ranking(workload), _exchanged(workload)
    seconds = _computing(workload, rates) | {
        f"exchange of {name}": count / rates.link + rates.latency for name, count in exchanged.items() if count
    }
    return ScalePlan(workload, rates, memory, ranking, exchanged, seconds, device_memory)


def place_by_planner(
    work: Workload, *, per_machine: int = 8, link: float | None = None, device_memory: float | None = None
) -> tuple[Workload, dict[str, PlannedTable]]:
    """Let TorchRec's planner place the tables, and return the workload with the layout of the item table.

    Args:
        work: the workload; its layout is replaced.
        per_machine: number of ranks per machine.
        link: bytes per second between machines; None for the planner's default.
        device_memory: bytes for tables on a rank; None for no limit.

    Raises:
        InputError: TorchRec is not installed or does not support the workload, or no placement fits.
    """
    from twotower.distributed.torchrec_tables import plan_tables  # noqa: PLC0415  # torch

    if work.optimizer != "rowwise-adagrad" or work.precision != "float32":
        raise InputError(
            "--layout auto: TorchRec's planner supports only float32 tables with row-wise Adagrad; use --optimizer "
            "rowwise-adagrad --precision float32, or name a layout"
        )
    tables = {name: rows for name, rows in (("item", work.items), ("query", work.queries)) if rows}
    planned = plan_tables(
        tables,
        work.dimension,
        dict.fromkeys(tables, ("replicated", "table-wise", "row-wise")),
        size=work.ranks,
        lookups=math.ceil(work.touched),
        device=work.device,
        memory=None if device_memory is None else int(device_memory),
        local_size=min(per_machine, work.ranks),
        link=link,
    )
    if planned is None:
        raise InputError("--layout auto: no placement fits; use more --ranks, or a larger --device-memory")
    return replace(work, layout=planned["item"].way), planned


def _memory(work: Workload, rates: Rates) -> dict[str, float]:
    number = 2 if work.precision == "bfloat16" else F4
    state = F4 if work.optimizer == "rowwise-adagrad" else 2 * F4 * work.dimension
    # The gathered table gradients of all ranks (rows and vectors), and a second copy when they are combined.
    arriving = work.touched * (work.ranks if work.serves_all else 1)
    row = work.dimension * F4
    of_tables = {"gradients of tables": (work.touched + 2 * arriving) * row}
    if work.layout != "replicated":
        # Fetched rows and their gradients for two lookups; rows sent to other ranks, and gradients received for them.
        of_tables = {"rows of tables": 3 * work.touched * row, "gradients of rows": (work.touched + 2 * arriving) * row}
    return {
        "process": float(rates.process),
        "tables": work.held * work.dimension * number,
        "optimizer state": work.held * state,
        "layers and their state": 4.0 * F4 * work.layers,
        **of_tables,
        "candidates": 4.0 * work.candidates * work.all_widths * F4,
        "rows and histories": work.rows * (3 * work.history * row + 6 * work.all_widths * F4),
        "tile": float(TILES[work.device]),
    }


def _ranking(work: Workload) -> dict[str, float]:
    """Estimate a ranking's memory as in memory_plan.py: embeddings of all items or of a rank's shard, and an index."""
    row, shared = work.dimension * F4, work.layout != "replicated" and work.ranks > 1
    catalog = work.items * row / (work.ranks if shared else 1)
    return {
        "gradients of the last step": work.touched * (work.ranks if work.serves_all else 1) * row,
        "item embeddings": catalog if shared else 2 * catalog,
        # Items in index order, unless sharded; a bfloat16 copy on a CPU (index/bf16_screen.py); a NaN mask.
        "index": ((not shared) + 0.5 * (work.device == "cpu") + 0.25) * catalog,
    }


def _exchanged(work: Workload) -> dict[str, float]:
    if work.ranks == 1:
        return {}
    part, row = (work.ranks - 1) / work.ranks, work.dimension * F4
    sent = {
        "codes": work.batch * I8 * part,
        "candidates": work.candidates * row * part,
        "gradients of candidates": work.candidates * row * part,
        "gradients of layers": 2 * work.layers * F4 * part,
    }
    if work.layout == "replicated":
        return {**sent, "gradients of tables": work.touched * (row + I8) * (work.ranks - 1)}
    # Rows are fetched from the ranks that own them, and gradients are sent back. A rank with a whole table sends rows
    # to all others and receives their gradients; its traffic is counted, because the other ranks send less.
    if work.layout == "table-wise":
        others = work.touched * (work.ranks - 1)
        return {**sent, "rows of tables": others * (row + I8), "gradients of rows": others * row}
    return {**sent, "rows of tables": work.touched * (row + I8) * part, "gradients of rows": work.touched * row * part}


def _computing(work: Workload, rates: Rates) -> dict[str, float]:
    width, moved = work.dimension, work.touched * work.dimension
    if work.serves_all:
        moved = work.distinct(work.touched * work.ranks) * width
    return {
        "loss": 6.0 * work.rows * work.candidates * work.all_widths / rates.products,
        "towers' layers": 6.0 * work.rows * work.layers / rates.layers,
        "lookups": work.rows * max(work.history, 1) * width / rates.lookups,
        "optimizer": moved / rates.updates,
    }

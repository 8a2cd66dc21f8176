"""Cases that are trained twice, by several ranks and by one; used by the test and by the processes it starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from case_rows import (
    LENGTH,
    NUM_ITEMS,  # noqa: F401  # tests say cases.NUM_ITEMS
    NUM_QUERIES,  # noqa: F401
    STEPS,
    batches,
    interactions,
    sequence_batches,
)
from torch import Tensor, nn

from twotower.config.run import Config
from twotower.data import KnownPositives
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard, placed_tables
from twotower.objectives.build import build_objective, needs_known_positives
from twotower.run.propagation import use_training_rows
from twotower.towers import EmbeddingTable, build_towers
from twotower.training import TableOptimizer, compute_loss
from twotower.training.gradient_sync import GradientExchange
from twotower.training.optimizer import parameter_groups
from twotower.training.placement import place_tables
from twotower.training.seeds import draws_of


@dataclass(frozen=True)
class Case:
    """Settings of one training run.

    Attributes:
        changes: of the configuration.
        sparse: give the tables sparse gradients, as large ones have.
        weighted: rows carry weights.
        size: W of the run that is compared with one process.
        micro_batch: rows that go through a tower at a time.
        placement: of the id tables, as in the settings.
        engine: of sharded tables, as in the settings.
    """

    changes: tuple[str, ...]
    sparse: bool = False
    weighted: bool = False
    size: int = 2
    micro_batch: int | None = None
    placement: str = "replicated"
    engine: str = "auto"


def objective(name: str, *sources: str, unique: bool = False, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    given = f"objective.sources=[{', '.join(sources)}]"
    return (f"objective.name={name}", given, f"objective.unique={str(unique).lower()}", *more)


def sequences(inner: str = "kind: transformer", outer: str = "share_table: true") -> tuple[str, ...]:
    sequence = f"blocks: 1, heads: 2, dropout: 0, {inner}"
    return (f"query_tower.history={{length: {LENGTH}, dropout: 0, {outer}, sequence: {{{sequence}}}}}",)


IN_BATCH, UNIFORM = "{in_batch: {}}", "{uniform: {size: 15}}"
KNOWN = ("objective.mask_known_positives=true",)
ROWWISE = ("training.table_optimizer=rowwise-adagrad",)
OWN_HISTORY = f"query_tower.history={{length: {LENGTH}, heads: 2, dropout: 0, share_table: false}}"
NESTED = ("item_tower.nested=[3, 5]", "item_tower.popularity=0.5")
BLOCKS = ("objective.rows_per_draw=5",)
PROPAGATED = (
    "query_tower.propagation=2",
    "query_tower.history=null",
    "query_tower.hidden=null",
    "item_tower.hidden=[]",
    "item_tower.popularity=0.5",
)
SASREC, DOT = (
    ("{head: {size: 6}}", "{frequency: {size: 9, power: 0.5}}"),
    ("objective.similarity=dot", "objective.temperature=1", "item_tower.hidden=[]"),
)
CASES = {
    "in-batch kept": Case(objective("expected-count", IN_BATCH)),
    "in-batch unique": Case(objective("expected-count", IN_BATCH, unique=True)),
    "mixed": Case(objective("expected-count", IN_BATCH, UNIFORM, unique=True), sparse=True),
    "mixed as published": Case(objective("mixed", IN_BATCH, UNIFORM), weighted=True),
    "head": Case(objective("expected-count", IN_BATCH, "{head: {size: 6}}", UNIFORM), sparse=True),
    "memory": Case(objective("expected-count", IN_BATCH, "{memory: {size: 30}}", unique=True), sparse=True),
    "known positives": Case(objective("expected-count", IN_BATCH, UNIFORM, more=KNOWN), weighted=True),
    "streaming": Case(
        objective("expected-count", IN_BATCH, "{memory: {size: 30}}", more=("objective.frequency=streaming",))
    ),
    "uniform alone": Case(objective("sampled-softmax-uniform", UNIFORM, more=ROWWISE), sparse=True),
    "per row": Case(objective("gbce", "{uniform: {size: 4, per_row: true}}")),
    "refined": Case(objective("refined-logq", IN_BATCH)),
    "full softmax": Case(objective("full-softmax", "{catalog: {}}"), sparse=True),
    "propagation, three ranks": Case(
        objective("expected-count", IN_BATCH, UNIFORM, unique=True, more=PROPAGATED), weighted=True, size=3
    ),
    # Row-wise: Adam would amplify the rounding of elements whose gradient is nearly zero; it has micro-batches below.
    "micro-batch": Case(
        objective("expected-count", IN_BATCH, UNIFORM, unique=True, more=ROWWISE), sparse=True, micro_batch=3
    ),
    "three ranks": Case(
        objective("expected-count", IN_BATCH, UNIFORM, unique=True), sparse=True, weighted=True, size=3
    ),
    "row-wise": Case(
        objective("expected-count", IN_BATCH, UNIFORM, unique=True, more=ROWWISE),
        sparse=True,
        weighted=True,
        placement="row-wise",
    ),
    "row-wise, adam, micro-batch": Case(
        objective("expected-count", IN_BATCH, "{memory: {size: 30}}", unique=True),
        sparse=True,
        micro_batch=3,
        placement="row-wise",
    ),
    "row-wise, small": Case(objective("expected-count", IN_BATCH), placement="row-wise"),
    "row-wise, three ranks": Case(
        objective("gbce", "{uniform: {size: 4, per_row: true}}", more=ROWWISE),
        sparse=True,
        size=3,
        placement="row-wise",
    ),
    "row-wise, own history table": Case(
        objective(
            "full-softmax",
            "{catalog: {}}",
            more=(OWN_HISTORY,),
        ),
        sparse=True,
        size=3,
        placement="row-wise",
    ),
    "table-wise": Case(
        objective("expected-count", IN_BATCH, UNIFORM, more=ROWWISE),
        sparse=True,
        placement="table-wise",
        engine="torchrec",
    ),
    "table by table, three ranks": Case(
        objective("gbce", "{uniform: {size: 4, per_row: true}}", more=(OWN_HISTORY, *ROWWISE)),
        sparse=True,
        size=3,
        placement="{item: row-wise, history: table-wise, query: table-wise}",
        engine="torchrec",
    ),
    "sequences": Case(
        objective("expected-count", IN_BATCH, UNIFORM, more=sequences("recency: 2")), sparse=True, weighted=True
    ),
    "sequences, streaming": Case(
        objective("expected-count", "{memory: {size: 30}}", more=(*sequences(), "objective.frequency=streaming")),
        size=3,
    ),
    "sequences, row-wise": Case(
        objective("expected-count", IN_BATCH, UNIFORM, unique=True, more=sequences("recency: 2")),
        sparse=True,
        weighted=True,
        micro_batch=12,
        placement="row-wise",
    ),
    "sequences, row-wise, three ranks": Case(
        objective(
            "gbce",
            "{uniform: {size: 4, per_row: true}}",
            more=(*sequences("kind: gru", "share_table: false"), *ROWWISE),
        ),
        sparse=True,
        size=3,
        placement="row-wise",
    ),
    # Separate draws for blocks of five rows: blocks span ranks, and the last block is smaller.
    "draws for blocks": Case(
        objective("expected-count", IN_BATCH, "{memory: {size: 30}}", more=(*KNOWN, *BLOCKS)), weighted=True
    ),
    "draws for blocks, row-wise, three ranks": Case(
        objective("gbce", "{uniform: {size: 4, per_row: true}}", UNIFORM, more=(*BLOCKS, *ROWWISE)),
        sparse=True,
        size=3,
        placement="row-wise",
    ),
    # As the preset sasrec, except for size and dropout.
    "draws for blocks, sequences": Case(
        objective("expected-count", *SASREC, more=(*sequences("expansion: 1.0"), *BLOCKS, *DOT)), size=3
    ),
    "draws for blocks, sequences, row-wise": Case(
        objective("expected-count", *SASREC, more=(*sequences(), *BLOCKS)),
        sparse=True,
        weighted=True,
        micro_batch=12,
        placement="row-wise",
    ),
    "nested": Case(
        objective("expected-count", IN_BATCH, UNIFORM, unique=True, more=(*KNOWN, *NESTED)), weighted=True, size=3
    ),
    "nested, row-wise, micro-batch": Case(
        objective("gbce", "{uniform: {size: 4, per_row: true}}", UNIFORM, more=(*ROWWISE, *NESTED)),
        sparse=True,
        micro_batch=3,
        placement="row-wise",
    ),
    "three ranks, memory": Case(objective("expected-count", IN_BATCH, "{memory: {size: 30}}", more=KNOWN), size=3),
}
#: With TorchRec: every case except propagation, which needs whole tables; with row-wise Adagrad.
WITH_TORCHREC = {
    f"TorchRec: {name}": replace(
        case,
        changes=tuple(dict.fromkeys((*case.changes, *ROWWISE))),
        placement="row-wise" if case.placement == "replicated" else case.placement,
        engine="torchrec",
    )
    for name, case in CASES.items()
    if PROPAGATED[0] not in case.changes
}

#: The others are slow: one of each kind of batch, table and rank.
IN_GATE = CASES | {
    f"TorchRec: {name}": WITH_TORCHREC[f"TorchRec: {name}"]
    for name in (
        "row-wise",
        "row-wise, adam, micro-batch",
        "sequences, row-wise, three ranks",
        "draws for blocks, row-wise, three ranks",
    )
}


@dataclass
class Trained:
    """Result of a training run.

    Attributes:
        losses: the mean loss of every step.
        first: gradients of the first step, by name.
        last: gradients of the last step.
        state: parameters, and the state of the objective.
        held: bytes of the tables and of the optimizer's state for them in this process.
    """

    losses: list[float] = field(default_factory=list)
    first: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    held: int = 0


def train(case: Case, ranks: Communicator) -> Trained:
    data = interactions()
    config = Config.load(
        None,
        [
            "item_tower.dimension=8",
            "item_tower.hidden=[10]",
            "query_tower.id_embedding=true",
            "query_tower.hidden=[12]",
            "query_tower.dropout=0",
            f"query_tower.history={{length: {LENGTH}, heads: 2, dropout: 0}}",
            "training.batch_size=12",
            "training.warmup_steps=2",
            f"training.table_placement={case.placement}",
            f"training.table_engine={case.engine}",
            *case.changes,
        ],
    ).resolved(len(data))
    torch.manual_seed(3)
    placement = place_tables(config, data, ranks)
    with placed_tables(placement.parts, placement.open_engine(8)):
        towers = build_towers(config, num_queries=data.num_queries, num_items=data.num_items).train()
    for module in towers.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = case.sparse
    use_training_rows(towers, config, data, every=data, continues=False)
    goal = build_objective(config, data).train()
    model = nn.ModuleDict({"towers": towers, "objective": goal})
    known = KnownPositives(data) if needs_known_positives(config) else None
    optimizer = TableOptimizer(
        parameter_groups(model, 0.01, lr=2e-3, table_rule=config.training.table_optimizer), lr=2e-3
    )
    exchange = GradientExchange(model, ranks)
    found = Trained()
    made = sequence_batches if config.reads_sequences else batches
    for step, batch in enumerate(made(data, ranks, weighted=case.weighted)):
        options = {"micro_batch": case.micro_batch, "generator": draws_of(0, step, "cpu")}
        loss, _, _ = compute_loss(towers, goal, batch, ranks, known_positives=known, **options)
        optimizer.zero_grad()
        loss.backward()
        exchange.sum_gradients()
        found.losses.append(float(ranks.sum(loss)))
        if step in (0, STEPS - 1):
            grads = {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}
            grads = whole(grads, towers, ranks)
            found.first, found.last = (grads, found.last) if step == 0 else (found.first, grads)
        optimizer.step()
    found.state = whole({name: value.clone() for name, value in model.state_dict().items()}, towers, ranks)
    for name, value in found.state.items():
        if name.endswith("attention.projection.bias"):
            # Softmax ignores a constant added to all keys: this gradient is rounding noise, which Adam amplifies.
            value.view(3, -1)[1] = 0
    tables = [module.weight for module in towers.modules() if isinstance(module, nn.Embedding)]
    states = [value for table in tables for name, value in optimizer.state[table].items() if name != "step"]
    found.held = sum(tensor.nbytes for tensor in (*tables, *states))
    return found


def whole(tensors: dict[str, Tensor], towers: nn.Module, ranks: Communicator) -> dict[str, Tensor]:
    """Return tensors by name, with the parts of sharded tables combined."""
    parts = {
        f"towers.{name}.weight": module.part
        for name, module in towers.named_modules(remove_duplicate=False)
        if isinstance(module, EmbeddingTable)
    }
    found = dict(tensors)
    for name, value in tensors.items():
        if isinstance(parts.get(name), RowShard):
            found[name] = ranks.gather(value)
    return found

"""Training as it runs, measured against the full softmax: `measure` follows the real step over real epochs.

For each row of every batch the step's own candidates give the estimated partition sum, and its backward pass the
gradient; both are compared with float64 sums over the whole catalog, which share nothing with `negatives/`.
"""

import copy
import functools
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy import stats
from torch import Tensor

from twotower.config.run import Config
from twotower.data import Batch, Interactions, KnownPositives, with_eligibility
from twotower.data.events import with_events
from twotower.data.loading.questions import QuestionBatches
from twotower.distributed.communicator import Communicator
from twotower.features.feature_set import EncodedTable
from twotower.features.from_config import encode_features, with_features
from twotower.negatives import CountedFrequency, HardNegatives, IndexStream, Pool, Sampled
from twotower.objectives import SampledSoftmax
from twotower.objectives.build import build_objective, needs_known_positives
from twotower.run import make_batches
from twotower.towers import build_towers
from twotower.training import compute_loss
from twotower.training.embedding import embed_rows

#: Items; the last two never occur. Queries; a query has up to six rows, some of them repeat an item.
N, QUERIES = 24, 240
#: Markets of the queries: two large ones, one with fewer rows than a batch, and one with a single row.
MARKETS = (150, 84, 5, 1)
B = 32
#: Embedding width, and how strongly a query prefers its own items: P(y|x) is about a third.
WIDTH, SCALE = 16, 6.0

#: w of the feedback.
PASSED_OVER = 3.0

BASE = (
    f"item_tower.dimension={WIDTH}",
    "query_tower.hidden=[]",
    "query_tower.dropout=0",
    "query_tower.id_embedding=true",
    "objective.similarity=dot",
    "objective.temperature=1",
    f"training.batch_size={B}",
    "training.question=next",
)
ROWS = ("query_tower.history=null",)
SEQUENCE = (
    "query_tower.history={length: 3, dropout: 0, share_table: false, sequence: {kind: gru, blocks: 1, dropout: 0}}",
)
EVENTS = "data.events={column: event, weights: {view: 1, buy: 4}}"
#: Sources, by the name in the table, as in `objective.sources`.
SOURCES: dict[str, list[dict[str, dict[str, Any]]]] = {
    "in-batch": [{"in_batch": {}}],
    "memory": [{"memory": {"size": 40}}],
    "in-batch + memory": [{"in_batch": {}}, {"memory": {"size": 40}}],
    "in-batch + uniform": [{"in_batch": {}}, {"uniform": {"size": 12}}],
    "in-batch + 100 uniform": [{"in_batch": {}}, {"uniform": {"size": 100}}],
    "in-batch + memory + uniform": [{"in_batch": {}}, {"memory": {"size": 40}}, {"uniform": {"size": 12}}],
    "head + in-batch + uniform": [{"head": {"size": 4}}, {"in_batch": {}}, {"uniform": {"size": 12}}],
    "observed + in-batch + uniform": [{"observed": {"size": 2}}, {"in_batch": {}}, {"uniform": {"size": 12}}],
    "mined + in-batch + uniform": [{"mined": {"size": 2}}, {"in_batch": {}}, {"uniform": {"size": 12}}],
    "mined window + in-batch + uniform": [
        {"mined": {"size": 2, "ranks": [2, 7], "sampling": "random"}},
        {"in_batch": {}},
        {"uniform": {"size": 12}},
    ],
    "in-batch + uniform per row": [{"in_batch": {}}, {"uniform": {"size": 12, "per_row": True}}],
    "uniform": [{"uniform": {"size": 20}}],
    "uniform per row": [{"uniform": {"size": 20, "per_row": True}}],
    "frequency": [{"frequency": {"size": 30, "power": 1.0}}],
    "frequency^0.75": [{"frequency": {"size": 30}}],
    "log-uniform": [{"log_uniform": {"size": 30}}],
    "head + frequency^0.75": [{"head": {"size": 4}}, {"frequency": {"size": 30}}],
    "index stream": [{"index_stream": {"size": 20}}],
    "catalog": [{"catalog": {}}],
    "in-batch twice": [{"in_batch": {}}, {"in_batch": {}}],
    "memory twice": [{"memory": {"size": 8}}, {"memory": {"size": 16}}],
}
#: How rows become batches: settings, by the name in the table.
BATCHES = {
    "rows": ROWS,
    "independent rows": ROWS,
    "rows of a continued model": ROWS,
    "rows on 2 ranks": ROWS,
    "rows in blocks of 9": (*ROWS, "objective.rows_per_draw=9"),
    "rows within groups": ROWS,
    "rows within groups of a continued model": ROWS,
    "rows within groups on 2 ranks": ROWS,
    "rows within groups in blocks of 9": (*ROWS, "objective.rows_per_draw=9"),
    "whole sequences": SEQUENCE,
    "whole sequences on 2 ranks": SEQUENCE,
    "whole sequences in blocks of 9": (*SEQUENCE, "objective.rows_per_draw=9"),
    "rows of two events": (*ROWS, EVENTS),
    "rows of two events on 2 ranks": (*ROWS, EVENTS),
    "whole sequences of two events": (*SEQUENCE, EVENTS),
    "horizon questions of two events": (*ROWS, EVENTS, "training.question=horizon", "training.horizon=9"),
    "set questions of two events": (*ROWS, EVENTS, "training.question=set"),
    "one row a batch": (*ROWS, "training.batch_size=1"),
    "rows in blocks of 1": (*ROWS, "objective.rows_per_draw=1"),
    "one whole sequence a batch": (*SEQUENCE, "training.batch_size=1"),
    "horizon questions": (*ROWS, "training.question=horizon", "training.horizon=9"),
    "horizon questions of a continued model": (*ROWS, "training.question=horizon", "training.horizon=9"),
    "horizon questions with repeats": (
        *ROWS,
        "training.question=horizon",
        "training.horizon=50",
        "evaluation.exclude_seen=false",
    ),
    "set questions with repeats": (*ROWS, "training.question=set", "evaluation.exclude_seen=false"),
    "set questions": (*ROWS, "training.question=set"),
    "set questions in blocks of 9": (*ROWS, "training.question=set", "objective.rows_per_draw=9"),
}
#: The same under a rule for eligible items.
BATCHES |= {
    f"eligible {name}": BATCHES[name]
    for name in (
        *("rows", "rows on 2 ranks", "rows in blocks of 9", "rows within groups", "rows within groups on 2 ranks"),
        *("whole sequences", "horizon questions", "set questions"),
    )
}


@functools.cache
def data() -> Interactions:
    """Make rows with skewed popularity that differs between the markets, repeat purchases and observed negatives."""
    rng = np.random.default_rng(5)
    market = np.repeat(np.arange(len(MARKETS)), MARKETS)
    rows = []
    for query in range(QUERIES):
        size = 1 if market[query] == 3 else int(rng.integers(1, 7))
        weight = 1.0 / (1.0 + np.roll(np.arange(N - 2), 4 * market[query])) ** 0.8
        items = rng.choice(N - 2, size, p=weight / weight.sum())
        if size > 3:
            items[-1] = items[0]
        days = np.sort(rng.integers(0, 60, size))
        rows += [(query, int(i), int(d) * 86_400, int(market[query]), 1.0) for i, d in zip(items, days, strict=True)]
        rows += [(query, int(i), 0, int(market[query]), 0.0) for i in rng.choice(N, 2, replace=False)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "market", "rating"], orient="row")
    bought = (pl.col("user_id") + pl.col("item_id")) % 3 == 0
    frame = frame.with_columns(event=pl.when(bought).then(pl.lit("buy")).otherwise(pl.lit("view")))
    return Interactions.from_frame(
        frame,
        items=pl.DataFrame({"item_id": list(range(N))}),
        catalog="table",
        columns={"group": "market", "label": "rating"},
        positive_label=1.0,
        context=["event"],
    )


@functools.cache
def ruled() -> Interactions:
    """Return the rows whose items are offered in the row's market at its time; most items are not always or everywhere.

    Item 0 is offered everywhere, and item 21, which never occurs, in one market.
    """
    offered = [None if j == 0 else [1] if j == 21 else [m for m in range(4) if (j + m) % 3] for j in range(N)]
    at = [datetime.fromtimestamp(day * 86_400, tz=UTC) for day in (15, 45)]
    table = pl.DataFrame({
        "item_id": list(range(N)),
        "markets": offered,
        "since": [at[0] if j % 5 == 1 else None for j in range(N)],
        "until": [at[1] if j % 5 == 2 else None for j in range(N)],
    })  # fmt: skip
    found = with_eligibility(
        replace(data(), item_table=table), item_groups="markets", available_from="since", available_until="until"
    )
    assert len(data()) / 4 < len(found) < len(data())
    return found


@dataclass(frozen=True)
class Cell:
    """One combination, as a run has it.

    Attributes:
        sources: a name in `SOURCES`.
        frequency: `objective.frequency`.
        batches: a name in `BATCHES`.
        known: the known positives of a row's query are masked.
        duplicates: "kept", "unique" over the pool, or "unique by source".
        objective: name.
        feedback: form of `objective.feedback`, or "" for none; the observed negatives are the feedback.
    """

    sources: str
    frequency: str = "counted"
    batches: str = "rows"
    known: bool = False
    duplicates: str = "kept"
    objective: str = "expected-count"
    feedback: str = ""

    @property
    def config(self) -> Config:
        """The settings of the run."""
        sources = copy.deepcopy(SOURCES[self.sources])
        for name, options in ((name, options) for source in sources for name, options in source.items()):
            if self.duplicates == "unique by source" and name not in ("head", "observed", "mined", "catalog"):
                options["unique"] = True
        changes = [
            *BASE,
            *BATCHES[self.batches],
            f"objective.name={self.objective}",
            f"objective.sources={json.dumps(sources)}",
            f"objective.frequency={self.frequency}",
            f"objective.unique={str(self.duplicates == 'unique').lower()}",
            f"objective.mask_known_positives={str(self.known).lower()}",
        ]
        if self.feedback:
            changes.append(f"objective.feedback={{weight: {PASSED_OVER}, form: {self.feedback}}}")
        return Config.load(None, changes).resolved(len(self.data))

    @property
    def data(self) -> Interactions:
        """The rows that the cell is trained on."""
        return ruled() if self.batches.startswith("eligible") else data()


@dataclass
class Run:
    """The parts of a training run, and a record of the candidates that its steps draw; `rows` are None for all."""

    config: Config
    train: Interactions
    towers: Any
    objective: Any
    batches: Any
    known: KnownPositives | None
    rows: Any = None
    drawn: list[Any] = field(default_factory=list)
    ranks: Communicator = field(default_factory=Communicator)

    def __post_init__(self) -> None:
        draw = self.objective.draw

        def recorded(*request: Any, **options: Any) -> Any:
            self.drawn.append(draw(*request, **options))
            return self.drawn[-1]

        self.objective.draw = recorded


def build(cell: Cell, ranks: Communicator | None = None) -> Run:
    """Build the run of a cell from its settings, as `fit` does."""
    config, train = cell.config, cell.data
    if (events := config.data.events) is not None:
        train = with_events(train, events.column, events.weights)
        config = with_features(config, train)
    features = encode_features(config, train)
    rows = np.flatnonzero(np.arange(len(train)) % 3 > 0) if "continued" in cell.batches else None
    batches = make_batches(config, train, rows, ranks, features.get("context"))
    learnt = None if rows is None else train.select(rows)
    questions = batches if isinstance(batches, QuestionBatches) else None
    objective = _streamed(cell) or build_objective(config, train, learnt=questions or learnt)
    if cell.batches == "independent rows":
        batches = Independent(batches)
        if cell.frequency == "counted":
            for member in objective.pool.members():
                if hasattr(member, "frequency"):
                    member.frequency = CountedFrequency(train, replacement=True)
    known = KnownPositives(train) if needs_known_positives(config) else None
    for member in objective.pool.members():
        if isinstance(member, HardNegatives):
            ranked = torch.rand(QUERIES, N, generator=torch.Generator().manual_seed(2)).argsort(1)
            member.refresh(torch.arange(QUERIES), ranked)
    towers = _towers(config, train, features)
    return Run(config, train, towers, objective, batches, known, rows, ranks=ranks or Communicator())


def _streamed(cell: Cell) -> SampledSoftmax | None:
    """Build the objective of a cell with an index stream of some items; a configuration would need item features."""
    if not any("index_stream" in source for source in SOURCES[cell.sources]):
        return None
    stream = IndexStream(N, torch.arange(0, N, 2))
    stream.add(torch.tensor([1, 3, N - 1]))
    stream.withdraw(torch.tensor([0]))
    return SampledSoftmax(Pool(Sampled(stream, 20), unique=cell.duplicates == "unique"))


class Independent:
    """Batches whose rows are independent draws, with replacement; a loop of a caller's own."""

    def __init__(self, batches: Any) -> None:
        self._batches, self._rng = batches, np.random.default_rng(3)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            yield self._batches.batch(self._rng.integers(0, len(data()), B))


def _towers(config: Config, train: Interactions, features: dict[str, EncodedTable]) -> Any:
    """Build towers whose queries prefer their own items, in float64."""
    torch.manual_seed(0)
    towers = build_towers(config, num_queries=train.num_queries, num_items=N, context=features.get("context"))
    towers = towers.double().eval()
    rng = torch.Generator().manual_seed(1)
    items = torch.nn.functional.normalize(torch.randn(N, WIDTH, generator=rng, dtype=torch.float64), dim=1)
    prefers = torch.zeros(train.num_queries, N, dtype=torch.float64)
    prefers[
        torch.from_numpy(train.query_codes().astype(np.int64)), torch.from_numpy(train.item_codes.astype(np.int64))
    ] = 1
    wanted = {N: items, train.num_queries: SCALE * (prefers / prefers.sum(1, keepdim=True).clamp(min=1)) @ items}
    with torch.no_grad():
        for parameter in towers.parameters():
            if parameter.ndim == 2 and parameter.shape[1] == WIDTH and len(parameter) in wanted:
                parameter.copy_(wanted[len(parameter)])
    return towers


@dataclass
class Measured:
    """What the steps of a cell gave, by epoch, T of them.

    Attributes:
        ratio: mean of Z_hat / Z over the rows, [T].
        items: mean weight of each item, 1 if its count is right, over the rows where it is due, [T, N]; NaN if never.
        gradient: of the real steps, mean, [T, P].
        exact: of the full softmax on the same rows, [T, P].
        steps: number of steps in all.
        spread: variance of Z_hat / Z over rows and steps: the 1/n of this pool.
        positive: mean P(y|x).
    """

    ratio: Tensor
    items: Tensor
    gradient: Tensor
    exact: Tensor
    steps: int
    spread: float
    positive: float

    def partition_off(self) -> tuple[float, float]:
        """Return the relative error of Z, and how far it may be off by chance (`_by_chance`)."""
        # A pool that is always the same has only rounding: log counts are float32.
        return float(self.ratio.mean()) - 1.0, max(_by_chance(self.ratio, 0.0027), 1e-5)

    def worst_item(self) -> tuple[float, float]:
        """Return the relative error of the item that is furthest off, over what chance allows, and this error.

        Rare events may never have occurred in these epochs: one step in `steps` / 5 (an item that is nearly always
        among the candidates), or an item with one row that is in the last, incomplete batch, which is left out.
        """
        rare = max(5 / self.steps, len(self.ratio) / self.steps)
        found = (0.0, 0.0)
        for of_item in self.items.T:
            weights = of_item[torch.isfinite(of_item)]
            if len(weights) > 5:
                error, chance = float(weights.mean()) - 1.0, _by_chance(weights, 1e-5)
                found = max(found, (abs(error) / (chance + rare), error))
        return found

    def gradient_off(self) -> tuple[float, float]:
        """Return |mean difference of the gradients| / |mean of the exact one|, and the size of its noise."""
        difference, size = self.gradient - self.exact, float(self.exact.mean(0).norm())
        noise = float((difference.var(0) / len(difference)).sum().sqrt())
        return float(difference.mean(0).norm()) / size, noise / size


def _by_chance(values: Tensor, level: float) -> float:
    """Return the deviation of a mean that chance exceeds with this probability: 3 standard errors, or Student's t."""
    return float(stats.t.isf(level / 2, len(values) - 1)) * float(values.std()) / math.sqrt(len(values))


def measure(cell: Cell, epochs: int, *, skip: int = 1, ranks: int = 1, change: Any = None) -> Measured:
    """Train on real epochs without updating the weights; leave out the first `skip` epochs (a memory fills).

    `change` gets the objective of every rank, to plant a fault.
    """
    exchange = _Exchange(ranks)
    runs = [build(cell, _Rank(rank, ranks, exchange)) if ranks > 1 else build(cell) for rank in range(ranks)]
    for run in runs:
        if change is not None:
            change(run.objective)
    found = [[] for _ in runs]

    def follow(rank: int) -> None:
        try:
            found[rank] = list(_follow(runs[rank], cell, epochs, skip))
        except BaseException:
            exchange.barrier.abort()
            raise

    if ranks == 1:
        follow(0)
    else:
        threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sums = [functools.reduce(_Sums.add, parts) for parts in zip(*found, strict=True)]
    rows = torch.tensor([one.rows for one in sums], dtype=torch.float64)
    error = sum(one.ratio for one in sums) / float(rows.sum()) - 1.0
    return Measured(
        ratio=torch.tensor([one.ratio for one in sums], dtype=torch.float64) / rows,
        items=torch.stack([one.weight / one.due for one in sums]),
        gradient=torch.stack([one.gradient / one.steps for one in sums]),
        exact=torch.stack([one.exact / one.steps for one in sums]),
        steps=sum(one.steps for one in sums),
        spread=sum(one.square for one in sums) / float(rows.sum()) - error**2,
        positive=sum(one.positive for one in sums) / float(rows.sum()),
    )


@dataclass
class _Sums:
    """Sums over the rows of one rank in an epoch; `add` joins those of another rank."""

    steps: int = 0
    rows: int = 0
    ratio: float = 0.0
    square: float = 0.0
    positive: float = 0.0
    weight: Tensor = field(default_factory=lambda: torch.zeros(N, dtype=torch.float64))
    due: Tensor = field(default_factory=lambda: torch.zeros(N, dtype=torch.float64))
    gradient: Any = 0.0
    exact: Any = 0.0

    def add(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.steps,
            *(getattr(self, n) + getattr(other, n) for n in ("rows", "ratio", "square", "positive")),
            *(getattr(self, n) + getattr(other, n) for n in ("weight", "due", "gradient", "exact")),
        )


def _follow(run: Run, cell: Cell, epochs: int, skip: int) -> Iterator[_Sums]:
    """Run the steps of every epoch, and yield its sums."""
    interactions, rng = run.train, torch.Generator().manual_seed(11)
    queries, items = (
        torch.from_numpy(c.astype(np.int64)) for c in (interactions.query_codes(), interactions.item_codes)
    )
    met = torch.zeros(interactions.num_queries, N, dtype=torch.bool)
    met[queries, items] = True
    parameters = [p for p in run.towers.parameters() if p.requires_grad]
    run.objective.train()
    for epoch in range(epochs):
        sums = _Sums()
        for batch in run.batches:
            run.drawn.clear()
            loss = compute_loss(run.towers, run.objective, batch, run.ranks, known_positives=run.known, generator=rng)[
                0
            ]
            gradient = _flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
            if epoch < skip:
                continue
            total = batch.total or len(batch)
            scores = embed_rows(run.towers, batch) @ run.towers.embed_items(torch.arange(N)).T / run.towers.temperature
            due = _reachable(run, cell, batch).expand(len(batch), N).clone()
            if interactions.eligibility is not None:
                due &= ~interactions.eligibility.rows(batch.groups, batch.times).blocked(slice(0, len(batch)))
            if run.known is not None:
                due &= ~met[batch.queries]
            row = torch.arange(len(batch))
            due[row, batch.items] = False
            kept = due.clone()
            kept[row, batch.items] = True
            omega, slate = due.double(), _slates(run, batch, met)
            if cell.feedback == "softmax":
                omega += PASSED_OVER * slate
            due, kept = omega > 0, kept | (omega > 0)
            partition = (scores + omega.masked_fill(kept & (omega == 0), 1.0).log()).logsumexp(1)
            weights = torch.ones(len(batch)) if batch.weights is None else batch.weights
            losses = partition - scores[row, batch.items]
            if cell.feedback in ("logistic", "pairwise"):
                losses = losses + PASSED_OVER * _slate_losses(cell.feedback, scores, batch.items, slate)
            losses = losses * weights / (total * batch.mean_weight)
            exact = _flat(torch.autograd.grad(losses.sum(), parameters, allow_unused=True), parameters)
            with torch.no_grad():
                weight = _weights(run.drawn, len(batch))
                assert float(weight[~due].abs().sum()) == 0.0, "a masked or unreachable item counts"
                own = scores[row, batch.items].exp()
                ratio = (own + (weight * scores.exp()).sum(1)) / partition.exp()
                sums = sums.add(
                    _Sums(
                        0,
                        len(batch),
                        float(ratio.sum()),
                        float((ratio - 1).square().sum()),
                        float((own / partition.exp()).sum()),
                        weight.sum(0),
                        omega.sum(0),
                        gradient,
                        exact,
                    )
                )
                sums.steps += 1
        if epoch >= skip:
            yield sums


def _slates(run: Run, batch: Batch, met: Tensor) -> Tensor:
    """Return which items each row's query passed over, without the row's masked positives, bool [B, N]."""
    below = run.train.negatives
    over = torch.zeros_like(met)
    over[
        torch.from_numpy(below.query_codes().astype(np.int64)), torch.from_numpy(below.item_codes.astype(np.int64))
    ] = True
    slate = over[batch.queries]
    if run.known is not None:
        slate &= ~met[batch.queries]
    slate[torch.arange(len(batch)), batch.items] = False
    return slate


def _slate_losses(form: str, scores: Tensor, items: Tensor, slate: Tensor) -> Tensor:
    """Compute the mean binary or pairwise loss of every row on its slate, one row at a time, [B]."""
    losses = []
    for row, item in enumerate(items.tolist()):
        own, shown = scores[row, item], scores[row, slate[row]]
        if not len(shown):
            losses.append(own * 0.0)
        elif form == "pairwise":
            losses.append(-torch.log(torch.sigmoid(own - shown)).mean())
        else:
            each = torch.cat([torch.sigmoid(own)[None], 1.0 - torch.sigmoid(shown)])
            losses.append(-torch.log(each).mean())
    return torch.stack(losses)


def _weights(drawn: list[Any], rows: int) -> Tensor:
    """Return the total weight of every item for every row, [B, N], from the candidates of all blocks."""
    weight, start = torch.zeros(rows, N, dtype=torch.float64), 0
    for block in drawn:
        count = len(block.positives)
        part = weight[start : start + count]
        live = (~block.mask).double() * torch.exp(-block.log_expected_count.double())
        part.index_add_(1, block.items, live)
        if block.row_items is not None:
            live = (~block.row_mask).double() * torch.exp(-block.row_log_expected_count.double())
            part.scatter_add_(1, block.row_items.clamp(min=0), live.masked_fill(block.row_items < 0, 0.0))
        start += count
    assert start == rows
    return weight


def _reachable(run: Run, cell: Cell, batch: Batch) -> Tensor:
    """Return which items the pool can bring for a row, bool [N] or [B, N], by the settings of its sources.

    Raises:
        NotImplementedError: a source is not listed here; a new one needs its items.
    """
    options = {name: options for source in SOURCES[cell.sources] for name, options in source.items()}
    reach = torch.zeros(N, dtype=torch.bool)
    if "index_stream" in options:
        reach[2::2] = True
        reach[[1, 3, N - 1]] = True
        return reach
    if not options.keys().isdisjoint(("uniform", "log_uniform", "catalog")):
        return ~reach
    for name, settings in options.items():
        if name in ("in_batch", "memory"):
            reach |= _in_batches(run, batch)
        elif name in ("frequency", "head") and not settings.get("floor"):
            reach |= torch.from_numpy(run.train.item_counts()) > 0
        else:
            raise NotImplementedError(f"{name}: which items it can bring")
    return reach


def _in_batches(run: Run, batch: Batch) -> Tensor:
    """Return which items can be a positive of a batch of the same group, bool [N]."""
    if isinstance(run.batches, QuestionBatches):
        return torch.from_numpy(run.batches.item_counts()) > 0
    is_row = np.ones(len(run.train), dtype=bool) if run.rows is None else np.isin(np.arange(len(run.train)), run.rows)
    if batch.group is not None:
        is_row &= np.asarray(run.train.groups) == batch.group
    return torch.from_numpy(np.bincount(run.train.item_codes[is_row], minlength=N)) > 0


def _flat(gradients: Any, parameters: list[Tensor]) -> Tensor:
    return torch.cat(
        [
            torch.zeros(p.numel()).double() if g is None else g.to_dense().reshape(-1)
            for g, p in zip(gradients, parameters, strict=True)
        ]
    )


class _Exchange:
    """What the ranks of one process exchange: a value of each, behind a barrier."""

    def __init__(self, size: int) -> None:
        self.barrier, self.values = threading.Barrier(max(size, 1)), [None] * size

    def all(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(timeout=60)
        found = list(self.values)
        self.barrier.wait(timeout=60)
        return found


@dataclass(frozen=True)
class _Rank(Communicator):
    """A rank that is a thread: the exchanges of `Communicator` without torch.distributed."""

    threads: Any = None

    def __init__(self, rank: int, size: int, threads: _Exchange) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "threads", threads)

    def gather(self, values: Tensor, sizes: list[int] | None = None) -> Tensor:
        return torch.cat(self.threads.all(self.rank, values.detach()))

    def gather_with_gradient(self, values: Tensor) -> Tensor:
        return _Gathered.apply(values, self)

    def sizes(self, count: int, device: Any = "cpu") -> list[int]:
        return self.threads.all(self.rank, count)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: _Rank) -> Tensor:
        ctx.ranks, ctx.rows = ranks, len(values)
        return torch.cat(ranks.threads.all(ranks.rank, values.detach()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        every = ctx.ranks.threads.all(ctx.ranks.rank, grads[0])
        return sum(every)[ctx.ranks.rank * ctx.rows : (ctx.ranks.rank + 1) * ctx.rows], None

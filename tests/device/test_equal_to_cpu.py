"""Every loss, tower, optimizer and ranking on a device, against the same in float64 on the CPU.

Bound: the error of float32 on the device is at most twice the error of float32 on the CPU plus `TOLERANCE`, both
relative to the largest value; the device may sum in a different order, but must not be worse.
"""

import copy

import numpy as np
import polars as pl
import pytest
import torch

from twotower.config.run import Config
from twotower.data import Batch, Interactions, KnownPositives
from twotower.data.loading.packing import pack
from twotower.features.from_config import encode_features
from twotower.index import ExactIndex
from twotower.objectives import Embedded
from twotower.objectives.build import build_objective
from twotower.objectives.registry import OBJECTIVES
from twotower.towers import build_towers
from twotower.training import TableOptimizer, compute_loss
from twotower.training.optimizer import parameter_groups

pytestmark = pytest.mark.device

TOLERANCE = 2e-6
ROWS, D = 64, 16
SMALL = (f"item_tower.dimension={D}", "objective.negatives=16")
TOWERS = {
    "ids": ("query_tower.history=null", "query_tower.id_embedding=true"),
    "pooled history": ("query_tower.history.length=6",),
    "gru": ("query_tower.history.length=6", "query_tower.history.sequence={kind: gru, blocks: 1, dropout: 0}"),
    "transformer": (
        "query_tower.history.length=6",
        "query_tower.history.sequence={kind: transformer, blocks: 2, dropout: 0}",
    ),
    "features": (
        "query_tower.history.length=6",
        "query_tower.features=[{column: taste, kind: categorical}, {column: tags, kind: multi}]",
        "item_tower.features=[{column: price, kind: numeric}, {column: colour, kind: categorical}]",
    ),
}


@pytest.fixture(scope="module")
def train():
    """Zipf rows of 50 queries and 90 items, with tables of features and observed dislikes."""
    rng = np.random.default_rng(0)
    weight = 1.0 / np.arange(1, 91)
    items = rng.choice(90, size=900, p=weight / weight.sum())
    log = pl.DataFrame({
        "user_id": rng.integers(0, 50, 900), "item_id": items, "timestamp": np.arange(900),
        "rating": np.where(rng.random(900) < 0.3, 1, 5),
    })  # fmt: skip
    people = pl.DataFrame({
        "user_id": range(50), "taste": [f"t{q % 4}" for q in range(50)],
        "tags": [["a", "b"][: q % 3] for q in range(50)],
    })  # fmt: skip
    goods = pl.DataFrame(
        {"item_id": range(90), "price": np.arange(90) * 0.3, "colour": [f"c{j % 5}" for j in range(90)]}
    )
    return Interactions.from_frame(log, items=goods, queries=people, catalog="table", positive_label=4)


def errors(found, first, exact):
    """Return the errors of the device and of the CPU, relative to the largest exact value."""
    size = float(exact.abs().max()) + 1e-12
    return [float((one.detach().double().cpu() - exact).abs().max()) / size for one in (found, first)]


def require_close(found, first, exact, name):
    of_device, of_cpu = errors(found, first, exact)
    assert of_device <= 2 * of_cpu + TOLERANCE, f"{name}: {of_device:.2e} on the device, {of_cpu:.2e} on the CPU"


def rows_of(train, rows=ROWS):
    place = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[:rows]
    items, queries = (
        torch.from_numpy(codes.astype("int64"))[place] for codes in (train.item_codes, train.query_codes())
    )
    history = torch.where(torch.arange(6) < queries[:, None] % 7, items[:, None].roll(1, 0).expand(-1, 6), -1)
    return Batch(rows=place, queries=queries, items=items, history=history)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(train, device, name):
    """Candidates are drawn on the CPU; value and gradients of both forms of the loss are compared."""
    objective = build_objective(Config.load(None, [*SMALL, f"objective.name={name}"]), train)
    batch, rng = rows_of(train), torch.Generator().manual_seed(2)
    known = KnownPositives(train).pairs(batch.queries)
    drawn = objective.draw(batch.items, queries=batch.queries, known_positives=known, generator=rng)
    table, query = torch.randn(train.num_items, D, generator=rng), torch.randn(ROWS, D, generator=rng)
    results = []
    for place, dtype in ((device, torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)):
        one, here = copy.deepcopy(objective).to(place), drawn.to(place)
        leaves = [value.to(place, dtype).requires_grad_() for value in (query, table)]
        rows = None if here.row_items is None else leaves[1][here.row_items.clamp(min=0)]
        embedded = Embedded(leaves[0], leaves[1][here.positives], leaves[1][here.items], rows)
        temperature = torch.tensor(0.3, device=place, dtype=dtype)
        each = one(embedded, here, temperature=temperature)
        mean = one.mean(embedded, here, temperature=temperature)
        gradients = torch.autograd.grad(mean, leaves)
        results.append([each, mean, *gradients])
    for part, values in zip(("rows", "mean", "query", "items"), zip(*results, strict=True), strict=True):
        assert float(values[2].detach().abs().max()) > 0
        require_close(*values[:2], values[2].detach(), f"{name}, {part}")


@pytest.mark.parametrize("name", ["expected-count", "in-batch-logq", "refined-logq"])
def test_in_batch_candidates_are_the_same(train, device, name):
    """Without random sources, the device draws the same candidates as the CPU: counts and masks are equal."""
    changes = (f"objective.name={name}", "objective.sources=[{in_batch: {}}]")
    objective = build_objective(Config.load(None, [*SMALL, *changes]), train)
    batch = rows_of(train)
    found = {}
    for place in ("cpu", device):
        one, here = copy.deepcopy(objective).to(place), batch.to(place)
        known = KnownPositives(train).pairs(here.queries)
        drawn = one.draw(here.items, queries=here.queries, known_positives=known).to("cpu")
        # A device keeps empty slots; what is compared is the partition of each row: counts and items not masked.
        dense = torch.full((ROWS, train.num_items), torch.inf, dtype=torch.float64)
        for row in range(ROWS):
            live = ~drawn.mask[row] & torch.isfinite(drawn.log_expected_count)
            dense[row, drawn.items[live]] = drawn.log_expected_count[live].double()
        found[str(place)] = dense
    one, other = found["cpu"], found[str(device)]
    assert torch.equal(torch.isinf(one), torch.isinf(other)) and torch.isfinite(one).any(1).all()
    assert torch.allclose(one, other, atol=1e-5)


def embed(towers, batch, sequences):
    if sequences is not None:
        return towers.embed_sequences(sequences, None)
    return towers.embed_queries(batch.queries, batch.history)


@pytest.mark.parametrize("name", TOWERS)
def test_towers(train, device, name):
    """Embeddings of queries and items, and the gradient of every parameter."""
    config = Config.load(None, [*SMALL, *TOWERS[name]])
    data = {}
    if name == "features":
        data = {f"{side}_features": table for side, table in encode_features(config, train).items()}
    towers = build_towers(config, num_queries=train.num_queries, num_items=train.num_items, **data).eval()
    batch, sequences = rows_of(train), None
    if "sequence" in str(TOWERS[name]):
        codes = np.random.default_rng(0).integers(0, train.num_items, 60)
        sequences = pack(np.array([0, 20, 25]), np.array([5, 4, 6]), codes, last_only=False)[0]
    weights = torch.randn(1, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for place, dtype in ((device, torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)):
        one, here = copy.deepcopy(towers).to(place, dtype), batch.to(place)
        queries = embed(one, here, None if sequences is None else sequences.to(place))
        items = one.embed_items(torch.arange(train.num_items, device=place))
        loss = (queries * weights.to(place, dtype)).sum() + (items * weights.to(place, dtype)).cos().sum()
        loss.backward()
        gradients = {
            key: (p.grad.to_dense() if p.grad.is_sparse else p.grad)
            for key, p in one.named_parameters()
            if p.grad is not None
        }
        results.append({"queries": queries, "items": items, **gradients})
    assert len(results[2]) > 3
    for key, exact in results[2].items():
        require_close(results[0][key], results[1][key], exact.detach(), f"{name}, {key}")


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
def test_optimizers(device, rule, is_sparse):
    """Five steps of a table with the same gradients, in which rows repeat."""
    rng = torch.Generator().manual_seed(4)
    start = torch.randn(40, D, generator=rng)
    steps = [(torch.randint(40, (30,), generator=rng), torch.randn(30, D, generator=rng)) for _ in range(5)]
    results = []
    for place, dtype in ((device, torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)):
        table = torch.nn.Embedding(40, D, sparse=is_sparse, device=place, dtype=dtype)
        with torch.no_grad():
            table.weight.copy_(start)
        optimizer = TableOptimizer([{"params": [table.weight], "rule": rule}], lr=0.05)
        for codes, direction in steps:
            optimizer.zero_grad()
            (table(codes.to(place)) * direction.to(place, dtype)).sum().backward()
            optimizer.step()
        results.append(table.weight)
    assert float((results[2].detach() - start).abs().max()) > 0.01
    require_close(results[0], results[1], results[2].detach(), f"{rule}, sparse: {is_sparse}")


@pytest.mark.parametrize("bias", [False, True])
def test_ranking(device, bias):
    """The same items, except where the scores of two items differ by rounding only."""
    rng = torch.Generator().manual_seed(5)
    items, queries = torch.randn(3000, D, generator=rng), torch.randn(70, D, generator=rng)
    items[100:110] = items[100]  # exact ties
    offset = torch.randn(3000, generator=rng) if bias else None
    excluded = np.arange(0, 70 * 5 + 1, 5), np.random.default_rng(0).integers(0, 3000, 350)
    exact = queries.double() @ items.double().T + (0 if offset is None else offset.double())
    for row in range(70):
        exact[row, excluded[1][5 * row : 5 * row + 5]] = -torch.inf
    best = exact.topk(20).values
    found = {}
    for place in ("cpu", device):
        index = ExactIndex(items.to(place), None if offset is None else offset.to(place))
        scores, codes = index.search(queries.to(place), 20, excluded)
        found[str(place)] = codes.cpu()
        assert torch.allclose(exact.gather(1, codes.cpu()), best, atol=1e-5)
        assert torch.allclose(scores.cpu().double(), best, atol=1e-5)
    differs = found["cpu"] != found[str(device)]
    gap = (exact.gather(1, found["cpu"]) - exact.gather(1, found[str(device)])).abs()
    assert float(gap[differs].max() if differs.any() else 0.0) < 1e-5


def step_of(train, device, *changes):
    """Build a function that runs one training step on the device, with everything moved there before."""
    config = Config.load(None, [*SMALL, *TOWERS["ids"], *changes])
    torch.manual_seed(0)
    towers = build_towers(config, num_queries=train.num_queries, num_items=train.num_items).to(device)
    objective = build_objective(config, train).to(device)
    for module in towers.modules():
        if isinstance(module, torch.nn.Embedding):
            module.sparse = True  # as in a catalog of more than 100,000 items
    groups = parameter_groups(torch.nn.ModuleList([towers, objective]), 0.01, lr=1e-3)
    optimizer = TableOptimizer(groups, lr=1e-3)
    batch, generator = rows_of(train).to(device), torch.Generator(device).manual_seed(0)

    def step():
        loss, _, _ = compute_loss(towers, objective, batch, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def test_a_step_never_waits_for_the_device(train, device, no_host_sync):
    """The default objective without known positives; what waits otherwise is listed in docs/performance.md."""
    step = step_of(train, device, "objective.mask_known_positives=false")
    before = step()  # the first step makes the optimizer's state
    with no_host_sync():
        last = [step() for _ in range(3)][-1]
    assert torch.isfinite(before) and torch.isfinite(last) and last < before

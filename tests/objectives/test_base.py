"""Every objective by name, built as in a training run, compared with the formulas of docs/theory.md in plain loops."""

import numpy as np
import polars as pl
import pytest
import torch

import reference
from support.drawing import standard_errors_off
from twotower.config.run import Config
from twotower.data import Interactions, KnownPositives
from twotower.errors import InputError
from twotower.losses import gbce_beta
from twotower.losses.tiled import blocks
from twotower.losses.tiled import evaluation as tiled_evaluation
from twotower.negatives import CountedFrequency, Head, InBatch, Pool, Sampled, Uniform, Weighted, corrections
from twotower.objectives import (
    Embedded,
    GeneralisedBCE,
    Logistic,
    PositiveCorrectedSoftmax,
    RefinedLogQ,
    SampledSoftmax,
)
from twotower.objectives.build import OBJECTIVES, build_objective, masks_known_positives

N, D, K, TEMPERATURE, BIAS = 14, 3, 5, 0.5, 0.25


@pytest.fixture(scope="module")
def train():
    """Popular and rare items, two items with dislikes only, and queries with several positives."""
    rng = np.random.default_rng(0)
    weight = 1.0 / np.arange(1, N - 1)
    item = np.concatenate([np.arange(N - 2), rng.choice(N - 2, 90, p=weight / weight.sum()), [12, 13, 12, 3, 5, 7]])
    label = np.array([5.0] * (len(item) - 6) + [1.0] * 6)
    user = rng.integers(0, 9, len(item))
    user[-6:] = [0, 0, 1, 1, 2, 2]
    frame = pl.DataFrame({"user": user, "item": item, "label": label, "timestamp": np.arange(len(item))})
    frame = frame.unique(["user", "item"], keep="first", maintain_order=True)
    found = Interactions.from_frame(frame, items=pl.DataFrame({"item": range(N)}), positive_label=4.0)
    assert found.num_items == N
    return found


def build(name, train, *, small=True, **settings):
    sources = OBJECTIVES[name].sources
    if small:
        sources = [{s: {**o, "size": 6} if o.get("size") == 1024 else o} for one in sources for s, o in one.items()]
    config = Config.model_validate({"objective": {"name": name, "negatives": K, "sources": sources, **settings}})
    objective = build_objective(config, train).eval()
    if hasattr(objective, "bias"):
        objective.bias.data.fill_(BIAS)
    return objective, config.objective


class Case:
    """A batch with float64 embeddings, and its candidates both for plain loops and for the objective."""

    def __init__(self, name, train, *, seed=0, small=True, rows=5, mask=None, **settings):
        self.name = name
        settings |= {} if mask is None else {"mask_known_positives": mask}
        self.objective, self.settings = build(name, train, small=small, **settings)
        rng = torch.Generator().manual_seed(seed)
        place = torch.randperm(len(train), generator=rng)[:rows]
        self.positives = torch.from_numpy(train.item_codes[place.numpy()].astype(np.int64))
        self.queries = torch.from_numpy(train.query_codes()[place.numpy()].astype(np.int64))
        self.query = torch.randn(rows, D, generator=rng, dtype=torch.float64)
        self.table = torch.randn(N, D, generator=rng, dtype=torch.float64)
        known = None
        self.known = [set() for _ in range(rows)]
        if masks_known_positives(self.settings):
            known = KnownPositives(train).pairs(self.queries)
            for row, q in enumerate(self.queries.tolist()):
                self.known[row] = set(train.item_codes[train.offsets[q] : train.offsets[q + 1]].tolist())
        given = {"known_positives": known, "queries": self.queries}
        raw = self.objective.pool.draw(self.positives, **given, generator=torch.Generator().manual_seed(seed))
        self.drawn = self.objective.draw(self.positives, **given, generator=torch.Generator().manual_seed(seed))
        names = [next(iter(one)) for one in self.settings.sources]
        shared = [(j, names[s] if s >= 0 else "") for j, s in zip(raw.items.tolist(), raw.source.tolist(), strict=True)]
        self.candidates = [list(shared) for _ in range(rows)]
        if raw.row_items is not None:
            for row, items in enumerate(raw.row_items.tolist()):
                self.candidates[row] += [(j, names[0]) for j in items if j >= 0]
        counts = train.item_counts()
        sizes = [o.get("size", 0) for one in self.settings.sources for o in one.values()]
        self.loops = {
            "rows": rows,
            "extra": K if "K" in sizes else sum(sizes),
            "p": (counts / counts.sum()).tolist(),
            "num_items": N,
            "total": int(counts.sum()),
        }

    def embedded(self, query, table):
        rows = self.drawn.row_items
        return Embedded(
            query,
            table[self.positives],
            table[self.drawn.items],
            None if rows is None else table[rows.clamp(min=0)],
        )

    def fast(self, query, table):
        return self.objective(self.embedded(query, table), self.drawn, temperature=TEMPERATURE)

    def slow(self, query, table, bias=BIAS, weights=None):
        return reference.objective(
            self.name,
            query,
            table,
            self.positives.tolist(),
            self.candidates,
            known=self.known,
            temperature=TEMPERATURE,
            bias=bias,
            strength=self.settings.strength,
            settings=self.loops,
            weights=weights,
        )


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_equal_the_formulas(name, strength, train):
    case = Case(name, train, strength=strength)
    found = case.fast(case.query, case.table)
    assert found.shape == (5,)
    assert found.tolist() == pytest.approx(case.slow(case.query.tolist(), case.table.tolist()), rel=2e-6, abs=2e-7)
    assert max(abs(value) for value in found.tolist()) > 1e-3  # all candidates of a row may be masked: 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_with_the_default_sources(name, train):
    case = Case(name, train, small=False, rows=4)
    found = case.fast(case.query, case.table)
    assert found.tolist() == pytest.approx(case.slow(case.query.tolist(), case.table.tolist()), rel=2e-6, abs=2e-7)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_known_positives_are_masked_on_request(name, mask, train):
    case = Case(name, train, mask=mask, rows=8, seed=3)
    slow = case.slow(case.query.tolist(), case.table.tolist())
    assert case.fast(case.query, case.table).tolist() == pytest.approx(slow, rel=2e-6, abs=2e-7)
    if name not in {"logistic-observed"}:  # no query dislikes its own positives
        case.known = [set() for _ in case.known] if mask else [set(range(N)) for _ in case.known]
        assert case.slow(case.query.tolist(), case.table.tolist()) != pytest.approx(slow, rel=1e-3)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_equal_finite_differences_of_the_formulas(name, strength, train):
    case = Case(name, train, strength=strength, rows=4, seed=1)
    shapes, sizes = [(4, D), (N, D)], [4 * D, N * D]
    weights = None
    if name == "refined-logq":
        weights = case.objective.row_weight(
            case.embedded(case.query, case.table), case.drawn, temperature=TEMPERATURE
        ).tolist()

    def total(flat):
        q, v = (
            np.array(part).reshape(s).tolist() for part, s in zip(np.split(flat[:-1], sizes[:1]), shapes, strict=True)
        )
        return sum(case.slow(q, v, flat[-1], weights))

    base = [*case.query.flatten().tolist(), *case.table.flatten().tolist(), BIAS]
    expected = reference.finite_difference(total, base)
    leaves = [case.query.clone().requires_grad_(), case.table.clone().requires_grad_()]
    case.fast(*leaves).sum().backward()
    found = torch.cat([leaf.grad.flatten() for leaf in leaves]).tolist()
    assert found == pytest.approx(expected[:-1], abs=2e-6)
    assert max(abs(value) for value in found) > 0.01
    if hasattr(case.objective, "bias"):
        assert float(case.objective.bias.grad) == pytest.approx(expected[-1], abs=2e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_training_loss_of_every_objective_equals_its_plain_form(name, mask, weighted, train, monkeypatch):
    monkeypatch.setattr(tiled_evaluation, "tile_starts", lambda rows, *_: [*range(0, rows, 3), rows])
    monkeypatch.setattr(blocks, "BLOCK_NUMBERS", 12)
    monkeypatch.setattr(blocks, "LEAST_WIDTH", 1)
    case = Case(name, train, mask=mask, rows=8, seed=3, strength=0.8)
    weights = torch.linspace(0.1, 1.0, 8, dtype=torch.float64) if weighted else None
    found = []
    for is_plain in (True, False):
        leaves = [case.query.clone().requires_grad_(), case.table.clone().requires_grad_()]
        temperature = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
        embedded = case.embedded(*leaves)
        parameters = list(case.objective.parameters())
        if is_plain:
            losses = case.objective(embedded, case.drawn, temperature=temperature)
            value = losses.mean() if weights is None else (losses * weights).sum()
        else:
            value = case.objective.mean(embedded, case.drawn, temperature=temperature, weights=weights)
        found.append((value, *torch.autograd.grad(value, [*leaves, temperature, *parameters])))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-8)
        assert float(one.detach().abs().max()) > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "in-batch-logq",
        "mixed",
        "mixed-by-source",
        "sampled-softmax-uniform",
        "refined-logq",
        "sampled-logistic",
        "nce",
        "bpr",
    ],
)
def test_merging_copies_changes_neither_value_nor_gradient(name, train):
    sources = {"sources": [{"in_batch": {}}, {"uniform": {"size": 4, "per_row": True}}]} if name == "bpr" else {}
    case = Case(name, train, small=name not in {"sampled-softmax-uniform", "nce"}, rows=12, seed=2, **sources)
    results = []
    for merged in (True, False):
        draw = case.objective.draw if merged else case.objective.pool.draw
        case.drawn = draw(case.positives, generator=torch.Generator().manual_seed(8))
        leaves = [case.query.clone().requires_grad_(), case.table.clone().requires_grad_()]
        loss = case.fast(*leaves)
        loss.sum().backward()
        results.append((len(case.drawn.items), loss.detach(), *(leaf.grad for leaf in leaves)))
    assert results[0][0] < results[1][0]
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_accidental_hits_are_kept_by_nce_and_masked_by_sampled_logistic():
    """For copies of the positive among shared and per-row noise."""
    counts = torch.tensor([9, 3, 1])
    for per_row in (False, True):
        pool = Pool(Sampled(Weighted(counts), 40, per_row=per_row)).eval()
        for keep in (True, False):
            objective = Logistic(pool, corrected=True, keep_accidental=keep)
            drawn = objective.draw(torch.tensor([0, 2]), generator=torch.Generator().manual_seed(0))
            table = torch.tensor([[0.3], [0.1], [-0.2]], dtype=torch.float64)
            query = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
            rows = None if drawn.row_items is None else table[drawn.row_items]
            embedded = Embedded(query, table[drawn.positives], table[drawn.items], rows)
            found = objective(embedded, drawn, temperature=1.0)
            for row, y in enumerate((0, 2)):
                copies = drawn.items.repeat_interleave(drawn.multiplicity)
                items = (drawn.row_items[row] if per_row else copies).tolist()
                kappa = [40 * c / 13 for c in counts.tolist()]
                logits = [(query[row] * table[j]).item() - float(np.log(kappa[j])) for j in range(3)]
                expected = float(np.logaddexp(0, -logits[y]))
                expected += sum(float(np.logaddexp(0, logits[j])) for j in items if keep or j != y)
                assert found[row].item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="nce needs sampled noise"):
        Logistic(Pool(InBatch(CountedFrequency(counts))), keep_accidental=True)


def test_beta_of_gbce_in_closed_form(train):
    assert gbce_beta(5, 101, 0.0) == 1.0
    assert gbce_beta(5, 101, 1.0) == pytest.approx(0.05)
    for size, items, t in ((1, 50, 0.75), (64, 5000, 0.3), (7, 8, 0.5)):
        a = size / (items - 1)
        assert gbce_beta(size, items, t) == pytest.approx(a * (t * (1 - 1 / a) + 1 / a))
    assert gbce_beta(64, 10, 0.75) == 1.0, "more negatives than items: nothing to calibrate"
    assert gbce_beta(0, 10, 0.75) == 0.25
    assert gbce_beta(3, 1) == 1.0
    objective, _ = build("gbce", train)
    assert isinstance(objective, GeneralisedBCE)
    assert objective.beta == pytest.approx(gbce_beta(K, N, 0.75))


def test_positives_in_the_head_have_count_one_in_binary_forms():
    """With a sampled tail, positives in the head must still get a gradient."""
    counts = torch.tensor([9, 3, 1, 1])
    pool = Pool(Head(counts, 2), Sampled(Weighted(torch.tensor([0.0, 0, 1, 1])), 4)).eval()
    objective = Logistic(pool, corrected=True)
    drawn = objective.draw(torch.tensor([0, 2]), generator=torch.Generator().manual_seed(0))
    table = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    query = torch.ones(2, 2, dtype=torch.float64)
    objective(Embedded(query, table[drawn.positives], table[drawn.items]), drawn, temperature=1.0)[0].backward()
    own = float(torch.sigmoid(-table[0].detach().sum()))
    assert table.grad[0].tolist() == pytest.approx([-own, -own])


def test_refined_logq_needs_drawn_candidates():
    counts = torch.tensor([9, 3, 1, 1])
    in_batch = InBatch(CountedFrequency(counts))
    with pytest.raises(InputError, match="always included"):
        RefinedLogQ(Pool(in_batch, Head(counts, 1), correction=corrections.Probability()))
    with pytest.raises(InputError, match="shared by the batch"):
        RefinedLogQ(Pool(in_batch, Sampled(Uniform(2), 2, per_row=True), correction=corrections.Probability()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unique": True}, "set unique to false, or use expected-count"),
        ({"sources": [{"in_batch": {"unique": True}}]}, "set unique to false, or use expected-count"),
        ({"sources": [{"in_batch": {}}, {"uniform": {"size": 4}}]}, "use in_batch alone, or expected-count"),
        ({"sources": [{"in_batch": {}}, {"memory": {"size": 4}}]}, "use in_batch alone, or expected-count"),
    ],
)
def test_refined_logq_refuses_pools_that_it_does_not_hold_for(settings, message, train):
    with pytest.raises(InputError, match=message):
        build("refined-logq", train, **settings)


def test_refined_logq_with_masked_known_positives_estimates_the_partition(train):
    """Over redrawn batches, (1/n') sum exp(s_i) / Q'_i is the sum over the items that the row may be pushed from."""
    objective, _ = build("refined-logq", train)
    counts = torch.from_numpy(train.item_counts()).double()
    known, positive, rows = [0, 1, 1, 4], 4, 30
    scores = torch.linspace(-1.0, 1.5, N, dtype=torch.float64)[
        torch.randperm(N, generator=torch.Generator().manual_seed(1))
    ]
    one, estimates, old = torch.ones(1, 1, dtype=torch.float64), [], []
    codes = torch.from_numpy(train.item_codes.astype(np.int64))
    first = int((codes == positive).nonzero()[0])
    rest = torch.cat([codes[:first], codes[first + 1 :]])
    for seed in range(1500):
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: rows - 1]
        positives = torch.cat([torch.tensor([positive]), rest[order]])
        pairs = (torch.zeros(4, dtype=torch.int64), torch.tensor(known))
        drawn = objective.draw(positives, known_positives=pairs).head(1)
        embedded = Embedded(one, scores[positive].reshape(1, 1), scores[drawn.items, None])
        weight = objective.row_weight(embedded, drawn, temperature=1.0)
        estimates.append(float(scores[positive].exp() / (1.0 - weight)))
        old.append(float(drawn.positive_log_count.double().exp()))
    kept = [j for j in range(N) if counts[j] > 0 and j not in known] + [positive]
    truth = float(scores[kept].exp().sum())
    found = torch.tensor(estimates, dtype=torch.float64)
    assert standard_errors_off(found, truth) < 4
    # Divided by 1 - q_y instead, the sum is too small by the ratio of the two.
    q = float(counts[[0, 1, 4]].sum() / counts.sum())
    wrong = scores[positive].exp() + (found - scores[positive].exp()) * (1 - old[0]) / (1 - q)
    assert standard_errors_off(wrong, truth) > 8


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_refused(strength):
    pool = Pool(Sampled(Uniform(3), 2))
    for make in (SampledSoftmax, PositiveCorrectedSoftmax, RefinedLogQ, Logistic):
        with pytest.raises(InputError, match="strength"):
            make(pool, strength=strength)

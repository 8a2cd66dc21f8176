"""Faults of published systems, one test each: the library is correct, and the test can detect the fault."""

import math

import numpy as np
import polars as pl
import pytest
import torch

from twotower.config.run import Config
from twotower.data import Interactions, KnownPositives
from twotower.evaluation.metrics import hits, recall_at
from twotower.index import ExactIndex
from twotower.losses import refined_logq, sampled_softmax
from twotower.negatives import (
    CountedFrequency,
    CrossBatchMemory,
    FrequencyPower,
    HardNegatives,
    InBatch,
    Pool,
    Sampled,
    StreamingFrequency,
    Uniform,
    corrections,
)
from twotower.objectives import Embedded, RefinedLogQ, SampledSoftmax
from twotower.objectives.build import build_objective, build_pool
from twotower.run.mining import refresh_hard_negatives
from twotower.towers.build import build_towers
from twotower.training.checkpoint.io import SafeCheckpointIO

COUNTS = torch.tensor([50, 20, 10, 8, 5, 3, 2, 1, 1, 0])
N = len(COUNTS)
FREQUENCY = CountedFrequency(COUNTS)


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    item = np.concatenate([np.arange(30), np.minimum(rng.zipf(1.5, 170) - 1, 29)])
    frame = pl.DataFrame({"user": rng.integers(0, 20, 200), "item": item, "timestamp": np.arange(200)})
    return Interactions.from_frame(frame.unique(["user", "item"], keep="first", maintain_order=True))


def test_accidental_hits_are_removed():
    """A shared or per-row candidate that is the row's own positive gets no weight at all."""
    pool = Pool(InBatch(FREQUENCY), Sampled(Uniform(N), 30), Sampled(Uniform(N), 20, per_row=True))
    positives = torch.tensor([0, 1, 0, 2])
    drawn = pool.draw(positives, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn.mask, drawn.items == positives[:, None])
    assert torch.equal(drawn.row_mask, drawn.row_items == positives[:, None])
    assert int(drawn.mask.sum()) > 4
    assert int(drawn.row_mask.sum()) > 0
    # Even with logits so large that a constant added to a masked one would be lost, masked candidates have no effect.
    table = 1e4 * torch.eye(N)
    query = torch.eye(N)[positives]
    loss = SampledSoftmax(pool)(
        Embedded(query, table[positives], table[drawn.items], table[drawn.row_items]), drawn, temperature=1.0
    )
    assert loss.tolist() == [0.0] * 4


def test_temperature_divides_the_score_before_the_correction():
    """Log kappa has weight one at every temperature."""
    zero = torch.zeros(1, 1)
    log_count = torch.tensor([-3.0])
    for temperature in (0.05, 1.0, 20.0):
        loss = sampled_softmax(zero, zero, zero, log_count, temperature=temperature)
        assert float(loss) == pytest.approx(math.log1p(math.exp(3.0)))


def test_unique_sampling_is_corrected_with_the_tries():
    """After n draws and removal of duplicates the inclusion is 1 - (1-q)^n, however many distinct items are left."""
    proposal = FrequencyPower(COUNTS, 1.0)
    pool = Pool(Sampled(proposal, 40, unique=True))
    drawn = pool.draw(torch.tensor([9]), generator=torch.Generator().manual_seed(0))
    distinct = len(drawn.items)
    assert distinct < 10
    q = proposal.log_prob(drawn.items).exp()
    found = drawn.log_expected_count.exp().double()
    assert torch.allclose(found, 1 - (1 - q) ** 40, rtol=1e-5)
    assert not torch.allclose(found, 1 - (1 - q) ** distinct, rtol=1e-2)


def test_removing_duplicates_does_not_truncate_the_tail():
    """Items with high codes are drawn as often as items with low codes."""
    pool = Pool(Sampled(Uniform(1000), 200, unique=True), unique=True)
    rng = torch.Generator().manual_seed(0)
    seen = torch.zeros(1000)
    for _ in range(60):
        seen[pool.draw(torch.tensor([5]), generator=rng).items] += 1
    first, last = float(seen[:500].sum()), float(seen[500:].sum())
    assert abs(first - last) / math.sqrt(first + last) < 4
    assert float(seen[990:].sum()) > 0


def test_a_mixture_has_the_counts_of_all_its_sources_and_not_one_frequency():
    """Neither the frequency nor the mixture's probability is correct once duplicates are removed over both sources."""
    pool = Pool(InBatch(FREQUENCY), Sampled(Uniform(N), 30), unique=True)
    positives = torch.tensor([0, 1, 2, 0, 3, 1])
    drawn = pool.draw(positives, generator=torch.Generator().manual_seed(0))
    p = COUNTS[drawn.items] / COUNTS.sum()
    # The five other rows are drawn from an epoch without replacement: C(R-1-c, 5) / C(R-1, 5).
    rows, count = float(COUNTS.sum()) - 1, COUNTS[drawn.items].double()
    absent = torch.stack([((rows - count - k) / (rows - k)).clamp(min=0) for k in range(5)]).prod(0)
    right = 1 - absent * (1 - 1 / N) ** 30
    found = drawn.log_expected_count.double().exp()
    assert torch.allclose(found, right, rtol=1e-5)
    for wrong in (p, 5 * p + 3, (6 * p + 30 / N) / 36):
        assert not torch.allclose(found, wrong.double(), rtol=0.05)
    assert len(set(drawn.items.tolist())) == len(drawn.items)


@pytest.mark.parametrize("margin", [30.0, 300.0, 1e4])
def test_hard_rows_still_get_their_gradient(margin):
    """No exp before the log-sum-exp and no clamped ratio: a row that is wrong by any margin gets the full gradient."""
    positive = torch.tensor([[0.0]], requires_grad=True)
    candidates = torch.tensor([[margin]], requires_grad=True)
    query = torch.ones(1, 1)
    sampled_softmax(query, positive, candidates, torch.zeros(1)).backward()
    assert (float(positive.grad), float(candidates.grad)) == pytest.approx((-1.0, 1.0))
    positive.grad = candidates.grad = None
    zero = torch.zeros(1)
    loss, weight = refined_logq(query, positive, candidates, zero, log_left=zero, row_offset=zero)
    loss.backward()
    assert (float(positive.grad), float(candidates.grad)) == pytest.approx((-1.0, 1.0))
    assert (loss.item(), weight.item()) == pytest.approx((margin, 1.0))
    # The clamped ratio has no gradient there.
    score = torch.tensor(0.0, requires_grad=True)
    (-(score.exp() / (score.exp() + math.exp(30.0))).clamp(min=1e-10).log()).backward()
    assert float(score.grad) == 0.0


def test_the_streaming_table_is_wide_enough_decays_and_is_in_the_checkpoint(tmp_path):
    """Rare items are not estimated a hundred times too frequent, absent items decay, and a resumed run continues."""
    weights = 1.0 / torch.arange(1, 501).double()
    rng = torch.Generator().manual_seed(0)
    objective = SampledSoftmax(Pool(InBatch(StreamingFrequency(500)), CrossBatchMemory(StreamingFrequency(500), 64)))
    for _ in range(400):
        objective.draw(torch.multinomial(weights, 64, replacement=True, generator=rng), generator=rng)
    frequency = objective.pool.frequencies()[0]
    tail = frequency.log_prob(torch.arange(400, 500)).exp()
    assert 0.5 < float(tail.sum()) / float((weights[400:] / weights.sum()).sum()) < 2.0
    narrow = StreamingFrequency(16)  # items that share 16 slots
    for _ in range(400):
        narrow.observe(torch.multinomial(weights, 64, replacement=True, generator=rng) % 16)
    assert float(narrow.log_prob(torch.arange(400, 500) % 16).exp().sum()) > 50 * float(tail.sum()), "too narrow"

    io = SafeCheckpointIO()
    io.save_checkpoint({"state_dict": objective.state_dict()}, tmp_path / "c.ckpt")
    fresh = SampledSoftmax(Pool(InBatch(StreamingFrequency(500)), CrossBatchMemory(StreamingFrequency(500), 64)))
    fresh.load_state_dict(io.load_checkpoint(tmp_path / "c.ckpt")["state_dict"])
    batch = torch.multinomial(weights, 64, replacement=True, generator=rng)
    one, other = objective.draw(batch), fresh.draw(batch)
    assert torch.equal(one.items, other.items)
    assert torch.equal(one.log_expected_count, other.log_expected_count)

    before = float(frequency.log_prob(torch.tensor([0])).exp())
    for _ in range(200):
        frequency.observe(torch.full((64,), 1))
    assert float(frequency.log_prob(torch.tensor([0])).exp()) < 0.1 * before


def test_ids_are_compared_with_ids_and_not_with_positions():
    """An item whose code equals another candidate's position is not an accidental hit."""
    positives = torch.tensor([3, 0, 1, 2])
    drawn = Pool(InBatch(FREQUENCY)).draw(positives)
    assert drawn.mask.tolist() == torch.eye(4, dtype=torch.bool).tolist()
    assert not torch.equal(drawn.mask, torch.arange(4) == positives[:, None])


def test_ids_do_not_pass_through_float32():
    """2^24 and 2^24 + 1, equal in float32, are different items in masks, merging and known positives."""
    big = 2**24
    neighbours = torch.tensor([big, big + 1])
    assert neighbours.float().unique().numel() == 1
    pool = Pool(Sampled(Uniform(big + 2), 1), unique=True)
    pool.sources[0].proposal.sample = lambda size, generator=None: neighbours
    drawn = pool.draw(neighbours, known_positives=torch.tensor([[-1], [-1]]))
    assert drawn.collapse().items.tolist() == [big, big + 1]
    assert drawn.mask.tolist() == [[True, False], [False, True]]
    known = pool.draw(torch.tensor([0, 1]), known_positives=torch.tensor([[big], [big + 1]]))
    assert known.mask.tolist() == [[True, False], [False, True]]


def test_a_memory_gives_both_towers_their_gradient_and_survives_a_resume():
    """Remembered items are embedded again, so both towers learn from them; the complete memory is in the state."""
    memory = CrossBatchMemory(FREQUENCY, 5)
    pool = Pool(memory)
    pool.draw(torch.tensor([0, 1, 2]))
    drawn = pool.draw(torch.tensor([3, 4]))
    assert sorted(drawn.items.tolist()) == [0, 1, 2]
    query = torch.ones(2, 2, requires_grad=True)
    table = torch.ones(N, 2, requires_grad=True)
    SampledSoftmax(pool)(
        Embedded(query, table[drawn.positives], table[drawn.items]), drawn, temperature=1.0
    ).sum().backward()
    assert bool((table.grad[:5].abs().sum(1) > 0).all())
    assert bool((table.grad[5:] == 0).all())
    resumed = CrossBatchMemory(FREQUENCY, 5)
    resumed.load_state_dict(memory.state_dict())
    for one in (memory, resumed):
        one.remember(torch.tensor([7, 7]))
    assert torch.equal(memory.items, resumed.items)
    assert sorted(memory.items.tolist()) == [2, 3, 4, 7, 7], "the oldest items are overwritten"
    assert memory.age == resumed.age
    assert memory.age == pytest.approx((1 * 2 + 2 * 2 + 3) / 5)


def test_known_positives_are_masked_beyond_the_rows_own(train):
    """With `mask_known_positives`, no row is pushed away from another training item of its query."""
    settings = Config.model_validate({"objective": {"name": "expected-count", "mask_known_positives": True}}).objective
    pool = build_pool(settings, train)
    queries = torch.from_numpy(train.query_codes()[:12].astype(np.int64))
    positives = torch.from_numpy(train.item_codes[:12].astype(np.int64))
    drawn = pool.draw(positives, known_positives=KnownPositives(train).pairs(queries))
    others = 0
    for row, query in enumerate(queries.tolist()):
        known = set(train.item_codes[train.offsets[query] : train.offsets[query + 1]].tolist())
        assert {int(j) for j, hit in zip(drawn.items, drawn.mask[row], strict=True) if hit} == known & set(
            drawn.items.tolist()
        )
        others += len(known) - 1
    assert others > 12


def test_hard_negatives_are_mined_on_raw_scores(train):
    """The hardest items have the highest raw scores; by corrected logits rare items would look hard."""
    config = Config.model_validate(
        {"query_tower": {"id_embedding": True, "history": None}, "objective": {"sources": [{"mined": {"size": 4}}]}}
    )
    objective = build_objective(config, train)
    towers = build_towers(config, num_queries=train.num_queries, num_items=train.num_items).eval()
    refresh_hard_negatives(objective, train, 0)(towers)
    mined = next(source for source in objective.pool.members() if isinstance(source, HardNegatives)).items
    with torch.no_grad():
        items = towers.embed_items(torch.arange(train.num_items))
        queries = torch.arange(train.num_queries)
        scores = towers.embed_queries(queries, torch.zeros(len(queries), 0, dtype=torch.int64)) @ items.T
    row, item = KnownPositives(train).pairs(queries)
    scores[row, item] = -torch.inf
    expected = scores.topk(4).indices
    log_p = torch.from_numpy(train.item_counts()).double().log()
    corrected = (scores / 0.1 - log_p).topk(4).indices
    assert [set(one) for one in mined.tolist()] == [set(one) for one in expected.tolist()]
    assert [set(one) for one in mined.tolist()] != [set(one) for one in corrected.tolist()]


def test_the_index_ranks_by_the_product_that_was_trained():
    """A long vector ranks first by inner product, although by distance it would be last."""
    items = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.2]])
    _, found = ExactIndex(items).search(query, 3)
    assert found.tolist() == (query @ items.T).argsort(descending=True).tolist()
    assert found.tolist() != torch.cdist(query, items).argsort().tolist()


def test_ties_are_not_hits():
    """A collapsed model, which gives every item the same score, finds its targets no more often than chance."""
    size, k = 500, 10
    _, ranked = ExactIndex(torch.ones(size, 3)).search(torch.ones(size, 3), k)
    offsets = np.arange(size + 1)
    recall = recall_at(hits(ranked.numpy(), offsets, np.arange(size)), np.ones(size, dtype=np.int64), k)
    assert recall.mean() == pytest.approx(k / size)


def test_biased_corrections_are_only_used_by_name():
    """A pool corrects with the expected count unless another correction is requested."""
    assert isinstance(Pool(InBatch(FREQUENCY)).correction, corrections.ExpectedCounts)
    assert isinstance(build_pool_of("expected-count").correction, corrections.ExpectedCounts)
    assert isinstance(build_pool_of("in-batch").correction, corrections.NoCorrection)


def build_pool_of(name):
    data = Interactions.from_frame(pl.DataFrame({"user": [1, 2, 2], "item": [1, 2, 3]}))
    objective = build_objective(Config.model_validate({"objective": {"name": name}}), data)
    assert not isinstance(objective, RefinedLogQ)
    return objective.pool

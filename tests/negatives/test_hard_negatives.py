"""Mined negatives: windows and limits by slow loops; draws by their claimed counts; the partition sum of every row."""

import math

import pytest
import torch

from support.drawing import Observations, agreement, observe, standard_errors_off
from twotower.errors import InputError
from twotower.negatives import (
    Catalog,
    CountedFrequency,
    DrawRequest,
    HardNegatives,
    InBatch,
    Observed,
    Pool,
    Sampled,
    Uniform,
    corrections,
)

N, QUERIES, LAST = 14, 3, 9
SCORES = torch.randn(QUERIES, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
#: Training items of every query, which the ranking leaves out; query 2 has so many that its ranking is short.
ITEMS = ((1, 5), (0, 2, 11), tuple(range(4, 12)))
PAIRS = torch.tensor([query * N + item for query, items in enumerate(ITEMS) for item in items])
LIMITS = {"margin": 0.3, "relative_margin": 0.2, "max_score": 1.1}


def ranking():
    """Return the items and scores of every query without its own, by loops, padded with -1."""
    items = torch.full((QUERIES, LAST), -1)
    scores = torch.full((QUERIES, LAST), -math.inf)
    for query, own in enumerate(ITEMS):
        left = sorted((j for j in range(N) if j not in own), key=lambda j: -float(SCORES[query, j]))[:LAST]
        items[query, : len(left)] = torch.tensor(left)
        scores[query, : len(left)] = SCORES[query, left].float()
    return items, scores


def mined(size, **options):
    source = HardNegatives(QUERIES, size, pairs=PAIRS, num_items=N, **{"ranks": (1, LAST), **options})
    items, scores = ranking()
    own = torch.cat([SCORES[query, list(own)] for query, own in enumerate(ITEMS)]).float()
    source.refresh(torch.arange(QUERIES), items, scores, own)
    return source


def by_loops(query, positive, *, ranks, **limits):
    """Return the eligible items and the skipped ones, in the order of the ranking."""
    own, limit = float(SCORES[query, positive].float()), math.inf
    if "margin" in limits:
        limit = min(limit, own - limits["margin"])
    if "relative_margin" in limits:
        limit = min(limit, own - limits["relative_margin"] * abs(own))
    limit = min(limit, limits.get("max_score", math.inf))
    eligible, skipped = [], []
    for place, (item, score) in enumerate(zip(*(part[query].tolist() for part in ranking()), strict=True), start=1):
        if item >= 0 and place <= ranks[1]:
            (eligible if place >= ranks[0] and score <= limit else skipped).append(item)
    return eligible, skipped


def listed(items):
    return [item for item in items.tolist() if item >= 0]


@pytest.mark.parametrize("ranks", [(1, 9), (3, 8)])
@pytest.mark.parametrize("names", [(), ("margin",), ("relative_margin",), ("max_score",), tuple(LIMITS)])
def test_windows_and_limits_are_those_of_loops(ranks, names):
    limits = {name: LIMITS[name] for name in names}
    sources = [mined(2, ranks=ranks, sampling=sampling, **limits) for sampling in ("top", "random")]
    skips = bool(names) or ranks[0] > 1
    masks = [mined(2, ranks=ranks, skipped="mask", **limits)] if skips else []
    cut = 0
    for query, items in enumerate(ITEMS):
        for positive in items:
            request = DrawRequest(torch.tensor([positive]), torch.tensor([query]))
            eligible, skipped = by_loops(query, positive, ranks=ranks, **limits)
            top, random = (source.stratum(request) for source in sources)
            assert listed(top.items[0]) == listed(top.drawn[0]) == eligible[:2] and top.log_count is None
            assert listed(random.items[0]) == eligible
            drawn = listed(random.drawn[0])
            assert len(set(drawn)) == len(drawn) == min(2, len(eligible)) and set(drawn) <= set(eligible)
            assert math.exp(float(random.log_count[0])) == pytest.approx(min(1.0, 2 / max(len(eligible), 1)))
            for source in masks:
                assert listed(source.stratum(request).skipped[0]) == skipped
            cut += len(skipped)
    assert (cut > 0) == skips, "the test must skip some items"


def test_rows_that_are_no_training_pair_have_no_mined_negatives_below_a_margin():
    request = DrawRequest(torch.tensor([3, 1, 1]), torch.tensor([0, 1, -1]))
    for sampling in ("top", "random"):
        found = mined(2, sampling=sampling, margin=0.1, skipped="mask").stratum(request)
        assert (found.drawn < 0).all() and (found.items < 0).all() and (found.skipped < 0).all()
    plain = mined(2).stratum(request)
    assert (plain.drawn >= 0).all(1).tolist() == [True, True, False]


#: Rows of one batch, each an independent draw of the strata: a query and its positive.
ROWS = 3000


def observations(pool, query, positive, seed=0, rows=ROWS):
    """Draw for many rows of one query and positive; return the unmasked candidates of every row."""
    generator = torch.Generator().manual_seed(seed)
    drawn = pool.eval().draw(torch.full((rows,), positive), queries=torch.full((rows,), query), generator=generator)
    counts, weights = torch.zeros(rows, N, dtype=torch.float64), torch.zeros(rows, N, dtype=torch.float64)
    live = (~drawn.mask).double()
    counts.index_add_(1, drawn.items, live)
    weights.index_add_(1, drawn.items, live * torch.exp(-drawn.log_expected_count.double()))
    live = (~drawn.row_mask).double()
    counts.scatter_add_(1, drawn.row_items.clamp(min=0), live)
    each = live * torch.exp(-drawn.row_log_expected_count.double())
    weights.scatter_add_(1, drawn.row_items.clamp(min=0), each)
    return Observations(counts, weights)


WINDOW = {"ranks": (2, 9), "sampling": "random"}


@pytest.mark.parametrize("limits", [{}, {"margin": 0.3}], ids=["window", "margin"])
@pytest.mark.parametrize("skipped", ["keep", "mask"])
@pytest.mark.parametrize("query", range(QUERIES))
def test_draws_follow_their_count_and_the_partition_sum_is_unbiased(query, skipped, limits):
    positive, source = ITEMS[query][-1], mined(2, skipped=skipped, **WINDOW, **limits)
    eligible, outside = by_loops(query, positive, ranks=WINDOW["ranks"], **limits)
    assert len(eligible) > 2 or limits
    # The other sources draw every item with a probability of one, so that only the stratum is random.
    found = observations(Pool(source, Catalog(N)), query, positive)
    kappa = torch.ones(N, dtype=torch.float64)
    kappa[eligible] = min(1.0, 2 / max(len(eligible), 1))
    kappa[positive] = 0.0
    if skipped == "mask":
        kappa[outside] = 0.0
    assert agreement(found.counts, kappa) > 1e-4
    scores = SCORES[query]
    target = float(scores[positive].exp() + (scores.exp() * (kappa > 0)).sum())
    assert standard_errors_off(found.partition(scores, positive), target) < 4


def test_a_window_forgotten_by_the_other_sources_or_by_the_count_is_detected(monkeypatch):
    positive, source = ITEMS[0][-1], mined(2, **WINDOW)
    pool, right = Pool(source, Catalog(N)), HardNegatives.stratum

    def target():
        scores = SCORES[0]
        return float(scores.exp().sum())

    def only_drawn(self, request):
        found = right(self, request)
        return type(found)(found.drawn, found.drawn, found.log_count)

    def wide(self, request):
        found = right(self, request)
        return type(found)(found.items, found.drawn, found.log_count + math.log(8 / 9))

    for fault in (only_drawn, wide):
        monkeypatch.setattr(HardNegatives, "stratum", fault)
        found = observations(pool, 0, positive)
        assert standard_errors_off(found.partition(SCORES[0], positive), target()) > 6


@pytest.mark.parametrize("unique", [False, True])
def test_the_window_and_random_sources_share_the_sum(unique):
    """Shared and per-row draws bring the items outside of the strata only; an item of two strata counts once."""
    frequency = CountedFrequency(torch.arange(1, N + 1), replacement=True)
    query, positive = 1, 2
    offsets = torch.tensor([0, 0, 2, 2])
    window, before = by_loops(query, positive, ranks=WINDOW["ranks"])
    (hardest, *_), always = by_loops(query, positive, ranks=(3, 6))[0], [before[0], window[-1]]
    pool = Pool(
        mined(2, **WINDOW),
        mined(1, ranks=(3, 6)),
        Observed(offsets, torch.tensor(always), 2),
        InBatch(frequency),
        Sampled(Uniform(N), 5),
        Sampled(Uniform(N), 4, per_row=True),
        unique=unique,
    )
    pool, generator, rows, times = pool.eval(), torch.Generator().manual_seed(3), 6, 250
    queries = torch.where(torch.arange(rows) == 0, query, -1)
    share = torch.arange(1, N + 1, dtype=torch.float64) / (N * (N + 1) / 2)

    def draw(_):
        positives = torch.multinomial(share, rows, replacement=True, generator=generator)
        positives[0] = positive
        return pool.draw(positives, queries=queries, generator=generator)

    found = observe(draw, times, N)
    absent = (1 - share) ** (rows - 1) * (1 - 1 / N) ** 9
    kappa = 1 - absent if unique else (rows - 1) * share + 9 / N
    kappa[window] = 2 / len(window)
    kappa[[hardest, *always]] = 1.0
    kappa[positive] = 0.0
    assert agreement(found.counts, kappa) > 1e-4
    assert standard_errors_off(found.partition(SCORES[query], positive), float(SCORES[query].exp().sum())) < 4


def test_a_part_of_the_rows_gets_the_draws_of_the_whole_batch():
    pool = Pool(mined(2, **WINDOW, margin=0.2), Sampled(Uniform(N), 3)).eval()
    positives, queries = torch.tensor([1, 2, 5, 11, 4]), torch.tensor([0, 1, 0, 1, 2])

    def draw(rows):
        generator = torch.Generator().manual_seed(8)
        own = slice(None) if rows is None else rows
        return pool.draw(DrawRequest(positives, queries[own], generator=generator, rows=rows))

    whole, part = draw(None), draw(slice(1, 4))
    assert torch.equal(whole.row_items[1:4], part.row_items) and torch.equal(whole.mask[1:4], part.mask)
    assert torch.equal(whole.row_log_expected_count[1:4], part.row_log_expected_count)


def test_an_uncorrected_loss_counts_every_mined_item_once():
    pool = Pool(mined(2, **WINDOW), Sampled(Uniform(N), 3), correction=corrections.NoCorrection())
    drawn = pool.draw(torch.tensor([1]), queries=torch.tensor([0]))
    assert drawn.row_log_expected_count.abs().max() == 0.0


def test_the_count_of_a_positive_in_a_stratum():
    """Losses that correct the positive too: item 3 is in the window of query 0, and item 12 is not."""
    inside, _ = by_loops(0, 1, ranks=WINDOW["ranks"])
    outside = next(j for j in range(N) if j not in inside)
    pool = Pool(mined(2, **WINDOW), Sampled(Uniform(N), 3))
    drawn = pool.draw(torch.tensor([inside[0], outside]), queries=torch.tensor([0, 0]))
    assert torch.allclose(drawn.positive_log_count.exp(), torch.tensor([2 / len(inside), 3 / N]))


def test_the_state_has_the_ranking_and_the_limits():
    one, other = mined(2, margin=0.3), HardNegatives(QUERIES, 2, ranks=(1, LAST), margin=0.3, pairs=PAIRS, num_items=N)
    assert set(one.state_dict()) == {"items", "limits"}
    other.load_state_dict(one.state_dict())
    request = DrawRequest(torch.tensor([1, 11]), torch.tensor([0, 1]))
    assert torch.equal(one.draw(request), other.draw(request))
    assert set(HardNegatives(QUERIES, 2).state_dict()) == {"items"}


def test_some_queries_are_refreshed():
    source = mined(2, margin=0.3)
    items, scores = ranking()
    before = source.limits.clone()
    chosen = torch.tensor([2, 0])
    index, row, item = source.pairs_of(chosen)
    assert [(int(chosen[r]), int(j)) for r, j in zip(row, item, strict=True)] == [
        (query, j) for query in (2, 0) for j in ITEMS[query]
    ]
    source.refresh(chosen, items[chosen], scores[chosen], torch.full((len(index),), 10.0))
    assert (source.limits[index] == 0).all() and (before != 0).any()
    kept = torch.ones(len(before), dtype=torch.bool)
    kept[index] = False
    assert torch.equal(source.limits[kept], before[kept])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (0, 5)}, "two ranks from 1"),
        ({"ranks": (4, 5)}, "at least size=3 items"),
        ({"margin": -0.1}, "margin: expected a finite number >= 0"),
        ({"max_score": math.nan}, "max_score: expected a finite number, found nan"),
        ({"margin": 0.1, "pairs": None}, "needs the training pairs"),
        ({"skipped": "mask"}, "nothing is skipped"),
    ],
)
def test_what_makes_no_sense_is_rejected(options, message):
    with pytest.raises(InputError, match=message):
        HardNegatives(QUERIES, 3, **{"pairs": PAIRS, "num_items": N, **options})


@pytest.mark.parametrize("limits", [{}, {"margin": 0.3}, {"margin": 5.0}])
def test_how_many_items_are_eligible_is_reported(limits):
    rows = [(query, positive) for query, items in enumerate(ITEMS) for positive in (items if limits else items[:1])]
    counts = [len(by_loops(query, positive, ranks=(2, 9), **limits)[0]) for query, positive in rows]
    source = mined(1, ranks=(2, 9), **limits)
    mean, none = source.eligible()
    assert mean == pytest.approx(sum(counts) / len(counts)) and none == pytest.approx(counts.count(0) / len(counts))
    assert source.is_mined and not HardNegatives(QUERIES, 2).is_mined
    if limits:
        source.refresh(torch.arange(QUERIES), *ranking(), torch.full((len(PAIRS),), -9.0))
        assert source.eligible() == (0.0, 1.0)


def test_a_margin_needs_scores():
    with pytest.raises(InputError, match="needs the scores"):
        mined(2, margin=0.1).refresh(torch.arange(QUERIES), ranking()[0])

"""Every source and pool: appearances follow the claimed counts, the partition is unbiased; wrong counts are detected.

A row with positive 1 and known positive 4 is observed over many draws. Its counts must follow the table of
docs/theory.md, section 2, written here as plain arithmetic; its partition estimate must have the mean
sum over (C without K) + y. If the counts of a source differ by row, every row of a batch is observed. Thresholds: seeds
are fixed, so a p-value below 1e-4 or a mean 4 standard errors off in one of these tests is an error and not bad luck; a
wrong count must have a p-value below the same 1e-4.
"""

import copy
import functools
import math

import pytest
import torch

from reference import expected_counts
from support.drawing import Observations, agreement, observe, standard_errors_off
from support.sources import SamePart
from twotower.negatives import (
    Catalog,
    CountedFrequency,
    CrossBatchMemory,
    FrequencyPower,
    HardNegatives,
    Head,
    InBatch,
    IndexStream,
    LogUniform,
    Observed,
    Pool,
    Sampled,
    Uniform,
    Weighted,
    corrections,
)

COUNTS = torch.tensor([50, 20, 10, 8, 5, 3, 2, 1, 1, 0])
N, B, POSITIVE, KNOWN, DRAWS = len(COUNTS), 6, 1, 4, 700
P = (COUNTS / COUNTS.sum()).tolist()
UNIFORM = [1 / N] * N
ROOT = [math.sqrt(c) / sum(math.sqrt(d) for d in COUNTS.tolist()) for c in COUNTS.tolist()]
ZIPF = [math.log((r + 2) / (r + 1)) / math.log(N + 1) for r in range(N)]
TAIL = [0.0] * 3 + [1 / (N - 3)] * (N - 3)
STREAM = [1 / 7 if j >= 3 else 0.0 for j in range(N)]
IN_BATCH = (B - 1, P, False)
FREQUENCY = CountedFrequency(COUNTS, replacement=True)


def observed(*items):
    """Make a source with these observed negatives for query 0 and other ones for all other queries."""
    table = [*items, 7, 8, 8, 3]
    return Observed(torch.tensor([0, len(items), len(table)]), torch.tensor(table), 4)


def mined(*items):
    source = HardNegatives(2, 3)
    source.refresh(torch.tensor([0, 1]), torch.tensor([[*items, -1, -1, -1][:3], [2, 7, 8]]))
    return source


def same_half(positive):
    """Return the probability that a draw from the half of the catalog with the positive is the item."""
    return [2 / N if j // (N // 2) == positive // (N // 2) else 0.0 for j in range(N)]


def sampled(proposal, size, **options):
    return Sampled(proposal, size, **options)


def stream():
    source = IndexStream(N, torch.tensor([2, 3, 4, 5, 6, 7]))
    source.add(torch.tensor([8, 9]))
    source.withdraw(torch.tensor([2]))
    return source


#: name: (sources, pool-unique, (draws, q, own duplicates removed) of the random ones, always included); q is a list, or
#: a function of the row's positive that returns one.
POOLS = {
    "in-batch kept": ([lambda: InBatch(FREQUENCY)], False, [IN_BATCH], ()),
    "in-batch unique": ([lambda: InBatch(FREQUENCY, unique=True)], False, [(B - 1, P, True)], ()),
    "uniform kept": ([lambda: sampled(Uniform(N), 9)], False, [(9, UNIFORM, False)], ()),
    "uniform unique": ([lambda: sampled(Uniform(N), 9, unique=True)], False, [(9, UNIFORM, True)], ()),
    "uniform per row kept": ([lambda: sampled(Uniform(N), 9, per_row=True)], False, [(9, UNIFORM, False)], ()),
    "uniform per row unique": (
        [lambda: sampled(Uniform(N), 9, per_row=True, unique=True)],
        False,
        [(9, UNIFORM, True)],
        (),
    ),
    "root of frequency kept": ([lambda: sampled(FrequencyPower(COUNTS, 0.5), 8)], False, [(8, ROOT, False)], ()),
    "log-uniform unique": ([lambda: sampled(LogUniform(COUNTS), 8, unique=True)], False, [(8, ZIPF, True)], ()),
    "index stream kept": ([lambda: sampled(stream(), 8)], False, [(8, STREAM, False)], ()),
    "memory kept": ([lambda: CrossBatchMemory(FREQUENCY, 12)], False, [(12, P, False)], ()),
    "memory unique": ([lambda: CrossBatchMemory(FREQUENCY, 12, unique=True)], False, [(12, P, True)], ()),
    "memory partly filled": ([lambda: CrossBatchMemory(FREQUENCY, 40)], False, [(12, P, False)], ()),
    "mixed kept": (
        [lambda: InBatch(FREQUENCY), lambda: sampled(Uniform(N), 7)],
        False,
        [IN_BATCH, (7, UNIFORM, False)],
        (),
    ),
    "mixed, each source unique": (
        [lambda: InBatch(FREQUENCY, unique=True), lambda: sampled(Uniform(N), 7, unique=True)],
        False,
        [(B - 1, P, True), (7, UNIFORM, True)],
        (),
    ),
    "mixed unique": (
        [lambda: InBatch(FREQUENCY), lambda: sampled(Uniform(N), 7)],
        True,
        [IN_BATCH, (7, UNIFORM, False)],
        (),
    ),
    "in-batch, memory, per row unique": (
        [
            lambda: InBatch(FREQUENCY),
            lambda: CrossBatchMemory(FREQUENCY, 12),
            lambda: sampled(Uniform(N), 4, per_row=True),
        ],
        True,
        [IN_BATCH, (12, P, False), (4, UNIFORM, False)],
        (),
    ),
    "in-batch, per row kept": (
        [lambda: InBatch(FREQUENCY), lambda: sampled(Uniform(N), 4, per_row=True)],
        False,
        [IN_BATCH, (4, UNIFORM, False)],
        (),
    ),
    "head and tail": (
        [lambda: Head(COUNTS, 3), lambda: sampled(Weighted(torch.tensor(TAIL)), 6)],
        False,
        [(6, TAIL, False)],
        (0, 1, 2),
    ),
    "head, in-batch, uniform unique": (
        [lambda: Head(COUNTS, 3), lambda: InBatch(FREQUENCY), lambda: sampled(Uniform(N), 6)],
        True,
        [IN_BATCH, (6, UNIFORM, False)],
        (0, 1, 2),
    ),
    "head, per row": (
        [lambda: Head(COUNTS, 3), lambda: sampled(Uniform(N), 6, per_row=True)],
        False,
        [(6, UNIFORM, False)],
        (0, 1, 2),
    ),
    "observed and mixed": (
        [lambda: observed(2, 5, 5), lambda: InBatch(FREQUENCY), lambda: sampled(Uniform(N), 7)],
        False,
        [IN_BATCH, (7, UNIFORM, False)],
        (2, 5),
    ),
    "mined, head and both kinds unique": (
        [
            lambda: mined(6, 2, 9),
            lambda: Head(COUNTS, 3),
            lambda: sampled(Uniform(N), 5),
            lambda: sampled(Uniform(N), 4, per_row=True),
        ],
        True,
        [(5, UNIFORM, False), (4, UNIFORM, False)],
        (0, 1, 2, 6, 9),
    ),
    "observed, mined, per row kept": (
        [lambda: observed(3), lambda: mined(3, 7), lambda: sampled(Uniform(N), 5, per_row=True)],
        False,
        [(5, UNIFORM, False)],
        (3, 7),
    ),
    "same half kept": ([lambda: SamePart(N, N // 2, 9)], False, [(9, same_half, False)], ()),
    "same half unique": ([lambda: SamePart(N, N // 2, 4, unique=True)], False, [(4, same_half, True)], ()),
    "same half and uniform per row unique": (
        [lambda: SamePart(N, N // 2, 4), lambda: sampled(Uniform(N), 5, per_row=True)],
        True,
        [(4, same_half, False), (5, UNIFORM, False)],
        (),
    ),
    "catalog": ([lambda: Catalog(N)], False, [], range(N)),
    "catalog and random sources": (
        [lambda: Catalog(N), lambda: InBatch(FREQUENCY), lambda: sampled(Uniform(N), 5, per_row=True)],
        False,
        [IN_BATCH, (5, UNIFORM, False)],
        range(N),
    ),
}


def batches(times, rng, rows=B):
    """Draw the positives of many batches, [times, rows], by popularity, except the fixed first one of each batch."""
    found = torch.multinomial(COUNTS.double(), times * rows, replacement=True, generator=rng).reshape(times, rows)
    found[:, 0] = POSITIVE
    return found


def run(pool, times=DRAWS, seed=0, known=KNOWN) -> Observations:
    """Draw from a pool independently; a memory is refilled for each draw."""
    rng = torch.Generator().manual_seed(seed)
    positives, pool = batches(times, rng), pool.eval()
    fresh = torch.multinomial(COUNTS.double(), times * 12, replacement=True, generator=rng).reshape(times, 12)
    memories = [member for member in pool.members() if isinstance(member, CrossBatchMemory)]
    empty = [copy.deepcopy(memory.state_dict()) for memory in memories]
    pairs = None if known is None else (torch.zeros(1, dtype=torch.int64), torch.tensor([known]))
    queries = (torch.arange(B) > 0).long()

    def draw(number):
        for memory, state in zip(memories, empty, strict=True):
            memory.load_state_dict(state)
            memory.remember(fresh[number])
        return pool.draw(positives[number], known_positives=pairs, queries=queries, generator=rng)

    return observe(draw, times, N)


@functools.cache
def case(name):
    """Return a pool's draws (shared by the tests of this file) and its counts by arithmetic."""
    sources, unique, *_ = POOLS[name]
    return run(Pool(*(make() for make in sources), unique=unique)), by_arithmetic(name, POSITIVE)


def by_arithmetic(name, positive):
    """Return the expected count of every item for a row with this positive, float64 [N]."""
    _, unique, parts, always = POOLS[name]
    parts = [(draws, q(positive) if callable(q) else q, own) for draws, q, own in parts]
    return torch.tensor(expected_counts(parts, unique=unique, always=always, num_items=N), dtype=torch.float64)


def masked(values):
    """Zero the row's own positive and its known positive."""
    values = values.clone()
    values[..., [POSITIVE, KNOWN]] = 0.0
    return values


@pytest.mark.parametrize("name", POOLS)
def test_appearances_follow_the_counts_of_the_theory(name):
    found, kappa = case(name)
    assert agreement(found.counts, masked(kappa)) > 1e-4
    for item in set(POOLS[name][3]) - {POSITIVE, KNOWN}:
        assert found.counts[:, item].tolist() == [1.0] * DRAWS, "always included, and masked from the random sources"


#: Positives of a batch of different rows: of both halves of the catalog, rare and popular ones, one of them twice.
ROWS = (POSITIVE, 6, 0, 9, 3, 6)
VARYING = [name for name, (_, _, parts, _) in POOLS.items() if any(callable(q) for _, q, _ in parts)]


def rows_that_disagree(pool, name):
    """Return the rows whose draws or weights do not follow the counts of their own positive."""
    rng = torch.Generator().manual_seed(6)
    drawn = [pool.draw(torch.tensor(ROWS), generator=rng) for _ in range(DRAWS)]
    wrong = []
    for row, positive in enumerate(ROWS):
        kappa = by_arithmetic(name, positive)
        kappa[positive] = 0.0
        found = observe(drawn.__getitem__, DRAWS, N, row)
        weights = found.counts / kappa.clamp(min=1e-30)
        if not (agreement(found.counts, kappa) > 1e-4 and torch.allclose(found.weights, weights, rtol=1e-5)):
            wrong.append(row)
    return wrong


@pytest.mark.parametrize("name", VARYING)
def test_every_row_follows_the_counts_of_its_own_positive(name):
    sources, unique, *_ = POOLS[name]
    assert rows_that_disagree(Pool(*(make() for make in sources), unique=unique).eval(), name) == []


@pytest.mark.parametrize("name", VARYING)
def test_the_counts_of_row_0_for_all_rows_are_detected(name, monkeypatch):
    """The positive of row 0 decides the draws and the claims of all rows; row 0 itself is right."""
    monkeypatch.setattr(SamePart, "part", lambda self, positives: positives[:1].expand(len(positives)) // self.width)
    sources, unique, *_ = POOLS[name]
    assert rows_that_disagree(Pool(*(make() for make in sources), unique=unique).eval(), name) == [1, 3, 5]


@pytest.mark.parametrize("name", POOLS)
def test_each_candidate_weighs_one_over_its_count(name):
    found, kappa = case(name)
    expected = found.counts / masked(kappa).clamp(min=1e-30)
    assert torch.allclose(found.weights, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", POOLS)
def test_counts_and_partition_with_another_seed_and_four_times_the_draws(name):
    sources, unique, *_ = POOLS[name]
    found = run(Pool(*(make() for make in sources), unique=unique), times=4 * DRAWS, seed=1)
    kappa = case(name)[1]
    assert agreement(found.counts, masked(kappa)) > 1e-4
    for kind in ("noise", "popular", "learnt"):
        estimates = found.partition(scores(kind), POSITIVE)
        assert standard_errors_off(estimates, partition_target(scores(kind), kappa)) < 4, kind


def scores(kind):
    """Return scores of an untrained model, of one that follows popularity, or of one that learned a rare item."""
    noise = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if kind == "noise":
        return noise
    if kind == "popular":
        return noise + (COUNTS + 0.1).double().log()
    return noise + 4.0 * (torch.arange(N) == POSITIVE)


def partition_target(values, kappa):
    """Sum exp s over the reachable items that are not known positives, and the positive."""
    reachable = masked(kappa) > 0
    return float(values[POSITIVE].exp() + values[reachable].exp().sum())


@pytest.mark.parametrize("name", POOLS)
def test_the_partition_estimate_is_unbiased(name):
    found, kappa = case(name)
    for kind in ("noise", "popular", "learnt"):
        values = scores(kind)
        estimates = found.partition(values, POSITIVE)
        truth = partition_target(values, kappa)
        assert standard_errors_off(estimates, truth) < 4, kind
        # Precise enough to be meaningful: one standard error is below 6 % of the truth.
        assert float(estimates.std()) / math.sqrt(DRAWS) < 0.06 * truth, kind


BIASED = {
    "no correction": ("in-batch kept", corrections.NoCorrection()),
    "plain frequency": ("in-batch kept", corrections.Probability()),
    "batch probability on kept duplicates": ("in-batch kept", corrections.BatchProbability()),
    "importance to uniform": ("in-batch kept", corrections.ImportanceToUniform()),
    "a mixture's probability": ("mixed kept", corrections.MixtureProbability()),
    "each by its own source's probability": ("mixed kept", corrections.BySourceProbability()),
    "a mixture's probability, duplicates removed": ("mixed unique", corrections.MixtureProbability()),
}


@pytest.mark.parametrize("name", BIASED)
def test_published_corrections_are_biased(name):
    """Each of them fails the test that the expected count passes."""
    sources, unique, parts, _ = POOLS[BIASED[name][0]]
    found = run(Pool(*(make() for make in sources), unique=unique, correction=BIASED[name][1]))
    kappa = torch.tensor(expected_counts(parts, unique=unique, always=(), num_items=N), dtype=torch.float64)
    values = scores("popular")
    estimates, truth = found.partition(values, POSITIVE), partition_target(values, kappa)
    assert standard_errors_off(estimates, truth) > 8
    assert abs(float(estimates.mean()) / truth - 1) > 0.08


def test_duplicates_removed_but_corrected_with_plain_frequency_is_biased():
    """Mixed pool, duplicates removed, each candidate corrected with the frequency (for an item never seen: 1/N)."""
    found, kappa = case("mixed unique")
    plain = torch.where(COUNTS > 0, torch.tensor(P, dtype=torch.float64), 1 / N)
    values = scores("popular")
    for scale in (1.0, B - 1.0, B + 6.0):  # as a probability, and as either count
        estimates = values[POSITIVE].exp() + (found.counts / (scale * plain)) @ values.exp()
        assert standard_errors_off(estimates, partition_target(values, kappa)) > 8


WRONG = {
    "B instead of B-1": lambda kappa: torch.tensor(
        expected_counts([(B, P, False), (7, UNIFORM, False)], unique=True, num_items=N), dtype=torch.float64
    ),
    "a count where a probability belongs": lambda kappa: torch.tensor(
        expected_counts([IN_BATCH, (7, UNIFORM, False)], unique=False, num_items=N), dtype=torch.float64
    ),
    "clipped": lambda kappa: kappa.clamp(max=0.8),
    "one source forgotten": lambda kappa: torch.tensor(
        expected_counts([(7, UNIFORM, False)], unique=True, num_items=N), dtype=torch.float64
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_count_is_detected_by_both_tests(name):
    found, kappa = case("mixed unique")
    wrong = WRONG[name](kappa)
    assert agreement(found.counts, masked(wrong)) < 1e-4
    values = 0.5 * (COUNTS + 0.1).double().log()
    estimates = values[POSITIVE].exp() + (found.counts / wrong) @ values.exp()
    assert standard_errors_off(estimates, partition_target(values, kappa)) > 4


@pytest.mark.parametrize("unique", [False, True])
def test_the_full_count_is_the_same_for_every_row(unique):
    """Rows of one batch share candidates, yet every row, not only row 0, has the claimed counts."""
    pool = Pool(InBatch(FREQUENCY), Sampled(Uniform(N), 7), unique=unique).eval()
    rng = torch.Generator().manual_seed(4)
    positives = batches(600, rng)
    positives[:, 3] = POSITIVE
    found = observe(lambda number: pool.draw(positives[number], generator=rng), 600, N, row=3)
    # Row 0 has the same positive here, so only four other rows are random.
    kappa = expected_counts([(B - 2, P, False), (7, UNIFORM, False)], unique=unique, num_items=N)
    expected = torch.tensor(kappa, dtype=torch.float64)
    expected[POSITIVE] = 0.0
    assert agreement(found.counts, expected) > 1e-4


def test_a_memory_in_training_follows_its_counts():
    """The pool updates the memory; every third draw is measured, because the memory then has different rows."""
    memory = CrossBatchMemory(FREQUENCY, 2 * B)
    pool = Pool(InBatch(FREQUENCY), memory, unique=True)
    rng = torch.Generator().manual_seed(5)
    rows = torch.multinomial(COUNTS.double(), 1500 * B, replacement=True, generator=rng).reshape(1500, B)

    def draw(number):
        pool.draw(rows[3 * number], generator=rng)
        pool.draw(rows[3 * number + 1], generator=rng)
        measured = rows[3 * number + 2].clone()
        measured[0] = POSITIVE
        pool.eval()
        drawn = pool.draw(measured, generator=rng)
        pool.train()
        return drawn

    found = observe(draw, 500, N)
    kappa = torch.tensor(expected_counts([IN_BATCH, (2 * B, P, False)], unique=True, num_items=N), dtype=torch.float64)
    kappa[POSITIVE] = 0.0
    assert agreement(found.counts, kappa) > 1e-4


def test_per_row_sources_mask_shared_copies_only_in_their_row():
    pool = Pool(observed(0, 2), Sampled(Uniform(N), 60)).eval()
    positives = torch.tensor([1, 1, 3])
    drawn = pool.draw(positives, queries=torch.tensor([0, 1, -1]), generator=torch.Generator().manual_seed(0))
    always = [{0, 2}, {3, 7, 8}, set()]
    for row, items in enumerate(always):
        for place, item in enumerate(drawn.items.tolist()):
            assert bool(drawn.mask[row, place]) == (item in items or item == int(positives[row]))
        held = [int(j) for j, hit in zip(drawn.row_items[row], drawn.row_mask[row], strict=True) if not hit]
        assert sorted(held) == sorted(items)


def test_pools_of_per_row_sources_only_have_no_shared_candidates():
    drawn = Pool(Sampled(Uniform(N), 4, per_row=True)).draw(torch.tensor([1, 2]))
    assert drawn.items.shape == (0,)
    assert drawn.row_items.shape == (2, 4)
    assert drawn.mask.shape == (2, 0)

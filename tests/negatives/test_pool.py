"""Pools: masks, merging of copies, empty slots, invalid calls. Counts are tested in test_counts.py."""

import math
import re

import pytest
import torch

from twotower.config.run import Config
from twotower.errors import InputError
from twotower.negatives import (
    CountedFrequency,
    CrossBatchMemory,
    FrequencyPower,
    GroupedFrequency,
    HardNegatives,
    Head,
    InBatch,
    IndexStream,
    LogUniform,
    Observed,
    Pool,
    Sampled,
    StreamingFrequency,
    Uniform,
    Weighted,
    corrections,
)
from twotower.negatives.masks import known_in_rows, membership, membership_of_rows
from twotower.negatives.sources import DrawRequest, log_absence_after, log_complement
from twotower.objectives.build import build_objective

COUNTS = torch.tensor([50, 20, 10, 8, 5, 3, 2, 1, 1, 0])
N, B = len(COUNTS), 6
FREQUENCY = CountedFrequency(COUNTS)


def rows(rng, count=B):
    return torch.multinomial(COUNTS.double(), count, replacement=True, generator=rng)


def keep_empty_slots(monkeypatch):
    """Make pools behave as on an accelerator, where empty slots are masked and not dropped."""

    def compact(items, source):
        return items.clamp(min=0), items < 0, source

    monkeypatch.setattr("twotower.negatives.pool.compact", compact)


@pytest.mark.parametrize("unique", [False, True])
def test_collapse_keeps_every_row_sum(unique):
    pool = Pool(InBatch(FREQUENCY), Sampled(Uniform(N), 30, unique=unique))
    rng = torch.Generator().manual_seed(5)
    drawn = pool.draw(rows(rng, 20), generator=rng)
    merged = drawn.collapse()
    assert len(merged.items) == len(set(drawn.items.tolist())) < len(drawn.items)
    assert int(merged.multiplicity.sum()) == len(drawn.items)
    scores = torch.randn(N, generator=rng, dtype=torch.float64)
    totals = []
    for candidates in (drawn, merged):
        weight = (scores[candidates.items] - candidates.log_expected_count.double()).exp()
        totals.append((weight * ~candidates.mask).sum(1).tolist())
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)


def test_collapse_adds_weights_of_copies_with_different_counts():
    pool = Pool(InBatch(FREQUENCY), Sampled(Uniform(N), 40), correction=corrections.BySourceProbability())
    rng = torch.Generator().manual_seed(6)
    drawn = pool.draw(rows(rng, 20), generator=rng)
    expected = [0.0] * N
    for item, log_count in zip(drawn.items.tolist(), drawn.log_expected_count.tolist(), strict=True):
        expected[item] += math.exp(-log_count)
    merged = drawn.collapse()
    found = dict(zip(merged.items.tolist(), (-merged.log_expected_count).exp().tolist(), strict=True))
    assert found == pytest.approx({item: value for item, value in enumerate(expected) if value}, rel=1e-5)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("unique", [True, False])
def test_known_positives_are_masked_only_in_their_row(padded, unique):
    pool = Pool(InBatch(FREQUENCY), Sampled(Uniform(N), 40), Sampled(Uniform(N), 9, per_row=True), unique=unique)
    rng = torch.Generator().manual_seed(2)
    positives = rows(rng)
    known = torch.tensor([[0, 3, -1], [-1, -1, -1], [9, 9, 4], [1, -1, 2], [5, 6, 7], [8, -1, -1]])
    given = known
    if not padded:
        row, place = torch.nonzero(known >= 0, as_tuple=True)
        given = (row, known[row, place])
    drawn = pool.draw(positives, known_positives=given, generator=rng)
    for row in range(B):
        for items, mask in ((drawn.items, drawn.mask[row]), (drawn.row_items[row], drawn.row_mask[row])):
            for item, hit in zip(items.tolist(), mask.tolist(), strict=True):
                assert hit == (item in {int(positives[row]), -1, *known[row].tolist()})


def test_membership_equals_loops():
    rng = torch.Generator().manual_seed(7)
    for size, members in ((0, 3), (5, 0), (12, 9), (40, 60)):
        items = torch.randint(9, (size,), generator=rng)
        row, item = torch.randint(4, (members,), generator=rng), torch.randint(-1, 12, (members,), generator=rng)
        pairs = set(zip(row.tolist(), item.tolist(), strict=True))
        expected = [[(r, j) in pairs for j in items.tolist()] for r in range(4)]
        assert membership(items, row, item, rows=4).tolist() == expected
        table = torch.randint(-1, 9, (4, size), generator=rng)
        expected = [[j >= 0 and (r, j) in pairs for j in table[r].tolist()] for r in range(4)]
        assert known_in_rows(table, row, item).tolist() == expected
        members_of_row = torch.randint(-1, 9, (4, members), generator=rng)
        expected = [[j >= 0 and j in members_of_row[r].tolist() for j in table[r].tolist()] for r in range(4)]
        assert membership_of_rows(table, members_of_row).tolist() == expected


def test_empty_slots_have_no_effect(monkeypatch):
    """If empty slots are kept, row sums, merged copies and per-row draws are the same as on the CPU."""
    # All shared candidates may be empty slots with code 0: the row's draws of item 0 must not be hidden by them.
    per_row = Sampled(Uniform(3), 6, per_row=True)
    pool = Pool(Sampled(Uniform(3), 5), per_row, unique=True).eval()
    mixed = Pool(InBatch(FREQUENCY, unique=True), Head(COUNTS, 2), Sampled(Uniform(N), 30)).eval()
    found = {}
    for place in ("cut", "kept"):
        if place == "kept":
            keep_empty_slots(monkeypatch)
        rng = torch.Generator().manual_seed(8)
        sums, numbers = [], []
        for _ in range(30):
            drawn = pool.draw(torch.tensor([2, 1]), generator=rng)
            for candidates in (drawn, drawn.collapse()):
                for row in range(2):
                    shared = candidates.items[~candidates.mask[row]].tolist()
                    own = candidates.row_items[row][~candidates.row_mask[row]].tolist()
                    sums.append(sorted(shared + own))
            drawn = mixed.draw(rows(rng), generator=rng)
            merged = drawn.collapse()
            numbers.append(int(merged.multiplicity.sum()))
            for candidates in (drawn, merged):
                assert not bool((candidates.mask.all(0) & torch.isfinite(candidates.log_expected_count)).all())
                weight = (-candidates.log_expected_count.double()).exp() * ~candidates.mask
                sums.append([round(value, 3) for value in weight.sum(1).tolist()])
        found[place] = (sums, numbers)
    assert found["cut"] == found["kept"]


def test_a_positive_that_is_always_included_has_log_count_zero():
    """Losses that also correct the positive must treat the head as certain, whatever its count in the tail."""
    tail = Weighted(torch.tensor([0.0, 0.0, 1, 1, 1, 1, 1, 1, 1, 1]))
    observed = Observed(torch.tensor([0, 0, 1]), torch.tensor([5]), 2)
    pool = Pool(Head(COUNTS, 2), observed, Sampled(tail, 4))
    drawn = pool.draw(torch.tensor([0, 1, 2, 5, 5]), queries=torch.tensor([0, 0, 0, 1, 0]))
    assert drawn.positive_log_count.tolist() == pytest.approx([0.0, 0.0, math.log(4 / 8), 0.0, math.log(4 / 8)])


def test_counts_of_a_pool_in_another_shape():
    items = torch.arange(N).reshape(2, 5)
    request = DrawRequest(torch.zeros(B, dtype=torch.int64))
    pool = Pool(InBatch(FREQUENCY), Sampled(Uniform(N), 3), unique=True)
    flat = pool.log_expected_count(items.flatten(), request)
    assert torch.equal(pool.log_expected_count(items, request).flatten(), flat)
    assert Pool(Head(COUNTS, 2)).log_expected_count(items, request).isneginf().all()


def test_frequencies_are_updated_once_per_step_and_only_in_training():
    frequency = StreamingFrequency(N)
    pool = Pool(InBatch(frequency), CrossBatchMemory(frequency, 4))
    pool.draw(torch.tensor([1, 2, 3]))
    assert float(frequency.clock) == 3
    pool.eval().draw(torch.tensor([1, 2, 3]))
    assert float(frequency.clock) == 3
    assert pool.members()[1].draws(DrawRequest(torch.tensor([0]))) == 3


def test_a_drawn_item_without_probability_is_refused():
    pool = Pool(InBatch(FREQUENCY))
    with pytest.raises(InputError, match="expected count is zero"):
        pool.draw(torch.tensor([9, 1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Pool, "at least one source"),
        (lambda: Pool(InBatch(FREQUENCY)).draw(torch.tensor([0.5])), "int64 item codes"),
        (lambda: Pool(InBatch(FREQUENCY)).draw(torch.tensor([[0]])), "int64 item codes"),
        (lambda: CountedFrequency(torch.zeros(3)), "all are zero"),
        (lambda: CountedFrequency(torch.zeros(0)), "one number per item"),
        (lambda: CountedFrequency(torch.tensor([1, -1])), "finite numbers"),
        (lambda: CountedFrequency(torch.tensor([1, math.nan])), "finite numbers"),
        (lambda: GroupedFrequency([]), "one frequency per group"),
        (lambda: GroupedFrequency([FREQUENCY, CountedFrequency(torch.ones(2))]), "for the same catalog"),
        (lambda: GroupedFrequency([FREQUENCY]).log_prob(torch.tensor([0])), "needs the group of the batch"),
        (lambda: Sampled(Uniform(3), -1), "draws >= 0"),
        (lambda: Uniform(0), "at least 1"),
        (lambda: Weighted(torch.zeros(2)), "not all of them zero"),
        (lambda: Weighted(torch.tensor([1, -1])), "finite numbers"),
        (lambda: Weighted(torch.ones(2, 2)), "one number per item"),
        (lambda: FrequencyPower(torch.tensor([3.0, -1.0]), 0.5), "finite numbers"),
        (lambda: FrequencyPower(torch.tensor([3.0, math.nan]), 0.5), "finite numbers"),
        (lambda: FrequencyPower(torch.zeros(2), 0.5), "not all of them zero"),
        (lambda: LogUniform(torch.zeros(0)), "one number per item"),
        (lambda: IndexStream(3, torch.zeros(0, dtype=torch.int64)), "no item would be left"),
        (lambda: IndexStream(3, torch.tensor([3])), "from 0 to 2"),
        (lambda: IndexStream(3).withdraw(torch.arange(3)), "no item would be left"),
        (lambda: IndexStream(3).add(torch.tensor([-1])), "from 0 to 2"),
        (lambda: CrossBatchMemory(FREQUENCY, 0), "at least 1 remembered"),
        (lambda: Head(COUNTS, 0), "at least 1 item in the head"),
        (lambda: HardNegatives(3, 0), "at least 1 hard negative"),
        (lambda: HardNegatives(3, 2).refresh(torch.tensor([0]), torch.tensor([[1]])), "at least 2"),
        (lambda: HardNegatives(3, 2).refresh(torch.tensor([0, 1]), torch.tensor([[1, 2]])), "at least 2"),
        (lambda: Observed(torch.tensor([0, 1]), torch.tensor([1]), 0), "at least 1 observed"),
        (lambda: Pool(HardNegatives(3, 2)).draw(torch.tensor([0])), "draw with queries"),
        (lambda: StreamingFrequency(3, rate=0.0), "rate"),
        (
            lambda: Pool(Sampled(Uniform(N), 2), correction=corrections.Probability()).draw(torch.tensor([0])),
            "add in_batch",
        ),
        (
            lambda: Pool(InBatch(FREQUENCY), unique=True, correction=corrections.BySourceProbability()).draw(
                torch.tensor([0, 1])
            ),
            "set unique to false",
        ),
    ],
)
def test_invalid_calls_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_ids_above_two_to_the_24th_stay_exact():
    big = 2**24 + 1
    drawn = Pool(Sampled(Uniform(2**40), 50)).draw(torch.tensor([big]), generator=torch.Generator().manual_seed(0))
    assert drawn.items.dtype == torch.int64
    assert int(drawn.items.max()) > 2**33
    known = (torch.tensor([0]), torch.tensor([big + 1]))
    pool = Pool(InBatch(_Flat(2**25)), Sampled(_Only(big), 2, per_row=True))
    shared = pool.draw(torch.tensor([big, big + 1, big + 2]), known_positives=known)
    expected = [[j == y or (y == big and j == big + 1) for j in (big, big + 1, big + 2)] for y in range(big, big + 3)]
    assert shared.mask.tolist() == expected
    assert shared.row_mask.tolist() == [[True, True], [False, False], [False, False]]


class _Flat(CountedFrequency):
    """A uniform frequency over a huge catalog, without a table."""

    def __init__(self, num_items):
        super().__init__(torch.ones(1), replacement=True)
        self.num_items = num_items

    def log_prob(self, items, group=None):
        return torch.full(items.shape, -math.log(self.num_items), dtype=torch.float64)


class _Only(Uniform):
    """A proposal that always draws the same item of a huge catalog."""

    def __init__(self, item):
        super().__init__(2**25)
        self.item = item

    def sample(self, size, generator=None):
        return torch.full(size, self.item)


def test_log_space_keeps_tiny_probabilities():
    tiny = torch.tensor([1e-12], dtype=torch.float64).log()
    inclusion = log_complement(log_absence_after(1000, tiny)).exp()
    assert float(inclusion) == pytest.approx(1e-9, rel=1e-6)
    assert float(log_complement(torch.tensor([0.0], dtype=torch.float64))) == -math.inf
    assert float(log_complement(torch.tensor([-math.inf], dtype=torch.float64))) == 0.0
    sure = log_absence_after(3, torch.zeros(1, dtype=torch.float64))
    assert float(log_complement(sure).exp()) == 1.0
    assert float(log_absence_after(0, torch.zeros(1, dtype=torch.float64))) == 0.0


@pytest.mark.parametrize("unique", [False, True])
def test_one_row_and_one_item(unique):
    pool = Pool(InBatch(CountedFrequency(torch.tensor([4]))), Sampled(Uniform(1), 3), unique=unique)
    drawn = pool.draw(torch.tensor([0]))
    assert drawn.mask.all()
    assert torch.isfinite(drawn.log_expected_count).all()


@pytest.mark.parametrize("correction", [None, corrections.MixtureProbability()])
@pytest.mark.parametrize("unique", [False, True])
def test_sources_without_a_draw_give_an_empty_pool(unique, correction):
    """Sources of size 0, and a memory before its first batch."""
    sources = [Sampled(Uniform(N), 0), CrossBatchMemory(FREQUENCY, 5), Sampled(Uniform(N), 0, per_row=True)]
    drawn = Pool(*sources, unique=unique, correction=correction).draw(torch.tensor([3, 4]))
    assert drawn.items.shape == (0,)
    assert drawn.row_items.shape == (2, 0)
    assert drawn.collapse().items.shape == (0,)
    assert drawn.positive_log_count.isneginf().all()


def test_candidates_move_to_another_device():
    drawn = Pool(InBatch(FREQUENCY)).draw(torch.tensor([0, 1])).to("meta")
    assert drawn.mask.device.type == "meta"
    assert drawn.row_items is None


@pytest.mark.parametrize("preset", ["sasrec", "sasrec-large"])
def test_a_head_that_leaves_nothing_to_draw_suggests_a_setting(planted_data, preset):
    occur = int((planted_data.item_counts() > 0).sum())
    message = f"head: size 128 includes every item .* {occur} of the 100 items, of which {occur} occur in training"
    with pytest.raises(InputError, match=message) as refused:
        build_objective(Config.load(preset, []), planted_data)
    (change,) = re.findall(r"--set '(.*)'", str(refused.value))
    config = Config.load(preset, [change])
    assert config.objective.sources == [{"head": {"size": occur // 4}}, {"frequency": {"size": 384, "power": 0.5}}]
    head, tail = build_objective(config, planted_data).pool.sources
    chances = tail.proposal.log_prob(torch.arange(100)).exp()
    assert float(chances[head.items].sum()) == 0.0 and float(chances.sum()) == pytest.approx(1.0)


def test_a_request_and_its_fields_by_name_draw_the_same():
    pool = Pool(InBatch(FREQUENCY), Sampled(Uniform(N), 5))
    positives, known = torch.tensor([0, 1, 2]), torch.tensor([[3, -1], [-1, -1], [0, 1]])
    request = DrawRequest(positives, known_positives=known, rows=slice(1, 3))
    whole = pool.draw(request, generator=torch.Generator().manual_seed(0), known_positives=known[1:])
    named = pool.draw(
        positives, known_positives=known[1:], rows=slice(1, 3), generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(whole.items, named.items)
    assert torch.equal(whole.mask, named.mask)
    assert request.generator is None, "the request itself is not changed"
    with pytest.raises(TypeError, match="markets"):
        pool.draw(positives, markets=1)


def test_a_batch_of_one_row_has_no_in_batch_candidates():
    frequency = CountedFrequency(torch.tensor([3, 2]))
    with pytest.raises(InputError, match="a batch of one row has no other rows"):
        Pool(InBatch(frequency)).draw(torch.tensor([1]))
    drawn = Pool(InBatch(frequency), Sampled(Uniform(2), 4), unique=True).draw(torch.tensor([1]))
    weight = torch.exp(-drawn.log_expected_count[~drawn.mask[0]])
    assert weight.tolist() == pytest.approx([1 / (1 - 0.5**4)] * len(weight)), "only the uniform draws count"


def test_counts_that_vary_by_row_are_refused_for_shared_candidates():
    varying = Sampled(Uniform(N), 3, per_row=True)
    varying.varies_by_row = True
    with pytest.raises(InputError, match=r"counts of Sampled differ from row to row.*\(InBatch\).*per_row=True"):
        Pool(InBatch(FREQUENCY), varying)
    Pool(varying, Sampled(Uniform(N), 3, per_row=True))

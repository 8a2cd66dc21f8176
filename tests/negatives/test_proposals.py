"""Proposals: draws follow log_prob (chi-square), probabilities sum to one, alias tables are exact."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from twotower.negatives import FrequencyPower, IndexStream, LogUniform, Uniform, Weighted
from twotower.negatives.proposals import AliasTable, build_alias

COUNTS = torch.tensor([500, 0, 200, 90, 40, 40, 7, 3, 1, 0, 1, 0])
N = len(COUNTS)
DRAWS = 200_000


def changed_stream():
    stream = IndexStream(N, torch.tensor([0, 3, 3, 5]))
    stream.add(torch.tensor([7, 8, 3]))
    stream.withdraw(torch.tensor([0, 11]))
    return stream


def resumed_stream():
    stream = IndexStream(N)
    stream.load_state_dict(changed_stream().state_dict())
    return stream


PROPOSALS = {
    "uniform": lambda: Uniform(N),
    "weighted": lambda: Weighted(torch.tensor([0.0, 3.0, 0.1, 0, 0, 9, 2, 2, 2, 1e-3, 40, 0], dtype=torch.float64)),
    "frequency": lambda: FrequencyPower(COUNTS, 1.0),
    "frequency to 0.75": lambda: FrequencyPower(COUNTS, 0.75),
    "frequency to 0": lambda: FrequencyPower(COUNTS, 0.0),
    "frequency to -0.5": lambda: FrequencyPower(COUNTS, -0.5),
    "frequency to 0.5 with floor": lambda: FrequencyPower(COUNTS, 0.5, floor=2.0),
    "log-uniform": lambda: LogUniform(COUNTS),
    "index stream": lambda: IndexStream(N),
    "index stream changed": changed_stream,
    "index stream resumed": resumed_stream,
}


def arithmetic(name):
    """Compute the same probabilities by plain arithmetic."""
    counts = COUNTS.tolist()
    weights = {
        "uniform": [1.0] * N,
        "weighted": [0.0, 3.0, 0.1, 0, 0, 9, 2, 2, 2, 1e-3, 40, 0],
        "frequency": counts,
        "frequency to 0.75": [c**0.75 for c in counts],
        "frequency to 0": [float(c > 0) for c in counts],
        "frequency to -0.5": [c**-0.5 if c else 0.0 for c in counts],
        "frequency to 0.5 with floor": [(c + 2.0) ** 0.5 for c in counts],
        "log-uniform": [
            math.log((r + 2) / (r + 1)) for r in np.argsort(np.argsort([-c for c in counts], kind="stable"))
        ],
        "index stream": [1.0] * N,
        "index stream changed": [float(j in {3, 5, 7, 8}) for j in range(N)],
        "index stream resumed": [float(j in {3, 5, 7, 8}) for j in range(N)],
    }[name]
    return np.array(weights) / sum(weights)


def p_value(draws, probabilities):
    """Compute the chi-square p-value of drawn codes; 0 if an item of probability zero was drawn."""
    observed = np.bincount(draws.reshape(-1).numpy(), minlength=len(probabilities))
    if observed[probabilities == 0].any():
        return 0.0
    live = probabilities > 0
    if live.sum() == 1:
        return 1.0
    return stats.chisquare(observed[live], probabilities[live] / probabilities[live].sum() * observed.sum()).pvalue


@pytest.mark.parametrize("name", PROPOSALS)
def test_draws_follow_log_prob(name):
    proposal = PROPOSALS[name]()
    probability = proposal.log_prob(torch.arange(N)).exp()
    assert probability.dtype == torch.float64
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-12)
    assert probability.tolist() == pytest.approx(arithmetic(name).tolist(), rel=1e-12)
    draws = proposal.sample((DRAWS // 8, 8), torch.Generator().manual_seed(1))
    assert (draws.dtype, draws.shape) == (torch.int64, (DRAWS // 8, 8))
    assert p_value(draws, probability.numpy()) > 1e-4


def test_the_chi_square_detects_a_wrong_proposal():
    """A slightly different power, extra items in the stream, a rank shifted by one."""
    rng = torch.Generator().manual_seed(2)
    draws = FrequencyPower(COUNTS, 0.75).sample((DRAWS,), rng)
    assert p_value(draws, arithmetic("frequency")) < 1e-6
    assert p_value(draws, FrequencyPower(COUNTS, 0.72).log_prob(torch.arange(N)).exp().numpy()) < 1e-6
    assert p_value(IndexStream(N).sample((DRAWS,), rng), arithmetic("index stream changed")) == 0.0
    shifted = np.array([math.log((r + 3) / (r + 2)) / math.log((N + 2) / 2) for r in range(N)])
    ordered = LogUniform(torch.arange(N, 0, -1))
    assert p_value(ordered.sample((DRAWS,), rng), shifted) < 1e-6


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=1, max_size=30),
        st.lists(st.floats(0, 1e12), min_size=1, max_size=40),
        st.lists(st.floats(-300, 300).map(lambda x: 10.0**x), min_size=1, max_size=12),
        st.integers(1, 200).map(lambda n: [1.0] * n),
        st.integers(1, 60).map(lambda n: [1e15] + [1e-3] * n),
        st.just([5e-324, 5e-324, 0.0]),
    ).filter(lambda w: 0 < sum(w) < 1e307)
)
def test_an_alias_table_reproduces_its_weights(weights):
    """Item j has the threshold of its own slot plus the shares that other slots redirect to it."""
    values = torch.tensor(weights, dtype=torch.float64)
    threshold, alias = build_alias(values)
    n = len(weights)
    rebuilt = [0.0] * n
    for slot, (keep, other) in enumerate(zip(threshold.tolist(), alias.tolist(), strict=True)):
        assert 0.0 <= keep <= 1.0
        rebuilt[slot] += keep / n
        rebuilt[other] += (1.0 - keep) / n
    scale = max(weights)
    total = math.fsum(w / scale for w in weights)
    assert rebuilt == pytest.approx([w / scale / total for w in weights], abs=1e-13)
    for weight, share in zip(weights, rebuilt, strict=True):
        assert weight > 0 or share == 0.0, "an item of weight zero must be impossible, not just unlikely"


@pytest.mark.parametrize("weights", [[0.0, 0.0, 1.0, 1.0], [1.0, 0.5, 1.5], [2.0, 1.0, 1.0, 0.0], [0, 1, 0, 1, 0, 1]])
def test_ties_in_the_construction_of_an_alias_table(weights):
    """A heavy item whose excess is used up exactly, or is zero from the start, keeps its own slot."""
    threshold, alias = build_alias(torch.tensor(weights, dtype=torch.float64))
    rebuilt = threshold.clone().index_add_(0, alias, 1.0 - threshold) / len(weights)
    assert rebuilt.tolist() == pytest.approx([w / sum(weights) for w in weights], abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 1e-9, 1.0, 1e9]), min_size=1, max_size=20).filter(any))
def test_items_of_weight_zero_are_never_drawn(weights):
    draws = Weighted(torch.tensor(weights)).sample((5000,), torch.Generator().manual_seed(0))
    assert all(weights[j] > 0 for j in draws.unique().tolist())


@pytest.mark.parametrize("weights", [[1e308, 1e308, 0.0], [5e-324, 5e-324, 0.0]])
def test_weights_at_the_limits_of_float64(weights):
    proposal = Weighted(torch.tensor(weights, dtype=torch.float64))
    assert proposal.log_prob(torch.arange(3)).exp().tolist() == pytest.approx([0.5, 0.5, 0.0])
    draws = proposal.sample((1000,), torch.Generator().manual_seed(0))
    assert sorted(draws.unique().tolist()) == [0, 1]


def test_a_large_table_keeps_its_rare_items():
    """A Zipf catalog of a million: draws by rank decade follow the probabilities, down to the last."""
    size = 1_000_000
    proposal = FrequencyPower(1e7 / torch.arange(1, size + 1).double(), 1.0)
    draws = proposal.sample((DRAWS,), torch.Generator().manual_seed(3))
    edges = np.array([0, 1, 10, 100, 1000, 10_000, 100_000, size])
    probability = proposal.log_prob(torch.arange(size)).exp().numpy()
    expected = np.add.reduceat(probability, edges[:-1]) * DRAWS
    observed = np.histogram(draws.numpy(), edges)[0]
    assert stats.chisquare(observed, expected / expected.sum() * DRAWS).pvalue > 1e-4


def test_draws_are_reproducible_and_do_not_use_the_global_generator():
    before = torch.random.get_rng_state()
    for make in PROPOSALS.values():
        first, second = (make().sample((5, 3), torch.Generator().manual_seed(9)) for _ in range(2))
        assert torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_index_stream_has_added_items_and_not_withdrawn_ones():
    stream = changed_stream()
    assert stream.log_prob(torch.tensor([3, 5, 7, 8])).exp().tolist() == pytest.approx([0.25] * 4)
    assert stream.log_prob(torch.tensor([0, 1, 2, 11])).isneginf().all()
    assert resumed_stream().log_prob(torch.arange(N)).tolist() == stream.log_prob(torch.arange(N)).tolist()


@pytest.mark.slow
def test_a_million_draws_from_ten_million_items_take_less_than_a_second():
    import time

    proposal = FrequencyPower(torch.arange(1, 10_000_001).double(), 0.75)
    started = time.perf_counter()
    proposal.sample((1_000_000,))
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("num_items", [1, 7, 10_000_000, 2**31 - 1])
def test_one_random_number_gives_slot_and_coin_exactly(num_items):
    """Compare the product of 63 random bits and N in Python integers with the two halves in int64."""
    bits = torch.randint(2**62, (2000,), generator=torch.Generator().manual_seed(3)) * 2 + 1
    bits[:3] = torch.tensor([0, 2**63 - 1, 2**31 - 1])
    products = [(value * num_items) >> 31 for value in bits.tolist()]
    expected = [(product >> 32, (product & 0xFFFFFFFF) >> 1) for product in products]
    table = AliasTable(torch.ones(1))
    for keep in (True, False):
        # A fake table: the alias depends on the slot number, and a slot keeps its own item always or never.
        table.packed = _EverySlot(num_items, threshold=2**31 - 1 if keep else 0)
        found = bits.clone()
        table._fill(found)
        moved = [not keep or coin >= 2**31 - 1 for _, coin in expected]
        aliased = [num_items - 1 - slot for slot, _ in expected]
        slots = [slot for slot, _ in expected]
        assert found.tolist() == [b if m else a for a, b, m in zip(slots, aliased, moved, strict=True)]


class _EverySlot(torch.Tensor):
    """A fake table of N words that computes `index_select` without storing them."""

    @staticmethod
    def __new__(cls, num_items, threshold):
        return torch.Tensor._make_subclass(cls, torch.empty(0, dtype=torch.int64))

    def __init__(self, num_items, threshold):
        self.num_items, self.threshold = num_items, threshold

    def __len__(self):
        return self.num_items

    def index_select(self, dim, index):
        return (self.threshold << 32) | (self.num_items - 1 - index)


def test_ids_above_two_to_the_24th_are_exact():
    num_items = 2**24 + 5
    weights = torch.zeros(num_items)
    weights[-3:] = torch.tensor([1.0, 2.0, 1.0])
    drawn = Weighted(weights).sample((4000,), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn - (num_items - 3), minlength=3)
    assert int(drawn.min()) >= num_items - 3
    assert stats.chisquare(counts.numpy(), [1000, 2000, 1000]).pvalue > 1e-4

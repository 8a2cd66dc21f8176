"""Candidates under a rule for eligible items: draws within a group follow their claim, masks reach every loss."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from support.conformance import B, Cell, N, build, ruled
from twotower.config.run import Config
from twotower.data.eligibility import Eligibility
from twotower.errors import InputError
from twotower.losses.softmax import sampled_softmax
from twotower.losses.tiled import tiled_softmax
from twotower.negatives import (
    CountedFrequency,
    DrawRequest,
    FrequencyPower,
    InBatch,
    LogUniform,
    Pool,
    Sampled,
    SampledWithinGroup,
    Uniform,
)
from twotower.negatives.masks import NegativeMask
from twotower.objectives.build import build_objective

ITEMS = 12
MEMBER = np.zeros((3, ITEMS), dtype=bool)
MEMBER[0, :7], MEMBER[1, 5:] = True, True  # no item is offered in group 2
RULE = Eligibility(None, MEMBER, None, None, None)
COUNTS = torch.tensor([40, 30, 20, 10, 9, 8, 7, 6, 5, 4, 3, 0])
PROPOSALS = {
    "uniform": Uniform(ITEMS),
    "frequency": FrequencyPower(COUNTS, 0.75),
    "log-uniform": LogUniform(COUNTS),
}


def follows(counts, share, level=1e-4):
    """Test counts against claimed shares by chi-square; an item without a share was never drawn."""
    counts, share = np.asarray(counts, dtype=float), np.asarray(share)
    assert counts[share == 0].sum() == 0
    kept = share > 0
    return stats.chisquare(counts[kept], share[kept] / share[kept].sum() * counts[kept].sum()).pvalue > level


@pytest.mark.parametrize("name", PROPOSALS)
@pytest.mark.parametrize("group", [0, 1])
def test_draws_within_a_group_follow_the_claim(name, group):
    proposal, generator = PROPOSALS[name], torch.Generator().manual_seed(group)
    source = SampledWithinGroup(proposal, RULE, 60_000)
    request = DrawRequest(torch.zeros(4, dtype=torch.int64), group=group, generator=generator)
    drawn = source.draw(request)
    claimed = source.log_prob(torch.arange(ITEMS), request).exp()
    weights = proposal.log_prob(torch.arange(ITEMS)).exp() * torch.from_numpy(MEMBER[group])
    torch.testing.assert_close(claimed, weights / weights.sum())
    counts = torch.bincount(drawn, minlength=ITEMS)
    assert follows(counts, claimed)
    # The test can fail: the claim of a draw from the whole catalog.
    assert counts[~torch.from_numpy(MEMBER[group])].sum() == 0
    other = claimed.clone()
    other[5] *= 1.2
    assert not follows(counts, other)
    kappa = source.log_expected_count(torch.arange(ITEMS), request).exp()
    torch.testing.assert_close(kappa, 60_000 * claimed)


def test_each_row_draws_within_its_own_group_on_every_rank():
    source = SampledWithinGroup(PROPOSALS["frequency"], RULE, 4_000, per_row=True, by_row=True)
    groups = torch.tensor([0, 1, 0, 2, 1])
    request = DrawRequest(torch.zeros(5, dtype=torch.int64), groups=groups, generator=torch.Generator().manual_seed(0))
    drawn = source.draw(request)
    assert (drawn[3] == -1).all(), "nothing to draw"
    own = DrawRequest(request.positives, groups=groups, rows=slice(1, 4))
    claimed = source.log_prob(torch.arange(ITEMS).expand(3, ITEMS), own).exp()
    for row in (0, 1, 2, 4):
        counts = torch.bincount(drawn[row], minlength=ITEMS)
        share = source.log_prob(
            torch.arange(ITEMS)[None], DrawRequest(request.positives[:1], groups=groups[[row]])
        ).exp()
        assert follows(counts, share[0])
        if 1 <= row < 4:
            torch.testing.assert_close(claimed[row - 1], share[0])
    assert (claimed[2] == 0).all()
    none = SampledWithinGroup(FrequencyPower(COUNTS.index_fill(0, torch.arange(5, 12), 0), 1.0), RULE, 4)
    request = DrawRequest(request.positives, group=1)
    assert (none.draw(request) == -1).all(), "group 1 has items, but none of them is ever drawn"
    assert (none.log_prob(torch.arange(ITEMS), request) == -torch.inf).all()
    torch.testing.assert_close(source.log_prob(torch.tensor([0, 6, 9]), own).exp(), claimed[torch.arange(3), [0, 6, 9]])


@pytest.mark.parametrize(
    ("sources", "batches", "frequency"),
    [
        ("in-batch + uniform", "eligible rows", "counted"),
        ("uniform per row", "eligible rows", "counted"),
        ("in-batch + memory + uniform", "eligible rows within groups", "grouped"),
    ],
)
def test_candidates_of_the_rows_of_a_group_appear_as_often_as_claimed(sources, batches, frequency):
    """Unmasked candidates of all rows of a group, over real epochs, against kappa: chi-square within the group."""
    run = build(Cell(sources, frequency, batches))
    seen, claimed = np.zeros((4, N)), np.zeros((4, N))
    times, steps = ruled().timestamps, 0
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        for batch in run.batches:
            request = DrawRequest(
                batch.items, batch.queries, batch.group, generator,
                epoch=batch.epoch, groups=batch.groups, times=batch.times,
            )  # fmt: skip
            every = torch.arange(N)
            per_row = any(member.varies_by_row for member in run.objective.pool.members())
            shape = every.expand(len(batch), N) if per_row else every
            kappa = run.objective.pool.log_expected_count(shape, request).exp().expand(len(batch), N)
            drawn = run.objective.pool.draw(request)
            fits = ~run.train.eligibility.rows(batch.groups, batch.times).blocked(slice(0, len(batch)))
            fits[torch.arange(len(batch)), batch.items] = False
            counts = torch.zeros(len(batch), N).index_add_(1, drawn.items, (~drawn.mask).float())
            if drawn.row_items is not None:
                counts.scatter_add_(1, drawn.row_items.clamp(min=0), (~drawn.row_mask & (drawn.row_items >= 0)).float())
            assert float(counts[~fits].sum()) == 0.0, "an ineligible candidate or the positive"
            np.add.at(seen, batch.groups.numpy(), counts.double().numpy())
            np.add.at(claimed, batch.groups.numpy(), (kappa * fits).numpy())
            steps += len(batch)
    assert np.asarray(times).min() >= 0
    for group in (0, 1):
        kept = claimed[group] > 20
        assert kept.sum() > 8
        if "per row" in sources:  # independent draws
            assert follows(seen[group][kept], claimed[group][kept])
            assert not follows(seen[group][kept], claimed[group][kept] * (1 + 0.1 * (np.arange(kept.sum()) % 2)))
        # A candidate shared by a batch counts in about B rows at once.
        error = np.abs(seen[group] - claimed[group])[kept] / np.sqrt(claimed[group][kept] * B)
        assert error.max() < 4.5, error
        assert abs(seen[group].sum() / claimed[group].sum() - 1) < 0.01


def rows_of_masks(seed=0):
    rng = torch.Generator().manual_seed(seed)
    items = torch.randint(0, ITEMS, (30,), generator=rng)
    positives = torch.randint(0, ITEMS, (40,), generator=rng)
    groups = torch.randint(0, 2, (40,), generator=rng)
    rows = RULE.rows(groups.numpy(), None)
    return items, positives, groups, rows


def test_masks_agree_as_matrix_tiles_and_parts():
    items, positives, groups, rows = rows_of_masks()
    mask = NegativeMask([(torch.arange(40), positives)], rows=40, items=items, size=30, eligible=rows.select(items))
    slow = (items[None] == positives[:, None]) | ~torch.from_numpy(MEMBER)[groups][:, items]
    assert torch.equal(mask.dense(), slow)
    assert torch.equal(torch.cat(list(copy.copy(mask).tiles([0, 7, 7, 40]))), slow)
    weight = torch.rand(30)
    torch.testing.assert_close(mask.count(weight), (slow * weight).sum(1))
    places = torch.tensor([4, 9, 2])
    assert torch.equal(mask.select(places).dense(), slow[:, places])
    assert torch.equal(mask.head(5).dense(), slow[:5])
    assert torch.equal(mask.to("cpu").dense(), slow)
    own = mask.without(positives, items).dense()
    assert torch.equal(own, ~torch.from_numpy(MEMBER)[groups][:, items])


@pytest.mark.parametrize("repeated", [False, True])
def test_the_tiled_loss_under_a_rule_is_the_plain_loss(repeated):
    items, positives, _, rows = rows_of_masks(3)
    rng = torch.Generator().manual_seed(1)
    vectors = torch.randn(ITEMS, 6, generator=rng, dtype=torch.float64)
    query = torch.randn(4, 6, generator=rng, dtype=torch.float64).repeat(10, 1)
    mask = NegativeMask([(torch.arange(40), positives)], rows=40, items=items, size=30, eligible=rows.select(items))
    log_count = torch.rand(30, generator=rng, dtype=torch.float64)
    found = []
    for tiled in (False, True):
        q, p, c = (one.clone().requires_grad_() for one in (query, vectors[positives], vectors[items]))
        if tiled:
            loss = tiled_softmax(q, p, c, log_count, mask=mask, repeated_queries=repeated)
        else:
            loss = sampled_softmax(q, p, c, log_count, mask=mask.dense()).mean()
        found.append([loss, *torch.autograd.grad(loss, (q, p, c))])
    for plain, tiled in zip(*found, strict=True):
        assert float(plain.detach().abs().sum()) > 0
        torch.testing.assert_close(tiled, plain)


def test_a_pool_asks_for_what_its_rule_needs():
    pool = Pool(InBatch(CountedFrequency(COUNTS)), Sampled(Uniform(ITEMS), 4), eligibility=RULE)
    with pytest.raises(InputError, match=r"request.groups: the pool has a rule"):
        pool.draw(torch.tensor([0, 1]))
    drawn = pool.draw(torch.tensor([0, 1]), groups=torch.tensor([0, 1]))
    assert drawn.mask[:, drawn.items > 6][0].all()
    with pytest.raises(InputError, match="draws within a group need the group of the batch"):
        Pool(SampledWithinGroup(Uniform(ITEMS), RULE, 4)).draw(torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["refined-logq", "gbce"])
def test_objectives_of_the_whole_catalog_are_rejected(name):
    config = Config.load(None, [f"objective.name={name}"])
    with pytest.raises(InputError, match=f"objective.name: {name}: .* under data.eligibility; use expected-count"):
        build_objective(config, ruled())

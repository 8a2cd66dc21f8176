"""Rankings of eligible items: the model and every baseline, against a slow search; rankers that ignore the rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from support.markets import allowed as is_allowed
from support.markets import item_table, markets
from twotower.data import by_time, leave_last_out
from twotower.errors import InputError
from twotower.evaluation import evaluate
from twotower.evaluation.baselines import _recoded, fit_baselines
from twotower.evaluation.per_query import Targets
from twotower.index import ExactIndex
from twotower.index.catalog import ExactCatalog
from twotower.ranking import EASE, ItemKNN, Popularity
from twotower.ranking.distributed import slice_holdout


@pytest.fixture(scope="module")
def split():
    return by_time(markets(), 0.1, 0.2)


def pairs_allowed(split, holdout, ranked):
    """Say which ranked items were eligible for their query; True for -1."""
    names, rows = split.data.group_names.ids, np.repeat(np.arange(len(holdout)), ranked.shape[1])
    flat = np.asarray(ranked).ravel()
    groups = [names[int(g)] for g in holdout.query_groups[rows]]
    ids = split.data.items.decode(np.maximum(flat, 0)).to_numpy()
    return is_allowed(item_table(), ids, groups, (holdout.query_times // 1_000_000)[rows]) | (flat < 0)


class Scored:
    """A ranker by a slow search over random scores; `rule` says whether it keeps to what is eligible."""

    def __init__(self, rule=True):
        self.rule = rule

    def rank(self, holdout, k, exclude_seen):
        scores = np.random.default_rng(3).random((holdout.queries.max() + 1, 60))[holdout.queries]
        for row in range(len(holdout)):
            if exclude_seen:
                scores[row, holdout.history_items[holdout.history_offsets[row] : holdout.history_offsets[row + 1]]] = -1
            if self.rule:
                group, time = holdout.query_groups[row], holdout.query_times[row]
                scores[row, ~holdout.eligibility.mask(int(group), int(time))] = -1
        order = np.argsort(-scores, 1)[:, :k]
        return np.where(np.take_along_axis(scores, order, 1) < 0, -1, order)


@pytest.mark.parametrize("make", [Popularity, ItemKNN, EASE])
def test_baselines_rank_only_what_is_eligible(split, make):
    ranked = make(split.train).rank(split.test, 20, True)
    assert pairs_allowed(split, split.test, ranked).all()
    free = make(split.train).rank(replace(split.test, eligibility=None), 20, True)
    assert not pairs_allowed(split, split.test, free).all(), "the rule is what leaves items out"
    # The eligible items are in the order of the free ranking.
    free = make(split.train).rank(replace(split.test, eligibility=None), 60, True).numpy()
    fits = pairs_allowed(split, split.test, free).reshape(free.shape)
    for row, found in enumerate(ranked.numpy()):
        wanted = free[row][fits[row] & (free[row] >= 0)][:20]
        assert found[: len(wanted)].tolist() == wanted.tolist() and (found[len(wanted) :] == -1).all()


def test_every_exact_search_finds_the_best_eligible_items(split):
    rng = torch.Generator().manual_seed(0)
    items, queries = torch.randn(60, 8, generator=rng), torch.randn(len(split.test), 8, generator=rng)
    eligible = split.test.eligible
    scores = (queries @ items.T).masked_fill(eligible.blocked(slice(0, len(queries))), -torch.inf)
    best = scores.topk(12, 1)
    wanted = torch.where(best.values.isfinite(), best.indices, -1)
    found = ExactIndex(items).search(queries, 12, eligible=eligible)[1]
    assert torch.equal(found, wanted)
    assert torch.equal(ExactIndex(items).search(queries, 12, eligible=eligible, row_block=7, column_tile=11)[1], wanted)
    assert torch.equal(ExactCatalog(items).search(queries, 12, eligible=eligible)[1], wanted)
    for kept in (58, 20):  # a few are left out of every row, or an index of the rest is made
        some = np.arange(60) < kept
        scores[:, kept:] = -torch.inf
        best = scores.topk(12, 1)
        found = ExactCatalog(items).search(queries, 12, allowed=some, eligible=eligible)[1]
        assert torch.equal(found, torch.where(best.values.isfinite(), best.indices, -1))
    part = slice_holdout(split.test, slice(30, 50))
    assert torch.equal(ExactIndex(items).search(queries[30:50], 12, eligible=part.eligible)[1], wanted[30:50])


def test_a_ranker_that_ignores_the_rule_is_rejected(split):
    measured = evaluate(Scored(), split.test, train=split.train, ks=(10,), validation=split.validation)
    assert any("only eligible items are ranked" in note for note in measured.notes)
    with pytest.raises(
        InputError, match=r"not eligible for its query \(data.eligibility\); rank only the items that holdout"
    ):
        evaluate(Scored(rule=False), split.test, train=split.train, ks=(10,), baselines=False)


def test_targets_that_cannot_be_ranked_are_removed_and_counted(split):
    test = split.test
    moved = replace(test, query_groups=3 - test.query_groups)  # DE is 1 and FR is 2
    targets = Targets.of(moved, 60, True)
    assert targets.not_eligible > 0
    owner = np.repeat(np.arange(len(test)), np.diff(targets.offsets))
    for row, item in zip(owner, targets.items, strict=True):
        assert test.eligibility.mask(int(moved.query_groups[row]), int(moved.query_times[row]))[item]
    with pytest.raises(InputError, match="needs the group of each row"):
        Targets.of(replace(test, query_groups=None), 60, True)


def test_settings_of_baselines_are_chosen_under_the_rule(split):
    fitted = fit_baselines(split.train, split.validation, k=10)
    assert set(fitted.rankers) == {"popularity", "newest", "item-kNN", "EASE"}
    codes = np.full(60, -1)
    codes[[3, 8, 45]] = [0, 1, 2]
    some = _recoded(split.validation, codes)
    every = split.validation.eligible.blocked(slice(0, len(split.validation)))
    assert torch.equal(some.eligible.blocked(slice(0, len(some))), every[:, [3, 8, 45]])


def test_leave_last_out_asks_at_the_time_of_the_target():
    split = leave_last_out(markets())
    assert split.account.count("test: targets not eligible") == 0
    assert len(Targets.of(split.test, 60, False).items) == len(split.test.target_items)

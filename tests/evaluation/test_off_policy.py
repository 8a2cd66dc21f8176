"""Off-policy estimates against plain loops, Open Bandit Pipeline, and a simulator whose true rewards are known."""

import warnings

import numpy as np
import pytest
from scipy import stats

from twotower.data import Holdout
from twotower.data.splits.exposure import Examination, ExposureLog
from twotower.errors import InputError
from twotower.evaluation import bootstrap_interval, off_policy_estimate
from twotower.evaluation.off_policy import ESTIMATORS, OffPolicyTable, estimate_top_k
from twotower.evaluation.significance import Interval, bootstrap_ratio

CONTEXTS, ITEMS = 40, 12


class World:
    """Contexts with known rewards, a logging policy, an evaluated policy and a wrong reward model, all [C, N]."""

    def __init__(self, seed, *, deterministic, k=3):
        rng = np.random.default_rng(seed)
        taste = rng.normal(size=(CONTEXTS, ITEMS))
        self.reward = 1 / (1 + np.exp(2 - taste))
        logging = np.exp(0.5 * taste + rng.normal(size=taste.shape))
        self.logging = 0.8 * logging / logging.sum(1, keepdims=True) + 0.2 / ITEMS
        scores = taste + rng.normal(size=taste.shape)
        self.ranked = np.argsort(-scores, axis=1)
        if deterministic:
            self.policy = np.zeros_like(taste)
            np.put_along_axis(self.policy, self.ranked[:, :k], 1 / k, axis=1)
        else:
            self.policy = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        self.model = np.clip(self.reward + rng.normal(0, 0.1, taste.shape), 0, 1)
        self.share = rng.dirichlet(np.full(CONTEXTS, 2.0))
        self.truth = float((self.share[:, None] * self.policy * self.reward).sum())

    def log(self, seed, queries):
        """Draw the rows of some queries: (query, context, item, reward); a query has 1 to about 9 rows."""
        rng = np.random.default_rng(seed)
        query = np.repeat(np.arange(queries), 1 + rng.poisson(3, queries))
        context = rng.choice(CONTEXTS, queries, p=self.share)[query]
        item = (rng.random(len(query))[:, None] > np.cumsum(self.logging[context], axis=1)[:, :-1]).sum(1)
        return query, context, item, (rng.random(len(query)) < self.reward[context, item]).astype(float)


@pytest.mark.parametrize("deterministic", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["top 3", "softmax"])
@pytest.mark.slow
def test_intervals_cover_the_true_reward_in_95_percent_of_200_runs(deterministic):
    """200 runs are binomial: with a coverage of 95 %, the count is from 179 to 198 with a probability of 99.9 %."""
    world = World(0, deterministic=deterministic)
    low, high = stats.binom.interval(0.999, 200, 0.95)
    assert (low, high) == (179, 198)
    covered = dict.fromkeys((*ESTIMATORS, "no weights"), 0)
    for run in range(200):
        query, context, item, reward = world.log(1000 + run, 400)
        pi, p = world.policy[context, item], world.logging[context, item]
        found = off_policy_estimate(
            reward,
            pi,
            p,
            queries=query,
            predicted=world.model[context, item],
            expected=(world.policy * world.model).sum(1)[context],
            resamples=1000,
            seed=run,
        )
        plain = bootstrap_ratio(
            np.bincount(query, weights=pi * reward), np.bincount(query, weights=pi), resamples=1000, seed=run
        )
        for name, interval in {**found.intervals, "no weights": plain}.items():
            covered[name] += interval.low <= world.truth <= interval.high
    for name in ESTIMATORS:
        assert low <= covered[name] <= high, covered
    assert covered["no weights"] < low, "rows that the log shows too often have to be biased here, or nothing is tested"


def test_a_doubly_robust_estimate_has_a_shorter_interval_than_one_without_a_model():
    world = World(1, deterministic=True)
    query, context, item, reward = world.log(7, 1000)
    found = off_policy_estimate(
        reward, world.policy[context, item], world.logging[context, item], queries=query,
        predicted=world.reward[context, item], expected=(world.policy * world.reward).sum(1)[context],
    )  # fmt: skip
    width = {name: interval.high - interval.low for name, interval in found.intervals.items()}
    assert width["DR"] < 0.9 * width["IPS"]


def loop(reward, pi, p, query, t, predicted, expected, clip):
    """Compute the three estimates and the effective sample size one row at a time."""
    rows, numerator, item_weights, corrected, weights = 0, 0.0, 0.0, 0.0, []
    for r, a, b, look, m, e in zip(reward, pi, p, t, predicted, expected, strict=True):
        v = min(a / b, clip)
        weights.append(v * look)
        rows, numerator, item_weights = rows + 1, numerator + v * look * r, item_weights + v
        corrected += e + v * look * (r - m)
    del query
    size = sum(weights) ** 2 / sum(w * w for w in weights)
    return numerator / rows, numerator / item_weights, corrected / rows, size


def test_estimates_equal_loops_over_the_rows():
    rng = np.random.default_rng(3)
    n = 60
    reward, pi, p = rng.normal(size=n), rng.random(n) * (rng.random(n) < 0.7), rng.uniform(0.05, 1, n)
    query, t, m, e = rng.integers(0, 9, n), rng.uniform(0.2, 2, n), rng.normal(size=n), rng.normal(size=n)
    for clip in (None, 1.5):
        found = off_policy_estimate(reward, pi, p, queries=query, attention=t, predicted=m, expected=e, clip=clip)
        *values, size = loop(reward, pi, p, query, t, m, e, clip or np.inf)
        assert [found.intervals[name].mean for name in ESTIMATORS] == pytest.approx(values, rel=1e-12)
        assert found.effective_size == pytest.approx(size) and found.rows == n
        assert found.clipped == (0 if clip is None else int((pi / p > clip).sum())) and (clip is None or found.clipped)


def test_estimates_equal_those_of_open_bandit_pipeline():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        obp = pytest.importorskip("obp.ope")
    world = World(4, deterministic=False)
    _, context, item, reward = world.log(5, 300)
    p, policy, model = world.logging[context, item], world.policy[context][:, :, None], world.model[context][:, :, None]
    given = {"reward": reward, "action": item, "pscore": p, "action_dist": policy}
    theirs = {
        "IPS": obp.InverseProbabilityWeighting().estimate_policy_value(**given),
        "SNIPS": obp.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**given),
        "DR": obp.DoublyRobust().estimate_policy_value(**given, estimated_rewards_by_reg_model=model),
    }
    rows = np.arange(len(item))
    ours = off_policy_estimate(
        reward, policy[rows, item, 0], p, predicted=model[rows, item, 0], expected=(policy * model).sum((1, 2))
    )
    for name, value in theirs.items():
        assert ours.intervals[name].mean == pytest.approx(value, rel=1e-12), name


def test_a_ratio_with_equal_denominators_has_the_interval_of_the_mean():
    values = np.random.default_rng(0).exponential(size=80)
    ratio, mean = bootstrap_ratio(2 * values, np.full(80, 2.0)), bootstrap_interval(values)
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((mean.mean, mean.low, mean.high), rel=1e-9)


def test_a_ratio_interval_is_that_of_a_plain_bootstrap_of_the_queries():
    rng = np.random.default_rng(2)
    b = 1.0 + rng.poisson(3, 400)
    a = b * rng.normal(1, 0.3, 400) + rng.normal(size=400)
    found = bootstrap_ratio(a, b, resamples=4000)
    draws = rng.integers(0, 400, (4000, 400))
    plain = np.quantile(a[draws].sum(1) / b[draws].sum(1), [0.025, 0.975])
    assert found.mean == pytest.approx(a.sum() / b.sum())
    assert [found.low, found.high] == pytest.approx(plain, abs=0.004)
    assert np.isnan(bootstrap_ratio([0.0], [0.0]).mean) and np.isnan(bootstrap_ratio([1.0], [2.0]).low)
    with pytest.raises(InputError, match="of the same queries, got 1 and 2"):
        bootstrap_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"propensities": [0.5, 0.0]}, r"propensities: values such as 0 in 1 of 2 rows; expected values in \(0, 1\]"),
        ({"propensities": [0.5, 1.5]}, "propensities: values such as 1.5 in 1 of 2 rows"),
        ({"propensities": [0.5, np.nan]}, "propensities: expected one finite number"),
        ({"policy": [0.0, 0.0]}, "effective sample size 0: the policy would have shown none of the 2 logged rows"),
        ({"policy": [0.5, 1.5]}, r"expected a policy in \[0, 1\]"),
        ({"policy": [0.5]}, "2 rewards, but 1 value of policy"),
        ({"predicted": [0.1, 0.2]}, "expected both predicted and expected for DR"),
        ({"clip": 0.0}, "clip: 0.0; expected a number above 0"),
        ({"queries": [1]}, "2 rewards, but 1 query"),
    ],
)
def test_wrong_logs_are_rejected_in_one_line(change, message):
    given = {"rewards": [1.0, 0.0], "policy": [0.5, 0.0], "propensities": [0.5, 0.5], **change}
    with pytest.raises(InputError, match=message) as error:
        off_policy_estimate(given.pop("rewards"), given.pop("policy"), given.pop("propensities"), **given)
    assert "\n" not in str(error.value)


def position_log(world, seed, curve, queries=400):
    """Draw a log in which a row has a random position, and a reward only if the user looks at it."""
    query, context, item, relevant = world.log(seed, queries)
    rng = np.random.default_rng(seed + 10_000)
    positions = rng.integers(1, 6, len(query))
    looked = rng.random(len(query)) < curve.at(positions)
    contexts = context[np.unique(query, return_index=True)[1]]
    offsets = np.searchsorted(query, np.arange(queries + 1))
    asked = Holdout("log", np.arange(queries), np.zeros(queries + 1, dtype=np.int64), np.zeros(0, dtype=np.int32),
                    offsets, item.astype(np.int32))  # fmt: skip
    log = ExposureLog(asked, relevant * looked, world.logging[context, item], curve.at(positions), curve,
                      world.model.mean(0), None, "")  # fmt: skip
    return log, world.ranked[contexts]


@pytest.mark.parametrize("curve", [Examination((1.0, 0.7, 0.5, 0.3, 0.2)), Examination(0.8), Examination()])
def test_the_reward_of_the_first_k_with_positions_is_unbiased(curve):
    world, k = World(2, deterministic=True), 3
    looks = curve.at(np.arange(1, k + 1))
    truth = float((world.share[:, None] * np.take_along_axis(world.reward, world.ranked[:, :k], 1) * looks).sum() / k)
    found = {name: [] for name in ESTIMATORS}
    for seed in range(60):
        log, ranked = position_log(world, seed, curve)
        estimate = estimate_top_k(ranked, log, k)
        for name in ESTIMATORS:
            found[name].append(estimate.intervals[name].mean)
    for name, values in found.items():
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / np.sqrt(len(values)), name
    if curve.curve is not None:  # without the positions the reward would be too small
        log, ranked = position_log(world, 0, curve)
        blind = ExposureLog(**{**log.__dict__, "examination": np.ones_like(log.examination), "curve": Examination()})
        assert estimate_top_k(ranked, blind, k).intervals["IPS"].high < truth


def test_a_ranker_without_overlap_has_no_estimate_and_a_note():
    log, ranked = position_log(World(2, deterministic=True), 0, Examination())
    nothing = np.full_like(ranked, -1)
    assert estimate_top_k(nothing, log, 3) is None
    table = OffPolicyTable(Interval(0.1, 0.0, 0.2, 0.95), {"a": {3: None}, "b": {3: estimate_top_k(ranked, log, 3)}},
                           2.0, "")  # fmt: skip
    assert ["a", "none", "-", "-", "0"] in table.cells(3)
    assert any(note.startswith("a: effective sample size 0") for note in table.notes())
    assert any("weights above 2 were cut" in note for note in table.notes())
    assert table.to_dict()["rows"]["a"]["3"] is None


def test_positions_outside_the_list_are_rejected():
    assert Examination((1.0, 0.5)).at(np.array([2, 1])).tolist() == [0.5, 1.0]
    with pytest.raises(InputError, match="position 3; expected positions from 1 to 2"):
        Examination((1.0, 0.5)).at(np.array([1, 3]))
    with pytest.raises(InputError, match="position 0; expected positions from 1"):
        Examination(1.0).at(np.array([0]))

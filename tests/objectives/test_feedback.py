"""Feedback in an objective: value and gradient of its target in plain loops, w = 0, and what a dislike does."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from scipy.optimize import brentq

import reference
from twotower.config.run import Config, EligibilityConfig
from twotower.data import Interactions, KnownPositives, PassedOver
from twotower.data.eligibility import Eligibility
from twotower.errors import InputError
from twotower.losses import slate_logistic, slate_pairwise
from twotower.negatives import Catalog, Pool
from twotower.objectives import Embedded, Feedback, SampledSoftmax
from twotower.objectives.build import OBJECTIVES, build_objective

N, D, B, T = 11, 4, 5, 0.7
WEIGHT = 2.5
#: Row 1 lists an item twice, row 2 its own positive, row 3 nothing, row 4 a known positive.
POSITIVES = [0, 3, 5, 7, 9]
SHOWN = [[-1, 4, 6], [2, 2, 8], [5, 1, -1], [-1, -1, -1], [10, 0, -1]]
KNOWN = ([0, 4, 4], [8, 10, 9])
WEIGHTS = [0.5, 1.0, 0.0, 2.0, 0.25]
#: The weight of each item shown; item 2 of row 1 has two, item 6 of row 0 none.
OF_SHOWN = [[1.0, 0.5, 0.0], [2.0, 3.0, 0.25], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [4.0, 1.5, 1.0]]


@pytest.fixture
def batch():
    """Random float64 embeddings that need gradients: queries [B, D] and items [N, D]."""
    rng = torch.Generator().manual_seed(4)
    query = torch.randn(B, D, generator=rng, dtype=torch.float64).requires_grad_()
    items = torch.randn(N, D, generator=rng, dtype=torch.float64).requires_grad_()
    return query, items


#: Two groups: row 0 must not see item 6 of its slate, row 1 not item 8, row 4 not item 10.
MEMBER = np.ones((2, N), dtype=bool)
MEMBER[0, [6, 10]], MEMBER[1, [1, 8]] = False, False
GROUPS = [0, 1, 0, 1, 0]
RULE = Eligibility(None, MEMBER, None, None, EligibilityConfig(item_groups="markets"))


def objective_of(form, *, pool=None, weight=WEIGHT):
    objective = SampledSoftmax(pool or Pool(Catalog(N)))
    objective.feedback = Feedback(weight, form, bias=True)
    if objective.feedback.bias is not None:
        objective.feedback.bias.data.fill_(0.3)
    return objective


def drawn_by(objective, *, known, weighted=False, groups=None):
    masked = tuple(torch.tensor(part) for part in KNOWN) if known else None
    shown = PassedOver(torch.tensor(SHOWN), torch.tensor(OF_SHOWN) if weighted else None)
    return objective.draw(torch.tensor(POSITIVES), passed_over=shown, known_positives=masked, groups=groups)


def embedded(query, items, drawn):
    rows = items[drawn.row_items.clamp(min=0)]
    return Embedded(query, items[drawn.positives], items[drawn.items], rows)


def losses_by_loops(form, query, items, *, known, weighted, ruled=False):
    """Compute the target of docs/theory.md, "Feedback", one row and one item at a time."""
    losses = []
    for row, own in enumerate(POSITIVES):
        masked = {j for r, j in zip(*KNOWN, strict=True) if known and r == row} - {own}
        masked |= {j for j in range(N) if ruled and not MEMBER[GROUPS[row], j]}
        slate = {}
        for j, v in zip(SHOWN[row], OF_SHOWN[row] if weighted else [1.0] * len(SHOWN[row]), strict=True):
            if j >= 0 and j != own and j not in masked and v > 0:
                slate[j] = max(slate.get(j, 0.0), v)
        score = [reference.dot(query[row], item) / T for item in items]
        omega = [1.0 + WEIGHT * slate.get(j, 0.0) if form == "softmax" else 1.0 for j in range(N)]
        total = sum(omega[j] * math.exp(score[j]) for j in range(N) if j not in masked)
        loss = -score[own] + math.log(total)
        if form == "logistic" and slate:
            terms = [math.log1p(math.exp(-(score[own] + 0.3)))]
            terms += [v * math.log1p(math.exp(score[j] + 0.3)) for j, v in slate.items()]
            loss += WEIGHT * sum(terms) / len(terms)
        if form == "pairwise" and slate:
            terms = [v * math.log1p(math.exp(score[j] - score[own])) for j, v in slate.items()]
            loss += WEIGHT * sum(terms) / len(terms)
        losses.append(loss)
    return losses


@pytest.mark.parametrize(("known", "weighted"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("form", ["softmax", "logistic", "pairwise"])
def test_value_and_gradient_are_those_of_the_target_over_the_whole_catalog(batch, form, known, weighted):
    query, items = batch
    objective = objective_of(form)
    drawn = drawn_by(objective, known=known, weighted=weighted)
    wanted = losses_by_loops(form, query.tolist(), items.tolist(), known=known, weighted=weighted)
    # Log counts are float32.
    each = objective(embedded(query, items, drawn), drawn, temperature=T)
    assert each.tolist() == pytest.approx(wanted, rel=1e-6)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    mean = objective.mean(embedded(query, items, drawn), drawn, temperature=T)
    assert mean.item() == pytest.approx(sum(wanted) / B, rel=1e-6)
    summed = objective.mean(embedded(query, items, drawn), drawn, temperature=T, weights=weights)
    assert summed.item() == pytest.approx(sum(w * one for w, one in zip(WEIGHTS, wanted, strict=True)), rel=1e-6)

    flat = torch.cat([query, items]).detach().reshape(-1).tolist()

    def function(values):
        rows = np.array(values).reshape(B + N, D)
        found = losses_by_loops(form, rows[:B].tolist(), rows[B:].tolist(), known=known, weighted=weighted)
        return sum(w * one for w, one in zip(WEIGHTS, found, strict=True))

    slow = reference.finite_difference(function, flat, 1e-5)
    assert max(map(abs, slow)) > 0.1
    for loss in (summed, (each * weights).sum()):
        gradient = torch.autograd.grad(loss, [query, items], retain_graph=True)
        assert torch.cat(gradient).reshape(-1).tolist() == pytest.approx(slow, abs=2e-7)


@pytest.mark.parametrize("form", ["softmax", "logistic", "pairwise"])
def test_an_item_that_is_not_eligible_for_its_row_is_not_in_its_slate(batch, form):
    query, items = batch
    objective = objective_of(form, pool=Pool(Catalog(N), eligibility=RULE))
    drawn = drawn_by(objective, known=True, weighted=True, groups=torch.tensor(GROUPS))
    found = objective(embedded(query, items, drawn), drawn, temperature=T)
    as_lists = query.detach().tolist(), items.detach().tolist()
    expected = losses_by_loops(form, *as_lists, known=True, weighted=True, ruled=True)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6)
    # The test can fail: without the rule, three rows are different.
    without = losses_by_loops(form, *as_lists, known=True, weighted=True)
    assert (np.abs(np.array(without) - expected) > 1e-3).sum() >= 3


def test_the_bias_and_the_temperature_of_the_logistic_form_have_gradients(batch):
    query, items = (tensor.detach() for tensor in batch)
    objective = objective_of("logistic")
    drawn, found = drawn_by(objective, known=False), []
    for temperature in (T - 1e-5, T, T + 1e-5):
        at = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        loss = objective.mean(embedded(query, items, drawn), drawn, temperature=at)
        found.append((loss.item(), float(torch.autograd.grad(loss, at)[0])))
    assert found[1][1] == pytest.approx((found[2][0] - found[0][0]) / 2e-5, rel=1e-5)
    objective.mean(embedded(query, items, drawn), drawn, temperature=T).backward()
    assert abs(float(objective.feedback.bias.grad)) > 0.01


def test_a_slate_without_negatives_has_no_loss():
    nothing = torch.full((2, 3), -torch.inf)
    for loss in (slate_logistic, slate_pairwise):
        positive = torch.tensor([0.5, -3.0], requires_grad=True)
        found = loss(positive, nothing, torch.zeros(2, 3))
        assert found.tolist() == [0.0, 0.0]
        found.sum().backward()
        assert positive.grad.tolist() == [0.0, 0.0]


def test_an_objective_with_feedback_rejects_a_batch_without():
    with pytest.raises(InputError, match="the batch has no feedback"):
        objective_of("softmax").draw(torch.tensor(POSITIVES))


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    rows = pl.DataFrame({"user_id": rng.integers(0, 9, 200), "item_id": rng.integers(0, N, 200)})
    return Interactions.from_frame(rows.unique(maintain_order=True))


def config(**objective):
    return Config.model_validate({"objective": objective})


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("form", ["softmax", "logistic"])
def test_every_objective_learns_from_feedback_or_says_what_to_use(name, form, train):
    sources = [{"catalog": {}}] if name == "logistic-observed" else None
    settings = config(name=name, sources=sources, feedback={"weight": 1.0, "form": form})
    exact = ("expected-count", "full-softmax", "sampled-softmax-uniform")
    softmax = (*exact, "in-batch", "in-batch-logq", "in-batch-logq-batch-probability", "in-batch-importance",
               "uniform-importance", "mixed", "mixed-by-source", "mixed-by-source-batch-probability")  # fmt: skip
    if name in (exact if form == "softmax" else softmax):
        assert build_objective(settings, train).feedback.form == form
        return
    with pytest.raises(InputError, match="use form logistic or pairwise|use a softmax objective") as error:
        build_objective(settings, train)
    assert "\n" not in str(error.value)


def test_a_partly_corrected_softmax_is_rejected(train):
    with pytest.raises(InputError, match=r"objective.strength=0.5 does not estimate the full softmax"):
        build_objective(config(strength=0.5, feedback={"weight": 1.0}), train)
    assert build_objective(config(strength=0.5, feedback={"weight": 1.0, "form": "pairwise"}), train).feedback


def test_weight_0_builds_the_objective_of_today(train):
    assert build_objective(config(feedback={"weight": 0.0}), train).feedback is None


def test_a_dislike_lowers_one_item_for_the_queries_that_gave_it_by_the_amount_of_the_target_and_nothing_else():
    """Free scores, [Q, N], at the optimum of the loss on all rows.

    All queries have the same positives, item j with frequency p_j; queries 0 to 2 have passed over item 1, except in
    the rows where it is the positive. With R = 1 - p_1 and exp s_j = p_j for j != 1, the gradient is 0 if a = exp s_1
    solves R / (R + (1 + w) a) + p_1 / (R + a) = 1: a = p_1 if w = 0, and less if w > 0.
    """
    times = torch.tensor([6.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    items, queries, weight = len(times), 6, 4.0
    row = torch.arange(queries).repeat_interleave(int(times.sum()))
    positives = torch.arange(items).repeat_interleave(times.long()).repeat(queries)
    shown = torch.where(row < 3, 1, -1)[:, None]

    def optimum(weight):
        table = torch.zeros(queries, items, dtype=torch.float64, requires_grad=True)
        objective = SampledSoftmax(Pool(Catalog(items)))
        objective.feedback = Feedback(weight, "softmax") if weight else None
        drawn = objective.draw(positives, passed_over=PassedOver(shown))
        close = {"tolerance_grad": 1e-12, "tolerance_change": 1e-15}
        optimizer = torch.optim.LBFGS([table], max_iter=500, line_search_fn="strong_wolfe", **close)
        eye = torch.eye(items, dtype=torch.float64)
        rows = None if drawn.row_items is None else eye[drawn.row_items.clamp(min=0)]

        def closure():
            optimizer.zero_grad()
            vectors = Embedded(table[row], eye[positives], eye[drawn.items], rows)
            loss = objective.mean(vectors, drawn, temperature=1.0)
            loss.backward()
            return loss

        optimizer.step(closure)
        found = table.detach()
        return found - found[:, :1]  # the loss leaves a constant open

    p = (times / times.sum()).tolist()
    rest = 1.0 - p[1]
    a = brentq(lambda a: rest / (rest + (1.0 + weight) * a) + p[1] / (rest + a) - 1.0, 1e-9, 1.0)
    without = torch.log(times / times[0]).expand(queries, items)
    assert torch.allclose(optimum(0.0), without, atol=1e-5)
    wanted = torch.zeros(queries, items, dtype=torch.float64)
    wanted[:3, 1] = math.log(a / p[1])
    assert torch.allclose(optimum(weight) - without, wanted, atol=1e-5)
    assert math.log(a / p[1]) < -0.5


def test_known_positives_of_the_training_data_are_not_passed_over(train):
    settings = config(sources=[{"uniform": {"size": 4}}], feedback={"weight": 1.0})
    objective, known = build_objective(settings, train), KnownPositives(train)
    queries, positives = torch.tensor([0, 1]), torch.tensor([0, 1])
    drawn = objective.draw(
        positives,
        known_positives=known.pairs(queries),
        passed_over=PassedOver(torch.arange(N).expand(2, N)),
        generator=torch.Generator().manual_seed(0),
    )
    for row in range(2):
        start, end = train.offsets[row], train.offsets[row + 1]
        left = set(range(N)) - set(train.item_codes[start:end].tolist()) - {row}
        assert set(drawn.row_items[row][~drawn.row_mask[row]].tolist()) == left

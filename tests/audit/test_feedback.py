"""The audit of objectives with feedback: the target has weights, and masks are those of the rows that are looked at."""

import itertools
import math

import numpy as np
import polars as pl
import pytest
import torch

from twotower.audit import AuditedRows, measure
from twotower.audit.gradients import estimates_softmax
from twotower.audit.masks import audit_masks
from twotower.config.run import Config
from twotower.data import Interactions, KnownPositives, PassedOver
from twotower.negatives import Catalog, Pool, Sampled, Uniform
from twotower.objectives import Feedback, SampledSoftmax
from twotower.objectives.build import build_objective
from twotower.run import make_batches

LOGITS = [0.3, -0.4, 1.1, 0.2]


@pytest.fixture(scope="module")
def train():
    """Rows of 100 queries, and two observed negatives of each from before them."""
    rng = np.random.default_rng(0)
    rows = pl.DataFrame({"user_id": rng.integers(0, 100, 2000), "item_id": rng.integers(0, 50, 2000)})
    rows = rows.unique(maintain_order=True).with_row_index("timestamp").with_columns(rating=pl.lit(1))
    below = {"user_id": np.repeat(np.arange(100), 2), "item_id": rng.integers(0, 50, 200), "rating": 0}
    shown = pl.DataFrame(below).with_columns(timestamp=pl.lit(0)).select(rows.columns).cast(dict(rows.schema))
    return Interactions.from_frame(pl.concat([rows, shown]), positive_label=1)


def batches_of(train, form):
    settings = [
        "training.batch_size=600",
        "training.question=next",
        "query_tower.history=null",
        "objective.sources=[{in_batch: {}}]",
        f"objective.feedback={{weight: 3, form: {form}}}",
    ]
    config = Config.load(None, settings).resolved(len(train))
    return build_objective(config, train), make_batches(config, train)


def test_the_target_counts_the_slate_one_plus_w_times(train):
    """By hand: positive 1, which is not in the slate, and item 2 twice, with a smaller and a larger weight."""
    weight = 3.0
    rows = AuditedRows(
        torch.tensor([LOGITS], dtype=torch.float64),
        torch.tensor([1]),
        passed_over=PassedOver(torch.tensor([[2, 2, 1, -1]]), torch.tensor([[0.5, 1.0, 2.0, 1.0]])),
        feedback=weight,
    )
    each = [math.exp(x) * (1.0 + weight * (j == 2)) for j, x in enumerate(LOGITS)]
    wanted = torch.tensor([[one / sum(each) - (j == 1) for j, one in enumerate(each)]], dtype=torch.float64)
    torch.testing.assert_close(rows.exact_gradient(), wanted)
    objective = SampledSoftmax(Pool(Catalog(4)))
    objective.feedback = Feedback(weight, "softmax")
    batches = itertools.repeat(next(iter(batches_of(train, "softmax")[1])))
    found = measure(objective, rows, batches, draws=2)
    assert float(found.bias.max()) < 1e-6 and abs(float(found.partition.mean()) - 1.0) < 1e-6
    objective.feedback.weight = 1.0
    assert float(measure(objective, rows, batches, draws=2).bias.max()) > 0.1, "the measurement finds a wrong weight"


@pytest.mark.slow
def test_a_sampled_pool_with_feedback_has_no_bias_in_the_partition(train):
    rows = AuditedRows(
        torch.tensor([LOGITS], dtype=torch.float64),
        torch.tensor([1]),
        passed_over=PassedOver(torch.tensor([[2, 0]])),
        feedback=3.0,
    )
    objective = SampledSoftmax(Pool(Sampled(Uniform(4), 6), unique=True))
    objective.feedback = Feedback(3.0, "softmax")
    batches = itertools.repeat(next(iter(batches_of(train, "softmax")[1])))
    found = measure(objective, rows, batches, draws=4000, generator=torch.Generator().manual_seed(1))
    value, error = found.mean_partition()
    assert abs(value - 1.0) < 3 * error and 0 < error < 0.01


def test_a_loss_on_slates_has_no_bias_to_measure():
    objective = SampledSoftmax(Pool(Catalog(4)))
    for form, measured in (("softmax", True), ("logistic", False), ("pairwise", False)):
        objective.feedback = Feedback(1.0, form)
        assert estimates_softmax(objective) is measured


@pytest.mark.parametrize("form", ["softmax", "logistic"])
def test_masks_are_checked_for_the_rows_that_are_looked_at(train, form):
    """A batch has more rows than the audit looks at, so that it begins somewhere in the batch."""
    objective, batches = batches_of(train, form)
    found = audit_masks(objective, iter(batches), 2, train=train, known_positives=KnownPositives(train))
    assert found.is_right and found.expected > 100, found.verdict

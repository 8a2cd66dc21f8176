"""In-batch candidates of rows with event types: expected counts by type, against the batches of real epochs.

Batches are random rows of all types, B_t of type t. The counts are kappa_j = sum_t E[B_t] p_j^t over the other rows,
for a row of any type; a claim from the frequency within the row's own type is wrong.
"""

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.events import with_events
from twotower.features.from_config import encode_features, with_features
from twotower.objectives.build import build_objective
from twotower.run import make_batches

ITEMS, ROWS, B, EPOCHS = 12, 960, 32, 120
TYPES = ("buy", "view")


def events():
    """Make rows of two types, a quarter of them purchases, whose popular items differ."""
    rng = np.random.default_rng(0)
    kind = (rng.random(ROWS) < 0.25).astype(int)  # 1: buy
    share = 1.0 / np.arange(1, ITEMS + 1)
    shares = np.stack([share / share.sum(), share[::-1] / share.sum()])
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(0, 120, ROWS),
            "item_id": [int(rng.choice(ITEMS, p=shares[one])) for one in kind],
            "timestamp": np.arange(ROWS),
            "event": np.array(["view", "buy"])[kind],
        }
    )
    return with_events(Interactions.from_frame(frame, context=["event"]), "event", {"view": 1.0, "buy": 5.0})


@pytest.fixture(scope="module")
def drawn():
    """Return the data and, by type, (positive, counts of other items, claimed counts) of one row of each batch."""
    data = events()
    config = Config.load(None, [
        "data.events={column: event, weights: {view: 1, buy: 5}}", f"training.batch_size={B}", "training.question=next",
        "query_tower.history=null", "query_tower.id_embedding=true", "objective.sources=[{in_batch: {}}]",
        "objective.mask_known_positives=false", "objective.unique=false",
    ])  # fmt: skip
    config = with_features(config.resolved(len(data)), data)
    batches = make_batches(config, data, context=encode_features(config, data)["context"])
    pool = build_objective(config, data).pool
    types = data.context["event"].to_numpy()
    found, rng = {name: [] for name in TYPES}, np.random.default_rng(1)
    for _ in range(EPOCHS):
        for batch in batches:
            assert (batch.weights == torch.where(torch.from_numpy(types[batch.rows] == "buy"), 5.0, 1.0)).all()
            candidates = pool.draw(batch.items, epoch=batch.epoch)
            counts = torch.zeros(ITEMS, dtype=torch.float64)
            counts[candidates.items] = torch.exp(candidates.log_expected_count.double())
            at = int(rng.integers(B))  # any row: the first one of a type would prefer batches with few of this type
            live = candidates.items[~candidates.mask[at]]
            seen = int(batch.items[at]), torch.bincount(live, minlength=ITEMS).numpy(), counts
            found[types[batch.rows[at]]].append(seen)
    return data, types, found


def claims(data, types, name, way):
    """Return the expected count of every item among the other rows, [N]: of all types, or of the row's own type."""
    if way == "sum over types":
        total = np.zeros(ITEMS)
        for one in TYPES:
            rows = data.item_codes[types == one]
            total += (B - 1) * len(rows) / (ROWS - 1) * np.bincount(rows, minlength=ITEMS) / len(rows)
        return total
    rows = data.item_codes[types == name]
    return (B - 1) * np.bincount(rows, minlength=ITEMS) / len(rows)


def p_value(found, claim):
    """Test counts of the candidates other than the positive against a claim, by chi-square over items."""
    observed, expected = np.zeros(ITEMS), np.zeros(ITEMS)
    for positive, counts, _ in found:
        others = np.arange(ITEMS) != positive
        observed += counts * others
        expected += claim * others
    return float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), ITEMS))


@pytest.mark.parametrize("name", TYPES)
def test_candidates_of_rows_of_a_type_have_the_counts_summed_over_types(drawn, name):
    data, types, found = drawn
    assert p_value(found[name], claims(data, types, name, "sum over types")) > 0.01
    assert p_value(found[name], claims(data, types, name, "own type")) < 1e-9


def test_the_objective_claims_the_counts_summed_over_types(drawn):
    data, types, found = drawn
    wanted = claims(data, types, "buy", "sum over types")
    for name in TYPES:
        for _, _, claimed in found[name][:50]:
            present = claimed.numpy() > 0
            assert present.any()
            assert claimed.numpy()[present] == pytest.approx(wanted[present], rel=1e-5)

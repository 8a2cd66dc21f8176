"""A model with streaming frequency continues on new data: the weight of new items, by their occurrences."""

import math
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import twotower as tt
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.negatives import StreamingFrequency
from twotower.training import module
from twotower.training.diagnostics import frequency_drift

OLD_ROWS, NEW_ROWS, NEW_ITEMS, SHARE, RATE = 20_000, 2_500, 20, 0.04, 0.05
#: Occurrences in the table of docs/incremental.md.
SHOWN = (1, 2, 4, 5, 8, 16, 32, 50)
SETTINGS = [
    "query_tower={history: null, id_embedding: true, hidden: [], dropout: 0}",
    "item_tower.dimension=4",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 4}}]",
    "objective.frequency=streaming",
    "training.batch_size=64",
    "training.max_epochs=1",
    "training.replay=0",
    "training.question=next",
    "training.recent_prior=false",
    "training.accelerator=cpu",
    "training.logger=none",
]


class FirstGapFades:
    """The estimate of earlier versions: the first gap counts from row 0, and fades by 1 - rate at each occurrence."""

    def __init__(self, clock):
        self.clock, self.gap, self.last = clock, {}, {}

    def observe(self, items):
        self.clock += len(items)
        for item in set(items):
            times = items.count(item)
            new, old = (self.clock - self.last.get(item, 0)) / times, self.gap.get(item)
            self.gap[item] = new if old is None else old + (1 - (1 - RATE) ** times) * (new - old)
            self.last[item] = self.clock


def frame(first, last, rows, start, seed, share=None):
    rng = np.random.default_rng(seed)
    p = None
    if share is not None:
        p = np.r_[np.full(first, (1 - share * (last - first)) / first), np.full(last - first, share)]
    items = rng.choice(last, rows, p=p)
    return pl.DataFrame({"user_id": rng.integers(0, 200, rows), "item_id": items, "timestamp": start + np.arange(rows)})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Continue a model three times; return the mean weight of new items by occurrence, (earlier versions', this one's).

    The weight of an occurrence is p_j over the estimate of p_j with which the step weighs its in-batch candidates.
    """
    folder = tmp_path_factory.mktemp("parent")
    old = Interactions.from_frame(frame(0, 30, OLD_ROWS, 1_600_000_000, 0))
    model = tt.fit(tt.splits.leave_last_out(old), Config.load(None, SETTINGS), directory=folder, progress=False)
    model.save(folder / "model")
    totals = np.zeros((2, max(SHOWN) + 10))
    number = np.zeros(max(SHOWN) + 10)
    drifts = []
    for seed in range(3):
        new = Interactions.from_frame(frame(30, 30 + NEW_ITEMS, NEW_ROWS, 1_700_000_000, seed + 1, SHARE))
        settings = Config.load(None, [*SETTINGS, f"training.seed={seed}"])
        split = tt.continue_with(folder, new, settings)
        learnt = split.train.select(np.flatnonzero(~split.learnt))
        p = learnt.item_counts() / len(learnt)
        ids = split.train.items.ids.to_list()
        fresh = {code for code, item in enumerate(ids) if item >= 30}
        slow, seen, observe = [], {}, StreamingFrequency.observe

        def follow(self, items, group=None, *, slow=slow, seen=seen, observe=observe, p=p, fresh=fresh):
            slow = slow or slow.append(FirstGapFades(float(self.clock))) or slow
            observe(self, items, group)
            codes = items.tolist()
            slow[0].observe(codes)
            estimate = self.log_prob(items).exp().tolist()
            for code, found in zip(codes, estimate, strict=True):
                if code in fresh:
                    place = seen[code] = seen.get(code, 0) + 1
                    if place <= len(number):
                        number[place - 1] += 1
                        totals[:, place - 1] += p[code] * slow[0].gap[code], p[code] / found

        def reported(*inputs, drifts=drifts):
            drifts.append(frequency_drift(*inputs))
            return drifts[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StreamingFrequency, "observe", follow)
            patch.setattr(module, "frequency_drift", reported)
            tt.fit(split, settings, warm_start=folder, progress=False)
        assert slow[0].clock - len(learnt) > 0.9 * OLD_ROWS, "the clock of the old model continues"
    assert number.min() >= 40, "all new items are seen that often"
    assert len(drifts) == 3
    assert max(drifts) < 0.2, "the drift is from the counts of the rows that are learnt"
    return totals / number


@pytest.mark.slow
def test_a_new_item_is_right_after_a_few_occurrences(weights):
    before, after = weights
    assert after[4:].tolist() == pytest.approx([1.0] * len(after[4:]), abs=0.2)
    assert after[49:].tolist() == pytest.approx([1.0] * len(after[49:]), abs=0.06)
    assert before[3] > 50, "earlier versions: the rows of the old model count as the first gap"
    assert before[31] > 5


@pytest.mark.slow
def test_the_page_shows_these_weights(weights):
    page = (Path(__file__).parents[2] / "docs" / "incremental.md").read_text(encoding="utf-8")
    shown = {}
    for line in page.splitlines():
        if match := re.match(r"\| (occurrence|earlier versions|now) \|(.*)\|$", line):
            shown[match[1]] = [float(cell) for cell in match[2].split("|")]
    assert shown["occurrence"] == list(SHOWN)
    for name, found in zip(("earlier versions", "now"), weights, strict=True):
        for occurrence, value in zip(SHOWN, shown[name], strict=True):
            assert math.log(found[occurrence - 1] / value) == pytest.approx(0.0, abs=0.15), (name, occurrence)

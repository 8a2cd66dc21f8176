"""Every combination of source, frequency, batches, masks and duplicates is exact, approximate or rejected.

`support/combinations.py` has the list; every cell that is not rejected is drawn by the batches and steps of training.
"""

import math
import re

import pytest
import torch

from support import combinations, conformance
from support.combinations import LIST
from support.conformance import Cell, Measured, build, measure
from twotower.errors import InputError
from twotower.negatives import Candidates, CrossBatchMemory, InBatch, Pool, Sampled, SampledWithinGroup
from twotower.negatives.masks import NegativeMask

#: Epochs of the cells that every test run measures, and of all cells (`slow`); few questions share a batch.
FEW, MANY, MANY_QUESTIONS = 10, 12, 20
#: The gradient's bias is of the order of the spread of Z_hat, 1/n; measured on all cells it is at most this multiple.
OF_SPREAD = 1.5

RUN = [(cell, one) for one in LIST if one.rejected is None for cell in one.cells()]
REJECTED = [(cell, one.rejected) for one in LIST if one.rejected is not None for cell in one.cells()]
GATE = [
    Cell("catalog"),
    Cell("in-batch", known=True, duplicates="unique"),
    Cell("head + in-batch + uniform", duplicates="unique"),
    Cell("in-batch + memory + uniform", "grouped", "rows within groups", duplicates="unique"),
    Cell("in-batch + uniform", batches="whole sequences", known=True, duplicates="unique"),
    Cell("in-batch + uniform", "streaming", known=True, duplicates="unique"),
    Cell("in-batch + uniform", batches="eligible rows on 2 ranks", known=True, duplicates="unique"),
    Cell("uniform per row", batches="eligible rows", known=True),
    Cell("head + frequency^0.75", "grouped", "eligible rows within groups", known=True),
    Cell("in-batch + uniform", batches="eligible horizon questions", known=True),
    Cell("in-batch + uniform", batches="rows of two events", known=True, duplicates="unique"),
]


def name(cell):
    masks = "known positives" if cell.known else "own positive"
    return f"{cell.sources}-{cell.frequency}-{cell.batches}-{masks}-{cell.duplicates}"


def measured(cell, epochs, change=None):
    return measure(cell, epochs, skip=1, ranks=2 if "2 ranks" in cell.batches else 1, change=change)


def faults(found: Measured, off: float) -> list[str]:
    """Return what is wrong with a cell whose partition sum may be off by `off` on average."""
    error, chance = found.partition_off()
    bias, noise = found.gradient_off()
    of_item, of_weight = found.worst_item()
    wrong = []
    if abs(error) > chance + off:
        wrong.append(f"Z is {error:+.2%} off, by chance {chance:.2%}")
    if off == 0.0 and of_item > 1.0:
        wrong.append(f"an item's weight is {of_weight:+.1%} off, {of_item:.1f} times what chance allows")
    if bias > math.hypot(OF_SPREAD * found.spread + off, 2 * noise) + 1e-6:
        wrong.append(f"the gradient is {bias:.2%} off, its noise {noise:.2%}, the spread of Z {found.spread:.2%}")
    return wrong


def verdict(cell):
    return next(one for other, one in RUN if other == cell)


@pytest.mark.parametrize("cell", GATE, ids=name)
def test_a_cell_is_as_the_list_says(cell):
    assert faults(measured(cell, FEW), verdict(cell).off) == []


def test_the_name_of_the_sources_does_not_matter(monkeypatch):
    monkeypatch.setitem(conformance.SOURCES, "one", [{"uniform": {"size": 20}}])
    monkeypatch.setitem(conformance.SOURCES, "uniform catalog", [{"in_batch": {}}])
    assert faults(measured(Cell("one"), 4), 0.0) == []
    assert faults(measured(Cell("uniform catalog", known=True), 4), 0.0) == []


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "one"), RUN, ids=[name(cell) for cell, _ in RUN])
def test_every_cell_is_as_the_list_says(cell, one):
    found = measured(cell, MANY_QUESTIONS if "questions" in cell.batches else MANY)
    assert faults(found, one.off) == []
    assert found.positive > 0.1, "where P(y|x) is near zero, a wrong count cancels in the gradient"


@pytest.mark.parametrize(("cell", "message"), REJECTED, ids=[name(cell) for cell, _ in REJECTED])
def test_a_rejected_cell_says_why_in_one_line(cell, message):
    with pytest.raises(InputError, match=message) as error:
        build(cell)
    assert "\n" not in str(error.value)


def one_more(objective, monkeypatch):
    """B for B - 1."""
    plain = InBatch.epoch_draws
    monkeypatch.setattr(InBatch, "epoch_draws", lambda self, request: plain(self, request) + 1)


def doubled(objective, monkeypatch):
    """2 kappa for every random candidate."""
    plain = Pool.log_expected_count
    monkeypatch.setattr(Pool, "log_expected_count", lambda *inputs: plain(*inputs) + 0.6931)


def copies_not_summed(objective, monkeypatch):
    """The copies of an item are merged, but weigh as one."""
    plain = Candidates.collapse

    def collapse(drawn, *, sum_weights=True):
        found = plain(drawn, sum_weights=sum_weights)
        log_count = found.log_expected_count + found.multiplicity.clamp(min=1).log()
        return Candidates(**{**vars(found), "log_expected_count": log_count})

    monkeypatch.setattr(Candidates, "collapse", collapse)


def counted_as_kept(objective, monkeypatch):
    """Duplicates are removed, but weighed by the expected count of draws with duplicates."""

    def counts(pool, items, request):
        sources = [source.log_expected_count(items, request) for source in pool.random_sources()]
        return torch.logsumexp(torch.stack(sources), 0)

    monkeypatch.setattr(Pool, "log_expected_count", counts)


def positive_not_masked(objective, monkeypatch):
    """Hits of the row's own positive stay among its candidates."""
    plain = NegativeMask.__init__

    def masked(mask, pairs, **options):
        (row, item), *others = pairs
        plain(mask, [(row[:0], item[:0]), *others], **options)

    monkeypatch.setattr(NegativeMask, "__init__", masked)


def forgotten_memory(objective, monkeypatch):
    """The memory is not counted."""
    plain = CrossBatchMemory.log_absence
    monkeypatch.setattr(CrossBatchMemory, "log_absence", lambda *inputs: plain(*inputs) * 0.0)


def one_draw_less(objective, monkeypatch):
    """n - 1 for n draws."""
    plain = Sampled.draws
    monkeypatch.setattr(Sampled, "draws", lambda self, request: plain(self, request) - 1)


def forgotten_rule(objective, monkeypatch):
    """Candidates that are not eligible are not masked."""
    monkeypatch.setattr(objective.pool, "eligible", None)


def whole_catalog(objective, monkeypatch):
    """Draws within a group are weighed as draws from the whole catalog."""
    plain = SampledWithinGroup.log_prob
    monkeypatch.setattr(
        SampledWithinGroup, "log_prob", lambda self, *inputs: plain(self, *inputs) + self.log_total.min()
    )


PLANTED = [
    (forgotten_rule, Cell("in-batch + uniform", batches="eligible rows", known=True)),
    (forgotten_rule, Cell("in-batch", "grouped", "eligible rows within groups", known=True)),
    (whole_catalog, Cell("uniform per row", batches="eligible rows", known=True)),
    (whole_catalog, Cell("uniform", "grouped", "eligible rows within groups", known=True)),
    (one_more, Cell("in-batch", known=True)),
    (one_more, Cell("in-batch + uniform", batches="whole sequences", known=True)),
    (doubled, Cell("in-batch", known=True)),
    (doubled, Cell("uniform", known=True)),
    (copies_not_summed, Cell("in-batch", known=True)),
    (counted_as_kept, Cell("in-batch", known=True, duplicates="unique")),
    (positive_not_masked, Cell("in-batch")),
    (forgotten_memory, Cell("in-batch + memory", known=True, duplicates="unique")),
    (one_draw_less, Cell("uniform per row")),
]


@pytest.mark.parametrize(("fault", "cell"), PLANTED, ids=[f"{f.__name__}-{name(c)}" for f, c in PLANTED])
def test_a_planted_fault_is_found(fault, cell, monkeypatch):
    assert cell in [other for other, _ in RUN], "a cell of the list"
    wrong = []
    try:
        found = measured(cell, FEW, change=lambda objective: fault(objective, monkeypatch))
        wrong = faults(found, 0.0)
    except AssertionError as error:
        wrong = [str(error)]
    assert wrong


def test_the_gradient_alone_finds_a_doubled_count(monkeypatch):
    cell = Cell("in-batch", known=True)
    found = measured(cell, 2 * FEW, change=lambda objective: doubled(objective, monkeypatch))
    assert any("gradient" in one for one in faults(found, 0.0))


def test_the_page_has_this_list():
    page = combinations.PAGE.read_text(encoding="utf-8")
    assert combinations.written(page) == page, "run: PYTHONPATH=src:tests python -m support.combinations"


def test_every_verdict_is_in_the_list_once():
    cells = [cell for cell, _ in RUN + REJECTED]
    assert len(set(cells)) == len(cells)
    assert all(re.match(r"\w", name(cell)) for cell in cells)

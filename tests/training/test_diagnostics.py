"""Tests of the diagnostics against plain loops, and of the warnings."""

import logging
import math

import polars as pl
import pytest
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.negatives import (
    CountedFrequency,
    CrossBatchMemory,
    GroupedFrequency,
    HardNegatives,
    InBatch,
    Pool,
    Sampled,
    StreamingFrequency,
    Uniform,
)
from twotower.objectives import Embedded, SampledSoftmax
from twotower.training import diagnostics
from twotower.training.diagnostics import DiagnosticsMonitor, diagnose, frequency_drift, source_state

COUNTS = torch.tensor([9, 7, 5, 4, 3, 2, 1, 1])
THIRDS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2], dtype=torch.int8)


def batch():
    rng = torch.Generator().manual_seed(0)
    pool = Pool(InBatch(CountedFrequency(COUNTS)), Sampled(Uniform(8), 5), unique=True)
    positives = torch.tensor([0, 1, 4])
    drawn = pool.draw(positives, generator=rng)
    table, query = (torch.randn(size, 3, generator=rng, dtype=torch.float64) for size in (8, 3))
    return Embedded(query, table[positives], table[drawn.items]), drawn


def test_every_number_equals_a_loop():
    embedded, drawn = batch()
    found = diagnose(embedded, drawn, 0.5, THIRDS)
    rows = []
    for row in range(3):
        score = float(embedded.query[row] @ embedded.positive[row]) / 0.5
        weights = {
            int(item): math.exp(float(embedded.query[row] @ embedded.candidates[place]) / 0.5)
            / math.exp(float(drawn.log_expected_count[place]))
            for place, item in enumerate(drawn.items)
            if not drawn.mask[row, place]
        }
        rows.append((math.exp(score), weights))
    totals = [sum(weights.values()) for _, weights in rows]
    assert found["effective_candidates"] == pytest.approx(
        sum(t**2 / sum(w**2 for w in ws.values()) for t, (_, ws) in zip(totals, rows, strict=True)) / 3
    )
    assert found["largest_weight"] == pytest.approx(
        sum(max(ws.values()) / t for t, (_, ws) in zip(totals, rows, strict=True)) / 3
    )
    assert found["uncertainty"] == pytest.approx(sum(t / (t + e) for t, (e, _) in zip(totals, rows, strict=True)) / 3)
    assert found["masked_share"] == pytest.approx(1 - sum(len(ws) for _, ws in rows) / drawn.mask.numel())
    gradient = [0.0, 0.0, 0.0]
    for total, (own, weights) in zip(totals, rows, strict=True):
        for item, weight in weights.items():
            gradient[int(THIRDS[item])] += weight / (total + own)
    for name, share in zip(("head", "mid", "tail"), gradient, strict=True):
        assert found[f"gradient_{name}"] == pytest.approx(share / sum(gradient))


def test_only_the_first_rows_of_a_large_batch_are_examined(monkeypatch):
    embedded, drawn = batch()
    first = Embedded(embedded.query[:2], embedded.positive[:2], embedded.candidates)
    expected = diagnose(first, drawn.head(2), 0.5, THIRDS)
    assert diagnose(embedded, drawn, 0.5, THIRDS) != pytest.approx(expected)
    monkeypatch.setattr(diagnostics, "ROWS", 2)
    assert diagnose(embedded, drawn, 0.5, THIRDS) == pytest.approx(expected)


def test_fully_masked_rows_give_no_numbers():
    embedded, drawn = batch()
    drawn.mask.fill_(True)
    assert diagnose(embedded, drawn, 1.0, THIRDS) == {}


def test_drift_is_the_distance_of_an_estimate_and_none_for_counts():
    counted = SampledSoftmax(Pool(InBatch(CountedFrequency(COUNTS))))
    assert frequency_drift(counted, COUNTS) is None
    stream = StreamingFrequency(8)
    stream.observe(torch.zeros(10, dtype=torch.int64))
    estimated = SampledSoftmax(Pool(InBatch(stream)))
    # All mass on item 0, which has 9 of 32.
    assert frequency_drift(estimated, COUNTS) == pytest.approx(1 - 9 / 32)


def test_drift_of_groups_is_weighted_by_their_rows():
    streams = [StreamingFrequency(8), StreamingFrequency(8)]
    objective = SampledSoftmax(Pool(InBatch(GroupedFrequency(streams))))
    table = torch.stack([3 * COUNTS, COUNTS.flip(0)])
    for group, item in ((0, 0), (1, 7)):
        streams[group].observe(torch.full((10,), item))
    assert frequency_drift(objective, table) == pytest.approx(1 - 9 / 32)
    streams[1].observe(torch.zeros(10_000, dtype=torch.int64))
    last = float(COUNTS[-1]) / 32  # item 0 of the second group, on which all of its estimate lies now
    moved = frequency_drift(objective, table)
    assert moved == pytest.approx(0.75 * (1 - 9 / 32) + 0.25 * (1 - last), abs=0.01)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"effective_candidates": 1.5}, "1.5 effective candidates"),
        ({"masked_share": 0.8}, "80% of the candidates are masked"),
        ({"frequency_drift": 0.6}, "0.60 (total variation)"),
    ],
)
def test_a_diagnostic_out_of_range_warns_once(caplog, numbers, words):
    watch = DiagnosticsMonitor()
    with caplog.at_level(logging.WARNING, logger="twotower"):
        watch.look({"effective_candidates": 50.0, "masked_share": 0.01, "frequency_drift": 0.01})
        assert not caplog.records
        watch.look(numbers)
        watch.look(numbers)
    assert len(caplog.records) == 1 and words in caplog.text


def test_mined_negatives_are_counted_and_a_margin_that_leaves_none_is_warned_of(caplog):
    source = HardNegatives(2, 1, ranks=(1, 3), margin=0.5, pairs=torch.tensor([0, 1, 12]), num_items=10)
    objective = SampledSoftmax(Pool(source, Sampled(Uniform(10), 2)))
    assert source_state(objective) == {}
    ranked, scores = torch.tensor([[4, 5, 6], [7, 8, -1]]), torch.tensor([[3.0, 2.0, 1.0], [2.0, 1.0, -torch.inf]])
    source.refresh(torch.arange(2), ranked, scores, torch.tensor([2.6, 0.0, 1.2]))
    numbers = source_state(objective)
    assert numbers == {"mined_eligible": pytest.approx(2 / 3), "mined_none": pytest.approx(2 / 3)}
    DiagnosticsMonitor().look(numbers)
    assert "67% of the rows have no mined negatives" in caplog.text


def test_training_logs_them(planted_split, tmp_path):
    settings = Config.load(
        None,
        [
            "training.max_epochs=2", "training.batch_size=16", "training.accelerator=cpu", "item_tower.dimension=8",
            "objective.frequency=streaming", "objective.sources=[{in_batch: {}}, {memory: {size: 40}}]",
        ],
    )  # fmt: skip
    tt.fit(planted_split, settings, directory=tmp_path, progress=False)
    logged = pl.read_csv(tmp_path / "logs" / "metrics.csv")
    for name in ("effective_candidates", "masked_share", "uncertainty", "largest_weight", "gradient_tail",
                 "frequency_drift", "memory_age"):  # fmt: skip
        assert logged[name].drop_nulls().len() > 0, name
    assert 0 < logged["memory_age"].drop_nulls()[-1] < 5, "40 remembered items are the last two or three batches of 16"
    assert CrossBatchMemory(CountedFrequency(COUNTS), 4).age == 0.0

"""Tests of the audit on models of every kind of batch: faults are found with the right cause, and nothing else is."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from planted import planted
from twotower.audit import audit
from twotower.config.run import Config
from twotower.data import KnownPositives
from twotower.data.loading import batches, questions, sequences
from twotower.errors import InputError
from twotower.negatives import CrossBatchMemory, InBatch, Sampled, StreamingFrequency
from twotower.run import audit_run, run_folder, train_run
from twotower.serving.model_folder import find_model
from twotower.training.checkpoint.lazy import open_checkpoint

SETTINGS = [
    "training.max_epochs=1",
    "training.batch_size=64",
    "training.accelerator=cpu",
    "training.logger=none",
    "training.recent_prior=false",
    "item_tower.dimension=8",
    "evaluation.baselines=false",
    "objective.mask_known_positives=true",
    "data.columns.group=market",
    "training.question=next",
]
#: What is particular to a kind. Unless it says otherwise, candidates are in-batch, with duplicates.
KINDS = {
    "rows": ["objective.sources=[{in_batch: {}}, {uniform: {size: 40}}]"],
    "unique rows": ["objective.sources=[{in_batch: {}}, {uniform: {size: 40}}]", "objective.unique=true"],
    "sequences": ["query_tower={hidden: [], history: {length: 5, sequence: {kind: gru, blocks: 1}}}"],
    "rows per draw": ["objective.rows_per_draw=16"],
    "grouped with memory": ["objective.frequency=grouped", "objective.sources=[{in_batch: {}}, {memory: {size: 96}}]"],
    "horizon": ["training.question=horizon", "training.horizon=100"],
    "set": ["training.question=set"],
    "continued sequences": [
        "query_tower={hidden: [], history: {length: 5, sequence: {kind: gru, blocks: 1}}}",
        "training.replay=0.5",
    ],
    "continued": ["objective.frequency={streaming: {rate: 0.02}}", "training.replay=0.5"],
}
EXACT = [kind for kind in KINDS if kind != "continued"]


def interactions():
    """Make 400 queries in two markets that share no item; queries of one market follow each other."""
    frame = planted(queries=400, rows=12)
    number = pl.col("user_id").str.slice(1).cast(pl.Int64)
    return frame.with_columns(market=number % 2, user_id=pl.format("{}-{}", number % 2, pl.col("user_id")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function from a kind to its run folder, which is trained when first needed."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}
    data = interactions()
    limit = data["timestamp"].quantile(0.7)
    data.write_csv(folder / "all.csv")
    data.filter(pl.col("timestamp") <= limit).write_csv(folder / "before.csv")
    data.filter(pl.col("timestamp") > limit).write_csv(folder / "after.csv")

    def train(name, source, settings, **options):
        out = folder / name
        config = Config.load(None, [*SETTINGS, *settings]) if isinstance(settings, list) else settings
        train_run(folder / source, out, config, progress=False, on_message=lambda _: None, **options)
        return out

    def of(kind):
        if kind not in made:
            plain = ["objective.unique=false", "objective.sources=[{in_batch: {}}]"]
            settings = [*plain, *KINDS[kind]]
            if kind.startswith("continued"):
                parent = train(f"parent of {kind}", "before.csv", settings)
                made[kind] = train(kind, "after.csv", settings, warm_start=parent)
            else:
                made[kind] = train(kind, "all.csv", settings)
        return made[kind]

    return of


def audited(folder, *, count=150, rows=4, draws=4, seed=0):
    return audit(audit_run(folder, rows=rows, seed=seed), draws=draws, batches=count, seed=seed)


def verdicts(found):
    return {one.source: one.verdict for one in found.appearances}


@pytest.mark.parametrize("kind", KINDS)
def test_no_alarm_without_a_fault(folders, kind):
    found = audited(folders(kind), rows=16, draws=12)
    assert all(one.as_claimed for one in found.appearances), verdicts(found)
    assert found.masks.is_right and found.masks.expected > 0, found.masks
    overall = found.objectives[0].overall
    assert abs(overall["partition"] - 1) < max(4 * overall["partition_error"], 0.01), overall
    assert "counts or its masks are wrong" not in found.conclusion()[0]
    assert "every source draws its items as often as it claims" in found.conclusion()
    assert (found.questions is not None) == (kind in ("horizon", "set"))


def one_more(method):
    """Plant B in place of B - 1: one more row, sequence or question."""
    return lambda *args: method(*args) + 1


@pytest.mark.parametrize("kind", EXACT)
def test_b_in_place_of_b_minus_1_is_a_wrong_count(folders, kind, monkeypatch):
    folder = folders(kind)
    for name in ("draws", "epoch_draws"):
        monkeypatch.setattr(InBatch, name, one_more(getattr(InBatch, name)))
    found = {one.source: one for one in audited(folder).appearances}
    wrong = found["in-batch"]
    if kind == "unique rows":
        # 2 % more draws are less than 1 % more distinct items: too few batches to notice, and the audit says so.
        assert wrong.as_claimed and "an error in the count above" in wrong.verdict
        claimed = sum(wrong.claimed)
        monkeypatch.undo()
        true = sum(next(one for one in audited(folder).appearances if one.source == "in-batch").claimed)
        assert 0 < claimed / true - 1 < wrong.missed
        return
    assert not wrong.as_claimed and wrong.verdict.startswith("wrong count"), wrong
    assert wrong.ratio < 1 and "not random" not in wrong.verdict
    assert abs(1 - wrong.ratio) > wrong.missed / 2


def test_uniform_draws_with_q_doubled_are_a_wrong_count(folders, monkeypatch):
    folder = folders("rows")
    monkeypatch.setattr(Sampled, "draws", lambda member, request: 2 * member.size)
    found = audited(folder)
    assert verdicts(found)["in-batch"].startswith("as claimed")
    assert verdicts(found)["uniform, 40 draws"] == "wrong count: 0.5 appearances for each one claimed"
    assert any("uniform, 40 draws: wrong count" in line for line in found.conclusion())


class ByMarket:
    """An order of an epoch that is random in each half only: first the queries of one market, then the others."""

    def __init__(self, size, seed, epoch):
        rng = np.random.default_rng([size, seed, epoch])
        self.order = np.concatenate([rng.permutation(size // 2), size // 2 + rng.permutation(size - size // 2)])

    def __call__(self, places):
        return self.order[places]


@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind != "grouped with memory"])
def test_batches_by_market_are_no_random_draws(folders, kind, monkeypatch):
    folder = folders(kind)
    for module in (batches, sequences, questions):
        monkeypatch.setattr(module, "Shuffle", ByMarket)
    found = audited(folder)
    assert "batches are not random draws" in verdicts(found)["in-batch"], verdicts(found)
    assert "wrong count" not in verdicts(found)["in-batch"]
    assert any("their own frequencies" in line for line in found.conclusion())


@pytest.mark.parametrize("kind", KINDS)
def test_positives_that_are_not_masked_are_a_wrong_mask(folders, kind, monkeypatch):
    folder = folders(kind)
    pairs = KnownPositives.pairs

    def half(known, queries):
        row, item = pairs(known, queries)
        return row[item % 4 < 2], item[item % 4 < 2]

    monkeypatch.setattr(KnownPositives, "pairs", half)
    found = audited(folder)
    assert all(one.as_claimed for one in found.appearances), verdicts(found)
    assert found.masks.missing > 0 and found.masks.excess == 0
    assert "wrong mask" in found.masks.verdict and found.masks.verdict in found.conclusion()


def test_too_many_masked_candidates_are_a_wrong_mask(folders, monkeypatch):
    folder = folders("rows")
    pairs = KnownPositives.pairs

    def more(known, queries):
        row, item = pairs(known, queries)
        return torch.cat([row, torch.arange(len(queries))]), torch.cat([item, torch.zeros_like(queries)])

    monkeypatch.setattr(KnownPositives, "pairs", more)
    masks = audited(folder).masks
    assert masks.excess > 0 and masks.missing == 0 and "negatives are masked in their rows" in masks.verdict


def test_remembering_without_the_group_is_a_wrong_frequency(folders, monkeypatch):
    folder = folders("grouped with memory")
    remember = CrossBatchMemory.remember
    monkeypatch.setattr(
        CrossBatchMemory, "remember", lambda memory, items, group=None, **options: remember(memory, items, **options)
    )
    found = verdicts(audited(folder))
    assert "wrong frequencies" in found["memory of 96"] and found["in-batch"].startswith("as claimed")


def test_rows_that_were_not_trained_on_are_a_wrong_frequency(folders, monkeypatch):
    """Count the frequency of all rows, where the batches of a continued model have the new and the replayed ones."""
    folder = folders("continued")
    make = run_folder.make_objective
    monkeypatch.setattr(
        run_folder, "make_objective", lambda config, train, rows, batches: make(config, train, None, batches)
    )
    subject = audit_run(folder, rows=4)
    counted = subject.config.objective.model_copy(update={"frequency": "counted"})
    found = audit(replace(subject, config=subject.with_objective(counted)), draws=4, batches=400)
    assert "wrong" in verdicts(found)["in-batch"]
    monkeypatch.undo()
    subject = audit_run(folder, rows=4)
    found = audit(replace(subject, config=subject.with_objective(counted)), draws=4, batches=400)
    assert verdicts(found)["in-batch"].startswith("as claimed")


def test_a_continued_model_that_does_not_record_its_rows_is_rejected(folders, monkeypatch):
    folder = folders("continued")
    load = run_folder.load_rows
    monkeypatch.setattr(
        run_folder, "load_rows", lambda path: {name: rows for name, rows in load(path).items() if name != "trained"}
    )
    with pytest.raises(InputError, match="does not record which rows it was trained on"):
        audit_run(folder)


def test_a_streaming_frequency_continues_from_training(folders, monkeypatch):
    folder = folders("continued")
    subject = audit_run(folder, rows=4)
    (frequency,) = subject.objective(subject.config).pool.frequencies()
    saved = open_checkpoint(find_model(folder).parent / "checkpoints" / "best.ckpt")["state_dict"]
    assert float(frequency.clock) == float(saved["objective.pool.sources.0.frequency.clock"][...]) > 0
    torch.testing.assert_close(frequency.gap, saved["objective.pool.sources.0.frequency.gap"][...])
    log_prob = StreamingFrequency.log_prob
    monkeypatch.setattr(StreamingFrequency, "log_prob", lambda *args: log_prob(*args) + np.log(1.3))
    found = verdicts(audited(folder))
    assert found["in-batch"].startswith("wrong count: 0.7"), found

"""Tests of training on whole sequences: learning, resuming, averaged weights, and draws per block of rows."""

import copy
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.data import SequenceBatches
from twotower.errors import InputError
from twotower.objectives.build import build_objective
from twotower.run import make_batches
from twotower.serving.export import export_query_tower
from twotower.serving.model_folder import SavedModel
from twotower.towers import build_towers
from twotower.training import compute_loss
from twotower.training import module as model_module
from twotower.training.checkpoint.io import SafeCheckpointIO

SMALL = [
    "training.batch_size=128",
    "training.learning_rate=0.01",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "training.precision=32-true",
    "item_tower.dimension=16",
    "query_tower.history.length=10",
    "objective.sources=[{uniform: {size: 40}}]",
]


#: Redraws of the candidates of one batch.
REDRAWS = 100


def config(*changes, preset="sasrec-large"):
    return Config.load(preset, [*SMALL, *changes])


def parts(split, settings, seed=0):
    torch.manual_seed(seed)
    settings = settings.resolved(len(split.train))
    towers = build_towers(settings, num_queries=split.train.num_queries, num_items=split.train.num_items)
    batch = next(iter(make_batches(settings, split.train)))
    return towers, build_objective(settings, split.train), batch


def right_parity(model, split):
    best = model.rank(split.test, 10, True)
    parity = best % 2 == (split.test.queries % 2)[:, None]
    return parity[best >= 0].mean()


@pytest.mark.parametrize(
    "changes",
    [
        ("objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",),
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(
            ("query_tower.history.sequence.gated=true", "query_tower.history.sequence.recency=0"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("query_tower.history.sequence.kind=gru", "query_tower.history.share_table=false"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("objective.rows_per_draw=16", "item_tower.hidden=[16]", "query_tower.history.item_features=true"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_learns(planted_split, changes):
    settings = config("training.batch_size=40", "training.max_epochs=8", "query_tower.history.dropout=0", *changes)
    assert right_parity(tt.fit(planted_split, settings, progress=False), planted_split) > 0.8


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(planted_split, tmp_path):
    settings = config("training.max_epochs=4", "training.weight_average=0.9")
    whole = tt.fit(planted_split, settings, directory=tmp_path / "whole", progress=False)
    batches = len(SequenceBatches(planted_split.train, 128, history_length=10))
    with broken_off(batches * 2 + 1), pytest.raises(BrokenOffError):
        tt.fit(planted_split, settings, directory=tmp_path / "part", progress=False)
    resumed = tt.fit(planted_split, settings, directory=tmp_path / "part", resume=True, progress=False)
    for name, value in whole.artifact.towers.state_dict().items():
        assert torch.equal(value, resumed.artifact.towers.state_dict()[name]), name


class BrokenOffError(Exception):
    """Raised to end a training run in the middle."""


@contextmanager
def broken_off(steps):
    """Break training off in the middle of an epoch, so that only the last epoch's checkpoint exists."""
    count = itertools.count(1)

    def counted(*args, **kwargs):
        if next(count) > steps:
            raise BrokenOffError
        return compute_loss(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "compute_loss", counted)
        yield


def test_the_average_of_the_weights_is_saved(planted_split, tmp_path):
    """The average is recomputed from the weights after every step."""
    seen = []
    original = model_module.TrainingModule.on_train_batch_end

    def noted(self, *args):
        seen.append(copy.deepcopy(self.towers.state_dict()))
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module.TrainingModule, "on_train_batch_end", noted)
        settings = config("training.max_epochs=1", "training.weight_average=0.8")
        fitted = tt.fit(planted_split, settings, directory=tmp_path, progress=False)
    start = {name: value for name, value in SafeCheckpointIO().load_checkpoint(
        tmp_path / "checkpoints" / "last.ckpt")["state_dict"].items() if name.startswith("towers.")}  # fmt: skip
    name = "query_tower.encoder.norm.weight"
    assert torch.equal(start[f"towers.{name}"], seen[-1][name])
    expected = torch.ones_like(seen[0][name])  # the initial weight of a norm
    for step, state in enumerate(seen, 1):
        keep = min(0.8, step / (step + 9))
        expected = keep * expected + (1 - keep) * state[name]
    assert len(seen) > 5
    torch.testing.assert_close(fitted.artifact.towers.state_dict()[name], expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(expected, seen[-1][name], atol=1e-5)


def test_draws_per_block_equal_one_draw_with_the_whole_catalog(planted_split):
    """With the whole catalog as candidates the blocks change neither value nor gradients."""
    found = []
    for changes in ((), ("objective.rows_per_draw=7",)):
        settings = config("objective.sources=[{catalog: {}}]", *changes)
        towers, objective, batch = parts(planted_split, settings)
        towers.eval()
        loss, _, _ = compute_loss(towers, objective, batch)
        loss.backward()
        found.append((float(loss.detach()), [p.grad.clone() for p in towers.parameters() if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert len(found[0][1]) > 10
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-3)


@pytest.mark.slow
def test_more_draws_have_the_same_mean_and_less_noise(planted_split):
    """Compare the item table's gradient over redraws, with one draw for all rows or one for every 16."""

    def gradients(*changes):
        towers, objective, batch = parts(planted_split, config("objective.sources=[{uniform: {size: 60}}]", *changes))
        towers.eval()
        found = []
        for number in range(REDRAWS):
            loss, _, _ = compute_loss(towers, objective, batch, generator=torch.Generator().manual_seed(number))
            towers.zero_grad()
            loss.backward()
            found.append(towers.item_tower.ids.weight.grad.flatten().clone())
        return torch.stack(found)

    one, many = gradients(), gradients("objective.rows_per_draw=16")
    noise_one, noise_many = (float((g - g.mean(0)).pow(2).sum(1).mean()) for g in (one, many))
    assert noise_many < 0.5 * noise_one  # errors differ by row even with one draw, so the gain is less than 1/8
    standard_error = ((noise_one + noise_many) / REDRAWS) ** 0.5
    assert float((one.mean(0) - many.mean(0)).norm()) < 1.5 * standard_error


def test_the_model_is_saved_and_exported(planted_split, tmp_path):
    model = tt.fit(planted_split, config("training.max_epochs=1"), progress=False)
    folder = model.save(tmp_path / "model")
    loaded = tt.Retriever.load(folder)
    assert np.array_equal(loaded.rank(planted_split.test, 10, True), model.rank(planted_split.test, 10, True))
    known = loaded.recommend(["u000"], k=3)
    seen = loaded.history("u000")["item"].to_list()
    new = loaded.recommend(histories=[seen], k=3)
    assert known["item"].to_list() == new["item"].to_list()  # a query is represented by its history
    assert len(loaded.explain("u000", item=known["item"][0]).history) == 10
    report = export_query_tower(folder, tmp_path / "torch", "torch")
    assert report["inputs"] == {"history": "int64 [B, 10]"} and report["largest_difference"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "gru"])
def test_onnx(planted_split, tmp_path, kind):
    pytest.importorskip("onnxruntime", reason="ONNX is not installed: pip install 'twotower[onnx]'")
    import onnxruntime

    changes = ("training.max_epochs=1", f"query_tower.history.sequence.kind={kind}", "query_tower.history.length=4")
    folder = tt.fit(planted_split, config(*changes), progress=False).save(tmp_path / "model")
    export_query_tower(folder, tmp_path / "onnx", "onnx")
    history = np.array([[-1, -1, -1, -1], [-1, -1, 3, 9], [1, 2, 3, 4], [-1, 7, 5, 5], [-1, -1, -1, 0]])
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "query_tower.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"history": history})
    towers = SavedModel.load(folder).towers
    with torch.no_grad():
        expected = towers.embed_queries(torch.full((5,), -1), torch.from_numpy(history)).numpy()
    assert np.abs(found - expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("query_tower.history.sequence.heads=3", "heads: 3; expected a divisor of item_tower.dimension, 16"),
        ("objective.frequency=grouped", "a sequence may span several groups"),
    ],
)
def test_settings_that_do_not_fit(planted_split, change, said):
    with pytest.raises(InputError, match=said):
        parts(planted_split, config(change))


def test_draws_per_block_are_refused_with_in_batch_candidates(planted_split):
    with pytest.raises(InputError, match="rows_per_draw: with in_batch or memory, the rows of whole sequences"):
        parts(planted_split, config("objective.sources=[{in_batch: {}}]", "objective.rows_per_draw=32"))


@pytest.mark.parametrize("preset", ["sasrec", "sasrec-large"])
def test_presets_can_be_built(planted_split, preset):
    towers, _, batch = parts(planted_split, Config.load(preset, ["objective.sources=[{uniform: {size: 5}}]"]))
    assert towers.embed_sequences(batch.sequences).shape == (len(batch), 64)

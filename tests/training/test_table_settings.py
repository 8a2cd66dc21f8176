"""Tests of table settings in whole fits: sparse gradients, row-wise Adagrad and bfloat16."""

import os
import signal

import pytest
import torch

import twotower as tt
from twotower.config.run import Config
from twotower.errors import Interrupted
from twotower.towers import EmbeddingTable, build_towers, tables
from twotower.towers.tables import SPARSE_ABOVE
from twotower.training.module import TrainingModule

SMALL = [
    "training.batch_size=64",
    "training.learning_rate=0.01",
    "training.warmup_steps=5",
    "training.accelerator=cpu",
    "item_tower.dimension=16",
    "query_tower.history.length=10",
    "query_tower.history.heads=2",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
]
ADAGRAD = "training.table_optimizer=rowwise-adagrad"
BFLOAT16 = "item_tower.table_precision=bfloat16"


def config(*changes):
    return Config.load(None, [*SMALL, *changes])


@pytest.fixture
def sparse(monkeypatch):
    """Enable sparse gradients at the size of the test data."""
    monkeypatch.setattr(tables, "SPARSE_ABOVE", 10)


@pytest.mark.parametrize("changes", [[], [ADAGRAD], [ADAGRAD, BFLOAT16]], ids=["adam", "adagrad", "bfloat16"])
def test_sparse_tables_learn_and_are_saved(planted_split, changes, sparse, tmp_path):
    model = tt.fit(planted_split, config("training.max_epochs=12", *changes), progress=False)
    table = model.artifact.towers.item_tower.ids
    assert table.sparse and table.weight.dtype == (torch.bfloat16 if BFLOAT16 in changes else torch.float32)
    best = model.rank(planted_split.test, 10, True)
    parity = best % 2 == (planted_split.test.queries % 2)[:, None]
    assert parity[best >= 0].mean() > 0.9
    again = tt.Retriever.load(model.save(tmp_path / "model"))
    assert (again.rank(planted_split.test, 10, True) == best).all()


def test_an_interrupted_fit_of_bfloat16_tables_resumes_exactly(planted_split, sparse, tmp_path, monkeypatch):
    settings = config("training.max_epochs=3", ADAGRAD, BFLOAT16)
    whole = tt.fit(planted_split, settings, directory=tmp_path / "whole", progress=False)
    original = TrainingModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 20:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", interrupted)
        with pytest.raises(Interrupted):
            tt.fit(planted_split, settings, directory=tmp_path / "cut", progress=False)
    resumed = tt.fit(planted_split, settings, directory=tmp_path / "cut", resume=True, progress=False)
    assert whole.fit.history == resumed.fit.history
    for name, value in whole.artifact.towers.state_dict().items():
        assert torch.equal(value, resumed.artifact.towers.state_dict()[name]), name


def test_the_learning_rate_of_tables_follows_the_optimizer():
    assert config().resolved(10_000).training.table_learning_rate_factor == 1.0
    assert config(ADAGRAD).resolved(10_000).training.table_learning_rate_factor > 1.0
    assert config("training.table_learning_rate_factor=3").resolved(10_000).training.table_learning_rate_factor == 3.0


def test_all_tables_of_both_towers_have_the_same_type():
    towers = build_towers(
        config(BFLOAT16, "query_tower.id_embedding=true", "query_tower.history.share_table=false"),
        num_queries=30,
        num_items=20,
    )
    found = [module for module in towers.modules() if isinstance(module, EmbeddingTable)]
    assert len(found) == 3
    assert all(table.weight.dtype == torch.bfloat16 and table.sparse for table in found)
    assert towers.embed_items(torch.arange(5)).dtype == torch.float32
    assert towers.item_embeddings().dtype == torch.float32


def test_the_initialization_of_a_table():
    torch.manual_seed(0)
    table = EmbeddingTable(SPARSE_ABOVE + 1, 16)
    assert table.sparse and not EmbeddingTable(SPARSE_ABOVE, 1).sparse
    values = table.weight.detach()
    assert abs(float(values.mean())) < 1e-3 and float(values.std()) == pytest.approx(0.25, rel=0.01)
    assert float(EmbeddingTable(1000, 64, scale=0.5).weight.detach().std()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(table(torch.tensor([[3, 5]]))[0], values[[3, 5]])

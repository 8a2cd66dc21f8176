"""Where a training step on an accelerator would make the host wait, found without one.

The step runs on the device `meta`, whose tensors have shapes and no values. Whatever needs a value on the host, such as
`.item()` or a shape that depends on values, raises an error there; on CUDA it would wait for the device.
"""

import pytest
import torch

from twotower.config.run import Config
from twotower.data import Batch
from twotower.losses.tiled import kernel
from twotower.negatives import Candidates
from twotower.objectives.build import build_objective
from twotower.objectives.registry import OBJECTIVES
from twotower.towers import build_towers
from twotower.training import TableOptimizer, compute_loss
from twotower.training.optimizer import parameter_groups

IDS = ("query_tower.history=null", "query_tower.id_embedding=true")
#: Objectives without copies of candidates to merge.
NEVER_WAITS = ("expected-count", "full-softmax")
POOLED = ("query_tower.history.length=6",)


def run_step(train, *changes):
    """Run two steps on tensors without values."""
    config = Config.load(None, ["item_tower.dimension=8", "objective.mask_known_positives=false", *changes])
    towers = build_towers(config, num_queries=train.num_queries, num_items=train.num_items).to("meta")
    for module in towers.modules():
        if isinstance(module, torch.nn.Embedding):
            module.sparse = True  # as in a catalog of more than 100,000 items
    objective = build_objective(config, train).to("meta")
    groups = parameter_groups(
        torch.nn.ModuleList([towers, objective]), 0.01, lr=1e-3, table_rule=config.training.table_optimizer
    )
    optimizer = TableOptimizer(groups, lr=1e-3)
    codes = torch.zeros(32, dtype=torch.int64, device="meta")
    batch = Batch(rows=codes, queries=codes, items=codes, history=codes[:, None].expand(-1, 6))
    for _ in range(2):
        loss, _, _ = compute_loss(towers, objective, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.device.type == "meta" and loss.shape == ()


@pytest.mark.parametrize("tower", [IDS, POOLED], ids=["ids", "pooled history"])
@pytest.mark.parametrize("optimizer", ["adam", "rowwise-adagrad"])
def test_the_default_step_never_waits(planted_split, tower, optimizer):
    run_step(planted_split.train, *tower, f"training.table_optimizer={optimizer}")


@pytest.mark.parametrize("name", sorted({*OBJECTIVES} - {"logistic-observed", "nce", "refined-logq"}))
def test_other_objectives_wait_for_the_merge_of_copies_only(planted_split, name, monkeypatch):
    """Merging copies counts the distinct candidates; nothing else waits, except hits in `nce` and `refined-logq`."""
    change = f"objective.name={name}"
    if name not in NEVER_WAITS:
        with pytest.raises(NotImplementedError, match=r"unique|nonzero"):
            run_step(planted_split.train, *IDS, change)
        monkeypatch.setattr(Candidates, "collapse", lambda self, **options: self)
    run_step(planted_split.train, *IDS, change)


class Kernels:
    """Kernels that do nothing: `kernel[grid](...)`."""

    def __getattr__(self, name):
        return {grid: lambda *given, **options: None for grid in ((1, 1),)}


def test_nested_widths_never_wait(planted_split):
    run_step(planted_split.train, *IDS, "item_tower.nested=[3, 5]")


def test_the_kernels_of_the_softmax_never_waits(planted_split, monkeypatch):
    used = []
    monkeypatch.setattr(kernel, "is_supported", kernel.fits)
    monkeypatch.setattr(kernel, "ROWS", 1 << 20)
    monkeypatch.setattr(kernel, "COLUMNS", 1 << 20)
    monkeypatch.setattr(kernel, "kernels", lambda: used.append(1) or Kernels())
    run_step(planted_split.train, *IDS)
    run_step(planted_split.train, *IDS, "objective.name=full-softmax")
    assert len(used) == 8  # two kernels in each of four steps

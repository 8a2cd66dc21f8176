"""Tests that two ranks train a text encoder like one process. The file starts itself as the ranks."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers", reason="pip install 'twotower[text]'")
pytest.importorskip("peft", reason="pip install 'twotower[text]'")

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from starting import run_ranks, start

from support.tiny_text import WORDS, write_text_model
from support.towers import towers_of
from twotower.config.run import Config
from twotower.data import Interactions, TrainingBatches
from twotower.distributed.communicator import Communicator
from twotower.objectives.build import build_objective
from twotower.ranking.distributed import item_embeddings
from twotower.training import TableOptimizer, compute_loss
from twotower.training.gradient_sync import GradientExchange
from twotower.training.optimizer import parameter_groups
from twotower.training.seeds import draws_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]  # a busy machine

RANKS, ITEMS, QUERIES = 2, 30, 40
#: Way of training and rows per tower pass.
CASES = {"full": ("full", None), "full, micro-batch": ("full", 4), "lora, micro-batch": ("lora", 4)}


@cache
def data():
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 1 + n % 6)) for n in range(ITEMS + QUERIES)]
    titles, asked = texts[:ITEMS], texts[ITEMS:]
    titles[3], titles[4], asked[5] = titles[2], None, None
    rows = pl.DataFrame({"query_id": random.integers(0, QUERIES, 200), "item_id": random.integers(0, ITEMS, 200)})
    return Interactions.from_frame(
        rows.unique(maintain_order=True),
        items=pl.DataFrame({"item_id": range(ITEMS), "title": titles}),
        queries=pl.DataFrame({"query_id": range(QUERIES), "words": asked}),
    )


def work(model, case, ranks):
    """Return the losses, the gradients, the state after a run, and the embeddings of the items."""
    (train, micro_batch), known = CASES[case], data()
    text = f"kind: text, model: {model}, train: {train}, lora_dropout: 0"
    config = Config.load(
        None,
        [
            f"item_tower.features=[{{column: title, {text}}}]",
            f"query_tower.features=[{{column: words, {text}}}]",
            "item_tower.dimension=16",
            "query_tower.history=null",
            "query_tower.hidden=[]",
            "query_tower.dropout=0",
            "objective.sources=[{in_batch: {}}, {uniform: {size: 5}}]",
            "training.batch_size=12",
        ],
    ).resolved(len(known))
    torch.manual_seed(3)
    towers = towers_of(config, known).train()
    goal = build_objective(config, known).train()
    modules = nn.ModuleDict({"towers": towers, "objective": goal})
    optimizer = TableOptimizer(parameter_groups(modules, 0.01, lr=2e-3, encoder_lr=1e-3), lr=2e-3)
    exchange, losses, found = GradientExchange(modules, ranks), [], {}
    source = TrainingBatches(known, 12, history_length=0, ranks=ranks)
    order = np.random.default_rng(1).permutation(len(known))
    # An odd batch, and one of a single row, which leaves one rank without rows.
    made = [source.part(rows) for rows in (*np.split(order[:96], 8), order[96:103], order[103:104])]
    for number, batch in enumerate(made):
        options = {"micro_batch": micro_batch, "generator": draws_of(0, number, "cpu")}
        loss, _, _ = compute_loss(towers, goal, batch, ranks, **options)
        optimizer.zero_grad()
        loss.backward()
        exchange.sum_gradients()
        losses.append(float(ranks.sum(loss)))
        if number in (0, 8, 9):
            for name, one in modules.named_parameters():
                if one.grad is not None:
                    found[f"gradient of {name} in step {number}"] = one.grad.to_dense().clone()
        optimizer.step()
    found |= {f"state {name}": value.clone() for name, value in modules.state_dict().items()}
    return found | {"losses": torch.tensor(losses), "items": item_embeddings(towers, ranks)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("text")
    write_text_model(out / "tiny", dropout=0.0)
    start("test_text_over_ranks.py", str(out))
    return out


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(folder, case):
    alone = work(str(folder / "tiny"), case, Communicator())
    assert (
        max(float(value.abs().max()) for name, value in alone.items() if ".texts." in name and "step 8" in name) > 1e-3
    )
    for rank in range(RANKS):
        found = torch.load(folder / f"{case}.{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for what, expected in alone.items():
            if what.startswith("state") and what.endswith("key.bias"):
                continue  # its gradient is zero up to rounding, which Adam scales to the learning rate
            torch.testing.assert_close(
                found[what], expected, rtol=1e-4, atol=2e-5, msg=lambda text, w=what, r=rank: f"rank {r}, {w}: {text}"
            )


def work_on_all(out):
    for case in CASES:
        torch.save(work(str(out / "tiny"), case, Communicator.current()), out / f"{case}.{dist.get_rank()}.pt")


if __name__ == "__main__":
    import peft  # noqa: F401  # once, before the ranks are forked

    out = Path(sys.argv[1])
    sys.exit(run_ranks(RANKS, out, lambda: work_on_all(out)) != 0)

"""Time of a table update by our optimizers and by torch's, interleaved in one process.

    python benchmarks/table_optimizers.py [--threads 2] [--json benchmarks/results/table_optimizers.json]

One table of a million rows, D = 64. Each round draws 8,192 ids by Zipf's law, with duplicates, and times lookup,
backward and update. `--clock cpu --threads 1` measures CPU time, for a busy machine.
"""

import json
from typing import Any

import torch
from rounds import apply, bound, how, milliseconds, options, ratio, rounds_of
from scale import SEED, D, Step
from torch import Tensor, nn

from twotower.towers import EmbeddingTable
from twotower.training import TableOptimizer


def optimizers(rounds: int, rows: int = 8192) -> list[dict[str, Any]]:
    """Time lookup, backward and update of one table by each optimizer, with duplicate ids."""
    step = Step(10**4, rows, 10**4)
    step.codes, num_items = torch.randperm(10**6)[: 10**4], 10**6
    upstream = torch.randn(rows, D)
    pairs: dict[str, tuple[nn.Embedding, torch.optim.Optimizer]] = {}
    for name, sparse, make in (
        ("twotower adam", True, lambda p: TableOptimizer(p, lr=1e-3)),
        ("twotower rowwise-adagrad", True, lambda p: TableOptimizer(p, lr=1e-2, rule="rowwise-adagrad")),
        ("torch SparseAdam", True, lambda p: torch.optim.SparseAdam(p, lr=1e-3)),
        ("torch Adagrad, sparse", True, lambda p: torch.optim.Adagrad(p, lr=1e-2)),
        ("torch AdamW, dense", False, lambda p: torch.optim.AdamW(p, lr=1e-3)),
    ):
        table = EmbeddingTable(num_items, D)
        table.sparse = sparse
        pairs[name] = table, make(list(table.parameters()))

    def update(table: nn.Embedding, optimizer: torch.optim.Optimizer, items: Tensor) -> None:
        optimizer.zero_grad()
        table(items).backward(upstream)
        optimizer.step()

    times = rounds_of(
        {
            name: lambda pair=pair: bound(update, *pair, step.batch().items)  # type: ignore[misc]
            for name, pair in pairs.items()
        },
        rounds,
    )
    found = []
    for name, (embedding, optimizer) in pairs.items():
        state = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        row = {
            "optimizer": name,
            "ms": milliseconds(times[name]),
            "over_rowwise_adagrad": ratio(times[name], times["twotower rowwise-adagrad"]),
            "state_over_table": round(state / embedding.weight.nbytes, 3),
        }
        print(row, flush=True)
        found.append(row)
    return found


def main() -> None:
    """Measure and write the results."""
    arguments = options(__doc__.splitlines()[0]).parse_args()
    apply(arguments)
    found = optimizers(arguments.rounds)
    if arguments.json:
        report = {
            "benchmark": "table_optimizers",
            "seed": SEED,
            "dimension": D,
            "how": how(arguments),
            "results": found,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

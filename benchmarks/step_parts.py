"""Time profile of one in-batch step: its parts by the clock, and the operations of the loss by the profiler.

    python benchmarks/step_parts.py [--rounds 9] [--json benchmarks/results/step_parts.json]

Measures the step of step.py with B = 8192, D = 64, and its matrix products for comparison.
"""

import itertools
import json
import statistics
import time

import torch
from rounds import how, options
from step import KNOWN, D, Known, Ours, Products, Towers, zipf

from twotower.objectives import Embedded
from twotower.training.embedding import embed_parts

ROWS = 8192
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "exponentials": ("aten::exp2_", "aten::exp_"),
    "row sums": ("aten::addmv_",),
    "masked places": ("aten::index_fill_",),
}


def parts(way: Ours, known: Known, users: torch.Tensor, items: torch.Tensor) -> dict[str, float]:
    """Measure milliseconds of each part of one step."""
    marks = [("", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    pairs = known.pairs(users)
    drawn = way.objective.draw(items, known_positives=pairs)
    mark("known positives and draw")
    query = way.towers.embed_queries(users)
    positive, candidates = embed_parts(way.towers, [items, drawn.items])  # type: ignore[arg-type]
    mark("look-ups")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way.low):
        embedded = Embedded(query, positive, candidates, repeated_queries=True)
        loss = way.objective.mean(embedded, drawn, temperature=way.towers.temperature)
    mark("loss and its gradients")
    way.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    mark("backward of the towers")
    way.optimizer.step()
    mark("optimizer")
    return {name: 1e3 * (at - before[1]) for before, (name, at) in itertools.pairwise(marks)}


def main() -> None:
    """Measure, print and write the results."""
    parser = options(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)  # and the default allocator, as in step.py
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    towers, known, probability = Towers(), Known(zipf(), rng), zipf()
    ways = {
        "kept": Ours(towers, known, unique=False),
        "unique": Ours(towers, known, unique=True),
        "unique, bfloat16 products": Ours(towers, known, unique=True, low=True),
    }
    alone = Products(ROWS)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    products = []
    for turn in range(arguments.rounds + 2):
        users, items = (torch.multinomial(probability, ROWS, replacement=True, generator=rng) for _ in range(2))
        start = time.perf_counter()
        alone(users, items)
        if turn >= 2:
            products.append(1e3 * (time.perf_counter() - start))
        for name, way in ways.items():
            found = parts(way, known, users, items)
            if turn >= 2:
                taken[name].append(found)
    report = {"benchmark": "step_parts", "rows": ROWS, "dimension": D, "known": KNOWN, "how": how(arguments)}
    report["products_ms"] = round(statistics.median(products), 1)
    print(f"products alone: {report['products_ms']} ms")
    for name, way in ways.items():
        medians = {part: round(statistics.median(one[part] for one in taken[name]), 1) for part in taken[name][0]}
        medians["whole step"] = round(statistics.median(sum(one.values()) for one in taken[name]), 1)
        with torch.profiler.profile() as profile:
            for _ in range(5):
                parts(way, known, users, items)
        spent = {event.key: event.self_cpu_time_total / 5e3 for event in profile.key_averages()}
        medians |= {f"of it {kind}": round(sum(spent.get(key, 0.0) for key in keys), 1) for kind, keys in KINDS.items()}
        report[name] = medians
        print(name, medians)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

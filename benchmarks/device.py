"""Time and memory on one device: step, full softmax, ranking and epoch, next to plain PyTorch and the products alone.

    python benchmarks/device.py --device cuda --json benchmarks/results/device-cuda.json

`benchmarks/device.sh` runs it after the tests marked `device`. The contenders of a part run in turn; medians and the
peak of memory beyond the inputs are reported. Each contender runs in float32, in TF32 (`high`) and under bfloat16
autocast:

- ours: the library, with and without 20 known positives for each row (which are looked up on the host); on CUDA its
  softmax is a Triton kernel if Triton is installed, and "ours, tiles" is the same without it;
- plain: a competent user's PyTorch; compiled: the same under torch.compile;
- products: the matrix products of the part alone, into preallocated memory: a bound for all of them.

With `--device cpu` the sizes are tiny and torch.compile has the backend `eager`: a dry run of the code, not a result.
The part "kernel" compares the Triton kernel with float64 on the CPU, on odd shapes, and says whether it was used. A
part that does not fit into `--seconds` is skipped, and the file says so.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import torch
from step import plain_loss
from torch import Tensor, nn
from torch.nn import functional as F

import twotower as tt
from twotower.data import Batch
from twotower.losses import tiled_full_softmax, tiled_softmax
from twotower.losses.tiled.forms import TiledSoftmax
from twotower.losses.tiled.inputs import LossInputs
from twotower.losses.tiled.kernel import SETTING, KernelState, is_supported
from twotower.negatives import CountedFrequency, InBatch, NegativeMask, Pool
from twotower.objectives import SampledSoftmax
from twotower.training import TableOptimizer, compute_loss

SEED, D, KNOWN, TEMPERATURE = 0, 64, 20, 0.1
PRECISIONS = ("float32", "tf32", "bfloat16")
Call = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts: items, rows of a batch, queries of a ranking, rows of an epoch, rounds of timing."""

    items: int
    rows: int
    softmax_items: int
    softmax_rows: int
    queries: int
    epoch_rows: int
    rounds: int


SIZES = {
    "cuda": Sizes(1_000_000, 8192, 1_000_000, 2048, 8192, 4_000_000, 9),
    "cpu": Sizes(2_000, 64, 2_000, 32, 64, 4_000, 2),
}


class Device:
    """A device: waiting for it, the precision of its products, and the peak of its memory."""

    def __init__(self, name: str) -> None:
        self.type = name
        self.is_cuda = name == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.is_cuda:
            torch.cuda.synchronize()

    @contextmanager
    def precision(self, name: str) -> Iterator[None]:
        """Set the precision of float32 products in the block: float32, tf32, or bfloat16 by autocast."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        try:
            with torch.autocast(self.type, dtype=torch.bfloat16, enabled=name == "bfloat16"):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def peak(self, call: Call) -> float | None:
        """Measure the peak of memory of a call beyond what is allocated before, MiB; None on a CPU."""
        if not self.is_cuda:
            call()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function; in the dry run without a compiler."""
        compiled: Callable[..., Any] = torch.compile(function, backend="inductor" if self.is_cuda else "eager")
        return compiled


def measure(device: Device, calls: dict[str, Call], rounds: int) -> dict[str, Any]:
    """Time all calls in turn, in every precision: medians in ms, the ratio to the products, and the peak of memory."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        with device.precision(precision):
            # The first call compiles and fills the optimizer's state; the second has the memory of all later ones.
            for call in calls.values():
                call()
            memory = {name: device.peak(call) for name, call in calls.items()}
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    device.wait()
                    start = time.perf_counter()
                    call()
                    device.wait()
                    times[name].append(time.perf_counter() - start)
        found[precision] = {
            name: {
                "median_ms": round(1e3 * statistics.median(taken), 4),
                "of_products": round(
                    statistics.median(a / b for a, b in zip(taken, times["products"], strict=True)), 3
                ),
                "peak_mib": memory[name],
            }
            for name, taken in times.items()
        }
    return found


def zipf(size: int) -> Tensor:
    """Compute Zipf probabilities of codes, float64."""
    weight = 1.0 / torch.arange(1, size + 1, dtype=torch.float64)
    return weight / weight.sum()


class Towers(nn.Module):
    """Two tables of unit vectors."""

    def __init__(self, size: int, device: Device) -> None:
        super().__init__()
        self.users, self.items = (nn.Embedding(size, D, sparse=True, device=device.type) for _ in range(2))
        self.temperature = torch.tensor(TEMPERATURE, device=device.type)
        self.repeats_queries = True

    def embed_queries(self, queries: Tensor, history: Tensor | None = None) -> Tensor:
        """Embed queries, [B] -> [B, D]."""
        del history
        return F.normalize(self.users(queries), dim=-1)

    def embed_items(self, items: Tensor) -> Tensor:
        """Embed items, [M] -> [M, D]."""
        return F.normalize(self.items(items), dim=-1)


class Known:
    """Known positives on the host, as in training: the codes of the queries are read from the device."""

    def __init__(self, size: int, rng: torch.Generator) -> None:
        self.items = torch.multinomial(zipf(size), 1000 * KNOWN, replacement=True, generator=rng).view(1000, KNOWN)

    def pairs(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the known positives as (row, item) pairs."""
        row = torch.arange(len(queries))[:, None].expand(-1, KNOWN).reshape(-1)
        items = self.items[queries.cpu() % 1000].reshape(-1)
        return row.to(queries.device), items.to(queries.device)


def products_of(device: Device, rows: int, columns: int) -> Call:
    """Make a call of the three products of a softmax, [B, D] x [D, M], [B, M] x [M, D], [M, B] x [B, D]."""
    query, items = torch.randn(rows, D, device=device.type), torch.randn(columns, D, device=device.type)
    logits = torch.randn(rows, columns, device=device.type)

    def products() -> None:
        torch.mm(query, items.T)
        torch.mm(logits, items)
        torch.mm(logits.T, query)

    return products


def in_tiles(call: Call) -> Call:
    """Make a call that does not use the Triton kernel."""

    def tiles() -> object:
        with setting("off"):
            return call()

    return tiles


@contextmanager
def setting(value: str) -> Iterator[None]:
    """Set TWOTOWER_TRITON in the block."""
    before = os.environ.get(SETTING)
    os.environ[SETTING] = value
    try:
        yield
    finally:
        del os.environ[SETTING]
        if before is not None:
            os.environ[SETTING] = before


#: Rows, candidates, width, and the scale of the queries.
KERNEL_SHAPES = [
    (1, 1, 1, 1.0),
    (65, 130, 17, 1.0),
    (1000, 3333, 64, 10.0),
    (257, 20_001, 96, 1.0),
    (128, 512, 128, 1e4),
]
#: Largest error accepted, relative to the largest number of a gradient: products in float32, TF32 and bfloat16.
KERNEL_BOUNDS = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2}


def kernel(device: Device, sizes: Sizes) -> dict[str, Any]:
    """Compare value and gradients of the softmax with the tiles in float64 on the CPU."""
    del sizes
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        errors = {}
        for rows, size, width, scale in KERNEL_SHAPES:
            rng = torch.Generator().manual_seed(SEED)
            vectors = {
                "query": scale * torch.randn(rows, width, generator=rng),
                "positive": torch.randn(rows, width, generator=rng),
                "candidates": torch.randn(size, width, generator=rng) / width**0.5,
            }
            items = torch.randint(size, (size,), generator=rng)
            pairs = [(torch.arange(rows), items[torch.randint(size, (rows,), generator=rng)]) for _ in range(3)]
            pairs.append((torch.full((size,), rows // 2), items))  # a row without a negative
            mask = NegativeMask(pairs, rows=rows, items=items, size=size)
            log_count = 3 * torch.randn(size, generator=rng)

            def gradients(one: dict[str, Tensor], mask: NegativeMask, log_count: Tensor) -> list[Tensor]:
                query, positive, candidates = leaves = [vector.requires_grad_() for vector in one.values()]
                loss = tiled_softmax(query, positive, candidates, log_count, mask=mask)
                return [loss.detach(), *torch.autograd.grad(loss, leaves)]

            exact = gradients({name: one.double() for name, one in vectors.items()}, mask, log_count.double())
            with device.precision(precision):
                ours = gradients(
                    {name: one.to(device.type) for name, one in vectors.items()},
                    mask.to(device.type),
                    log_count.to(device.type),
                )
            errors[f"{rows} x {size} x {width}, queries x {scale:g}"] = max(
                float((one.cpu().double() - other).abs().max() / other.abs().max().clamp(min=1e-30))
                for one, other in zip(ours, exact, strict=True)
            )
        # In low precision, logits of 1e4 are rounded by more than 1: only the value's order is known.
        counted = [error for name, error in errors.items() if precision == "float32" or not name.endswith("10000")]
        found[precision] = {"relative_error": errors, "passed": max(counted) <= KERNEL_BOUNDS[precision]}
    inputs = LossInputs(torch.zeros(2, 4, device=device.type), None, torch.zeros(3, 4, device=device.type), None)
    return {"used": is_supported(TiledSoftmax(), inputs), "failed": KernelState.failed, **found}


def step(device: Device, sizes: Sizes) -> dict[str, Any]:
    """Measure an in-batch training step with row-wise Adagrad."""
    rng = torch.Generator().manual_seed(SEED)
    probability = zipf(sizes.items)
    users, items = (
        torch.multinomial(probability, sizes.rows, replacement=True, generator=rng).to(device.type) for _ in range(2)
    )
    batch = Batch(rows=users, queries=users, items=items, history=users[:, None][:, :0])
    towers, known = Towers(sizes.items, device), Known(sizes.items, rng)
    objective = SampledSoftmax(Pool(InBatch(CountedFrequency(probability)), unique=True)).to(device.type)
    ours = TableOptimizer([{"params": list(towers.parameters())}], lr=1e-3, rule="rowwise-adagrad")
    plain = torch.optim.Adagrad(towers.parameters(), lr=1e-3)
    log_count = (probability.log().float() + float(np.log(sizes.rows - 1))).to(device.type)

    def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def library(positives: Known | None) -> Call:
        return lambda: update(
            ours,
            compute_loss(towers, objective, batch, known_positives=positives)[0],  # type: ignore[arg-type]
        )

    def by_hand(loss: Callable[..., Tensor]) -> Call:
        return lambda: update(
            plain, loss(towers.embed_queries(users), towers.embed_items(items), items, log_count[items])
        )

    calls = {
        "products": products_of(device, sizes.rows, sizes.rows),
        "ours": library(None),
        "ours, tiles": in_tiles(library(None)),
        "ours, known positives": library(known),
        "plain": by_hand(plain_loss),
        "compiled": by_hand(device.compiled(plain_loss)),
    }
    return measure(device, calls, sizes.rounds)


def full_softmax(device: Device, sizes: Sizes) -> dict[str, Any]:
    """Measure value and gradients of the softmax over the whole catalog."""
    rng = torch.Generator().manual_seed(SEED)
    query, items = (
        F.normalize(torch.randn(size, D, generator=rng), dim=1).to(device.type).requires_grad_()
        for size in (sizes.softmax_rows, sizes.softmax_items)
    )
    target = torch.randint(sizes.softmax_items, (sizes.softmax_rows,), generator=rng).to(device.type)

    def naive(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(query / TEMPERATURE @ items.T, target)

    def tiled(query: Tensor, items: Tensor, target: Tensor) -> Tensor:
        return tiled_full_softmax(query, target, items, temperature=TEMPERATURE)

    def gradients(loss: Callable[..., Tensor]) -> Call:
        return lambda: torch.autograd.grad(loss(query, items, target), (query, items))

    calls = {
        "products": products_of(device, sizes.softmax_rows, sizes.softmax_items),
        "ours": gradients(tiled),
        "ours, tiles": in_tiles(gradients(tiled)),
        "plain": gradients(naive),
        "compiled": gradients(device.compiled(naive)),
    }
    return measure(device, calls, sizes.rounds)


def ranking(device: Device, sizes: Sizes) -> dict[str, Any]:
    """Measure the best 100 of all items for many queries."""
    rng = torch.Generator().manual_seed(SEED)
    items, queries = (torch.randn(size, D, generator=rng).to(device.type) for size in (sizes.items, sizes.queries))
    index, block = tt.index.ExactIndex(items), 1024

    def best(part: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        values, codes = torch.topk(part @ items.T, 100)
        return values, codes

    def in_blocks(call: Callable[..., Any]) -> Call:
        return lambda: [call(part, items) for part in torch.split(queries, block)]

    def product(part: Tensor, items: Tensor) -> Tensor:
        return part @ items.T

    calls = {
        "products": in_blocks(product),
        "ours": lambda: index.search(queries, 100),
        "plain": in_blocks(best),
        "compiled": in_blocks(device.compiled(best)),
    }
    return measure(device, calls, sizes.rounds)


def epoch(device: Device, sizes: Sizes) -> dict[str, Any]:
    """Measure an epoch of `fit` with its preparation and evaluation, and a plain loop over the same rows, seconds."""
    rng = np.random.default_rng(SEED)
    users, size = sizes.epoch_rows // 50, sizes.items // 10
    weight = zipf(size).numpy()
    queries = np.repeat(np.arange(users), 50)
    codes = rng.choice(size, size=len(queries), p=weight)
    frame = pl.DataFrame({"user_id": queries, "item_id": codes, "timestamp": np.arange(len(queries))})
    split = tt.splits.leave_last_out(tt.Interactions.from_frame(frame))
    config = tt.Config.load(
        overrides=[
            "training.max_epochs=1",
            f"training.batch_size={sizes.rows}",
            f"training.accelerator={'gpu' if device.is_cuda else 'cpu'}",
            "training.logger=none",
            "query_tower.history=null",
            "query_tower.id_embedding=true",
            "objective.sources=[{in_batch: {}}]",
        ]
    )
    device.wait()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tt.fit(split, config, directory=Path(folder) / "run", progress=False)
    device.wait()
    ours = time.perf_counter() - start

    train = split.train
    towers = Towers(max(train.num_items, train.num_queries), device)
    optimizer = torch.optim.Adagrad(towers.parameters(), lr=1e-3)
    log_count = torch.from_numpy(np.log(np.maximum(train.item_counts() / len(train), 1e-12) * (sizes.rows - 1)))
    log_count = log_count.float().to(device.type)
    pairs = torch.from_numpy(np.stack([train.query_codes(), train.item_codes]).astype(np.int64)).to(device.type)
    start = time.perf_counter()
    for rows in torch.split(torch.randperm(len(train), device=device.type), sizes.rows):
        user, item = pairs[:, rows]
        loss = plain_loss(towers.embed_queries(user), towers.embed_items(item), item, log_count[item])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    device.wait()
    return {"rows": len(train), "fit_s": round(ours, 3), "plain_loop_s": round(time.perf_counter() - start, 3)}


PARTS: dict[str, Callable[[Device, Sizes], dict[str, Any]]] = {
    "kernel": kernel,
    "step": step,
    "full softmax": full_softmax,
    "ranking": ranking,
    "epoch": epoch,
}


def tests_of(path: Path | None) -> dict[str, Any] | None:
    """Read the counts and the failures of a JUnit file; None without a readable file."""
    try:
        suites = [] if path is None else list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return None
    if not suites:
        return None
    counts = {name: sum(int(one.get(name, 0)) for one in suites) for name in ("tests", "failures", "errors", "skipped")}
    cases = [case for suite in suites for case in suite.iter("testcase")]
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {**counts, "failed": failed}


def main() -> None:
    """Measure all parts within the time, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cuda")
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--tests", type=Path, help="JUnit file of the tests, to be included")
    parser.add_argument("--json", type=Path, required=True)
    settings = parser.parse_args()
    began, device, sizes = time.perf_counter(), Device(settings.device), SIZES[settings.device]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.is_cuda else "cpu (dry run)",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "sizes": {**asdict(sizes), "dimension": D},
        "tests": tests_of(settings.tests),
        "parts": {},
    }
    for name, part in PARTS.items():
        torch.manual_seed(SEED)
        left = settings.seconds - (time.perf_counter() - began)
        if left < settings.seconds / 8:
            found: dict[str, Any] = {"skipped": f"only {left:.0f} s were left"}
        else:
            try:
                found = part(device, sizes)
            except torch.OutOfMemoryError as error:
                found = {"failed": str(error).splitlines()[0]}
        result["parts"][name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
        # Written after every part, so that a run that is cut off leaves what it has measured.
        settings.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

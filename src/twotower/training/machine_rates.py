"""Measurements of this machine's rates for a plan, with the library's own loss, tables and optimizer."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from twotower.losses.tiled.api import tiled_softmax
from twotower.negatives import NegativeMask
from twotower.system import hardware
from twotower.towers.tables import EmbeddingTable
from twotower.training.optimizer import TableOptimizer
from twotower.training.scale_plan import Rates, Workload

#: Number of repetitions of a measurement; the median is used.
ROUNDS = 5


def measure_rates(workload: Workload, *, link: float | None = None, latency: float | None = None) -> Rates:
    """Measure rates for a workload, at bounded sizes; takes a few seconds and at most a few hundred MiB.

    Args:
        workload: the workload; its sizes (up to bounds), layers, optimizer and device are used.
        link: bytes per second between ranks; None measures this machine's loopback.
        latency: seconds per exchange; None measures it, or assumes 50 microseconds if `link` is set.
    """
    process = hardware.resident_memory() or 0
    device = torch.device(workload.device)
    measured = _loopback() if link is None else (link, 5e-5)
    return Rates(
        products=_products(workload, device),
        layers=_layers(workload, device),
        updates=_updates(workload, device),
        lookups=_lookups(workload, device),
        link=measured[0],
        latency=measured[1] if latency is None else latency,
        process=process,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(ROUNDS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first round is a warm-up


def _products(workload: Workload, device: torch.device) -> float:
    rows, candidates, width = min(workload.rows, 1024), min(workload.candidates, 8192), workload.dimension
    query = nn.functional.normalize(torch.randn(rows, width, device=device), dim=1).requires_grad_()
    items = nn.functional.normalize(torch.randn(candidates, width, device=device), dim=1).requires_grad_()
    own = torch.randint(candidates, (rows,), device=device)
    pairs = (torch.arange(rows, device=device), own)
    counts = torch.rand(candidates, device=device)

    def step() -> None:
        mask = NegativeMask([pairs], rows=rows, items=torch.arange(candidates, device=device), size=candidates)
        positive = items.index_select(0, own)
        tiled_softmax(query, positive, items, counts, mask=mask, temperature=0.1).backward()  # type: ignore[no-untyped-call]

    return 6.0 * rows * candidates * width / _seconds(step, device)


def _layers(workload: Workload, device: torch.device) -> float:
    rows, widths = min(workload.rows, 4096), [workload.dimension, *workload.hidden, workload.dimension]
    stack = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))).to(device)
    inputs = torch.randn(rows, widths[0], device=device)
    numbers = sum(parameter.numel() for parameter in stack.parameters())
    return 6.0 * rows * numbers / _seconds(lambda: stack(inputs).sum().backward(), device)


def _table(workload: Workload, device: torch.device) -> EmbeddingTable:
    rows = min(max(workload.items, 200_000), max((64 << 20) // (workload.dimension * 4), 1000))
    table = EmbeddingTable(rows, workload.dimension).to(device)
    table.sparse = True
    return table


def _updates(workload: Workload, device: torch.device) -> float:
    table = _table(workload, device)
    weight = next(iter(table.parameters()))
    optimizer = TableOptimizer([weight], lr=1e-3, rule=workload.optimizer)
    rows = torch.randperm(table.num_embeddings, device=device)[:16_384].sort().values
    values = torch.randn(len(rows), workload.dimension, device=device)

    def step() -> None:
        weight.grad = torch.sparse_coo_tensor(rows[None], values, weight.shape, check_invariants=False)
        optimizer.step()

    return len(rows) * workload.dimension / _seconds(step, device)


def _lookups(workload: Workload, device: torch.device) -> float:
    table = _table(workload, device)
    codes = torch.randint(table.num_embeddings, (65_536,), device=device)

    def step() -> None:
        table.weight.grad = None
        table(codes).sum().backward()

    return len(codes) * workload.dimension / _seconds(step, device)


def _loopback() -> tuple[float, float]:
    """Return bytes per second and seconds per round trip over TCP, gloo's transport, between two threads."""
    size, trips = 32 << 20, 50
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            other, _ = server.accept()
            with other:
                other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(trips):
                    other.sendall(_received(other, 1))
                for _ in range(3):
                    _received(other, size)
                    other.sendall(b"1")

        thread = threading.Thread(target=answer)
        thread.start()
        with socket.create_connection(("127.0.0.1", port)) as one:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            start = time.perf_counter()
            for _ in range(trips):
                one.sendall(b"1")
                _received(one, 1)
            latency = (time.perf_counter() - start) / trips
            payload, times = bytes(size), []
            for _ in range(3):
                start = time.perf_counter()
                one.sendall(payload)
                _received(one, 1)
                times.append(time.perf_counter() - start)
        thread.join()
    return size / statistics.median(times), latency


def _received(connection: socket.socket, count: int) -> bytes:
    parts, left = [], count
    while left:
        part = connection.recv(min(left, 1 << 20))
        if not part:
            raise ConnectionError("the other end closed the connection")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)

"""The service under load: throughput, latency, memory over minutes, model swaps, and hostile requests.

    python benchmarks/service_load.py MODEL_DIR --json benchmarks/results/service_load.json

`twotower serve` runs in a separate process on this machine, and wrk (Debian: apt-get install wrk) requests the ten best
items of random queries over loopback. For comparison, /healthz is measured in the same run: the limit of the web server
alone. wrk counts responses other than 2xx and broken connections; the benchmark fails if there are any.

`hostile` compares ordinary requests with and without 1 % of hostile ones on the same 32 connections, in alternating
phases, while models are swapped and catalogs edited. wrk does not separate the answers to two kinds of requests, so
this part has its own client, an event loop in this process, whose time is part of the latencies in both columns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from twotower.serving import Retriever, save_changes
from twotower.serving.model_folder import SavedModel, library_versions

#: Connections of the part `hostile`, and its share of hostile requests.
CONNECTIONS, SHARE = 32, 0.01

#: Filters that read files, reach other hosts or are unexpectedly expensive, and some that are only wrong.
HOSTILE_FILTERS = (
    "title in (from read_csv('/etc/passwd'))",
    "title = (select column_1 from read_csv('http://127.0.0.1:9/x'))",
    "cast(" * 60 + "title" + " as varchar)" * 60 + " = 'x'",
    "lpad(title, 1000000000, 'x') = 'x'",
    "repeat(title, 1000000000) = 'x'",
    "(" * 480 + "1=1" + ")" * 480,
    "not " * 240 + "true",
    "title like '" + "%a" * 300 + "'",
    "title in (" + "'a'," * 240 + "'a'",
    "regexp_like(title, '(a+)+$')",
    "abs(" * 190 + "1" + ")" * 190 + " > 0",
    "no_such_column = 1",
)


def nested(depth: int, shape: str) -> Any:
    """Nest lists or objects in each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if shape == "list" else {"a": value}
    return value


#: Values of a context or of features that are neither scalars nor flat lists, or that are too long.
HOSTILE_VALUES = (nested(400, "list"), nested(900, "list"), nested(900, "object"), [1] * 5001, "x" * 20_001, 10**300)

LUA = """
local ids = {%s}
function init(args) math.randomseed(tonumber(args[1]) or 0) end
function request()
  local body = '{"query_id": "' .. ids[math.random(#ids)] .. '", "k": 10}'
  return wrk.format("POST", "/recommend", {["Content-Type"] = "application/json"}, body)
end
"""


@contextmanager
def service(folder: Path, *options: str) -> Iterator[str]:
    """Run `twotower serve` in a separate process and yield its address."""
    command = [sys.executable, "-m", "twotower", "serve", str(folder), "--port", "0", "--log-level", "warning"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"http://\S+/", line):
                break
        else:
            raise RuntimeError(f"the service ended with {process.wait()}")
        try:
            yield found.group()
        finally:
            process.terminate()
            if process.wait(600) not in (0, -15):  # a clean shutdown, or death by the signal
                raise RuntimeError(f"the service ended with {process.returncode}")


def load(
    address: str, script: Path | None, connections: int, seconds: int, seed: int, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Run wrk once, and end it early if `stop` is set."""
    # The timeout is long: a shared machine may stall for a while, and only requests never answered count as lost.
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "600s"]
    if script is not None:
        command += ["-s", str(script), address, "--", str(seed)]
    else:
        command += [f"{address}healthz"]
    before = metrics(address)["process_cpu_seconds_total"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while stop is not None and process.poll() is None:
            if stop.wait(0.2):
                process.send_signal(signal.SIGINT)  # wrk stops and prints its results so far
                break
        text, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"wrk ended with {process.returncode}: {text}")
    spent = metrics(address)["process_cpu_seconds_total"] - before
    latency = {name: milliseconds(*re.search(rf"{name}\s+([\d.]+)(\w+)", text).groups())  # type: ignore[union-attr]
               for name in ("50%", "90%", "99%")}  # fmt: skip
    failed = 0
    if found := re.search(r"Non-2xx or 3xx responses: (\d+)", text):
        failed += int(found.group(1))
    if found := re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text):
        failed += sum(map(int, found.groups()))
    total = int(re.search(r"(\d+) requests in", text).group(1))  # type: ignore[union-attr]
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))  # type: ignore[union-attr]
    return {
        "connections": connections,
        "requests": total,
        "failed": failed,
        "per_second": rate,
        # CPU time of the service: unlike the rate, it does not depend on the load of the machine.
        "cpu_milliseconds_per_request": round(1000 * spent / total, 3) if total else None,
        "milliseconds": latency,
    }


def milliseconds(value: str, unit: str) -> float:
    """Convert a time from wrk's format."""
    return float(value) * {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}[unit]


def metrics(address: str) -> dict[str, float]:
    """Read the values of /metrics without labels, and the counts of batches."""
    with urllib.request.urlopen(f"{address}metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def replaced(folder: Path, other: Path) -> None:
    """Replace the model folder by another one, atomically by renaming."""
    beside, old = folder.with_name("beside"), folder.with_name("old")
    shutil.copytree(other, beside)
    folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old)


def run_load(address: str, script: Path, rounds: int, seconds: int) -> dict[str, Any]:
    """Measure each number of connections in rounds interleaved with the web server alone; return medians."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(rounds):
        for connections in (1, 16, 64):
            found.setdefault(f"recommend, {connections} connections", []).append(
                load(address, script, connections, seconds, seed)
            )
            found.setdefault(f"healthz, {connections} connections", []).append(
                load(address, None, connections, 2, seed)
            )
    return {name: middle(runs) for name, runs in found.items()}


def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize rounds: medians, and sums of failures."""
    return {
        "rounds": len(runs),
        "requests": sum(run["requests"] for run in runs),
        "failed": sum(run["failed"] for run in runs),
        "per_second": round(statistics.median(run["per_second"] for run in runs), 1),
        "cpu_milliseconds_per_request": statistics.median(run["cpu_milliseconds_per_request"] or 0.0 for run in runs),
        "milliseconds": {
            name: round(statistics.median(run["milliseconds"][name] for run in runs), 2)
            for name in runs[0]["milliseconds"]
        },
    }


def run_swaps(address: str, script: Path, folder: Path, others: list[Path], swaps: int) -> dict[str, Any]:
    """Swap models while wrk sends requests without pause."""
    loads: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: loads.append(load(address, script, 16, 3 * swaps + 5, 0)))
    before = metrics(address)["process_resident_memory_bytes"]
    thread.start()
    name = folder.parent.name

    def done() -> float:
        return metrics(address).get(f'twotower_model_reloads_total{{model="{name}",outcome="swapped"}}', 0.0)

    took = []
    for number in range(swaps):
        began = time.monotonic()
        replaced(folder, others[number % len(others)])
        while done() < number + 1 and time.monotonic() - began < 30:
            time.sleep(0.05)
        took.append(time.monotonic() - began)
        time.sleep(max(0.0, 3.0 - took[-1]))
    thread.join()
    after = metrics(address)["process_resident_memory_bytes"]
    return {
        **loads[0],
        "swaps": int(done()),
        "seconds_until_swapped": round(statistics.median(took), 2),
        "memory_mb": [round(before / 2**20, 1), round(after / 2**20, 1)],
    }


def run_soak(address: str, script: Path, seconds: int) -> dict[str, Any]:
    """Measure memory during minutes of load. Time in which this process was stalled does not count."""
    loads: list[dict[str, Any]] = []
    stop = threading.Event()
    thread = threading.Thread(target=lambda: loads.append(load(address, script, 16, 24 * 3600, 0, stop)))
    began = last = time.monotonic()
    active, seen = 0.0, list[list[float]]()
    thread.start()
    while active < seconds and thread.is_alive():
        time.sleep(0.5)
        now = time.monotonic()
        active, last = active + min(now - last, 1.0), now
        if active >= 10 * len(seen):
            memory = metrics(address)["process_resident_memory_bytes"]
            seen.append([round(active), round(memory / 2**20, 1)])
    stop.set()
    thread.join()
    return {
        **loads[0],
        "seconds_under_load": round(active, 1),
        "seconds_of_wall_time": round(time.monotonic() - began, 1),
        "seconds_and_memory_mb": seen,
        "growth_mb_after_30_s": round(seen[-1][1] - next(mb for at, mb in seen if at >= 30), 1),
        "growth_mb_of_the_second_half": round(seen[-1][1] - seen[len(seen) // 2][1], 1),
    }


def framed(body: dict[str, Any]) -> bytes:
    """Write a request to /recommend as bytes."""
    text = json.dumps(body).encode()
    head = (
        f"POST /recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    )
    return f"{head}\r\n\r\n".encode() + text


class Client:
    """Sends ordinary requests on several connections, some of them replaced by hostile ones.

    Args:
        address: address of the service.
        ordinary, hostile: requests as bytes; the expected status is 200 for ordinary and 400 to 499 for hostile ones.
        share: share of hostile requests.
        seed: seed of the choice of requests.
    """

    def __init__(self, address: str, ordinary: list[bytes], hostile: list[bytes], share: float, seed: int) -> None:
        self.host, self.port = address.removeprefix("http://").rstrip("/").split(":")
        self.ordinary, self.hostile, self.share, self.seed = ordinary, hostile, share, seed
        self.milliseconds: dict[str, list[float]] = {"ordinary": [], "hostile": []}
        self.failed: dict[str, int] = {"ordinary": 0, "hostile": 0}

    async def run(self, seconds: float) -> None:
        """Send requests for a time; each connection waits for an answer before it sends the next request."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._connection(random.Random(f"{self.seed} {n}"), end) for n in range(CONNECTIONS)))

    async def _connection(self, rng: random.Random, end: float) -> None:
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        while time.monotonic() < end:
            kind = "hostile" if rng.random() < self.share else "ordinary"
            began = time.perf_counter()
            try:
                writer.write(rng.choice(self.hostile if kind == "hostile" else self.ordinary))
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
                await reader.readexactly(length)
                status = int(head.split(b" ", 2)[1])
            except (OSError, EOFError):  # a connection that ends is an error, too
                status = 0
                reader, writer = await asyncio.open_connection(self.host, int(self.port))
            self.milliseconds[kind].append(1000 * (time.perf_counter() - began))
            wanted = status == 200 if kind == "ordinary" else 400 <= status < 500
            self.failed[kind] += not wanted
        writer.close()


def requests_for(artifact: SavedModel) -> tuple[list[bytes], list[bytes]]:
    """Draw the ordinary requests, a third of them with a filter, and the hostile ones."""
    rng = random.Random(0)
    ids = artifact.queries.ids.to_list()
    ordinary = []
    for number in range(3000):
        body: dict[str, Any] = {"query_id": rng.choice(ids), "k": 10}
        if artifact.item_table is not None and "title" in artifact.item_table.columns and number % 3 == 0:
            body["filter"] = f"title like '{rng.choice('ABCDEST')}%'"
        ordinary.append(framed(body))
    hostile = [framed({"query_id": ids[0], "filter": one}) for one in HOSTILE_FILTERS]
    for value in HOSTILE_VALUES:
        hostile += [framed({"query_id": ids[0], name: {"device": value}}) for name in ("context", "features")]
    return ordinary, hostile


def run_hostile(address: str, artifact: SavedModel, folder: Path, others: list[Path], seconds: int) -> dict[str, Any]:
    """Alternate phases without and with hostile requests, `seconds` of each, during swaps and edits of the catalog."""
    ordinary, hostile = requests_for(artifact)
    phases = max(2, round(seconds / 30))
    clients: dict[float, list[Client]] = {0.0: [], SHARE: []}
    memory, changes, done = list[list[float]](), {"swaps": 0, "edits": 0}, threading.Event()
    began = time.monotonic()

    def change() -> None:
        """Swap the model, remove an item from it, swap it again, and so on; the service detects the changes itself."""
        while not done.wait(5):
            if changes["swaps"] > changes["edits"]:
                retriever = Retriever.load(folder, exact=True)
                retriever.catalog.remove([artifact.items.ids[changes["edits"]]])
                save_changes(retriever.catalog, folder)
                changes["edits"] += 1
            else:
                replaced(folder, others[changes["swaps"] % len(others)])
                changes["swaps"] += 1
            resident = metrics(address)["process_resident_memory_bytes"] / 2**20
            memory.append([round(time.monotonic() - began), round(resident, 1)])

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for phase in range(phases):
            for share in (0.0, SHARE):
                client = Client(address, ordinary, hostile, share, phase)
                asyncio.run(client.run(seconds / phases))
                clients[share].append(client)
    finally:
        done.set()
        changer.join()
    outcomes = {
        name: value for name, value in metrics(address).items() if name.startswith("twotower_model_reloads_total")
    }
    return {
        "connections": CONNECTIONS,
        "phases of each": phases,
        "without": summary_of(clients[0.0], seconds),
        f"with {SHARE:.0%} hostile": summary_of(clients[SHARE], seconds),
        **changes,
        "reloads of the service": outcomes,
        "seconds_and_memory_mb": memory,
        "growth_mb_of_the_second_half": round(memory[-1][1] - memory[len(memory) // 2][1], 1),
    }


def summary_of(clients: list[Client], seconds: int) -> dict[str, Any]:
    """Summarize phases: requests, failures and latencies of each kind of request, over all phases together."""
    found: dict[str, Any] = {}
    for kind in ("ordinary", "hostile"):
        times = np.array([value for client in clients for value in client.milliseconds[kind]])
        if not len(times):
            continue
        found[kind] = {
            "requests": len(times),
            "failed": sum(client.failed[kind] for client in clients),
            "per_second": round(len(times) / seconds, 1),
            "milliseconds": {f"{q}%": round(float(np.percentile(times, q)), 2) for q in (50, 90, 99, 99.9)},
            "slowest": round(float(times.max()), 1),
        }
    # The 99th percentile of each phase shows how far two phases of the same kind differ.
    found["99% of each phase"] = [
        round(float(np.percentile(client.milliseconds["ordinary"], 99)), 1) for client in clients
    ]
    return found


def main() -> None:
    """Run the parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("other", type=Path, nargs="?", help="another model to swap with; default: a copy of the first")
    parser.add_argument("--parts", default="load,swaps,soak,hostile")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--soak", type=int, default=300)
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is missing: apt-get install wrk")
    artifact = SavedModel.load(chosen.model)
    found: dict[str, Any] = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {}
    found["about"] = {
        "catalog": {"queries": len(artifact.queries), "items": len(artifact.items), "k": 10},
        "epochs": artifact.metadata.get("training", {}).get("epochs"),  # searches cost the same whatever the weights
        "versions": library_versions(),
        "machine": {"processors": os.cpu_count(), "platform": platform.platform()},
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "load": "wrk -t1 over loopback, on the same processors as the service",
        "seed": "wrk's requests: the number of the round",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "ask.lua"
        script.write_text(LUA % ", ".join(f"'{one}'" for one in artifact.queries.ids.to_list()), encoding="utf-8")
        run = Path(scratch) / "served"
        shutil.copytree(
            chosen.model if (chosen.model / "metadata.json").exists() else chosen.model / "model", run / "model"
        )
        second = chosen.other or chosen.model
        others = [path if (path / "metadata.json").exists() else path / "model" for path in (second, chosen.model)]
        with service(run, "--watch", "0.25") as address:
            load(address, script, 16, 2, 0)  # warm
            for part in chosen.parts.split(","):
                if part == "load":
                    found[part] = run_load(address, script, chosen.rounds, chosen.seconds)
                    told = metrics(address)
                    sizes = (told[f'twotower_batch_size_{what}{{kind="recommend"}}'] for what in ("sum", "count"))
                    total, count = sizes
                    found[part]["requests in a batch, mean"] = round(total / count, 2)
                elif part == "swaps":
                    found[part] = run_swaps(address, script, run / "model", others, chosen.swaps)
                elif part == "hostile":
                    found[part] = run_hostile(address, artifact, run / "model", others, chosen.soak)
                    found[part]["date"] = datetime.now(UTC).isoformat(timespec="seconds")
                else:
                    found[part] = run_soak(address, script, chosen.soak)
                print(part, json.dumps(found[part], indent=1), flush=True)
                if chosen.json:
                    chosen.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = list(failures(found))
    if failed:
        sys.exit(f"requests failed: {failed}")


def failures(value: Any) -> Iterator[dict[str, Any]]:
    """Find the measurements with failed requests, at any depth."""
    if isinstance(value, dict):
        if value.get("failed"):
            yield value
        for one in value.values():
            yield from failures(one)


if __name__ == "__main__":
    main()

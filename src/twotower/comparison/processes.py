"""Training of the cells of a comparison, each in a separate process that runs `twotower train`.

With separate processes, peak memory and CPU time are measured per run, and a crash ends only one cell.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from twotower.comparison.cells import Cell, State
from twotower.distributed.launch import Coordinator, Launch
from twotower.errors import Interrupted
from twotower.system.filesystem import write_text
from twotower.system.parent import PARENT

#: Seconds between checks of the running processes.
_POLL = 0.1
#: Environment variables of torchrun, which a training process must not inherit.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class TrainingProcess:
    """A running training process."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path
    output: IO[bytes]
    begun: float = field(default_factory=time.monotonic)
    interrupts: int = 0  # number of interrupts sent to the process


def train_cells(
    source: str,
    cells: Sequence[Cell],
    fingerprint: str,
    out: Path,
    team: Coordinator,
    *,
    jobs: int,
    on_message: Callable[[str], None],
) -> None:
    """Train the unfinished cells, `jobs` at a time; with W ranks, each takes every W-th cell and waits for the others.

    Args:
        source: the data, as `twotower train` takes it.
        cells: all cells.
        fingerprint: fingerprint of the data.
        out: the folder of the comparison; the output of each process is written to `out/logs/`.
        team: the processes that share the cells.
        jobs: number of concurrent processes of each rank.
        on_message: receives progress messages.

    Raises:
        InputError: a run folder has different settings or different data; nothing is trained.
        Interrupted: Ctrl-C was pressed; each running process has written a checkpoint.
        RuntimeError: a training run failed; the others were finished first.
        RankLost: another rank has failed.
    """
    # The states decide which rank trains which cells, so all ranks must know them before any rank trains.
    states = team.all_at_once(lambda: {cell.label: cell.state(fingerprint) for cell in cells}, "states of the cells")
    waiting = [cell for cell in cells if states[cell.label] != "finished"]
    done = len(cells) - len(waiting)
    if done:
        on_message(f"{done} of {len(cells)} runs are already finished")
    own = waiting[team.ranks.rank :: team.ranks.size]
    failed: list[RuntimeError] = []

    def train() -> None:
        try:
            _train(source, own, states, out, cells, jobs=jobs, on_message=on_message)
        except RuntimeError as error:  # an error now would make torchrun end the runs of the other ranks
            failed.append(error)

    team.all_at_once(train, "cells")
    if team.ranks.agree(bool(failed)):
        raise failed[0] if failed else RuntimeError("runs of another rank failed; see its message for the reason")


def _train(
    source: str,
    waiting: list[Cell],
    states: Mapping[str, State],
    out: Path,
    cells: Sequence[Cell],
    *,
    jobs: int,
    on_message: Callable[[str], None],
) -> None:
    """Train the cells of one rank."""
    total = len(cells) if Launch.of_environment().size == 1 else len(waiting)
    running: list[TrainingProcess] = []
    durations: list[float] = []
    failed: list[str] = []
    with _count_interrupts() as stop, _terminate_on_exit(running):
        while (waiting and not stop()) or running:
            while waiting and len(running) < jobs and not stop():
                cell = waiting.pop(0)
                resume = states[cell.label] == "interrupted"
                running.append(_start(source, cell, out, resume=resume, jobs=jobs))
                number = total - len(waiting)
                left = _remaining_time(durations, running, waiting, jobs)
                on_message(f"[{number}/{total}] {cell.label}{' resumed' if resume else ''}{left}")
            time.sleep(_POLL)
            for one in running:  # after the first interrupt a process saves a checkpoint; a second one ends it
                while one.interrupts < stop():
                    one.process.send_signal(signal.SIGINT)
                    one.interrupts += 1
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                one.output.close()
                if one.process.returncode == 0:
                    durations.append(time.monotonic() - one.begun)
                elif not stop():
                    failed.append(f"{one.cell.label} ended with code {one.process.returncode}: {_last_line(one.log)}")
                    on_message(f"failed: {failed[-1]}")
    if stop():
        finished = sum((cell.directory / "results.json").exists() for cell in cells)
        raise Interrupted(f"interrupted; {finished} of {len(cells)} runs are finished")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(cells)} runs failed; {failed[0]} (full output in {out / 'logs'}); run the same "
            "command to retry, or drop the failing objectives to compare the rest"
        )


def _start(source: str, cell: Cell, out: Path, *, resume: bool, jobs: int) -> TrainingProcess:
    configs, logs = out / "configs", out / "logs"
    for folder in (configs, logs):
        folder.mkdir(parents=True, exist_ok=True)
    config = configs / f"{cell.directory.name}.yaml"
    write_text(config, cell.config.to_yaml())
    # `--force`: the folder may contain an aborted attempt at this cell.
    arguments = [
        "train",
        source,
        "--config",
        str(config),
        "--out",
        str(cell.directory),
        "--resume" if resume else "--force",
    ]
    log = logs / f"{cell.directory.name}.log"
    output = log.open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=_environment(jobs),
        start_new_session=True,  # Ctrl-C in the terminal reaches only this process, which forwards it
    )
    return TrainingProcess(cell, process, log, output)


def _environment(jobs: int) -> dict[str, str]:
    """Return the environment of a training process; concurrent processes share the cores, and ranks the devices."""
    launch = Launch.of_environment()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_RANKS and not name.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))
    }
    environment[PARENT] = str(os.getpid())
    if jobs * launch.local_size > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(cores // (jobs * launch.local_size), 1)))
    if launch.local_size > 1 and torch.cuda.is_available():
        count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(count)]
        environment["CUDA_VISIBLE_DEVICES"] = devices[launch.local_rank % len(devices)]
    return environment


@contextmanager
def _count_interrupts() -> Iterator[Callable[[], int]]:
    """Yield a function that returns how often Ctrl-C was pressed since the block began."""
    interrupts = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        del number, frame
        interrupts += 1

    previous: Any = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, handle)
        installed = True
    except ValueError:  # not the main thread: the caller handles interrupts
        installed = False
    try:
        yield lambda: interrupts
    finally:
        if installed:
            signal.signal(signal.SIGINT, previous)


@contextmanager
def _terminate_on_exit(running: Sequence[TrainingProcess]) -> Iterator[None]:
    """Terminate the processes that are still running when the block ends, for example after an error."""
    try:
        yield
    finally:
        for one in running:
            one.process.terminate()
            one.process.wait()


def _remaining_time(
    durations: Sequence[float], running: Sequence[TrainingProcess], waiting: Sequence[Cell], jobs: int
) -> str:
    if not durations:
        return ""
    each = sum(durations) / len(durations)
    rounds = -(-(len(running) + len(waiting)) // jobs)
    return f" (about {_duration(each * rounds)} left)"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"

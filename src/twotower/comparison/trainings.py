"""Train the cells of a comparison, each in a process of its own by the very command `twotower train`.

A process of its own makes peak memory and processor time those of the one training, and a crash ends one cell alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from twotower.comparison.cells import Cell
from twotower.errors import Interrupted
from twotower.files import write_text

#: Seconds between looks at the running processes.
_POLL = 0.1


@dataclass
class Training:
    """One running process."""

    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path
    output: IO[bytes]
    begun: float = field(default_factory=time.monotonic)
    asked: int = 0  # how often it was sent an interrupt


def train_cells(
    source: str, cells: Sequence[Cell], fingerprint: str, out: Path, *, jobs: int, say: Callable[[str], None]
) -> None:
    """Train what is not finished, `jobs` at a time.

    Args:
        source: the data, as `twotower train` takes it.
        cells: all cells.
        fingerprint: of the data.
        out: the folder of the comparison; `out/logs/` gets what each process printed.
        jobs: processes at once.
        say: told what begins and ends.

    Raises:
        InputError: a folder holds something else; nothing is trained then.
        Interrupted: Ctrl-C; each running process has left a checkpoint.
        RuntimeError: a training failed; the others were finished first.
    """
    states = {cell.label: cell.state(fingerprint) for cell in cells}
    waiting = [cell for cell in cells if states[cell.label] != "finished"]
    done = len(cells) - len(waiting)
    if done:
        say(f"{done} of {len(cells)} trainings are finished already")
    running: list[Training] = []
    lasted: list[float] = []
    failed: list[str] = []
    with _stop_asked() as stop, _none_left_behind(running):
        while (waiting and not stop()) or running:
            while waiting and len(running) < jobs and not stop():
                cell = waiting.pop(0)
                resume = states[cell.label] == "interrupted"
                running.append(_start(source, cell, out, resume=resume, jobs=jobs))
                number = len(cells) - len(waiting)
                left = _left(lasted, running, waiting, jobs)
                say(f"[{number}/{len(cells)}] {cell.label}{' goes on' if resume else ''}{left}")
            time.sleep(_POLL)
            for one in running:  # the first lets it finish its step and leave a checkpoint, a second ends it at once
                while one.asked < stop():
                    one.process.send_signal(signal.SIGINT)
                    one.asked += 1
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                one.output.close()
                if one.process.returncode == 0:
                    lasted.append(time.monotonic() - one.begun)
                elif not stop():
                    failed.append(f"{one.cell.label} ended with code {one.process.returncode}: {_last_line(one.log)}")
                    say(f"failed: {failed[-1]}")
    if stop():
        finished = sum((cell.directory / "results.json").exists() for cell in cells)
        raise Interrupted(f"interrupted; {finished} of {len(cells)} trainings are finished")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(cells)} trainings failed; {failed[0]} (all of it in {out / 'logs'}); the same "
            "command tries again; without the objectives that fail, it compares the rest"
        )


def _start(source: str, cell: Cell, out: Path, *, resume: bool, jobs: int) -> Training:
    configs, logs = out / "configs", out / "logs"
    for folder in (configs, logs):
        folder.mkdir(parents=True, exist_ok=True)
    config = configs / f"{cell.directory.name}.yaml"
    write_text(config, cell.config.to_yaml())
    # `--force`: the folder may hold the beginnings of this very cell.
    words = [
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
        [sys.executable, "-m", "twotower.cli", *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=_environment(jobs),
        start_new_session=True,  # Ctrl-C in the terminal reaches this process alone, which passes it on
    )
    return Training(cell, process, log, output)


def _environment(jobs: int) -> dict[str, str]:
    """Side by side, each process gets its share of the cores."""
    environment = dict(os.environ)
    if jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment.setdefault("OMP_NUM_THREADS", str(max(cores // jobs, 1)))
    return environment


@contextmanager
def _stop_asked() -> Iterator[Callable[[], int]]:
    """How often Ctrl-C was pressed since the block began."""
    asked = 0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        del number, frame
        asked += 1

    previous: Any = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, ask)
        mine = True
    except ValueError:  # not the main thread: an interrupt is the caller's to handle
        mine = False
    try:
        yield lambda: asked
    finally:
        if mine:
            signal.signal(signal.SIGINT, previous)


@contextmanager
def _none_left_behind(running: Sequence[Training]) -> Iterator[None]:
    """End what still runs, should this process fail."""
    try:
        yield
    finally:
        for one in running:
            one.process.terminate()
            one.process.wait()


def _left(lasted: Sequence[float], running: Sequence[Training], waiting: Sequence[Cell], jobs: int) -> str:
    if not lasted:
        return ""
    each = sum(lasted) / len(lasted)
    rounds = -(-(len(running) + len(waiting)) // jobs)
    return f" (about {_duration(each * rounds)} left)"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"

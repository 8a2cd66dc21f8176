"""Parallel workers of a study: processes that take trials from the same database."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from twotower.errors import InputError
from twotower.study.trials import StopRequest, StudyPlan, open_study, work
from twotower.system.hardware import cores
from twotower.system.terminal import plain

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

#: Seconds between checks of the workers.
_POLL = 0.2


def work_in_processes(
    plan: StudyPlan, workers: int, stop: StopRequest, on_trial: Callable[[FrozenTrial], None]
) -> None:
    """Run trials in several processes, which share the cores, until all processes have ended.

    Args:
        plan: the study.
        workers: number of processes.
        stop: the request to stop; it is passed on to the workers, which save a checkpoint of their trial.
        on_trial: receives every trial that ends.

    Raises:
        InputError: optuna is not installed.
        RuntimeError: a worker ended with an error, which it has printed; for example, training fails with the
            default settings.
    """
    study = open_study(plan.folder)
    seen = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(plan, number, max(cores() // workers, 1)), name=f"worker {number}")
        for number in range(workers)
    ]
    passed_on = False
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(_POLL)
            if stop.is_made and not passed_on:
                passed_on = True
                _interrupt(processes)
            for trial in study.get_trials(deepcopy=False):
                if trial.state.is_finished() and trial.number not in seen:
                    seen.add(trial.number)
                    on_trial(trial)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    if (failed := next((one for one in processes if one.exitcode), None)) is not None and not stop.is_made:
        raise RuntimeError(f"{failed.name} ended with code {failed.exitcode}; run the same command again to resume")


def _interrupt(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGINT)


def _worker(plan: StudyPlan, number: int, threads: int) -> None:
    import torch  # noqa: PLC0415  # in the worker alone

    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal reaches only the parent, which passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    stop = StopRequest()
    with stop.listening():
        try:
            work(plan, stop, worker=number)
        except InputError as error:
            print(plain(f"twotower: {error}"), file=sys.stderr)
            sys.exit(2)


def _end_with_parent() -> None:
    """End this process if its parent is killed, because the next `twotower tune` resumes the trial in a new process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""Quality of a sequence preset on MovieLens-1M (leave-one-out protocol) within a budget of CPU time.

    python benchmarks/sequence.py --data ../shared/data --preset sasrec-large --seed 0 --cpu-seconds 7200

Test target: the last item of every user. Validation target: the second last item of the 512 users that the protocol
names. All 3,416 items are ranked, excluding the history. The validation users are ranked after every epoch, and the
weights with the best validation are tested. The best weights within the first 600 s of CPU time are also tested.
Nothing is selected by test results.

The learning rate depends on the CPU time spent: it warms up over 100 steps, stays constant, and decays linearly to a
twentieth over the last two fifths of the budget. Only CPU time of training steps counts, over all threads; validation
is counted separately. The state is saved after every epoch, so the same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twotower.system.tuning import tune

tune()  # before the first large tensors are made

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import twotower as tt  # noqa: E402
from twotower import evaluation  # noqa: E402
from twotower.config.run import Config  # noqa: E402
from twotower.data import Holdout, KnownPositives, SequenceBatches  # noqa: E402
from twotower.objectives.build import build_objective, needs_known_positives  # noqa: E402
from twotower.ranking.tower_ranker import TowerRanker  # noqa: E402
from twotower.serving.model_folder import library_versions  # noqa: E402
from twotower.system.filesystem import write_text  # noqa: E402
from twotower.towers import TwoTower, build_towers  # noqa: E402
from twotower.training import compute_loss  # noqa: E402
from twotower.training.checkpoint.io import SafeCheckpointIO, random_state, restore_random_state  # noqa: E402
from twotower.training.optimizer import TableOptimizer, parameter_groups  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "sequence.json"
WARMUP_STEPS = 100
#: Share of the budget after which the learning rate decays, and its final factor.
STEADY, LEAST = 0.6, 0.05
#: CPU seconds of the early result: five minutes on two cores.
EARLY = 600.0


class Run:
    """A training run: the model, its optimizer, and its progress.

    Args:
        split: the data, split.
        config: the preset with its overrides.
        budget: CPU seconds.
        folder: folder of the saved state.
    """

    def __init__(self, split: tt.Split, config: Config, budget: float, folder: Path) -> None:
        self.split, self.config, self.budget, self.folder = split, config, budget, folder
        train, training = split.train, config.training
        torch.manual_seed(training.seed)
        self.towers = build_towers(config, num_queries=train.num_queries, num_items=train.num_items)
        self.averaged = copy.deepcopy(self.towers).requires_grad_(False)
        self.objective = build_objective(config, train)
        self.known = KnownPositives(train) if needs_known_positives(config) else None
        self.batches = SequenceBatches(
            train, int(training.batch_size), history_length=config.history_length, seed=training.seed
        )
        groups = parameter_groups(
            nn.ModuleList([self.towers, self.objective]), training.weight_decay, lr=training.learning_rate
        )
        self.optimizer = TableOptimizer(groups, lr=training.learning_rate)
        self.step, self.spent, self.validating = 0, 0.0, 0.0
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.early: dict[str, float] = {}

    def train_epoch(self) -> None:
        """Train one epoch, or until the budget is spent."""
        self.towers.train()
        started, before = time.process_time(), self.spent
        total = 0.0
        first = self.step
        for batch in self.batches:
            rate = self.config.training.learning_rate * self._factor()
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.training.precision == "bf16-mixed"):
                loss, _, _ = compute_loss(self.towers, self.objective, batch, known_positives=self.known)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self._average()
            total += float(loss.detach())
            self.spent = before + time.process_time() - started
            if self.spent >= self.budget:
                break
        self.loss = total / (self.step - first)

    def validate(self) -> dict[str, float]:
        """Rank the validation users; save the weights if they are the best so far."""
        started = time.process_time()
        values = self.measure(self.kept, self.split.validation)
        self.validating += time.process_time() - started
        row = {"epoch": len(self.curve) + 1, "steps": self.step, "cpu_seconds": round(self.spent, 1), "loss": self.loss}
        if not self.curve or values["NDCG@10"] > max(past["NDCG@10"] for past in self.curve):
            self.best = {name: value.clone() for name, value in self.kept.state_dict().items()}
        self.curve.append({**row, **values})
        return self.curve[-1]

    def test(self) -> dict[str, float]:
        """Rank the test users with the weights that were best in validation."""
        towers = copy.deepcopy(self.towers)
        towers.load_state_dict(self.best)
        return self.measure(towers, self.split.test)

    @property
    def kept(self) -> TwoTower:
        """Return the weights to evaluate."""
        return self.averaged if self.config.training.weight_average else self.towers

    def measure(self, towers: TwoTower, holdout: Holdout) -> dict[str, float]:
        """Measure HR@10, NDCG@10 and coverage@10 over the full catalog."""
        ranker = TowerRanker(towers, self.config.history_length)
        values = evaluation.evaluate(ranker, holdout, train=self.split.train, ks=(10,), baselines=False)["model"].values
        return {name: round(float(values[name]), 5) for name in ("NDCG@10", "HR@10", "coverage@10")}

    def save(self) -> None:
        """Save everything needed to resume, atomically."""
        state = {
            "towers": self.towers.state_dict(),
            "averaged": self.averaged.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "random": random_state(),
            "told": [self.step, self.spent, self.validating, self.curve, self.early],
        }
        SafeCheckpointIO().save_checkpoint(state, self.folder)

    def restore(self) -> None:
        """Resume from the saved state."""
        state = SafeCheckpointIO().load_checkpoint(self.folder)
        self.towers.load_state_dict(state["towers"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self.best = state["best"]
        self.step, self.spent, self.validating, self.curve, self.early = state["told"]
        restore_random_state(state["random"])

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.config.training.weight_average, self.step / (self.step + 9))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.towers.parameters()), 1.0 - keep)

    def _factor(self) -> float:
        left = 1.0 - min(max(self.spent / self.budget - STEADY, 0.0) / (1.0 - STEADY), 1.0)
        return min((self.step + 1) / WARMUP_STEPS, 1.0) * (LEAST + (1.0 - LEAST) * left)


def told(run: Run, asked: argparse.Namespace, *, test: dict[str, float] | None) -> dict[str, Any]:
    """Return the entry of the run in the results."""
    code = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    best = max(run.curve, key=lambda row: row["NDCG@10"])
    return {
        "data": "ml-1m-loo",
        "preset": asked.preset,
        "overrides": asked.overrides,
        "seed": run.config.training.seed,
        "budget_cpu_seconds": asked.cpu_seconds,
        "cpu_seconds": round(run.spent, 1),
        "validation_cpu_seconds": round(run.validating, 1),
        "finished": run.spent >= run.budget,
        "epochs": len(run.curve),
        "steps": run.step,
        "best_validation": best,
        "test": test,
        f"test_of_the_best_within_{EARLY:.0f}_cpu_seconds": run.early or None,
        "curve": run.curve,
        "config": run.config.model_dump(mode="json"),
        "time": "processor time of all threads of training steps, not wall time: the machine was shared",
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "machine": platform.processor() or platform.machine(),
        "code": code.stdout.strip() or None,
        "date": datetime.now(UTC).date().isoformat(),
    }


def keep(entry: dict[str, Any], path: Path) -> None:
    """Put a run into the results, replacing an older entry of the same run."""
    same = ("preset", "overrides", "seed", "budget_cpu_seconds")
    # Read again: another process may have written in between.
    others = json.loads(path.read_text()) if path.exists() else []
    others = [other for other in others if any(other[name] != entry[name] for name in same)]
    write_text(path, json.dumps([*others, entry], indent=1))


def main() -> None:
    """Train or resume until the budget is spent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--preset", default="sasrec-large")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cpu-seconds", type=float, default=7200.0, help="budget of CPU time; 7200 is an hour on two cores"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--state", type=Path, required=True, help="folder of this run's state")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--test-now", action="store_true", help="stop now and test the best weights so far")
    asked = parser.parse_args()
    data = tt.Interactions.read(asked.data / "ml-1m-loo" / "sequences.parquet")
    split = tt.splits.leave_last_out(data, validation_queries="validation_user")
    config = Config.load(asked.preset, [f"training.seed={asked.seed}", *asked.overrides])
    run = Run(split, config, asked.cpu_seconds, asked.state / "state")
    if run.folder.exists():
        run.restore()
        print(f"resumed after {run.spent:.0f} s", flush=True)
    while run.spent < run.budget and not asked.test_now:
        run.train_epoch()
        row = run.validate()
        if not run.early and run.spent + row["cpu_seconds"] / row["epoch"] > EARLY:
            run.early = run.test()
        run.save()
        print({name: round(value, 4) for name, value in row.items()}, flush=True)
        keep(told(run, asked, test=None), asked.results)
    entry = told(run, asked, test=run.test())
    keep(entry, asked.results)
    print(f"best validation {entry['best_validation']}, test {entry['test']}, early {run.early}", flush=True)


if __name__ == "__main__":
    main()

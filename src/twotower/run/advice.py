"""Settings to try on the data of a run if its model does not beat the baselines."""

from __future__ import annotations

from dataclasses import replace

from twotower.config.run import Config
from twotower.evaluation import Evaluation


def settings_to_try(config: Config, num_items: int | None = None) -> tuple[str, ...]:
    """List overrides for `--set` that this configuration does not have yet, most promising first.

    If a model was trained on the next item although the split asks a different question, the advice is to train for
    the question of the split. Models for other questions are linear by default; for them the advice is the recent
    prior, the linear start with a small learning rate (so that the initial weights are not lost), and a larger D, up to
    N. For all other models it is a higher learning rate for the tables, which was never worse on small data.

    Args:
        config: the settings of the model, as they were resolved for its run.
        num_items: N, the size of the catalog; None if it is not known.
    """
    training, item = config.training, config.item_tower
    # Models of older versions have "auto" in their settings and were trained on the next item.
    if training.question in ("auto", "next"):
        only_next = config.reads_sequences or config.objective.is_grouped or config.data.events is not None
        if config.data.split in ("time", "random") and not only_next and config.data.query_text is None:
            return ("training.question=auto",)
        factor = training.table_learning_rate_factor
        faster = training.table_optimizer == "adam" and (factor == "auto" or factor < 5)
        return ("training.table_learning_rate_factor=5",) if faster else ()
    tried = {
        "training.recent_prior=true": training.question == "horizon" and not training.recent_prior,
        "training.start=linear": training.start == "random",
        "training.learning_rate=1e-4": training.learning_rate > 1e-4,
        f"item_tower.dimension={2 * item.dimension}": item.dimension <= min(256, (num_items or 512) // 2),
    }
    return tuple(setting for setting, applies in tried.items() if applies)


def with_advice(measured: Evaluation, config: Config) -> Evaluation:
    """Add the settings to try, and the command that searches for better ones, to an evaluation.

    The evaluation prints them if the model does not beat the best baseline.
    """
    split = "" if config.data.split == "time" else f" --set data.split={config.data.split}"
    command = f"twotower tune DATA --out NEW_DIR --budget 30m{split}"
    return replace(measured, advice=settings_to_try(config, measured.num_items), command=command)

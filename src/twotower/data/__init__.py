"""Reading data, features, histories, splits, batches and known data sets."""

from twotower.data import datasets, splits
from twotower.data.account import Account
from twotower.data.batches import Batch, GroupedBatches, TrainingBatches
from twotower.data.histories import gather_histories, ragged_histories
from twotower.data.holdouts import Holdout
from twotower.data.interactions import Interactions
from twotower.data.known import KnownPositives
from twotower.data.packing import Packed
from twotower.data.parts import from_parts
from twotower.data.sequences import SequenceBatches
from twotower.data.splits import Split, by_time, held_out_queries, leave_last_out
from twotower.ids import Hashed

__all__ = [
    "Account",
    "Batch",
    "GroupedBatches",
    "Hashed",
    "Holdout",
    "Interactions",
    "KnownPositives",
    "Packed",
    "SequenceBatches",
    "Split",
    "TrainingBatches",
    "by_time",
    "datasets",
    "from_parts",
    "gather_histories",
    "held_out_queries",
    "leave_last_out",
    "ragged_histories",
    "splits",
]

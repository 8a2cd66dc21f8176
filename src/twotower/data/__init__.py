"""Reading, preparing, splitting and loading of interactions, and the known data sets."""

from twotower.data import datasets, splits
from twotower.data.eligible_rows import with_eligibility
from twotower.data.events import with_events
from twotower.data.impressions import with_impressions
from twotower.data.interactions import Interactions
from twotower.data.loading.batches import Batch, GroupedBatches, TrainingBatches
from twotower.data.loading.histories import KnownPositives, gather_histories, ragged_histories
from twotower.data.loading.packing import Packed
from twotower.data.loading.passed_over import PassedOver
from twotower.data.loading.sequences import SequenceBatches
from twotower.data.loading.slates import Slates
from twotower.data.query_text import with_query_text
from twotower.data.schema.account import Account
from twotower.data.schema.vocabulary import Hashed
from twotower.data.splits.exposure import ExposureLog, exposure_log
from twotower.data.splits.from_files import Parts, from_parts
from twotower.data.splits.holdout import Holdout
from twotower.data.splits.protocols import Split, by_time, held_out_queries, leave_last_out, random_rows, rolling

__all__ = [
    "Account",
    "Batch",
    "ExposureLog",
    "GroupedBatches",
    "Hashed",
    "Holdout",
    "Interactions",
    "KnownPositives",
    "Packed",
    "Parts",
    "PassedOver",
    "SequenceBatches",
    "Slates",
    "Split",
    "TrainingBatches",
    "by_time",
    "datasets",
    "exposure_log",
    "from_parts",
    "gather_histories",
    "held_out_queries",
    "leave_last_out",
    "ragged_histories",
    "random_rows",
    "rolling",
    "splits",
    "with_eligibility",
    "with_events",
    "with_impressions",
    "with_query_text",
]

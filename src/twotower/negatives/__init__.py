"""Candidates and their expected counts: frequencies, proposals, sources and the pool that joins them."""

from twotower.negatives import corrections
from twotower.negatives.candidates import Candidates
from twotower.negatives.eligibility import EligibleItems, SampledWithinGroup
from twotower.negatives.frequency import (
    CountedFrequency,
    Frequency,
    FrequencyReport,
    GroupedFrequency,
    StreamingFrequency,
    compare_frequencies,
    popularity_deciles,
)
from twotower.negatives.guard import Guard
from twotower.negatives.hard_negatives import HardNegatives
from twotower.negatives.masks import NegativeMask
from twotower.negatives.pool import Pool
from twotower.negatives.proposals import FrequencyPower, IndexStream, LogUniform, Proposal, Uniform, Weighted
from twotower.negatives.sources import (
    Catalog,
    CrossBatchMemory,
    DrawRequest,
    Head,
    InBatch,
    Observed,
    RandomSource,
    Sampled,
    Source,
    Stratum,
)

__all__ = [
    "Candidates",
    "Catalog",
    "CountedFrequency",
    "CrossBatchMemory",
    "DrawRequest",
    "EligibleItems",
    "Frequency",
    "FrequencyPower",
    "FrequencyReport",
    "GroupedFrequency",
    "Guard",
    "HardNegatives",
    "Head",
    "InBatch",
    "IndexStream",
    "LogUniform",
    "NegativeMask",
    "Observed",
    "Pool",
    "Proposal",
    "RandomSource",
    "Sampled",
    "SampledWithinGroup",
    "Source",
    "Stratum",
    "StreamingFrequency",
    "Uniform",
    "Weighted",
    "compare_frequencies",
    "corrections",
    "popularity_deciles",
]

"""Candidates and their expected counts: frequencies, proposals, sources, and the pool that combines sources."""

from twotower.negatives import corrections
from twotower.negatives.always import Catalog, Head, Mined, Observed
from twotower.negatives.candidates import Candidates
from twotower.negatives.frequency import CountedFrequency, Frequency, GroupedFrequency
from twotower.negatives.hits import Hits
from twotower.negatives.memory import CrossBatchMemory
from twotower.negatives.pool import Pool
from twotower.negatives.proposals import FrequencyPower, IndexStream, LogUniform, Proposal, Uniform, Weighted
from twotower.negatives.sources import InBatch, RandomSource, Request, Sampled, Source
from twotower.negatives.streaming import FrequencyReport, StreamingFrequency, compare_frequencies, popularity_deciles

__all__ = [
    "Candidates",
    "Catalog",
    "CountedFrequency",
    "CrossBatchMemory",
    "Frequency",
    "FrequencyPower",
    "FrequencyReport",
    "GroupedFrequency",
    "Head",
    "Hits",
    "InBatch",
    "IndexStream",
    "LogUniform",
    "Mined",
    "Observed",
    "Pool",
    "Proposal",
    "RandomSource",
    "Request",
    "Sampled",
    "Source",
    "StreamingFrequency",
    "Uniform",
    "Weighted",
    "compare_frequencies",
    "corrections",
    "popularity_deciles",
]

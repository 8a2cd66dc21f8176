"""Candidates and their expected counts: frequencies, proposals, sources and the pool that joins them."""

from twotower.negatives.candidates import Candidates, Pool
from twotower.negatives.frequency import CountedFrequency, Frequency
from twotower.negatives.proposals import Proposal, Uniform
from twotower.negatives.sources import InBatch, Request, Sampled, Source

__all__ = [
    "Candidates",
    "CountedFrequency",
    "Frequency",
    "InBatch",
    "Pool",
    "Proposal",
    "Request",
    "Sampled",
    "Source",
    "Uniform",
]

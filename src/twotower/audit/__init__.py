"""Bias and variance of the objective that trained a model, measured against the full softmax."""

from twotower.audit.appearances import Appearance, appearances
from twotower.audit.audit import Audit, ObjectiveAudit, audit
from twotower.audit.gradients import AuditedRows, Measurement, estimates_softmax, measure
from twotower.audit.masks import MaskAudit, audit_masks
from twotower.audit.partition import PartitionError, partition_error
from twotower.audit.subject import Subject, TrainingRun, subject_of
from twotower.audit.suggest import Suggestion, suggest

__all__ = [
    "Appearance",
    "Audit",
    "AuditedRows",
    "MaskAudit",
    "Measurement",
    "ObjectiveAudit",
    "PartitionError",
    "Subject",
    "Suggestion",
    "TrainingRun",
    "appearances",
    "audit",
    "audit_masks",
    "estimates_softmax",
    "measure",
    "partition_error",
    "subject_of",
    "suggest",
]

"""Audits of trained models and statistics of comparisons."""

from twotower.analysis.appearances import Appearance, appearances
from twotower.analysis.audit import Audit, ObjectiveAudit, audit
from twotower.analysis.gradients import estimates_softmax, measure
from twotower.analysis.measurement import AuditedRows, Measurement
from twotower.analysis.study import Study, study
from twotower.analysis.subject import Subject, subject_of
from twotower.analysis.suggest import Suggestion, suggest

__all__ = [
    "Appearance",
    "Audit",
    "AuditedRows",
    "Measurement",
    "ObjectiveAudit",
    "Study",
    "Subject",
    "Suggestion",
    "appearances",
    "audit",
    "estimates_softmax",
    "measure",
    "study",
    "subject_of",
    "suggest",
]

"""Continued training on new data: inheritance from the parent model, and the joining of old and new data.

`warm_start` imports the trainer, which loads slowly, so import `warm_start` only where it is needed.
"""

from twotower.incremental.lineage import contexts_of, lineage, saved_rows_of, split_again
from twotower.incremental.parent import ParentModel, new_days, parent_of
from twotower.incremental.settings import inherit_settings, require_continued, rows_to_learn

__all__ = [
    "ParentModel",
    "contexts_of",
    "inherit_settings",
    "lineage",
    "new_days",
    "parent_of",
    "require_continued",
    "rows_to_learn",
    "saved_rows_of",
    "split_again",
]

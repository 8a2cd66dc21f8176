"""Training that goes on with a model on new days: what is taken over from the model, and what it is joined with.

`growth` imports the trainer, which is slow to load: import it where it is needed.
"""

from twotower.continuing.keeping import contexts_of, lineage, rows_of, split_again
from twotower.continuing.parent import Parent, new_days, parent_of
from twotower.continuing.settings import checked, rows_to_learn, settled

__all__ = [
    "Parent",
    "checked",
    "contexts_of",
    "lineage",
    "new_days",
    "parent_of",
    "rows_of",
    "rows_to_learn",
    "settled",
    "split_again",
]

"""Training runs that are stopped between two epochs, as by Ctrl-C."""

from contextlib import contextmanager

import pytest

from twotower.errors import Interrupted
from twotower.training.callbacks import Checkpoints, StopBetweenSteps


@contextmanager
def stopped_after_first_epoch(part=None):
    """Expect that the run in the block is stopped after its first epoch; `part`: only in this folder of the run."""
    written = Checkpoints.on_train_epoch_end

    def stop(self, trainer, pl_module):
        written(self, trainer, pl_module)
        if trainer.current_epoch == 0 and (part is None or part in self.last.parts):
            next(one for one in trainer.callbacks if isinstance(one, StopBetweenSteps)).requested = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_epoch_end", stop)
        with pytest.raises(Interrupted):
            yield

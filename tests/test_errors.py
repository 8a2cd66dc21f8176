"""Flags given in Python: a text or a number is rejected before anything is read, computed or replaced."""

import numpy as np
import pytest

import twotower as tt
from twotower.config.run import Config
from twotower.errors import InputError, require_flags
from twotower.run.run_folder import train_run
from twotower.serving.batch import recommend_file


@pytest.mark.parametrize("wrong", ["no", "false", "", 0, 1, None, [], np.int64(1)])
def test_only_true_and_false_are_flags(wrong):
    with pytest.raises(InputError, match="exclude_seen: expected True or False, found"):
        require_flags(exclude_seen=wrong)
    require_flags(exclude_seen=True, force=np.bool_(False))


def test_commands_reject_other_values_before_they_touch_a_file(tmp_path):
    target = tmp_path / "out.csv"
    target.write_text("kept")
    with pytest.raises(InputError, match="force: expected True or False"):
        recommend_file(None, "missing.csv", target, force="no")
    with pytest.raises(InputError, match="replace: expected True or False"):
        train_run("missing.csv", tmp_path, Config(), replace="no")
    with pytest.raises(InputError, match="resume: expected True or False"):
        tt.fit(None, resume="no")
    assert target.read_text() == "kept"

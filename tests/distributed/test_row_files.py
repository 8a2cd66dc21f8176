"""Tests of tensors left in their files, and of tables that ranks grow from them, each reading only its own rows."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import RowShard
from twotower.distributed.row_files import stack_rows, stored_tensors
from twotower.errors import InputError
from twotower.incremental.warm_start import continue_optimizer, copy_old_rows
from twotower.training.checkpoint.codec import parts_in
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.checkpoint.lazy import open_checkpoint
from twotower.training.checkpoint.parts import OFFSETS, PLACE
from twotower.training.optimizer import TableOptimizer


class Asked:
    """A stored tensor that records which rows were read."""

    def __init__(self, rows):
        self.rows, self.asked = rows, torch.zeros(len(rows), dtype=torch.bool)

    shape = property(lambda self: self.rows.shape)
    dtype = property(lambda self: self.rows.dtype)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.asked[index] = True
        return self.rows[index]


def test_rows_of_a_file_equal_those_of_its_tensors(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "table": torch.randn(11, 3),
        "half": torch.randn(7, 5).bfloat16(),
        "sum": torch.randn(9),
        "codes": torch.randint(0, 99, (4, 2)),
        "mask": torch.rand(6) > 0.5,
        "step": torch.tensor(3.0),
        "nothing": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "some.safetensors")
    found, _ = stored_tensors(tmp_path / "some.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert torch.equal(found[name][...], tensor), name
        if tensor.ndim and len(tensor):
            rows = torch.tensor([len(tensor) - 1, 0, 2, 0])
            assert torch.equal(found[name][rows], tensor[rows]) and torch.equal(found[name][1:3], tensor[1:3]), name
            with pytest.raises(IndexError):
                found[name][torch.tensor([len(tensor)])]
    (tmp_path / "some.safetensors").write_bytes((tmp_path / "some.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"some.safetensors: .* bytes, expected"):
        stored_tensors(tmp_path / "some.safetensors")


def test_the_metadata_lists_a_tensor_with_two_names(tmp_path):
    model = nn.ModuleDict({"one": nn.Embedding(3, 2)})
    model["other"] = model["one"]
    save_model(model, str(tmp_path / "tied.safetensors"))
    found, named = stored_tensors(tmp_path / "tied.safetensors")
    (other,) = (name for name in named if name not in found and named[name] in found)
    assert torch.equal(found[named[other]][...], model.state_dict()[other])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_parts_of_a_grown_table_form_the_whole_and_read_no_other_rows(tmp_path, size, dtype):

    def drawn(*shape):
        values = torch.randn(shape)
        return values > 0 if dtype == torch.bool else values.to(dtype)

    torch.manual_seed(size)
    old, total, padding = 20, 33, 1
    new_codes = torch.randperm(total - padding)[:old]  # in any order, and two rows are removed
    new_codes[[4, 17]] = -1
    save_file({"old": drawn(old + padding, 3)}, tmp_path / "old.safetensors")
    stored = stored_tensors(tmp_path / "old.safetensors")[0]["old"]
    fresh = drawn(total, 3)
    expected = fresh.clone()
    for code, new in [*enumerate(new_codes.tolist()), (old, total - 1)]:
        if new >= 0:
            expected[new] = expected[new] | stored[code : code + 1][0] if dtype == torch.bool else stored[...][code]
    whole = fresh.clone()
    copy_old_rows(whole, stored, new_codes)
    assert torch.equal(whole, expected) and not torch.equal(whole, fresh)
    to = torch.cat([new_codes, torch.tensor([total - 1])])
    for rank in range(size):
        ranks = Communicator(rank, size)
        for part in (RowShard(ranks, total), RowShard(ranks, total, 1)):
            rows = part.own
            own, asked = fresh[rows].clone(), Asked(stored)
            copy_old_rows(own, asked, new_codes, part)
            assert torch.equal(own, expected[rows])
            assert torch.equal(asked.asked, (to >= rows.start) & (to < rows.stop))


@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
def test_the_optimizer_state_of_a_part_is_transferred(rule):
    old, total, width = 6, 9, 4
    new_codes = torch.tensor([0, 3, -1, 8, 2, 5])
    states = {"sum": torch.rand(old)} if rule != "adam" else {n: torch.rand(old, width) for n in ("mean", "variance")}
    group = {"params": [0], "rule": rule}
    saved = {"param_groups": [group], "state": {0: {"step": torch.tensor(7.0), **states}}}
    for rank in range(3):
        ranks = Communicator(rank, 3)
        for part in (None, RowShard(ranks, total), RowShard(ranks, total, 1)):
            rows = slice(None) if part is None else part.own
            parameter = nn.Parameter(torch.zeros(total, width)[rows].clone())
            optimizer = TableOptimizer([{"params": [parameter], "rule": rule}], lr=0.1)
            maps, parts = {id(parameter): new_codes}, {} if part is None else {id(parameter): part}
            assert continue_optimizer(optimizer, saved, maps, parts) == (1, 1)
            found = optimizer.state[parameter]
            assert found.keys() == {"step", *states} and float(found["step"]) == 7
            for name, state in states.items():
                whole = torch.zeros(total, *state.shape[1:])
                for code, new in enumerate(new_codes.tolist()):
                    if new >= 0:
                        whole[new] = state[code]
                assert torch.equal(found[name], whole[rows]), (part, name)


@pytest.mark.parametrize("kept", ["adam.row-wise.2.ckpt", "rowwise-adagrad.row-wise.3.ckpt", "adam.by table.2.ckpt"])
def test_an_opened_checkpoint_equals_the_loaded_one(done_by_ranks, tmp_path, kept):
    read, opened = SafeCheckpointIO().load_checkpoint(done_by_ranks / kept), open_checkpoint(done_by_ranks / kept)
    assert opened["state_dict"].keys() == read["state_dict"].keys()
    for name, tensor in read["state_dict"].items():
        assert torch.equal(opened["state_dict"][name][...], tensor), name
        if tensor.ndim == 2 and len(tensor) > 3:
            assert torch.equal(opened["state_dict"][name][torch.tensor([3, 1])], tensor[[3, 1]]), name
    expected, found = (one["optimizer_states"][0]["state"] for one in (read, opened))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n][name][...], value) for n in expected for name, value in expected[n].items())
    shutil.copytree(done_by_ranks / kept, tmp_path / kept)
    sorted((tmp_path / kept / "tables").iterdir())[-1].unlink()
    with pytest.raises(InputError, match=r"tables/.*: missing"):
        open_checkpoint(tmp_path / kept)
    (tmp_path / kept / "SHA256SUMS").unlink()  # as in older versions
    with pytest.raises(
        InputError, match=rf"{kept}: not a readable checkpoint .* of the \d+ (rows|columns) of .* is missing"
    ):
        open_checkpoint(tmp_path / kept)


def test_parts_with_gaps_are_refused(tmp_path):
    save_file({"rows": torch.ones(4, 2)}, tmp_path / "part.safetensors")
    rows = stored_tensors(tmp_path / "part.safetensors")[0]["rows"]
    assert len(stack_rows("rows", torch.Size([8, 2]), [(4, rows), (0, rows)])) == 8
    for first in (3, 5):
        with pytest.raises(ValueError, match="of the 8 rows of rows"):
            stack_rows("rows", torch.Size([8, 2]), [(0, rows), (first, rows)])


def test_columns_in_a_checkpoint_of_an_older_version_are_read(done_by_ranks, tmp_path):
    """Older versions also split tables by columns; here one of the files of a table is replaced by two such parts."""
    kept = tmp_path / "old.ckpt"
    shutil.copytree(done_by_ranks / "adam.row-wise.2.ckpt", kept)
    expected = SafeCheckpointIO().load_checkpoint(kept)
    (kept / "SHA256SUMS").unlink()
    stored = dict(parts_in(json.loads((kept / "state.json").read_text())))
    name = next(name for name, one in stored.items() if one.table == "item" and len(one.shape) == 2)
    files = [file for file in sorted((kept / "tables").iterdir()) if name in stored_tensors(file)[0]]
    whole = torch.cat([load_file(file)[name] for file in files])
    for file in files:
        file.unlink()
    for number, first in enumerate((0, 3)):
        columns = whole[:, first : 3 + 5 * number].contiguous()
        place = {PLACE: json.dumps({name: {OFFSETS: [0, first]}})}
        save_file({name: columns}, kept / "tables" / f"shard-0000{number}-model-00009-of-00009.safetensors", place)
    found, opened = SafeCheckpointIO().load_checkpoint(kept)["state_dict"], open_checkpoint(kept)["state_dict"]
    for key, value in expected["state_dict"].items():
        assert torch.equal(found[key], value) and torch.equal(opened[key][...], value), key

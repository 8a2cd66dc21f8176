"""Tests of sharded tables against whole ones: initialization, checkpoints, search, model folder, placement."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import cases
import tables

from twotower.config.run import Config
from twotower.distributed.communicator import Communicator
from twotower.distributed.partition import BLOCK, RowShard, fill_normal, placed_tables
from twotower.errors import InputError
from twotower.index import ExactIndex
from twotower.index.ties import merge_best
from twotower.serving import SavedModel
from twotower.system import hardware
from twotower.towers import EmbeddingTable, build_towers
from twotower.towers.sharded_lookup import move_to_tables
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.placement import place_tables

pytestmark = pytest.mark.timeout(1000)  # a busy machine


@pytest.mark.parametrize(("rows", "width"), [(5, 3), (4, 4), (1001, 7), (BLOCK // 4 + 5, 5)])
def test_parts_of_a_table_are_initialized_as_the_whole(rows, width):
    torch.manual_seed(2)
    whole = torch.empty(rows, width)
    fill_normal(whole, 0.3)
    after = torch.rand(2)
    for size in (2, 3, 7):
        for rank in range(size):
            ranks = Communicator(rank, size)
            for part in (RowShard(ranks, rows), RowShard(ranks, rows, size - 1)):
                expected = whole[part.own]
                torch.manual_seed(2)
                own = torch.full(expected.shape, torch.nan)
                fill_normal(own, 0.3, part)
                assert torch.equal(own, expected)
                assert torch.equal(torch.rand(2), after)


def test_parts_cover_the_whole_once():
    for rows in (0, 1, 2, 4, 7, 100):
        for size in (2, 3, 5):
            for holder in (None, 1):
                held = torch.zeros(rows)
                for rank in range(size):
                    held[RowShard(Communicator(rank, size), rows, holder).own] += 1
                assert bool((held == 1).all())


def test_looking_up_a_row_that_was_not_fetched_is_an_error():
    ranks = Communicator(1, 2)
    with placed_tables({"item": RowShard(ranks, 10)}):
        table, whole = EmbeddingTable(10, 4, name="item"), EmbeddingTable(10, 4)
        with pytest.raises(ValueError, match="placed with 10 rows, created with 11"):
            EmbeddingTable(11, 4, name="item")
    assert table.weight.shape == (5, 4) and whole.weight.shape == (10, 4)
    with torch.no_grad():
        assert torch.equal(table(torch.tensor([5, 9])), table.weight[[0, 4]])
        with pytest.raises(RuntimeError, match="before they were fetched"):
            table(torch.tensor([4]))
    with pytest.raises(RuntimeError, match="before they were fetched"):
        table(torch.tensor([5]))  # a gradient would be lost
    assert EmbeddingTable(10, 4, name="item").part is None


def test_layers_move_to_the_device_of_the_tables_before_they_rank():
    """TorchRec's tables are on the device of training from the start; "meta" stands for it."""
    config = Config.load(None, ["item_tower.dimension=8", "query_tower.hidden=[6]"])
    towers = build_towers(config, num_queries=5, num_items=9)
    move_to_tables(towers)
    assert {one.device.type for one in towers.parameters()} == {"cpu"}, "no table is shared"
    table = towers.item_tower.ids
    table.part, table.weight = RowShard(Communicator(), 9), torch.nn.Parameter(table.weight.to("meta"))
    before = table.weight
    move_to_tables(towers)
    assert {one.device.type for one in (*towers.parameters(), *towers.buffers())} == {"meta"}
    assert table.weight is before


@pytest.mark.parametrize("placement", tables.PLACEMENTS)
@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
@pytest.mark.parametrize("size", [2, 3])
def test_one_process_reads_a_checkpoint_of_several(done_by_ranks, rule, placement, size):
    towers = tables.model(Communicator())
    expected = tables.tensors(tables.checkpoint(towers, tables.optimizer(towers, rule)))
    kept = done_by_ranks / f"{rule}.{placement}.{size}.ckpt"
    found = tables.tensors(SafeCheckpointIO().load_checkpoint(kept))
    assert found.keys() == expected.keys()
    assert all(tables.is_same(found[name], value) for name, value in expected.items())
    files = sorted((kept / "tables").iterdir())
    tables_and_state = 3 if rule == "adam" else 2
    writers = size + (1 if placement == "by table" else size)  # the query table by rows, and the item table
    assert len(files) == writers * tables_and_state and all(file.suffix == ".safetensors" for file in files)
    whole = load_file(kept / "tensors.safetensors")
    assert all(len(value) != cases.NUM_ITEMS for value in whole.values() if value.ndim)


@pytest.mark.parametrize("placement", tables.PLACEMENTS)
def test_a_checkpoint_without_a_part_is_an_error_that_names_it(done_by_ranks, tmp_path, placement):
    import shutil

    kept = tmp_path / "last.ckpt"
    shutil.copytree(done_by_ranks / f"adam.{placement}.3.ckpt", kept)
    next((kept / "tables").iterdir()).unlink()
    with pytest.raises(InputError, match=r"tables/.*: missing; remove this checkpoint"):
        SafeCheckpointIO().load_checkpoint(kept)
    (kept / "SHA256SUMS").unlink()  # as in older versions
    with pytest.raises(InputError, match=r"last.ckpt: not a readable checkpoint.*of the [\d,]+ numbers.*train again"):
        SafeCheckpointIO().load_checkpoint(kept)


@pytest.mark.parametrize("placement", tables.PLACEMENTS)
@pytest.mark.parametrize("size", [2, 3])
def test_a_sharded_search_equals_that_of_one_process(done_by_ranks, size, placement):
    alone = tables.ranked_alone()
    for rank in range(size):
        found = torch.load(done_by_ranks / f"searched.{placement}.{size}.{rank}.pt", weights_only=False)
        assert torch.equal(found["few"], alone["few"]) and torch.equal(found["all"], alone["all"])
        assert found["measured"] == pytest.approx(alone["measured"], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("placement", tables.PLACEMENTS)
@pytest.mark.parametrize("size", [2, 3])
def test_negatives_mined_by_ranks_equal_those_of_one_process(done_by_ranks, size, placement):
    expected = tables.mined(tables.with_ties(tables.model(Communicator())))
    assert bool((expected >= 0).all())
    for rank in range(size):
        assert torch.equal(torch.load(done_by_ranks / f"mined.{placement}.{size}.{rank}.pt"), expected)


def test_merging_equals_one_index(rng=0):
    torch.manual_seed(rng)
    items, queries = torch.randint(-1, 2, (50, 3)).float(), torch.randint(-1, 2, (9, 3)).float()  # many ties
    expected = ExactIndex(items).search(queries, 12)
    lists = []
    for begin, end in ((0, 20), (20, 23), (23, 50)):
        scores, codes = ExactIndex(items[begin:end], first=begin).search(queries, 12)
        lists.append((scores, torch.where(codes >= 0, codes + begin, -1)))
    found = merge_best(torch.stack([one[0] for one in lists]), torch.stack([one[1] for one in lists]))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("placement", tables.PLACEMENTS)
@pytest.mark.parametrize("size", [2, 3])
def test_a_model_written_in_parts_equals_that_of_one_process(done_by_ranks, tmp_path, size, placement):
    towers = tables.with_ties(tables.model(Communicator()))
    alone = tables.artifact(towers, towers.item_embeddings())
    alone.save(tmp_path / "alone")
    written = done_by_ranks / f"model.{placement}.{size}"
    for name in ("towers.safetensors", "items.safetensors"):
        found, expected = load_file(written / name), load_file(tmp_path / "alone" / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6 if key == "embeddings" else 0)
    read = SavedModel.load(written)  # including checksums
    for name, value in towers.state_dict().items():
        assert torch.equal(read.towers.state_dict()[name], value), name


def placed_as(placement):
    return f"training.table_placement={placement}"


@pytest.fixture
def placed(monkeypatch):
    """Return a function that places the tables for a given amount of memory."""
    data = cases.interactions()

    def place(available, *changes, size=1):
        ranks = Communicator(0, size)
        monkeypatch.setattr(hardware, "memory", lambda processes=1: hardware.Memory(None, available, None, None, None))
        monkeypatch.setattr("twotower.training.placement.least_of_all", lambda found, ranks: found)
        monkeypatch.setattr("twotower.training.placement.SHARED_ABOVE", 50 * 8 * 4 * 3)
        config = cases.Config.load(None, ["item_tower.dimension=8", "query_tower.id_embedding=true", *changes])
        return place_tables(config.resolved(len(data)), data, ranks).parts

    return place


def test_sharding_is_decided_by_size(placed):
    each = (cases.NUM_ITEMS + cases.NUM_QUERIES) * 8 * 4 * 3  # Adam
    assert placed(each, size=2) == {"item": RowShard(Communicator(0, 2), cases.NUM_ITEMS)}  # whole tables would fill it
    for available, words in ((3 * each, ()), (None, ()), (3 * each, (placed_as("row-wise"),))):
        size = 1 if words else 2  # a single process has whole tables
        assert placed(available, *words, size=size) == {}
    assert placed(each, placed_as("{query: replicated}"), size=2).keys() == {"item"}
    with pytest.raises(InputError, match=r"tables of 100 rows.*several processes with sharded rows.*row-wise"):
        placed(each - 1)
    with pytest.raises(InputError, match="use training.table_placement=row-wise"):
        placed(each - 1, placed_as("replicated"), size=2)
    with pytest.raises(InputError, match=r"a rank's part of tables.*more processes"):
        placed(each // 2 - 1, placed_as("row-wise"), size=2)


def test_the_settings_place_each_table(placed):
    ranks, items, queries = Communicator(0, 2), cases.NUM_ITEMS, cases.NUM_QUERIES
    everything = {"item": items, "history": items, "query": queries}
    own = cases.OWN_HISTORY
    rowwise = cases.ROWWISE[0]
    found = placed(None, own, placed_as("table-wise"), rowwise, size=2)
    assert found == {name: RowShard(ranks, rows, found[name].holder) for name, rows in everything.items()}
    assert {found["history"].holder, found["item"].holder} == {0, 1}, "the two large ones on different ranks"
    found = placed(None, own, placed_as("{item: row-wise, query: table-wise}"), rowwise, size=2)
    assert found["item"] == RowShard(ranks, items) and found["query"].holder is not None
    assert found.keys() == {"item", "query"}
    with pytest.raises(InputError, match=r"table_placement.*'column-wise'"):
        placed(None, placed_as("column-wise"))
    with pytest.raises(InputError, match=r"no table 'items'; this model's id tables: item, query$"):
        placed(None, placed_as("{items: row-wise}"), size=2)
    with pytest.raises(InputError, match=r"table_placement.*'by-row'"):
        placed(None, placed_as("by-row"))

"""Tables that ranks share, beside whole ones: the start, checkpoints, the search, the model folder, who decides."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

import cases
import tables

from twotower import machine
from twotower.errors import InputError
from twotower.index import ExactIndex
from twotower.index.merging import merge_best
from twotower.ranks import Ranks
from twotower.serving import Artifact
from twotower.towers import EmbeddingTable
from twotower.towers.shards import BLOCK, Part, fill_normal, shared_tables
from twotower.training.checkpoints import SafeCheckpointIO
from twotower.training.placement import place_tables

pytestmark = pytest.mark.timeout(1000)  # a busy machine


@pytest.mark.parametrize(("rows", "width"), [(5, 3), (4, 4), (1001, 7), (BLOCK // 4 + 5, 5)])
def test_parts_of_a_table_start_as_the_whole(rows, width):
    torch.manual_seed(2)
    whole = torch.empty(rows, width)
    fill_normal(whole, 0.3)
    after = torch.rand(2)
    for size in (2, 3, 7):
        for rank in range(size):
            part = Part(Ranks(rank, size), rows)
            torch.manual_seed(2)
            own = torch.empty(len(part), width)
            fill_normal(own, 0.3, part)
            assert torch.equal(own, whole[part.own])
            assert torch.equal(torch.rand(2), after)


def test_parts_are_all_rows_once():
    for rows in (0, 1, 2, 4, 7, 100):
        for size in (2, 3, 5):
            owned = [Part(Ranks(rank, size), rows).own for rank in range(size)]
            assert [code for own in owned for code in range(own.start, own.stop)] == list(range(rows))


def test_a_row_that_was_not_fetched_is_not_looked_up():
    with shared_tables(Ranks(1, 2)):
        table, whole = EmbeddingTable(10, 4), EmbeddingTable(10, 4, whole=True)
    assert table.weight.shape == (5, 4) and whole.weight.shape == (10, 4)
    with torch.no_grad():
        assert torch.equal(table(torch.tensor([5, 9])), table.weight[[0, 4]])
        with pytest.raises(RuntimeError, match="before they were fetched"):
            table(torch.tensor([4]))
    with pytest.raises(RuntimeError, match="before they were fetched"):
        table(torch.tensor([5]))  # a gradient would be lost
    with shared_tables(Ranks(1, 2), above=10):
        assert EmbeddingTable(10, 4).part is None
    assert EmbeddingTable(10, 4).part is None


@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
@pytest.mark.parametrize("size", [2, 3])
def test_one_process_reads_a_checkpoint_of_several(done_by_ranks, rule, size):
    towers = tables.model(Ranks())
    expected = tables.tensors(tables.checkpoint(towers, tables.optimizer(towers, rule)))
    kept = done_by_ranks / f"{rule}.{size}.ckpt"
    found = tables.tensors(SafeCheckpointIO().load_checkpoint(kept))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    files = sorted((kept / "tables").iterdir())
    tables_and_state = 2 * (3 if rule == "adam" else 2)
    assert len(files) == size * tables_and_state and all(file.suffix == ".safetensors" for file in files)
    whole = load_file(kept / "tensors.safetensors")
    assert all(len(value) != cases.NUM_ITEMS for value in whole.values() if value.ndim)


def test_a_checkpoint_without_a_part_is_an_error_that_names_it(done_by_ranks, tmp_path):
    import shutil

    kept = tmp_path / "last.ckpt"
    shutil.copytree(done_by_ranks / "adam.3.ckpt", kept)
    next((kept / "tables").iterdir()).unlink()
    with pytest.raises(InputError, match=r"last.ckpt: not a readable checkpoint.*of the \d+ rows.*train again"):
        SafeCheckpointIO().load_checkpoint(kept)


@pytest.mark.parametrize("size", [2, 3])
def test_a_search_by_parts_is_that_of_one_process(done_by_ranks, size):
    alone = tables.ranked_alone()
    for rank in range(size):
        found = torch.load(done_by_ranks / f"searched.{size}.{rank}.pt", weights_only=False)
        assert torch.equal(found["few"], alone["few"]) and torch.equal(found["all"], alone["all"])
        assert found["measured"] == pytest.approx(alone["measured"], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("size", [2, 3])
def test_negatives_mined_by_parts_are_those_of_one_process(done_by_ranks, size):
    expected = tables.mined(tables.with_ties(tables.model(Ranks())))
    assert bool((expected >= 0).all())
    for rank in range(size):
        assert torch.equal(torch.load(done_by_ranks / f"mined.{size}.{rank}.pt"), expected)


def test_merging_is_one_index(rng=0):
    torch.manual_seed(rng)
    items, queries = torch.randint(-1, 2, (50, 3)).float(), torch.randint(-1, 2, (9, 3)).float()  # many ties
    expected = ExactIndex(items).search(queries, 12)
    lists = []
    for begin, end in ((0, 20), (20, 23), (23, 50)):
        scores, codes = ExactIndex(items[begin:end], first=begin).search(queries, 12)
        lists.append((scores, torch.where(codes >= 0, codes + begin, -1)))
    found = merge_best(torch.stack([one[0] for one in lists]), torch.stack([one[1] for one in lists]))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("size", [2, 3])
def test_a_model_written_by_parts_is_that_of_one_process(done_by_ranks, tmp_path, size):
    towers = tables.with_ties(tables.model(Ranks()))
    alone = tables.artifact(towers, towers.item_embeddings())
    alone.save(tmp_path / "alone")
    written = done_by_ranks / f"model-{size}"
    for name in ("towers.safetensors", "items.safetensors"):
        found, expected = load_file(written / name), load_file(tmp_path / "alone" / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6 if key == "embeddings" else 0)
    read = Artifact.load(written)  # checksums included
    for name, value in towers.state_dict().items():
        assert torch.equal(read.towers.state_dict()[name], value), name


def test_who_shares_is_decided_by_size(monkeypatch):
    data = cases.interactions()
    each = (cases.NUM_ITEMS + cases.NUM_QUERIES) * 8 * 4 * 3  # Adam

    def placed(available, *changes, size=1):
        ranks = Ranks(0, size)
        monkeypatch.setattr(machine, "memory", lambda processes=1: machine.Memory(None, available, None, None, None))
        monkeypatch.setattr("twotower.training.placement._least", lambda found, ranks: found)
        monkeypatch.setattr("twotower.training.placement.SHARED_ABOVE", 50 * 8 * 4 * 3)
        config = cases.Config.load(None, ["item_tower.dimension=8", "query_tower.id_embedding=true", *changes])
        return place_tables(config, data, ranks)

    row_wise = "training.table_placement=row-wise"
    assert placed(each, size=2).above == 50  # whole tables would take all
    assert placed(3 * each, size=2).above is None
    assert placed(3 * each, row_wise, size=2).above == 0
    assert placed(3 * each, row_wise).above is None  # alone
    assert placed(None, size=2).above is None
    with pytest.raises(InputError, match=r"tables of 100 rows.*several processes that share the rows.*row-wise"):
        placed(each - 1)
    with pytest.raises(InputError, match="expected training.table_placement=row-wise"):
        placed(each - 1, "training.table_placement=replicated", size=2)
    with pytest.raises(InputError, match=r"a W-th of tables.*more processes"):
        placed(each // 2 - 1, row_wise, size=2)

"""Features inside towers: lookups, averages, gradients, id dropout, unseen items and queries."""

import numpy as np
import polars as pl
import pytest
import torch

from twotower.config.features import CategoricalFeature, DenseFeature, MultiFeature, NumericFeature, TextFeature
from twotower.config.run import Config
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.towers import FeatureInputs, ItemTower, build_towers
from twotower.towers.features import auto_width

N = 40
COLOURS = ["red", "blue", "green", "white"]


def table(size=N, seed=0):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "item_id": range(size),
            "colour": [COLOURS[j % 4] if j % 7 else None for j in range(size)],
            "tags": [f"t{j % 3}|t{j % 5}" if j % 6 else None for j in range(size)],
            "price": rng.uniform(1, 9, size),
            "image": rng.normal(size=(size, 5)),
        }
    )


DECLARED = [
    CategoricalFeature(column="colour", width=3),
    MultiFeature(column="tags", separator="|", width=4),
    NumericFeature(column="price"),
    DenseFeature(column="image"),
]


@pytest.fixture
def encoded():
    frame = table()
    return EncodedTable.fit("item", DECLARED, frame, ids=frame["item_id"])


@pytest.fixture
def inputs(encoded):
    torch.manual_seed(0)
    made = FeatureInputs(encoded, dimension=8)
    with torch.no_grad():
        for vectors in made.embeddings.values():
            torch.nn.init.normal_(vectors.weight)
    return made


def test_the_parts_are_concatenated(inputs, encoded):
    """Row by row in plain loops: the colour's vector, the mean of the tags' vectors, the unchanged numbers."""
    found = inputs(torch.tensor([3, 0, 12]))
    colours, tags = inputs.embeddings["0"].weight, inputs.embeddings["1"].weight
    for row, code in enumerate([3, 0, 12]):
        own = [colours[int(encoded.arrays[0][code])]]
        present = [tags[int(value)] for value in encoded.arrays[1][code] if value]
        own.append(sum(present) / len(present) if present else torch.zeros(4))
        own += [torch.from_numpy(encoded.arrays[2][code]), torch.from_numpy(encoded.arrays[3][code])]
        assert torch.allclose(found[row], torch.cat(own), atol=1e-6)
    assert found.shape == (3, inputs.width) == (3, 3 + 4 + 2 + 6)


def test_an_unknown_code_is_a_row_of_missing_values(inputs):
    nothing = inputs.embed(inputs.encode([dict.fromkeys(["colour", "tags", "price", "image"])]))
    assert torch.equal(inputs(torch.tensor([-1])), nothing)
    assert not torch.equal(inputs(torch.tensor([N - 1])), nothing)


def test_known_rows_passed_as_new_rows_are_embedded_the_same(inputs):
    assert torch.allclose(inputs.embed(inputs.encode(table())), inputs(torch.arange(N)), atol=1e-6)


def test_values_never_trained_start_at_zero(encoded):
    fresh = FeatureInputs(encoded, dimension=8)
    assert not fresh.embeddings["0"].weight[:2].any(), "missing and unknown start at zero"
    assert fresh.embeddings["0"].weight[2:].all()
    hashed = EncodedTable.fit("item", [CategoricalFeature(column="colour", buckets=4)], table(), ids=table()["item_id"])
    assert FeatureInputs(hashed, dimension=8).embeddings["0"].weight[1:].all(), "the first bucket is a value"


def test_the_encoded_features_are_not_in_the_state(inputs):
    assert not any(name.startswith("rows") for name in inputs.state_dict())
    assert inputs.to("meta").rows0.device.type == "meta", "but they move with the model"


@pytest.mark.parametrize(("size", "width"), [(2, 4), (6, 5), (100, 20), (10_000, 64)])
def test_automatic_widths(size, width):
    assert auto_width(size, 64) == width


def item_tower(encoded, **settings):
    torch.manual_seed(1)
    return ItemTower(N, 8, features=FeatureInputs(encoded, 8), **settings)


@pytest.mark.parametrize("settings", [{}, {"hidden": [8, 8], "residual": True, "layer_norm": True}])
def test_gradients_reach_every_part(encoded, settings):
    tower = item_tower(encoded, id_dropout=0.5, **settings)
    tower(torch.arange(N)).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_an_item_with_a_hidden_id_is_embedded_by_its_features_only(encoded):
    tower = item_tower(encoded, hidden=[8], id_dropout=0.999999, residual=True)
    by_features = tower.embed_features(tower.features.encode(table()))
    tower.train()
    assert torch.allclose(tower(torch.arange(N)), by_features, atol=1e-6)
    tower.eval()
    assert (tower(torch.arange(N)) - by_features).abs().amax(1).min() > 1e-3, "at inference the id is used"


def test_ids_are_hidden_at_the_configured_rate(encoded):
    """Binomial: 0.3 of 40,000 ids within four standard deviations, none in evaluation mode."""
    tower = item_tower(encoded, id_dropout=0.3)
    with torch.no_grad():
        tower.ids.weight.fill_(1.0)  # the vector used instead of the id is zero
    codes = torch.arange(N).repeat(1000)
    tower.train()
    hidden = int((tower._own(codes).sum(1) == 0).sum())
    assert abs(hidden - 0.3 * len(codes)) < 4 * (0.3 * 0.7 * len(codes)) ** 0.5
    tower.eval()
    assert (tower._own(codes).sum(1) == 8).all()


def test_an_item_never_in_training_is_embedded_by_its_features_only(encoded):
    trained = torch.arange(N) != 5
    tower = item_tower(encoded, hidden=[8], trained=trained).eval()
    by_features = tower.embed_features(tower.features.encode(table()))
    same = torch.isclose(tower(torch.arange(N)), by_features, atol=1e-6).all(1)
    assert same.tolist() == (~trained).tolist()
    tower.train()
    tower(torch.arange(N)).sum().backward()
    assert not tower.ids.weight.grad[5].any(), "being drawn as a candidate does not train its id"


def test_a_tower_without_ids_embeds_by_features(encoded):
    tower = item_tower(encoded, id_embedding=False).eval()
    assert torch.allclose(tower(torch.arange(N)), tower.embed_features(tower.features.encode(table())), atol=1e-6)


def config_of(*overrides):
    features = "[{column: colour, kind: categorical}, {column: price, kind: numeric}]"
    return Config.load(None, ["item_tower.dimension=8", f"item_tower.features={features}", *overrides])


def built(config, **more):
    frame = table()
    features = config.item_tower.features
    whole = None if features == "none" else EncodedTable.fit("item", features, frame, ids=frame["item_id"])
    torch.manual_seed(2)
    return build_towers(config, num_queries=6, num_items=N, item_features=whole, **more).eval()


def test_new_items_are_embedded_from_named_columns():
    towers = built(config_of("item_tower.hidden=[8]"), trained_items=torch.zeros(N, dtype=torch.bool))
    rows = table().select("colour", "price").to_dicts()
    towers.train()
    embedded = towers.embed_new_items(rows)
    assert towers.training, "the mode is restored"
    assert torch.allclose(embedded, towers.item_embeddings(), atol=1e-6), "no id is trained, so only features are used"
    assert torch.allclose(embedded.norm(dim=1), torch.ones(N))
    with pytest.raises(InputError, match="column 'price', row 2: expected a number"):
        towers.embed_new_items([{"colour": "red", "price": 1}, {"colour": "red", "price": "x"}])
    with pytest.raises(ValueError, match="no features, only ids"):
        built(Config.load(None, ["item_tower.dimension=8"])).embed_new_items(rows)


def test_a_history_of_items_with_features():
    """Pooled by hand: the item tower's embeddings of the history's items, averaged with the learned weights."""
    towers = built(config_of("query_tower.history.item_features=true", "query_tower.history.length=3"))
    history = torch.tensor([[-1, 4, 7], [-1, -1, -1], [4, 4, 9]])
    found = towers.query_tower._pooled(history, None, None)
    vectors = towers.item_tower(torch.arange(N))
    weight = towers.query_tower.history.log_weight.exp()
    for row, items in enumerate(history.tolist()):
        for head in range(weight.shape[0]):
            places = [place for place, item in enumerate(items) if item >= 0]
            total = sum(weight[head, place] * vectors[items[place]] for place in places)
            expected = total / sum(weight[head, place] for place in places) if places else torch.zeros(8)
            assert torch.allclose(found[row, head], expected, atol=1e-5)


def test_shared_and_separate_items_of_the_history():
    shared = built(config_of("query_tower.history.item_features=true"))
    assert shared.query_tower.history_items is shared.item_tower
    separate = built(config_of("query_tower.history.item_features=true", "query_tower.history.share_table=false"))
    assert separate.query_tower.history_items.ids is not separate.item_tower.ids
    with pytest.raises(InputError, match="leaves no table to share"):
        built(config_of("item_tower.id_embedding=false"))


def test_queries_are_embedded_by_their_features():
    ages = pl.DataFrame({"user_id": range(6), "age": [20, 30, 40, 50, 60, None]})
    query = EncodedTable.fit("query", [NumericFeature(column="age")], ages, ids=ages["user_id"])
    config = Config.load(None, ["item_tower.dimension=8", "query_tower.history=null"])
    torch.manual_seed(0)
    towers = build_towers(config, num_queries=6, num_items=N, query_features=query).eval()
    known = towers.embed_queries(torch.tensor([0, 3, -1]), None)
    new = towers.embed_new_queries([{"age": 20}, {"age": 50}, {"age": None}])
    assert torch.allclose(known, new, atol=1e-6)
    assert not torch.allclose(new[0], new[1])
    with pytest.raises(InputError, match="a history, features or context"):
        build_towers(config, num_queries=6, num_items=N)


def test_settings_that_need_features_are_refused_without_them():
    for wrong in ("item_tower.id_dropout=0.2", "item_tower.id_embedding=false"):
        with pytest.raises(InputError, match="need features"):
            Config.load(None, [wrong])


def test_text_by_a_model_is_embedded_once(monkeypatch, tmp_path):
    """A fake model counts the texts it encodes: the second time they come from the cache."""
    counts = []

    class Letters:
        def get_embedding_dimension(self):
            return 3

        def encode(self, texts, **_):
            counts.append(len(texts))
            return np.array([[text.count("a"), text.count("b"), 1.0] for text in texts], dtype=np.float32)

    from twotower.features import text

    monkeypatch.setenv("TWOTOWER_CACHE", str(tmp_path))
    monkeypatch.setattr(text, "_model", lambda name: Letters())
    titles = ["a" * (j % 9) + "b" * (j // 9 + 1) for j in range(80)]
    frame = pl.DataFrame({"item_id": range(82), "title": [*titles, None, titles[7]]})
    declared = [TextFeature(column="title", model="letters")]
    first = EncodedTable.fit("item", declared, frame, ids=frame["item_id"])
    again = EncodedTable.fit("item", declared, frame, ids=frame["item_id"])
    assert counts == [80], "each distinct text once"
    assert np.array_equal(first.arrays[0], again.arrays[0])
    length = np.linalg.norm([7, 1, 1])
    assert np.allclose(first.arrays[0][7], [7 / length, 1 / length, 1 / length, 0])
    assert first.arrays[0][80].tolist() == [0, 0, 0, 1]
    assert np.array_equal(first.arrays[0][81], first.arrays[0][7])
    monkeypatch.setattr(text, "_model", lambda name: pytest.fail("vectors need no model"))
    assert np.allclose(first.features.encode([{"title": [0.0, 3.0, 4.0]}])[0], [[0, 0.6, 0.8, 0]])

"""The sequence tower: causality, packed sequences compared with single ones, and which items of a history it reads."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from twotower.data.loading.packing import Packed, length_groups, pack, pack_histories
from twotower.towers import EmbeddingTable, RecencyAverages, Recurrent, SequenceTower, Transformer
from twotower.towers.layers.dropout import Dropout
from twotower.towers.sequence_tower import _shown

ITEMS, WIDTH, LENGTH = 40, 16, 12

#: Encoder, and the number of recency averages.
KINDS = {
    "classic": ("classic", 0),
    "classic, recency": ("classic", 3),
    "gated": ("gated", 0),
    "gated, recency": ("gated", 1),
    "gru": ("gru", 0),
    "gru, recency": ("gru", 2),
}


def tower_of(kind: str, *, dropout: float = 0.0, item_dropout: float = 0.0, seed: int = 0) -> SequenceTower:
    torch.manual_seed(seed)
    name, heads = KINDS[kind]
    encoder = (
        Recurrent(WIDTH, layers=2, dropout=dropout)
        if name == "gru"
        else Transformer(WIDTH, LENGTH + 1, blocks=2, heads=2, hidden=24, dropout=dropout, gated=name == "gated")
    )
    recency = RecencyAverages(LENGTH + 1, heads) if heads else None
    table = EmbeddingTable(ITEMS, WIDTH)
    tower = SequenceTower(encoder, table, WIDTH, length=LENGTH, recency=recency, item_dropout=item_dropout)
    with torch.no_grad():  # weights at which every part matters
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return tower.double()


def packed_of(lengths: list[int], seed: int = 0) -> tuple[Packed, np.ndarray, np.ndarray, np.ndarray]:
    """Make packed sequences of given lengths; also return the items, each sequence's start, and the rows' items."""
    codes = np.random.default_rng(seed).integers(0, ITEMS, sum(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    packed, _, follow = pack(starts, np.array(lengths), codes, last_only=False)
    return packed, codes, starts, follow


@pytest.mark.parametrize("kind", KINDS)
def test_later_items_do_not_change_earlier_outputs(kind):
    """Change one item of one sequence: outputs before it stay equal bit by bit, and outputs after it change."""
    tower = tower_of(kind).eval()
    lengths = [9, 3, 11, 10, 1]
    packed, codes, starts, follow = packed_of(lengths)
    before = tower.embed(packed)
    for place in (0, 4, 9):  # in the third sequence
        changed = codes.copy()
        at = int(starts[2]) + place
        changed[at] = (changed[at] + 7) % ITEMS
        after = tower.embed(pack(starts, np.array(lengths), changed, last_only=False)[0])
        moved = (before - after).abs().amax(1) > 1e-9
        sees = torch.from_numpy((follow > at) & (follow < starts[2] + lengths[2]))
        assert torch.equal(before[~sees], after[~sees])
        assert bool(moved[sees].all())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_one_at_a_time(kind):
    """Outputs and gradients of many sequences in groups equal those of every prefix alone."""
    tower = tower_of(kind).eval()
    lengths = [9, 3, 11, 10, 1, 12]
    packed, codes, starts, follow = packed_of(lengths)
    direction = torch.randn(len(follow), WIDTH, dtype=torch.float64)
    together = tower.embed(packed)
    (together * direction).sum().backward()
    gradient = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row, at in enumerate(follow):
        begin = starts[np.searchsorted(starts, at, side="right") - 1]
        alone = tower(torch.tensor([-1]), torch.from_numpy(codes[begin:at])[None])
        assert float((alone[0] - together[row]).detach().abs().max()) < 1e-9
        total = total + (alone[0] * direction[row]).sum()
    total.backward()
    assert len(gradient) > 5
    for name, parameter in tower.named_parameters():
        assert gradient[name].abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradient[name], atol=1e-9, rtol=1e-7)


def slow_attention(x, attention):
    """Compute attention [L, D] -> [L, D], one pair of positions at a time."""
    width, heads = x.shape[1], attention.heads
    size = width // heads
    joined = (x @ attention.projection.weight.T + attention.projection.bias).reshape(len(x), 3, heads, size)
    out = torch.zeros(len(x), heads, size, dtype=x.dtype)
    for h in range(heads):
        for i in range(len(x)):
            weights = []
            for j in range(i + 1):
                score = float(joined[i, 0, h] @ joined[j, 1, h]) / math.sqrt(size)
                weights.append(math.exp(score))
            for j, weight in enumerate(weights):
                out[i, h] += weight / sum(weights) * joined[j, 2, h]
    return out.reshape(len(x), width) @ attention.output.weight.T + attention.output.bias


def slow_input(tower, codes):
    """Compute the encoder's input and what is added to its output (None for nothing), token by token."""
    x = torch.cat([tower.start[None], tower.history_items.weight[codes]])
    if tower.recency is None:
        return x * math.sqrt(WIDTH), None
    read, added = [], []
    for i in range(len(x)):
        averages = []
        for by_distance in tower.recency.log_weight:
            weights = [math.exp(float(by_distance[i - j])) for j in range(i + 1)]
            averages.append(sum(w * x[j] for j, w in enumerate(weights)) / sum(weights))
        read.append(x[i] * math.sqrt(WIDTH) + tower.mixed.weight @ torch.cat(averages))
        added.append(sum(averages) / len(averages))
    return torch.stack(read), torch.stack(added)


def slow_norm(x, norm):
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(1, keepdim=True)
        return x / (x.pow(2).mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return x / (x.pow(2).mean(1, keepdim=True) + eps).sqrt() * norm.weight


def slow_feedforward(x, layer):
    inner = x @ layer.inner.weight.T + layer.inner.bias
    if layer.gated:
        gate, value = inner[:, : inner.shape[1] // 2], inner[:, inner.shape[1] // 2 :]
        inner = gate / (1 + torch.exp(-gate)) * value
    else:
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
    return inner @ layer.outer.weight.T + layer.outer.bias


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "gru" not in kind])
@torch.no_grad()
def test_a_transformer_equals_its_formula(kind):
    tower = tower_of(kind).eval()
    codes = torch.tensor([3, 17, 3, 39, 0, 8])
    x, added = slow_input(tower, codes)
    x = x + tower.encoder.positions[: len(x)]
    for block in tower.encoder.blocks:
        x = x + slow_attention(slow_norm(x, block.attention_norm), block.attention)
        x = x + slow_feedforward(slow_norm(x, block.feedforward_norm), block.feedforward)
    encoded = slow_norm(x, tower.encoder.norm)[-1]
    expected = encoded if added is None else encoded / math.sqrt(WIDTH) + added[-1]
    assert float((tower(torch.tensor([-1]), codes[None])[0] - expected).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", ["gru", "gru, recency"])
@torch.no_grad()
def test_a_gru_equals_its_formula(kind):
    tower = tower_of(kind).eval()
    codes = torch.tensor([3, 17, 3, 39, 0, 8])
    x, added = slow_input(tower, codes)
    for layer in tower.encoder.layers:
        state, states = torch.zeros(WIDTH, dtype=torch.float64), []
        w, u, b, c = layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0
        for token in x:
            parts = [slice(n * WIDTH, (n + 1) * WIDTH) for n in range(3)]
            r, z = (1 / (1 + torch.exp(-(w[p] @ token + b[p] + u[p] @ state + c[p]))) for p in parts[:2])
            p = parts[2]
            n = torch.tanh(w[p] @ token + b[p] + r * (u[p] @ state + c[p]))
            state = (1 - z) * n + z * state
            states.append(state)
        x = torch.stack(states)
    encoded = slow_norm(x, tower.encoder.norm)[-1]
    expected = encoded if added is None else encoded / math.sqrt(WIDTH) + added[-1]
    assert float((tower(torch.tensor([-1]), codes[None])[0] - expected).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", ["classic, recency", "gru"])
@torch.no_grad()
def test_only_the_newest_items_count(kind):
    tower = tower_of(kind).eval()
    history = torch.randint(0, ITEMS, (3, LENGTH + 5))
    other = history.clone()
    other[:, :5] = (other[:, :5] + 1) % ITEMS
    unknown = torch.full((3,), -1)
    assert torch.equal(tower(unknown, history), tower(unknown, other))
    assert torch.equal(tower(unknown, history), tower(unknown, history[:, 5:]))
    other[:, 5] = (other[:, 5] + 1) % ITEMS  # the oldest item that is read
    assert bool(((tower(unknown, history) - tower(unknown, other)).abs().amax(1) > 0).all())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_histories_of_any_length_in_any_order(kind):
    """An empty history is the start token alone; a rectangle, as in exports, gives the same result as packing."""
    tower = tower_of(kind).eval()
    generator = torch.Generator().manual_seed(0)
    present = torch.randint(0, LENGTH + 1, (50, 1), generator=generator)
    present[7] = 0
    history = torch.randint(0, ITEMS, (50, LENGTH), generator=generator)
    history = torch.where(torch.arange(LENGTH, 0, -1) <= present, history, -1)
    unknown = torch.full((50,), -1)
    found = tower(unknown, history)
    assert float((tower._rectangle(history) - found).abs().max()) < 1e-9
    read, added = slow_input(tower, history[7, :0])
    alone = tower.encoder(read, torch.zeros(1, dtype=torch.int64), ((1, 1),))[0]
    alone = alone if added is None else alone / math.sqrt(WIDTH) + added[0]
    assert float((found[7] - alone).abs().max()) < 1e-9
    with torch.enable_grad():
        assert float((tower(unknown, history) - found).detach().abs().max()) < 1e-9
    assert tower(unknown[:0], history[:0]).shape == (0, WIDTH)
    for row in (0, 7, 30):
        kept = history[row][history[row] >= 0][None]
        assert float((tower(unknown[:1], kept) - found[row]).abs().max()) < 1e-9


def test_items_are_hidden_and_dropout_is_applied_only_in_training():
    tower = tower_of("classic", dropout=0.5, item_dropout=0.5)
    packed = packed_of([9, 3, 11])[0]
    assert not torch.equal(tower.train().embed(packed), tower.embed(packed))
    assert torch.equal(tower.eval().embed(packed), tower.embed(packed))
    hidden = tower_of("classic", item_dropout=254 / 256).train()  # nearly all items: only positions are left
    torch.manual_seed(0)
    first = hidden.embed(packed_of([9], seed=1)[0])
    torch.manual_seed(0)
    second = hidden.embed(packed_of([9], seed=2)[0])
    torch.testing.assert_close(first, second, atol=1e-9, rtol=0)


def test_a_history_is_required():
    with pytest.raises(ValueError, match="needs the recent items"):
        tower_of("gru")(torch.tensor([0]), None)


@pytest.mark.parametrize("seed", range(4))
def test_groups_have_the_fewest_tokens(seed):
    """Compare with every way to cut the sorted lengths into groups."""
    rng = np.random.default_rng(seed)
    lengths, cost = rng.integers(1, 30, 9), int(rng.integers(1, 40))
    groups = length_groups(lengths, cost=cost)
    assert sorted(np.concatenate(groups).tolist()) == list(range(9))
    found = sum(len(group) * int(lengths[group].max()) + cost for group in groups)
    ordered, best = np.sort(lengths), math.inf
    for cuts in range(2**8):
        bounds = [0, *(place + 1 for place in range(8) if cuts >> place & 1), 9]
        tokens = sum((b - a) * int(ordered[b - 1]) + cost for a, b in pairwise(bounds))
        best = min(best, tokens)
    assert found == best


def test_histories_are_packed_by_length():
    history = torch.tensor([[-1, -1, 5], [1, 2, 3], [-1, -1, -1]])
    packed, place = pack_histories(history)
    outputs = packed.rows[place]
    assert packed.tokens[outputs].tolist() == [5, 3, -1]
    assert packed.positions[outputs].tolist() == [1, 3, 0]


@pytest.mark.parametrize("p", [0.999, 1 - 1e-9, math.nextafter(1.0, 0.0)])
def test_dropout_just_below_one_keeps_some_numbers(p):
    """On a CPU probabilities are in 256ths: of 65,536 numbers 1/256 are kept, within 5 standard deviations."""
    torch.manual_seed(0)
    dropped = Dropout(p).train()(torch.ones(65_536))
    assert dropped.isfinite().all() and abs(float(dropped.mean()) - 1) < 5 * math.sqrt(255 / 65_536)
    assert set(dropped.tolist()) == {0.0, 256.0}
    shown = _shown(torch.zeros(65_536, dtype=torch.int64), p)
    assert abs(int(shown.sum()) - 256) < 5 * math.sqrt(256)

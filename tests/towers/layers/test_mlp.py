"""Dense layers compared with their formula."""

import pytest
import torch
from torch.nn import functional as F

from twotower.towers.layers.mlp import DNN, MLP, EmbeddedRows, dense_layers


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_blocks_follow_the_formula(residual, layer_norm):
    torch.manual_seed(0)
    layers = DNN([5, 4, 4, 3], residual=residual, layer_norm=layer_norm).double().eval()
    x = torch.randn(7, 5, dtype=torch.float64)
    h = x
    for block in layers.blocks:
        z = h @ block.linear.weight.T + block.linear.bias
        if layer_norm:
            mean, spread = z.mean(1, keepdim=True), z.var(1, unbiased=False, keepdim=True)
            z = (z - mean) / (spread + 1e-5).sqrt() * block.norm.weight + block.norm.bias
        y = 0.5 * z * (1 + torch.erf(z / 2**0.5))
        h = y + h if residual and y.shape == h.shape else y
    expected = h @ layers.projection.weight.T + layers.projection.bias
    assert torch.allclose(layers(x), expected, atol=1e-12)


def test_dropout_comes_before_the_skip():
    """A block with all units dropped returns its input."""
    layers = DNN([4, 4, 2], dropout=1.0, residual=True).train()
    x = torch.randn(3, 4)
    assert torch.equal(layers.blocks(x), x)


def test_layers_without_options_are_an_mlp():
    assert isinstance(dense_layers([4, 3, 2], dropout=0.1), MLP)
    assert isinstance(dense_layers([4, 3, 2], dropout=0.1, layer_norm=True), DNN)


def test_rows_are_looked_up_like_a_table():
    weight = torch.randn(5, 2, requires_grad=True)
    codes = torch.tensor([[0, 4], [4, 4]])
    assert torch.equal(EmbeddedRows(weight)(codes), F.embedding(codes, weight))
    EmbeddedRows(weight)(codes).sum().backward()
    assert weight.grad[4].tolist() == [3.0, 3.0]

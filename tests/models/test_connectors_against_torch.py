"""Connectors and their parts against PyTorch's operators, with the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_connectors import draw, spec_of, split

from nmm_jax.models import connectors

pytestmark = pytest.mark.extras

torch = pytest.importorskip("torch")
F = torch.nn.functional


def randomized(spec):
    """A connector's weights by path, and (features) -> positions with them."""
    (_, apply), (weights, state) = split(spec), draw(spec)
    return weights, lambda x: np.asarray(jax.jit(apply)(state, x))


def compare(expected, found, tolerance=2e-5):
    expected = expected.detach().numpy()
    assert expected.shape == found.shape and 0.1 < np.abs(expected).max() < 100
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


def features_of(spec, images=2):
    return np.random.default_rng(1).normal(size=(images, spec.side**2, spec.inputs)).astype(np.float32)


def under(weights, prefix):
    return {name.removeprefix(f"{prefix}/"): w for name, w in weights.items() if name.startswith(f"{prefix}/")}


def linear(x, weights, name):
    bias = weights.get(f"{name}/bias")
    return F.linear(x, torch.tensor(weights[f"{name}/kernel"].T), None if bias is None else torch.tensor(bias))


def layer_norm(x, weights, name, eps):
    scale, bias = (torch.tensor(weights[f"{name}/{n}"]) for n in ("scale", "bias"))
    return F.layer_norm(x, scale.shape, scale, bias, eps)


def grid(x):
    """[N,P,C] as torch's [N,C,side,side]."""
    side = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).reshape(len(x), -1, side, side)


def line(x):
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("side, edge", [(27, 12), (16, 8), (24, 12), (5, 3), (7, 7), (16, 1)])
def test_adaptive_average_pooling(side, edge):
    x = np.random.default_rng(0).normal(size=(2, 8, side, side)).astype(np.float32)
    expected = torch.nn.AdaptiveAvgPool2d((edge, edge))(torch.tensor(x))
    found = connectors.average_pool(jnp.asarray(x.transpose(0, 2, 3, 1)), edge)
    compare(expected, np.asarray(found).transpose(0, 3, 1, 2), 1e-6)


def test_depthwise_convolution():
    theirs = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    x = np.random.default_rng(0).normal(size=(2, 16, 9, 9)).astype(np.float32)
    kernel = theirs.weight.detach().numpy()[:, 0].transpose(1, 2, 0)
    found = connectors.depthwise_convolution(jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(kernel))
    compare(theirs(torch.tensor(x)), np.asarray(found).transpose(0, 3, 1, 2), 1e-5)


def torch_squeeze_excitation(channels, inside, weights):
    """As timm's, from torch's operators."""
    nn = torch.nn

    class SqueezeExcitation(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Conv2d(channels, inside, 1), nn.Conv2d(inside, channels, 1)
            for ours, layer in (("squeeze", self.fc1), ("excite", self.fc2)):
                layer.weight.data = torch.tensor(weights[f"{ours}/kernel"].T)[:, :, None, None]
                layer.bias.data = torch.tensor(weights[f"{ours}/bias"])

        def forward(self, x):
            return x * torch.sigmoid(self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))))

    return SqueezeExcitation()


def test_squeeze_excitation():
    spec = spec_of("c_abstractor", width=16)
    stack = dataclasses.replace(connectors._stack(spec), width=16)
    ours = connectors.SqueezeExcitation(stack, 6, rngs=nnx.Rngs(params=0))
    weights, r = {}, np.random.default_rng(1)
    for name in ("squeeze", "excite"):
        layer = getattr(ours, name)
        layer.bias[...] = jnp.asarray(r.normal(size=layer.bias.shape), jnp.float32)
        weights |= {f"{name}/kernel": np.asarray(layer.kernel[...]), f"{name}/bias": np.asarray(layer.bias[...])}
    x = np.random.default_rng(0).normal(size=(2, 16, 9, 9)).astype(np.float32)
    expected = torch_squeeze_excitation(16, 6, weights)(torch.tensor(x))
    compare(expected, np.asarray(ours(jnp.asarray(x.transpose(0, 2, 3, 1)))).transpose(0, 3, 1, 2), 1e-5)


def torch_bottleneck(x, weights):
    """timm's regnet Bottleneck with bottle ratio 1 and group size 1, LayerNorm2d and SiLU."""

    def conv1x1(x, name):
        return F.conv2d(x, torch.tensor(weights[f"{name}/kernel"].T)[:, :, None, None])

    def norm(x, name):
        return layer_norm(x.permute(0, 2, 3, 1), weights, name, 1e-5).permute(0, 3, 1, 2)

    channels = weights["conv3/kernel"].shape[1]
    assert weights["se/squeeze/kernel"].shape == (channels, round(0.25 * x.shape[1]))
    y = F.silu(norm(conv1x1(x, "conv1"), "norm1"))
    depthwise = torch.tensor(weights["depthwise"]).permute(2, 0, 1)[:, None]
    y = F.silu(norm(F.conv2d(y, depthwise, padding=1, groups=channels), "norm2"))
    se = under(weights, "se")
    y = torch_squeeze_excitation(channels, se["squeeze/bias"].size, se)(y)
    y = norm(conv1x1(y, "conv3"), "norm3")
    shortcut = norm(conv1x1(x, "shortcut"), "shortcut_norm") if x.shape[1] != channels else x
    return F.silu(y + shortcut)


@pytest.mark.parametrize("side, edge, inputs, width", [(27, 12, 24, 32), (16, 8, 32, 32), (24, 12, 40, 32)])
def test_c_abstractor(side, edge, inputs, width):
    spec = spec_of("c_abstractor", side=side, positions=edge**2, inputs=inputs, width=width, depth=3)
    weights, run = randomized(spec)
    features = features_of(spec)
    x = grid(torch.tensor(features) + torch.tensor(weights["positions"]))
    for i in range(3):
        x = torch_bottleneck(x, under(weights, f"stage1/block_{i}"))
    x = torch.nn.AdaptiveAvgPool2d((edge, edge))(x)
    for i in range(3):
        x = torch_bottleneck(x, under(weights, f"stage2/block_{i}"))
    expected = linear(F.silu(linear(line(x), weights, "readout/up")), weights, "readout/down")
    compare(expected, run(features))


def torch_attention(weights, width, heads):
    """torch.nn.MultiheadAttention with our weights."""
    theirs = torch.nn.MultiheadAttention(width, heads, batch_first=True)
    names = ("query", "key", "value")
    theirs.in_proj_weight.data = torch.tensor(np.concatenate([weights[n].reshape(width, width).T for n in names]))
    theirs.in_proj_bias.data = torch.tensor(np.concatenate([weights[f"{n}_bias"].reshape(width) for n in names]))
    theirs.out_proj.weight.data = torch.tensor(weights["out"].reshape(width, width).T)
    theirs.out_proj.bias.data = torch.tensor(weights["out_bias"])
    return lambda queries, keys: theirs(queries, keys, keys, need_weights=False)[0]


@pytest.mark.parametrize("name", ["attention", "attention_same_width"])
def test_attention_pooling(name):
    spec = spec_of(name, side=9)
    weights, run = randomized(spec)
    features = features_of(spec)
    patches = torch.tensor(features)
    if spec.inputs != spec.width:
        patches = linear(patches, weights, "enter")
    queries = torch.tensor(weights["queries"]).expand(2, -1, -1)
    attend = torch_attention(under(weights, "layer_0/attention"), spec.width, spec.heads)
    queries = layer_norm(queries, weights, "layer_0/query_norm", 1e-6)
    x = attend(queries, layer_norm(patches, weights, "layer_0/patch_norm", 1e-6))
    compare(linear(layer_norm(x, weights, "norm", 1e-6), weights, "out"), run(features))


def test_resampler():
    spec = spec_of("resampler", side=9, depth=3)
    weights, run = randomized(spec)
    features = features_of(spec)
    patches = linear(torch.tensor(features), weights, "enter")
    x = torch.tensor(weights["queries"]).expand(2, -1, -1)
    for i in range(spec.depth):
        layer = under(weights, f"layer_{i}")
        queries = layer_norm(x, layer, "cross/query_norm", 1e-6)
        keys = torch.cat([layer_norm(patches, layer, "cross/patch_norm", 1e-6), queries], 1)
        x = x + torch_attention(under(layer, "cross/attention"), spec.width, spec.heads)(queries, keys)
        up, up_bias, down, down_bias = (torch.tensor(layer[f"ffn/{n}"]) for n in ("up", "up_bias", "down", "down_bias"))
        x = x + F.gelu(layer_norm(x, layer, "ffn_norm", 1e-6) @ up + up_bias) @ down + down_bias
    compare(linear(layer_norm(x, weights, "norm", 1e-6), weights, "out"), run(features))


@pytest.mark.parametrize("name", ["glu", "glu_downsampled"])
def test_glu(name):
    spec = spec_of(name)
    weights, run = randomized(spec)
    features = features_of(spec)
    x = torch.tensor(features)
    if name == "glu_downsampled":
        convolution = torch.nn.Conv2d(spec.inputs, spec.inputs, 2, stride=2)
        kernel = weights["downsample/kernel"].reshape(2, 2, spec.inputs, spec.inputs)
        convolution.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1))
        convolution.bias.data = torch.tensor(weights["downsample/bias"])
        x = line(convolution(grid(x)))
    x = F.gelu(layer_norm(linear(x, weights, "enter"), weights, "norm", 1e-5))
    gate, up, down = (torch.tensor(weights[f"ffn/{n}"]) for n in ("gate", "up", "down"))
    compare((F.silu(x @ gate) * (x @ up)) @ down, run(features))


@pytest.mark.parametrize("name", ["linear", "mlp", "average"])
def test_linear_layers(name):
    spec = spec_of(name)
    weights, run = randomized(spec)
    features = features_of(spec)
    x = torch.tensor(features)
    if name == "mlp":
        expected = linear(F.gelu(linear(x, weights, "up")), weights, "down")
    else:
        x = line(torch.nn.AdaptiveAvgPool2d((4, 4))(grid(x))) if name == "average" else x
        expected = linear(x, weights, "out")
    compare(expected, run(features))

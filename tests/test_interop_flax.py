"""bnjax.interop with Flax, linen and nnx: variables that flax made, in both directions."""

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from golden import make_interop
from test_interop import FIVE_STEPS, apply
from tolerances import error

import bnjax
from bnjax import interop, linen

RNG = np.random.default_rng(0)
DATA = make_interop.load("data")
FIELDS = {"axis": 1, "momentum": 0.9, "epsilon": 1e-3}


def linen_network(module=nn.BatchNorm, **fields):
    """`apply(params, state, h, train)`, and variables after three steps."""
    layer = module(**FIELDS, **fields)
    variables = layer.init(jax.random.key(0), DATA["x"][0], use_running_average=True)

    def run(params, stats, h, train):
        y, new = layer.apply(
            {"params": params, "batch_stats": stats}, h, not train, mutable=["batch_stats"]
        )
        return y, new["batch_stats"]

    return run, variables


def nnx_network(**fields):
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0), **FIELDS, **fields)
    graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def run(params, stats, h, train):
        module = nnx.merge(graph, params, stats, copy=True)
        y = module(h, use_running_average=not train)
        return y, nnx.state(module, nnx.BatchStat)

    return run, {"params": params, "batch_stats": stats}


@pytest.mark.parametrize("network", [linen_network, nnx_network])
@pytest.mark.parametrize("fields", [{}, {"use_scale": False}, {"use_bias": False}])
def test_training_continues(network, fields):
    """Three steps in flax; the next five in flax and in bnjax."""
    run, first = network(**fields)
    peer = make_interop.jax_peer(
        "", first.get("params", {}), first["batch_stats"], run,
        lambda params, stats: {"params": params, "batch_stats": stats},
    )  # fmt: skip
    record = make_interop.record(peer, DATA)
    layer, end = (
        interop.from_flax(tree_of(network, record[part]), **FIELDS)
        for part in ("checkpoint", "end")
    )
    result, (w, params, state) = make_interop.resume(
        apply(layer), layer.params, layer.state, record["checkpoint"]["W"], DATA
    )
    for name, value in result.items():
        assert error(value, record[name]) <= FIVE_STEPS, name
    assert error(w, record["end"]["W"]) <= FIVE_STEPS
    assert error(state.mean, end.state.mean) <= FIVE_STEPS
    assert error(state.var, end.state.var) <= FIVE_STEPS
    assert (params.scale is None) == ("use_scale" in fields)
    assert (params.bias is None) == ("use_bias" in fields)
    for ours, theirs in zip(params, end.params, strict=True):
        assert ours is None or error(ours, theirs) <= FIVE_STEPS


def tree_of(network, record):
    trees = {name: record[name] for name in ("params", "batch_stats")}
    return trees if network is linen_network else nnx.merge_state(*trees.values())


class Block(nn.Module):
    layer: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        return self.layer(not train, momentum=0.9)(nn.Dense(3)(x))


class Net(nn.Module):
    layer: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = Block(self.layer)(x, train)
        return self.layer(not train, momentum=0.9, name="head")(x) + Block(self.layer)(x, train)


NAMES = ["Block_0/BatchNorm_0", "Block_1/BatchNorm_0", "head"]


@pytest.mark.parametrize("wrap", [dict, flax.core.freeze])
def test_linen_tree_and_back(wrap):
    x = RNG.normal(3, 2, (8, 3)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x, True)
    _, updates = Net().apply(variables, x, True, mutable=["batch_stats"])
    variables = {**variables, **updates, "cache": {"other": 1}}
    layers = interop.each(interop.from_flax, wrap(variables), momentum=0.9)
    assert list(layers) == NAMES
    tree = interop.to_flax(layers)
    chex.assert_trees_all_equal(tree["batch_stats"], updates["batch_stats"])
    del variables["params"]["Block_0"]["Dense_0"], variables["params"]["Block_1"]["Dense_0"]
    chex.assert_trees_all_equal(tree["params"], variables["params"])
    single = interop.to_flax(layers["head"])
    layer = nn.BatchNorm(False, momentum=0.9)
    y, new = layer.apply(single, x, mutable=["batch_stats"])
    expected, state = bnjax.bn_apply(*layers["head"][:2], x, True, **layers["head"].options)
    chex.assert_trees_all_close(y, expected, atol=1e-5)
    chex.assert_trees_all_close(new["batch_stats"]["var"], state.var, rtol=1e-5)


@pytest.mark.parametrize("pure", [False, True])
def test_nnx_state_and_back(pure):
    """Integers in the path are those of an nnx.List."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.BatchNorm(2 + i, rngs=rngs) for i in range(2)])
            self.norm = nnx.BatchNorm(3, use_scale=False, rngs=rngs)
            self.dense = nnx.Linear(3, 3, rngs=rngs)

    model = Model(nnx.Rngs(0))
    model.norm(RNG.normal(3, 2, (8, 3)).astype(np.float32))
    state = nnx.state(model)
    tree = nnx.to_pure_dict(state)
    layers = interop.each(interop.from_flax, tree if pure else state)
    assert list(layers) == ["blocks/0", "blocks/1", "norm"]
    assert layers["norm"].params.scale is None
    back = interop.to_flax(layers, nnx=True)
    assert list(back["blocks"]) == [0, 1]
    del tree["dense"]
    chex.assert_trees_all_equal(back, tree)
    zeros = jax.tree.map(jnp.zeros_like, state)
    nnx.replace_by_pure_dict(zeros, {**back, "dense": nnx.to_pure_dict(state)["dense"]})
    chex.assert_trees_all_equal(nnx.to_pure_dict(zeros), nnx.to_pure_dict(state))


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxed_parameters(box):
    stats = {"mean": np.zeros(3, "f"), "var": box(jnp.ones(3), ("model",))}
    params = {"scale": box(jnp.arange(3.0), ("model",))}
    layer = interop.from_flax({"params": params, "batch_stats": stats})
    np.testing.assert_array_equal(layer.params.scale, [0, 1, 2])
    np.testing.assert_array_equal(layer.state.var, [1, 1, 1])


def test_count_of_schedules():
    """bnjax's modules keep it; it comes along and goes back."""
    layer = linen.BatchNorm(False, momentum=bnjax.cumulative())
    x = RNG.normal(3, 2, (8, 3)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    for _ in range(2):
        variables = {**variables, **layer.apply(variables, x, mutable=["batch_stats"])[1]}
    found = interop.from_flax(variables, momentum=layer.momentum)
    np.testing.assert_array_equal(found.state.count, [2, 2, 2])
    chex.assert_trees_all_equal(interop.to_flax(found), variables)
    constant = interop.from_flax(variables)
    assert "count" not in interop.to_flax(constant)["batch_stats"]


def test_from_torch_to_linen():
    """Across frameworks: the variables of a layer that came from torch."""
    golden = make_interop.load("torch")
    arrays = {k: v for k, v in golden["checkpoint"].items() if k != "W"}
    layer = interop.from_torch(arrays)
    h = make_interop.project(golden["checkpoint"]["W"], DATA["x"][0])
    module = linen.BatchNorm(True, **layer.options)
    y = module.apply(interop.to_flax(layer), h)
    assert error(y, golden["evaluated"]) <= FIVE_STEPS


def test_feature_axes():
    """Parameters of several feature axes are of their sizes."""
    x = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    variables = nn.BatchNorm(False, axis=(1, 2)).init(jax.random.key(0), x)
    layer = interop.from_flax(variables, axis=(1, 2))
    assert layer.state.mean.shape == (2, 3)
    bnjax.bn_apply(layer.params, layer.state, x, True, **layer.options)
    chex.assert_trees_all_equal(interop.to_flax(layer), variables)
    with pytest.raises(ValueError, match=r"`mean` must have shape \[C\], got \(2, 3\)"):
        interop.from_flax(variables)


def test_affine_free_layers_have_no_params():
    x = np.ones((4, 3), "f")
    variables = nn.BatchNorm(True, use_scale=False, use_bias=False).init(jax.random.key(0), x)
    layer = interop.from_flax(variables)
    chex.assert_trees_all_equal(interop.to_flax(layer), variables)

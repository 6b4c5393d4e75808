"""bnjax.optim: real optax steps leave scale and bias alone, or step them at their own rate."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
import bnjax.linen
from bnjax.optim import decay_mask, labels

X = jnp.linspace(-1, 1, 12).reshape(4, 3)
DECAY = 0.25


class Linen(nn.Module):
    """One of each kind: batch norm whole, without scale and without both; layer norm; dense."""

    @nn.compact
    def __call__(self, x):
        self.param("bias", nn.initializers.ones, (3,))  # of a module that holds others
        x = nn.Dense(3)(x)
        x = bnjax.linen.BatchNorm(use_running_average=True, name="whole")(x)
        x = bnjax.linen.BatchNorm(use_running_average=True, use_scale=False, name="bias_only")(x)
        x = nn.BatchNorm(
            use_running_average=True, use_scale=False, use_bias=False, name="bare"
        )(x)  # fmt: skip
        return nn.LayerNorm(name="layer")(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(3, rngs=rngs) for _ in range(2)])
        self.layer = nnx.LayerNorm(3, rngs=rngs)

    def __call__(self, x):
        x = self.dense(x)
        for norm in self.norms:
            x = norm(x)
        return self.layer(x)


def linen_tree():
    variables = Linen().init(jax.random.key(0), X)
    return variables["params"], variables["batch_stats"]


def pairs_tree():
    """A model written without modules: dicts and tuples around BNParams."""
    norm, state = bnjax.bn_init(3)
    no_scale, _ = bnjax.bn_init(3, use_scale=False)
    dense = {"weight": jnp.ones(3), "bias": jnp.ones(3)}
    params = {"stem": (jnp.ones((2, 3)), norm), "head": [no_scale, dense]}
    return params, {"stem": (None, state), "head": [state, None]}


def nnx_tree():
    model = NNX(nnx.Rngs(0))
    return nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)


BATCH = {
    "linen": {"whole.scale", "whole.bias", "bias_only.bias"},
    "pairs": {"stem.1.scale", "stem.1.bias", "head.0.bias"},
    "nnx": {"norms.0.scale", "norms.0.bias", "norms.1.scale", "norms.1.bias"},
}
TREES = {"linen": linen_tree, "pairs": pairs_tree, "nnx": nnx_tree}
NAMES = {"layer.scale", "layer.bias"}
LAYER = {"linen": NAMES, "pairs": set(), "nnx": NAMES}


def named(tree):
    """Dotted name -> leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {
        name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def chosen(tree, wanted):
    return {name for name, leaf in named(tree).items() if leaf == wanted}


@pytest.mark.parametrize("exact", [False, True], ids=["by name", "by statistics"])
@pytest.mark.parametrize("kind", TREES)
def test_labels_and_mask(kind, exact):
    params, batch_stats = TREES[kind]()
    given = {"batch_stats": batch_stats} if exact else {}
    result, mask = labels(params, **given), decay_mask(params, **given)
    wanted = BATCH[kind] | (set() if exact else LAYER[kind])
    assert chosen(result, "norm") == chosen(mask, False) == wanted
    assert chosen(result, "other") == chosen(mask, True) == set(named(params)) - wanted
    for tree in (result, mask):
        assert jax.tree.structure(tree) == jax.tree.structure(params)


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.add_decayed_weights(DECAY, mask=decay_mask), optax.sgd(1.0)),
        optax.adamw(1.0, weight_decay=DECAY, mask=decay_mask),
    ],
    ids=["sgd", "adamw"],
)
def test_weight_decay_leaves_scale_and_bias_alone(kind, optimizer):
    params, _ = TREES[kind]()
    params = jax.tree.map(lambda p: p + 1, params)  # so that a decayed bias would show

    @jax.jit
    def step(params):
        updates, _ = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )
        return optax.apply_updates(params, updates)

    after = named(step(params))
    spared = BATCH[kind] | LAYER[kind]
    for name, before in named(params).items():
        factor = 1 if name in spared else 1 - DECAY
        np.testing.assert_allclose(after[name], factor * before, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", TREES)
def test_learning_rate_of_its_own(kind):
    params, _ = TREES[kind]()
    rates = {"norm": optax.sgd(0.5), "other": optax.sgd(2.0)}
    optimizer = optax.multi_transform(rates, labels)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    spared = BATCH[kind] | LAYER[kind]
    for name, update in named(updates).items():
        np.testing.assert_array_equal(update, -0.5 if name in spared else -2.0, err_msg=name)


@nnx.jit
def descend(model, optimizer):
    optimizer.update(model, nnx.grad(lambda model: 0 * model(X).sum())(model))


def test_nnx_optimizer_decays():
    model = NNX(nnx.Rngs(0))
    transform = optax.chain(optax.add_decayed_weights(DECAY, mask=decay_mask), optax.sgd(1.0))
    before = {name: value + 0 for name, value in named(nnx.state(model, nnx.Param)).items()}
    descend(model, nnx.Optimizer(model, transform, wrt=nnx.Param))
    after = named(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(after["dense.kernel"], (1 - DECAY) * before["dense.kernel"])
    for name in BATCH["nnx"] | LAYER["nnx"]:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_nnx_optimizer_with_two_rates():
    model = NNX(nnx.Rngs(0))
    rates = {"norm": optax.sgd(0.0), "other": optax.sgd(1.0)}
    optimizer = nnx.Optimizer(model, optax.multi_transform(rates, labels), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer.update(model, jax.tree.map(jnp.ones_like, before))
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), nnx.state(model, nnx.Param), before)
    assert chosen(moved, False) == BATCH["nnx"] | LAYER["nnx"]


def test_pure_dicts_of_nnx_states():
    params, batch_stats = (nnx.to_pure_dict(state) for state in nnx_tree())
    assert chosen(labels(params), "norm") == BATCH["nnx"] | LAYER["nnx"]
    # As after a restore, which makes strings of numbers.
    batch_stats["norms"] = {str(key): value for key, value in batch_stats["norms"].items()}
    assert chosen(labels(params, batch_stats=batch_stats), "norm") == BATCH["nnx"]


def test_partitioned_parameters():
    init = nn.with_partitioning(nn.initializers.ones, ("model",))
    layer = nn.BatchNorm(use_running_average=True, scale_init=init, bias_init=init)
    params = {"norm": layer.init(jax.random.key(0), X)["params"], "w": jnp.ones(3)}
    assert chosen(labels(params), "norm") == {"norm.scale", "norm.bias"}


def test_with_statistics_only_scale_and_bias_count():
    module = {"kernel": jnp.ones(3), "scale": jnp.ones(3)}
    batch_stats = {"mean": jnp.ones(3), "var": jnp.ones(3)}
    assert labels(module, batch_stats=batch_stats) == {"kernel": "other", "scale": "norm"}


def test_one_layer_alone():
    params, state = bnjax.bn_init(3)
    assert labels(params) == labels(params, batch_stats=state) == ("norm", "norm")


def test_weight_decay_where_kernels_are_out_of_view():
    """There optax has emptied the other places, as None does where parameters are frozen."""
    params, _ = linen_tree()
    for empty in (optax.MaskedNode(), None):
        rest = jax.tree_util.tree_map_with_path(
            lambda path, leaf, empty=empty: empty if "kernel" in str(path) else leaf, params
        )
        assert chosen(labels(rest), "norm") == BATCH["linen"] | LAYER["linen"]
    inner = optax.add_decayed_weights(DECAY, mask=decay_mask)
    optimizer = optax.masked(inner, jax.tree.map(lambda leaf: leaf.ndim == 1, params))
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    moved = {name for name, update in named(updates).items() if (update != 0).any()}
    assert moved == {"bias"}  # Dense's own bias is 0, and stays there


NONE = {
    "other names": {"norm": {"gamma": jnp.ones(3), "beta": jnp.ones(3)}},
    "dense": {"dense": {"weight": jnp.ones(3), "bias": jnp.ones(3)}},
    "leaf": jnp.ones(3),
    "nothing": {},
}


@pytest.mark.parametrize("function", [labels, decay_mask])
@pytest.mark.parametrize("kind", NONE)
def test_no_normalization_is_an_error_unless_allowed(kind, function):
    params = NONE[kind]
    seen = {"other names": "norm.beta", "dense": "dense.bias"}.get(kind, "")
    with pytest.raises(ValueError, match=f"`params` must .* got {seen}.* Fix: missing_ok=True"):
        function(params)
    result = function(params, missing_ok=True)
    assert jax.tree.structure(result) == jax.tree.structure(params)
    assert all(leaf in ("other", True) for leaf in jax.tree.leaves(result))


def test_statistics_of_another_tree_are_an_error():
    variables = Linen().init(jax.random.key(0), X)
    wanted = 'Fix: batch_stats=variables["batch_stats"].'
    with pytest.raises(ValueError, match=re.escape(wanted)) as info:
        labels(variables["params"], batch_stats=variables)
    assert "got batch_stats of batch_stats.bare.mean" in str(info.value)
    assert "params of Dense_0.bias, bias, " in str(info.value)


def test_nothing_is_computed():
    """Only names count, so shapes without values will do."""
    params, _ = linen_tree()
    shapes = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(decay_mask(shapes), decay_mask(params))

"""bnjax.linen.BatchNorm beside flax.linen.BatchNorm: the same where flax is right.

Where they differ on purpose: test_linen_differences.py.
"""

import dataclasses
import functools
import inspect
import itertools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_flax import KEY, LINEN, MASK, SHAPE, X, close, types
from beside_flax import run_linen as run
from flax import linen as nn
from flax import serialization
from tolerances import error

import bnjax
from bnjax import linen

RNG = np.random.default_rng(1)

FIELDS = {
    "default": {},
    "axis": {"axis": 1},
    "axes": {"axis": (1, 2)},
    "axes unsorted": {"axis": (-1, 0)},
    "momentum": {"momentum": 0.3},
    "epsilon": {"epsilon": 0.5},
    "dtype": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.bfloat16},
    "no bias": {"use_bias": False},
    "no scale": {"use_scale": False},
    "neither": {"use_scale": False, "use_bias": False},
    "initializers": {"scale_init": nn.initializers.normal(2.0), "bias_init": nn.initializers.ones},
    "slow variance": {"use_fast_variance": False},
    "reductions": {"force_float32_reductions": False},
    "name": {"name": "norm_7"},
}


def narrowest(*trees):
    """The narrowest dtype that results are stored in, and their cotangents."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(trees)}
    return jnp.bfloat16 if jnp.dtype(jnp.bfloat16) in dtypes else None


# --- drop-in -----------------------------------------------------------------


def test_fields():
    """flax's, in its order and with its defaults, then our own."""
    ours, theirs = (
        [(f.name, f.default) for f in dataclasses.fields(m) if f.name not in ("parent", "name")]
        for m in LINEN
    )
    assert ours[: len(theirs)] == theirs
    assert [name for name, _ in ours[len(theirs) :]] == ["unbiased", "norm"]
    calls = [inspect.signature(m.__call__).parameters.values() for m in LINEN]
    ours, theirs = ([(p.name, p.kind, p.default) for p in call] for call in calls)
    assert ours == theirs


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_same_variables(fields):
    """Paths, shapes and dtypes, in a network; and those of its results."""
    both = []
    for module in LINEN:
        layer = nn.Sequential([nn.Dense(4), module(False, **fields)])
        variables = jax.eval_shape(layer.init, KEY, X)
        apply = functools.partial(layer.apply, mutable=["batch_stats"])
        both.append(types((variables, *jax.eval_shape(apply, variables, X))))
    assert both[0] == both[1]


NUMBERS = ["default", "axes", "momentum", "epsilon", "dtype", "param_dtype", "initializers"]


@pytest.mark.parametrize("name", [*NUMBERS, "neither", "reductions"])
def test_same_as_flax(name):
    ours, theirs = (run(m, **FIELDS[name]) for m in LINEN)
    assert types(ours[0]) == types(theirs[0])
    chex.assert_trees_all_equal(ours[0], theirs[0])
    assert types(ours[1:]) == types(theirs[1:])
    close(ours[1:], theirs[1:], rounded_to=narrowest(theirs[1:]))


@pytest.mark.parametrize("name", ["axes", "epsilon", "dtype", "param_dtype", "neither"])
def test_same_as_flax_in_evaluation(name):
    stats = {"mean": jnp.float32(0.5), "var": jnp.float32(2)}
    outputs = []
    for module in LINEN:
        layer = module(True, **FIELDS[name])
        variables = dict(layer.init(KEY, X))
        like = jnp.zeros_like
        variables["batch_stats"] = {
            k: like(v) + stats[k] for k, v in variables["batch_stats"].items()
        }
        y = layer.apply(variables, X)
        _, new = layer.apply(variables, X, mutable=["batch_stats"])
        chex.assert_trees_all_equal(new["batch_stats"], variables["batch_stats"])
        outputs.append(y)
    assert outputs[0].dtype == outputs[1].dtype
    close(*outputs, rounded_to=narrowest(outputs))


@pytest.mark.parametrize("shape", [(6, 5, 1), (5, 1), (4,), SHAPE])
def test_mask_of_any_rank(shape):
    """It broadcasts as flax's does, NumPy's way."""
    mask = RNG.random(shape) < 0.7
    mask.flat[0], mask.flat[-1] = True, False
    fields = {"axis": -1} if shape != (4,) else {"axis": 0}
    ours, theirs = (run(m, mask=mask, **fields) for m in LINEN)
    close(ours[1:], theirs[1:])
    unmasked, _ = bnjax.bn_apply(*bnjax.bn_init(X.shape[fields["axis"]]), X, True, **fields)
    assert error(ours[1], unmasked) > 1e-3


MATRIX = list(
    itertools.product(
        (None, jnp.float32, jnp.bfloat16, jnp.float16),
        (jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_),
    )
)


@pytest.mark.parametrize("dtype, param_dtype, x_dtype", MATRIX)
def test_result_types(dtype, param_dtype, x_dtype):
    """By abstract evaluation: of the output, of the updates, of new variables."""
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    for train, mask, use_bias, axis in ((True, None, True, -1), (False, MASK, False, (0, 2))):
        both = []
        for module in LINEN:
            layer = module(
                dtype=dtype,
                param_dtype=param_dtype,
                use_running_average=not train,
                use_bias=use_bias,
                axis=axis,
            )
            variables = jax.eval_shape(layer.init, KEY, x)
            apply = functools.partial(layer.apply, mask=mask, mutable=["batch_stats"])
            both.append(types((variables, *jax.eval_shape(apply, variables, x))))
        assert both[0] == both[1]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_integers(train, dtype):
    """They are cast to the output's dtype; these fit."""
    x = RNG.integers(0, 20, SHAPE)
    ours, theirs = (run(m, x, train=train, dtype=dtype) for m in LINEN)
    close(ours[1:], theirs[1:], rounded_to=dtype)


class Net(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average=not train, name="BatchNorm_0")(nn.Dense(7)(x))
        return self.norm(use_running_average=not train, axis=1, name="other")(nn.relu(x))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["from flax", "to flax"])
def test_checkpoints(order):
    """msgpack of a trained tree loads into the other, both ways, with the same numbers."""
    written, read = (Net(LINEN[i]) for i in reversed(order))
    variables = jax.jit(written.init, static_argnums=2)(jax.random.key(1), X, True)
    step = jax.jit(lambda v: written.apply(v, X, True, mutable=["batch_stats"]))
    _, updates = step(variables)
    variables = {**variables, **updates}
    saved = serialization.to_bytes(variables)
    template = jax.jit(read.init, static_argnums=2)(jax.random.key(2), X, True)
    loaded = serialization.from_bytes(template, saved)
    chex.assert_trees_all_equal(loaded, variables)
    for train in (True, False):
        outputs = [
            jax.jit(lambda v, n=net, t=train: n.apply(v, X, t, mutable=["batch_stats"]))(tree)
            for net, tree in ((written, variables), (read, loaded))
        ]
        close(outputs[0], outputs[1])


ERRORS = {
    "not given": lambda module, variables: module().init(KEY, X),
    "given twice": lambda module, variables: module(use_running_average=True).apply(
        variables, X, True
    ),
    "not mutable": lambda module, variables: module().apply(variables, X, False),
    "no collection": lambda module, variables: module().apply(
        {"params": variables["params"]}, X, False
    ),
    "shape of scale": lambda module, variables: module().apply(
        {**variables, "params": {"scale": X[0], "bias": X[0, 0]}}, X, True
    ),
}


@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS)
def test_same_error_as_flax(call):
    variables = linen.BatchNorm(use_running_average=True).init(KEY, X)
    errors = []
    for module in LINEN:
        with pytest.raises((ValueError, flax.errors.FlaxError)) as info:
            call(module, variables)
        errors.append((type(info.value), str(info.value)))
    assert errors[0] == errors[1]

"""bnjax.nnx.BatchNorm: flax.nnx.BatchNorm's contract and numbers, and what it adds.

Where the two differ on purpose: test_nnx_differences.py. Bit for bit as bn_apply: test_modules.py.
"""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_flax import MASK, SHAPE, X, close, types
from flax import nnx
from messages import check_message
from tolerances import error

import bnjax
from bnjax.nnx import BatchNorm

RNG = np.random.default_rng(1)

BOTH = (BatchNorm, nnx.BatchNorm)


def make(module=BatchNorm, size=4, **fields):
    return module(size, rngs=nnx.Rngs(0), **fields)


def run(module, x=X, mask=None, stats=None, **fields):
    """(y, gradients, state) of one call of a new layer."""
    layer = make(module, x.shape[fields.get("axis", -1)], **fields)
    if stats is not None:
        nnx.update(layer, jax.tree.map(lambda v: v * 0 + stats, nnx.state(layer, nnx.BatchStat)))

    @nnx.jit
    def step(layer, x):
        def loss(layer, x):
            y = layer(x, mask=mask)
            return jnp.sum(jnp.sin(y).astype(jnp.float32)), y

        argnums = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
        grads, y = nnx.grad(loss, argnums=argnums, has_aux=True)(layer, x)
        return y, grads

    return *step(layer, x), nnx.state(layer)


def arguments(function):
    """Name, kind, default; of initializers, which are closures, what they make."""
    for p in inspect.signature(function).parameters.values():
        default = p.default
        if p.name.endswith("_init"):
            default = default(jax.random.key(0), (2,), jnp.float32).tolist()
        yield p.name, p.kind, default


@pytest.mark.parametrize("method, added", [
    ("__init__", ["statistics_metadata", "unbiased", "norm"]),
    ("__call__", []),
])  # fmt: skip
def test_signature(method, added):
    """flax's arguments in its order, kinds and defaults, then our own."""
    ours, theirs = (list(arguments(getattr(module, method))) for module in BOTH)
    assert ours[: len(theirs)] == theirs
    assert [name for name, _, _ in ours[len(theirs) :]] == added
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in ours[len(theirs) :])


def test_attributes():
    """All that flax's layer has, of the same types and values, in a layer and in its graph."""
    fields = {"axis": 1, "momentum": 0.5, "use_bias": False, "dtype": jnp.bfloat16}
    ours, theirs = (make(module, **fields) for module in BOTH)
    assert isinstance(ours, nnx.Module)
    for name in (name for name in vars(theirs) if not name.startswith("_")):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert type(one) is type(other) and (isinstance(one, nnx.Variable) or one == other), name
    states = [nnx.state(layer) for layer in (ours, theirs)]
    chex.assert_trees_all_equal(*states)
    assert types(states[0]) == types(states[1])


NORMAL = nnx.initializers.normal(1.0)
FIELDS = {
    "default": {},
    "axis": {"axis": 1},
    "momentum": {"momentum": 0.3},
    "epsilon": {"epsilon": 0.5},
    "dtype": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.bfloat16},
    "no bias": {"use_bias": False},
    "no scale": {"use_scale": False},
    "initializers": {"scale_init": NORMAL, "bias_init": NORMAL},
    "slow variance": {"use_fast_variance": False},
}
INPUTS = {
    "matrix": (X.reshape(30, 4), None),
    "sequences": (X, None),
    "images": (np.stack([X, X[::-1] * 2]), None),
    "mask": (X, MASK),
    "mask of lower rank": (X, MASK[0]),
    "mask of features": (X, RNG.random(SHAPE) < 0.7),
}


@pytest.mark.parametrize("x, fields", [
    *(("sequences", fields) for fields in FIELDS),
    *((x, "default") for x in INPUTS if x != "sequences"),
    ("images", "axis"),
])  # fmt: skip
def test_same_as_flax_in_training(x, fields):
    """Output, gradients of parameters and input, new state."""
    (x, mask), fields = INPUTS[x], FIELDS[fields]
    if "dtype" in fields:  # representable, as flax rounds x first
        x = np.array(jnp.asarray(x, jnp.bfloat16), np.float32)
    ours, theirs = (run(module, x, mask, **fields) for module in BOTH)
    assert types(ours) == types(theirs)
    narrow = {"dtype", "param_dtype"} & set(fields)
    close(ours, theirs, rounded_to=jnp.bfloat16 if narrow else None)
    assert any(np.any(g != 0) for g in jax.tree.leaves(ours[1]))


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"dtype"}))
def test_same_as_flax_in_evaluation(name):
    fields = {**FIELDS[name], "use_running_average": True, "stats": 1.25}
    ours, theirs = (run(module, **fields) for module in BOTH)
    assert types(ours) == types(theirs)
    close(ours, theirs, rounded_to=jnp.bfloat16 if name == "param_dtype" else None)
    assert np.all(ours[2]["mean"][...] == 1.25)


DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_)
MATRIX = list(itertools.product((None, *DTYPES[:3]), DTYPES[:2], DTYPES))


@pytest.mark.parametrize("dtype, param_dtype, x_dtype", MATRIX)
def test_result_types(dtype, param_dtype, x_dtype):
    """By abstract evaluation: of the output and of the layer's new state."""
    x = jax.ShapeDtypeStruct(SHAPE, x_dtype)
    for train, mask, use_bias, axis in ((True, None, True, -1), (False, MASK, False, 0)):
        fields = {"dtype": dtype, "param_dtype": param_dtype, "use_bias": use_bias, "axis": axis}

        def call(x, module, train=train, mask=mask, axis=axis, fields=fields):
            layer = make(module, SHAPE[axis], **fields)
            return layer(x, not train, mask=mask), nnx.state(layer)

        both = [types(jax.eval_shape(functools.partial(call, module=m), x)) for m in BOTH]
        assert both[0] == both[1]


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_])
@pytest.mark.parametrize("train", [True, False])
def test_numbers_of_other_inputs(x_dtype, train):
    x = jnp.asarray(X * 4, x_dtype)
    ours, theirs = (run(module, x, use_running_average=not train) for module in BOTH)
    assert types(ours) == types(theirs)
    close(ours, theirs, rounded_to=None if x_dtype in (jnp.int32, jnp.bool_) else x_dtype)


def test_promote_dtype_is_honoured():
    """It gets flax's five arrays and dtype; its x, scale and bias are used."""
    seen = []

    def promote(args, *, dtype):
        seen.append((tuple(None if a is None else a.dtype for a in args), dtype))
        x, mean, var, scale, bias = (None if a is None else jnp.asarray(a, dtype) for a in args)
        return x * 2, mean, var, scale * 3, bias

    fields = {"promote_dtype": promote, "dtype": jnp.float16, "use_bias": False}
    outputs = [make(module, **fields)(X.astype(jnp.bfloat16)) for module in BOTH]
    given = ((*map(jnp.dtype, (jnp.bfloat16, *[jnp.float32] * 3)), None), jnp.float16)
    assert seen == [given, given]
    assert outputs[0].dtype == outputs[1].dtype == jnp.float16
    close(*outputs, rounded_to=jnp.float16)
    plain = make(use_bias=False)(jnp.asarray(X, jnp.bfloat16).astype(jnp.float32))
    assert error(outputs[0], 3 * plain) < 4e-3


def test_modes():
    """train, eval and nnx.view set the attribute; a call goes before it."""
    layer = make(momentum=0.5)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(1)), layer)
    model.eval()
    assert layer.use_running_average is True
    chex.assert_trees_all_equal(layer(X), layer(X, True))
    assert np.all(layer.mean[...] == 0)
    layer(X, use_running_average=False)
    close(layer.mean[...], X.mean((0, 1)) / 2)
    model.train()
    before = layer.mean[...]
    layer(X, True)
    chex.assert_trees_all_equal(layer.mean[...], before)
    layer(X)
    close(layer.mean[...], X.mean((0, 1)) * 0.75)


def test_view():
    """A view shares the variables and leaves the layer as it is."""
    model = nnx.Sequential(make(momentum=0.0, use_running_average=None))
    view = nnx.view(model, use_running_average=False)
    assert model.layers[0].use_running_average is None
    assert view.layers[0].mean is model.layers[0].mean
    view(X)
    close(model.layers[0].mean[...], X.mean((0, 1)))
    evaluated = nnx.view(model, use_running_average=True)(X)
    chex.assert_trees_all_equal(evaluated, model.layers[0](X, True))


@pytest.mark.parametrize("train", [True, False])
def test_traced_use_running_average(train):
    traced, static = make(momentum=0.5), make(momentum=0.5)
    y = nnx.jit(lambda layer, flag: layer(X, flag))(traced, jnp.array(not train))
    close(y, static(X, not train))
    close(nnx.state(traced), nnx.state(static))
    assert bool(np.any(traced.mean[...] != 0)) == train


def test_schedule():
    """Cumulative over different batches is their plain average; only schedules count."""
    layer = make(momentum=bnjax.cumulative())
    assert type(layer.count) is nnx.BatchStat and layer.count.dtype == jnp.int32
    parts = [X[:2], X[2:4], X[3:]]
    for x in parts:
        layer(x)
    close(layer.mean[...], np.mean([x.mean((0, 1)) for x in parts], 0))
    np.testing.assert_array_equal(layer.count[...], np.full(4, 3, np.int32))
    assert set(nnx.state(layer)) == {"bias", "count", "mean", "scale", "var"}
    assert set(nnx.state(make(momentum=0.5))) == {"bias", "mean", "scale", "var"}
    counted = make(norm=bnjax.batch_norm(momentum=bnjax.debiased(0.9)))
    assert set(nnx.state(counted)) == set(nnx.state(layer))


def test_several_feature_axes():
    layer = make(size=(6, 4), axis=(-1, 0), momentum=0.0)
    y = layer(X)
    assert layer.scale.shape == layer.mean.shape == (6, 4)
    close(y, (X - X.mean(1, keepdims=True)) / np.sqrt(X.var(1, keepdims=True) + 1e-5))
    close(layer.var[...], X.var(1))


def test_norm_and_unbiased():
    options = {"momentum": 0.25, "epsilon": 0.5, "unbiased": True}
    layers = make(norm=bnjax.batch_norm(**options)), make(**options)
    chex.assert_trees_all_equal(*(layer(X) for layer in layers))
    chex.assert_trees_all_equal(*(nnx.state(layer) for layer in layers))
    close(layers[1].var[...], 0.25 + 0.75 * X.var((0, 1)) * 30 / 29)


NORM = bnjax.batch_norm
# fmt: off
ERRORS = {
    "features": ({"size": 3}, ValueError, "x", "num_features=3 along axis -1", "BatchNorm(4, ...)"),
    "several": ({"size": (6, 5), "axis": (0, -1)}, ValueError, "x", "axis (0, -1)", "(6, 4"),
    "broadcast": ({"size": 1}, ValueError, "x", "num_features=1", "BatchNorm(4, ...)"),
    "axis": ({"axis": 3}, ValueError, "axis", "in [-3, 3)", ""),
    "mode": ({"use_running_average": None}, ValueError, "use_running_average", "", "model.train()"),
    "twice": ({"momentum": 0.9, "norm": NORM()}, ValueError, "momentum", "in `norm`", "=0.9)"),
    "norm": ({"norm": NORM}, TypeError, "norm", "must be a Norm", "bnjax.batch_norm()"),
    "no size": ({"size": 0}, ValueError, "num_features", "positive", ""),
    "size": ({"size": "4"}, TypeError, "num_features", "an int or a tuple", "BatchNorm(x.shape"),
}
# fmt: on
GOT = {
    "axis": "3",
    "mode": "None",
    "twice": "0.9",
    "norm": "<function",
    "no size": "0",
    "size": "'4'",
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    fields, kind, option, rule, fix = ERRORS[name]
    check_message(lambda: make(**fields)(X), (kind, option, rule, GOT.get(name, ""), fix))


def test_schedule_after_construction():
    """The error says how to supply the count; what it says works."""
    layer = make()
    layer.momentum = bnjax.cumulative()
    with pytest.raises(ValueError, match=r"none for \['count'\].*after the layer was made") as info:
        layer(X)
    assert "layer.count = nnx.BatchStat(jnp.zeros(shape, jnp.int32))" in str(info.value)
    layer.count = nnx.BatchStat(jnp.full(4, 3, jnp.int32))
    layer(X)
    close(layer.mean[...], X.mean((0, 1)) / 4)

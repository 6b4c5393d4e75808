"""bn_init, bn_apply and batch_norm: what every option does, against float64 NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tolerances import assert_close, error

import bnjax

RNG = np.random.default_rng(0)
SHAPE = (6, 5, 4)
X = RNG.normal(RNG.normal(size=SHAPE[1:]), 2, SHAPE).astype(np.float32)
MASK = RNG.random((6, 5, 1)) < 0.6
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def layer(*shape, **options):
    """Parameters and statistics that no default hides behind."""
    rng = np.random.default_rng(1)
    params, state = bnjax.bn_init(shape, **options)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(2, 1, shape), p.dtype), params)
    mean, var = rng.normal(1, 1, shape), rng.uniform(1, 3, shape)
    count = np.arange(np.prod(shape)).reshape(shape)
    values = bnjax.BNState(mean, var, count)
    return params, jax.tree.map(lambda s, v: jnp.asarray(v, s.dtype), state, values)


def oracle(params, state, x, train=True, epsilon=1e-5, momentum=0.99, **options):
    inputs = reference.Inputs(x, *params, state.mean, state.var, epsilon)
    options = {"train": train, "momentum": momentum, "count": state.count, **options}
    return reference.forward(inputs, **options)


def check(params, state, x, train, jit=True, **options):
    """bn_apply agrees with the oracle; returns what the oracle said."""
    static = {k: options.pop(k) for k in ("axis", "unbiased") if k in options}
    if callable(options.get("momentum")):
        static["momentum"] = options.pop("momentum")
    apply = functools.partial(bnjax.bn_apply, train=train, **static)
    y, new = (jax.jit(apply) if jit else apply)(params, state, x, **options)
    expected = oracle(params, state, x, train, **static, **options)
    close((y, *new[:2]), expected[:3])
    np.testing.assert_array_equal(new.count, expected.count)
    if not train:
        chex.assert_trees_all_equal(new, state)
    return expected


# Options, and which of y, mean and var they change in training.
OPTIONS = {
    "momentum float": ({"momentum": 0.5}, "mean var"),
    "momentum 0": ({"momentum": 0}, "mean var"),
    "momentum 1": ({"momentum": 1}, "mean var"),
    "momentum NumPy": ({"momentum": np.float64(0.3)}, "mean var"),
    "momentum array": ({"momentum": np.array([0.0, 0.25, 0.5, 1.0], np.float32)}, "mean var"),
    "momentum schedule": ({"momentum": optax.linear_schedule(0.0, 1.0, 4)}, "mean var"),
    "epsilon float": ({"epsilon": 0.5}, "y"),
    "epsilon 0": ({"epsilon": 0}, ""),
    "epsilon int": ({"epsilon": 1}, "y"),
    "epsilon array": ({"epsilon": np.array([0.1, 1.0, 2.0, 4.0], np.float32)}, "y"),
    "unbiased": ({"unbiased": True, "momentum": 0.5}, "mean var"),
    "mask": ({"mask": MASK}, "y mean var"),
    "mask of channels": ({"mask": RNG.random((1, 5, 4)) < 0.7}, "y mean var"),
    "mask whole": ({"mask": RNG.random(SHAPE) < 0.5}, "y mean var"),
    "mask and unbiased": ({"mask": MASK, "unbiased": True, "momentum": 0}, "y mean var"),
}


@pytest.mark.parametrize("options, changed", OPTIONS.values(), ids=OPTIONS)
def test_option(options, changed):
    params, state = layer(4)
    expected = check(params, state, X, True, **options)
    default = oracle(params, state, X)
    for name, a, b in zip(("y", "mean", "var"), expected[:3], default[:3], strict=True):
        # A test of an option that made no difference would not see it ignored.
        assert (error(a, b) > 1e-3) == (name in changed.split()), name


def test_options_that_are_concrete():
    """Outside of jit, where values can be looked at."""
    options = {"momentum": np.array([0.0, 0.25, 0.5, 1.0]), "epsilon": jnp.array(0.5)}
    check(*layer(4), X, True, jit=False, mask=MASK, unbiased=True, **options)


def test_unbiased_changes_the_running_variance_only():
    params, state = layer(4)
    y, new = bnjax.bn_apply(params, state, X, True, momentum=0.5)
    y_unbiased, unbiased = bnjax.bn_apply(params, state, X, True, momentum=0.5, unbiased=True)
    chex.assert_trees_all_equal(y, y_unbiased)
    chex.assert_trees_all_equal(new._replace(var=0), unbiased._replace(var=0))
    batch, batch_unbiased = 2 * new.var - state.var, 2 * unbiased.var - state.var
    close(batch_unbiased, batch * 30 / 29)


@pytest.mark.parametrize("epsilon", [0.5, np.array([0.1, 1.0, 2.0, 4.0], np.float32)])
def test_inference(epsilon):
    """Epsilon counts; momentum, unbiased and mask do not, and nothing is updated."""
    params, state = layer(4)
    check(params, state, X, False, epsilon=epsilon)
    y, _ = bnjax.bn_apply(params, state, X, False, epsilon=epsilon)
    others = {"momentum": 0.3, "unbiased": True, "axis_name": "not mapped"}
    y_others, new = bnjax.bn_apply(params, state, X, False, epsilon=epsilon, **others)
    chex.assert_trees_all_equal((y, state), (y_others, new))
    # A mask makes another program, which rounds otherwise.
    y_masked, new = bnjax.bn_apply(params, state, X, False, epsilon=epsilon, mask=MASK)
    close(y_masked, y)
    chex.assert_trees_all_equal(state, new)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6])
def test_axis_anywhere(rank):
    shape = (2, 3, 4, 5, 2, 3)[:rank]
    x = RNG.normal(3, 2, shape).astype(np.float32)
    for axis in range(rank) if rank <= 3 else {rank // 2}:
        params, state = layer(shape[axis])
        check(params, state, x, True, axis=axis)
    check(*layer(shape[0]), x, True, axis=-rank)
    check(*layer(shape[0]), x, False, axis=-rank)


@pytest.mark.parametrize("axis", [(1, 2), (2, 1), (-1, 0), (0, 2), [1, 2]])
def test_several_axes(axis):
    """Parameters have the sizes of the axes in ascending order of axis."""
    shape = tuple(SHAPE[a] for a in sorted(a % 3 for a in axis))
    x = RNG.normal(3, 2, SHAPE).astype(np.float32)
    check(*layer(*shape), x, True, axis=axis)


def test_all_axes_but_none():
    """axis=() has one statistic for everything, of shape ()."""
    check(*layer(), X, True, axis=())


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_scale_and_bias(use_scale, use_bias):
    params, state = layer(4, use_scale=use_scale, use_bias=use_bias)
    assert (params.scale is not None, params.bias is not None) == (use_scale, use_bias)
    check(params, state, X, True)
    check(params, state, X, False)


@pytest.mark.parametrize("features", [3, np.int64(3), (3,), [3], (2, 3, 4)])
def test_init(features):
    params, state = bnjax.bn_init(features)
    shape = (3,) if np.size(features) == 1 else features
    assert isinstance(params, bnjax.BNParams) and isinstance(state, bnjax.BNState)
    one, zero = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    expected = (bnjax.BNParams(one, zero), bnjax.BNState(zero, one, zero.astype(np.int32)))
    chex.assert_trees_all_equal_shapes_and_dtypes((params, state), expected)
    chex.assert_trees_all_equal((params, state), expected)
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves((params, state)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, "bfloat16"])
def test_param_dtype(dtype):
    params, state = bnjax.bn_init(3, param_dtype=dtype)
    chex.assert_type([params.scale, params.bias], dtype)
    chex.assert_type([state.mean, state.var, state.count], [jnp.float32, jnp.float32, jnp.int32])


def test_param_dtype_float64(x64):
    params, state = bnjax.bn_init(3, param_dtype=jnp.float64)
    chex.assert_type(params, jnp.float64)
    chex.assert_type([state.mean, state.var, state.count], [jnp.float64, jnp.float64, jnp.int32])


def test_axis_name():
    params, state = layer(4)
    parts = X.reshape(3, 2, 5, 4)

    def step(axis_name):
        apply = functools.partial(bnjax.bn_apply, params, state, train=True, axis_name=axis_name)
        y, new = jax.jit(jax.vmap(apply, axis_name="i"))(parts)
        return y.reshape(SHAPE), new

    y, new = step("i")
    expected = oracle(params, state, X)
    close(y, expected.y)
    for i in range(3):
        close((new.mean[i], new.var[i]), (expected.mean, expected.var))
    assert error(step(None)[0], expected.y) > 1e-2


def test_two_axis_names():
    params, state = layer(4)
    step = functools.partial(bnjax.bn_apply, params, state, train=True, axis_name=("i", "j"))
    step = jax.vmap(jax.vmap(step, axis_name="j"), axis_name="i")
    y, _ = jax.jit(step)(X.reshape(3, 2, 1, 5, 4))
    close(y.reshape(SHAPE), oracle(params, state, X).y)


def test_axis_index_groups(devices):
    """Devices 0, 3, 5 and 6 are one batch, the other four another."""
    params, state = layer(4)
    groups = [[0, 3, 5, 6], [1, 2, 4, 7]]
    x = RNG.normal(RNG.normal(size=(8, 1, 4)), 1, (8, 5, 4)).astype(np.float32)
    options = {"axis_name": "i", "axis_index_groups": groups, "momentum": 0}

    def step(x):
        y, new = bnjax.bn_apply(params, state, x, True, **options)
        return y, new.mean[None]

    mesh, specs = Mesh(np.array(devices), ("i",)), (P("i"), P("i"))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("i"), out_specs=specs, check_vma=False)
    y, mean = jax.jit(mapped)(x)
    for group in np.array(groups):
        expected = oracle(params, state, x[group], momentum=0)
        close(y[group], expected.y)
        close(mean[group], np.stack([expected.mean] * 4))


@pytest.mark.parametrize("dtype", [None, jnp.float32, "bfloat16", np.float16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_dtype(dtype, x_dtype, train):
    """y has it, by one rounding from float32."""
    params, state = layer(4)
    x = jnp.asarray(X, x_dtype)
    y, new = bnjax.bn_apply(params, state, x, train, dtype=dtype)
    wanted = x_dtype if dtype is None else jax.dtypes.canonicalize_dtype(dtype)
    chex.assert_type(y, wanted)
    exact, same = bnjax.bn_apply(params, state, x, train, dtype=jnp.float32)
    chex.assert_trees_all_equal((y, new), (exact.astype(wanted), same))
    close(exact, oracle(params, state, x, train).y)


def test_dtype_float64(x64):
    """float64 in, float64 all the way; float32 parameters and statistics are promoted."""
    params, state = layer(4)
    x = np.asarray(X, np.float64) + 1e5
    y, new = bnjax.bn_apply(params, state, x, True, momentum=0)
    chex.assert_type([y, new.mean], [jnp.float64, jnp.float32])
    expected = oracle(params, state, x, momentum=0)
    # About 1e5 deviations of 2: 1e-16 * 1e5 of y, and the mean is stored in float32.
    assert error(y, expected.y) < 1e-10
    close((new.mean, new.var), (expected.mean, expected.var))
    y, _ = bnjax.bn_apply(params, state, x, True, dtype=jnp.float32)
    close(y, expected.y)
    chex.assert_type(y, jnp.float32)

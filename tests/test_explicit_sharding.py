"""Mesh axes of explicit sharding: numbers and placements, with the channels sharded too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import BNParams, BNState

N, C = 16, 4
P = PartitionSpec
RNG = np.random.default_rng(0)
X, W = (RNG.normal(3, 2, (2, N, C))).astype(np.float32)
PARAMS = BNParams(*RNG.uniform(0.5, 1.5, (2, C)).astype(np.float32))
STATE = BNState(*RNG.uniform(1, 2, (2, C)).astype(np.float32), np.ones(C, np.int32))
MASK = RNG.random((N, C)) < 0.7
DATA = {"batch": P("d"), "channels": P(None, "m"), "both": P("d", "m")}


@pytest.fixture(autouse=True)
def mesh(devices):
    with jax.set_mesh(jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)):
        yield


def place(tree, spec):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, spec), tree)


def spec_of(array):
    """Which mesh axes each axis is sharded over, None at the end left out."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec[: max((i + 1 for i, name in enumerate(spec) if name is not None), default=0)]


def assert_placed(tree, like):
    assert jax.tree.map(spec_of, tree) == jax.tree.map(spec_of, like)


def loss(params, x, state, w, train, **options):
    y, new = bnjax.bn_apply(params, state, x, train, **options)
    return jnp.sum(y * w + 0.1 * y**2), (y, new)


STATIC = ("axis", "momentum", "unbiased", "dtype")
CALLS = {
    "train": {"train": True},
    "evaluate": {"train": False},
    "mask of rows": {"train": True, "mask": MASK[:, :1]},
    "all else": {
        "train": jnp.array(True),
        "mask": MASK,
        "momentum": bnjax.cumulative(),
        "unbiased": True,
        "epsilon": jnp.array(1e-3),
    },
}


def step(params, x, state, w, **call):
    """Outputs, state and gradients."""
    static = {
        name: value for name, value in call.items() if name in STATIC or isinstance(value, bool)
    }

    @jax.jit
    def run(params, x, state, w, arrays):
        f = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, (y, new)), gradient = f(params, x, state, w, **static, **arrays)
        return (y, new), gradient

    return run(params, x, state, w, {n: v for n, v in call.items() if n not in static})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("vectors", [(P(), P()), (P("m"), P()), (P("m"), P("m"))])
@pytest.mark.parametrize("data", DATA)
def test_function(data, vectors, call):
    """A mask and a traced `train` may come unplaced, whatever `x` is."""
    x, w = place((X, W), DATA[data])
    params, state = place(PARAMS, vectors[0]), place(STATE, vectors[1])
    found = step(params, x, state, w, **CALLS[call])
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        expected = step(PARAMS, X, STATE, W, **CALLS[call])
    tolerances.assert_close(jax.device_get(found), jax.device_get(expected), np.float32, N)
    assert_placed(found, ((x, state), (params, x)))


@pytest.mark.parametrize("masked", [None, MASK])
@pytest.mark.parametrize("data", DATA)
def test_moments(data, masked):
    found = bnjax.moments(jax.device_put(X, DATA[data]), mask=masked)
    expected = bnjax.moments(X, mask=masked)
    tolerances.assert_close(jax.device_get(found), jax.device_get(expected), np.float32, N)
    assert {spec_of(leaf) for leaf in found} == {tuple(DATA[data])[1:]}


SHARDED = {"out_sharding": ("m",)}
METADATA = {f"{name}_metadata": SHARDED for name in ("scale", "bias")}


def nnx_layer(module, **options):
    layer = module(C, rngs=nnx.Rngs(0), **METADATA, **options)
    layer.scale[...], layer.bias[...] = place(PARAMS, P("m"))
    return layer


def nnx_step(layer, x, train):
    @nnx.jit
    def run(layer, x):
        f = nnx.value_and_grad(lambda layer, x: (layer(x, not train) * W).sum(), argnums=(0, 1))
        return f(layer, x)

    value, (dlayer, dx) = run(layer, x)
    return value, nnx.to_pure_dict(nnx.state(layer)), nnx.to_pure_dict(nnx.state(dlayer)), dx


@pytest.mark.parametrize("statistics", [{}, {"statistics_metadata": SHARDED}])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("data", DATA)
def test_nnx(data, train, statistics):
    """As flax.nnx, which has statistics unsharded before the first step."""
    x = jax.device_put(X, DATA[data])
    layer = nnx_layer(bnjax.nnx.BatchNorm, **statistics)
    before = nnx.to_pure_dict(nnx.state(layer))
    found = nnx_step(layer, x, train)
    expected = nnx_step(nnx_layer(nnx.BatchNorm), x, train)
    tolerances.assert_close(jax.device_get(found), jax.device_get(expected), np.float32, N)
    assert_placed(found[1], before)
    assert spec_of(found[1]["mean"]) == (("m",) if statistics else ())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("data", DATA)
def test_linen(data, train):
    x = jax.device_put(X, DATA[data])

    @jax.jit
    def run(variables, x):
        def loss(params, x):
            y, updates = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return (y * W).sum(), updates

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    both = []
    for module in (bnjax.linen.BatchNorm, linen.BatchNorm):
        layer = module(use_running_average=not train)
        stats = place({"mean": STATE.mean, "var": STATE.var}, P("m"))
        variables = {"params": place(PARAMS._asdict(), P("m")), "batch_stats": stats}
        both.append(run(variables, x))
        assert_placed(both[-1][0][1], {"batch_stats": stats})
    tolerances.assert_close(*jax.device_get(both), np.float32, N)


@pytest.mark.parametrize("masked", [False, True])
def test_vmap_over_a_mesh_axis(masked):
    """A layer per device, each with its own data: JAX batches loops and checkpoints there."""
    x, w = (np.stack([v, v + 1, 2 * v, v * v]) for v in (X, W))
    mask = np.stack([MASK, ~MASK, MASK, MASK]) if masked else np.ones_like(x, bool)

    @jax.jit
    def run(x, w, mask):
        def f(x, w, mask):
            options = {"mask": mask} if masked else {}
            return loss(PARAMS, x, STATE, w, True, **options)

        def total(x):
            parts, aux = jax.vmap(f)(x, w, mask)
            return parts.sum(), aux

        return jax.value_and_grad(total, has_aux=True)(x)

    found = run(*place((x, w, mask), P("d")))
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        expected = run(x, w, mask)
    tolerances.assert_close(jax.device_get(found), jax.device_get(expected), np.float32, N)
    assert spec_of(found[1]) == ("d",)

"""Batch renormalization: derivatives in every mode, what they keep, and several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tolerances
from benchmark_scripts import hlo, ways
from jax.sharding import AxisType, PartitionSpec
from test_renorm import (
    INPUTS,
    LIMITS,
    MASK,
    PARAMS,
    RNG,
    STATE,
    C,
    N,
    W,
    X,
    correction,
    limited,
    oracle,
)

import bnjax
from bnjax import BNParams, BNState


@pytest.mark.parametrize("limits, masked", [("default", True), ("narrow", False)])
def test_derivatives(limits, masked):
    """Both modes, of y and of the new state by all inputs; r and d are constants."""
    mask = MASK if masked else None
    norm = limited(*LIMITS[limits], momentum=0.5)
    inputs = INPUTS._replace(epsilon=None)
    along = jax.tree.map(lambda v: RNG.normal(size=v.shape).astype(np.float32), inputs)

    def f(i):
        state = STATE._replace(mean=i.mean, var=i.var)
        y, new = norm.apply(BNParams(i.scale, i.bias), state, i.x, True, mask=mask)
        return y, new.mean, new.var

    def exact(i):
        return oracle(i._replace(epsilon=1e-5), LIMITS[limits], mask=mask, momentum=0.5)[:3]

    _, found = jax.jit(lambda i, d: jax.jvp(f, (i,), (d,)))(inputs, along)
    expected = reference.directional(exact, inputs, along)
    tolerances.assert_close(found, expected, jnp.float32, N)
    cotangents = (W, *RNG.normal(size=(2, C)).astype(np.float32))
    back = jax.jit(lambda i, w: jax.vjp(f, i)[1](w))(inputs, cotangents)[0]
    product = sum(np.vdot(w, e) for w, e in zip(cotangents, expected, strict=True))
    pulled = sum(np.vdot(g, d) for g, d in zip(back[:5], along[:5], strict=True))
    assert pulled == pytest.approx(product, rel=tolerances.values(jnp.float32, N))


@pytest.mark.usefixtures("x64")
def test_second_order():
    """Against the formula written plainly, in float64; some channels are at their limits."""
    limits, norm = (1.3, 0.5), bnjax.renorm(r_max=1.3, d_max=0.5)
    w = W[:6, [0, 3, 4]].astype(np.float64)
    state = BNState(*(v[[0, 3, 4]].astype(np.float64) for v in STATE[:2]), STATE.count[:3])
    params = BNParams(*(p[:3].astype(np.float64) for p in PARAMS))

    def plain(params, x, mean, var):
        batch, spread = x.mean(0), jnp.sqrt(x.var(0) + 1e-5)
        sigma = jnp.sqrt(var + 1e-5)
        r = jnp.clip(spread / sigma, 1 / limits[0], limits[0])
        d = jnp.clip((batch - mean) / sigma, -limits[1], limits[1])
        r, d = jax.lax.stop_gradient((r, d))
        row = dict(zip("brdsm", (params.bias, r, d, params.scale, batch), strict=True))
        row = {name: v[None] for name, v in row.items()}
        normal = (x - row["m"]) / spread[None]
        return (normal * row["r"] + row["d"]) * row["s"] + row["b"]

    def ours(params, x, mean, var):
        return norm.apply(params, BNState(mean, var, state.count), x, True)[0]

    args = (params, jnp.asarray(X[:6, [0, 3, 4]], jnp.float64), *state[:2])
    along = jax.tree.map(lambda v: RNG.normal(size=v.shape), args)

    def second(f):
        def gradient(*args):
            return jax.grad(lambda *args: jnp.sum(w * f(*args) ** 3), (0, 1, 2, 3))(*args)

        return jax.jit(lambda *args: jax.jvp(gradient, args, along)[1])(*args)

    tolerances.assert_close(second(ours), second(plain), jnp.float64, N, scale=100.0)


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_accurate_at_large_means(mean):
    """Deviations from a running mean that is as large."""
    x = (RNG.normal(size=(4096, 3)) + mean).astype(np.float32)
    state = BNState(np.float32([1, 0, -2]) + np.float32(mean), np.ones(3, "f"), STATE.count[:3])
    inputs = reference.Inputs(x, np.ones(3, "f"), np.zeros(3, "f"), *state[:2], 1e-5)
    y, _ = bnjax.renorm().apply(BNParams(*inputs[1:3]), state, x, True)
    tolerances.assert_close(y, oracle(inputs, (3.0, 5.0))[0], jnp.float32, 4096)


@pytest.mark.parametrize("train", [True, "traced"])
def test_reverse_mode_keeps_x_alone(train):
    """In its own dtype, and vectors."""
    flag = jnp.array(True) if train == "traced" else True

    def pullback(x):
        return jax.vjp(lambda p, x: bnjax.renorm().apply(p, STATE, x, flag)[0], PARAMS, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(pullback, jnp.asarray(X, jnp.bfloat16)))
    assert [str(v.dtype) for v in kept if v.size >= X.size] == ["bfloat16"]


def test_compiled_steps_access_what_those_of_bn_apply_do():
    x = jax.ShapeDtypeStruct((4096, C), jnp.float32)

    def accessed(apply):
        def step(x, dy):
            y, vjp = jax.vjp(lambda p, x: apply(p, STATE, x, True)[0], PARAMS, x)
            return y, vjp(dy)

        return jax.jit(step).lower(x, x).compile().cost_analysis()["bytes accessed"]

    assert accessed(bnjax.renorm().apply) < accessed(bnjax.bn_apply) + 200 * 4 * C


@pytest.mark.parametrize(
    "way",
    [
        "jit, explicit, channels too",
        "shard_map, grad inside",
        "shard_map without vma, grad inside",
        "vmap",
    ],
)
def test_devices(way, devices, monkeypatch):
    """The numbers of one device, with the all-reduces of bn_apply: one forward, one backward."""
    limits, state = (1.5, 2.9), BNState(np.zeros(C), np.ones(C), 7)

    def apply(params, given, x, train, **options):
        given = given._replace(count=given.count + 7)
        return limited(*limits).apply(params, given, x, train, **options)

    way = ways.WAYS[way]
    grid = way.grid(len(devices))
    problem = ways.problem(grid)
    monkeypatch.setattr(bnjax, "bn_apply", apply)
    found, text = way.program(problem, devices).run()
    always = [c.kind for c in hlo.collectives(text) if c.place == "always"]
    assert always == ["all-reduce"] * 2
    inputs = reference.Inputs(problem.x, *problem.params, *state[:2], 1e-5)
    options = {"mask": problem.mask, "momentum": ways.MOMENTUM}
    y, *new = oracle(inputs, limits, **options)
    tolerances.assert_close(np.reshape(found.y, y.shape), y, jnp.float32, N)
    # Backward: as of bn_apply with the scale r * scale, and d * scale + bias.
    r, d = correction(inputs, *limits, problem.mask)
    cotangents = (problem.w + 0.2 * y, *ways.coefficients(C))
    moved = inputs._replace(scale=r * inputs.scale, bias=d * inputs.scale + inputs.bias)
    g = reference.backward(moved, cotangents, **options)
    gradients = (r * g.scale + d * g.bias, g.bias, g.x)
    found_gradients = (*found.params, np.reshape(found.x, y.shape))
    if way is ways.WAYS["vmap"]:
        found = found._replace(state=jax.tree.map(lambda v: v[0], found.state))
        found_gradients = (*(v[0] for v in found.params), found_gradients[2])
    tolerances.assert_close(found_gradients, gradients, jnp.float32, N)
    tolerances.assert_close(tuple(found.state), tuple(new), jnp.float32, N)


def test_a_state_placed_unlike_the_channels(devices):
    """On a mesh of explicit axes: x in parts by channel, the state whole on each device."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,), devices=devices[:2])
    limits = LIMITS["per channel"]
    with jax.set_mesh(mesh):
        x = jax.device_put(X, PartitionSpec(None, "i"))
        found = jax.jit(lambda x: limited(*limits).apply(PARAMS, STATE, x, True))(x)
    tolerances.assert_close((found[0], *found[1]), oracle(INPUTS, limits), jnp.float32, N)

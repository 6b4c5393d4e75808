"""Recurrent batch normalization over sequences of different lengths, in linen and nnx.

The truth is float64 with the ended sequences deleted: no mask, no scan, no bnjax.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from tolerances import error, two_pass

import bnjax.linen
import bnjax.nnx

RNG = np.random.default_rng(0)
LENGTHS = np.array([5, 3, 2, 4, 1, 4, 4, 2])
BATCH, STEPS, INPUTS, HIDDEN = 8, 6, 3, 4
# In the last two steps one sequence is alive, and none.
ALIVE = np.arange(STEPS) < LENGTHS[:, None]
LEARNS = ALIVE.sum(0) >= 2
X = RNG.normal(1, 2, (BATCH, STEPS, INPUTS)).astype(np.float32)
COTANGENT = RNG.normal(size=(BATCH, STEPS, HIDDEN)).astype(np.float32)
NORMS = ("norm_h", "norm_x")
# A schedule counts the updates. Of one sequence alone the variance is 0, so that rounding of
# its gradient, which is 0 too, is multiplied by 1 / sqrt(epsilon).
OPTIONS = {"momentum": optax.constant_schedule(0.5), "epsilon": 1e-3}


def split(inputs):
    """The input and who is alive: apart, or in one array for the sake of RNN."""
    if isinstance(inputs, tuple):
        return inputs
    return inputs[..., :-1], inputs[..., -1:] > 0


class LinenCell(nn.RNNCellBase):
    """h = tanh(BN(W h) + BN(V x)) while the sequence lasts; Cooijmans et al. (2017)."""

    train: bool = True

    @nn.compact
    def __call__(self, h, inputs):
        x, alive = split(inputs)
        norm = functools.partial(bnjax.linen.BatchNorm, not self.train, **OPTIONS)
        dense = functools.partial(nn.Dense, HIDDEN, use_bias=False)
        of_h = norm(name="norm_h")(dense(name="h")(h), mask=alive)
        of_x = norm(name="norm_x")(dense(name="x")(x), mask=alive)
        h = jnp.where(alive, nn.tanh(of_h + of_x), h)
        return h, h

    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], HIDDEN))

    num_feature_axes = property(lambda self: 1)


class NNXCell(nnx.RNNCellBase):
    def __init__(self, rngs):
        self.h = nnx.Linear(HIDDEN, HIDDEN, use_bias=False, rngs=rngs)
        self.x = nnx.Linear(INPUTS, HIDDEN, use_bias=False, rngs=rngs)
        norm = functools.partial(bnjax.nnx.BatchNorm, HIDDEN, rngs=rngs, **OPTIONS)
        self.norm_h, self.norm_x = norm(), norm()

    def __call__(self, h, inputs):
        x, alive = split(inputs)
        new = nnx.tanh(self.norm_h(self.h(h), mask=alive) + self.norm_x(self.x(x), mask=alive))
        h = jnp.where(alive, new, h)
        return h, h

    def initialize_carry(self, input_shape, rngs=None):
        return jnp.zeros((*input_shape[:-1], HIDDEN))

    num_feature_axes = property(lambda self: 1)


def joined(x):
    return jnp.concatenate([x, ALIVE[..., None].astype(x.dtype)], -1)


def linen_axes(shared, train):
    if shared and not train:
        return {"variable_broadcast": ("params", "batch_stats")}
    how = {"variable_carry": "batch_stats"} if shared else {"variable_axes": {"batch_stats": 0}}
    return {"variable_broadcast": "params", **how}


def linen_rnn(params, stats, x, shared, train):
    layer = nn.RNN(LinenCell(train=train), **linen_axes(shared, train))
    variables = {"params": {"cell": params}, "batch_stats": {"cell": stats}}
    y, new = layer.apply(variables, joined(x), mutable=["batch_stats"] if train else [])
    return y, new["batch_stats"]["cell"] if train else stats


def linen_scan(params, stats, x, shared, train):
    layer = nn.scan(LinenCell, in_axes=1, out_axes=1, **linen_axes(shared, train))(train=train)
    variables = {"params": params, "batch_stats": stats}
    start, mutable = jnp.zeros((BATCH, HIDDEN)), ["batch_stats"] if train else []
    (_, y), new = layer.apply(variables, start, (x, ALIVE[..., None]), mutable=mutable)
    return y, new["batch_stats"] if train else stats


def nnx_cell(params, stats, train):
    graph, *states = nnx.split(
        nnx.eval_shape(lambda: NNXCell(nnx.Rngs(0))), nnx.Param, nnx.BatchStat
    )
    trees = zip(states, (params, stats), strict=True)
    cell = nnx.merge(
        graph, *(jax.tree.unflatten(jax.tree.structure(s), jax.tree.leaves(t)) for s, t in trees)
    )
    (cell.train if train else cell.eval)()
    return cell


def nnx_axes(shared):
    return nnx.StateAxes({nnx.BatchStat: nnx.Carry if shared else 0, ...: None})


def nnx_rnn(params, stats, x, shared, train):
    cell = nnx_cell(params, stats, train)
    y = nnx.RNN(cell, state_axes=nnx_axes(shared), rngs=nnx.Rngs(0))(joined(x))
    return y, nnx.to_pure_dict(nnx.state(cell, nnx.BatchStat))


def nnx_scan(params, stats, x, shared, train):
    cell = nnx_cell(params, stats, train)

    @nnx.scan(in_axes=(nnx_axes(shared), nnx.Carry, 1), out_axes=(nnx.Carry, 1))
    def step(cell, h, inputs):
        return cell(h, inputs)

    _, y = step(cell, jnp.zeros((BATCH, HIDDEN)), (x, ALIVE[..., None]))
    return y, nnx.to_pure_dict(nnx.state(cell, nnx.BatchStat))


# A way to run it: (params, stats, x, shared, train) -> states h, new statistics.
WAYS = (linen_rnn, linen_scan, nnx_rnn, nnx_scan)
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
shares = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per step"])


def normalized(params, stats, z, train):
    """The formula, and the statistics; `z` has only rows of sequences that are alive."""
    mean, var = (z.mean(0), z.var(0)) if train else (stats["mean"], stats["var"])
    scale, bias, centre, spread = (
        jnp.broadcast_to(v, z.shape) for v in (params["scale"], params["bias"], mean, var)
    )
    y = (z - centre) / jnp.sqrt(spread + OPTIONS["epsilon"]) * scale + bias
    if not train or len(z) < 2:
        return y, stats
    averages = {"mean": (stats["mean"] + mean) / 2, "var": (stats["var"] + var) / 2}
    return y, {**averages, "count": stats["count"] + 1}


def deletion(params, stats, x, shared, train):
    h, states, by_step = jnp.zeros((BATCH, HIDDEN), x.dtype), [], []
    for t in range(STEPS):
        now = stats if shared else jax.tree.map(lambda v, t=t: v[t], stats)
        rows = np.flatnonzero(ALIVE[:, t])
        if rows.size:
            inputs, ys, new = {"h": h[rows], "x": x[rows, t]}, [], {}
            for name, v in inputs.items():
                z, norm = v @ params[name]["kernel"], f"norm_{name}"
                y, new[norm] = normalized(params[norm], now[norm], z, train)
                ys.append(y)
            h, now = h.at[rows].set(jnp.tanh(sum(ys))), new
        stats = now if shared else stats
        states.append(h)
        by_step.append(now)
    if not shared:
        stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_step)
    return jnp.stack(states, 1), stats


def variables(shared):
    rng = np.random.default_rng(1)
    shape = (HIDDEN,) if shared else (STEPS, HIDDEN)
    kernels = {"h": HIDDEN, "x": INPUTS}
    params = {
        k: {"kernel": rng.normal(size=(n, HIDDEN)).astype(np.float32)} for k, n in kernels.items()
    }
    stats = {}
    for name in NORMS:
        values = rng.normal((1, 0), 0.3, (HIDDEN, 2)).astype(np.float32).T
        params[name] = dict(zip(("scale", "bias"), values, strict=True))
        stats[name] = {
            "mean": rng.normal(size=shape).astype(np.float32),
            "var": np.exp(rng.normal(size=shape)).astype(np.float32),
            "count": np.full(shape, 3, np.int32),
        }
    return params, stats


def gradients(way, params, stats, x, shared, train):
    """((states, new statistics), gradients to parameters and x)."""

    def loss(params, x):
        y, new = way(params, stats, x, shared, train)
        return jnp.sum(y * COTANGENT), (y, new)

    grads, seen = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return seen, grads


run = jax.jit(gradients, static_argnums=(0, 4, 5))
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


@functools.cache
def by_deletion(shared, train, dtype):
    with jax.enable_x64(True):
        given = (*variables(shared), X)
        wide = jax.tree.map(lambda v: v if v.dtype == np.int32 else v.astype(dtype), given)
        # Without LLVM's optimizations it compiles faster.
        unrolled = jax.jit(gradients, static_argnums=(0, 4, 5), compiler_options=UNOPTIMIZED)
        return jax.tree.map(np.asarray, unrolled(deletion, *wide, shared, train))


def assert_as_good(found, plain, expected):
    """In float32 the plain loop errs too, and most where few sequences are alive."""
    trees = [jax.tree.leaves_with_path(tree) for tree in (found, plain, expected)]
    for (path, ours), (_, its), (_, wanted) in zip(*trees, strict=True):
        err, bound = error(ours, wanted), two_pass(error(its, wanted))
        assert err <= bound, f"{jax.tree_util.keystr(path)}: error {err:.2g}, bound {bound:.2g}"


@pytest.mark.parametrize("train", [True, False], ids=["train", "evaluate"])
@shares
@ways
def test_mask_is_deletion(way, shared, train):
    """States, statistics and gradients; of evaluation too, which no mask changes."""
    found = run(way, *variables(shared), X, shared, train)
    plain, expected = (by_deletion(shared, train, dtype) for dtype in (np.float32, np.float64))
    assert (plain[0][0].dtype, expected[0][0].dtype) == (np.float32, np.float64)
    # In training a sequence that is alone is normalized to the bias, whatever it holds.
    reached = ALIVE & (LEARNS | (not train))
    np.testing.assert_array_equal(np.any(expected[1][1] != 0, -1), reached)
    assert_as_good(found, plain, expected)
    assert np.all(found[1][1][~ALIVE] == 0)


@shares
@ways
def test_steps_without_two_sequences_keep_their_statistics(way, shared):
    """Bit for bit; and each step of the others is counted once."""
    params, stats = variables(shared)
    (_, new), _ = run(way, params, stats, X, shared, True)
    updates = LEARNS.sum() if shared else LEARNS[:, None]
    for name in NORMS:
        np.testing.assert_array_equal(new[name]["count"], stats[name]["count"] + updates)
        if not shared:
            kept = jax.tree.map(lambda v: v[~LEARNS], new[name])
            chex.assert_trees_all_equal(kept, jax.tree.map(lambda v: v[~LEARNS], stats[name]))
            assert np.all(new[name]["mean"][LEARNS] != stats[name]["mean"][LEARNS])


@shares
@ways
def test_what_ended_sequences_hold_does_not_matter(way, shared):
    """Bit for bit: huge numbers forward and backward, NaN forward."""
    clean, huge, nan = (
        run(way, *variables(shared), np.where(ALIVE[..., None], X, v).astype(np.float32),
            shared, True)
        for v in (0, 1e6, np.nan)
    )  # fmt: skip
    chex.assert_trees_all_equal(huge, clean)
    chex.assert_trees_all_equal(nan[0], clean[0])


def test_initialisation():
    """Per step by nn.RNN itself; shared ones by broadcasting, as in flax a carry must exist."""
    for shared in (True, False):
        layer = nn.RNN(LinenCell(), **linen_axes(shared, train=False))
        made = layer.init(jax.random.key(0), joined(X))
        params, stats = variables(shared)
        expected = {"params": {"cell": params}, "batch_stats": {"cell": stats}}
        chex.assert_trees_all_equal_shapes_and_dtypes(made, expected)
        for new in made["batch_stats"]["cell"].values():
            assert np.all(new["mean"] == 0) and np.all(new["var"] == 1)
            assert np.all(new["count"] == 0)


@shares
def test_evaluation_without_statistics(shared):
    layer = nn.RNN(LinenCell(train=False), **linen_axes(shared, train=False))
    params = {"params": {"cell": variables(shared)[0]}}
    with pytest.raises(ValueError, match=r"got none for .*'batch_stats/cell/norm_h/mean'.* Fix: "):
        layer.apply(params, joined(X))

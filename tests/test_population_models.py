"""bnjax.recalibrate of flax.linen and flax.nnx models, and what it is for."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from flax.core import FrozenDict, freeze
from tolerances import assert_close

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import recalibrate

RNG = np.random.default_rng(0)
C = 4
KEY = jax.random.key(0)
# All of one shape, which is compiled once.
X = RNG.normal(RNG.normal(1, 2, (3, 1, C)), 2, (3, 6, C)).astype(np.float32)
BATCHES = list(X)
KERNEL = RNG.normal(0, 1, (C, C)).astype(np.float32)
close = functools.partial(assert_close, dtype=np.float32, n=1000)
moments = functools.partial(reference.moments, axis=-1)


def kernel_init(*_):
    return jnp.asarray(KERNEL)


NORM = bnjax.batch_norm(momentum=bnjax.cumulative(), unbiased=True)


class Linen(nn.Module):
    """Two layers, and dropout, which would change what the second one sees."""

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(bnjax.linen.BatchNorm, not train, norm=NORM)
        x = nn.Dense(C, kernel_init=kernel_init)(jnp.tanh(norm()(x)))
        return norm()(nn.Dropout(0.5, deterministic=not train)(x))


class NNX(nnx.Module):
    """As Linen."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = bnjax.nnx.BatchNorm(C, rngs=rngs, norm=NORM)
        self.linear = nnx.Linear(C, C, kernel_init=kernel_init, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = bnjax.nnx.BatchNorm(C, rngs=rngs, norm=NORM)

    def __call__(self, x):
        return self.second(self.dropout(self.linear(jnp.tanh(self.first(x)))))


def function(variables, x):
    """As Linen."""
    (p1, s1), (p2, s2) = variables
    y, s1 = NORM.apply(p1, s1, x, False)
    y, s2 = NORM.apply(p2, s2, jnp.tanh(y) @ KERNEL, False)
    return y, ((p1, s1), (p2, s2))


def evaluated(apply, batch):
    return apply(batch, train=False)


def test_one_result():
    """Of a function, a linen and an nnx model; dropout stays off."""
    run = functools.partial(recalibrate, batches=BATCHES, method="average")
    expected = [state for _, state in run(function, (NORM.init(C), NORM.init(C)))]
    assert all(np.all(state.count == 3) for state in expected)
    variables = Linen().init(KEY, X[0], False)
    found = run(Linen(), variables, call=evaluated)
    chex.assert_trees_all_equal(found["params"], variables["params"])
    stats = [found["batch_stats"][f"BatchNorm_{i}"] for i in range(2)]
    close(stats, [state._asdict() for state in expected])
    model = NNX()
    assert run(model, None) is model
    layers = [model.first, model.second]
    close([(m.mean[...], m.var[...], m.count[...]) for m in layers], list(map(tuple, expected)))


def alone(layer, **other):
    """The statistics of a linen layer that is the whole model."""
    variables = layer.init(KEY, X[0])
    variables["batch_stats"].update(other)
    return recalibrate(layer, variables, BATCHES)["batch_stats"]


@pytest.mark.parametrize("norm", [bnjax.ghost(3), bnjax.microbatches(2)],
                         ids=["ghost", "microbatches"])  # fmt: skip
def test_norms(norm):
    """Moments of whole batches, whatever is normalized together; further state is left alone."""
    further = set(norm.state._fields) - {"mean", "var", "count"}
    other = {name: jnp.full(C, 1, int if name == "part_steps" else float) for name in further}
    params, state = norm.init(C)

    def model(variables, x):
        return norm.apply(*variables, x, False)

    found = recalibrate(model, (params, state._replace(**other)), BATCHES)[1]._asdict()
    assert np.all(found.pop("count") == 3)
    stats = alone(bnjax.linen.BatchNorm(True, norm=norm), **other)
    layer = bnjax.nnx.BatchNorm(C, norm=norm, rngs=nnx.Rngs(0))
    nnx.update(layer, {name: nnx.BatchStat(value) for name, value in other.items()})
    recalibrate(layer, None, BATCHES)
    m = moments(X)
    expected = {"mean": m.mean, "var": m.var, **other}
    for result in (found, stats, {name: getattr(layer, name)[...] for name in expected}):
        close(result, expected)


def test_flax_layers_and_contexts():
    """Before which observation goes."""
    m = moments(X)
    expected = {"mean": m.mean, "var": m.var}
    close(alone(nn.BatchNorm(True)), expected)
    with bnjax.linen.convert(), bnjax.linen.switch(moments="batch", learn=False):
        close(alone(nn.BatchNorm(True)), expected)
    layer = recalibrate(nnx.BatchNorm(C, rngs=nnx.Rngs(0)), None, BATCHES)
    assert type(layer) is nnx.BatchNorm
    close({"mean": layer.mean[...], "var": layer.var[...]}, expected)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = bnjax.linen.BatchNorm(True)(x)
        return jnp.tanh(nn.Dense(C, kernel_init=kernel_init)(x)), None


def lifted(lift, **options):
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    return lift(Block, **axes, **options)()


def expected_in_a_row(layers, batches):
    """In float64, for passes as many as layers: all data as one batch."""
    x, found = np.concatenate(batches).astype(np.float64), []
    for _ in range(layers):
        m = moments(x)
        found.append(m[:2])
        x = np.tanh((x - m.mean) / np.sqrt(m.var + 1e-5) @ KERNEL.astype(np.float64))
    return [np.stack(v) for v in zip(*found, strict=True)]


def first(apply, batch):
    return apply(batch)[0]


def test_linen_scan_and_remat():
    """Over layers, whose statistics are stacked."""
    model = lifted(lambda block, **axes: nn.scan(nn.remat(block), length=2, **axes))
    variables = model.init(KEY, X[0], None)
    found = recalibrate(model, variables, BATCHES, passes=2, call=lambda f, x: f(x, None)[0])
    stats = found["batch_stats"]["BatchNorm_0"]
    close([stats["mean"], stats["var"]], expected_in_a_row(2, BATCHES))


def test_linen_ensemble():
    """nn.vmap: members see different data."""
    model = lifted(nn.vmap, in_axes=0)
    stacked = [np.stack([x, x * 2 + 1]) for x in BATCHES]
    variables = model.init(KEY, stacked[0])
    stats = recalibrate(model, variables, stacked, call=first)["batch_stats"]["BatchNorm_0"]
    m = moments(X)
    close(stats["mean"], np.stack([m.mean, 2 * m.mean + 1]))
    close(stats["var"], np.stack([m.var, 4 * m.var]))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = bnjax.linen.BatchNorm(True)
        return norm(x), norm(3 * x[:4])


class SharedNNX(nnx.Module):
    def __init__(self):
        self.norm = self.again = bnjax.nnx.BatchNorm(C, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x), self.again(3 * x[:4])


def test_shared_layers():
    """Called twice in a forward pass: the entries of both calls count."""
    expected = moments(np.concatenate([X.reshape(-1, C), 3 * X[:, :4].reshape(-1, C)]))[:2]
    variables = Shared().init(KEY, X[0])
    stats = recalibrate(Shared(), variables, BATCHES)["batch_stats"]["BatchNorm_0"]
    close((stats["mean"], stats["var"]), tuple(expected))
    model = recalibrate(SharedNNX(), None, BATCHES)
    close((model.norm.mean[...], model.norm.var[...]), tuple(expected))
    assert model.norm is model.again


def test_boxes_and_frozen_trees():
    """Metadata stay; a FrozenDict comes back as one; other variables are left alone."""
    layer = bnjax.linen.BatchNorm(True)
    variables = layer.init(KEY, X[0])
    boxed = jax.tree.map(lambda v: nn.Partitioned(v, ("c",)), variables)
    boxed["other"] = {"mean": jnp.zeros(C), "var": jnp.zeros(C)}
    run = functools.partial(recalibrate, layer, batches=BATCHES)
    plain, found, frozen = run(variables), run(boxed), run(freeze(variables))
    chex.assert_trees_all_equal_structs(found, boxed)
    chex.assert_trees_all_equal(nn.meta.unbox(found)["batch_stats"], plain["batch_stats"])
    assert not np.any(found["other"]["var"])
    assert isinstance(frozen, FrozenDict)
    chex.assert_trees_all_equal(frozen, freeze(plain))
    chex.assert_trees_all_equal_structs(plain, variables)


def test_programs_are_shared_by_equal_models():
    """Of one class and equal fields, at other variables."""
    traced = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            traced.append(x.shape)
            return bnjax.linen.BatchNorm(True)(x)

    class Other(nnx.Module):
        def __init__(self):
            self.norm = bnjax.nnx.BatchNorm(C, rngs=nnx.Rngs(0))

        def __call__(self, x):
            traced.append(x.shape)
            return self.norm(x)

    for scale in (1.0, 2.0):
        params = dict.fromkeys(("scale", "bias"), jnp.full(C, scale))
        stats = {"mean": jnp.zeros(C), "var": jnp.ones(C)}
        variables = {"params": {"BatchNorm_0": params}, "batch_stats": {"BatchNorm_0": stats}}
        recalibrate(Model(), variables, BATCHES)
    assert traced == [X[0].shape]
    for _ in range(2):
        recalibrate(Other(), None, BATCHES)
    assert traced == [X[0].shape] * 2


NO_LAYERS = "must have batch normalization layers, got none"


@pytest.mark.parametrize("model, variables, kind, words", [
    (Linen(), None, TypeError, "`variables` must be those of the model.*NoneType"),
    (Linen(), {"params": {}}, ValueError, rf"{NO_LAYERS}.*batch_stats.*Fix"),
    (NNX(), {}, ValueError, "`variables` must be None for an nnx module.*dict"),
    (nnx.Sequential(jnp.tanh), None, ValueError, rf"{NO_LAYERS} in Sequential. Fix"),
], ids=["linen", "no statistics", "nnx", "no layers"])  # fmt: skip
def test_errors(model, variables, kind, words):
    with pytest.raises(kind, match=words):
        recalibrate(model, variables, BATCHES)


def test_linen_calls_are_pooled():
    """Of one call of `call`, whatever it calls."""
    variables = Linen().init(KEY, X[0], False)

    def halves(apply, x):
        return apply(x[: len(x) // 2], False), apply(x[len(x) // 2 :], False)

    found = recalibrate(Linen(), variables, [X[0]], call=halves)
    parts = [X[0][: len(X[0]) // 2], X[0][len(X[0]) // 2 :]]
    expected = recalibrate(Linen(), variables, parts, call=lambda apply, x: apply(x, False))
    for name in ("mean", "var"):
        one, other = (
            [
                leaf
                for path, leaf in jax.tree.leaves_with_path(v["batch_stats"])
                if path[-1].key == name
            ]
            for v in (found, expected)
        )
        assert one
        chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-6)

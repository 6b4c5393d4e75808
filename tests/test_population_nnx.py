"""bnjax.recalibrate of flax.nnx models: in place, or not at all."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from tolerances import assert_close

import bnjax
import bnjax.nnx
from bnjax import recalibrate

RNG = np.random.default_rng(0)
C = 4
X = RNG.normal(RNG.normal(1, 2, (3, 1, C)), 2, (3, 6, C)).astype(np.float32)
BATCHES = list(X)
KERNEL = RNG.normal(0, 1, (C, C)).astype(np.float32)
MOMENTS = reference.moments(X)
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def make_model():
    return nnx.Sequential(bnjax.nnx.BatchNorm(C, rngs=nnx.Rngs(0)))


def test_nnx_model_stays_itself():
    """The same objects, mode and graph; an optimizer made before goes on."""
    model = make_model()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for change in (model.train, model.eval):
        change()
        graph, objects = nnx.graphdef(model), [id(v) for _, v in nnx.iter_graph(model)]
        model.layers[0].mean[...] += 7
        recalibrate(model, None, BATCHES, passes=2)
        close(model.layers[0].mean[...], MOMENTS.mean)
        assert nnx.graphdef(model) == graph
        assert [id(v) for _, v in nnx.iter_graph(model)] == objects
    before = model.layers[0].scale[...]
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    close(model.layers[0].scale[...], before - 0.1)


@pytest.mark.parametrize("passes, fails", [(1, 2), (2, 5)])
def test_nnx_model_is_whole_where_a_batch_fails(passes, fails):
    """Also in a later pass."""
    model, number = make_model(), 0

    class Batches:
        def __iter__(self):
            nonlocal number
            for x in BATCHES:
                if number == fails:
                    raise OSError("no such file")
                number += 1
                yield x

    before = jax.tree.map(jnp.copy, nnx.state(model))
    with pytest.raises(OSError, match="no such file"):
        recalibrate(model, None, Batches(), passes=passes)
    assert number == fails
    chex.assert_trees_all_equal(nnx.state(model), before)


def test_nnx_ensemble_and_scan():
    """Layers whose variables are stacked."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(_):
        return bnjax.nnx.BatchNorm(C, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self, call):
            self.layers, self.call = make(jnp.arange(2)), call

        def __call__(self, x):
            return self.call(self.layers, x)

    ensemble = Model(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None)))
    recalibrate(ensemble, None, BATCHES)
    close(ensemble.layers.mean[...], np.stack([MOMENTS.mean] * 2))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def row(layer, x):
        return jnp.tanh(layer(x) @ KERNEL)

    scanned = recalibrate(Model(row), None, BATCHES, passes=2).layers
    x = np.tanh((X - MOMENTS.mean) / np.sqrt(MOMENTS.var + 1e-5) @ KERNEL.astype(np.float64))
    for i, m in enumerate((MOMENTS, reference.moments(x))):
        close((scanned.mean[i], scanned.var[i]), (m.mean, m.var))

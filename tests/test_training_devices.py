"""Training on eight devices and on one: the same losses; all-reduces of a stack of layers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from benchmark_scripts import hlo
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import bnjax

P = PartitionSpec
STEPS, BATCH, UNITS = 200, 64, (64, 24, 24, 24, 10)
OPTIMIZER = optax.sgd(0.1)


def batches():
    """Of the digits; devices have from 0 to 8 examples of a batch, the first often none."""
    digits, rng = load_digits(), np.random.default_rng(0)
    rows = rng.integers(len(digits.target), size=(STEPS, BATCH))
    keep = np.linspace(0.1, 1, BATCH) > rng.random((STEPS, BATCH))
    keep[::2, : BATCH // 8] = False
    return digits.data[rows].astype(np.float32) / 16, digits.target[rows], keep


def network():
    rng, sizes = np.random.default_rng(1), itertools.pairwise(UNITS)
    kernels = [jnp.asarray(rng.normal(0, a**-0.5, (a, b)), jnp.float32) for a, b in sizes]
    layers, states = zip(*(bnjax.bn_init(n) for n in UNITS[1:-1]), strict=True)
    weights = (kernels, list(layers))
    return weights, list(states), OPTIMIZER.init(weights)


def mean_loss(weights, states, x, labels, keep, axis_name):
    (*kernels, last), layers = weights
    new = []
    for kernel, layer, state in zip(kernels, layers, states, strict=True):
        y, state = bnjax.bn_apply(
            layer, state, x @ kernel, True, mask=keep[:, None], axis_name=axis_name, momentum=0.9
        )
        x = jax.nn.relu(y)
        new.append(state)
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ last, labels)
    sums = jnp.stack([jnp.sum(losses * keep), jnp.sum(keep, dtype=jnp.float32)])
    total, count = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    return total / count, new


def training(axis_name, carry, batches):
    def step(carry, batch):
        weights, states, optimizer = carry
        f = jax.value_and_grad(mean_loss, has_aux=True)
        (loss, states), gradient = f(weights, states, *batch, axis_name)
        updates, optimizer = OPTIMIZER.update(gradient, optimizer)
        return (optax.apply_updates(weights, updates), states, optimizer), loss

    return jax.lax.scan(step, carry, batches)


def test_training_ends_in_the_same_loss(devices):
    """200 steps with uneven masks, on eight devices and on one."""
    _, expected = jax.jit(functools.partial(training, None))(network(), batches())
    assert expected[-1] < 0.2 * expected[0], "the run must learn something"
    mesh, data = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,)), P(None, "i")
    placed = jax.device_put(batches(), NamedSharding(mesh, data))
    _, sharded = jax.jit(functools.partial(training, None))(network(), placed)
    mapped = jax.shard_map(
        functools.partial(training, "i"), mesh=mesh, in_specs=(P(), data), out_specs=P()
    )
    _, named = jax.jit(mapped)(network(), placed)
    for losses in (sharded, named):
        assert len(losses.sharding.device_set) == len(devices)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("axis_name", [None, "i"])
def test_all_reduces_of_a_stack(axis_name, devices):
    """One forward and one backward for each layer; the others are those of any network.

    The gradients of scale and bias come with the layers' own sums: those of the kernels
    are all that is left to be summed, at the end, together.
    """
    mesh, data = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,)), P("i")
    batch = jax.device_put(jax.tree.map(lambda v: v[0], batches()), NamedSharding(mesh, data))
    weights, states, _ = network()
    f = jax.value_and_grad(functools.partial(mean_loss, axis_name=axis_name), has_aux=True)
    if axis_name:
        f = jax.shard_map(f, mesh=mesh, in_specs=(P(), P(), data, data, data), out_specs=P())
    text = jax.jit(f).lower(weights, states, *batch).compile().as_text()
    found = [c for c in hlo.collectives(text) if c.place != "branch"]
    assert {(c.kind, c.place) for c in found} == {("all-reduce", "always")}
    layers, of_loss = len(states), 2 * 4
    sums = [4 * 2 * n for n in UNITS[1:-1]]
    kernels = sum(4 * kernel.size for kernel in weights[0])
    assert [c.bytes for c in found][layers:] == [of_loss, *sums, kernels]

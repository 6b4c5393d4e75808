"""bnjax.linen.BatchNorm under flax's transformations, and in a training loop."""

import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from tolerances import assert_close

import bnjax
from bnjax.linen import BatchNorm

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (16, 3)).astype(np.float32)
KEY = jax.random.key(0)
MUTABLE = ["batch_stats"]
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def test_nn_vmap():
    """An ensemble of layers is the layers one by one."""
    axes = {"params": 0, "batch_stats": 0}
    lifted = nn.vmap(BatchNorm, variable_axes=axes, split_rngs={"params": True}, in_axes=0)
    xs = X.reshape(2, 8, 3) * np.array([1, 2], np.float32).reshape(2, 1, 1)
    layer = lifted(use_running_average=False, momentum=0.5)
    variables = jax.jit(layer.init)(KEY, xs)
    y, new = jax.jit(functools.partial(layer.apply, mutable=MUTABLE))(variables, xs)
    plain = BatchNorm(False, momentum=0.5)
    for i in range(2):
        one = plain.apply(plain.init(KEY, X), xs[i], mutable=MUTABLE)
        close((y[i], jax.tree.map(lambda v: v[i], new)), one)  # noqa: B023


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = BatchNorm(False, momentum=bnjax.cumulative())(nn.Dense(3, use_bias=False)(x))
        return nn.tanh(x), None


def test_nn_scan_and_remat():
    """Layers stacked along an axis of their variables; rematerialised, the same gradients."""
    grads = []
    for block in (Block, nn.remat(Block)):
        axes = {"params": 0, "batch_stats": 0}
        stack = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=3)()
        variables = jax.jit(stack.init)(KEY, X, None)
        assert variables["batch_stats"]["BatchNorm_0"]["count"].shape == (3, 3)

        def loss(params, stack=stack, variables=variables):
            given = {**variables, "params": params}
            (y, _), new = stack.apply(given, X, None, mutable=MUTABLE)
            return jnp.sum(y**2), new

        grads.append(jax.jit(jax.grad(loss, has_aux=True))(variables["params"]))
        assert np.all(grads[-1][1]["batch_stats"]["BatchNorm_0"]["count"] == 1)
    close(*grads)
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads[0][0]["BatchNorm_0"]))


def test_with_partitioning():
    """Boxed parameters are unboxed by flax; statistics stay plain."""
    scale_init = nn.with_partitioning(nn.initializers.ones, ("model",))
    layer = BatchNorm(False, scale_init=scale_init)
    variables = layer.init(KEY, X)
    assert isinstance(variables["params"]["scale"], nn.Partitioned)
    assert nn.get_partition_spec(variables)["params"]["scale"] == jax.P("model")
    y, _ = layer.apply(variables, X, mutable=MUTABLE)
    chex.assert_trees_all_equal(y, BatchNorm(False).init_with_output(KEY, X)[0])


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = BatchNorm(not train, momentum=bnjax.debiased(0.9))(nn.Dense(16)(x))
        return nn.Dense(1)(nn.relu(x))[:, 0]


class TrainState(train_state.TrainState):
    batch_stats: dict


def test_training_loop():
    """A TrainState with batch_stats learns, and evaluates as it trained."""
    x = RNG.normal(5, 3, (256, 3)).astype(np.float32)
    target = np.sin(x[:, 0]) + x[:, 1] / 3
    variables = jax.jit(Classifier().init, static_argnums=2)(KEY, x, True)
    state = TrainState.create(apply_fn=Classifier().apply, tx=optax.adam(0.03), **variables)

    @jax.jit
    def step(state):
        def loss(params):
            given = {"params": params, "batch_stats": state.batch_stats}
            y, new = state.apply_fn(given, x, True, mutable=MUTABLE)
            return jnp.mean((y - target) ** 2), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=new["batch_stats"]), value

    losses = []
    for _ in range(60):
        state, value = step(state)
        losses.append(float(value))
    y = state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x, False)
    evaluated = float(jnp.mean((y - target) ** 2))
    assert losses[-1] < 0.3 * losses[0]
    assert evaluated < 0.3 * losses[0]
    np.testing.assert_array_equal(state.batch_stats["BatchNorm_0"]["count"], np.full(16, 60))


def test_is_a_flax_module():
    assert issubclass(BatchNorm, nn.Module)
    assert hash(BatchNorm()) == hash(BatchNorm()) and BatchNorm(axis=1) != BatchNorm()
    assert "BatchNorm" in BatchNorm().tabulate(KEY, X, True)
    frozen = flax.core.freeze(BatchNorm(False).init(KEY, X))
    BatchNorm(False).apply(frozen, X, mutable=MUTABLE)

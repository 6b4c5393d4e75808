"""Data, and a step of training, for tests of a layer beside flax's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tolerances import assert_close

from bnjax import linen

RNG = np.random.default_rng(0)
SHAPE = (6, 5, 4)
X = RNG.normal(RNG.normal(size=SHAPE[1:]), 2, SHAPE).astype(np.float32)
MASK = RNG.random((6, 5, 1)) < 0.7
KEY = jax.random.key(0)
LINEN = (linen.BatchNorm, nn.BatchNorm)
# Two correct implementations are each within the bound of the truth.
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def run_linen(module, x=X, train=True, mask=None, **fields):
    """(variables, y, gradients, updates) of a step with new variables."""
    layer = module(use_running_average=not train, **fields)

    @jax.jit
    def step(x):
        variables = layer.init(KEY, x)

        def loss(params, x):
            given = {**variables, "params": params}
            y, new = layer.apply(given, x, mask=mask, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y).astype(jnp.float32)), (y, new)

        argnums = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
        grads, (y, new) = jax.grad(loss, argnums, has_aux=True)(variables.get("params", {}), x)
        return variables, y, grads, new

    return step(x)


def types(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}

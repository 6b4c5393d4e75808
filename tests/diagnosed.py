"""A functional model of one layer, or of two, with planted statistics, and a batch."""

import functools

import jax.numpy as jnp
import numpy as np
from tolerances import assert_close

import bnjax

RNG = np.random.default_rng(0)
N, C, EPSILON = 60, 4, 1e-3
X = RNG.normal(RNG.normal(0, 2, C), 2, (N, C)).astype(np.float32)
X[:, 3] = 5  # a channel that does not vary
LABELS = RNG.integers(0, C, N)
KERNEL = RNG.normal(0, 1, (C, C)).astype(np.float32)
# Of two layers. The first has a channel with a large running variance.
SCALE = np.array([[1.5, -2, 1e-5, 1], [1, 3, 1, 2]], np.float32)
BIAS = RNG.normal(0, 1, (2, C)).astype(np.float32)
MEAN = RNG.normal(0, 1, (2, C)).astype(np.float32)
VAR = RNG.uniform(0.5, 4, (2, C)).astype(np.float32)
VAR[0, 0] = 1e10
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def params(i):
    return bnjax.BNParams(jnp.asarray(SCALE[i]), jnp.asarray(BIAS[i]))


def state(i, count=7):
    return bnjax.BNState(jnp.asarray(MEAN[i]), jnp.asarray(VAR[i]), jnp.full(C, count))


def one_layer(norm=None, after=lambda y: y, **options):
    """A functional model of one layer."""
    norm = norm or bnjax.batch_norm()

    def model(variables, x):
        p, s = variables
        y, s = norm.apply(p, s, x, False, **options)
        return after(y), (p, s)

    return model

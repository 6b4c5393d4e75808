"""What the functions take and return."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class BNParams(NamedTuple):
    """Trainable: scale (gamma) and bias (beta), of shape [C]; None where unused."""

    scale: jax.Array | None
    bias: jax.Array | None


class BNState(NamedTuple):
    """Carried, never trained: running statistics, three arrays of shape [C].

    `mean` and `var` are floating; `count` (int32) is the number of updates that
    each channel has accepted, 0 for one that was never trained.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose


class Moments(NamedTuple):
    """Mean, biased variance and number of the entries they were taken over.

    mean = sum(x) / count, var = sum((x - mean)**2) / count. `mean` and `var`
    have the shape of the feature axes, [C]; `count` broadcasts to it. All are
    floating, of one dtype: promote(x.dtype, float32).
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose


class Norm(NamedTuple):
    """A normalization: a pair of pure functions, as in optax.

    `init(features, **options) -> (params, state)` and
    `apply(params, state, x, train, **options) -> (y, state)`, with the options
    of `bn_init` and `bn_apply`. `needs_count` tells modules that it reads
    `state.count`, which must then be stored. `state` is the
    type of the state, whose other fields modules store too. `always_updates`: its
    statistics may change at inference, so that modules store them then too.
    """

    init: Callable[..., tuple[BNParams, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]
    needs_count: bool = False
    state: type[Any] = BNState
    always_updates: bool = False

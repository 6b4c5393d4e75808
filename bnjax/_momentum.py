"""Schedules of the running average: count of updates -> weight of the old value.

A schedule is an elementwise function of `BNState.count`, the form that optax
uses. Both schedules here give weight 0 at count 0, so that a channel's first
update replaces the initial mean 0 and variance 1 entirely.
"""

import jax
import jax.numpy as jnp

from bnjax import _checks


def cumulative() -> _checks.Schedule:
    """The plain average of all updates, torch's `momentum=None`.

    weight of the old value = count / (count + 1)

    Returns:
      A schedule: integer array of any shape -> float32 array of that shape. It is
      one function, so that two layers with it are equal.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> print(bnjax.cumulative()(jnp.array([0, 1, 3])))
      [0.   0.5  0.75]

    Source: torch.nn.BatchNorm1d, `momentum=None`.
    """
    return _cumulative


def _cumulative(count: jax.Array) -> jax.Array:
    old = jnp.asarray(count, jnp.float32)
    return old / (old + 1)


def debiased(momentum: float) -> _checks.Schedule:
    """An exponential average without the pull of its initial value.

    weight of the old value = m * (1 - m**count) / (1 - m**(count + 1)): after t
    updates every batch i weighs m**(t - i) / sum_j m**(t - j), as if the average
    had been divided by 1 - m**t.

    Args:
      momentum: m in [0, 1), the weight of the old value in the long run.

    Returns:
      A schedule: integer array of any shape -> float32 array of that shape.

    Raises:
      ValueError: `momentum` outside of [0, 1). TypeError: not a number.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> print(bnjax.debiased(0.5)(jnp.array([0, 1, 2])))
      [0.         0.33333334 0.42857143]

    Source: Kingma & Ba (2015), section 3; haiku's ExponentialMovingAverage.
    """
    _checks.number("momentum", momentum, 0.0, 1.0, ())
    if _checks.is_concrete(momentum) and momentum >= 1:
        raise ValueError(
            f"`momentum` must be in [0, 1) for `debiased`, got {momentum}. "
            "Fix: cumulative() weighs all updates equally."
        )

    def schedule(count: jax.Array) -> jax.Array:
        # expm1 keeps 1 - m**count exact where m is close to 1.
        rate = jnp.log(jnp.asarray(momentum, jnp.float32))
        updates = jnp.asarray(count, jnp.float32)
        old, new = -jnp.expm1(updates * rate), -jnp.expm1((updates + 1) * rate)
        return jnp.where(updates == 0, 0, momentum * old / new).astype(jnp.float32)

    return schedule

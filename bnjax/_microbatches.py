"""Gradient accumulation: running statistics that learn once per step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _checks, _functional, _layer, _merge, _normalize, _placement, _reduce
from bnjax._moments import BatchMoments
from bnjax._normalize import Inputs
from bnjax._types import BNParams, BNState, Norm


class MicrobatchState(NamedTuple):
    """Running statistics, and the moments of the microbatches of an unfinished step.

    `mean`, `var`, `count` as in `BNState`. The merged moments of the `part_steps`
    (int32) microbatches since the last update are part_shift + part_offset, their mean
    in two parts for the sake of accuracy, `part_var`, and `part_count`, their entries.
    All of shape [C].
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, on purpose
    part_shift: jax.Array
    part_offset: jax.Array
    part_var: jax.Array
    part_count: jax.Array
    part_steps: jax.Array


def microbatches(steps: int, **options: Any) -> Norm:
    """Batch normalization of microbatches, whose running statistics learn once per step.

    y is normalized with the moments of its microbatch. After every `steps` calls in
    training, the running statistics learn from the merged moments of these
    microbatches, mean = sum(n_i * mean_i) / n,
    var = sum(n_i * (var_i + (mean_i - mean)**2)) / n, with masks and devices counted:
    as `ghost` of the whole batch does. In between they stay as they are, and so does
    evaluation.

    The state is carried through `jax.lax.scan` over the microbatches of a step, or
    from call to call beside `optax.MultiSteps(optimizer, every_k_schedule=steps)`. What
    counts are calls: a layer that a model calls twice needs twice as many steps, and
    microbatches that MultiSteps skips are counted.

    Args:
      steps: microbatches in a step of the optimizer, at least 1.
      **options: keyword arguments of `bn_apply`, bound as by `batch_norm`.

    Returns:
      `Norm(init, apply, needs_count, MicrobatchState)`; `apply` takes and returns a
      `MicrobatchState` where `bn_apply` has a `BNState`. The Flax modules store its
      `part_...` beside mean and var.

    Raises:
      TypeError, ValueError: steps that are no positive integer, unknown options; in the
      call, as `bn_apply`.

    Example:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> norm = bnjax.microbatches(2, momentum=0.0)
      >>> params, state = norm.init(1)
      >>> x = jnp.array([[1.0], [3.0], [11.0], [13.0]])
      >>> def body(state, x):
      ...     y, state = norm.apply(params, state, x, train=True)
      ...     return state, y
      >>> state, y = jax.lax.scan(body, state, x.reshape(2, 2, 1))
      >>> print(state.mean, state.var, state.count)
      [7.] [26.] [1]

    Source: the merging is that of Chan, Golub & LeVeque (1983).
    """
    steps = _checks.positive("steps", steps)

    def apply(
        params: BNParams, state: MicrobatchState, x: jax.Array, train: bool | jax.Array, **call: Any
    ) -> tuple[jax.Array, MicrobatchState]:
        _checks.state_type(state, MicrobatchState, f"microbatches({steps})")
        prepared = _layer.prepare(params, BNState(*state[:3]), x, train, **call)
        static = prepared.static
        if static.plan.train is False:
            return _layer.run(_functional.compute, static, prepared)[0], state
        _check_parts(state)
        return _layer.run(_compute, (static, steps), prepared._replace(state=state))

    return _functional.variant("microbatches", apply, options)._replace(
        init=_init, state=MicrobatchState
    )


def _init(features: int | tuple[int, ...], **options: Any) -> tuple[BNParams, MicrobatchState]:
    """As `bn_init`, with no microbatch seen."""
    params, state = _functional.bn_init(features, **options)
    zeros = jnp.zeros_like(state.mean)
    return params, MicrobatchState(*state, zeros, zeros, zeros, zeros, jnp.zeros_like(state.count))


def _check_parts(state: MicrobatchState) -> None:
    for name, value in zip(state._fields[3:], state[3:], strict=True):
        if name != "part_steps":
            value = _checks.float_array(f"state.{name}", value)
        if np.shape(value) != state.mean.shape:
            raise ValueError(
                f"`state.{name}` must have one entry per channel, shape {state.mean.shape}, got "
                f"shape {np.shape(value)}. Fix: microbatches(steps).init(features)."
            )
    _checks.counter("state.part_steps", state.part_steps, state.mean.shape)


def _compute(
    static: tuple[_layer.Static, int],
    inputs: Inputs,
    given: MicrobatchState,
    weight: jax.Array | None,
) -> tuple[jax.Array, MicrobatchState]:
    layer, steps = static
    axes = layer.plan.reduction.axes
    inputs = _normalize.placed(inputs, axes)
    state = _placement.as_features(given, inputs.x, axes)
    y, batch = _normalize.normalize(layer.plan, inputs)
    assert batch is not None  # as this is training
    part = _merge.with_batch(BatchMoments(*state[3:7]), batch)
    seen = state.part_steps + 1
    done = lax.ge(seen, lax.full_like(seen, steps))
    running = _layer.update(layer, inputs, BNState(*given[:3]), part.plain(), weight, done)
    rest = [_reduce.where(done, lax.full_like(v, 0), v) for v in (*part, seen)]
    if inputs.train is not None:
        train = _placement.broadcast(inputs.train, seen)
        rest = [_reduce.where(train, *both) for both in zip(rest, state[3:], strict=True)]
    return y, MicrobatchState(*running, *_placement.as_given(rest, list(given[3:])))

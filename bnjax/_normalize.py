"""The normalization and its derivative rule.

    a = scale / sqrt(var + epsilon)
    y = (x - shift - offset) * a + bias, mean = shift + offset

with the batch's moments or the running ones, chosen between [C] vectors before
the one pass that writes y. The rule below is the textbook derivative; JAX's
transpose of it is the backward pass of Ioffe & Szegedy (2015), section 3. Reverse
mode keeps x in its own dtype and a few vectors.

Renormalization puts z * r + d between normalization and scale: a scale of r * scale
and a bias of d * scale + bias, where r and d are constants for the derivative.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _lean, _moments, _placement, _reduce, _sums
from bnjax._checks import compute_dtype
from bnjax._moments import BatchMoments
from bnjax._reduce import Reduction


class Plan(NamedTuple):
    """What is known while tracing. Hashable."""

    reduction: Reduction
    dtype: Any  # of y
    train: bool | None  # None: a traced choice


class Inputs(NamedTuple):
    """The arrays of the layer; `mask`, `train` and `None` have no tangent.

    With `r_max` and `d_max`, the limits of r and d, there is a scale.
    """

    x: jax.Array
    mask: jax.Array | None
    train: jax.Array | None
    scale: jax.Array | None
    bias: jax.Array | None
    mean: jax.Array
    var: jax.Array
    epsilon: jax.Array
    r_max: jax.Array | None = None
    d_max: jax.Array | None = None


def placed(inputs: Inputs, axes: tuple[int, ...]) -> Inputs:
    """The inputs, as `x` is placed on a mesh of explicit axes."""
    x, mask, train, *vectors = inputs
    vectors = _placement.as_features(vectors, x, axes)
    mask = _placement.as_entries(mask, x)
    return Inputs._make((_lean.named_input(x), mask, train, *vectors))


class Coefficients(NamedTuple):
    """What normalizes a channel, by mean = shift + offset, and where it came from."""

    shift: jax.Array
    offset: jax.Array | None  # None: 0
    var: jax.Array  # with epsilon
    inverse: jax.Array  # 1 / sqrt(var)
    from_batch: jax.Array | None  # None: known while tracing
    correction: tuple[jax.Array, jax.Array] | None = None  # r and d


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def normalize(plan: Plan, inputs: Inputs) -> tuple[jax.Array, BatchMoments | None]:
    """y and the batch's moments; None for moments that no mode needs."""
    y, moments, _ = _reduce.compiled(_forward, is_mapped(plan))(plan, inputs)
    return y, moments


@normalize.defjvp
def _normalize_jvp(plan: Plan, primals: tuple[Inputs], tangents: tuple[Inputs]) -> Any:
    (inputs,), (dinputs,) = primals, tangents
    y, moments, coefficients = _reduce.compiled(_forward, is_mapped(plan))(plan, inputs)
    # Without the checkpoint reverse mode would keep x - mean, in float32.
    tangent = jax.checkpoint(functools.partial(_tangent, plan), prevent_cse=False)
    dy, dmoments = tangent(
        (inputs.x, inputs.mask, inputs.scale, moments, coefficients),
        dinputs._replace(mask=None, train=None),
    )
    return (y, moments), (dy, dmoments)


def is_mapped(plan: Plan) -> bool:
    return plan.reduction.axis_name is not None and plan.train is not False


def _forward(plan: Plan, inputs: Inputs) -> tuple[jax.Array, BatchMoments | None, Coefficients]:
    moments = None
    if plan.train is not False:
        moments = _moments.batch_moments(
            plan.reduction, inputs.x, inputs.mask, inputs.mean, inputs.var
        )
        moments = _lean.named_moments(moments)
    c = _coefficients(plan, inputs, moments)
    scale, bias = _corrected(c, inputs.scale, inputs.bias)
    a = c.inverse if scale is None else lax.mul(c.inverse, scale)
    b = bias
    if c.offset is not None:
        b = lax.mul(c.offset, a)
        b = lax.neg(b) if bias is None else lax.sub(bias, b)
    vectors = [c.shift, a] if b is None else [c.shift, a, b]
    shift, a, *added = _spread(plan, inputs.x, *vectors)
    y = lax.mul(lax.sub(finite(inputs.x, inputs.x, inputs.mask), shift), a)
    if added:
        y = lax.add(y, added[0])
    return y.astype(plan.dtype), moments, c


def is_from_batch(inputs: Inputs, count: jax.Array) -> jax.Array | None:
    """Where the batch's moments are taken, of `count` entries; None: known while tracing."""
    if inputs.mask is None and inputs.x.size:
        return inputs.train
    return count > 0 if inputs.train is None else (count > 0) & inputs.train


def _coefficients(plan: Plan, inputs: Inputs, moments: BatchMoments | None) -> Coefficients:
    if moments is None:
        var = lax.add(inputs.var, inputs.epsilon)
        return Coefficients(inputs.mean, None, var, lax.rsqrt(var), None)
    from_batch = is_from_batch(inputs, moments.count)
    if from_batch is not None:
        from_batch = _placement.broadcast(from_batch, moments.var)
    shift = choose(from_batch, moments.shift, inputs.mean)
    offset = choose(from_batch, moments.offset, 0)
    var = lax.add(choose(from_batch, moments.var, inputs.var), inputs.epsilon)
    correction = _correction(inputs, moments, from_batch)
    return Coefficients(shift, offset, var, lax.rsqrt(var), from_batch, correction)


def _correction(
    inputs: Inputs, moments: BatchMoments, from_batch: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    """r and d; 1 and 0 where the batch is not used, or the running statistics are of no use."""
    r_max, d_max = inputs.r_max, inputs.d_max
    if r_max is None or d_max is None:
        return None
    inverse = lax.rsqrt(inputs.var + inputs.epsilon)
    ratio = lax.sqrt(moments.var + inputs.epsilon) * inverse
    apart = ((moments.shift - inputs.mean) + moments.offset) * inverse
    r = jnp.minimum(jnp.maximum(ratio, 1 / r_max), r_max)
    d = jnp.minimum(jnp.maximum(apart, -d_max), d_max)
    known = lax.is_finite(inputs.mean) & lax.is_finite(inputs.var) & lax.is_finite(inverse)
    if from_batch is not None:
        known = known & from_batch
    return lax.stop_gradient((_reduce.where(known, r, 1), _reduce.where(known, d, 0)))


def _corrected(
    c: Coefficients, scale: jax.Array | None, bias: jax.Array | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """What scale and bias amount to with the correction before them; of tangents too."""
    if c.correction is None or scale is None:
        return scale, bias
    r, d = c.correction
    return r * scale, d * scale if bias is None else d * scale + bias


def _tangent(plan: Plan, residuals: tuple[Any, ...], d: Inputs) -> tuple[Any, Any]:
    """dy = (dx - dmean) * a + (x - mean) * da + dbias, and dmoments.

    a = scale * inverse, da = dscale * inverse - a * dvar / (2 * var).
    """
    x, mask, scale, moments, c = residuals
    scale, _ = _corrected(c, scale, None)
    dscale, dbias = _corrected(c, d.scale, d.bias)
    dx, dmean, dvar, dmoments = finite(d.x, x, mask), d.mean, d.var, None
    if moments is not None:
        # dx - dmean is all that enters, so both are taken less the same c, which
        # for running statistics is dmean of the batch less that of dx - c.
        r, plain = plan.reduction, dx
        dx = _moments.recentre(r, plain, mask)
        dmoments, residue = _moments.centred_tangent(r, x, mask, moments, plain, dx)
        dmean = choose(c.from_batch, residue, lax.sub(dmean, lax.sub(dmoments.shift, residue)))
        dvar = choose(c.from_batch, dmoments.var, dvar)
    a = c.inverse if scale is None else lax.mul(c.inverse, scale)
    # Divided, not multiplied with inverse**2: XLA's CPU backend computes quotients of vectors
    # once, and products anew for each entry of x.
    half = lax.mul(a, np.asarray(-0.5, a.dtype))
    da = lax.mul(half, lax.div(lax.add(dvar, d.epsilon), c.var))
    if dscale is not None:
        da = lax.add(da, lax.mul(dscale, c.inverse))
    offset = lax.full_like(c.shift, 0) if c.offset is None else c.offset
    shift, offset = _sums.another(x, c.shift, offset, bits_less=3)
    db = lax.neg(lax.add(lax.mul(dmean, a), lax.mul(offset, da)))
    if dbias is not None:
        db = lax.add(db, dbias)
    # Apart, since only what is linear in the tangents can be transposed.
    (shift, a), (da, db) = _spread(plan, x, shift, a), _spread(plan, x, da, db)
    of_scale = lax.mul(lax.sub(finite(_reduce.apart(x, shift), x, mask), shift), da)
    dy = lax.add(lax.mul(dx, a), _widened_apart(plan, of_scale, 1))
    dy = lax.add(dy, _widened_apart(plan, db, 2, like=of_scale))
    return dy.astype(plan.dtype), dmoments


def _widened_apart(
    plan: Plan, dy: jax.Array, number: int, like: jax.Array | None = None
) -> jax.Array:
    """A part of dy, in the shape of `like`, whose cotangent is widened for it alone.

    So are those of the parts that the backward pass sums: see `_reduce.apart`. A cotangent of
    dy in the dtype of y loses nothing in it. The `number` tells the parts apart.

    On GPUs the second alone is, where channels come last: then XLA makes the first in the pass
    that applies the derivative of a relu behind the layer, else it makes both in another.
    """
    wide = dy.dtype
    if compute_dtype(plan.dtype) == plan.dtype or plan.dtype == wide:
        return dy

    def transposed(_: Any, ct: jax.Array) -> jax.Array:
        ct = ct.astype(plan.dtype)
        if number > 1:
            last = ct.ndim - 1 not in plan.reduction.axes
            ct = _reduce.apart(ct, on=("cpu", "cuda") if last else ("cpu",))
        return _reduce.apart(ct).astype(wide)

    if like is not None:
        dy = lax.add(dy, lax.full_like(like, 0))
    return lax.custom_linear_solve(
        lambda v: v, dy, solve=lambda _, v: v, transpose_solve=transposed
    )


def finite(value: jax.Array, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`value`, promoted, with 0 where a masked entry of `x` is not finite."""
    value = value.astype(compute_dtype(x.dtype))
    return value if mask is None else jnp.where(mask | jnp.isfinite(x), value, 0)


def choose(condition: jax.Array | None, new: jax.Array, old: jax.Array | float) -> jax.Array:
    return new if condition is None else _reduce.where(condition, new, old)


def _spread(plan: Plan, x: jax.Array, *vectors: jax.Array) -> list[jax.Array]:
    """Vectors in the rank of `x`, in one piece across devices.

    Under shard_map's check_vma the transpose of making a value varying is an
    all-reduce; stacked, the vectors of one expression share it.
    """
    axes = _reduce.varying(x)
    if axes - _reduce.varying(vectors):
        stacked = _reduce.vary(jnp.stack(vectors), axes)
        vectors = tuple(stacked[i] for i in range(len(vectors)))
    return [_reduce.spread(v, plan.reduction.axes) for v in vectors]

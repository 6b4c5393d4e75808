"""Whitening and its derivative rule.

    M = scale * (cov + epsilon I)^(-1/2)
    y = M (x - shift) + bias - M offset, mean = shift + offset

for each group of channels, with the batch's moments or the running ones, chosen between
matrices before the one product that writes y. Reverse mode keeps x in its own dtype and
matrices of groups.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _covariance, _lean, _moments, _normalize, _placement, _reduce, _sums
from bnjax._covariance import EXACT, Covariances, Groups, diagonal, transposed, with_diagonal
from bnjax._normalize import Inputs, Plan
from bnjax._reduce import Reduction

Method = Literal["newton-schulz", "eigh"]


class Root(NamedTuple):
    """How the inverse root is found; `iterations` None for as many as the dtype takes."""

    method: Method
    iterations: int | None


class _Whitening(NamedTuple):
    """What whitens a group, by mean = shift + offset, and where it came from."""

    shift: jax.Array
    offset: jax.Array
    cov: jax.Array  # with epsilon
    root: jax.Array
    from_batch: jax.Array | None  # None: known while tracing


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def whiten(
    plan: Plan, how: Root, groups: Groups, inputs: Inputs, running: jax.Array
) -> tuple[jax.Array, Covariances | None]:
    """y and the batch's moments; None for moments that no mode needs.

    x, mask and y have the axes that came, all else and `plan` those of what is cut.
    """
    y, moments, _ = _forward(plan, how, groups, inputs, running)
    return y, moments


@whiten.defjvp
def _whiten_jvp(plan: Plan, how: Root, groups: Groups, primals: Any, tangents: Any) -> Any:
    (inputs, running), (dinputs, drunning) = primals, tangents
    y, moments, root = _forward(plan, how, groups, inputs, running)
    tangent = jax.checkpoint(functools.partial(_tangent, plan, how, groups), prevent_cse=False)
    dy, dmoments = tangent(
        (inputs.x, inputs.mask, inputs.scale, moments, root),
        dinputs._replace(mask=None, train=None),
        drunning,
    )
    return (y, moments), (dy, dmoments)


def _forward(
    plan: Plan, how: Root, groups: Groups, inputs: Inputs, running: jax.Array
) -> tuple[jax.Array, Covariances | None, _Whitening]:
    whole, moments = inputs.x, None
    inputs = inputs._replace(x=groups.cut(whole), mask=groups.cut_mask(inputs.mask, whole))
    if plan.train is not False:
        moments = _covariance.covariances(plan.reduction, inputs.x, inputs.mask, inputs.mean)
    moments, c = _lean.named_moments((moments, _chosen(how, inputs, moments, running)))
    matrix = c.root if inputs.scale is None else inputs.scale[..., None] * c.root
    b = -_times(matrix, c.offset)
    if inputs.bias is not None:
        b = inputs.bias + b
    matrix, (shift, b) = _together(inputs.x, matrix, [c.shift, b])
    axes = plan.reduction.axes
    x = _normalize.finite(inputs.x, inputs.x, inputs.mask) - _reduce.spread(shift, axes)
    y = _product(plan.reduction, matrix, x) + _reduce.spread(b, axes)
    return groups.join(y.astype(plan.dtype), whole), moments, c


def _chosen(
    how: Root, inputs: Inputs, moments: Covariances | None, running: jax.Array
) -> _Whitening:
    running = with_diagonal(running, inputs.var)
    shift, offset, cov, from_batch = inputs.mean, lax.full_like(inputs.mean, 0), running, None
    if moments is not None:
        from_batch = _normalize.is_from_batch(inputs, moments.count)
        if from_batch is not None:
            from_batch = _placement.broadcast(from_batch, moments.var)
        shift = _choose(from_batch, moments.shift, shift)
        offset = _choose(from_batch, moments.offset, offset)
        cov = _choose(from_batch, moments.cov, cov)
    cov = _with_epsilon(cov, inputs.epsilon)
    return _Whitening(shift, offset, cov, _inverse_root(how, cov), from_batch)


def _with_epsilon(cov: jax.Array, epsilon: jax.Array) -> jax.Array:
    return with_diagonal(cov, diagonal(cov) + epsilon)


def _choose(condition: jax.Array | None, new: jax.Array, old: jax.Array) -> jax.Array:
    if condition is not None and new.ndim > condition.ndim:
        condition = _placement.broadcast(condition[..., None], new)
    return _normalize.choose(condition, new, old)


def _tangent(
    plan: Plan,
    how: Root,
    groups: Groups,
    residuals: tuple[Any, ...],
    d: Inputs,
    drunning: jax.Array,
) -> tuple[Any, Any]:
    """dy = M (dx - dmean) + dM (x - mean) + dbias, M = scale W, and dmoments."""
    whole, mask, scale, moments, c = residuals
    x, mask = groups.cut(whole), groups.cut_mask(mask, whole)
    r = plan.reduction
    dx, dmean, dmoments = _normalize.finite(groups.cut(d.x), x, mask), d.mean, None
    dcov = with_diagonal(drunning, d.var)
    if moments is not None:
        # Both less the same, as in `_normalize`.
        plain = dx
        dx = _moments.recentre(r, plain, mask)
        dmoments, residue = _covariance.centred_tangent(r, x, mask, moments, plain, dx)
        dmean = _choose(c.from_batch, residue, dmean - (dmoments.shift - residue))
        dcov = _choose(c.from_batch, dmoments.cov, dcov)
    _, dmatrix = jax.jvp(
        functools.partial(_inverse_root, how), (c.cov,), (_with_epsilon(dcov, d.epsilon),)
    )
    matrix = c.root
    if scale is not None:
        matrix, dmatrix = scale[..., None] * matrix, scale[..., None] * dmatrix
        if d.scale is not None:
            dmatrix = dmatrix + d.scale[..., None] * c.root
    shift, offset = _sums.split(c.shift, c.offset, bits_less=3)
    db = -_times(matrix, dmean) - _times(dmatrix, offset)
    if d.bias is not None:
        db = db + d.bias
    # Apart, since only what is linear in the tangents can be transposed.
    matrix, (shift,) = _together(x, matrix, [shift])
    dmatrix, (db,) = _together(x, dmatrix, [db])
    apart = _normalize.finite(x, x, mask) - _reduce.spread(shift, r.axes)
    dy = _product(r, matrix, dx) + _product(r, dmatrix, apart) + _reduce.spread(db, r.axes)
    return groups.join(dy.astype(plan.dtype), whole), dmoments


def _together(
    x: jax.Array, matrices: jax.Array, vectors: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    """As they are used with `x`, in one piece across devices."""
    axes = _reduce.varying(x)
    if axes - _reduce.varying((matrices, vectors)):
        return _covariance.unpack(_reduce.vary(_covariance.pack(matrices, vectors), axes))
    return matrices, vectors


def _product(r: Reduction, matrices: jax.Array, x: jax.Array) -> jax.Array:
    """matrix @ x for each entry, in the layout of `x`."""
    group, channel = (i for i in range(x.ndim) if i not in r.axes)
    y = lax.dot_general(x, matrices, (((channel,), (2,)), ((group,), (0,))), precision=EXACT)
    order = (group, *r.axes, channel)
    return lax.transpose(y, tuple(order.index(i) for i in range(x.ndim)))


def _times(matrices: jax.Array, vectors: jax.Array) -> jax.Array:
    """matrix @ vector of each group."""
    return lax.reduce_sum(matrices * vectors[..., None, :], axes=(2,))


def _inverse_root(how: Root, a: jax.Array) -> jax.Array:
    """A^(-1/2), symmetric, of each positive definite matrix; NaN of those that are not finite."""
    finite = lax.reduce_and(lax.is_finite(a), axes=(1, 2))
    finite = _placement.broadcast(finite[:, None, None], a)
    identity = with_diagonal(lax.full_like(a, 0), lax.full_like(diagonal(a), 1))
    # Apart from the others, as what factorizes and iterates is for all groups at once.
    safe = lax.select(finite, a, identity)
    iterations = how.iterations
    if iterations is None:
        iterations = 40 if jnp.finfo(a.dtype).bits > 32 else 20
    root = _eigh(safe) if how.method == "eigh" else _newton_schulz(iterations, safe)
    return lax.select(finite, root, lax.full_like(root, jnp.nan))


def _newton_schulz(iterations: int, a: jax.Array) -> jax.Array:
    """Y <- Y (3 - Z Y) / 2, Z <- (3 - Z Y) / 2 Z, from Y = A / s and Z = 1; then Z = (A/s)^(-1/2).

    s = |A|, Frobenius' norm, so that the eigenvalues of Y are in (0, 1].
    """
    trace = lax.reduce_sum(diagonal(a), axes=(1,))[:, None, None]
    y = a / trace
    norm = lax.sqrt(lax.reduce_sum(y * y, axes=(1, 2)))[:, None, None]
    y = y / norm

    def factor(p: jax.Array) -> jax.Array:
        return 0.5 * with_diagonal(-p, 3 - diagonal(p))

    def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, None]:
        y, z = carry
        t = factor(_matmul(z, y))
        return (_matmul(y, t), _matmul(t, z)), None

    t = factor(y)
    (_, z), _ = lax.scan(step, (_matmul(y, t), t), None, length=iterations - 1)
    return z * lax.rsqrt(trace * norm)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), precision=EXACT)


@jax.custom_jvp
def _eigh(a: jax.Array) -> jax.Array:
    """By eigendecomposition."""
    vectors, root = _eigensystem(a)
    return _spectral(vectors, lax.div(lax.full_like(root, 1), root))


@_eigh.defjvp
def _eigh_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Any, Any]:
    """A dZ S + S dZ A = -dA, with S = A^(1/2): finite at equal eigenvalues as well.

    That is the derivative of Z A Z = 1 between two S. It is solved by its eigenvectors.
    """
    (a,), (da,) = primals, tangents
    z = _eigh(a)
    s = _matmul(a, z)
    vectors, root = lax.stop_gradient(_eigensystem(a))

    def operator(v: jax.Array) -> jax.Array:
        return _matmul(a, _matmul(v, s)) + _matmul(s, _matmul(v, a))

    def solve(_: Any, b: jax.Array) -> jax.Array:
        one, other = root[..., None], root[..., None, :]
        rotated = _matmul(transposed(vectors), _matmul(b, vectors))
        rotated = rotated / (one * other * (one + other))
        return _matmul(vectors, _matmul(rotated, transposed(vectors)))

    return z, lax.custom_linear_solve(operator, -da, solve=solve, symmetric=True)


def _eigensystem(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors, and roots of the eigenvalues, which rounding may have made negative."""
    values, vectors = jnp.linalg.eigh(a)
    floor = jnp.finfo(a.dtype).eps * values[..., -1:]
    return vectors, lax.sqrt(jnp.maximum(values, floor))


def _spectral(vectors: jax.Array, values: jax.Array) -> jax.Array:
    return _matmul(vectors * values[..., None, :], transposed(vectors))

"""The oracle: batch normalization in float64 NumPy, and its derivatives.

Nothing of bnjax and no autodiff. First derivatives in reverse are the closed form
of Ioffe & Szegedy (2015), section 3; derivatives along a direction, of anything
here, are complex steps: f'(x) dx = Im f(x + i h dx) / h, exact to float64.
"""

from typing import Any, NamedTuple

import jax
import numpy as np


class Moments(NamedTuple):
    mean: Any
    var: Any
    count: Any


class Outputs(NamedTuple):
    """y and the new state."""

    y: Any
    mean: Any
    var: Any
    count: Any


class Inputs(NamedTuple):
    """What can be differentiated; gradients come in the same form."""

    x: Any
    scale: Any
    bias: Any
    mean: Any
    var: Any
    epsilon: Any


class _Batch(NamedTuple):
    """One call in columns: [N, C] and [C]."""

    x: np.ndarray  # non-finite masked entries are 0
    direct: np.ndarray  # where y depends on x directly
    keep: np.ndarray
    moments: Moments
    from_batch: np.ndarray
    learns: np.ndarray
    mean: np.ndarray  # what y is normalized with
    inverse: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    weight: np.ndarray  # of the old statistics
    correction: np.ndarray  # n / (n - 1), or 1


def moments(x, *, axis=-1, mask=None) -> Moments:
    """Mean, biased variance and count per channel."""
    with np.errstate(all="ignore"):
        x, shape = _columns(x, axis)
        keep = _mask(mask, x, shape, axis)
        return Moments(*(v.reshape(shape.features) for v in _moments(x, keep)))


def forward(inputs: Inputs, *, axis=-1, count=0, **options) -> Outputs:
    """y and the new state; options as those of bn_apply, and `count` of the old state."""
    with np.errstate(all="ignore"):
        b, shape = _prepare(inputs, axis=axis, count=count, **options)
        y = (b.x - b.mean) * b.inverse * b.scale + b.bias
        old = Moments(*(_vector(v, b.mean) for v in (inputs.mean, inputs.var, count)))
        mean = np.where(b.learns, b.weight * old.mean + (1 - b.weight) * b.moments.mean, old.mean)
        var = b.moments.var * b.correction
        var = np.where(b.learns, b.weight * old.var + (1 - b.weight) * var, old.var)
        state = (mean, var, old.count + b.learns)
        return Outputs(shape.restore(y), *(v.reshape(shape.features) for v in state))


def backward(inputs: Inputs, cotangents: tuple, *, axis=-1, **options) -> Inputs:
    """Gradients from cotangents (dy, dmean, dvar) of y and of the new state; 0 stands for zeros."""
    with np.errstate(all="ignore"):
        b, shape = _prepare(inputs, axis=axis, **options)
        dy, dmean, dvar = cotangents
        dy = _columns(np.broadcast_to(dy, np.shape(inputs.x)), axis)[0]
        dmean, dvar = (_vector(d, b.mean) for d in (dmean, dvar))
        normal = (b.x - b.mean) * b.inverse
        centre = -(dy * b.scale * b.inverse).sum(0)
        spread = -0.5 * b.inverse**2 * (dy * b.scale * normal).sum(0)
        new = b.learns * (1 - b.weight)
        old = np.where(b.learns, b.weight, 1)
        of_mean = b.from_batch * centre + new * dmean
        of_var = b.from_batch * spread + new * b.correction * dvar
        n = np.maximum(b.moments.count, 1)
        deviation = np.where(b.keep, b.x - b.moments.mean, 0)
        dx = np.where(b.direct, dy * b.scale * b.inverse, 0)
        dx = dx + b.keep * of_mean / n + 2 * deviation * of_var / n
        vectors = (
            None if inputs.scale is None else (dy * normal).sum(0),
            None if inputs.bias is None else dy.sum(0),
            ~b.from_batch * centre + old * dmean,
            ~b.from_batch * spread + old * dvar,
        )
        vectors = (None if v is None else v.reshape(shape.features) for v in vectors)
        return Inputs(shape.restore(dx), *vectors, spread.sum())


def directional(f, inputs, dinputs, step=1e-30):
    """The derivative of f, a function of a tree, along a direction."""
    bent = jax.tree.map(lambda v, d: _wide(v) + 1j * step * _wide(d), inputs, dinputs)
    return jax.tree.map(lambda v: np.imag(v) / step, f(bent))


class _Shape(NamedTuple):
    moved: tuple[int, ...]
    features: tuple[int, ...]
    axes: tuple[int, ...]

    def restore(self, columns):
        last = range(-len(self.axes), 0)
        return np.moveaxis(columns.reshape(self.moved), tuple(last), self.axes)


def _wide(v):
    return np.asarray(v, np.complex128 if np.iscomplexobj(v) else np.float64)


def _columns(x, axis):
    x = _wide(x)
    axes = tuple(sorted(a % x.ndim for a in np.atleast_1d(np.asarray(axis, int))))
    moved = np.moveaxis(x, axes, tuple(range(-len(axes), 0)))
    features = tuple(x.shape[a] for a in axes)
    size = int(np.prod(features))
    rows = x.size // size if size else 0
    return moved.reshape(rows, size), _Shape(moved.shape, features, axes)


def _mask(mask, columns, shape, axis):
    if mask is None:
        return np.ones(columns.shape, bool)
    full = np.moveaxis(np.empty(shape.moved), tuple(range(-len(shape.axes), 0)), shape.axes).shape
    return _columns(np.broadcast_to(mask, full), axis)[0].astype(bool)


def _vector(v, like):
    return np.broadcast_to(np.ravel(_wide(v)), like.shape)


def _moments(x, keep):
    count = keep.sum(0)
    n = np.maximum(count, 1)
    shift = np.where(keep, x, 0).sum(0) / n
    # The mean of what is left makes it exact at any mean.
    shift = shift + np.where(keep, x - shift, 0).sum(0) / n
    var = np.where(keep, (x - shift) ** 2, 0).sum(0) / n
    return Moments(shift, var, count)


def _prepare(
    inputs, *, axis, train=True, mask=None, momentum=0.99, unbiased=False, count=0
) -> tuple[_Batch, _Shape]:
    x, shape = _columns(inputs.x, axis)
    keep = _mask(mask, x, shape, axis)
    direct = keep | np.isfinite(x)
    x = np.where(direct, x, 0)
    batch = _moments(x, keep)
    old_mean, old_var = (_vector(v, batch.mean) for v in (inputs.mean, inputs.var))
    from_batch = (batch.count > 0) & train
    mean = np.where(from_batch, batch.mean, old_mean)
    var = np.where(from_batch, batch.var, old_var)
    learns = (batch.count >= 2) & np.isfinite(batch.mean) & np.isfinite(batch.var) & train
    weight = momentum(np.asarray(count)) if callable(momentum) else momentum
    correction = batch.count / np.maximum(batch.count - 1, 1) if unbiased else 1.0
    return _Batch(
        x=x,
        direct=direct,
        keep=keep,
        moments=batch,
        from_batch=from_batch,
        learns=learns,
        mean=mean,
        inverse=(var + _vector(inputs.epsilon, mean)) ** -0.5,
        scale=_vector(1 if inputs.scale is None else inputs.scale, mean),
        bias=_vector(0 if inputs.bias is None else inputs.bias, mean),
        weight=_vector(weight, mean),
        correction=_vector(correction, mean),
    ), shape


class Whitened(NamedTuple):
    """y and the new state."""

    y: Any
    mean: Any
    var: Any
    cov: Any


class OfWhitened(NamedTuple):
    """Gradients; that by the variances is the diagonal of that by the covariances."""

    x: Any
    scale: Any
    bias: Any
    mean: Any
    cov: Any


def whiten(params, state, x, mask, dy, of_state, *, train=True, momentum=0.99, epsilon=1e-5):
    """y and the new state; and gradients from cotangents of y and of the new statistics or None.

    For Z = A^(-1/2), S = A^(1/2) the derivative solves A dZ S + S dZ A = -dA: in the eigenbasis
    dZ_ij = -dA_ij / (s_i s_j (s_i + s_j)), a symmetric map, which is its own adjoint.
    """
    size = state.cov.shape[-1]
    parts = []
    for i in range(len(state.cov)):
        own = slice(i * size, (i + 1) * size)
        vectors = [np.asarray(v, np.float64)[..., own] for v in (*params, *state[:2], x, dy)]
        cotangents = None
        if of_state is not None:
            cotangents = [
                np.float64(v) for v in (of_state[0][own], of_state[1][own], of_state[2][i])
            ]
        given = np.float64(state.cov[i])
        parts.append(_group(*vectors, given, mask, cotangents, train, momentum, epsilon))
    outputs, gradients = zip(*parts, strict=True)
    joined = [np.concatenate(v, -1) for v in list(zip(*outputs, strict=True))[:3]]
    rest = [np.concatenate(v, -1) for v in list(zip(*gradients, strict=True))[:4]]
    return (
        Whitened(*joined, np.stack([o.cov for o in outputs])),
        OfWhitened(*rest, np.stack([g.cov for g in gradients])),
    )


def _group(scale, bias, mean, var, x, dy, cov, mask, of_state, train, momentum, epsilon):
    keep = np.ones((len(x), 1), bool) if mask is None else mask
    direct = keep | np.isfinite(x)
    x = np.where(direct, x, 0)
    n, old = keep.sum(), cov - np.diag(np.diag(cov)) + np.diag(var)
    m, c = mean, old
    if train:
        m = x[keep[:, 0]].mean(0)
        m = m + (x[keep[:, 0]] - m).mean(0)
        c = np.cov(x[keep[:, 0]] - m, rowvar=False, ddof=0).reshape(len(m), -1)
    values, vectors = np.linalg.eigh(c + epsilon * np.eye(len(m)))
    s = np.sqrt(values)
    root = (vectors / s) @ vectors.T
    z = x - m
    out = Whitened(
        (z @ root) * scale + bias,
        momentum * mean + (1 - momentum) * m if train else mean,
        momentum * var + (1 - momentum) * np.diag(c) if train else var,
        momentum * cov + (1 - momentum) * c if train else cov,
    )
    weighted = dy * scale
    of_root = weighted.T @ z
    rotated = vectors.T @ ((of_root + of_root.T) / 2) @ vectors
    of_cov = -vectors @ (rotated / (s * s[:, None] * (s + s[:, None]))) @ vectors.T
    dx, of_mean = weighted @ root, -(weighted @ root).sum(0)
    grads = OfWhitened(dx, (dy * (z @ root)).sum(0), dy.sum(0), of_mean, of_cov)
    if not train:
        return out, grads
    if of_state is not None:
        of_mean = of_mean + (1 - momentum) * of_state[0]
        of_cov = of_cov + (1 - momentum) * (np.diag(of_state[1]) + of_state[2])
    dx = dx * direct
    dx = dx + keep * (of_mean / n + z @ (of_cov + of_cov.T) / n)
    return out, grads._replace(x=dx)

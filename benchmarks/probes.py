"""The questions of peers.py: short programs, each with one layer, that answer in words."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from layers import EPSILON, Equinox, Layer
from other_layers import Torch

LayerType = type[Layer]
Probe = Callable[[LayerType], str]

CHANNELS = 3
rng = np.random.default_rng(0)
X = rng.standard_normal((12, CHANNELS)).astype(np.float32)
W = rng.standard_normal((12, CHANNELS)).astype(np.float32)
T = rng.standard_normal((12, CHANNELS)).astype(np.float32)
KEEP = np.arange(12) < 7


def reference(function: str, x: np.ndarray = X, w: np.ndarray = W) -> np.ndarray:
    """y and the derivatives of layers.Layer in float64, by the plain formula."""
    with jax.enable_x64(True):
        x, w, t = (jnp.asarray(a, np.float64) for a in (x, w, T))

        def normalized(x: jax.Array) -> jax.Array:
            centred = x - x.mean(0)
            return centred / jnp.sqrt((centred**2).mean(0) + EPSILON)

        def grad(x: jax.Array) -> jax.Array:
            return jax.grad(lambda x: (w * normalized(x) ** 3).sum())(x)

        programs = {
            "y": normalized,
            "grad": grad,
            "jvp": lambda x: jax.jvp(normalized, (x,), (t,))[1],
            "second": jax.grad(lambda x: (grad(x) * t).sum()),
        }
        return np.asarray(programs[function](x))


def error_of_variance(layer: LayerType, x: np.ndarray, **options: Any) -> float:
    instance = layer(x.shape[1], momentum=0.0, **options)
    instance.step(x)
    var = instance.running(instance.variables)[1].astype(np.float64)
    wide = x.astype(np.float64)
    return float(np.abs(var / wide.var(0, ddof=int(layer.unbiased)) - 1).max())


def verdict(error: float) -> str:
    if not np.isfinite(error):
        return "not finite"
    if error < 1e-3:
        return "yes"
    return f"wrong, error {error:.2g}" if error >= 1 else f"off by {100 * error:.2g} %"


def variance(layer: LayerType, mean: float, dtype: Any = np.float32) -> str:
    noise = np.random.default_rng(0).standard_normal((8192, 64)) + mean
    # equinox refuses an input that is not of its parameters' dtype.
    options = {"param_dtype": dtype} if issubclass(layer, Equinox) else {}
    return verdict(error_of_variance(layer, noise.astype(dtype), **options))


def far_from_zero(layer: LayerType, function: str) -> str:
    """Error of y or of the gradient at a mean of 1e4 deviations, relative to the largest."""
    x, w = np.random.default_rng(0).standard_normal((2, 8192, 8))
    x, w = (x + 1e4).astype(np.float32), w.astype(np.float32)
    instance = layer(x.shape[1])
    value = instance.step(x) if function == "y" else instance.grad(x, w)
    wanted = reference(function, x, w)
    return verdict(float(np.abs(value - wanted).max() / np.abs(wanted).max()))


def mask(layer: LayerType) -> str:
    def like_deletion(mask: np.ndarray) -> bool:
        masked, deleted = layer(CHANNELS), layer(CHANNELS)
        y = masked.step(X, mask)
        wanted = deleted.step(X[KEEP])
        pairs = zip(
            (y[KEEP], *masked.running(masked.variables)),
            (wanted, *deleted.running(deleted.variables)),
            strict=True,
        )
        return all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)

    if not like_deletion(KEEP):
        return "wrong"
    try:
        layer(CHANNELS).step(X, np.broadcast_to(KEEP[:, None], X.shape))
    except ValueError:
        return "yes, of examples"
    return "yes"


def mask_over_devices(layer: LayerType) -> str:
    """Two devices with 5 and 1 entries: the mean of all six, or the mean of the means."""
    instance = layer(CHANNELS, momentum=0.0, axis_name="i")
    keep = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0], bool)
    x = X.copy()
    x[6:] += 3
    run = functools.partial(
        jax.shard_map,
        mesh=jax.make_mesh((2,), ("i",), (jax.sharding.AxisType.Auto,)),
        in_specs=(jax.P(), jax.P("i"), jax.P("i")),
        out_specs=jax.P(),
        check_vma=False,
    )(lambda v, x, keep: instance.apply(v, x, True, keep)[1])
    mean = instance.running(jax.jit(run)(instance.variables, x, keep))[0]
    error = np.abs((mean - x[keep].mean(0)) / x[keep].std(0)).max()
    return "yes" if error < 1e-5 else f"off by {error:.1f} deviations"


def mask_nan(layer: LayerType) -> str:
    x = np.where(KEEP[:, None], X, np.nan).astype(np.float32)
    clean, dirty = layer(CHANNELS), layer(CHANNELS)
    wanted, y = clean.step(X, KEEP)[KEEP], dirty.step(x, KEEP)[KEEP]
    states = zip(clean.running(clean.variables), dirty.running(dirty.variables), strict=True)
    same = np.allclose(y, wanted, atol=1e-6) and all(np.allclose(a, b) for a, b in states)
    return "yes" if same else "no"


def mask_nan_gradient(layer: LayerType) -> str:
    x, w = np.where(KEEP[:, None], X, np.nan).astype(np.float32), W * KEEP[:, None]
    wanted, gradient = layer(CHANNELS).grad(X, w, KEEP), layer(CHANNELS).grad(x, w, KEEP)
    return "yes" if np.allclose(gradient[KEEP], wanted[KEEP], atol=1e-5) else "no"


def nan_batch(layer: LayerType) -> str:
    instance = layer(CHANNELS)
    bad = X.copy()
    bad[0, 0] = np.nan
    for x in (X, bad, X, X):
        instance.step(x)
    finite = all(np.isfinite(a).all() for a in instance.running(instance.variables))
    return "yes" if finite else "no, NaN for good"


def batch_statistics(layer: LayerType) -> str:
    """Whether the second batch, of another mean, is centred too."""
    instance = layer(CHANNELS)
    instance.step(X)
    centre = float(np.abs(instance.step(X + 5).mean(0)).max())
    return "yes" if centre < 1e-4 else f"no, mean of y is {centre:.1f}"


def jvp(layer: LayerType) -> str:
    return _right(layer(CHANNELS).jvp(X, T), reference("jvp"))


def second_order(layer: LayerType) -> str:
    return _right(layer(CHANNELS).grad_grad(X, W, T), reference("second"))


def _right(value: np.ndarray, wanted: np.ndarray) -> str:
    return "yes" if np.allclose(value, wanted, rtol=1e-3, atol=1e-3) else "wrong"


def residuals(layer: LayerType) -> str:
    """Arrays of the size of a bfloat16 input that give a bfloat16 output, itself included."""
    x = jnp.ones((64, 32), jnp.bfloat16)
    options = {"param_dtype": jnp.bfloat16} if issubclass(layer, Equinox) else {}
    instance = layer(32, dtype=jnp.bfloat16, **options)
    full = [size for count, size in instance.residuals(x) if count == x.size]
    arrays = "1 array" if len(full) == 1 else f"{len(full)} arrays"
    return f"{arrays}, {sum(full)} bytes"


def output_dtype(layer: LayerType) -> str:
    instance = layer(CHANNELS)
    return str(instance.step(X.astype(jnp.bfloat16)).dtype)


def float64(layer: LayerType) -> str:
    """Precise to 1e-12 for float64 input and parameters, in output and running variance."""
    x = np.random.default_rng(0).standard_normal((100, CHANNELS)) + 1
    with jax.enable_x64(True):
        error = error_of_variance(layer, x, param_dtype=np.float64)
        y = layer(CHANNELS, param_dtype=np.float64).step(x)
    wanted = (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)
    right = y.dtype == np.float64 and np.abs(y - wanted).max() < 1e-12
    statistics = "" if error < 1e-12 else f", running variance to {error:.0e}"
    return ("yes" if right else "no") + statistics


def fresh(layer: LayerType) -> str:
    y = layer(CHANNELS).evaluate(X)
    factor = float(np.median(y / X))
    return "silent, y = x" if abs(factor - 1) < 0.01 else f"silent, y = {factor:.0f} x"


def batch_of_one(layer: LayerType) -> str:
    instance = layer(CHANNELS)
    instance.step(X)
    before = instance.running(instance.variables)[1].copy()
    instance.step(X[:1])
    after = instance.running(instance.variables)[1]
    ratio = float((after / before).mean())
    return "statistics kept" if ratio == 1 else f"running variance times {ratio:.2g}"


def cumulative(layer: LayerType) -> str:
    instance = layer(CHANNELS, momentum=None)
    for scale in (1, 2, 3):
        instance.step(X * scale)
    mean = instance.running(instance.variables)[0]
    return "yes" if np.allclose(mean, 2 * X.mean(0), atol=1e-5) else "wrong"


def traced_train(layer: LayerType) -> str:
    if layer is Torch:
        return "n/a"
    instance = layer(CHANNELS)

    @jax.jit
    def call(train: jax.Array, x: jax.Array) -> jax.Array:
        return instance.apply(instance.variables, x, train)[0]

    for train in (True, False):
        wanted = instance.apply(instance.variables, X, train)[0]
        if not np.allclose(call(jnp.asarray(train), X), wanted, atol=1e-5):
            return "wrong"
    return "yes"


def running_variance(layer: LayerType) -> str:
    instance = layer(CHANNELS, momentum=0.0)
    instance.step(X)
    var = instance.running(instance.variables)[1]
    names = {"biased": X.var(0), "unbiased": X.var(0, ddof=1)}
    return next((name for name, v in names.items() if np.allclose(var, v, rtol=1e-4)), "neither")


def vmapped(layer: LayerType) -> str:
    """Each member of a batch of batches like that batch alone."""
    if layer is Torch:
        return "n/a"
    instance = layer(CHANNELS)
    many = jnp.stack([X, X * 2 + 1])
    y = jax.vmap(lambda x: instance.apply(instance.variables, x)[0])(many)
    alone = [instance.apply(instance.variables, x)[0] for x in many]
    return _right(np.asarray(y), np.stack(alone))

"""Population statistics: running statistics replaced by those of data."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax import _checks, _covariance, _merge, _observe
from bnjax._models import common, kinds
from bnjax._models.common import Layer, Program
from bnjax._moments import BatchMoments
from bnjax._observe import Mode, Seen

Method = Literal["pooled", "average"]

# Fewer batches than in two such halves agree by chance.
_LEAST_HALF = 4


def recalibrate(
    model: Any,
    variables: Any,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] | None = None,
    method: Method = "pooled",
    passes: int = 1,
    tolerance: float | None = None,
    progress: bool = False,
) -> Any:
    """The model with the statistics of data in place of its running statistics.

    pooled: mean = sum(n_b * mean_b) / n, var = sum(n_b * (var_b + (mean_b - mean)**2)) / n,
    the moments of all entries of all batches, the variance of the means included.
    average: mean = E_b[mean_b], var = E_b[n_b / (n_b - 1) * var_b], Algorithm 2 of the
    paper. `count`, where it is kept, becomes the number of batches. Covariances of layers
    that whiten are found as variances are.

    For weights whose running statistics are not their own: after averaging weights (EMA,
    SWA), after gradient accumulation, for data of a new domain, or for evaluation more
    precise than a moving average. The model is called as in evaluation, without dropout,
    but for its batch normalization, which takes the moments of each batch. In a further
    pass it takes the statistics found so far: layers whose input depends on k others are
    exact after k + 1 passes, as if all data were one batch, whatever the size of batches.
    Memory does not depend on the number of batches.

    Args:
      model: a flax.linen or flax.nnx module, with BatchNorm layers of bnjax or of flax;
        or a function (variables, batch) -> (output, state), with a `BNState` for each
        layer in both, which goes to the layer as it is.
      variables: of the linen module; those of the function, such as (params, state); None
        for nnx.
      batches: arrays or trees of arrays, of any sizes; sharded ones are taken as a whole.
      call: (apply, batch) -> output, where `apply` takes the arguments of the module, in
        evaluation, as in `lambda apply, batch: apply(batch["image"], train=False)`; by
        default apply(batch). Model and `call` are compiled, as by `jax.jit`, and kept: what
        they read besides their arguments stays as it was at first, and another function is
        compiled anew.
      method: "pooled" or "average".
      passes: over the batches, which must then be a list, or another iterable that starts
        anew each time.
      tolerance: stop a pass after 8, 16, 32, ... batches, which should be shuffled, when the
        statistics of both halves of them agree in every channel, means within this many
        deviations, logarithms of variances and correlations (of layers that whiten) within
        this; by default use all.
      progress: whether to show a bar (rich, in the extra `reports`).

    Returns:
      `variables`, or the nnx module itself; where a batch fails, it stays as it was. What
      is not finite in a channel of a batch makes that channel pass over that batch.
      Channels with fewer than two entries keep their statistics ("average": without a
      batch of two), and so do layers that were not called, of which a UserWarning tells.

    Raises:
      TypeError, ValueError: a model without such layers, no batch, options that do not
      fit.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> def model(variables, x):
      ...     return bnjax.bn_apply(*variables, x, train=False)
      >>> variables = bnjax.bn_init(1)
      >>> batches = [jnp.array([[1.0], [3.0], [5.0]]), jnp.array([[7.0]])]
      >>> params, state = bnjax.recalibrate(model, variables, batches)
      >>> print(state.mean, state.var, state.count)
      [4.] [5.] [2]

    Source: Ioffe & Szegedy (2015), Algorithm 2; Wu & Johnson (2021), "Rethinking 'Batch'
    in BatchNorm", section 3; Chan, Golub & LeVeque (1983).
    """
    if method not in get_args(Method):
        raise ValueError(f"`method` must be one of {list(get_args(Method))}, got {method!r}.")
    passes = _checks.positive("passes", passes)
    if tolerance is not None:
        tolerance = float(_checks.number("tolerance", tolerance, 0.0, jnp.inf, ()))
    _check_batches(batches, passes)
    given = kinds.subject(model, variables, call)
    common.require_values("recalibrate", variables=given.variables)
    try:
        for i in range(passes):
            subject = kinds.subject(model, variables, call) if i else given
            words = f"statistics, pass {i + 1} of {passes}" if passes > 1 else "statistics"
            with _shown(batches, words) if progress else contextlib.nullcontext(batches) as shown:
                found = _one_pass(subject, shown, method, Mode(train=i == 0, cov=True), tolerance)
            replaced = subject.replaced({path: layer for path, (layer, _) in found.items()})
            variables = variables if replaced is model else replaced
    except BaseException:
        given.replaced(given.layers)  # an nnx module holds those of earlier passes
        raise
    _warn_of_kept([path for path, (_, learned) in found.items() if not learned.any()])
    return replaced


def _check_batches(batches: Any, passes: int) -> None:
    if isinstance(batches, (jax.Array, np.ndarray, Mapping)) or not hasattr(batches, "__iter__"):
        raise TypeError(
            "`batches` must be an iterable of batches, such as a list or a generator, got "
            f"{type(batches).__name__}. Fix: [batch], for one batch."
        )
    if passes > 1 and iter(batches) is batches:
        raise ValueError(
            f"`batches` must start anew for each of the {passes} passes, got an iterator, which "
            "is used up by the first. Fix: a list, or passes=1."
        )


class _Moments(NamedTuple):
    """Of a layer; of one that whitens with covariances, of a channel with those of its group."""

    plain: BatchMoments
    cov: jax.Array | None


class _Part(NamedTuple):
    """Of one layer: moments of the batches until they were last compared, and of those since.

    `batches`: how many were accepted.
    """

    before: _Moments
    since: _Moments
    batches: jax.Array


def _one_pass(
    subject: common.Subject,
    batches: Iterable[Any],
    method: Method,
    mode: Mode,
    tolerance: float | None,
) -> dict[str, tuple[Layer, jax.Array]]:
    """By path, the statistics, and where they come from the data."""
    observe = _observer(subject.program, mode)
    parts = {path: _empty(layer) for path, layer in subject.layers.items()}
    number = 0
    for batch in batches:
        seen = observe(subject.variables, batch)
        parts |= {path: _with(method, parts[path], new) for path, new in seen.items()}
        number += 1
        power_of_two = number & (number - 1) == 0
        if tolerance is not None and power_of_two and number >= _LEAST_HALF:
            # -inf: nothing was learned yet.
            if 0 <= np.max([_distance(part) for part in parts.values()]) <= tolerance:
                break
            parts = {path: _compared(method, part) for path, part in parts.items()}
    if not number:
        raise ValueError(
            "`batches` must hold at least one batch, got none. Fix: a generator is used up by "
            "one call; make it anew."
        )
    return {path: _statistics(method, layer, parts[path]) for path, layer in subject.layers.items()}


def _empty(layer: Layer) -> _Part:
    nothing = _seen(_observe.nothing(layer.mean, layer.cov))
    return _Part(nothing, nothing, nothing.plain.count)


def _seen(seen: Seen) -> _Moments:
    return _Moments(seen.moments(), seen.cov)


@functools.lru_cache(common.PROGRAMS)
def _observer(program: Program, mode: Mode) -> Callable[[Any, Any], dict[str, _Moments]]:
    """(variables, batch) -> the moments that layers saw, compiled.

    Apart from what is done with them: where sums are placed may change after the first batch,
    and one small program does for all layers of a size.
    """

    def observe(variables: Any, batch: Any) -> dict[str, _Moments]:
        _, seen = common.observed(program, mode, variables, batch)
        return {path: _seen(layer) for path, layer in seen.items()}

    return jax.jit(observe)


@functools.partial(jax.jit, static_argnums=0)
def _with(method: Method, part: _Part, found: _Moments) -> _Part:
    """One more batch, in the channels where something can be learned from it."""
    batch, cov = found
    finite = lax.is_finite(batch.shift + batch.offset) & lax.is_finite(batch.var)
    sound = finite & (batch.count >= (2 if method == "average" else 1))
    if cov is not None:
        sound = _in_all_of_a_group(sound & lax.is_finite(cov).all(-1), cov.shape[-1])
        cov = jnp.where(sound[..., None], cov, 0)
    new = BatchMoments(*(jnp.where(sound, v, 0) for v in batch))
    if method == "average":
        correction = new.count / jnp.maximum(new.count - 1, 1)
        new = new._replace(var=new.var * correction, count=sound.astype(new.count.dtype))
        cov = None if cov is None else cov * correction[..., None]
    accepted = part.batches + sound.astype(part.batches.dtype)
    return _Part(part.before, _union(method, part.since, _Moments(new, cov)), accepted)


def _in_all_of_a_group(condition: jax.Array, size: int) -> jax.Array:
    whole = condition.reshape(-1, size).all(1, keepdims=True)
    return jnp.broadcast_to(whole, (whole.size, size)).reshape(condition.shape)


def _union(method: Method, one: _Moments, other: _Moments) -> _Moments:
    """Pooled, or the averages of means and of variances, where counts are those of batches."""
    whole, cov = _merge.with_batch(one.plain, other.plain), None
    if method == "pooled":
        if one.cov is not None and other.cov is not None:
            cov = _covariance.with_batch(one.plain, one.cov, other.plain, other.cov)
        return _Moments(whole, cov)
    share = other.plain.count / jnp.maximum(whole.count, 1)
    var = one.plain.var + share * (other.plain.var - one.plain.var)
    if one.cov is not None and other.cov is not None:
        cov = one.cov + share[..., None] * (other.cov - one.cov)
    return _Moments(whole._replace(var=var), cov)


@functools.partial(jax.jit, static_argnums=0)
def _compared(method: Method, part: _Part) -> _Part:
    """All batches so far become the first half of those of the next comparison."""
    nothing = jax.tree.map(jnp.zeros_like, part.since)
    return _Part(_union(method, part.before, part.since), nothing, part.batches)


@functools.partial(jax.jit, static_argnums=0)
def _statistics(method: Method, given: Layer, part: _Part) -> tuple[Layer, jax.Array]:
    """What the layer gets: what it had, in channels that nothing was learned about."""
    moments, cov = _union(method, part.before, part.since)
    found = moments.plain()
    learned = found.count >= (1 if method == "average" else 2)

    def new(value: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(learned, value.astype(old.dtype), old)

    count = None if given.count is None else new(part.batches, given.count)
    if cov is not None and given.cov is not None:
        old = given.cov.reshape(cov.shape)
        cov = jnp.where(learned[..., None], cov.astype(old.dtype), old).reshape(given.cov.shape)
    layer = Layer(new(found.mean, given.mean), new(found.var, given.var), count, cov)
    return layer, learned


@jax.jit
def _distance(part: _Part) -> jax.Array:
    """The largest over channels between both halves: see `tolerance` of `recalibrate`.

    Channels where both are empty are not compared.
    """
    one, other = part.before.plain, part.since.plain
    apart = one.shift - other.shift + one.offset - other.offset
    # Of a constant channel, mean and variance are rounding.
    rounding = 4 * jnp.finfo(one.var.dtype).eps * (jnp.abs(one.shift) + jnp.abs(other.shift))
    floor = rounding * rounding + jnp.finfo(one.var.dtype).tiny
    a, b = one.var + floor, other.var + floor
    scale = lax.rsqrt((a + b) / 2)
    worst = jnp.maximum(jnp.abs(apart) * scale, jnp.abs(jnp.log(a / b)))
    if part.before.cov is not None and part.since.cov is not None:
        size = part.before.cov.shape[-1]
        groups = scale.reshape(-1, 1, size)
        between = jnp.abs(part.before.cov - part.since.cov).reshape(-1, size, size)
        correlations = (between * groups * groups.swapaxes(1, 2)).max(-1)
        worst = jnp.maximum(worst, correlations.reshape(worst.shape))
    both, neither = (one.count > 0) & (other.count > 0), one.count + other.count == 0
    worst = jnp.where(both, worst, jnp.where(neither, -jnp.inf, jnp.inf))
    return worst.max(initial=-jnp.inf)


def _warn_of_kept(paths: list[str]) -> None:
    if paths:
        warnings.warn(
            "these layers keep their statistics, as they were not called, or saw too few finite "
            f"entries: {paths}. Fix: a `call` that reaches them, larger batches.",
            UserWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _shown(batches: Iterable[Any], words: str) -> Iterator[Iterable[Any]]:
    """The batches, with a progress bar."""
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError(
            "`progress=True` needs rich. Fix: pip install 'bnjax[reports]', or progress=False."
        ) from error
    with Progress() as bar:
        tracked: Any = bar.track(batches, description=words)  # a generator with a thread
        with contextlib.closing(tracked):
            yield tracked

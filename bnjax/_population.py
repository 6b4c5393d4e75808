"""Population statistics: running statistics replaced by those of data."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _checks, _merge
from bnjax._models import common, kinds
from bnjax._models.common import Layer, Program
from bnjax._moments import BatchMoments
from bnjax._observe import Mode, Seen

Method = Literal["pooled", "average"]

# Before so many batches, agreement of halves says little.
_LEAST_BATCHES = 8


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
    paper. `count`, where it is kept, becomes the number of batches.

    For weights whose running statistics are not their own: after averaging weights (EMA,
    SWA), after gradient accumulation, for data of a new domain, or for evaluation more
    precise than a moving average. The model is called as in evaluation, without dropout,
    but for its batch normalization, which takes the moments of each batch. In a further
    pass it takes the statistics found so far: layers whose input depends on k others are
    exact after k + 1 passes, as if all data were one batch, whatever the size of batches.
    Memory does not depend on the number of batches.

    Args:
      model: a flax.linen or flax.nnx module, with BatchNorm layers of bnjax or of flax;
        or a function: (variables, batch) -> (output, state), with a `BNState` for each
        layer in both.
      variables: of the linen module; those of the function, such as (params, state); None
        for nnx.
      batches: arrays or trees of arrays, of any sizes; sharded ones are taken as a whole.
      call: (apply, batch) -> output, where `apply` takes the arguments of the module, in
        evaluation: `lambda apply, batch: apply(batch["image"], train=False)`. It must be
        one function for all calls of `recalibrate` that are to share a compiled program.
        Default: apply(batch).
      method: "pooled" or "average".
      passes: over the batches, which must then be a list, or another iterable that starts
        anew each time.
      tolerance: stop a pass when the statistics of the even and of the odd batches so far
        agree in every channel: means within this many deviations, logarithms of variances
        within this. Default: use all.
      progress: whether to show a bar (rich, in the extra `reports`).

    Returns:
      `variables`, or the nnx module itself, whose statistics are replaced when all is
      done. Channels without a finite entry keep theirs, and so do layers that were not
      called, of which a UserWarning tells.

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
    if passes > 1 and iter(batches) is batches:
        raise ValueError(
            f"`batches` must start anew for each of the {passes} passes, got an iterator, which "
            "is used up by the first. Fix: a list, or passes=1."
        )
    for i in range(passes):
        subject = kinds.subject(model, variables, call)
        shown = _shown(batches, i, passes) if progress else batches
        found = _one_pass(subject, shown, method, Mode(train=i == 0), tolerance)
        replaced = subject.replaced(found)
        variables = variables if replaced is model else replaced
    return replaced


class _Part(NamedTuple):
    """Of one layer: the moments of even and of odd batches, and how many were accepted."""

    even: BatchMoments
    odd: BatchMoments
    batches: jax.Array


def _one_pass(
    subject: common.Subject,
    batches: Iterable[Any],
    method: Method,
    mode: Mode,
    tolerance: float | None,
) -> dict[str, Layer]:
    parts = {path: _empty(layer.mean) for path, layer in subject.layers.items()}
    number = 0
    for batch in batches:
        odd = jnp.asarray(number % 2 == 1)
        parts = _step((subject.program, mode, method), subject.variables, parts, batch, odd)
        number += 1
        if tolerance is not None and number >= _LEAST_BATCHES and _distance(parts) <= tolerance:
            break
    if not number:
        raise ValueError("`batches` must hold at least one batch, got none.")
    _warn_of_uncalled([path for path, part in parts.items() if not part.batches.any()])
    return {path: _statistics(method, layer, parts[path]) for path, layer in subject.layers.items()}


def _empty(mean: jax.Array) -> _Part:
    def zeros() -> jax.Array:  # each is donated
        return jnp.zeros(jnp.shape(mean), _checks.compute_dtype(mean.dtype))

    even, odd = (BatchMoments(zeros(), zeros(), zeros(), zeros()) for _ in range(2))
    return _Part(even, odd, zeros())


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(
    static: tuple[Program, Mode, Method],
    variables: Any,
    parts: dict[str, _Part],
    batch: Any,
    odd: jax.Array,
) -> dict[str, _Part]:
    program, mode, method = static
    _, seen = common.observed(program, mode, variables, batch)
    return parts | {path: _with(method, parts[path], new, odd) for path, new in seen.items()}


def _with(method: Method, part: _Part, seen: Seen, odd: jax.Array) -> _Part:
    """The part and one more batch, in the channels where that can be learned from."""
    batch = seen.moments()
    half = BatchMoments(*(jnp.where(odd, o, e) for e, o in zip(part.even, part.odd, strict=True)))
    enough = seen.entries >= (2 if method == "average" else 1)
    sound = enough & lax.is_finite(batch.shift + batch.offset) & lax.is_finite(batch.var)
    safe = BatchMoments(*(jnp.where(sound, v, 0) for v in batch))
    if method == "pooled":
        new = _merge.with_batch(half, safe)
    else:
        one = safe._replace(count=sound.astype(safe.var.dtype))
        new = _merge.with_batch(half, one)
        unbiased = safe.var * (safe.count / jnp.maximum(safe.count - 1, 1))
        step = jnp.where(sound, (unbiased - half.var) / jnp.maximum(new.count, 1), 0)
        new = new._replace(var=half.var + step)
    even = BatchMoments(*(jnp.where(odd, o, v) for o, v in zip(part.even, new, strict=True)))
    other = BatchMoments(*(jnp.where(odd, v, o) for o, v in zip(part.odd, new, strict=True)))
    return _Part(even, other, part.batches + sound.astype(part.batches.dtype))


@functools.partial(jax.jit, static_argnums=0)
def _statistics(method: Method, given: Layer, part: _Part) -> Layer:
    """What the layer gets; what it had, in channels that nothing was learned about."""
    halves = BatchMoments(*map(jnp.stack, zip(part.even, part.odd, strict=True)))
    whole = _merge.union(halves)
    if method == "average":
        share = halves.count / jnp.maximum(whole.count, 1)
        whole = whole._replace(var=(share * halves.var).sum(0))
    found = whole.plain()
    learned = found.count >= (1 if method == "average" else 2)
    mean = jnp.where(learned, found.mean.astype(given.mean.dtype), given.mean)
    var = jnp.where(learned, found.var.astype(given.var.dtype), given.var)
    if given.count is None:
        return Layer(mean, var, None)
    return Layer(mean, var, jnp.where(learned, part.batches.astype(given.count.dtype), given.count))


@jax.jit
def _distance(parts: dict[str, _Part]) -> jax.Array:
    """The largest over channels between both halves, in deviations or logarithms of variances."""

    def of_layer(part: _Part) -> jax.Array:
        even, odd = part.even, part.odd
        tiny = jnp.finfo(even.var.dtype).tiny
        a, b = even.var + tiny, odd.var + tiny
        apart = (even.shift - odd.shift + even.offset - odd.offset) * lax.rsqrt((a + b) / 2)
        both = (even.count > 0) & (odd.count > 0)
        worst = jnp.maximum(jnp.abs(apart), jnp.abs(jnp.log(a / b)))
        return jnp.where(both | (even.count + odd.count == 0), worst, jnp.inf).max()

    return jnp.stack([of_layer(part) for part in parts.values()]).max()


def _warn_of_uncalled(paths: list[str]) -> None:
    if paths:
        warnings.warn(
            f"these layers were not called, or saw no finite entry, and keep their statistics: "
            f"{paths}. Fix: a `call` that reaches them.",
            UserWarning,
            stacklevel=4,
        )


def _shown(batches: Iterable[Any], index: int, passes: int) -> Iterator[Any]:
    """The batches, with a progress bar."""
    try:
        from rich.progress import track
    except ImportError as error:
        raise ImportError(
            "`progress=True` needs rich. Fix: pip install 'bnjax[reports]', or progress=False."
        ) from error
    words = "statistics" if passes == 1 else f"statistics, pass {index + 1} of {passes}"
    total = len(batches) if isinstance(batches, Sized) else None
    yield from track(batches, words, total=total)

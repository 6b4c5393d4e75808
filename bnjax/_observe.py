"""What a layer sees in a call, carried out of the model in the place of its state.

A state wrapped in `Observed` makes a call of any norm leave its statistics alone and
note the moments of its input. As it is data, it passes through jit, scan, vmap and
shard_map like any state. `observing` is the same for modules.
"""

import functools
import itertools
import math
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _checks, _covariance, _layer, _merge, _normalize, _placement, _reduce
from bnjax._fold import flow
from bnjax._moments import BatchMoments, batch_moments
from bnjax._reduce import Reduction
from bnjax._types import BNParams, BNState, Norm

# At most so many entries of a channel are sorted or counted.
_SAMPLE = 256
_QUANTILES = (0.15, 0.5, 0.85)
# Where the derivative is a tenth of its largest: sigmoid(z) (1 - sigmoid(z)) = 0.025,
# 1 - tanh(z)**2 = 0.1.
_SIGMOID, _TANH = 3.6369, 1.8184
# Of the names of what is seen, in the collections of modules.
PREFIX = "seen_"


_numbers = itertools.count()


class Mode(NamedTuple):
    """How layers are observed. `train`: by which moments they normalize meanwhile.

    `sampled`: whether to look at single entries of y, too, and, what takes longer, at
    `percentiles`. `marked`: whether to mark y for those who trace its way. `blind`: whether
    to look at nothing, where only the model's output is wanted. `cov`: whether to look at
    covariances, of layers that whiten.
    """

    train: bool
    sampled: bool = False
    percentiles: bool = True
    marked: bool = False
    blind: bool = False
    cov: bool = False


class Seen(NamedTuple):
    """What a layer saw, per channel; merged where it was called several times.

    The moments of its input; entries that were not finite; calls, and a number that grows
    from one layer of a program to the next; the layer's numbers; of a sample of y the share of
    entries beyond the limits of the sigmoid, of tanh and of relu, and the 15th, 50th and 85th
    percentile. All floating, of shape [C]; but `cov`, if it is looked at, of a channel with
    the g channels of its group, [C, g].
    """

    shift: jax.Array
    offset: jax.Array
    var: jax.Array
    entries: jax.Array
    bad: jax.Array
    calls: jax.Array
    order: jax.Array
    epsilon: jax.Array
    weight: jax.Array
    scale: jax.Array
    sigmoid: jax.Array
    tanh: jax.Array
    relu: jax.Array
    low: jax.Array
    median: jax.Array
    high: jax.Array
    cov: jax.Array | None = None

    def moments(self) -> BatchMoments:
        return BatchMoments(*self[:4])

    @classmethod
    def names(cls, with_cov: bool) -> tuple[str, ...]:
        """Of the fields that are there."""
        return cls._fields if with_cov else cls._fields[:-1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "seen"),
    meta_fields=("mode", "path"),
)
class Observed:
    """A state, what its layer has seen, how to call it, and the name of the layer."""

    def __init__(self, state: Any, seen: Seen, mode: Mode, path: str = "") -> None:
        self.state, self.seen, self.mode, self.path = state, seen, mode, path

    # For models that read their state.
    mean = property(lambda self: self.state.mean)
    var = property(lambda self: self.state.var)
    count = property(lambda self: self.state.count)


def nothing(mean: jax.Array, cov: jax.Array | None = None) -> Seen:
    """Before the first call of a layer; of one that whitens, where its covariances are given."""
    # Counts and sums, which narrow statistics cannot hold.
    zeros = jnp.zeros_like(mean, _checks.compute_dtype(jnp.result_type(mean)))
    found = Seen(*[zeros] * len(Seen.names(with_cov=False)))
    if cov is None:
        return found
    return found._replace(cov=jnp.zeros((*zeros.shape, cov.shape[-1]), zeros.dtype))


def room(state: Any, mode: Mode) -> Seen:
    """For what is seen of a layer of this state."""
    return nothing(state.mean, getattr(state, "cov", None) if mode.cov else None)


def observe(
    function: Callable[..., Any],
    params: BNParams,
    observed: Observed,
    x: jax.Array,
    options: dict[str, Any],
) -> tuple[jax.Array, Observed]:
    """A call of a norm's function, with all options of `bn_apply`, in the mode of `observed`."""
    state, mode = observed.state, observed.mode
    options = options | _mapped(options["axis_name"], options["axis_index_groups"])
    y, _ = function(params, state, x, mode.train, **options)
    if mode.blind:
        return y, observed
    call = _layer.prepare(params, BNState(*state[:3]), x, True, **options)
    r = call.static.plan.reduction
    inputs = _normalize.placed(call.inputs, r.axes)
    batch = batch_moments(r, inputs.x, inputs.mask, inputs.mean)
    number = next(_numbers)
    seen = _looked_at(call, inputs, batch, y, mode, number)
    if observed.seen.cov is not None:
        seen = seen._replace(cov=_cov(call, batch, state.cov.shape))
    if mode.marked:
        y = flow.mark(y, number, "out")
    before = _placement.as_features(observed.seen, inputs.x, r.axes)
    return y, Observed(
        state, _carried(_added(before, batch, seen), observed.seen), mode, observed.path
    )


def observing(norm: Norm, mode: Mode) -> Norm:
    """The norm for modules: its state has what is seen beside the norm's own fields."""
    given: Any = norm.state
    with_cov = mode.cov and "cov" in given._fields
    kind, own = _flat(given, with_cov), len(given._fields)

    def flat(state: Any, seen: Seen) -> Any:
        return kind(*state, *seen[: len(Seen.names(with_cov))])

    def init(features: Any, **options: Any) -> tuple[BNParams, Any]:
        params, state = norm.init(features, **options)
        return params, flat(state, room(state, mode))

    def apply(
        params: BNParams, state: Any, x: jax.Array, train: Any, **options: Any
    ) -> tuple[jax.Array, Any]:
        observed = Observed(norm.state(*state[:own]), Seen(*state[own:]), mode)
        y, observed = norm.apply(params, observed, x, mode.train, **options)
        if not isinstance(observed, Observed):
            raise TypeError(
                "a norm whose layers are observed must come from bnjax (batch_norm, ghost, ...), "
                f"which notes what it sees in the state, got one that returned {type(observed)}. "
                "Fix: a function that calls bn_apply with the state it is given."
            )
        return y, flat(observed.state, observed.seen)

    return Norm(init, apply, norm.needs_count, kind, always_updates=True)


@functools.cache
def _flat(state: Any, with_cov: bool) -> Any:
    fields = [*state._fields, *(PREFIX + name for name in Seen.names(with_cov))]
    return namedtuple(f"Observed{state.__name__}", fields)  # made at run time


def _mapped(axis_name: Any, groups: Any) -> dict[str, Any]:
    """Synchronization, where the axes are mapped; elsewhere the batch is the whole."""
    try:
        if axis_name is not None:
            lax.axis_size(axis_name)
    except NameError:
        return {"axis_name": None, "axis_index_groups": None}
    return {"axis_name": axis_name, "axis_index_groups": groups}


def _carried(new: Seen, old: Seen) -> Seen:
    """With the dtypes and places of the old one, as `scan` demands."""
    new = jax.tree.map(lambda v, o: v.astype(o.dtype), new, old)
    return _placement.as_given(new, old)


def _added(old: Seen, batch: BatchMoments, new: Seen) -> Seen:
    """Moments, counts and shares of all calls; the rest of the last one."""
    whole = _merge.with_batch(old.moments(), batch)
    calls = old.calls + 1
    new = new._replace(bad=old.bad + new.bad)
    if old.cov is not None and new.cov is not None:
        cov = _covariance.with_batch(old.moments(), old.cov, batch, new.cov)
        new = new._replace(cov=cov)
    for name in ("sigmoid", "tanh", "relu"):
        before, now = getattr(old, name), getattr(new, name)
        new = new._replace(**{name: before + (now - before) / calls})
    return new._replace(**dict(zip(Seen._fields[:4], whole, strict=True)), calls=calls)


def _looked_at(
    call: _layer.Call,
    inputs: _normalize.Inputs,
    batch: BatchMoments,
    y: jax.Array,
    mode: Mode,
    number: int,
) -> Seen:
    """What one call shows beside the moments; those fields are left at 0."""
    r = call.static.plan.reduction
    like = batch.var
    spread = functools.partial(_placement.broadcast, like=like)
    weight = call.static.weight if call.weight is None else call.weight
    found = {
        "bad": _bad(r, inputs).astype(like.dtype),
        "order": spread(jnp.asarray(number, like.dtype)),
        "epsilon": spread(inputs.epsilon.astype(like.dtype)),
        "weight": spread(jnp.asarray(weight, like.dtype)),
        "scale": spread(jnp.ones((), like.dtype) if inputs.scale is None else inputs.scale),
    }
    if mode.sampled and r.axes:
        found |= _sampled(r, y, inputs.mask, mode.percentiles)
    return nothing(like)._replace(**found)


def _cov(call: _layer.Call, batch: BatchMoments, shape: tuple[int, ...]) -> jax.Array:
    """Covariances of a channel with those of its group, of one call."""
    r, inputs = call.static.plan.reduction, call.inputs
    groups = _covariance.groups(inputs.x.ndim, r.axes, shape)
    x = groups.cut(inputs.x)
    mask = groups.cut_mask(inputs.mask, inputs.x)
    r = r._replace(axes=groups.reduced(inputs.x.ndim))
    near = _placement.as_features(groups.vectors().cut(batch.shift), x, r.axes)
    found = _covariance.covariances(r, x, _placement.as_entries(mask, x), near)
    return found.cov.reshape(*batch.var.shape, shape[-1])


def _bad(r: Reduction, inputs: _normalize.Inputs) -> jax.Array:
    """Entries that count and are not finite, over all devices."""
    wrong = ~jnp.isfinite(inputs.x)
    if inputs.mask is not None:
        wrong = wrong & inputs.mask
    return _reduce.psum(r, [wrong.sum(r.axes, dtype=jnp.float32)])[0]


def _sampled(
    r: Reduction, y: jax.Array, mask: jax.Array | None, percentiles: bool
) -> dict[str, jax.Array]:
    """Shares and percentiles of entries of y, the mean over devices."""
    step = max(1, -(-math.prod(y.shape[a] for a in r.axes) // _SAMPLE))
    part = jnp.moveaxis(_thinned(y, r.axes, step), r.axes, range(len(r.axes)))
    some = jnp.isfinite(part)
    if mask is not None:
        kept = _thinned(jnp.broadcast_to(mask, y.shape), r.axes, step)
        some = some & jnp.moveaxis(kept, r.axes, range(len(r.axes)))
    flat = (-1, *part.shape[len(r.axes) :])
    part, some = _reduce.promoted(part.reshape(flat)), some.reshape(flat)
    n = some.sum(0, dtype=part.dtype)

    def share(condition: jax.Array) -> jax.Array:
        return (condition & some).sum(0, dtype=part.dtype) / jnp.maximum(n, 1)

    size = jnp.abs(part)
    found = {
        "sigmoid": share(size > _SIGMOID),
        "tanh": share(size > _TANH),
        "relu": share(part <= 0),
    }
    if percentiles:
        found |= zip(("low", "median", "high"), _percentiles(part, some, n), strict=True)
    total = _reduce.psum(r, [n, *(n * v for v in found.values())])
    return {name: v / jnp.maximum(total[0], 1) for name, v in zip(found, total[1:], strict=True)}


def _thinned(y: jax.Array, axes: tuple[int, ...], step: int) -> jax.Array:
    """About every `step`-th entry of a channel: along the longest axes first."""
    for axis in sorted(axes, key=lambda a: -y.shape[a]):
        own = max(1, min(step, y.shape[axis]))
        y = lax.slice_in_dim(y, 0, None, own, axis)
        step = -(-step // own)
    return y


def _percentiles(part: jax.Array, some: jax.Array, n: jax.Array) -> list[jax.Array]:
    """Of the entries of each channel that count, linearly interpolated; 0 where there is none."""
    ordered = jnp.sort(jnp.where(some, part, jnp.finfo(part.dtype).max), 0)
    found = []
    for q in _QUANTILES:
        place = q * jnp.maximum(n - 1, 0)
        below = jnp.floor(place)
        low, high = (
            jnp.take_along_axis(ordered, v.astype(jnp.int32)[None], 0)[0]
            for v in (below, jnp.minimum(below + 1, jnp.maximum(n - 1, 0)))
        )
        found.append(jnp.where(n > 0, low + (place - below) * (high - low), 0))
    return found

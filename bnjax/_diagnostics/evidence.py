"""What batches show: each layer's moments in them, in training and in evaluation."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax._models import common
from bnjax._models.common import Layer, Program, Subject
from bnjax._observe import Mode, Seen

Loss = Callable[[Any, Any], jax.Array]
_SEED = 0
# Logarithm of how many times the variance of a typical batch makes an outlier.
_OUTLIER = np.log(5)


class Batches(NamedTuple):
    """Of one layer, over batches in training mode; arrays [channels], float64.

    mean, var: averages of the batches' means and (biased) variances, which a running
    average tends to. between: variance of the batches' means. entries: of a channel in a
    batch, the median. shuffled: `between` after a shuffle of the examples, None where they
    could not be shuffled.
    """

    mean: np.ndarray
    var: np.ndarray
    between: np.ndarray
    spread: np.ndarray
    entries: float
    number: int
    outliers: int
    shuffled: np.ndarray | None

    def pooled(self) -> np.ndarray:
        """The variance of the data."""
        return self.var + self.between * (self.number - 1) / self.number


class Sides(NamedTuple):
    """A batch in training mode and in evaluation."""

    seen: Mapping[str, Seen]  # NumPy, float64
    overall: dict[str, float]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _both(
    program: Program, loss: Loss | None, variables: Any, batch: Any, labels: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    outputs, seen = {}, {}
    modes = {"training": Mode(True, sampled=True, percentiles=False), "evaluation": Mode(False)}
    for name, mode in modes.items():
        outputs[name], seen[name] = common.observed(program, mode, variables, batch)
    overall = {"output_difference": _difference(outputs["training"], outputs["evaluation"])}
    for name, output in outputs.items():
        if labels is not None:
            overall |= {f"{k}_{name}": v for k, v in _scores(output, labels, loss).items()}
    return _stacked(seen["training"]), overall


@functools.partial(jax.jit, static_argnums=0)
def _training(program: Program, variables: Any, batch: Any) -> dict[str, jax.Array]:
    return _stacked(common.observed(program, Mode(True), variables, batch)[1])


def _stacked(seen: dict[str, Seen]) -> dict[str, jax.Array]:
    """One array a layer, as each that comes from the device takes its time."""
    return {path: jnp.stack(s) for path, s in seen.items()}


def sides(subject: Subject, batch: Any, labels: Any = None, loss: Loss | None = None) -> Sides:
    """Both modes side by side, in one program."""
    seen, overall = _both(subject.program, loss, subject.variables, batch, labels)
    seen, overall = jax.device_get((seen, overall))
    return Sides(
        {path: _wide(s) for path, s in seen.items()}, {k: float(v) for k, v in overall.items()}
    )


def batches(subject: Subject, given: list[Any]) -> dict[str, Batches]:
    """What each layer sees in batches as training has them, and in shuffled ones."""
    found = _moments(subject, given)
    usual = np.logical_and.reduce([_usual(variances) for _, variances, _ in found.values()])
    # They would leave their mark on all batches.
    mixed = _shuffled([b for b, fits in zip(given, usual, strict=True) if fits])
    other = None if mixed is None else _moments(subject, mixed)
    result = {}
    for path, (means, variances, entries) in found.items():
        logs = np.log(variances[usual] + np.finfo(np.float32).tiny)
        result[path] = Batches(
            means[usual].mean(0),
            variances[usual].mean(0),
            means[usual].var(0, ddof=1),
            logs.var(0, ddof=1),
            float(np.median(entries)),
            int(usual.sum()),
            int((~usual).sum()),
            None if other is None else other[path][0].var(0, ddof=1),
        )
    return result


def _usual(variances: np.ndarray) -> np.ndarray:
    """Which batches do not have several times the variance of a typical one; at least two."""
    tiny = np.finfo(np.float32).tiny
    typical = np.nanmedian(variances, 0) + tiny
    level = np.median(np.log((variances + tiny) / typical), 1)
    usual = level < _OUTLIER  # not where it is NaN
    return usual if usual.sum() > 1 else np.ones_like(usual)


def _moments(subject: Subject, given: Iterable[Any]) -> dict[str, tuple[np.ndarray, ...]]:
    """Means, variances and entries, [batches, channels]."""
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for batch in given:
        found = jax.device_get(_training(subject.program, subject.variables, batch))
        for path, seen in found.items():
            s = _wide(seen)
            rows.setdefault(path, []).append((s.shift + s.offset, s.var, s.entries))
    return {path: tuple(np.stack(v) for v in zip(*own, strict=True)) for path, own in rows.items()}


def _shuffled(given: list[Any]) -> list[Any] | None:
    """Batches of the same sizes from the same examples, in random order."""
    structures = {jax.tree.structure(batch) for batch in given}
    columns = list(zip(*map(jax.tree.leaves, given), strict=True)) if len(structures) == 1 else []
    sizes = [np.shape(leaf)[:1] for leaf in (columns[0] if columns else ())]
    if not sizes or any(
        np.shape(v)[:1] != n for c in columns for v, n in zip(c, sizes, strict=True)
    ):
        return None
    ends = np.cumsum([n for (n,) in sizes])
    order = np.random.default_rng(_SEED).permutation(ends[-1])
    split = [
        np.split(np.concatenate([np.asarray(v) for v in column])[order], ends[:-1])
        for column in columns
    ]
    structure = structures.pop()
    return [jax.tree.unflatten(structure, leaves) for leaves in zip(*split, strict=True)]


def _wide(stacked: Any) -> Seen:
    return Seen(*np.asarray(stacked, np.float64))  # type: ignore[arg-type]


def _difference(one: Any, other: Any) -> jax.Array:
    """Root mean square of the difference of outputs, beside that of their deviations."""
    pairs = [
        (a.astype(jnp.float32), b.astype(jnp.float32))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    apart = sum(jnp.square(a - b).sum() for a, b in pairs)
    size = sum(jnp.square(v - v.mean(0)).sum() / 2 for pair in pairs for v in pair)
    return jnp.sqrt(apart / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))


def _scores(output: Any, labels: Any, loss: Loss | None) -> dict[str, jax.Array]:
    """The loss; and for classes their mean cross-entropy and the share that is right."""
    if loss is not None:
        return {"loss": loss(output, labels)}
    import optax

    losses = optax.softmax_cross_entropy_with_integer_labels(output.astype(jnp.float32), labels)
    right = (output.argmax(-1) == labels).mean(dtype=jnp.float32)
    return {"loss": losses.mean(), "accuracy": right}


def statistics(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Running statistics as NumPy arrays, float64."""
    wide: dict[str, Any] = jax.device_get(dict(layers))
    return {
        path: Layer(
            np.asarray(layer.mean, np.float64),  # type: ignore[arg-type]
            np.asarray(layer.var, np.float64),  # type: ignore[arg-type]
            layer.count,
        )
        for path, layer in wide.items()
    }

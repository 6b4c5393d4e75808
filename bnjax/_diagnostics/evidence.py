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
# Logarithm of how many times the variance of a typical batch makes an outlier, and the
# largest share of them: more than that are a part of the data.
_OUTLIER, _FEW = np.log(5), 0.25
_TINY = np.finfo(np.float32).tiny


class Batches(NamedTuple):
    """Of one layer, over batches in training mode; arrays [channels], float64.

    mean, var: averages of the batches' means and (biased) variances, which a running
    average tends to. between: variance of the batches' means. spread: of the logarithms of
    their variances. entries: of a channel in a batch, the median. number: of batches.
    shuffled: `between` after a shuffle of the examples, None where they could not be shuffled.
    """

    mean: np.ndarray
    var: np.ndarray
    between: np.ndarray
    spread: np.ndarray
    entries: float
    number: int
    shuffled: np.ndarray | None

    def pooled(self) -> np.ndarray:
        """The variance of the data."""
        return self.var + self.between * (self.number - 1) / self.number


class Sides(NamedTuple):
    """A batch in training mode and in evaluation; `seen`: of the layers that were called."""

    seen: Mapping[str, Seen]  # NumPy, float64
    overall: dict[str, float]


@functools.lru_cache(common.PROGRAMS)
def _both(program: Program, loss: Loss | None) -> Callable[..., Any]:
    """(variables, batch, labels) -> what layers saw in training mode, overall numbers; compiled."""
    return jax.jit(functools.partial(_both_modes, program, loss))


def _both_modes(
    program: Program, loss: Loss | None, variables: Any, batch: Any, labels: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    outputs, seen = {}, {}
    modes = {
        "training": Mode(True, sampled=True, percentiles=False),
        "evaluation": Mode(False, blind=True),
    }
    for name, mode in modes.items():
        outputs[name], seen[name] = common.observed(program, mode, variables, batch)
    overall = {"output_difference": _difference(outputs["training"], outputs["evaluation"])}
    for name, output in outputs.items():
        if labels is not None:
            scores = _scores(output, labels, loss)
            if "outside" in scores:
                overall["outside"] = scores.pop("outside")
            overall |= {f"{k}_{name}": v for k, v in scores.items()}
    return _stacked(seen["training"]), overall


@functools.lru_cache(common.PROGRAMS)
def _training(program: Program) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """(variables, batch) -> what layers saw in training mode, compiled."""

    def run(variables: Any, batch: Any) -> dict[str, jax.Array]:
        return _stacked(common.observed(program, Mode(True), variables, batch)[1])

    return jax.jit(run)


def _stacked(seen: dict[str, Seen]) -> dict[str, jax.Array]:
    """One array a layer, as each that comes from the device takes its time."""
    return {path: jnp.stack(s[:-1]) for path, s in seen.items()}


def sides(subject: Subject, batch: Any, labels: Any = None, loss: Loss | None = None) -> Sides:
    """Both modes side by side, in one program."""
    both = jax.device_get(_both(subject.program, loss)(subject.variables, batch, labels))
    seen = _called(both[0])
    common.require_layers(seen, "that was called", "Fix: a `call` that reaches them.")
    overall = {name: float(v) for name, v in both[1].items()}
    if overall.pop("outside", 0):
        raise ValueError(
            "`labels` must be in [0, classes) of the model's output, got others. Fix: "
            "report(..., loss=...) for labels of another meaning."
        )
    return Sides(seen, overall)


class _Row(NamedTuple):
    """What one batch shows of a layer."""

    mean: np.ndarray
    var: np.ndarray
    entries: np.ndarray
    bad: np.ndarray
    epsilon: np.ndarray


def batches(subject: Subject, given: list[Any]) -> tuple[dict[str, Batches], int]:
    """What each layer sees in batches as training has them, and in shuffled ones.

    And how many batches have entries that are not finite, which are left out; without two
    others nothing is known.
    """
    found = _rows(subject, given)
    finite = ~np.logical_or.reduce([rows.bad.any(1) for rows in found.values()])
    bad = int((~finite).sum())
    if finite.sum() < 2:
        return {}, bad
    usual = finite & np.logical_and.reduce([_usual(rows, finite) for rows in found.values()])
    usual = usual if usual.sum() > 1 else finite
    # Corrupt ones would leave their mark on all batches.
    mixed = _shuffled([b for b, fits in zip(given, usual, strict=True) if fits])
    other = None if mixed is None else _rows(subject, mixed)
    return {
        path: _over(rows, usual, None if other is None else other[path])
        for path, rows in found.items()
    }, bad


def _over(rows: _Row, usual: np.ndarray, mixed: _Row | None) -> Batches:
    means, variances = rows.mean[usual], rows.var[usual]
    return Batches(
        mean=means.mean(0),
        var=variances.mean(0),
        between=means.var(0, ddof=1),
        spread=np.log(variances + rows.epsilon[usual]).var(0, ddof=1),
        entries=float(np.median(rows.entries)),
        number=int(usual.sum()),
        shuffled=None if mixed is None else mixed.mean.var(0, ddof=1),
    )


def _usual(rows: _Row, finite: np.ndarray) -> np.ndarray:
    """Which batches have moments, and not several times the variance of a typical one."""
    known = np.median(rows.entries, 1) > 1
    if not (finite & known).any():
        return finite
    typical = np.median(rows.var[finite & known], 0)
    with np.errstate(invalid="ignore"):
        level = np.median(np.log((rows.var + _TINY) / (typical + _TINY)), 1)
    outlier = known & (level >= _OUTLIER)
    return known & ~outlier if outlier[finite].mean() <= _FEW else known


def _rows(subject: Subject, given: Iterable[Any]) -> dict[str, _Row]:
    """What each layer sees in batches, [batches, channels]."""
    rows: dict[str, list[_Row]] = {}
    for batch in given:
        found = jax.device_get(_training(subject.program)(subject.variables, batch))
        for path, s in _called(found).items():
            row = _Row(*map(np.asarray, (s.shift + s.offset, s.var, s.entries, s.bad, s.epsilon)))
            rows.setdefault(path, []).append(row)
    return {path: _Row(*map(np.stack, zip(*own, strict=True))) for path, own in rows.items()}


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


def _called(stacked: Mapping[str, Any]) -> dict[str, Seen]:
    """In float64, of the layers that were called; stacked layers and feature axes in a row."""
    wide = {path: np.asarray(s, np.float64) for path, s in stacked.items()}
    seen = {path: Seen(*s.reshape(len(s), -1)) for path, s in wide.items()}  # type: ignore[arg-type]
    return {path: s for path, s in seen.items() if np.all(s.calls > 0)}


def _difference(one: Any, other: Any) -> jax.Array:
    """Root mean square of the difference of outputs, beside that of their deviations."""
    pairs = [
        (a.astype(jnp.float32), b.astype(jnp.float32))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    apart = sum((jnp.square(a - b).sum() for a, b in pairs), jnp.zeros(()))
    size = sum(jnp.square(_centred(v)).sum() / 2 for pair in pairs for v in pair)
    return jnp.where(
        apart == 0, 0, jnp.sqrt(apart / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
    )


def _centred(v: jax.Array) -> jax.Array:
    """Less the mean of the examples, where there are several."""
    return v - v.mean(0, keepdims=True) if v.ndim and v.shape[0] > 1 else v


def _scores(output: Any, labels: Any, loss: Loss | None) -> dict[str, jax.Array]:
    """The loss; and for classes their mean cross-entropy and the share that is right."""
    if loss is not None:
        value = jnp.asarray(loss(output, labels))
        if value.size != 1:
            raise ValueError(
                f"`loss` must return a scalar, got shape {value.shape}. Fix: its mean."
            )
        return {"loss": value.reshape(())}
    shape, labels = getattr(output, "shape", None), jnp.asarray(labels)
    if not shape or labels.shape != shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            "`labels` must be integers, one for each row of the model's output of shape "
            f"{shape}, got {labels.dtype} of shape {labels.shape}. Fix: labels of `batch` as class "
            "numbers, or report(..., loss=...) for others."
        )
    logs = jax.nn.log_softmax(output.astype(jnp.float32))
    inside = (labels >= 0) & (labels < shape[-1])
    at = jnp.where(inside, labels, 0)[..., None]
    return {
        "loss": -jnp.take_along_axis(logs, at, -1).mean(),
        "accuracy": (output.argmax(-1) == labels).mean(dtype=jnp.float32),
        "outside": (~inside).any(),
    }


def statistics(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Running statistics as NumPy arrays, float64; stacked layers and feature axes in a row."""
    given: dict[str, Any] = jax.device_get(dict(layers))
    return {
        path: Layer(
            np.ravel(layer.mean).astype(np.float64),  # type: ignore[arg-type]
            np.ravel(layer.var).astype(np.float64),  # type: ignore[arg-type]
            layer.count if layer.count is None else np.ravel(layer.count),  # type: ignore[arg-type]
        )
        for path, layer in given.items()
    }

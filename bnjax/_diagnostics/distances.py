"""How far apart moments are: running ones, of training batches, of the evaluated batch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bnjax._diagnostics.evidence import Batches
from bnjax._diagnostics.records import DEAD_VARIANCE, Record
from bnjax._models.common import Layer

Moments = Mapping[str, tuple[np.ndarray, np.ndarray]]
# A variance of noise, in squared deviations, from which it hides all else.
_NOISE = 1.0
# Share of the channels whose variances are compared, those that agree best. In others few
# examples may make most of the variance, as of units that are seldom on and of pixels near
# the border, so that it scatters more than batches show.
_TYPICAL = 0.8


class Case(NamedTuple):
    """All that is known.

    on_training_batches: the difference of outputs there, or None. bad_batches: how many of
    them, of how many, have entries that are not finite.
    """

    kind: str
    called: bool  # with a `call`
    records: tuple[Record, ...]
    seen: Mapping[str, Any]  # Seen, and Layer, of NumPy arrays
    layers: Mapping[str, Any]
    batches: Mapping[str, Batches]
    bad_batches: tuple[int, int]
    on_training_batches: float | None
    steps: int | None


def running(case: Case, path: str) -> float:
    """Running statistics against what training batches would make of them."""
    b, weight = case.batches[path], case.seen[path].weight
    # A moving average has the noise of so many batches, and so has the average of the given.
    noise = (1 - weight) / (1 + weight) + 1 / b.number
    log_noise = _of_varying(case, path, b.var, b.spread * noise)
    # Those of a moving average, or of `recalibrate`.
    return min(
        _apart(case, path, Side(b.mean, var, b.between * noise, log_noise), case.layers[path])
        for var in (b.var, b.pooled())
    )


def shift(case: Case, path: str) -> float:
    """The evaluated batch against all training batches."""
    b, s = case.batches[path], case.seen[path]
    between = b.between if b.shuffled is None else b.shuffled
    noise = 1 / b.number + b.entries / np.maximum(s.entries, 1)
    given = Side(b.mean, b.pooled(), between * noise, b.spread * noise)
    return _apart(case, path, given, Layer(s.shift + s.offset, s.var, None))


def beside(case: Case, path: str) -> float:
    """Running statistics against the one batch."""
    s, running = case.seen[path], case.layers[path]
    # Of one entry nothing is known.
    few = np.where(s.entries > 1, 1 / np.maximum(s.entries, 1), np.inf)
    log_noise = _of_varying(case, path, s.var, 2 * few)
    wide = np.maximum(s.var, running.var)
    given = Side(s.shift + s.offset, s.var, wide * few, log_noise)
    return _apart(case, path, given, running)


def _of_varying(case: Case, path: str, var: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Infinite where the data do not vary: any variance makes the same of them."""
    return np.where(var < DEAD_VARIANCE * case.seen[path].epsilon, np.inf, noise)


class Side(NamedTuple):
    """Moments, [channels], and the variances of mean and of log(var) by sampling."""

    mean: np.ndarray
    var: np.ndarray
    mean_noise: np.ndarray
    log_noise: np.ndarray


def _apart(case: Case, path: str, one: Side, other: Layer) -> float:
    """Root mean square of gaps of means, and of half the logarithms of ratios of variances.

    In the wider of both deviations, as a channel that hardly varies weighs little in the
    other one. Less twice what noise explains; a channel that is mostly noise tells nothing,
    while it would outweigh the others.
    """
    epsilon = case.seen[path].epsilon
    with np.errstate(all="ignore"):
        wide = np.maximum(one.var, other.var) + epsilon
        means = (other.mean - one.mean) ** 2 / wide
        logs = np.log((other.var + epsilon) / (one.var + epsilon)) ** 2
        means = _beyond(means, one.mean_noise / wide)
        logs = _beyond(logs, one.log_noise)
    typical = np.sort(logs)[: int(np.ceil(_TYPICAL * logs.size))]
    return float(np.sqrt(np.maximum(means.mean(), 0) + np.maximum(typical.mean(), 0) / 4))


def _beyond(squares: np.ndarray, noise: np.ndarray) -> np.ndarray:
    known = ~(noise >= _NOISE)
    return np.where(known, squares - 2 * np.where(known, noise, 0), 0)


def initial_weight(case: Case, reference: Moments) -> tuple[float, float]:
    """w of running = (1 - w) * data + w * initial, least squares; and the share left over."""
    product = square = left = whole = 0.0
    pairs = []
    for path, (mean, var) in reference.items():
        running = case.layers[path]
        epsilon = case.seen[path].epsilon
        # Of the wider one, so that a channel that does not vary is no more than another.
        wide = np.maximum(var + epsilon, running.var)
        by_mean, by_var = 1 / wide, 1 / wide**2
        pairs.append((by_mean, mean, running.mean))
        pairs.append((by_var, var - 1, running.var - 1))
    for weights, data, found in pairs:
        product += float((weights * data * found).sum())
        square += float((weights * data**2).sum())
    share = product / square if square else 1.0
    for weights, data, found in pairs:
        left += float((weights * (found - share * data) ** 2).sum())
        whole += float((weights * (found - data) ** 2).sum())
    return 1 - share, left / whole if whole else 1.0


def first(case: Case) -> str:
    """The layer whose input depends on no other."""
    return next(r.layer for r in case.records)

"""How far apart moments are: running ones, of training batches, of the evaluated batch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bnjax._diagnostics.evidence import Batches
from bnjax._diagnostics.records import Record

Moments = Mapping[str, tuple[np.ndarray, np.ndarray]]


class Case(NamedTuple):
    """All that is known. `on_training_batches`: the difference of outputs there, or None."""

    kind: str
    records: tuple[Record, ...]
    seen: Mapping[str, Any]  # Seen, and Layer, of NumPy arrays
    layers: Mapping[str, Any]
    batches: Mapping[str, Batches]
    on_training_batches: float | None
    steps: int | None


def running(case: Case, path: str) -> float:
    """Running statistics against what training batches would make of them."""
    b, momentum = case.batches[path], case.seen[path].weight
    # A moving average has the noise of so many batches, and so has the average of the given.
    noise = (1 - momentum) / (1 + momentum) + 1 / b.number
    var = b.var + case.seen[path].epsilon
    return _apart(case, path, b.mean, b.var, b.between / var * noise, b.spread * noise)


def shift(case: Case, path: str) -> float:
    """The evaluated batch against all training batches."""
    b, s = case.batches[path], case.seen[path]
    between = b.between if b.shuffled is None else b.shuffled
    noise = 1 / b.number + b.entries / np.maximum(s.entries, 1)
    pooled, epsilon = b.pooled(), s.epsilon
    return _rms(
        (s.shift + s.offset - b.mean) ** 2 / (pooled + epsilon) - 2 * between / pooled * noise,
        np.log((s.var + epsilon) / (pooled + epsilon)) ** 2 - 2 * b.spread * noise,
    )


def beside(case: Case, path: str) -> float:
    """Running statistics against the one batch."""
    s = case.seen[path]
    mean, var, few = s.shift + s.offset, s.var, 1 / np.maximum(s.entries, 1)
    return _apart(case, path, np.asarray(mean), np.asarray(var), few, 2 * few)


def _apart(
    case: Case,
    path: str,
    mean: np.ndarray,
    var: np.ndarray,
    mean_noise: np.ndarray,
    var_noise: np.ndarray,
) -> float:
    """Running statistics against others, less twice what noise explains."""
    running, epsilon = case.layers[path], case.seen[path].epsilon
    with np.errstate(all="ignore"):
        return _rms(
            (running.mean - mean) ** 2 / (var + epsilon) - 2 * mean_noise,
            np.log((running.var + epsilon) / (var + epsilon)) ** 2 - 2 * var_noise,
        )


def _rms(means: np.ndarray, logs: np.ndarray) -> float:
    """Root mean square of gaps of means, and of half the logarithms of variances."""
    return float(np.sqrt(max(float(np.mean(means)), 0) + max(float(np.mean(logs)), 0) / 4))


def initial_weight(case: Case, reference: Moments) -> tuple[float, float]:
    """w of running = (1 - w) * data + w * initial, least squares; and the share left over."""
    product = square = left = whole = 0.0
    pairs = []
    for path, (mean, var) in reference.items():
        running = case.layers[path]
        epsilon = case.seen[path].epsilon
        by_mean, by_var = 1 / (var + epsilon), 1 / np.maximum(var + epsilon, running.var) ** 2
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

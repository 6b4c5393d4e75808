"""Why the statistics of training and of evaluation differ."""

from collections.abc import Iterator

import numpy as np

from bnjax._diagnostics import distances
from bnjax._diagnostics.distances import Case, Moments

# Distances between moments below this are what training with momentum leaves behind. In
# deviations, as is half a difference of logarithms of variances.
_APART = 0.2
# The same for data against data, which differ by sampling too.
_SHIFTED = 0.25
# Batches' means that vary so many times as much as those of shuffled batches, at least; and
# in deviations of the logarithm of a ratio of variances, as few batches scatter more.
_UNSHUFFLED, _BY_CHANCE = 3.0, 2.13
# The weight of the initial 0 and 1 that is worth a finding, and how much of the distance
# it may leave unexplained.
_INITIAL, _UNEXPLAINED = 0.03, 0.3
# Running variances this many times the data's, in most channels that vary.
_POISONED, _NIL = 2.0, 1e-12
# Entries of a channel from which the moments of a batch are more noise than signal, where
# the outputs of both modes differ by so much of their deviation.
_SMALL, _DIFFERENT = 8, 0.25

# Cause, sentence, layers.
Found = Iterator[tuple[str, str, tuple[str, ...]]]


def small_batches(case: Case) -> Found:
    """Batches whose moments are noise, in a network that does not do without."""
    layers = tuple(path for path, b in case.batches.items() if b.entries < _SMALL)
    apart = case.on_training_batches
    if layers and apart is not None and apart > _DIFFERENT:
        entries = min(case.batches[path].entries for path in layers)
        yield (
            "small-batches",
            f"A training batch has {entries:.0f} entries per channel in {named(layers)}: its "
            "moments are mostly noise, which training has adapted to and evaluation lacks (on "
            f"training batches the outputs of both modes differ by {apart:.2f} of their "
            "deviation).",
            layers,
        )


def unshuffled(case: Case) -> Found:
    """Batches that differ more than chance would have it."""
    path = distances.first(case)
    b = case.batches.get(path)
    if b is None or b.shuffled is None:
        return
    varied = b.shuffled > 0
    pooled = b.pooled()[varied]
    chance = (b.shuffled[varied] / pooled).sum()
    ratio = float((b.between[varied] / pooled).sum() / chance) if varied.any() else 1.0
    scatter = 2 / np.sqrt(b.number - 1)
    if ratio > max(_UNSHUFFLED, np.exp(_BY_CHANCE * scatter)):
        yield (
            "not-shuffled",
            f"The means of the training batches in {path} vary {ratio:.0f} times as much as those "
            "of the same examples in random order: batches are not shuffled, as when each is of "
            "one class, so that their moments tell what evaluation does not know.",
            (path,),
        )


def other_statistics(case: Case) -> Found:
    """Running statistics that are not the data's, and data that is not training's."""
    if not case.batches:
        yield from _beside_one_batch(case)
        return
    apart = {path: distances.running(case, path) for path in case.batches}
    worst, path = max(apart.values()), distances.first(case)
    shift = distances.shift(case, path)
    found = [(worst, item) for item in _beside_batches(case, apart)]
    if shift > _SHIFTED:
        sentence = (
            f"The evaluated batch is not distributed as the training batches: in {path}, the first "
            f"layer, its moments are {shift:.2f} deviations away from theirs"
            f"{', which the running statistics fit' if worst <= _APART else ''}."
        )
        found.append((shift, ("domain-shift", sentence, (path,))))
    yield from (item for _, item in sorted(found, key=lambda pair: -pair[0]))


def _beside_batches(case: Case, apart: dict[str, float]) -> Found:
    """Running statistics beside those that training batches would make."""
    layers = tuple(path for path, d in apart.items() if not d <= _APART)
    if not layers:
        return
    reference = {path: (b.mean, b.var) for path, b in case.batches.items()}
    special = _lagging(case, reference, layers) or _poisoned(case, reference, layers)
    yield special or (
        "stale",
        f"The running statistics of {named(layers)} are up to {max(apart.values()):.2f} deviations "
        "away from the moments of training batches under the present weights: they belong to "
        "other weights, as after averaging weights, loading them, or training faster than the "
        "average follows.",
        layers,
    )


def _beside_one_batch(case: Case) -> Found:
    """Without training batches the evaluated one stands for them."""
    finite = [r.layer for r in case.records if not r.not_finite]
    apart = {path: distances.beside(case, path) for path in finite}
    layers = tuple(path for path, d in apart.items() if not d <= _SHIFTED)
    if not layers:
        return
    seen = {path: case.seen[path] for path in finite}
    reference = {path: (s.shift + s.offset, s.var) for path, s in seen.items()}
    yield _lagging(case, reference, layers) or (
        "mismatch",
        f"The running statistics of {named(layers)} are up to {max(apart.values()):.2f} "
        "deviations away from the moments of this batch: they belong to other weights or to "
        "other data, or have learned from a corrupt batch. Training batches would tell which.",
        layers,
    )


def _lagging(
    case: Case, reference: Moments, layers: tuple[str, ...]
) -> tuple[str, str, tuple[str, ...]] | None:
    weight, unexplained = distances.initial_weight(case, reference)
    if not (weight > _INITIAL and unexplained < _UNEXPLAINED):
        return None
    momentum = float(np.median([r.momentum for r in case.records]))
    return (
        "lagging",
        f"The running statistics still hold {weight:.0%} of their initial 0 and 1"
        f"{_as_after(weight, momentum)}: the average is too slow for the number of steps.",
        layers,
    )


def _as_after(weight: float, momentum: float) -> str:
    if not (0 < momentum < 1 and 0 < weight < 1):
        return ""
    steps = round(np.log(weight) / np.log(momentum))
    return f", as after {steps} step{'s' * (steps != 1)} with momentum={momentum:g}"


def _poisoned(
    case: Case, reference: Moments, layers: tuple[str, ...]
) -> tuple[str, str, tuple[str, ...]] | None:
    for path in layers:
        var, running = reference[path][1], case.layers[path].var
        # Of what never varies, a corrupt batch may have nothing either.
        ratio = (running / np.maximum(var, _NIL))[(var > _NIL) & np.isfinite(running)]
        if ratio.size and np.quantile(ratio, 0.2) > _POISONED:
            return (
                "poisoned",
                f"The running variance of {path} is {float(np.median(ratio)):.1f} times that of "
                "the data in a typical channel, and larger in nearly all: the average has "
                "learned from a corrupt batch, of values far out of range.",
                layers,
            )
    return None


def named(layers: tuple[str, ...]) -> str:
    """The first of them in words."""
    more = len(layers) - 3
    shown = ", ".join(layers[:3]) or "the model"
    return f"{shown} and {more} more layers" if more > 0 else shown

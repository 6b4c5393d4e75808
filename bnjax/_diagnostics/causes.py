"""From numbers to causes: why evaluation differs from training, and what helps."""

import dataclasses
from collections.abc import Callable

from bnjax._diagnostics import gaps
from bnjax._diagnostics.distances import Case
from bnjax._diagnostics.gaps import Found, named
from bnjax._diagnostics.records import Record
from bnjax._diagnostics.remedies import remedy

# Shares of the channels of a layer, or of its sampled inputs.
_MANY = 0.5
_MISSED = 0.9  # of the steps, updates that must have happened


@dataclasses.dataclass(frozen=True)
class Finding:
    """A likely cause: its key, a sentence, the remedy as code, the layers that show it."""

    cause: str
    sentence: str
    remedy: str
    layers: tuple[str, ...]


def findings(case: Case) -> list[Finding]:
    """What explains a gap between training and evaluation, the likeliest first; then the rest."""
    sources: tuple[Callable[[Case], Found], ...] = (
        _bad_statistics,
        _never_updated,
        _stopped,
        gaps.small_batches,
        gaps.unshuffled,
        gaps.other_statistics,
        _bad_input,
        _collapsed,
        _exploding,
        _saturated,
    )
    found = [item for source in sources for item in source(case)]
    if any(cause in ("poisoned", "never-updated") for cause, *_ in found[:1]):
        # Whatever else the running statistics show follows from that.
        found = [f for i, f in enumerate(found) if i == 0 or f[0] not in _OF_STATISTICS]
    return [
        Finding(cause, sentence, remedy(cause, case.kind, case.called), layers)
        for cause, sentence, layers in found
    ]


_OF_STATISTICS = ("poisoned", "lagging", "stale", "mismatch")


def _bad_statistics(case: Case) -> Found:
    layers = tuple(r.layer for r in case.records if r.bad_statistics)
    if layers:
        worst = max(case.records, key=lambda r: r.bad_statistics)
        yield (
            "poisoned",
            f"The running statistics are not finite in {named(layers)} ({worst.bad_statistics} of "
            f"{worst.channels} channels in {worst.layer}): a batch with NaN or Inf, or one that "
            "overflowed, was learned from.",
            layers,
        )


def _never_updated(case: Case) -> Found:
    layers = tuple(r.layer for r in case.records if r.untrained > _MANY)
    if layers:
        yield (
            "never-updated",
            f"The running statistics of {named(layers)} are still the initial 0 and 1: training "
            "never updated them, or its updates were thrown away.",
            layers,
        )


def _stopped(case: Case) -> Found:
    if case.steps is None:
        return
    few = {r.layer: r.updates for r in case.records if r.updates is not None}
    layers = tuple(path for path, n in few.items() if 0 < n < _MISSED * case.steps)
    if layers:
        yield (
            "updates-stopped",
            f"Of {case.steps} steps only {min(few[path] for path in layers)} updated the running "
            f"statistics of {named(layers)}: the others had batches that are not finite, or of "
            "one entry, or ran in evaluation mode.",
            layers,
        )


def _bad_input(case: Case) -> Found:
    layers = tuple(r.layer for r in case.records if r.not_finite)
    if layers:
        yield (
            "not-finite-input",
            f"Of the entries that enter {layers[0]}, "
            f"{next(r.not_finite for r in case.records if r.not_finite)} are not finite.",
            layers,
        )
    bad, number = case.bad_batches
    if bad:
        yield (
            "not-finite-input",
            f"Of {number} training batches {bad} have entries that are not finite.",
            (),
        )


def _collapsed(case: Case) -> Found:
    layers = tuple(r.layer for r in case.records if r.dead > _MANY * r.channels)
    if layers:
        yield (
            "dead-channels",
            f"More than half of the channels of {named(layers)} are dead: their scale is near 0, "
            "or their variance is far below epsilon.",
            layers,
        )


def _exploding(case: Case) -> Found:
    layers = tuple(r.layer for r in case.records if r.exploding and not r.bad_statistics)
    if layers:
        yield (
            "exploding-channels",
            f"Some channels of {named(layers)} deviate thousands of times as much as the others.",
            layers,
        )


def _saturated(case: Case) -> Found:
    def share(r: Record) -> float:
        if r.saturated is None:
            return 0.0
        # Half of the inputs of relu are negative; a unit is lost where all are.
        of_channels = r.per_channel["saturated"] >= 1
        return float(of_channels.mean()) if r.activation == "relu" else r.saturated

    found = {r.layer: r for r in case.records if share(r) > _MANY}
    for activation in sorted({r.activation for r in found.values()}):
        layers = tuple(path for path, r in found.items() if r.activation == activation)
        worst = max(share(found[path]) for path in layers)
        what = "channels are never positive" if activation == "relu" else "inputs are saturated"
        yield (
            "saturated",
            f"{worst:.0%} of the {what} before {activation} after {named(layers)}.",
            layers,
        )

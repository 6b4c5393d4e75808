"""The report: training and evaluation side by side, what each layer shows, and why."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from bnjax import _checks
from bnjax._diagnostics import activations, causes, evidence, records, tables
from bnjax._diagnostics.causes import Finding
from bnjax._diagnostics.distances import Case
from bnjax._diagnostics.records import Record
from bnjax._models import common, kinds
from bnjax._models.common import Subject

# Training batches whose outputs in both modes are compared.
_COMPARED = 4


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` found.

    records: one for each layer that was called, in the order of calls. findings: likely causes of
    a gap between training and evaluation first, the likeliest one first; none for a
    healthy network. overall: of the model, "output_difference" (root mean square of the
    difference of its outputs in both modes, beside their deviation), and with labels
    "loss_training", "loss_evaluation", "accuracy_training", "accuracy_evaluation".
    """

    records: tuple[Record, ...]
    findings: tuple[Finding, ...]
    overall: Mapping[str, float]

    def rows(self) -> list[dict[str, Any]]:
        """The records as dictionaries of numbers, for a table."""
        return [record.row() for record in self.records]

    def __rich__(self) -> Any:
        """For `rich.print`: findings, overall numbers, and the table of layers."""
        return tables.shown(self.findings, self.overall, self.records)

    def __str__(self) -> str:
        """The findings, in words."""
        if not self.findings:
            return "No finding."
        return "\n".join(
            f"{f.cause}: {f.sentence}\n{textwrap.indent(f.remedy, '    ')}" for f in self.findings
        )


def report(
    model: Any,
    variables: Any,
    batch: Any,
    *,
    train_batches: Iterable[Any] | None = None,
    labels: Any = None,
    loss: Callable[[Any, Any], jax.Array] | None = None,
    steps: int | None = None,
    call: Callable[[Any, Any], Any] | None = None,
) -> Report:
    """Training and evaluation mode side by side: what differs, in which layer, and why.

    Per layer, of a batch with moments m, v against running ones m', v':
    mean_gap = |m - m'| / sqrt(v' + epsilon),
    log_var_ratio = log((v + epsilon) / (v' + epsilon)), Hellinger's distance of the normal
    distributions, the difference of y, and more: see `Record`. Causes that are told apart:
    poisoned, never-updated, updates-stopped, small-batches, not-shuffled, lagging, stale,
    domain-shift, and in the network not-finite-input, dead-channels, exploding-channels,
    saturated; "mismatch", where training batches are not given, for the four that only
    they tell apart. A running average is compared with what training batches would make
    of it, these with themselves in random order, the evaluated batch with all of them, and
    sampling is allowed for.

    Args:
      model, variables, call: as for `recalibrate`; the model is called as in evaluation.
        Both are compiled and kept, so that `call` should be one function for all reports.
      batch: as evaluation gets it, large enough for moments: a hundred examples or more.
      train_batches: about 16 batches as training gets them, in their size and order,
        spread over an epoch. Unaugmented evaluation is compared with them as they come.
      labels: of `batch`, for the loss and, of classes, the accuracy.
      loss: (output, labels) -> scalar; by default softmax cross-entropy.
      steps: of training so far, which tells whether updates have stopped where counts are
        kept.

    Returns:
      `Report(records, findings, overall)`; str() gives the findings in words, `rows()` the
      records as dictionaries, `rich.print` all in a table.

    Raises:
      TypeError, ValueError: as `recalibrate`; traced arguments, fewer than two training
      batches, labels of another shape or kind than the loss takes.

    Example:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> from bnjax import diagnostics
      >>> def model(variables, x):
      ...     return bnjax.bn_apply(*variables, x, train=False)
      >>> x = jax.random.normal(jax.random.key(0), (100, 3))
      >>> variables = bnjax.bn_init(3)
      >>> found = diagnostics.report(model, variables, x).findings[0]
      >>> print(found.cause, "->", found.remedy)
      never-updated -> y, state = bnjax.bn_apply(params, state, x, train=True)  # keep the state

    Source: the comparison of moments is that of Ioffe & Szegedy (2015), section 3.1, in
    both modes; Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", lists the causes.
    """
    common.require_values("report", variables=variables, batch=batch, labels=labels)
    subject = kinds.subject(model, variables, call)
    common.require_values("report", model=subject.variables)
    if steps is not None:
        steps = _checks.positive("steps", steps)
    if loss is not None and labels is None:
        raise ValueError("`labels` must be given where a `loss` is, got None. Fix: labels=...")
    given = _several(train_batches, batch)
    both = evidence.sides(subject, batch, labels, loss)
    layers = evidence.statistics(subject.layers)
    known = activations.following(subject, batch)
    order = sorted(both.seen, key=lambda path: float(both.seen[path].order.min()))
    found = tuple(records.record(p, layers[p], both.seen[p], known[p]) for p in order)
    seen, bad = evidence.batches(subject, given) if given else ({}, 0)
    case = Case(
        kind=subject.kind,
        called=call is not None,
        records=found,
        seen={p: both.seen[p] for p in order},
        layers=layers,
        batches={p: seen[p] for p in order if p in seen},
        bad_batches=(bad, len(given)),
        on_training_batches=_on_batches(subject, given),
        steps=steps,
    )
    return Report(found, tuple(causes.findings(case)), both.overall)


def _several(batches: Iterable[Any] | None, batch: Any) -> list[Any]:
    """Those given; so many that they can be compared with each other."""
    if batches is None:
        return []
    given = list(batches)
    if len(given) < 2:
        raise ValueError(
            f"`train_batches` must hold at least 2 batches, got {len(given)}. Fix: about 16; a "
            "generator is used up by one call, make it anew."
        )
    wanted, *others = {jax.tree.structure(batch): None} | dict.fromkeys(
        map(jax.tree.structure, given)
    )
    if others:
        raise ValueError(
            f"`train_batches` must have the structure of `batch`, {wanted}, got {others[0]}. Fix: "
            "[images for images, labels in loader], or a `call` that takes both."
        )
    return given


def _on_batches(subject: Subject, given: list[Any]) -> float | None:
    """The difference of outputs of both modes on a few training batches."""
    found = [evidence.sides(subject, b).overall["output_difference"] for b in given[:_COMPARED]]
    return float(np.median(found)) if found else None

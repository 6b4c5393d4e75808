"""What a report says of each layer: numbers per channel, and one of each for the layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from bnjax._models.common import Layer
from bnjax._observe import Seen

# Below this a scale lets nothing through.
_DEAD_SCALE = 1e-3
# A variance below this part of epsilon, which then takes its place.
DEAD_VARIANCE = 0.1
# A deviation so many times that of a typical channel of its layer, of those that vary.
_EXPLODING = 1e4


@dataclasses.dataclass(frozen=True)
class Record:
    """One layer of a report. `per_channel`: arrays of all quantities by name, [channels].

    Of the batch in training mode, against the running statistics:
      mean_gap: |batch mean - running mean| / sqrt(running var + epsilon), root mean
        square over channels.
      log_var_ratio: log((batch var + epsilon) / (running var + epsilon)), median.
      output_difference: of y normalized by either, for the same input, over |scale|; root
        mean square.
      distance: Hellinger's between the normal distributions with the moments of either,
        in [0, 1]; mean.
    entries: the effective batch size, of the channel with the fewest.
    activation: "sigmoid", "tanh" or "relu", where it follows; "" for another or none, and for
      layers inside of lax.scan and the like, which are one record.
    saturated: share of its inputs where its derivative is less than a tenth of its largest,
      None where there is no such activation.
    dead: channels with scale near 0, or whose variance has collapsed.
    exploding: channels whose deviation is far beyond that of the others.
    not_finite: entries of the input; bad_statistics: channels whose running statistics are
      not finite.
    untrained: share of channels that were never updated. updates: the smallest count, None
      where none is kept. momentum: weight of the old value in the next update.
    """

    layer: str
    channels: int
    entries: float
    mean_gap: float
    log_var_ratio: float
    output_difference: float
    distance: float
    activation: str
    saturated: float | None
    dead: int
    exploding: int
    not_finite: int
    bad_statistics: int
    untrained: float
    updates: int | None
    momentum: float
    per_channel: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    def row(self) -> dict[str, Any]:
        """The layer's numbers by name, for a table."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "per_channel"
        }


def record(path: str, layer: Layer, seen: Seen, activation: str) -> Record:
    """The record of a layer; arrays in float64."""
    channels = per_channel(layer, seen)
    saturated = getattr(seen, activation) if activation else None
    if saturated is not None:
        channels["saturated"] = saturated
    with np.errstate(invalid="ignore"):
        return Record(
            layer=path,
            channels=seen.var.size,
            entries=float(seen.entries.min()),
            mean_gap=float(np.sqrt(np.mean(channels["mean_gap"] ** 2))),
            log_var_ratio=float(np.median(channels["log_var_ratio"])),
            output_difference=float(np.sqrt(np.mean(channels["output_difference"] ** 2))),
            distance=float(channels["distance"].mean()),
            activation=activation,
            saturated=None if saturated is None else float(saturated.mean()),
            dead=int(channels["dead"].sum()),
            exploding=int(channels["exploding"].sum()),
            not_finite=int(seen.bad.sum()),
            bad_statistics=int((~np.isfinite(layer.mean + layer.var)).sum()),
            untrained=float(channels["untrained"].mean()),
            updates=None if layer.count is None else int(np.min(layer.count)),
            momentum=float(np.median(seen.weight)),
            per_channel=channels,
        )


def per_channel(layer: Layer, seen: Seen) -> dict[str, np.ndarray]:
    """All quantities of a layer, by name."""
    mean, var, epsilon = seen.shift + seen.offset, seen.var, seen.epsilon
    with np.errstate(all="ignore"):
        batch, running = var + epsilon, layer.var + epsilon
        apart = mean - layer.mean
        stretch = var * (1 / np.sqrt(batch) - 1 / np.sqrt(running)) ** 2
        overlap = np.sqrt(2 * np.sqrt(batch * running) / (batch + running))
        overlap = overlap * np.exp(-0.25 * apart**2 / (batch + running))
        collapsed = (var < DEAD_VARIANCE * epsilon) & (seen.entries > 1)
        deviation = np.sqrt(np.fmax(var, layer.var))
        typical = deviation[(deviation**2 >= epsilon) & np.isfinite(deviation)]
        limit = _EXPLODING * (np.median(typical) if typical.size else np.inf)
        if layer.count is None:
            untrained = (layer.mean == 0) & (layer.var == 1)
        else:
            untrained = layer.count == 0
        return {
            "mean": mean,
            "var": var,
            "running_mean": layer.mean,
            "running_var": layer.var,
            "entries": seen.entries,
            "mean_gap": np.abs(apart) / np.sqrt(running),
            "log_var_ratio": np.log(batch / running),
            "output_difference": np.sqrt(stretch + apart**2 / running),
            "distance": np.sqrt(np.maximum(1 - overlap, 0)),
            "dead": (np.abs(seen.scale) < _DEAD_SCALE) | collapsed,
            "exploding": deviation > limit,
            "untrained": untrained,
        }

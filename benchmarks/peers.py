"""What the layers do, each cell the outcome of running the layer.

    python benchmarks/peers.py

Writes results/peers.csv. A cell says what happened: "yes", "no", an error or a
number; "n/a" where the question does not arise. The layers run as they come;
equinox in its default mode "ema", and in its other one for comparison.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

import functools
import sys
from typing import Any

import jax.numpy as jnp
import probes
import results
from layers import EquinoxBatch, available
from other_layers import LAYERS

# The key by which tables.py picks rows; the question; the program that answers it.
ROWS: list[tuple[str, str, probes.Probe]] = [
    (
        "variance-1e3",
        "variance right at a mean of 1e3 deviations",
        functools.partial(probes.variance, mean=1e3),
    ),
    (
        "variance-1e4",
        "variance right at a mean of 1e4 deviations",
        functools.partial(probes.variance, mean=1e4),
    ),
    (
        "output-1e4",
        "y right at a mean of 1e4 deviations",
        functools.partial(probes.far_from_zero, function="y"),
    ),
    (
        "gradient-1e4",
        "gradient right at a mean of 1e4 deviations",
        functools.partial(probes.far_from_zero, function="grad"),
    ),
    (
        "variance-bfloat16",
        "variance right for bfloat16 at a mean of 3 deviations",
        functools.partial(probes.variance, mean=3, dtype=jnp.bfloat16),
    ),
    ("batch-statistics", "normalizes with the batch in training", probes.batch_statistics),
    ("mask", "masks", probes.mask),
    ("mask-devices", "masked mean right over devices of unequal counts", probes.mask_over_devices),
    ("mask-nan", "NaN in masked entries harmless", probes.mask_nan),
    ("mask-nan-gradient", "the same, gradient", probes.mask_nan_gradient),
    ("nan-batch", "running statistics survive a batch with a NaN", probes.nan_batch),
    ("batch-of-one", "batch of one in training", probes.batch_of_one),
    ("jvp", "forward mode (jvp)", probes.jvp),
    ("second-order", "second order (grad of grad)", probes.second_order),
    ("vmap", "vmap over layers' inputs", probes.vmapped),
    ("residuals", "kept per entry for backward, bfloat16", probes.residuals),
    ("output-dtype", "output of bfloat16 input, float32 parameters", probes.output_dtype),
    ("float64", "float64 throughout under x64", probes.float64),
    ("cumulative", "cumulative running average", probes.cumulative),
    ("traced-train", "traced train flag", probes.traced_train),
    ("fresh", "evaluation before training", probes.fresh),
    ("running-variance", "running variance", probes.running_variance),
]


# Errors by which a layer says that it has no such thing.
REFUSALS = {
    ("mask", "TypeError"): "no",
    ("mask-devices", "ValueError"): "not synchronized",
    ("batch-of-one", "ValueError"): "error",
    ("cumulative", "TypeError"): "no",
    ("cumulative", "ValueError"): "no",
    ("traced-train", "TracerBoolConversionError"): "no",
}


def answer(key: str, probe: probes.Probe, layer: Any, masks: bool) -> str:
    """The probe's answer; an error is one too, and is also printed in full."""
    if key.startswith("mask-") and not masks:
        return "n/a"
    try:
        return probe(layer)
    except Exception as error:  # whatever a peer raises is the outcome
        name = type(error).__name__
        message = (str(error).strip().splitlines() or [""])[0]
        print(f"{layer.name}, {key}: {name}: {message[:150]}", file=sys.stderr)
        return REFUSALS.get((key, name), f"error ({name})")


def main() -> None:
    layers = list(available([*LAYERS, EquinoxBatch]))
    rows: dict[str, dict[str, str]] = {}
    for key, question, probe in ROWS:
        rows[key] = {"key": key, "": question}
        for layer in layers:
            masks = rows.get("mask", {}).get(layer.name) != "no"
            rows[key][layer.name] = answer(key, probe, layer, masks)
    results.write("peers", list(rows.values()))


if __name__ == "__main__":
    main()

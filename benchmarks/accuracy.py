"""Error of the batch variance and of y, for float32 inputs of a large mean.

    python benchmarks/accuracy.py

Writes results/variance.csv and results/output.csv. The truth is computed in
float64 from the same float32 numbers. Each layer's variance is the running
variance that one batch leaves when the old value has weight 0.
"""

import numpy as np
import results
from layers import EPSILON, Layer, available
from other_layers import LAYERS

MEANS = (0, 1, 3, 10, 30, 100, 1e3, 1e4)  # in standard deviations
SIZES = (60, 8192)
CHANNELS = 64


def batch(mean: float, n: int) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal((n, CHANNELS))
    return (noise + mean).astype(np.float32)


def errors(layer: type[Layer], x: np.ndarray) -> tuple[float, float]:
    """Largest relative error of the variance, and largest error of y."""
    wide = x.astype(np.float64)
    instance = layer(CHANNELS, momentum=0.0)
    y = instance.step(x)
    var = instance.running(instance.variables)[1].astype(np.float64)
    if layer.unbiased:
        var = var * (len(x) - 1) / len(x)
    truth = wide.var(0)
    right = (wide - wide.mean(0)) / np.sqrt(truth + EPSILON)
    return float(np.abs(var / truth - 1).max()), float(np.abs(y - right).max())


def main() -> None:
    variance, output = [], []
    layers = list(available(LAYERS))
    for n in SIZES:
        for mean in MEANS:
            measured = [errors(layer, batch(mean, n)) for layer in layers]
            for rows, which in ((variance, 0), (output, 1)):
                cells = {
                    layer.name: f"{e[which]:.1e}" for layer, e in zip(layers, measured, strict=True)
                }
                rows.append({"n": n, "mean": f"{mean:g}", **cells})
    results.write("variance", variance)
    results.write("output", output)


if __name__ == "__main__":
    main()

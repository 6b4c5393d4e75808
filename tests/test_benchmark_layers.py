"""The layers that are compared take images with the channels last and second."""

import importlib.util

import jax
import numpy as np
import pytest
from benchmark_scripts import counts

X = np.random.default_rng(0).normal(3, 2, (5, 4, 3, 6)).astype(np.float32)


def layers():
    return [
        pytest.param(
            kind,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(kind.module.split(".")[0]) is None,
                reason=f"needs {kind.package}",
            ),
        )
        for kind in counts.PEERS
    ]


@pytest.mark.parametrize("kind", layers())
def test_axis(kind):
    """The same numbers as for the rows of all images, and as with the channels second."""
    with jax.numpy_rank_promotion("allow"):
        rows, last, second = kind(6), kind(6), kind(6, axis=1)
        wanted = rows.step(X.reshape(-1, 6)).reshape(X.shape)
        np.testing.assert_allclose(last.step(X), wanted, atol=1e-5)
        y = np.moveaxis(second.step(np.moveaxis(X, -1, 1)), 1, -1)
        np.testing.assert_allclose(y, wanted, atol=1e-5)
        for layer in (last, second):
            found, of_rows = layer.running(layer.variables), rows.running(rows.variables)
            for a, b in zip(found, of_rows, strict=True):
                assert a.shape == b.shape == (6,)
                np.testing.assert_allclose(a, b, rtol=1e-5)

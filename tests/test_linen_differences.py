"""Differences of bnjax.linen.BatchNorm from flax's, each on purpose, and what flax does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside_flax import KEY, LINEN, SHAPE, X, close
from beside_flax import run_linen as run
from flax import linen as nn
from tolerances import error

from bnjax import linen

RNG = np.random.default_rng(1)


@pytest.mark.parametrize("fast", [True, False])
def test_difference_variance_is_accurate(fast):
    """(a) E[x^2] - E[x]^2 is flax's default: off by 10 % at a mean of 1e3 deviations."""
    x = (RNG.normal(0, 1, (4096, 1)) + 1e3).astype(np.float32)
    truth = x.var(0, dtype=np.float64)
    ours, theirs = (
        run(m, x, momentum=0.0, use_fast_variance=fast)[3]["batch_stats"]["var"] for m in LINEN
    )
    assert error(ours, truth) < 3e-5
    assert (error(theirs, truth) > 1e-3) == fast


def test_difference_masked_devices_are_merged_by_count():
    """(b) flax averages the means of devices without their counts."""
    x, mask = X.reshape(2, 3, 5, 4), np.ones((2, 3, 5, 1), bool)
    mask[0, :, 1:] = False
    whole = run(linen.BatchNorm, mask=mask.reshape(6, 5, 1))[1]
    found = []
    for module in LINEN:
        layer = module(use_running_average=False, axis_name="i")
        variables = layer.init(KEY, X)
        apply = functools.partial(layer.apply, variables, mutable=["batch_stats"])
        y, _ = jax.jit(jax.vmap(lambda x, m: apply(x, mask=m), axis_name="i"))(x, mask)  # noqa: B023
        found.append(y.reshape(SHAPE))
    close(found[0], whole)
    assert error(found[1], whole) > 1e-2


def test_difference_bad_batch_does_not_poison():
    """(c) In flax one NaN is in the running statistics for ever."""
    x = X.copy()
    x[0, 0, 1] = np.nan
    ours, theirs = (run(m, x)[3]["batch_stats"] for m in LINEN)
    np.testing.assert_array_equal(np.isnan(theirs["mean"]), [False, True, False, False])
    good = np.array([0, 2, 3])
    close(jax.tree.map(lambda v: v[good], ours), jax.tree.map(lambda v: v[good], theirs))
    assert ours["mean"][1] == 0 and ours["var"][1] == 1


def test_difference_fully_masked_channel():
    """(d) It uses the running statistics, and keeps them; in flax both become NaN."""
    mask = np.ones((1, 1, 4), bool)
    mask[..., 2] = False
    ours, theirs = (run(m, mask=mask) for m in LINEN)
    np.testing.assert_array_equal(np.isnan(theirs[1]).all((0, 1)), [False, False, True, False])
    evaluated = run(linen.BatchNorm, train=False)[1]
    close(ours[1][..., 2], evaluated[..., 2])
    assert ours[3]["batch_stats"]["var"][2] == 1
    good = np.array([0, 1, 3])
    close(ours[1][..., good], theirs[1][..., good])
    assert np.all(np.isfinite(ours[2][1]))


def test_difference_nan_in_masked_entries():
    """(e) Harmless forward and backward. In flax they are harmless forward, but
    make the gradients of all entries of the channel NaN."""
    x = X.copy()
    x[0, 0, 1], mask = np.nan, np.ones(SHAPE, bool)
    mask[0, 0, 1] = False
    zeroed = np.where(mask, x, 0)
    ours, theirs = (run(m, x, mask=mask) for m in LINEN)
    clean = run(linen.BatchNorm, zeroed, mask=mask)
    close(ours[3], clean[3])
    close(ours[1][mask], clean[1][mask])
    assert np.all(np.isfinite(ours[1])) and np.all(np.isfinite(ours[2][1]))
    close(ours[2][1][mask], clean[2][1][mask])
    close(ours[3], theirs[3])
    assert np.all(np.isnan(theirs[2][1][..., 1]))


@pytest.mark.parametrize("mutable", [False, ["batch_stats"]])
@pytest.mark.parametrize("missing", [["mean"], ["var"], ["mean", "var"]])
def test_difference_evaluation_without_statistics(mutable, missing):
    """(f) flax evaluates with mean 0 and variance 1 where the collection is mutable."""
    variables = linen.BatchNorm(use_running_average=True).init(KEY, X)
    stats = {k: v for k, v in variables["batch_stats"].items() if k not in missing}
    given = {"params": variables["params"], "batch_stats": stats}
    with pytest.raises(ValueError, match="running statistics must hold") as info:
        linen.BatchNorm(use_running_average=True).apply(given, X, mutable=mutable)
    for name in missing:
        assert f"batch_stats/{name}" in str(info.value)
    if mutable:
        nn.BatchNorm(use_running_average=True).apply(given, X, mutable=mutable)


@pytest.mark.parametrize("name", ["mean", "var"])
def test_statistics_of_another_shape_are_named(name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=True, name="bn")(x)

    variables = Net().init(KEY, X)
    variables["batch_stats"]["bn"][name] = jnp.ones(7)
    with pytest.raises(
        ValueError, match=rf"`batch_stats/bn/{name}` must .*\(4,\), got \(7,\)\. Fix"
    ):
        Net().apply(variables, X)


def test_difference_fast_variance_has_no_effect():
    """(g) Bit for bit; in flax the two disagree."""
    x = X + 100
    for module, same in zip(LINEN, (True, False), strict=True):
        results = [run(module, x, use_fast_variance=fast)[1:] for fast in (True, False)]
        equal = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), *results)
        assert all(jax.tree.leaves(equal)) == same


def test_difference_duplicate_axes():
    """(h) flax takes (2, -1) for one axis; here it is an error, as is an axis out of range."""
    variables = linen.BatchNorm(use_running_average=True).init(KEY, X)
    nn.BatchNorm(use_running_average=True, axis=(2, -1)).apply(variables, X)
    with pytest.raises(ValueError, match="`axis` must name distinct axes"):
        linen.BatchNorm(use_running_average=True, axis=(2, -1)).apply(variables, X)


def test_difference_complex_input():
    """flax takes |x - mean|**2; here it is refused, while tracing."""
    x = jnp.ones((4, 3), jnp.complex64)
    nn.BatchNorm(False).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match="`x` must have a real floating dtype, got complex64"):
        linen.BatchNorm(False).init(jax.random.key(0), x)

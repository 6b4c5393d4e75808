"""Differences of bnjax.nnx.BatchNorm from flax's, each on purpose, and what flax does."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import assert_close, error, variance

from bnjax.nnx import BatchNorm

RNG = np.random.default_rng(0)
SHAPE = (6, 5, 4)
X = RNG.normal(RNG.normal(size=SHAPE[1:]), 2, SHAPE).astype(np.float32)
BOTH = (BatchNorm, nnx.BatchNorm)
# Two correct implementations are each within the bound of the truth.
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def make(module, size=4, **fields):
    return module(size, rngs=nnx.Rngs(0), **fields)


def run(module, x=X, mask=None, **fields):
    """(layer, y, gradient of x) of one call of a new layer in training."""
    layer = make(module, x.shape[-1], **fields)

    @nnx.jit
    def step(layer, x):
        def loss(x, layer):
            y = layer(x, mask=mask)
            return jnp.sum(jnp.sin(y)), y

        return nnx.grad(loss, has_aux=True)(x, layer)

    dx, y = step(layer, x)
    return layer, y, dx


def evaluated(module, x, mean, var, **fields):
    layer = make(module, len(mean), use_running_average=True, **fields)
    layer.mean[...], layer.var[...] = jnp.array(mean), jnp.array(var)
    return np.asarray(layer(x), np.float64).ravel().round(2).tolist()


# (mean, var, x), of 3, -2, 4 and 1 deviations from the mean.
EVALUATIONS = {
    "x is float32": ([100.0], [0.01], [[100.3], [99.8], [100.4], [100.1]]),
    "the mean is float32": ([1001.0, 1002, 1000, 1003], [1.0] * 4, [[1004, 1000, 1004, 1004]]),
}  # fmt: skip


@pytest.mark.parametrize("mean, var, x", EVALUATIONS.values(), ids=EVALUATIONS)
def test_difference_dtype_is_that_of_the_output(mean, var, x):
    """flax rounds x, the statistics and the parameters to `dtype` before it computes."""
    x = jnp.array(x, jnp.float32)
    ours, theirs = (evaluated(m, x, mean, var, dtype=jnp.bfloat16) for m in BOTH)
    assert ours == [3, -2, 4, 1]
    assert theirs == ([5, 0, 5, 0] if len(mean) == 1 else [4, 0, 4, 0])
    assert evaluated(nnx.BatchNorm, x, mean, var) == [3, -2, 4, 1]


def test_difference_dtype_in_training():
    """The running statistics are those of x as it came; in flax those of x rounded."""
    x = (RNG.normal(0, 0.1, (4096, 1)) + 100).astype(np.float32)
    truth = x.var(0, dtype=np.float64)
    ours, theirs = (run(m, x, momentum=0.0, dtype=jnp.bfloat16)[0] for m in BOTH)
    assert error(ours.var[...], truth) < variance(np.float32, 4096)
    assert error(theirs.var[...], truth) > 0.5


@pytest.mark.parametrize("fast", [True, False])
def test_difference_variance_is_accurate(fast):
    """E[x^2] - E[x]^2 is flax's default: off by 10 % at a mean of 1e3 deviations."""
    x = (RNG.normal(0, 1, (4096, 1)) + 1e3).astype(np.float32)
    truth = x.var(0, dtype=np.float64)
    ours, theirs = (run(m, x, momentum=0.0, use_fast_variance=fast) for m in BOTH)
    bound = variance(np.float32, 4096, 1e3)
    assert error(ours[0].var[...], truth) < bound
    assert (error(theirs[0].var[...], truth) > 1e-3) == fast
    y = (x.astype(np.float64) - x.mean(0, dtype=np.float64)) / np.sqrt(truth + 1e-5)
    close(ours[1], y)


def test_difference_fast_variance_has_no_effect():
    """Bit for bit; in flax the two disagree."""
    for module, same in zip(BOTH, (True, False), strict=True):
        results = [run(module, X + 100, use_fast_variance=fast) for fast in (True, False)]
        results = [(y, dx, layer.var[...]) for layer, y, dx in results]
        equal = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), *results)
        assert all(equal) == same


def test_difference_masked_devices_are_merged_by_count():
    """flax averages the means of devices without their counts."""
    mask = np.ones((2, 3, 5, 1), bool)
    mask[0, :, 1:] = False
    whole = run(BatchNorm, mask=mask.reshape(6, 5, 1))[1]
    found = []
    for module in BOTH:
        layer = make(module, axis_name="i")
        axes = nnx.StateAxes({...: None})
        call = nnx.vmap(lambda layer, x, m: layer(x, mask=m), in_axes=(axes, 0, 0), axis_name="i")
        found.append(call(layer, X.reshape(2, 3, 5, 4), mask).reshape(SHAPE))
    close(found[0], whole)
    assert error(found[1], whole) > 1e-2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_difference_bad_batch_does_not_poison(bad):
    """In flax one NaN or Inf is in the running statistics for ever."""
    x = X.copy()
    x[0, 0, 1] = bad
    good = np.array([0, 2, 3])
    ours, theirs = (run(m, x) for m in BOTH)
    assert not np.any(np.isfinite(theirs[0].var[1])) and np.all(np.isnan(ours[1][..., 1]))
    assert ours[0].mean[1] == 0 and ours[0].var[1] == 1
    close(ours[0].mean[good], theirs[0].mean[good])
    close(ours[0].var[good], theirs[0].var[good])


def test_difference_batch_of_one_is_not_learned_from():
    """One value per channel has no variance; flax averages 0 in."""
    ours, theirs = (run(m, X[:1, :1], momentum=0.5) for m in BOTH)
    assert np.all(theirs[0].var[...] == 0.5) and np.all(theirs[0].mean[...] != 0)
    assert np.all(ours[0].var[...] == 1) and np.all(ours[0].mean[...] == 0)
    assert np.all(ours[1] == 0) and np.all(theirs[1] == 0)


def test_difference_fully_masked_channel():
    """It uses the running statistics, and keeps them; in flax both become NaN."""
    mask = np.ones((1, 1, 4), bool)
    mask[..., 2] = False
    good = np.array([0, 1, 3])
    ours, theirs = (run(m, mask=mask) for m in BOTH)
    np.testing.assert_array_equal(np.isnan(theirs[1]).all((0, 1)), [False, False, True, False])
    assert np.isnan(theirs[0].var[2]) and ours[0].var[2] == 1 and ours[0].mean[2] == 0
    close(ours[1][..., 2], make(BatchNorm)(X, True)[..., 2])
    close(ours[1][..., good], theirs[1][..., good])
    assert np.all(np.isfinite(ours[2]))


def test_difference_nan_in_masked_entries():
    """Harmless forward and backward. In flax they are harmless forward, but make the
    gradients of all entries of the channel NaN."""
    x, mask = X.copy(), np.ones(SHAPE, bool)
    x[0, 0, 1], mask[0, 0, 1] = np.nan, False
    ours, theirs = (run(m, x, mask=mask) for m in BOTH)
    clean = run(BatchNorm, np.where(mask, x, 0), mask=mask)
    close(ours[0].var[...], clean[0].var[...])
    close(theirs[0].var[...], clean[0].var[...])
    assert np.all(np.isfinite(ours[1])) and np.all(np.isfinite(ours[2]))
    close(ours[1][mask], clean[1][mask])
    close(ours[2][mask], clean[2][mask])
    assert np.all(np.isnan(theirs[2][..., 1]))


def test_difference_mask_is_cast_to_booleans():
    """flax refuses numbers, as its linen layer does not."""
    mask = (np.arange(30).reshape(6, 5, 1) % 3 > 0).astype(np.float32)
    close(run(BatchNorm, mask=mask)[1], run(nnx.BatchNorm, mask=mask.astype(bool))[1])
    with pytest.raises(ValueError, match="boolean"):
        run(nnx.BatchNorm, mask=mask)


def test_difference_traced_use_running_average():
    """flax needs to know it while tracing."""

    def call(module):
        return jax.jit(lambda flag: make(module)(X, flag))(True)

    close(call(BatchNorm), make(BatchNorm)(X, True))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        call(nnx.BatchNorm)


def test_difference_use_running_average_is_a_bool():
    """flax takes any truth value, such as that of the string "False"."""
    assert np.all(make(nnx.BatchNorm)(X, "False") == make(nnx.BatchNorm)(X, True))
    with pytest.raises(TypeError, match="`use_running_average` must be a bool"):
        make(BatchNorm)(X, "False")


def test_difference_one_feature_does_not_broadcast():
    """In evaluation flax's layer of one feature takes any number of them, where it has no
    scale and bias to tell."""
    plain = {"use_scale": False, "use_bias": False, "size": 1}
    x = X[:, :, :1]
    close(make(BatchNorm, **plain)(x, True), make(nnx.BatchNorm, **plain)(x, True))
    with pytest.raises(ValueError, match=r"`x` must have num_features=1 along axis -1"):
        make(BatchNorm, **plain)(X, True)


def test_difference_repeated_axis():
    """flax takes (2, -1) for one axis; here it is an error."""
    assert make(nnx.BatchNorm, axis=(2, -1))(X).shape == SHAPE
    with pytest.raises(ValueError, match="`axis` must name distinct axes"):
        make(BatchNorm, axis=(2, -1))(X)


def test_difference_complex_input():
    """flax takes |x - mean|**2, and drops the imaginary part of the running mean."""
    x = X + 1j
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert make(nnx.BatchNorm)(x).dtype == jnp.complex64
    with pytest.raises(TypeError, match="`x` must have a real floating dtype, got complex64"):
        make(BatchNorm)(x)
    with pytest.raises(TypeError, match="`param_dtype` must be a floating dtype, got complex64"):
        make(BatchNorm, param_dtype=jnp.complex64)


def test_difference_metadata_of_statistics():
    """flax's statistics take none."""
    with nnx.use_eager_sharding(False):
        layer = make(BatchNorm, statistics_metadata={"out_sharding": ("model",)})
    assert layer.mean.out_sharding == layer.var.out_sharding == ("model",)
    with pytest.raises(TypeError, match="statistics_metadata"):
        make(nnx.BatchNorm, statistics_metadata={})


def test_difference_no_features_and_lists():
    """flax normalizes nothing, and takes arrays only."""
    assert nnx.BatchNorm(0, rngs=nnx.Rngs(0))(jnp.ones((4, 0))).shape == (4, 0)
    with pytest.raises(ValueError, match="`num_features` must be positive, got 0"):
        BatchNorm(0, rngs=nnx.Rngs(0))
    rows = [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(AttributeError, match="ndim"):
        nnx.BatchNorm(2, rngs=nnx.Rngs(0))(rows)
    assert BatchNorm(2, rngs=nnx.Rngs(0))(rows).shape == (2, 2)

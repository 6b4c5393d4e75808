"""Moments against the float64 oracle: accuracy at any mean, masks, merging, derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tolerances
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnjax
from bnjax import _moments, _reduce

MEANS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)
LENGTHS = (16, 60, 256, 8192, 100_000)
SEEDS = 6


def samples(n, mean, dtype=np.float32, seeds=SEEDS):
    """One batch a seed, [seeds, n, 1]: a seed alone, so that none decides for another."""
    batches = [np.random.default_rng(seed).normal(mean, 1.0, (n, 1)) for seed in range(seeds)]
    return np.stack(batches).astype(dtype)


_jitted = jax.jit(bnjax.moments)
_by_seed = jax.jit(jax.vmap(bnjax.moments))


def check(found, x, mean, **options):
    """Moments of x, [n, C], against the oracle of the very numbers."""
    expected = reference.moments(x, **options)
    dtype = found.var.dtype
    n = int(np.max(expected.count))
    relative = np.abs(np.asarray(found.var, np.float64) / expected.var - 1).max()
    bound = tolerances.variance(dtype, n, mean)
    assert relative <= bound, f"variance: {relative:.2g}, bound {bound:.2g}"
    off = tolerances.error(found.mean, expected.mean, scale=np.abs(expected.mean).max() + 1)
    assert off <= tolerances.mean(dtype, n)
    np.testing.assert_array_equal(found.count, expected.count)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("n", LENGTHS)
def test_variance_compiled(n, mean):
    x = samples(n, mean)
    found = _by_seed(x)
    for seed in range(SEEDS):
        check(jax.tree.map(lambda v, seed=seed: v[seed], found), x[seed], mean)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("n", [60, 8192])
def test_variance_eager(n, mean):
    x = samples(n, mean, seeds=2)
    for batch in x:
        check(bnjax.moments(jnp.asarray(batch)), batch, mean)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("n", [16, 8192, 100_000])
def test_variance_sharded(n, mean, devices):
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
    x = samples(n, mean)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "data")))
    found = _by_seed(sharded)
    assert len(sharded.addressable_shards) == len(devices)
    for seed in range(SEEDS):
        check(jax.tree.map(lambda v, seed=seed: v[seed], found), x[seed], mean)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
def test_variance_of_short_dtypes_is_that_of_the_cast_input(dtype, mean):
    x = samples(256, mean, dtype)
    found = _by_seed(x)
    assert found.mean.dtype == found.var.dtype == found.count.dtype == jnp.float32
    for seed in range(SEEDS):
        check(jax.tree.map(lambda v, seed=seed: v[seed], found), x[seed], mean)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mean", MEANS)
def test_variance_float64(mean):
    x = samples(256, mean, np.float64)
    found = _by_seed(x)
    assert found.var.dtype == jnp.float64
    for seed in range(SEEDS):
        check(jax.tree.map(lambda v, seed=seed: v[seed], found), x[seed], mean)


def test_each_channel_at_its_own_mean_and_size():
    rng = np.random.default_rng(0)
    means, deviations = np.array([0, 5, 1e3, -1e4, 0, 1e-3]), np.array([1, 1e3, 1, 1, 1e-6, 1e-7])
    x = (rng.normal(size=(512, 6)) * deviations + means).astype(np.float32)
    found, expected = _jitted(x), reference.moments(x)
    relative = np.abs(np.asarray(found.var, np.float64) / expected.var - 1)
    ratio = np.abs(means) / deviations
    bounds = [tolerances.variance(jnp.float32, 512, r) for r in ratio]
    assert (relative <= bounds).all(), (relative, bounds)


def test_squares_beyond_the_range_of_float32():
    # mean**2 overflows, the variance does not.
    x = (np.random.default_rng(0).normal(size=(64, 1)) * 1e16 + 3e19).astype(np.float32)
    check(_jitted(x), x, 3e3)


def test_constant_channels_have_variance_zero():
    x = np.broadcast_to(np.float32([0.0, 1.0, 0.1, 1234.567, -3e4]), (60, 5))
    found = _jitted(jnp.asarray(x))
    # Deviations are those of the mean from the entries, one rounding at the most.
    assert (np.asarray(found.var) <= (tolerances.unit(jnp.float32) * np.abs(x[0])) ** 2).all()
    assert (np.asarray(found.var) >= 0).all()


@pytest.mark.parametrize(
    "shape, axis",
    [
        ((7,), -1),
        ((7,), ()),
        ((7,), 0),
        ((7, 3), -1),
        ((3, 7), 0),
        ((4, 5, 3), 1),
        ((4, 3, 5, 2), 1),
        ((4, 5, 2, 3), -1),
        ((4, 3, 5, 2), (3, 1)),
        ((4, 3, 5, 2), (-3, 2, 3)),
        ((2, 3, 4, 2, 3), (0, -1)),
        ((2, 3, 2, 2, 3, 2), (2, 5)),
        ((2, 3, 2, 2, 3, 2), ()),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_axes(shape, axis, masked):
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, shape).astype(np.float32)
    mask = rng.random(shape) < 0.7 if masked else None
    found = jax.jit(functools.partial(bnjax.moments, axis=axis))(x, mask=mask)
    expected = reference.moments(x, axis=axis, mask=mask)
    chex.assert_equal_shape([*found, *expected])
    np.testing.assert_array_equal(found.count, expected.count)
    tolerances.assert_close(found[:2], expected[:2], jnp.float32, x.size)


MASKS = [(40, 1, 1), (1, 6, 1), (1, 1, 5), (40, 6, 1), (40, 1, 5), (1, 6, 5), (40, 6, 5), (1, 1, 1)]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_masks_that_broadcast(shape, mean):
    rng = np.random.default_rng(1)
    x = rng.normal(mean, 1, (40, 6, 5)).astype(np.float32)
    mask = rng.random(shape) < 0.6
    mask.flat[0] = True
    found, expected = _jitted(x, mask=mask), reference.moments(x, mask=mask)
    np.testing.assert_array_equal(found.count, expected.count)
    full = expected.count > 0
    relative = np.abs(np.asarray(found.var)[full] / expected.var[full] - 1).max()
    assert relative <= tolerances.variance(jnp.float32, 240, mean)
    np.testing.assert_array_equal(np.asarray(found.mean)[~full], 0)
    np.testing.assert_array_equal(np.asarray(found.var)[~full], 0)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38, 7.0])
def test_masked_entries_change_nothing(garbage, mean):
    rng = np.random.default_rng(2)
    x = rng.normal(mean, 1, (64, 3)).astype(np.float32)
    mask = rng.random((64, 3)) < 0.5
    f = _jitted
    found = f(np.where(mask, x, np.float32(garbage)), mask=mask)
    chex.assert_trees_all_equal(found, f(np.where(mask, x, 0), mask=mask))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_entries_are_seen_in_their_channel_only(bad):
    x = np.random.default_rng(0).normal(1, 1, (64, 3)).astype(np.float32)
    x[5, 1] = bad
    found, expected = _jitted(x), reference.moments(x)
    assert not np.isfinite(found.mean[1]) and np.isnan(found.var[1])
    for c in (0, 2):
        assert abs(found.var[c] / expected.var[c] - 1) <= tolerances.variance(jnp.float32, 64)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_empty_batch(shape):
    found = bnjax.moments(jnp.zeros(shape))
    chex.assert_trees_all_equal(found, bnjax.Moments(*jnp.zeros((3, 3))))


@pytest.fixture
def sums(monkeypatch):
    """How many sums over x ran, not how many were traced."""
    runs = []
    plain = _reduce.sum_over

    def counted(*args):
        jax.debug.callback(lambda: runs.append(1))
        return plain(*args)

    monkeypatch.setattr(_reduce, "sum_over", counted)
    jax.clear_caches()  # of programs that do not count
    yield runs
    jax.clear_caches()  # of those that do


@pytest.mark.parametrize(
    "means, more",
    [
        ((0.0, 0.0), False),
        ((2.0, -2.5), False),
        ((0.0, 4.0), True),
        ((-30.0, 0.0), True),
        ((1e4, 1e4), True),
        ((np.nan, 0.0), True),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_one_pass_where_that_is_accurate(means, more, masked, sums):
    x = (np.random.default_rng(0).normal(size=(2000, 2)) + means).astype(np.float32)
    mask = np.arange(2000)[:, None] % 3 > 0 if masked else None
    x = jnp.asarray(x)
    mask = None if mask is None else jnp.asarray(mask)
    run = jax.jit(lambda x: _moments.batch_moments(_reduce.Reduction((0,)), x, mask, jnp.zeros(2)))
    jax.block_until_ready(run(x))
    jax.effects_barrier()
    assert len(sums) > 2 if more else len(sums) == 2


def parts_of(x, sizes):
    return [_jitted(part) for part in jnp.split(jnp.asarray(x), np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("sizes", [(96,), (48, 48), (1, 95), (0, 96, 0), (5, 1, 30, 60), (1,) * 96])
def test_merge_is_the_whole(sizes, mean):
    x = samples(96, mean)[0]
    check(bnjax.merge(*parts_of(jnp.asarray(x), sizes)), x, mean)


def test_merge_in_any_order():
    x = jnp.asarray(samples(96, 10.0)[0])
    a, b, c = parts_of(x, (7, 50, 39))
    for merged in (
        bnjax.merge(a, b, c),
        bnjax.merge(c, a, b),
        bnjax.merge(bnjax.merge(a, b), c),
        bnjax.merge(a, bnjax.merge(b, c)),
    ):
        check(merged, np.asarray(x), 10.0)


def test_merge_takes_the_variance_between_means():
    zero = bnjax.Moments(jnp.zeros(1), jnp.zeros(1), jnp.full(1, 4.0))
    far = bnjax.Moments(jnp.full(1, 8.0), jnp.zeros(1), jnp.full(1, 12.0))
    chex.assert_trees_all_close(
        bnjax.merge(zero, far),
        bnjax.Moments(jnp.full(1, 6.0), jnp.full(1, 12.0), jnp.full(1, 16.0)),
    )


@pytest.mark.parametrize("held", [np.nan, np.inf])
def test_merge_ignores_what_empty_parts_hold(held):
    full = bnjax.moments(jnp.asarray(samples(16, 1.0)[0]))
    empty = bnjax.Moments(jnp.full(1, held), jnp.full(1, held), jnp.zeros(1))
    for parts in ((empty, full), (full, empty), (empty, full, empty)):
        chex.assert_trees_all_equal(bnjax.merge(*parts), full)


@pytest.mark.parametrize("held", [np.nan, np.inf])
def test_merge_of_empty_parts_has_finite_gradients(held):
    full = bnjax.moments(jnp.asarray(samples(16, 1.0)[0]))
    empty = bnjax.Moments(jnp.full(1, held), jnp.full(1, held), jnp.zeros(1))
    for parts in ((empty, full), (full, empty), (empty, full, empty)):
        # `where` after the fact would make the gradient NaN.
        grads = jax.grad(lambda p: bnjax.merge(*p).var.sum() + bnjax.merge(*p).mean.sum())(parts)
        ones = [p for p, q in zip(grads, parts, strict=True) if q is full]
        np.testing.assert_array_equal([ones[0].mean, ones[0].var], [[1.0], [1.0]])
        for grad, part in zip(grads, parts, strict=True):
            if part is empty:
                np.testing.assert_array_equal([grad.mean, grad.var], [[0.0], [0.0]])


def test_merge_of_channels_with_counts_of_their_own():
    rng = np.random.default_rng(3)
    x, mask = rng.normal(5, 2, (30, 4)).astype(np.float32), rng.random((30, 4)) < 0.5
    mask[:10, 0] = False
    halves = [bnjax.moments(x[i : i + 10], mask=mask[i : i + 10]) for i in (0, 10, 20)]
    check(bnjax.merge(*halves), x, 2.5, mask=mask)


def test_merge_is_differentiable():
    x = jnp.asarray(samples(24, 3.0)[0])

    def loss(x, *sizes):
        m = bnjax.merge(*parts_of(x, sizes))
        return jnp.sum(jnp.sin(m.mean) * m.var)

    for derivative in (jax.grad, jax.hessian):
        f = jax.jit(derivative(loss), static_argnums=(1, 2, 3))
        whole, parts = (f(x, *sizes) for sizes in ((24,), (4, 0, 20)))
        tolerances.assert_close(parts, whole, jnp.float32, 24)


def test_merge_refuses_nothing_and_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one"):
        bnjax.merge()
    one, two = (bnjax.moments(jnp.ones((4, c))) for c in (1, 2))
    with pytest.raises(ValueError, match=r"one shape.*\(1,\).*\(2,\)"):
        bnjax.merge(one, two)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(mean, masked):
    """Forward along a random direction, and along x, where one-pass formulas cancel."""
    rng = np.random.default_rng(4)
    x = rng.normal(mean, 1, (128, 3)).astype(np.float32)
    mask = rng.random(x.shape) < 0.6 if masked else None
    keep = np.ones(x.shape, bool) if mask is None else mask
    f = jax.jit(lambda x, dx: jax.jvp(lambda x: bnjax.moments(x, mask=mask)[:2], (x,), (dx,))[1])
    for dx, scale in ((rng.normal(size=x.shape).astype(np.float32), 1.0), (x, None)):
        expected = reference.directional(lambda x: reference.moments(x, mask=mask)[:2], x, dx)
        found = f(x, dx)
        tolerances.assert_close(found[0], expected[0], jnp.float32, 128, scale=scale)
        tolerances.assert_close(found[1], expected[1], jnp.float32, 128, scale=scale)
    # var = sum((x - mean)**2) / n: gradient 2 (x - mean) / n, Hessian 2 (1 - 1/n) / n.
    m = reference.moments(x, mask=mask)
    gradient = np.where(keep, 2 * (x.astype(np.float64) - m.mean) / m.count, 0)
    g = jax.jit(jax.grad(lambda x: bnjax.moments(x, mask=mask).var.sum()))
    tolerances.assert_close(g(x), gradient, jnp.float32, 128)
    dx = rng.normal(size=x.shape).astype(np.float32)
    centred = dx - reference.moments(dx, mask=mask).mean
    for product in (
        lambda x: jax.jvp(g, (x,), (dx,))[1],
        jax.grad(lambda x: jnp.vdot(g(x), dx)),
    ):
        expected = np.where(keep, 2 * centred / m.count, 0)
        tolerances.assert_close(jax.jit(product)(x), expected, jnp.float32, 128)

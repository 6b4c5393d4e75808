"""How sums are taken: about two of few entries, and on CPUs about 0 where that is as good."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tolerances
from benchmark_scripts import devices as across
from benchmark_scripts import ways
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax import BNParams, BNState, _sums
from bnjax._reduce import Reduction

FEW = _sums._FEW - 1
MANY = 4096  # by 16 channels: as large as arrays are that are branched for
RNG = np.random.default_rng(0)


def variance_error(x, **running):
    """Of the new running variance, with the running statistics that were given."""
    channels = x.shape[-1]
    params, state = bnjax.bn_init(channels)
    state = state._replace(**{k: jnp.full(channels, v) for k, v in running.items()})
    new = jax.jit(lambda x: bnjax.bn_apply(params, state, x, True, momentum=0.0)[1])(x)
    expected = reference.moments(x)
    bound = tolerances.mean(np.float32, len(x)) * np.abs(x).max(0)
    assert (np.abs(new.mean - expected.mean) <= bound).all()
    return np.abs(np.asarray(new.var, np.float64) / expected.var - 1).max()


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("outliers", [[0.0, 0.0], [1e3, 0.0], [0.0, 1e3], [1e3, 1e3]])
def test_few_entries_about_the_first_two_whatever_they_are(outliers, mean):
    """As their middle is no more than sqrt(n / 2 - 1) deviations from the mean of all."""
    x = RNG.normal(size=(FEW, 4000)) + mean
    x[:2] += np.array(outliers)[:, None]
    bound = tolerances.variance(np.float32, FEW, mean)
    assert variance_error(x.astype(np.float32)) <= bound


@pytest.mark.parametrize("entries, branches", [(FEW, 0), (FEW + 1, 1)])
def test_few_entries_take_no_branch(entries, branches):
    params, state = bnjax.bn_init(3)
    x = jnp.ones((entries, 3))
    text = str(jax.make_jaxpr(lambda x: bnjax.bn_apply(params, state, x, True))(x))
    assert text.count("while[") == branches


def test_few_entries_with_a_mask_or_over_devices_are_not_known_to_be_at_hand():
    x, mask = jnp.ones((8, 3)), jnp.ones((8, 1), bool)
    assert _sums.are_few(Reduction((0,)), x, None)
    assert not _sums.are_few(Reduction((0,)), x, mask)
    assert not _sums.are_few(Reduction((0,), axis_name="i"), x, None)
    assert not _sums.are_few(Reduction(()), x, None)
    assert not _sums.are_few(Reduction((0,)), jnp.ones((0, 3)), None)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "running",
    [
        {"mean": 0.0, "var": 1.0},  # 0 is as good
        {"mean": 100.0, "var": 1.0},  # it is not
        {"mean": 2.0, "var": 1e6},  # it is said to be, and is not
        {"mean": np.nan, "var": 1.0},
        {"mean": 100.0, "var": np.nan},
        {"mean": 0.0, "var": 0.0},
    ],
    ids=str,
)
def test_large_arrays_with_any_running_statistics(running, masked, dtype):
    x = jnp.asarray(RNG.normal(size=(MANY, 16)) + 100, dtype)
    mask = jnp.asarray(RNG.random((MANY, 1)) < 0.9) if masked else None
    params, state = bnjax.bn_init(16)
    state = BNState(*(jnp.full(16, running[k], jnp.float32) for k in ("mean", "var")), state.count)
    f = jax.jit(lambda x: bnjax.bn_apply(params, state, x, True, momentum=0.0, mask=mask)[1])
    if not np.isfinite(running["mean"] + running["var"]):
        # The new ones hold what they are made from: momentum 0 times NaN.
        f = jax.jit(lambda x: bnjax.bn_apply(params, state, x, True, mask=mask)[0])
        assert jnp.isfinite(f(x)).all()
        return
    new, wide = f(x), np.asarray(x, np.float64)
    expected = reference.moments(wide if mask is None else wide[np.asarray(mask)[:, 0]])
    bound = tolerances.variance(np.float32, MANY, 100)
    assert np.abs(np.asarray(new.var, np.float64) / expected.var - 1).max() <= bound


@pytest.mark.parametrize("near, zero", [(2.9, True), (3.1, False)])
def test_about_zero_on_cpus_up_to_three_deviations(near, zero):
    x = jnp.asarray(RNG.normal(size=(MANY, 16)) + near, jnp.float32)
    mean, var = jnp.zeros(16).at[3].set(near), jnp.ones(16)
    shift, other, sums = jax.jit(lambda x: _sums.about(Reduction((0,)), x, None, mean, var))(x)
    assert (not shift.any() and not other.any()) == zero
    wide = np.asarray(x, np.float64)
    expected = (wide - np.asarray(shift)).sum(0), ((wide - np.asarray(other)) ** 2).sum(0)
    for found, e in zip(sums, expected, strict=True):
        assert tolerances.error(found, e) <= tolerances.values(np.float32, MANY)


def test_upcasts_are_not_written_out():
    """Neither for the forward sums nor for the backward ones, in a narrow dtype on the CPU."""
    params, state = bnjax.bn_init(16)

    def step(x, dy):
        y, back, _ = jax.vjp(lambda x: bnjax.bn_apply(params, state, x, True), x, has_aux=True)
        return y, back(dy)

    x = jnp.ones((MANY, 16), jnp.bfloat16)
    compiled = jax.jit(step).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 4


@pytest.mark.parametrize("mean", [0.5, 100.0])
@pytest.mark.parametrize(
    "way", ["jit, explicit, channels too", "shard_map, grad inside", "pmap", "vmap"]
)
def test_large_arrays_over_devices(way, mean, devices, monkeypatch):
    """The same numbers, about 0 and about the running mean, where each device has many entries."""
    n, channels, parts = 2 * MANY, 16, 2
    parts *= ways.WAYS[way].channels
    values = {
        "N": n * parts,
        "C": channels,
        "X": RNG.normal(mean, 1, (n * parts, channels)).astype(np.float32),
        "W": RNG.normal(size=(n * parts, channels)).astype(np.float32),
        "PARAMS": BNParams(*np.ones((2, channels), np.float32)),
        "STATE": BNState(
            np.full(channels, mean, np.float32),
            np.ones(channels, np.float32),
            np.zeros(channels, np.int32),
        ),
    }
    for name, value in values.items():
        monkeypatch.setattr(ways, name, value)
    ways.on_one_device.cache_clear()
    try:
        found = across.measure(ways.WAYS[way], devices[:parts], masked=False).differences
    finally:
        ways.on_one_device.cache_clear()
    assert max(found.values()) <= tolerances.values(np.float32, n * parts)


@pytest.mark.parametrize("vma", [True, False])
def test_running_statistics_that_vary_where_x_does_not(vma, devices):
    """A layer for each device, all on the same large array; axes that no layer names."""
    x = jnp.asarray(RNG.normal(size=(MANY, 16)) + 2, jnp.float32)
    params, state = bnjax.bn_init(16)
    means = jnp.broadcast_to(jnp.arange(4.0)[:, None], (4, 16))
    states = jax.tree.map(lambda v: jnp.broadcast_to(v, (4, 16)), state)._replace(mean=means)

    def step(state, x):
        state = jax.tree.map(lambda v: v[0], state)
        y, new = bnjax.bn_apply(params, state, x, True, momentum=0.0)
        return y[None], jax.tree.map(lambda v: v[None], new)

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("m",), devices=devices[:4], axis_types=auto)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("m"), P()), out_specs=P("m"), check_vma=vma)
    y, new = jax.jit(mapped)(states, x)
    expected, alone = jax.jit(lambda x: bnjax.bn_apply(params, state, x, True, momentum=0.0))(x)
    for i in range(4):
        np.testing.assert_allclose(y[i], expected, atol=1e-5)
        np.testing.assert_allclose(new.var[i], alone.var, rtol=1e-5)

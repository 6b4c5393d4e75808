"""bnjax.recalibrate: its numbers, of functions; linen and nnx in test_population_models.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tolerances
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import assert_close, error

import bnjax
from bnjax import BNParams, BNState, recalibrate

RNG = np.random.default_rng(0)
C = 4
EPSILON = 1e-5
DEEP = 3
# Of few different sizes, as each is compiled for.
SIZES = {"ones": [1] * 9, "twos": [2] * 6, "uneven": [5, 1, 0, 5, 2, 5], "one batch": [5]}
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def layer(variables, batch, **options):
    """One layer; a batch may come with a mask."""
    x, mask = batch if isinstance(batch, tuple) else (batch, None)
    return bnjax.bn_apply(*variables, x, False, mask=mask, epsilon=EPSILON, **options)


def looped(variables, x):
    """The layer, called on each example by itself."""
    params, state = variables

    def body(state, x):
        return bnjax.bn_apply(params, state, x, False)[::-1]

    state, y = jax.lax.scan(body, state, x)
    return y, (params, state)


def data(sizes, mean=0.0, masked=False):
    """Batches of different means, with masks: channel 2 empty in every other, 3 in all."""
    batches = []
    for i, n in enumerate(sizes):
        x = RNG.normal(RNG.normal(mean, 1, C), 1.5, (n, 3, C)).astype(np.float32)
        mask = RNG.random((n, 3, C)) < 0.6
        mask[..., 2] &= bool(i % 2)
        mask[..., 3] = False
        batches.append((x, mask) if masked else x)
    return batches


def whole(batches):
    """The float64 oracle, of all entries at once."""
    if isinstance(batches[0], tuple):
        x, mask = (np.concatenate(v) for v in zip(*batches, strict=True))
        return reference.moments(x, mask=mask)
    return reference.moments(np.concatenate(batches))


def check(state, expected, mean=0.0, channels=slice(None)):
    """To the rounding of moments of one array of that size."""
    n = int(expected.count.max())
    apart = np.abs(state.mean - expected.mean)[channels]
    assert np.all(apart <= tolerances.mean(np.float32, n) * np.abs(expected.mean).max())
    ratio = (np.asarray(state.var, np.float64) / np.maximum(expected.var, 1e-30))[channels]
    assert np.all(np.abs(ratio - 1) <= tolerances.variance(np.float32, n, mean)), ratio - 1


BATCHES = data([5])


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
@pytest.mark.parametrize("sizes", SIZES)
def test_pooled_is_all_data_at_once(sizes, mean):
    batches = data(SIZES[sizes], mean)
    variables = bnjax.bn_init(C)
    params, state = recalibrate(layer, variables, batches)
    check(state, whole(batches), mean)
    assert np.all(state.count == sum(len(x) > 0 for x in batches))
    chex.assert_trees_all_equal(params, variables[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, variables[1])


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_masks(mean):
    """Also those that leave a channel without entries, in some batches or in all."""
    batches = data([5, 1, 0, 5, 1, 5], mean, masked=True)
    params, state = bnjax.bn_init(C)
    old = BNState(state.mean + 5, state.var * 7, state.count + 11)
    state = recalibrate(layer, (params, old), batches)[1]
    expected = whole(batches)
    assert expected.count[2] > 2 and expected.count[3] == 0
    check(state, expected, mean, slice(3))
    assert [float(v[3]) for v in state] == [5, 7, 11]
    assert state.count[0] == sum(mask[..., 0].any() for _, mask in batches)
    assert state.count[2] == sum(mask[..., 2].any() for _, mask in batches) < state.count[0]


def test_rounding_does_not_add_up():
    """Over two thousand small batches, at a large mean."""
    x = RNG.normal(30, 1, (2000, 3, C)).astype(np.float32) + np.arange(C, dtype=np.float32)
    check(recalibrate(layer, bnjax.bn_init(C), iter(x))[1], whole(list(x)), 30)


def test_statistics_in_float64(x64):
    batches = [x.astype(np.float64) + 1e6 for x in data([5, 5])]
    variables = bnjax.bn_init(C, param_dtype=jnp.float64)
    expected = whole(batches)
    state = recalibrate(layer, variables, batches)[1]
    np.testing.assert_allclose(state.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(state.var, expected.var, rtol=1e-9)
    # Data more precise than the statistics, which a loop carries.
    rounded = recalibrate(looped, bnjax.bn_init(C), batches)[1]
    chex.assert_trees_all_equal_dtypes(rounded, bnjax.bn_init(C)[1])
    np.testing.assert_allclose(rounded.var, expected.var, rtol=1e-5)


def test_restored_statistics():
    """As a checkpoint has them: NumPy, float64."""
    state = BNState(np.zeros(C), np.ones(C), np.zeros(C, np.int32))
    x = data([5])
    check(recalibrate(layer, (bnjax.bn_init(C)[0], state), x)[1], whole(x))


def shard_mapped(mesh, check_vma):
    def model(variables, batch):
        call = jax.shard_map(
            functools.partial(layer, axis_name="i"),
            mesh=mesh, in_specs=(P(), P("i")), out_specs=(P("i"), P()), check_vma=check_vma,
        )  # fmt: skip
        return call(variables, batch)

    return model


@pytest.mark.parametrize("way", ["jit", "explicit", "check_vma", "no check_vma"])
def test_eight_devices(way, devices):
    """With masks that leave some devices nothing, and others all."""
    if way == "explicit":  # which has channels apart, too
        mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Explicit,) * 2)
    else:
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    batches = data([24, 24, 8], 1e3, masked=True)
    for x, mask in batches:
        mask[: len(x) // 8] = False
        mask[-len(x) // 8 :, ..., :3] = True
        mask[..., 3] = mask[..., 2]
    model = layer if way in ("jit", "explicit") else shard_mapped(mesh, way == "check_vma")
    with jax.set_mesh(mesh):
        spec = P("i", None, "j") if way == "explicit" else P("i")
        sharded = jax.device_put(batches, NamedSharding(mesh, spec))
        state = recalibrate(model, bnjax.bn_init(C), sharded)[1]
    check(jax.device_get(state), whole(batches), 1e3)


def chain(variables, x):
    """Layers in a row, each of inputs that bend the outputs of the one before."""
    new = []
    for params, state in variables:
        y, state = bnjax.bn_apply(params, state, x, False, epsilon=EPSILON)
        new.append((params, state))
        x = jnp.tanh(y) @ KERNEL
    return x, new


KERNEL = RNG.normal(0, 1, (C, C)).astype(np.float32)


def chain_oracle(variables, x):
    """In float64, of all data as one batch."""
    x, found = np.asarray(x, np.float64), []
    for params, _ in variables:
        m = reference.moments(x)
        found.append(m)
        inputs = reference.Inputs(x, params.scale, params.bias, m.mean, m.var, EPSILON)
        x = np.tanh(reference.forward(inputs, train=False).y) @ KERNEL.astype(np.float64)
    return found


def deep():
    params, state = bnjax.bn_init(C)
    return [(BNParams(params.scale * 1.5, params.bias + 0.25 * i), state) for i in range(DEEP)]


def test_as_many_passes_as_layers_are_exact():
    """And fewer are not, in as many layers at the end."""
    x = RNG.normal(2, 3, (18, C)).astype(np.float32)
    x *= np.repeat([1, 0.5, 2], 6)[:, None].astype(np.float32)
    batches = [x[:6], x[6:12], x[12:]]
    expected = chain_oracle(deep(), x)
    once = recalibrate(chain, deep(), [x])
    for passes in (1, 2, DEEP):
        found = recalibrate(chain, deep(), batches, passes=passes)
        for i in range(DEEP):
            wrong = max(
                error(found[i][1].mean, expected[i].mean), error(found[i][1].var, expected[i].var)
            )
            assert (wrong > 0.01) == (i >= passes), (passes, i, wrong)
            if i < passes:
                close(found[i][1][:2], tuple(expected[i][:2]))
    close([s[:2] for _, s in once], [tuple(m[:2]) for m in expected])
    assert all(np.all(state.count == 3) for _, state in found)


def averages(batches):
    """Algorithm 2 of Ioffe & Szegedy, in float64."""
    parts = [reference.moments(x) for x in batches if len(x) > 1]
    variances = [m.var * m.count / (m.count - 1) for m in parts]
    return np.mean([m.mean for m in parts], 0), np.mean(variances, 0)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("sizes", [[2, 2, 2], [5, 2, 5, 5, 2]], ids=str)
def test_algorithm_2(sizes, mean):
    batches = [x[:, 0] for x in data(sizes, mean)]
    state = recalibrate(layer, bnjax.bn_init(C), batches, method="average")[1]
    expected = averages(batches)
    close(state.mean, expected[0])
    np.testing.assert_allclose(state.var, expected[1], rtol=1e-5)
    pooled = whole(batches)
    assert error(pooled.var, expected[1]) > 0.01
    assert np.all(state.count == len(sizes))


def test_algorithm_2_passes_over_batches_of_one():
    """Of which there is no unbiased variance, nor is their mean taken."""
    batches = [x[:, 0] for x in data([1, 5, 0, 1, 2])]
    found = [
        recalibrate(layer, bnjax.bn_init(C), some, method="average")[1]
        for some in (batches, [batches[1], batches[4]])
    ]
    chex.assert_trees_all_close(*found, rtol=1e-6)
    close(found[0][:2], averages(batches))
    with pytest.warns(UserWarning, match="saw too few"):
        kept = recalibrate(layer, bnjax.bn_init(C), batches[:1], method="average")[1]
    chex.assert_trees_all_equal(kept, bnjax.bn_init(C)[1])


@pytest.mark.parametrize("method", ["pooled", "average"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_non_finite(method, bad):
    """Its channel passes over that batch; a channel with nothing else keeps its statistics."""
    batches = data([5, 5, 5])
    batches[1][2, 0, 0] = bad
    if bad == 3e38:  # finite, its variance is not
        batches[1][3, 0, 0] = -bad
    for x in batches:
        x[0, 0, 1] = np.nan
    params, old = bnjax.bn_init(C)
    old = old._replace(mean=old.mean + 5)
    state = recalibrate(layer, (params, old), batches, method=method)[1]
    for channel, kept in ((0, [0, 2]), (2, [0, 1, 2])):
        expected = recalibrate(layer, (params, old), [batches[i] for i in kept], method=method)[1]
        np.testing.assert_allclose(
            [v[channel] for v in state], [v[channel] for v in expected], rtol=1e-6
        )
    assert state.mean[1] == 5 and state.count.tolist() == [2, 0, 3, 3]


def test_layers_without_data_are_kept_and_named():
    def model(variables, x):
        y, state = bnjax.bn_apply(*variables["used"], x, False)
        return y, {"used": (None, state)}

    variables = {"used": bnjax.bn_init(C), "other": bnjax.bn_init(C)}
    with pytest.warns(UserWarning, match=r"not called.*\['other/1'\]") as caught:
        new = recalibrate(model, variables, data([5, 5]), passes=2)
    assert [w.filename for w in caught] == [__file__]
    chex.assert_trees_all_equal(new["other"], variables["other"])
    assert np.all(new["used"][1].count == 2)
    nan = [np.full((5, 3, C), np.nan, np.float32)]
    with pytest.warns(UserWarning, match="saw too few finite entries"):
        state = recalibrate(layer, bnjax.bn_init(C), nan)[1]
    chex.assert_trees_all_equal(state, bnjax.bn_init(C)[1])

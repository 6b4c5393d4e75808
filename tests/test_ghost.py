"""Ghost batches: each group by its own moments, one set of running statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tolerances
from benchmark_scripts import hlo
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from messages import check_message

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import BNParams, BNState

N, C, SIZE = 64, 6, 16
P = PartitionSpec
RNG = np.random.default_rng(0)
# Groups that differ, so that the variance of their means counts.
X = (RNG.normal(3, 2, (N, C)) + np.repeat(RNG.normal(0, 3, (N // SIZE, C)), SIZE, 0)).astype("f")
W = RNG.normal(size=(N, C)).astype(np.float32)
PARAMS = BNParams(*RNG.uniform(0.5, 1.5, (2, C)).astype(np.float32))
STATE = BNState(*RNG.uniform(1, 2, (2, C)).astype(np.float32), np.ones(C, np.int32))
U, V = RNG.normal(size=(2, C)).astype(np.float32)
MASK = RNG.random((N, C)) < np.linspace(0.1, 1, N)[:, None]
MASK[:SIZE, 0] = False  # a group without entries in a channel


def inputs_of(x, mean=STATE.mean, var=STATE.var):
    return reference.Inputs(x, PARAMS.scale, PARAMS.bias, mean, var, 1e-5)


def oracle(x, size, *, axis=-1, mask=None, **options):
    """y of each group, and the state of the whole, in float64."""
    cuts = range(size, x.shape[0], size)
    masks = [None] * (len(cuts) + 1) if mask is None else np.split(mask, cuts)
    groups = [
        reference.forward(inputs_of(part), axis=axis, mask=m).y
        for part, m in zip(np.split(x, cuts), masks, strict=True)
    ]
    whole = reference.forward(inputs_of(x), axis=axis, mask=mask, count=1, **options)
    return np.concatenate(groups), whole[1:]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size, uneven", [(16, False), (64, False), (24, True), (100, True)])
def test_groups_by_their_own_moments_state_by_all(size, uneven, masked):
    mask = MASK if masked else None
    norm = bnjax.ghost(size, uneven=uneven, momentum=0.7, unbiased=True)
    y, new = jax.jit(functools.partial(norm.apply, train=True))(PARAMS, STATE, X, mask=mask)
    expected, state = oracle(X, size, mask=mask, momentum=0.7, unbiased=True)
    tolerances.assert_close((y, tuple(new)), (expected, state), jnp.float32, N)


@pytest.mark.parametrize("axis", [1, -1, (1, 2)])
def test_images(axis):
    x = RNG.normal(2, 3, (6, C, 4, C)).astype(np.float32)
    features = tuple(x.shape[a] for a in np.atleast_1d(axis))
    params, state = bnjax.bn_init(features)
    y, new = bnjax.ghost(2, axis=axis, momentum=0.0).apply(params, state, x, True)
    inputs = [reference.Inputs(part, 1, 0, 0, 1, 1e-5) for part in np.split(x, 3)]
    expected = np.concatenate([reference.forward(i, axis=axis).y for i in inputs])
    tolerances.assert_close(y, expected, jnp.float32, 48)
    moments = reference.moments(x, axis=axis)
    tolerances.assert_close((new.mean, new.var), tuple(moments[:2]), jnp.float32, 144)


def test_feature_axis_first():
    norm = bnjax.ghost(SIZE, axis=0)
    y, new = norm.apply(PARAMS, STATE, X.T, True)
    expected, state = oracle(X, SIZE)
    tolerances.assert_close((y.T, tuple(new)), (expected, state), jnp.float32, N)


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(masked):
    """Both modes, of y and of the new state, against complex steps through the oracle."""
    mask = MASK if masked else None
    dx = RNG.normal(size=X.shape)

    def f(x):
        y, new = bnjax.ghost(SIZE, momentum=0.5).apply(PARAMS, STATE, x, True, mask=mask)
        return y, new.mean, new.var

    def exact(x):
        y, state = oracle(x, SIZE, mask=mask, momentum=0.5)
        return y, *state[:2]

    _, along = jax.jit(lambda x, d: jax.jvp(f, (x,), (d,)))(X, dx.astype(np.float32))
    expected = reference.directional(exact, X, dx.astype(np.float32))
    tolerances.assert_close(along, expected, jnp.float32, N)
    (back,) = jax.jit(lambda x, w: jax.vjp(f, x)[1](w))(X, (W, U, V))
    product = sum(np.vdot(w, e) for w, e in zip((W, U, V), expected, strict=True))
    assert np.vdot(back, dx) == pytest.approx(product, rel=tolerances.values(jnp.float32, N))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [False, True])
def test_second_order(masked):
    mask = MASK[:8, :2] if masked else None
    params, state = bnjax.bn_init(2, param_dtype=jnp.float64)

    def f(params, x):
        y, new = bnjax.ghost(4, epsilon=1.0).apply(params, state, x, True, mask=mask)
        return y * W[:8, :2], new.mean, new.var

    x = jnp.asarray(X[:8, :2], jnp.float64)
    jax.test_util.check_grads(f, (params, x), 2, ("fwd", "rev"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["as it comes", "sorted", "outlier", "first apart"])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e4])
def test_accurate_at_any_mean(mean, order):
    """Also where the part of a group that tells about its mean tells least."""
    n = 4096
    x = RNG.normal(size=(2 * n, 3))
    if order == "sorted":
        x = np.sort(x, 0)
    if order in ("outlier", "first apart"):
        x[: 1 if order == "outlier" else n // 8] -= 1e3
    x = (x + mean).astype(np.float32)
    params, state = bnjax.bn_init(3)
    y, new = bnjax.ghost(n, momentum=0.0, epsilon=0.0).apply(params, state, x, True)
    bound = tolerances.variance(jnp.float32, 2 * n, mean)
    np.testing.assert_allclose(new.var, x.var(0, dtype=np.float64), rtol=bound)
    groups = x.reshape(2, n, 3).astype(np.float64)
    expected = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
    tolerances.assert_close(y, expected.reshape(2 * n, 3), jnp.float32, n)


def test_nan_stays_in_its_group_and_out_of_the_state():
    x = X.copy()
    x[SIZE, 0] = np.nan
    y, new = bnjax.ghost(SIZE).apply(PARAMS, STATE, x, True)
    poisoned = np.zeros((N, C), bool)
    poisoned[SIZE : 2 * SIZE, 0] = True
    np.testing.assert_array_equal(np.isnan(y), poisoned)
    assert new.mean[0] == STATE.mean[0] and new.var[0] == STATE.var[0]
    np.testing.assert_array_equal(new.count, [1, 2, 2, 2, 2, 2])


def collectives(program):
    """Those outside of branches: (name, floats moved)."""
    found = hlo.collectives(program.as_text())
    return [(c.kind, c.bytes // 4) for c in found if c.place != "branch"]


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("masked", [False, True])
def test_no_communication_but_for_the_state(types, masked, devices):
    """A batch sharded under jit, a group on each device: y and derivatives are local."""
    mesh = jax.make_mesh((len(devices),), ("i",), axis_types=(types,))
    norm = bnjax.ghost(N // len(devices), momentum=0.5)
    mask = MASK if masked else None

    def derivatives(x, w, mask):
        y, pull = jax.vjp(lambda x: norm.apply(PARAMS, STATE, x, True, mask=mask)[0], x)
        return y, pull(w)[0]

    def of_params(x, w, mask):
        return jax.grad(lambda p: jnp.sum(w * norm.apply(p, STATE, x, True, mask=mask)[0]))(PARAMS)

    def both(x, mask):
        return norm.apply(PARAMS, STATE, x, True, mask=mask)

    with jax.set_mesh(mesh):
        x, w, m = (
            None if v is None else jax.device_put(v, NamedSharding(mesh, P("i")))
            for v in (X, W, mask)
        )
        local = jax.jit(derivatives).lower(x, w, m).compile()
        assert collectives(local) == []
        y, dx = local(x, w, m)
        assert y.sharding.is_equivalent_to(x.sharding, 2) and dx.sharding == y.sharding
        whole = jax.jit(both).lower(x, m).compile()
        (found,) = collectives(whole)
        assert found == ("all-reduce", (3 if masked else 2) * C)
        # What data parallelism takes, not of each group.
        (found,) = collectives(jax.jit(of_params).lower(x, w, m).compile())
        assert found == ("all-reduce", 2 * C)
        # The way to see that the count sees: batch_norm couples the devices.
        plain = jax.jit(lambda x: bnjax.bn_apply(PARAMS, STATE, x, True)[0]).lower(x).compile()
        assert collectives(plain)
        y, new = whole(x, m)
    expected, state = oracle(X, N // len(devices), mask=mask, momentum=0.5)
    tolerances.assert_close((y, tuple(new)), (expected, state), jnp.float32, N)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("norm", [bnjax.batch_norm(), bnjax.ghost(4), bnjax.microbatches(1)])
@pytest.mark.parametrize("name", [None, "j"])
def test_a_mesh_axis_that_is_not_synchronized(norm, name):
    """Replicas on their own, from one state: all that a loop carries varies over that axis."""
    mesh = jax.make_mesh((4, 2), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    params, state = norm.init(C)

    def f(x):
        y, new = norm.apply(params, state, x, True, axis_name=name)
        return y, jax.tree.map(lambda v: v[None], new)

    specs = {
        "in_specs": P(("i", "j")),
        "out_specs": (P(("i", "j")), P("i" if name else ("i", "j"))),
    }
    found = jax.jit(jax.shard_map(f, mesh=mesh, **specs))(X)
    y, states = jax.vmap(jax.vmap(f, axis_name="j"))(X.reshape(4, 2, -1, C))
    states = jax.tree.map(lambda v: (v[:, 0] if name else v).reshape(-1, C), states)
    tolerances.assert_close(found, (y.reshape(N, C), states), jnp.float32, N)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("way", ["vmap", "pmap", "shard_map", "shard_map without vma"])
def test_mapped_axes_merge_the_state_only(way):
    def f(x, mask):
        return bnjax.ghost(4, momentum=0.5, axis_name="i").apply(PARAMS, STATE, x, True, mask=mask)

    if way.startswith("shard_map"):
        mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
        shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=way == "shard_map")
        y, new = jax.jit(shard(f, in_specs=P("i"), out_specs=(P("i"), P())))(X, MASK)
    else:
        transform = jax.pmap if way == "pmap" else jax.vmap
        y, states = transform(f, axis_name="i")(X.reshape(8, 8, C), MASK.reshape(8, 8, C))
        new = jax.tree.map(lambda v: v[3], states)
    expected, state = oracle(X, 4, mask=MASK, momentum=0.5)
    tolerances.assert_close((np.reshape(y, X.shape), tuple(new)), (expected, state), jnp.float32, N)


def test_modules_are_the_function():
    norm = bnjax.ghost(SIZE, momentum=0.5)
    layer = bnjax.linen.BatchNorm(norm=norm)
    # A first batch of one example, which makes no group.
    variables = layer.init(jax.random.key(0), X[:1], use_running_average=False)
    y, new = layer.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    other = bnjax.nnx.BatchNorm(C, norm=norm, rngs=nnx.Rngs(0))
    params, state = norm.init(C)
    expected, updated = norm.apply(params, state, jnp.asarray(X), True)
    for found in (y, other(X)):
        np.testing.assert_array_equal(found, expected)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(new["batch_stats"][name], getattr(updated, name))
        np.testing.assert_array_equal(getattr(other, name)[...], getattr(updated, name))


GHOST = bnjax.ghost(SIZE, momentum=0.5)
REFUSED = {
    "zero": (lambda: bnjax.ghost(0), (ValueError, "size", "at least 1", "0", "")),
    "float": (lambda: bnjax.ghost(2.0), (TypeError, "size", "an int", "2.0", "")),
    "uneven": (
        lambda: bnjax.ghost(2, uneven=1),
        (TypeError, "uneven", "True or False", "1", ""),
    ),
    "option": (
        lambda: bnjax.ghost(2, moments=1),
        (TypeError, "ghost", "options of `bn_apply`", "moments", ""),
    ),
    "option in the call": (
        lambda: GHOST.apply(PARAMS, STATE, X, True, moments=1),
        (TypeError, "ghost", "options of `bn_apply`", "moments", ""),
    ),
    "bound": (
        lambda: GHOST.apply(PARAMS, STATE, X, True, momentum=0.9),
        (TypeError, "momentum", "bound to 0.5 by ghost", "0.9", "in one place"),
    ),
    "not divisible": (
        lambda: GHOST.apply(PARAMS, STATE, X[:60], True),
        (ValueError, "size", "divide the 60 examples", "16", "ghost(4), or ghost(16, uneven=True)"),
    ),
    "fewer examples": (
        lambda: GHOST.apply(PARAMS, STATE, X[:10], True),
        (ValueError, "size", "divide the 10 examples", "16", "ghost(2), or"),
    ),
    "no examples": (
        lambda: GHOST.apply(PARAMS, STATE, X[0], True),
        (ValueError, "x", "axis of examples", "(6,)", "x[None]"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    check_message(*REFUSED[name])


def test_groups_across_explicit_shards_are_refused(devices):
    mesh = jax.make_mesh((len(devices),), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, P("i"))
        check_message(
            lambda: GHOST.apply(PARAMS, STATE, x, True),
            (ValueError, "size", "over its 8 shards", "4 groups of 16", "a size that divides 8"),
        )
        check_message(
            lambda: bnjax.ghost(6, uneven=True).apply(PARAMS, STATE, x, True),
            (ValueError, "size", "equal size", "11 groups of 6", "a size that divides 8"),
        )


def test_inference_and_empty_batches():
    y, new = GHOST.apply(PARAMS, STATE, X[:5], False)
    np.testing.assert_array_equal(y, bnjax.bn_apply(PARAMS, STATE, X[:5], False)[0])
    np.testing.assert_array_equal(new, STATE)
    y, new = GHOST.apply(PARAMS, STATE, X[:0], True)
    assert y.shape == (0, C)
    np.testing.assert_array_equal(new, STATE)


@pytest.mark.parametrize("shape, uneven, examples", [("4*groups", False, 8), ("batch", True, 9)])
def test_symbolic_batches(shape, uneven, examples):
    """Of jax.export: any number of groups, or of examples where they may be uneven."""
    norm = bnjax.ghost(4, uneven=uneven)
    params, state = norm.init(3)

    def function(x):
        y, new = norm.apply(params, state, x, True)
        return y, tuple(new)

    x = jax.random.normal(jax.random.key(0), (examples, 3))
    (batch,) = export.symbolic_shape(shape)
    given = jax.ShapeDtypeStruct((batch, 3), x.dtype)
    found = export.export(jax.jit(function))(given).call(x)
    tolerances.assert_close(found, jax.jit(function)(x), jnp.float32, examples)


def test_a_symbolic_batch_that_may_be_uneven_is_refused():
    norm = bnjax.ghost(4)
    params, state = norm.init(3)
    given = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), 3), jnp.float32)
    with pytest.raises(ValueError, match=r"symbolic number batch.*'4\*groups'"):
        jax.eval_shape(lambda x: norm.apply(params, state, x, True)[0], given)

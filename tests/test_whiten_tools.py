"""Whitening in Flax models, on several devices, and with the tools."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tolerances
from benchmark_scripts import hlo
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from messages import check_message

import bnjax.nnx
from bnjax import WhitenState, fold, interop
from bnjax.diagnostics import Monitor, report
from bnjax.linen import BatchNorm

N, C, G = 48, 4, 2
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(N, C)) @ RNG.normal(size=(C, C)) + 5).astype("f")
W = RNG.normal(size=(N, C)).astype("f")
MASK = RNG.random((N, 1)) < np.linspace(0.3, 1, N)[:, None]
MASK[:8] = False  # devices without entries
NORM = bnjax.whiten(G, momentum=0.5)
PARAMS, STATE = NORM.init(C)


def covariances(x):
    z = np.asarray(x, np.float64) - x.mean(0, dtype=np.float64)
    return np.stack([z[:, i : i + G].T @ z[:, i : i + G] / len(x) for i in range(0, C, G)])


def moments(x):
    return x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64), covariances(x)


def assert_statistics(found, x):
    tolerances.assert_close(tuple(found), moments(x), jnp.float32, N)


def gradients(params, x, w, mask=None, norm=NORM, **options):
    """y, gradients by x and the parameters, and the new state."""

    def f(params, x):
        return norm.apply(params, STATE, x, True, mask=mask, **options)

    y, vjp, new = jax.vjp(f, params, x, has_aux=True)
    of_params, of_x = vjp(w)
    return y, of_x, new, of_params


@functools.cache
def on_one_device(masked):
    return jax.jit(gradients)(PARAMS, X, W, MASK if masked else None)


def assert_one_each(program, *args):
    """All-reduces outside of conditionals, forward and backward; and what the program returns."""
    compiled = program.lower(*args).compile()
    places = [c.place for c in hlo.collectives(compiled.as_text()) if c.bytes > 1]
    assert places.count("always") == 2, places
    return compiled(*args)


@pytest.mark.parametrize("types, masked", [(AxisType.Auto, True), (AxisType.Explicit, False)])
def test_sharded_batch(types, masked, devices):
    mesh = jax.make_mesh((len(devices),), ("i",), axis_types=(types,))
    with jax.set_mesh(mesh):
        args = (X, W, MASK) if masked else (X, W)
        args = [jax.device_put(v, NamedSharding(mesh, PartitionSpec("i"))) for v in args]
        found = assert_one_each(jax.jit(gradients), PARAMS, *args)
    tolerances.assert_close(found, on_one_device(masked), jnp.float32, N)


def test_sharded_channels(devices):
    """Groups stay where they are."""
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Explicit,), devices=devices[:2])
    with jax.set_mesh(mesh):
        args = [jax.device_put(v, NamedSharding(mesh, PartitionSpec(None, "i"))) for v in (X, W)]
        compiled = jax.jit(gradients).lower(PARAMS, *args).compile()
        found = compiled(PARAMS, *args)
    assert found[0].sharding.spec == PartitionSpec(None, "i")
    assert {c.kind for c in hlo.collectives(compiled.as_text()) if c.place == "always"} <= {
        "all-gather"  # of the state, which is not sharded
    }
    tolerances.assert_close(found, on_one_device(False), jnp.float32, N)


@pytest.mark.parametrize(
    "check_vma, method", [(True, "newton-schulz"), (True, "eigh"), (False, "eigh")]
)
def test_shard_map(check_vma, method, devices):
    mesh = jax.make_mesh((len(devices),), ("i",), axis_types=(AxisType.Auto,))
    norm = bnjax.whiten(G, momentum=0.5, method=method)

    def shard(params, x, w, mask):
        y, of_x, new, of_params = gradients(params, x, w, mask, norm, axis_name="i")
        if not check_vma:  # else they are the sum already
            of_params = jax.lax.psum(of_params, "i")
        return y, of_x, new, of_params

    each, same = PartitionSpec("i"), PartitionSpec()
    f = jax.jit(
        jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(same, each, each, each),
            out_specs=(each, each, same, same),
            check_vma=check_vma,
        )
    )
    found = assert_one_each(f, PARAMS, X, W, MASK) if check_vma else f(PARAMS, X, W, MASK)
    tolerances.assert_close(found, on_one_device(True), jnp.float32, N)


def test_groups_of_devices(devices):
    """pmap with axis_index_groups, and vmap with a name."""
    parts, masks = X.reshape(4, -1, C), MASK.reshape(4, -1, 1)
    f = functools.partial(NORM.apply, PARAMS, STATE, train=True, axis_name="i")
    groups = [[0, 1], [2, 3]]
    found = jax.pmap(
        lambda x, mask: f(x, mask=mask, axis_index_groups=groups),
        axis_name="i",
        devices=devices[:4],
    )(parts, masks)
    halves = jax.jit(jax.vmap(jax.vmap(lambda x, mask: f(x, mask=mask), axis_name="i")))
    wanted = halves(parts.reshape(2, 2, -1, C), masks.reshape(2, 2, -1, 1))
    wanted = jax.tree.map(lambda v: v.reshape(4, *v.shape[2:]), wanted)
    tolerances.assert_close(found, wanted, jnp.float32, N)
    expected, _ = reference.whiten(PARAMS, STATE, X[24:], MASK[24:], W[24:], None, momentum=0.5)
    tolerances.assert_close(wanted[0][2:].reshape(24, C), expected.y, jnp.float32, N)
    statistics = [wanted[1].mean[3], wanted[1].var[3], wanted[1].cov[3]]
    tolerances.assert_close(statistics, list(expected[1:]), jnp.float32, N)


class Net(nn.Module):
    norm: bnjax.Norm

    @nn.compact
    def __call__(self, x, train=False):
        x = BatchNorm(not train, norm=self.norm)(x)
        x = nn.Dense(3)(x)
        return BatchNorm(not train)(x)


NET = Net(NORM)
VARIABLES = NET.init(jax.random.key(0), X)


class Layers(nnx.Module):
    def __init__(self, norm=NORM):
        self.bn = bnjax.nnx.BatchNorm(C, norm=norm, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.bn(x)


def test_modules():
    """linen = nnx = the function, and what they store."""
    layer, other = BatchNorm(norm=NORM), Layers()
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    expected, state = NORM.apply(PARAMS, STATE, X, True)
    y, new = layer.apply(variables, X, use_running_average=False, mutable=["batch_stats"])
    assert set(new["batch_stats"]) == {"mean", "var", "cov"}
    for found in (y, other(X)):
        np.testing.assert_array_equal(found, expected)
    for name in ("mean", "var", "cov"):
        np.testing.assert_array_equal(new["batch_stats"][name], getattr(state, name))
        np.testing.assert_array_equal(getattr(other.bn, name)[...], getattr(state, name))
    evaluated = layer.apply({**variables, **new}, X, use_running_average=True)
    other.eval()
    np.testing.assert_array_equal(other(X), evaluated)
    plain = {"batch_stats": {k: v for k, v in new["batch_stats"].items() if k != "cov"}}
    with pytest.raises(ValueError, match=r"must hold .*'cov'.* got none for"):
        layer.apply({**variables, **plain}, X, use_running_average=True)
    wrong = {"batch_stats": {**new["batch_stats"], "cov": jnp.ones((1, C, C))}}
    with pytest.raises(ValueError, match=r"batch_stats/cov.*\(2, 2, 2\), got \(1, 4, 4\)"):
        layer.apply({**variables, **wrong}, X, use_running_average=True)


def test_several_feature_axes():
    """Channels in ascending order of axis, wherever the axes are; masks of any reduced axis."""
    x = RNG.normal(size=(2, 6, 5, 4)).astype("f")
    mask = RNG.random((1, 1, 5, 1)) < 0.7
    norm = bnjax.whiten(3, momentum=0.5)
    y, new = norm.apply(*norm.init((6, 4)), x, True, axis=(3, 1), mask=mask)
    flat = x.transpose(1, 3, 0, 2).reshape(24, 10)
    rows = np.tile(mask.reshape(1, 5), (1, 2))
    expected, wanted = norm.apply(*norm.init(24), flat, True, axis=0, mask=rows)
    back = expected.reshape(6, 4, 2, 5).transpose(2, 0, 3, 1)
    found = (y, new.mean.reshape(24), new.cov)
    tolerances.assert_close(found, (back, wanted.mean, wanted.cov), jnp.float32, N)


def test_jax_is_strict():
    """Strict promotion, no NaN on the way, half precision in and out."""
    x = jnp.asarray(X, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        f = jax.jit(lambda x: NORM.apply(PARAMS, STATE, x, True, mask=MASK)[0])
        dx = jax.grad(lambda x: f(x).astype(jnp.float32).sum())(x)
    assert dx.dtype == jnp.bfloat16


def test_recalibrate_functions():
    """Batches of any sizes, pooled and averaged; one with NaN is passed over by its group."""

    def model(variables, x):
        return NORM.apply(*variables, x, False)

    batches = [X[:8], X[8:]]
    _, state = bnjax.recalibrate(model, (PARAMS, STATE), batches)
    assert_statistics((state.mean, state.var, state.cov), X)
    bad = batches[0].copy()
    bad[0, 0] = np.nan
    _, state = bnjax.recalibrate(model, (PARAMS, STATE), [bad, batches[1]], method="average")
    np.testing.assert_array_equal(state.count, [1, 1, 2, 2])
    one, other = (covariances(b) * len(b) / (len(b) - 1) for b in batches)
    expected = np.stack([other[0], (one[1] + other[1]) / 2])
    tolerances.assert_close(state.cov, expected, jnp.float32, N)


def test_recalibrate_compares_covariances():
    """Channels whose variances agree from the first batch on, but not how they move together."""
    signs = [1, 1, 1, 1, -1, -1, -1, -1] + [1, -1] * 8
    pair = np.repeat(RNG.normal(size=(1, 32, 2)), len(signs), 0)
    batches = np.stack([pair[..., 0], np.transpose(signs)[:, None] * pair[..., 0]], -1).astype("f")
    taken = []

    def model(variables, x):
        return bnjax.whiten(2).apply(*variables, x, False)

    def run(tolerance):
        taken.clear()
        shown = (taken.append(b) or b for b in batches - batches.mean((0, 1)))
        bnjax.recalibrate(model, bnjax.whiten(2).init(2), shown, tolerance=tolerance)
        return len(taken)

    assert run(0.5) == 16
    assert run(2.5) == 8


def test_recalibrate_modules():
    batches = [X[:24], X[24:]]
    layer = BatchNorm(True, norm=NORM)
    found = bnjax.recalibrate(layer, layer.init(jax.random.key(0), X), batches)["batch_stats"]
    assert_statistics((found[k] for k in ("mean", "var", "cov")), X)
    model = Layers()
    bnjax.recalibrate(model, None, batches)
    assert_statistics((v[...] for v in (model.bn.mean, model.bn.var, model.bn.cov)), X)


def test_merge_states():
    """Covariances of the means count, too; a replica that saw nothing does not."""
    parts = [(X[:16], 3), (X[16:], 5), (X[:2] * 100, 0)]
    states = [
        WhitenState(*(jnp.asarray(v, jnp.float32) for v in (m, s)), np.full(C, n, np.int32), c)
        for (m, s, c), n in ((moments(x), n) for x, n in parts)
    ]
    states = [s._replace(cov=jnp.asarray(s.cov, jnp.float32)) for s in states]
    found = bnjax.merge_states(states, weights=[16, 32, 9])
    assert_statistics((found.mean, found.var, found.cov), X)
    np.testing.assert_array_equal(found.count, 8)
    trees = [{"bn": {k: getattr(s, k) for k in ("mean", "var", "cov")}} for s in states[:2]]
    found = bnjax.merge_states(trees, weights=[16, 32])["bn"]
    assert_statistics((found[k] for k in ("mean", "var", "cov")), X)


def test_diagnostics():
    """Reports have the layer as any other; what a monitor records of y is the whitened one."""
    layer = BatchNorm(True, norm=NORM)
    variables = layer.init(jax.random.key(0), X)
    assert report(layer, variables, X).findings[0].cause == "never-updated"
    monitor = Monitor(lambda v, x: NORM.apply(*v, x, True), every=1)
    log = monitor.update(monitor.init((PARAMS, STATE)), (PARAMS, STATE), X)
    (record,) = monitor.records(log, (PARAMS, STATE))
    found = [record.per_channel[name] for name in ("low", "median", "high")]
    y = NORM.apply(PARAMS, STATE, X, True)[0]
    np.testing.assert_allclose(found, np.percentile(y, (15, 50, 85), axis=0), atol=1e-5)


def test_folding_keeps_it():
    """No scale and shift per channel do what it does; those of one channel a group do."""
    found = fold.linen(NET, VARIABLES, X)
    assert found.folded == {"BatchNorm_1": "Dense_0"}
    assert "whitens groups" in found.kept["BatchNorm_0"]
    one = Net(bnjax.whiten(1))
    variables = one.init(jax.random.key(0), X)
    assert "BatchNorm_0" in fold.linen(one, variables, X).folded


@pytest.mark.parametrize("moments, learn", [("running", True), ("batch", False)])
def test_switch(moments, learn):
    norm = bnjax.switch(NORM, moments=moments, learn=learn)
    y, new = norm.apply(PARAMS, STATE, X, not learn)
    batch, updated = NORM.apply(PARAMS, STATE, X, True)
    running, _ = NORM.apply(PARAMS, STATE, X, False)
    np.testing.assert_array_equal(y, batch if moments == "batch" else running)
    chex.assert_trees_all_equal(new, updated if learn else STATE)


REFUSED = {
    "to others": (
        lambda: interop.to_flax(interop.Layer(PARAMS, STATE, {})),
        (TypeError, "layer.state", "a BNState(mean, var, count)", "WhitenState", "BNState(*state"),
    ),
    "from flax": (
        lambda: interop.from_flax(VARIABLES, "BatchNorm_0"),
        (ValueError, "BatchNorm_0", "and nothing else", "'cov'", ""),
    ),
    "replicas": (
        lambda: bnjax.merge_states([STATE._replace(cov=jnp.ones((3, 2, 2)))]),
        (ValueError, "cov", "a matrix for each group", "(1, 3, 2, 2)", ""),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    check_message(*REFUSED[name])

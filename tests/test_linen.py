"""bnjax.linen.BatchNorm: the numbers and the program of bn_apply, variables, schedules, `norm`."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from tolerances import assert_close

import bnjax
from bnjax.linen import BatchNorm

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (16, 3)).astype(np.float32)
MASK = RNG.random((16, 3)) < 0.6
KEY = jax.random.key(0)
MUTABLE = ["batch_stats"]
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def stats_of(layer, variables=None, x=X, steps=1, **call):
    """The running statistics after some steps of training."""
    variables = layer.init(KEY, x) if variables is None else variables
    for _ in range(steps):
        _, new = layer.apply(variables, x, mutable=MUTABLE, **call)
        variables = {**variables, **new}
    return variables["batch_stats"]


# --- the same numbers as bn_apply ------------------------------------------------

OPTIONS = {
    "default": {},
    "axis": {"axis": 0},
    "momentum": {"momentum": 0.3},
    "momentum array": {"momentum": np.float32(0.25)},
    "epsilon": {"epsilon": 0.5},
    "unbiased": {"unbiased": True},
    "cumulative": {"momentum": bnjax.cumulative()},
    "dtype": {"dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("train", [True, False, "traced"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bitwise_as_the_function(options, train):
    layer, axis = BatchNorm(**options), options.get("axis", -1)
    params, state = bnjax.bn_init(X.shape[axis])
    state = state._replace(mean=state.mean + 0.5, var=state.var * 2)
    tree = {"params": params._asdict(), "batch_stats": state._asdict()}
    if "cumulative" not in str(options):
        del tree["batch_stats"]["count"]
    flag = jnp.array(True) if train == "traced" else train
    y, new = layer.apply(tree, X, jnp.logical_not(flag) if train == "traced" else not train,
                         mutable=MUTABLE, mask=MASK)  # fmt: skip
    expected, state = bnjax.bn_apply(params, state, X, flag, mask=MASK, **options)
    chex.assert_trees_all_equal(y, expected)
    wanted = state._asdict()
    chex.assert_trees_all_equal(
        new["batch_stats"], {name: wanted[name] for name in tree["batch_stats"]}
    )


# --- variables --------------------------------------------------------------------


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_statistics_are_never_below_float32(force, param_dtype):
    stats = stats_of(BatchNorm(False, param_dtype=param_dtype, force_float32_reductions=force))
    chex.assert_type(list(stats.values()), jnp.float32)


def test_statistics_in_float64(x64):
    fields = {"param_dtype": jnp.float64, "use_running_average": False}
    chex.assert_type(list(stats_of(BatchNorm(**fields)).values()), jnp.float32)
    layer = BatchNorm(force_float32_reductions=False, **fields)
    stats = stats_of(layer.clone(momentum=0.0), x=X.astype(np.float64) + 1e6)
    chex.assert_type(list(stats.values()), jnp.float64)
    np.testing.assert_allclose(stats["var"], X.var(0, dtype=np.float64), rtol=1e-6)


def test_initialisation_updates_nothing_and_needs_no_mapped_axis():
    layer = BatchNorm(False, momentum=0.0, axis_name="i")
    y, variables = layer.init_with_output(KEY, X)
    expected = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}
    chex.assert_trees_all_equal(variables["batch_stats"], expected)
    close(y, (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5))
    with pytest.raises(ValueError, match="`axis_name` must name an axis mapped"):
        layer.apply(variables, X, mutable=MUTABLE)
    layer.clone(use_running_average=True).apply(variables, X)


def test_mapped_axis():
    layer = BatchNorm(False, momentum=0.0, axis_name="i")
    variables = layer.init(KEY, X)
    step = jax.vmap(lambda x: layer.apply(variables, x, mutable=MUTABLE), axis_name="i")
    y, new = step(X.reshape(4, 4, 3))
    expected, whole = layer.clone(axis_name=None).apply(variables, X, mutable=MUTABLE)
    close(y.reshape(16, 3), expected)
    for i in range(4):
        close(jax.tree.map(lambda v: v[i], new), whole)  # noqa: B023


def test_mapped_axis_with_groups(devices):
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    layer = BatchNorm(False, momentum=0.0, axis_name="i", axis_index_groups=groups)
    variables = layer.init(KEY, X)
    mesh, spec = Mesh(np.array(devices), ("i",)), jax.P("i")
    step = jax.shard_map(
        lambda x: layer.apply(variables, x, mutable=MUTABLE)[0],
        mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip
    y = jax.jit(step)(X)
    for half in (slice(0, 8), slice(8, 16)):
        x = X[half]
        close(y[half], (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))


def test_count_exists_only_for_schedules():
    assert set(stats_of(BatchNorm(False))) == {"mean", "var"}
    assert set(stats_of(BatchNorm(False, momentum=jnp.array(0.9)))) == {"mean", "var"}
    stats = stats_of(BatchNorm(False, momentum=optax.constant_schedule(0.9)), steps=3)
    np.testing.assert_array_equal(stats["count"], np.array([3, 3, 3], np.int32))


def test_schedule():
    """Cumulative over different batches is their plain average."""
    layer = BatchNorm(False, momentum=bnjax.cumulative())
    variables = layer.init(KEY, X)
    for x in (X[:8], X[8:], X[4:12]):
        variables = {**variables, "batch_stats": stats_of(layer, variables, x)}
    parts = np.stack([X[:8].mean(0), X[8:].mean(0), X[4:12].mean(0)])
    close(variables["batch_stats"]["mean"], parts.mean(0))


@pytest.mark.parametrize("train", [True, False])
def test_restored_tree_without_count(train):
    """The error says how to supply it; what it says works."""
    variables = BatchNorm(False).init(KEY, X)
    model = nn.Sequential([BatchNorm(not train, momentum=bnjax.cumulative())])
    variables = {name: {"layers_0": tree} for name, tree in variables.items()}
    with pytest.raises(ValueError, match=re.escape("'batch_stats/layers_0/count'")) as info:
        model.apply(variables, X, mutable=MUTABLE)
    assert "supply jnp.zeros(shape, jnp.int32), or the number of updates" in str(info.value)
    variables["batch_stats"]["layers_0"]["count"] = jnp.full(3, 3, jnp.int32)
    _, new = model.apply(variables, X, mutable=MUTABLE)
    if train:
        close(new["batch_stats"]["layers_0"]["mean"], X.mean(0) / 4)


def test_training_may_begin_without_statistics():
    """As in flax, where the collection is mutable."""
    layer = BatchNorm(False, momentum=bnjax.cumulative())
    params = layer.init(KEY, X)["params"]
    stats = stats_of(layer, {"params": params})
    close(stats["mean"], X.mean(0))
    some = {"params": params, "batch_stats": {"mean": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"(?=.*batch_stats/count)(?=.*batch_stats/var)"):
        stats_of(layer, some)
    # A traced choice may turn out to be evaluation, which needs them.
    for inference in (True, False):
        with pytest.raises(ValueError, match="running statistics must hold"):
            BatchNorm().apply({"params": params}, X, jnp.array(inference), mutable=MUTABLE)


# --- norm ---------------------------------------------------------------------------


def test_norm():
    options = {"momentum": 0.25, "epsilon": 0.5, "unbiased": True}
    ours = BatchNorm(False, norm=bnjax.batch_norm(**options))
    theirs = BatchNorm(False, **options)
    variables = ours.init(KEY, X)
    results = [layer.apply(variables, X, mutable=MUTABLE) for layer in (ours, theirs)]
    chex.assert_trees_all_equal(*results)
    assert set(stats_of(ours)) == {"mean", "var"}
    counted = BatchNorm(False, norm=bnjax.batch_norm(momentum=bnjax.debiased(0.9)))
    assert set(stats_of(counted)) == {"count", "mean", "var"}


def test_norm_is_called_with_what_the_module_knows():
    seen = []

    def apply(params, state, x, train, **options):
        seen.append((params, state, train, options))
        return x * 2, state._replace(mean=state.mean + 1)

    norm = bnjax.Norm(bnjax.bn_init, apply, needs_count=False)
    layer = BatchNorm(False, axis=0, dtype=jnp.bfloat16, axis_name="i", use_bias=False, norm=norm)
    y, new = layer.init_with_output(KEY, X)
    close(y, X * 2)
    assert seen[0][0].bias is None and seen[0][1].mean.shape == (16,) and seen[0][2] is False
    unmapped = {"axis_name": None, "axis_index_groups": None}
    assert seen[0][3] == {"axis": 0, "mask": None, "dtype": jnp.bfloat16, **unmapped}
    assert np.all(stats_of(layer, new)["mean"] == 1)
    assert seen[1][2] is True
    assert seen[1][3]["axis_name"] == "i" and seen[1][3]["axis_index_groups"] is None


# --- differences from torch ------------------------------------------------------------


def test_difference_torch_convention():
    """torch's momentum 0.1 is 0.9 here; its running variance is unbiased, epsilon the same."""
    mean, var = np.zeros(3), np.ones(3)
    layer = BatchNorm(False, momentum=0.9, unbiased=True)
    variables = layer.init(KEY, X)
    for x in (X[:10], X[10:]):
        y, new = layer.apply(variables, x, mutable=MUTABLE)
        variables = {**variables, **new}
        n = len(x)
        mean = (1 - 0.1) * mean + 0.1 * x.mean(0)
        var = (1 - 0.1) * var + 0.1 * x.var(0) * n / (n - 1)
        close(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
        close(variables["batch_stats"], {"mean": mean, "var": var})


def test_difference_torch_one_value_per_channel():
    """torch raises in training; here y is the bias, and nothing is learned."""
    layer = BatchNorm(False, bias_init=nn.initializers.constant(0.25))
    y, variables = layer.init_with_output(KEY, X[:1])
    chex.assert_trees_all_equal(y, np.full((1, 3), 0.25, np.float32))
    stats = stats_of(layer, variables, X[:1])
    chex.assert_trees_all_equal(stats, variables["batch_stats"])

"""bnjax.linen.BatchNorm: metadata, initializers, one update per call in lifted transforms."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from tolerances import assert_close

import bnjax.linen

BOTH = {"bnjax": bnjax.linen.BatchNorm, "flax": nn.BatchNorm}
X = np.random.default_rng(0).normal(3, 2, (16, 8)).astype(np.float32)
KEY = jax.random.key(0)
MUTABLE = ["batch_stats"]
COUNTED = functools.partial(bnjax.linen.BatchNorm, False, momentum=optax.constant_schedule(0.5))
close = functools.partial(assert_close, dtype=np.float32, n=16)


def both(build, *args):
    """The variables of the model with either layer, which are equal, metadata included."""
    ours, theirs = (build(norm).init(KEY, X, *args) for norm in BOTH.values())
    chex.assert_trees_all_equal_structs(ours, theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    chex.assert_trees_all_equal(ours, theirs)
    return ours


BOXES = {"names": nn.with_partitioning, "logical names": nn.with_logical_partitioning}
RULES = (("features", "model"),)


def partitioned(norm, box):
    ones, normal = nn.initializers.ones, nn.initializers.normal(1.0)
    axes = ("model",) if box is nn.with_partitioning else ("features",)
    return norm(False, scale_init=box(ones, axes), bias_init=box(normal, axes))


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_boxed_parameters(box, devices):
    """Specs, shardings, a step under a mesh; the statistics have no boxes, as in flax."""
    variables = both(lambda norm: partitioned(norm, box))
    axis = "model" if box is nn.with_partitioning else "features"
    expected = {"params": {"scale": jax.P(axis), "bias": jax.P(axis)},
                "batch_stats": {"mean": jax.P(), "var": jax.P()}}  # fmt: skip
    specs = nn.get_partition_spec(variables)
    assert specs == expected
    mesh = Mesh(np.array(devices), ("model",))
    if axis == "features":
        shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    else:
        shardings = nn.get_sharding(variables, mesh)
    assert shardings["params"]["scale"] == NamedSharding(mesh, jax.P("model"))
    layer = partitioned(bnjax.linen.BatchNorm, box)
    expected = layer.apply(nn.unbox(variables), X, mutable=MUTABLE)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        placed = jax.jit(layer.init, out_shardings=shardings)(KEY, X)
        step = jax.jit(functools.partial(layer.apply, mutable=MUTABLE))
        close(step(placed, X), expected)
    assert len(placed["params"]["scale"].value.sharding.device_set) == 8


def test_boxed_parameters_train():
    """Gradients and updates keep the boxes, and the numbers are those without them."""
    layer = partitioned(bnjax.linen.BatchNorm, nn.with_partitioning)
    variables = layer.init(KEY, X)

    def loss(params):
        y, new = layer.apply({**variables, "params": params}, X, mutable=MUTABLE)
        return jnp.sum(jnp.sin(y)), new["batch_stats"]

    grads, stats = jax.grad(loss, has_aux=True)(variables["params"])
    chex.assert_trees_all_equal_structs(grads, variables["params"])
    chex.assert_trees_all_equal_structs(stats, variables["batch_stats"])
    bare = jax.grad(loss, has_aux=True)(nn.unbox(variables["params"]))
    chex.assert_trees_all_equal((nn.unbox(grads), stats), bare)


@pytest.mark.parametrize("lift", ["vmap", "scan"])
def test_lifting_names_the_new_axis(lift):
    """In the boxes, by `nn.PARTITION_NAME`."""

    def build(norm):
        options = {
            "variable_axes": {"params": 0, "batch_stats": 0},
            "split_rngs": {"params": True},
            "metadata_params": {nn.PARTITION_NAME: "layers"},
        }
        fields = {
            "use_running_average": False,
            "scale_init": nn.with_partitioning(nn.initializers.normal(1.0), ("model",)),
        }
        if lift == "vmap":
            return nn.vmap(norm, in_axes=None, axis_size=3, **options)(**fields)

        class Stack(nn.Module):
            @nn.compact
            def __call__(self, x):
                body = nn.scan(lambda layer, x, _: (layer(x), None), length=3, **options)
                return body(norm(**fields), x, None)

        return Stack()

    variables = both(build)
    params = variables["params"].get("BatchNorm_0", variables["params"])
    assert params["scale"].names == ("layers", "model")
    assert params["scale"].value.shape == (3, 8)
    assert len(np.unique(params["scale"].value)) == 24


FIELDS = {
    "both": {},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "narrow": {"param_dtype": jnp.bfloat16},
    "axes": {"axis": (0, 1)},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_initializers_draw_as_in_flax(fields):
    """The same key for scale, for bias, and for the layer that comes next."""
    seen = {norm: [] for norm in BOTH.values()}

    def build(norm):
        def draw(key, shape, dtype):
            seen[norm].append((tuple(np.asarray(jax.random.key_data(key))), tuple(shape), dtype))
            return jax.random.normal(key, shape, dtype)

        layer = norm(False, scale_init=draw, bias_init=draw, **fields)
        return nn.Sequential([nn.Dense(8), layer, nn.Dense(2)])

    both(build)
    ours, theirs = seen.values()
    assert ours == theirs and len(ours) == 2 - len({"use_scale", "use_bias"} & set(fields))


@pytest.mark.parametrize("lift", [lambda c: c, nn.remat, nn.jit], ids=["plain", "remat", "jit"])
def test_initialising_in_training_changes_nothing(lift):
    variables = lift(COUNTED)().init(KEY, X)
    new = {"mean": jnp.zeros(8), "var": jnp.ones(8), "count": jnp.zeros(8, jnp.int32)}
    chex.assert_trees_all_equal(variables["batch_stats"], new)


class Shared(nn.Module):
    """One layer, called twice; as of `setup`, or compact with `share_scope`."""

    def setup(self):
        self.norm = COUNTED()

    def __call__(self, x):
        return self.norm(self.norm(x) * 2 + 1)


class Remat(nn.Module):
    policy: str | None = None

    @nn.compact
    def __call__(self, x):
        policy = self.policy and getattr(jax.checkpoint_policies, self.policy)
        return nn.remat(COUNTED, policy=policy)()(nn.remat(nn.Dense)(8)(x))


class Scanned(nn.Module):
    """The same layer at each step: parameters broadcast, statistics carried."""

    @nn.compact
    def __call__(self, x):
        options = {"variable_broadcast": "params", "split_rngs": {"params": False}, "length": 3}
        if self.is_initializing():
            return COUNTED(name="norm")(x)
        body = nn.scan(lambda layer, x, _: (jnp.sin(layer(x)), None), variable_carry="batch_stats",
                       **options)  # fmt: skip
        return body(COUNTED(name="norm"), x, None)[0]


class ScannedRemat(nn.Module):
    """A layer for each step, rematerialised: flax's idiom for deep networks."""

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 0, "batch_stats": 0}, "length": 3}
        step = nn.remat(lambda layer, x, _: (jnp.sin(layer(x)), None), prevent_cse=False)
        return nn.scan(step, split_rngs={"params": True}, **options)(COUNTED(), x, None)[0]


class Vmapped(nn.Module):
    """Parameters for all, statistics for each: of domains, say."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": None, "batch_stats": 0}
        layer = nn.vmap(COUNTED, variable_axes=axes, split_rngs={"params": False}, in_axes=0)
        return layer()(x.reshape(2, 8, 8)).reshape(16, 8)


CALLS = {
    "shared": (Shared(), 2, (8,)),
    "remat": (Remat(), 1, (8,)),
    "remat, nothing saved": (Remat("nothing_saveable"), 1, (8,)),
    "remat, all saved": (Remat("everything_saveable"), 1, (8,)),
    "scan, carried": (Scanned(), 3, (8,)),
    "scan of remat": (ScannedRemat(), 1, (3, 8)),
    "vmap": (Vmapped(), 1, (2, 8)),
    "jit": (nn.jit(COUNTED)(), 1, (8,)),
}


@pytest.mark.parametrize("model, updates, shape", CALLS.values(), ids=CALLS)
def test_statistics_update_once_per_call(model, updates, shape):
    """In the forward pass alone, and in one with gradients."""
    variables = model.init(KEY, X)

    def loss(params, x):
        y, new = model.apply({**variables, "params": params}, x, mutable=MUTABLE)
        return jnp.sum(jnp.sin(y)), new["batch_stats"]

    found = [loss(variables["params"], X)[1]]
    found.append(jax.jit(jax.grad(loss, has_aux=True))(variables["params"], X)[1])
    for stats in found:
        count = [v for path, v in jax.tree.leaves_with_path(stats) if "count" in str(path[-1])]
        assert len(count) == 1
        np.testing.assert_array_equal(count[0], np.full(shape, updates))
        close(stats, found[0])


def test_shared_layer_averages_both_calls():
    """Against the formula: the second call sees the first one's output."""
    layer = Shared()
    _, new = layer.apply(layer.init(KEY, X), X, mutable=MUTABLE)
    first = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5) * 2 + 1
    mean = 0.5 * (0.5 * X.mean(0)) + 0.5 * first.mean(0)
    var = 0.5 * (0.5 + 0.5 * X.var(0)) + 0.5 * first.var(0)
    close(new["batch_stats"]["norm"], {"mean": mean, "var": var, "count": np.full(8, 2)})


LIFTS = {
    "vmap": lambda c: nn.vmap(c, variable_axes={"params": 0, "batch_stats": 0}, in_axes=0),
    "remat": nn.remat,
    "jit": nn.jit,
}


@pytest.mark.parametrize("mutable", [[], MUTABLE], ids=["fixed", "mutable"])
@pytest.mark.parametrize("lift", LIFTS.values(), ids=LIFTS)
def test_evaluation_without_statistics(lift, mutable):
    """The error names the variables, by their path in the tree, and the fix."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lift(bnjax.linen.BatchNorm)(use_running_average=True, name="norm")(x)

    x = X.reshape(2, 8, 8)
    shape = (2, 8) if lift is LIFTS["vmap"] else (8,)
    params = {"norm": {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}}
    message = r"got none for \['batch_stats/norm/mean', .*Fix: supply those that init returned"
    with pytest.raises(ValueError, match=message):
        Model().apply({"params": params}, x, mutable=mutable)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("fields", [{}, {"dtype": jnp.complex64}, {"param_dtype": jnp.complex64}])
def test_complex_is_refused(fields, train):
    """flax's layer takes it, with a real variance; here the message says what is taken."""
    x = X if fields else X + 1j * X[::-1]
    (name,) = fields or ("x",)
    with pytest.raises(TypeError, match=rf"^`{name}` must .*float.*got.*complex64"):
        bnjax.linen.BatchNorm(not train, **fields).init(KEY, x)

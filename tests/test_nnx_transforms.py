"""bnjax.nnx.BatchNorm under nnx's transformations, and where its variables are kept."""

import copy
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from tolerances import assert_close

import bnjax
from bnjax.nnx import BatchNorm

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (16, 4)).astype(np.float32)
BOTH = (BatchNorm, nnx.BatchNorm)
close = functools.partial(assert_close, dtype=np.float32, n=1000)


class Net(nnx.Module):
    def __init__(self, module=BatchNorm, momentum=0.9):
        rngs = nnx.Rngs(0)
        self.first = module(4, rngs=rngs)
        self.dense = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.last = module(4, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.dense(self.first(x))))


def loss(model, x=X):
    return jnp.sum(1 + jnp.sin(model(x)))  # no sum that cancels, since it is compared


def counting():
    """Its last layer counts how often it was updated."""
    return Net(momentum=bnjax.cumulative())


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])
def test_jit(graph):
    """The state is updated in place, as without jit; and traced once."""
    chex.clear_trace_counter()
    traced, plain = Net(), Net()
    run = nnx.jit(chex.assert_max_traces(lambda model, x: model(x), n=1), graph=graph)
    for x in (X, X + 1):
        close(run(traced, x), plain(x))
    close(nnx.state(traced), nnx.state(plain))
    assert not np.any(traced.last.mean[...] == 0)


def test_grad():
    """As flax's; the gradients are of parameters, and the statistics are updated once."""
    results = []
    for module in BOTH:
        model = Net(module)
        grads = nnx.grad(loss)(model)
        assert all(isinstance(g, nnx.Param) for _, g in nnx.to_flat_state(grads))
        results.append((grads, nnx.state(model)))
        value, again = nnx.jit(nnx.value_and_grad(loss))(model)
        results[-1] += (value, again, nnx.state(model))
    close(*results)
    assert all(np.any(g != 0) for g in jax.tree.leaves(results[0][0].last))


def test_statistics_have_no_derivative():
    """As in flax: they are constants to what is computed from them."""
    for module in BOTH:

        def running(x, module=module):
            layer = module(4, rngs=nnx.Rngs(0))
            layer(x)
            return jnp.sum(layer.mean[...] + layer.var[...])

        assert np.all(jax.grad(running)(X) == 0)


def test_vmap_of_an_ensemble():
    """Layers made and called under vmap are the layers one by one."""
    xs = X.reshape(2, 8, 4) * np.array([1, 2], np.float32).reshape(2, 1, 1)

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs):
        return BatchNorm(4, momentum=0.5, scale_init=nnx.initializers.normal(), rngs=rngs)

    ensemble = make(nnx.Rngs(0))
    scale = ensemble.scale[...]
    assert scale.shape == (2, 4) and np.all(scale[0] != scale[1])
    y = nnx.vmap(lambda layer, x: layer(x))(ensemble, xs)
    for i in range(2):
        one = BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))
        one.scale[...] = scale[i]
        close(y[i], one(xs[i]))
        close(jax.tree.map(lambda v: v[i], nnx.state(ensemble)), nnx.state(one))  # noqa: B023


def test_vmap_with_axis_name():
    """One layer for all: parts synchronised over the axis are the whole batch."""
    layer, whole = (BatchNorm(4, rngs=nnx.Rngs(0), axis_name=name) for name in ("i", None))
    stats = nnx.StateAxes({nnx.BatchStat: None, nnx.Param: None})
    run = nnx.vmap(lambda layer, x: layer(x), in_axes=(stats, 0), axis_name="i")
    y = run(layer, X.reshape(4, 4, 4))
    close(y.reshape(16, 4), whole(X))
    close(nnx.state(layer), nnx.state(whole))
    layer.eval()
    layer(X)  # outside of the mapped axis
    with pytest.raises(ValueError, match="`axis_name` must name an axis mapped"):
        layer(X, False)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat):
    """Layers stacked along an axis of their variables, with gradients, as in a loop."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return BatchNorm(4, bias_init=nnx.initializers.normal(), rngs=rngs)

    def block(x, layer):
        return nnx.tanh(layer(x))

    stack = make(nnx.Rngs(0))
    one_by_one = [BatchNorm(4, rngs=nnx.Rngs(0)) for _ in range(3)]
    for i, layer in enumerate(one_by_one):
        layer.bias[...] = stack.bias[i]
    scan = nnx.scan(nnx.remat(block) if remat else block, in_axes=(nnx.Carry, 0),
                    out_axes=nnx.Carry)  # fmt: skip
    grads = nnx.grad(lambda stack: jnp.sum(jnp.sin(scan(jnp.asarray(X), stack))))(stack)

    def loop(layers):
        return jnp.sum(jnp.sin(functools.reduce(block, layers, X)))

    layers = nnx.List(one_by_one)
    expected = nnx.to_pure_dict(nnx.grad(loop)(layers))
    for i, layer in enumerate(layers):
        found = jax.tree.map(lambda v: v[i], (nnx.to_pure_dict(grads), nnx.state(stack)))  # noqa: B023
        close(found, (expected[i], nnx.state(layer)))


def test_scan_over_steps():
    """The model is carried over batches, as an argument whose state is the carry."""
    batches = X.reshape(4, 4, 4)
    carried, plain = counting(), counting()

    @nnx.scan(in_axes=(nnx.Carry, 0))
    def train(model, x):
        return model, model(x)

    _, y = train(carried, batches)
    close(y, jnp.stack([plain(x) for x in batches]))
    close(nnx.state(carried), nnx.state(plain))
    assert np.all(carried.last.count[...] == 4)


def test_remat_updates_once():
    """Gradients and statistics are those without remat, and flax's; the count says once."""
    results = []
    for model, wrap in ((Net(), nnx.remat), (Net(), None), (Net(nnx.BatchNorm), None)):
        call = wrap(lambda m, x: m(x)) if wrap else lambda m, x: m(x)
        for _ in range(2):
            step = nnx.value_and_grad(lambda m: jnp.sum(1 + jnp.sin(call(m, X))))  # noqa: B023
            result = nnx.jit(step)(model)
        results.append((*result, nnx.state(model)))
    close(results[0], results[1])
    close(results[0], results[2])
    counted = counting()
    nnx.jit(nnx.grad(nnx.remat(loss)))(counted)
    assert np.all(counted.last.count[...] == 1)
    close(counted.first.mean[...], 0.01 * X.mean(0))


def test_split_merge_clone_copy():
    """Each has the numbers of the original, and none shares its variables."""
    original = Net()
    original(X)
    copies = [
        nnx.merge(*nnx.split(nnx.clone(original))),
        nnx.merge(*nnx.split(nnx.clone(original), nnx.Param, nnx.BatchStat)),
        nnx.clone(original),
        copy.deepcopy(original),
        pickle.loads(pickle.dumps(original)),
    ]
    before = jax.tree.map(np.array, nnx.state(original))
    outputs = [model(X + 1) for model in copies]
    chex.assert_trees_all_equal(nnx.state(original), before)
    expected = original(X + 1)
    for model, y in zip(copies, outputs, strict=True):
        chex.assert_trees_all_equal(y, expected)
        chex.assert_trees_all_equal(nnx.state(model), nnx.state(original))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["from flax", "to flax"])
def test_state_and_orbax(order, tmp_path):
    """A trained state goes into the other's model, directly and by way of a checkpoint."""
    read, written = (Net(BOTH[i]) for i in order)
    loss(written)
    nnx.update(read, nnx.state(written))
    close(read(X), written(X))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(written))
        checkpointer.wait_until_finished()
        new = Net(BOTH[order[0]])
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.state(new))
        nnx.update(new, checkpointer.restore(tmp_path / "state", template))
    chex.assert_trees_all_equal(nnx.state(new), nnx.state(written))
    for model in (new, written):
        model.eval()
    close(new(X), written(X))


def test_optimizer():
    """Steps of nnx.Optimizer are flax's; parameters alone are optimised."""
    losses = []
    for module in BOTH:
        model = Net(module)
        optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - X[:, ::-1]) ** 2))(model)
            optimizer.update(model, grads)
            return value

        losses.append([step(model, optimizer) for _ in range(20)])
    assert losses[0][-1] < 0.8 * losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-4)


NAMES = ("scale", "bias", "mean", "var", "count")
SHARDED = {"out_sharding": ("model",)}


def sharded_layer(**fields):
    return BatchNorm(
        16, rngs=nnx.Rngs(0), momentum=bnjax.cumulative(), scale_metadata=SHARDED,
        bias_metadata=SHARDED, statistics_metadata={**SHARDED, "note": "kept"}, **fields,
    )  # fmt: skip


def test_metadata():
    """Annotations reach all variables, and stay when they are updated."""
    with nnx.use_eager_sharding(False):
        layer = sharded_layer()
        layer(RNG.normal(size=(8, 16)).astype(np.float32))
    spec = nnx.get_partition_spec(nnx.state(layer))
    assert {name: spec[name].get_value() for name in NAMES} == dict.fromkeys(NAMES, jax.P("model"))
    assert layer.mean.note == layer.count.note == "kept"
    with nnx.use_eager_sharding(False):
        init = nnx.with_partitioning(nnx.initializers.ones, ("model",))
        boxed = BatchNorm(16, rngs=nnx.Rngs(0), scale_init=init, bias_init=init)
    spec = nnx.get_partition_spec(nnx.state(boxed))
    assert spec["scale"].get_value() == spec["bias"].get_value() == jax.P("model")
    assert spec["mean"].get_value() == jax.P()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_arrays(devices, kind):
    """Variables made and updated under jit are spread over the mesh, with the same numbers."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind, kind))
    x = RNG.normal(3, 2, (8, 16)).astype(np.float32)
    with jax.set_mesh(mesh):
        layer = nnx.jit(sharded_layer)()
        wanted = nnx.get_named_sharding(nnx.state(layer), mesh)
        y = nnx.jit(lambda layer, x: layer(x))(
            layer, jax.device_put(x, NamedSharding(mesh, jax.P("data", "model")))
        )
    for name in NAMES:
        array = getattr(layer, name)[...]
        assert array.sharding.is_equivalent_to(wanted[name].get_value(), 1), name
        assert array.addressable_shards[0].data.shape == (4,)
    plain = BatchNorm(16, rngs=nnx.Rngs(0), momentum=bnjax.cumulative())
    close(jax.device_get(y), plain(x))
    close(nnx.to_pure_dict(nnx.state(layer)), nnx.to_pure_dict(nnx.state(plain)))

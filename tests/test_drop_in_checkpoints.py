"""Checkpoints of a ResNet-18 and an MLP with flax's layers load into bnjax's, and back."""

import chex
import flax.nnx
import jax
import jax.numpy as jnp
import models
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.training import orbax_utils
from jax.sharding import Mesh, NamedSharding
from tolerances import assert_close

import bnjax.linen
import bnjax.nnx

KEY = jax.random.key(0)
BOTH = (models, models.with_bnjax())
orders = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["from flax", "to flax"])
names = pytest.mark.parametrize("name", models.ALL)


def abstract(model):
    return jax.eval_shape(model.init, KEY)


def numbers(tree, seed=0):
    """A tree of this structure with numbers of its own in each leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: jnp.asarray(rng.random(v.shape) + 0.5, v.dtype), tree)


def plain(variables):
    """As it is written: dicts of arrays."""
    if isinstance(variables["params"], nnx.State):
        return {name: nnx.to_pure_dict(state) for name, state in variables.items()}
    return variables


def orbax_standard(path, tree, like):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


def orbax_pytree(path, tree, like):
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(path, tree, save_args=orbax_utils.save_args_from_target(tree))
    return checkpointer.restore(
        path, item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like)
    )


def msgpack(path, tree, like):
    path.write_bytes(serialization.to_bytes(tree))
    zeros = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), like)
    return serialization.from_bytes(zeros, path.read_bytes())


FORMATS = {"orbax": orbax_standard, "orbax pytree": orbax_pytree, "msgpack": msgpack}


@orders
@pytest.mark.parametrize("save_and_load", FORMATS.values(), ids=FORMATS)
@names
def test_checkpoint(name, save_and_load, order, tmp_path):
    """Every number, in the paths, shapes and dtypes of the other model."""
    written, read = (abstract(BOTH[i].ALL[name]()) for i in order)
    variables = numbers(written)
    loaded = save_and_load(tmp_path / "checkpoint", plain(variables), plain(read))
    chex.assert_trees_all_equal(loaded, plain(variables))
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, plain(read))


@orders
@pytest.mark.parametrize("name", ["linen MLP", "nnx MLP"])
def test_loaded_model_evaluates_the_same(name, order, tmp_path):
    written, read = (BOTH[i].ALL[name]() for i in order)
    variables, like = numbers(abstract(written)), abstract(read)
    pure = orbax_standard(tmp_path / "checkpoint", plain(variables), plain(like))
    loaded = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(pure))
    x = np.random.default_rng(1).normal(size=written.x_shape).astype(np.float32)
    y, expected = (
        jax.jit(model.apply, static_argnums=2)(tree, x, False)[0]
        for model, tree in ((read, loaded), (written, variables))
    )
    assert_close(y, expected, np.float32, n=64)


@orders
@pytest.mark.parametrize("kind", [nnx.Sequential, None], ids=["in a model", "alone"])
def test_nnx_state_itself(kind, order, tmp_path):
    """Orbax saves an `nnx.State` too, variables and all, as flax's guide does it."""
    layers = [package.nnx.BatchNorm for package in (flax, bnjax)]

    def make(i):
        layer = layers[i](3, rngs=nnx.Rngs(0))
        return layer if kind is None else kind(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), layer)

    written, read = (nnx.state(make(i)) for i in order)
    written = numbers(written)
    loaded = orbax_standard(tmp_path / "checkpoint", written, jax.tree.map(jnp.zeros_like, read))
    chex.assert_trees_all_equal(loaded, written)
    chex.assert_trees_all_equal_structs(loaded, read)
    model = make(order[1])
    nnx.update(model, loaded)
    chex.assert_trees_all_equal(nnx.state(model), written)


class Partitioned(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        ones = nn.with_partitioning(nn.initializers.ones, ("model",))
        zeros = nn.with_partitioning(nn.initializers.zeros, (None,))
        return self.norm(use_running_average=True, scale_init=ones, bias_init=zeros)(x)


@orders
def test_sharding_is_kept(order, tmp_path, devices):
    """Boxed parameters restore boxed, each array onto the devices that its box asks for."""
    norms = (nn.BatchNorm, bnjax.linen.BatchNorm)
    mesh, x = Mesh(np.array(devices), ("model",)), jnp.ones((2, 16))
    trees = []
    for i in order:
        boxed = jax.eval_shape(Partitioned(norms[i]).init, KEY, x)
        trees.append((boxed, nn.get_sharding(boxed, mesh)))
    (written, shardings), (read, same) = trees
    assert jax.tree.structure(written) == jax.tree.structure(read) and shardings == same
    params = shardings["params"]["BatchNorm_0"]
    assert params["scale"] == NamedSharding(mesh, jax.P("model"))
    variables = jax.device_put(numbers(written), shardings)
    boxed = jax.tree.unflatten(jax.tree.structure(read), jax.tree.leaves(same))
    like = jax.tree.map(
        lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), read, boxed
    )
    loaded = orbax_standard(tmp_path / "checkpoint", variables, like)
    chex.assert_trees_all_equal(loaded, variables)
    assert isinstance(loaded["params"]["BatchNorm_0"]["scale"], nn.Partitioned)
    assert [v.sharding for v in jax.tree.leaves(loaded)] == jax.tree.leaves(shardings)
    assert len(loaded["params"]["BatchNorm_0"]["scale"].value.addressable_shards) == 8
    y = jax.jit(Partitioned(norms[order[1]]).apply)(loaded, x)
    assert_close(y, Partitioned(norms[order[0]]).apply(variables, x), np.float32, n=2)

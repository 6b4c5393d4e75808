"""bnjax.nnx.convert and revert, on models written for flax.nnx whose source is not touched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tolerances import assert_close, error

import bnjax
import bnjax.nnx
from bnjax.nnx import convert, revert

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (32, 4)).astype(np.float32)
FAR = (RNG.normal(0, 1, (1024, 4)) + 1e4).astype(np.float32)
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def norm(**fields):
    return nnx.BatchNorm(4, **{"rngs": nnx.Rngs(0), "momentum": 0.5, **fields})


# With a bias, no mean is a rounding error; flax's slow variance is right.
inner = functools.partial(norm, bias_init=nnx.initializers.normal(1.0), use_fast_variance=False)


class Model(nnx.Module):
    """Layers in every kind of place; one is used, and held, twice."""

    def __init__(self, first=inner):
        rngs = nnx.Rngs(0)
        self.first = first()
        linear = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.blocks = nnx.List([nnx.Sequential(linear, inner(axis=1), nnx.tanh)])
        self.named = nnx.Dict(a=inner(use_scale=False), other=nnx.LayerNorm(4, rngs=rngs))
        self.plain = nnx.data([{"deep": inner(epsilon=0.1)}])
        self.shared = self.first

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        x = self.named.other(self.named.a(x))
        return self.shared(nnx.tanh(self.plain[0]["deep"](nnx.tanh(x))))


PATHS = {("first",), ("blocks", 0, "layers", 1), ("named", "a"), ("plain", 0, "deep")}
OURS = bnjax.nnx.BatchNorm


def layers(model):
    return [
        model.first, model.blocks[0].layers[1], model.named.a, model.plain[0]["deep"], model.shared,
    ]  # fmt: skip


def classes(model):
    return {type(layer) for layer in layers(model)}


def loss(model, x=X):
    return jnp.sum(jnp.sin(model(x)))


def test_convert_and_revert():
    """The same objects and variables, all of them and no others; flax's again afterwards."""
    model, untouched = Model(), Model()
    objects = [id(v) for v in (*layers(model), *(layer.mean for layer in layers(model)))]
    others = [type(m) for _, m in nnx.iter_modules(model) if not isinstance(m, nnx.BatchNorm)]
    state = nnx.state(model)
    assert set(convert(model)) == PATHS
    assert classes(model) == {OURS} and model.shared is model.first
    assert objects == [id(v) for v in (*layers(model), *(layer.mean for layer in layers(model)))]
    assert others == [type(m) for _, m in nnx.iter_modules(model) if not isinstance(m, OURS)]
    chex.assert_trees_all_equal(nnx.state(model), state)
    new = OURS(4, rngs=nnx.Rngs(0), momentum=0.5, use_fast_variance=False)
    assert nnx.graphdef(model.first) == nnx.graphdef(new)
    assert set(revert(model)) == PATHS
    assert classes(model) == {nnx.BatchNorm} and model.shared is model.first
    assert nnx.graphdef(model) == nnx.graphdef(untouched)
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(untouched))


def test_numbers():
    """Flax's where they are right, right where flax's are not, and flax's again."""
    model, flax = Model(), Model()
    convert(model)
    close(model(X), flax(X))
    close(nnx.state(model), nnx.state(flax))
    model.eval(), flax.eval()
    close(model(X), flax(X))
    truth = (FAR - FAR.mean(0, dtype=np.float64)) / FAR.std(0, dtype=np.float64)
    layer = norm()
    assert error(layer(FAR), truth) > 1
    convert(layer)
    close(layer(FAR), truth)
    revert(layer)
    assert error(layer(FAR), truth) > 1


def test_compiled_functions_follow():
    """A function compiled for the model before is not used after, and the other way round."""
    layer = norm()
    run = nnx.jit(lambda layer, x: layer(x).var())
    for change in (None, convert, revert, convert):
        if change:
            change(layer)
        assert (abs(run(layer, FAR) - 1) < 1e-3) == (change is convert)


@pytest.mark.parametrize("container", [
    lambda layer: layer,
    lambda layer: [layer],
    lambda layer: {"a": (layer, 3.0)},
    lambda layer: nnx.Sequential(layer),
    lambda layer: nnx.Sequential(nnx.Sequential(layer), layer),
], ids=["itself", "list", "dict", "Sequential", "shared"])  # fmt: skip
def test_what_is_converted(container):
    layer = norm()
    tree = container(layer)
    assert len(convert(tree)) == 1 and type(layer) is OURS
    assert len(revert(tree)) == 1 and type(layer) is nnx.BatchNorm


def test_split_and_merge():
    """Either side of a conversion; a graph split before is flax's still."""
    model = Model()
    before = nnx.split(model)
    convert(model)
    after = nnx.merge(*nnx.split(model))
    assert classes(after) == {OURS} and after.shared is after.first
    assert classes(nnx.merge(*before)) == {nnx.BatchNorm}
    close(after(X), Model()(X))
    assert set(convert(merged := nnx.merge(*before))) == PATHS and classes(merged) == {OURS}
    revert(after)
    assert nnx.graphdef(after) == nnx.graphdef(Model())


def test_training_continues():
    """The optimizer made for flax's model goes on, with its moments, and with flax's numbers."""
    x = X.astype(np.float32)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model, x)
        optimizer.update(model, grads)
        return value

    results = []
    for changes in ({}, {2: convert}, {2: convert, 4: revert}):
        model = Model()
        optimizer = nnx.Optimizer(model, optax.sgd(1e-3, momentum=0.9), wrt=nnx.Param)
        values = []
        for i in range(6):
            changes.get(i, lambda model: None)(model)
            values.append(step(model, optimizer))
        results.append((values, nnx.state(model), optimizer.opt_state))
    # Six steps of differences in rounding.
    for result in results[1:]:
        assert_close(result, results[0], np.float32, n=6 * 1000)
    assert results[0][0][0] != results[0][0][-1]


def test_convert_leaves_ours_alone():
    """Layers that are bnjax's already are neither listed nor changed; revert takes all."""
    model = Model(lambda: OURS(4, momentum=bnjax.cumulative(), unbiased=True, rngs=nnx.Rngs(0)))
    assert set(convert(model)) == PATHS - {("first",)}
    assert model.first.unbiased is True and callable(model.first.momentum)
    with pytest.raises(ValueError, match="got none"):
        convert(model)


class Derived(nnx.BatchNorm):
    def __call__(self, x):
        return 2 * super().__call__(x)


class DerivedFromOurs(OURS):
    pass


def test_derived_classes_are_refused():
    """Before anything is changed."""
    model = Model()
    model.plain[0]["deep"] = Derived(4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"flax\.nnx\.BatchNorm itself.*'deep'\): 'Derived'"):
        convert(model)
    assert classes(model) == {nnx.BatchNorm, Derived} and not hasattr(model.first, "norm")
    model = Model(lambda: DerivedFromOurs(4, rngs=nnx.Rngs(0)))
    convert(model)
    with pytest.raises(TypeError, match=r"bnjax\.nnx\.BatchNorm itself.*\('first',\)"):
        revert(model)
    assert classes(model) == {OURS, DerivedFromOurs}


@pytest.mark.parametrize("change", [convert, revert])
@pytest.mark.parametrize("model", [nnx.Sequential(jnp.tanh), {}, 3], ids=["model", "dict", "int"])
def test_no_layers(change, model):
    name = "flax" if change is convert else "bnjax"
    with pytest.raises(ValueError, match=rf"must have a {name}\.nnx\.BatchNorm layer, got none"):
        change(model)


OWN = {
    "momentum": {"momentum": bnjax.cumulative()},
    "unbiased": {"unbiased": True},
    "norm": {"norm": bnjax.batch_norm()},
    "axis": {"axis": (0, 1), "size": (32, 4)},
}


@pytest.mark.parametrize("name", OWN)
def test_revert_refuses_what_flax_does_not_have(name):
    """With nothing changed; layers that could be reverted stay too."""
    fields = dict(OWN[name])
    layer = OURS(fields.pop("size", 4), rngs=nnx.Rngs(0), **fields)
    model = nnx.Sequential(norm(), layer)
    convert(model)
    graph = nnx.graphdef(model)
    with pytest.raises(ValueError, match=rf"'{name}'.*\('layers', 1\)"):
        revert(model)
    assert nnx.graphdef(model) == graph and {type(m) for m in model.layers} == {OURS}


def test_revert_after_the_fix_of_its_error():
    """A schedule that was set to a number leaves no count behind: flax's variables again."""
    layer = OURS(4, momentum=bnjax.cumulative(), rngs=nnx.Rngs(0))
    layer(X)
    layer.momentum = 0.5
    revert(layer)
    assert nnx.graphdef(layer) == nnx.graphdef(norm())
    close(layer.mean[...], X.mean(0))


def test_within_another_trace():
    """Flax refuses to change the layers there; they stay whole."""
    model = nnx.Sequential(norm(), norm())

    @jax.jit
    def run(x):
        convert(model)
        return model(x)

    with pytest.raises(Exception, match="different trace level"):
        run(X)
    assert {type(m) for m in model.layers} == {nnx.BatchNorm}
    assert nnx.graphdef(model.layers[0]) == nnx.graphdef(norm())

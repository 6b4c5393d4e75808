"""bnjax.switch, bnjax.linen.switch, bnjax.nnx.switch: moments and learning."""

import contextlib
import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from messages import check_message
from tolerances import assert_close

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import BNParams, BNState, fold, switch

RNG = np.random.default_rng(0)
C = 3
X = RNG.normal(3, 2, (8, C)).astype(np.float32)
KEY = jax.random.key(0)
MUTABLE = ["batch_stats"]
PARAMS = BNParams(jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, 1.0, -1.0]))
STATE = BNState(jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, 0.5]), jnp.full(C, 4, jnp.int32))
SWITCHES = [
    {"moments": moments, "learn": learn}
    for moments, learn in itertools.product(("batch", "running", None), (True, False, None))
    if (moments, learn) != (None, None)
]
ids = functools.partial(map, lambda s: f"{s['moments']}-{s['learn']}")
FOUR = [s for s in SWITCHES if None not in s.values()]
FROZEN = {"moments": "running", "learn": False}
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def effect(switches, train):
    """By which moments, and whether it learns."""
    moments, learn = switches["moments"], switches["learn"]
    return train if moments is None else moments == "batch", train if learn is None else learn


def oracle(batch, learn):
    """y and the statistics, in float64."""
    inputs = reference.Inputs(X, *PARAMS, STATE.mean, STATE.var, 1e-5)
    run = functools.partial(reference.forward, inputs, momentum=0.9, count=STATE.count)
    y, new = run(train=batch).y, run(train=learn)
    return y, BNState(new.mean, new.var, new.count)


@pytest.mark.parametrize("train", [True, False, "traced"])
@pytest.mark.parametrize("switches", SWITCHES, ids=ids(SWITCHES))
def test_numbers(switches, train):
    """Against the oracle; a traced `train` is either."""
    norm = switch(bnjax.batch_norm(momentum=0.9), **switches)
    for value in (True, False) if train == "traced" else (train,):
        given = jnp.array(value) if train == "traced" else value
        found = norm.apply(PARAMS, STATE, X, given)
        close(found, oracle(*effect(switches, value)))
        chex.assert_trees_all_equal_shapes_and_dtypes(found[1], STATE)


@pytest.mark.parametrize("make", [
    lambda: bnjax.ghost(4, momentum=0.9),
    lambda: bnjax.microbatches(2, momentum=0.9),
    lambda: bnjax.batch_norm(momentum=bnjax.cumulative(), unbiased=True, epsilon=0.1),
], ids=["ghost", "microbatches", "batch_norm"])  # fmt: skip
@pytest.mark.parametrize("switches", FOUR, ids=ids(FOUR))
def test_norms(make, switches):
    """y is that of the moments asked for, the state, all of it, that of learning or not."""
    norm = make()
    state = norm.init(C)[1]._replace(**STATE._asdict())
    y, new = switch(norm, **switches).apply(PARAMS, state, X, False)
    batch, learn = effect(switches, False)
    chex.assert_trees_all_equal(y, norm.apply(PARAMS, state, X, batch)[0])
    chex.assert_trees_all_equal(new, norm.apply(PARAMS, state, X, learn)[1])


def test_derivatives_are_those_of_the_moments():
    def gradient(norm, train):
        def loss(params, x):
            return jnp.sum(jnp.sin(norm.apply(params, STATE, x, train)[0]))

        return jax.grad(loss, (0, 1))(PARAMS, X)

    plain = bnjax.batch_norm()
    chex.assert_trees_all_close(
        gradient(switch(bnjax.batch_norm(), **FROZEN), True), gradient(plain, False), rtol=1e-6
    )
    follows = switch(bnjax.batch_norm(), moments="running", learn=True)
    chex.assert_trees_all_close(gradient(follows, True), gradient(plain, False), rtol=1e-6)
    adapts = switch(bnjax.batch_norm(), moments="batch", learn=False)
    chex.assert_trees_all_close(gradient(adapts, False), gradient(plain, True), rtol=1e-6)


def test_a_norm():
    """What modules read of it; the innermost switch of a kind counts."""
    norm = switch(bnjax.microbatches(2), learn=True)
    assert norm.state is bnjax.MicrobatchState and norm.always_updates
    assert not switch(bnjax.batch_norm(), moments="batch").always_updates
    assert switch(bnjax.batch_norm(momentum=bnjax.cumulative()), learn=False).needs_count
    inner = switch(bnjax.batch_norm(), moments="running", learn=True)
    y, new = switch(inner, moments="batch", learn=False).apply(PARAMS, STATE, X, True)
    expected = inner.apply(PARAMS, STATE, X, True)
    chex.assert_trees_all_equal((y, new), expected)
    both = switch(switch(bnjax.batch_norm(), learn=False), moments="running")
    assert not both.always_updates
    chex.assert_trees_all_equal(both.apply(PARAMS, STATE, X, True)[1], STATE)


ERRORS = {
    "moments": ({"moments": "both"}, ValueError, "moments", '"batch", "running" or None', "'both'"),
    "learn": ({"learn": 1}, TypeError, "learn", "True or False", "1"),
    "traced": ({"learn": jnp.array(True)}, TypeError, "learn", "True or False", "Array"),
    "nothing": ({}, ValueError, "moments", "must be given", "None", 'moments="running"'),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    options, *expected = ERRORS[name]
    expected = (*expected, "")[:5]
    check_message(lambda: switch(bnjax.batch_norm(), **options), expected)

    def within():
        with bnjax.linen.switch(**options):
            pass

    check_message(within, expected)
    if options:  # without any, it undoes the others
        check_message(lambda: bnjax.nnx.switch(nnx_layer(), **options), expected)


def test_what_is_no_norm():
    rule = (TypeError, "norm", "must be a Norm", "<function", "switch(batch_norm(), ...)")
    check_message(lambda: switch(bnjax.batch_norm, learn=True), rule)


def variables(momentum=None):
    """Of a linen layer."""
    stats = {"mean": STATE.mean, "var": STATE.var}
    return {"params": PARAMS._asdict(), "batch_stats": stats}


def statistics(state):
    return {"mean": state.mean, "var": state.var}


@pytest.mark.parametrize("layer", [bnjax.linen.BatchNorm, nn.BatchNorm], ids=["bnjax", "flax"])
def test_linen(layer):
    """Of both libraries, with functions compiled outside, which are traced anew inside."""
    model = nn.Sequential([layer(momentum=0.9)])
    tree = {name: {"layers_0": v} for name, v in variables().items()}
    traced, trains = [], (True, False) if layer is bnjax.linen.BatchNorm else (False,)

    @functools.partial(jax.jit, static_argnums=0)
    def run(inference, x):
        traced.append(inference)
        y, new = model.apply(tree, x, inference, mutable=MUTABLE)
        return y, new["batch_stats"]["layers_0"]

    for within in (contextlib.nullcontext, *(functools.partial(bnjax.linen.switch, **s)
                                             for s in FOUR)):  # fmt: skip
        switches = getattr(within, "keywords", {"moments": None, "learn": None})
        for train in trains:
            y, state = oracle(*effect(switches, train))
            for _ in range(2):
                with within():
                    close(run(not train, X), (y, statistics(state)))
    assert len(traced) == len(trains) * (1 + len(FOUR))


def test_linen_needs_no_mutable_statistics_where_nothing_learns():
    layer = bnjax.linen.BatchNorm(False, momentum=0.9)
    with bnjax.linen.switch(learn=False):
        close(layer.apply(variables(), X), oracle(True, False)[0])
    frozen = layer.clone(momentum=0.99, norm=switch(bnjax.batch_norm(), **FROZEN))
    close(frozen.apply(variables(), X), oracle(False, False)[0])
    with bnjax.linen.switch(learn=True), pytest.raises(Exception, match="immutable"):
        layer.apply(variables(), X, use_running_average=None)


def test_linen_contexts_within_contexts():
    """With `convert` in both orders; the innermost that gives a switch counts."""
    layer = nn.BatchNorm(False, momentum=0.9)

    def run(*contexts, layer=layer):
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            y, new = layer.apply(variables(), X, mutable=MUTABLE)
        return y, new["batch_stats"]

    def expected(*args):
        y, state = oracle(*args)
        return y, statistics(state)

    convert, of = bnjax.linen.convert, bnjax.linen.switch
    close(run(convert(), of(**FROZEN)), expected(False, False))
    close(run(of(**FROZEN), convert()), expected(False, False))
    close(run(of(moments="running"), of(learn=False)), expected(False, False))
    close(run(of(**FROZEN), of(moments="batch")), expected(True, False))
    close(run(of(**FROZEN), of(learn=True)), expected(False, True))
    own = bnjax.linen.BatchNorm(False, norm=switch(bnjax.batch_norm(momentum=0.9), learn=True))
    close(run(of(**FROZEN), layer=own), expected(False, True))
    close(run(), expected(True, True))


def nnx_layer(**fields):
    layer = bnjax.nnx.BatchNorm(C, momentum=0.9, rngs=nnx.Rngs(0), **fields)
    layer.scale[...], layer.bias[...] = PARAMS
    layer.mean[...], layer.var[...] = STATE[:2]
    return layer


@pytest.mark.parametrize("switches", FOUR, ids=ids(FOUR))
def test_nnx(switches):
    """Whatever mode the model is in, in a compiled function too, until it is undone."""
    model = nnx.Sequential(nnx_layer())
    graph = nnx.graphdef(model)
    assert bnjax.nnx.switch(model, **switches) == (("layers", 0),)
    run = nnx.jit(lambda model: model(X))
    y, state = oracle(*effect(switches, False))
    for change in (model.train, model.eval):
        change()
        model.layers[0].mean[...], model.layers[0].var[...] = STATE[:2]
        close(run(model), y)
        close((model.layers[0].mean[...], model.layers[0].var[...]), (state.mean, state.var))
    model.train()
    bnjax.nnx.switch(model)
    assert nnx.graphdef(model) == graph
    model.layers[0].mean[...], model.layers[0].var[...] = STATE[:2]
    close(run(model), oracle(True, True)[0])
    bnjax.nnx.switch(model)  # nothing to undo


def test_nnx_parts_and_flax_layers():
    """A part of a model can be frozen; flax's layers are named, none is passed over."""
    model = nnx.Sequential(nnx_layer(), nnx_layer())
    bnjax.nnx.switch(model.layers[0], **FROZEN)
    model(X)
    moved = [bool(np.any(layer.mean[...] != STATE.mean)) for layer in model.layers]
    assert moved == [False, True]
    with pytest.raises(ValueError, match=r"'switch': Switch.*\('layers', 0\)"):
        bnjax.nnx.revert(model)
    bnjax.nnx.switch(model)
    assert len(bnjax.nnx.revert(model)) == 2
    mixed = nnx.Sequential(nnx_layer(), *model.layers)
    with pytest.raises(ValueError, match=r"flax\.nnx\.BatchNorm at \[\('layers', 1\).*convert"):
        bnjax.nnx.switch(mixed, **FROZEN)
    assert mixed.layers[0].switched is None
    with pytest.raises(ValueError, match=r"must have a bnjax\.nnx\.BatchNorm layer, got none"):
        bnjax.nnx.switch(nnx.Sequential(jnp.tanh), **FROZEN)


def test_nnx_that_never_learns_may_be_of_another_trace():
    """As a second forward pass, of a model that a function closes over."""
    layer = nnx_layer()
    with pytest.raises(Exception, match="trace level"):
        jax.jit(layer)(X)
    bnjax.nnx.switch(layer, moments="batch", learn=False)
    close(jax.jit(layer)(X), oracle(True, False)[0])


FOLDED = {
    "frozen": (FROZEN, True),
    "batch": ({"moments": "batch", "learn": False}, False),
    "adapting": ({"moments": "batch", "learn": True}, False),
    "following": ({"moments": "running", "learn": True}, False),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding(name):
    """Layers that take moments of the batch, or learn, at evaluation are kept, others are not."""
    switches, folds = FOLDED[name]
    norm = switch(bnjax.batch_norm(), **switches)
    model = nn.Sequential([nn.Dense(C), bnjax.linen.BatchNorm(True, norm=norm)])
    tree = model.init(KEY, X)
    if folds:
        found = fold.linen(model, tree, X)
        close(found.apply(found.variables, X), model.apply(tree, X))
    else:
        mutable = {"mutable": MUTABLE} if switches["learn"] else {}
        why = "learn at inference" if mutable else "not one finite scale and shift per channel"
        with pytest.raises(ValueError, match=rf"no BatchNorm can be folded:\n.*{why}"):
            fold.linen(model, tree, X, **mutable)
    dense = functools.partial(nnx.Linear, C, C, rngs=nnx.Rngs(0))
    model = nnx.Sequential(dense(), nnx_layer(), dense(), nnx_layer())
    model.eval()
    bnjax.nnx.switch(model.layers[1], **switches)
    found = fold.nnx(model, X)
    assert sorted(found.folded) == ["layers/1"] * folds + ["layers/3"]
    close(found.model(X), model(X))
    if not folds:
        close(found.model.layers[1].mean[...], model.layers[1].mean[...])


def test_folding_within_the_context():
    model = nn.Sequential([nn.Dense(C), bnjax.linen.BatchNorm(True)])
    tree = model.init(KEY, X)
    folded = fold.linen(model, tree, X)
    for call in (lambda: fold.linen(model, tree, X), lambda: folded.apply(folded.variables, X)):
        with bnjax.linen.switch(**FROZEN), pytest.raises(ValueError, match="leave that context"):
            call()

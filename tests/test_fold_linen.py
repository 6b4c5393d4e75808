"""bnjax.fold.linen: what is folded, what is not and why, and the folded call."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import linen as nn
from fold_layers import KEY, ROWS, Mini, mini, trained
from jax.ad_checkpoint import checkpoint_name

import bnjax
import bnjax.linen
from bnjax import fold

BN = functools.partial(bnjax.linen.BatchNorm, True)
Dense = functools.partial(nn.Dense, 3)


def twice(x):
    dense, norm = Dense(), BN()
    return norm(dense(norm(dense(x))))


def both_sides(x):
    return BN(name="b")(Dense(name="d")(BN(name="a")(x)))


MASK = np.random.default_rng(0).random((1, 3, 3)) < 0.5


def with_own_gradient(x):
    dense = nn.custom_vjp(
        lambda m, x: m(x),
        forward_fn=lambda m, x: nn.vjp(lambda m, x: m(x), m, x),
        backward_fn=lambda vjp, g: vjp(g),
    )
    return BN()(dense(Dense(), x))


FOLDED = {
    "own gradient": with_own_gradient,
    "one layer called twice": twice,
    "on both sides": both_sides,
    "without scale and bias": lambda x: BN(use_scale=False, use_bias=False)(Dense()(x)),
    "epsilon bound in a norm": lambda x: BN(norm=bnjax.batch_norm(epsilon=0.25))(Dense()(x)),
    "schedule": lambda x: BN(momentum=bnjax.cumulative())(Dense()(x)),
    "positive axis": lambda x: BN(axis=1)(Dense()(x)),
    "remat": lambda x: nn.remat(Mini)(lambda x: BN()(nn.remat(nn.Dense)(3)(x)))(x),
    "jit": lambda x: nn.jit(Mini)(lambda x: BN()(Dense(use_bias=False)(x)))(x),
    "dropout between": lambda x: BN()(nn.Dropout(0.5, deterministic=True)(Dense()(x))),
    "names for remat between": lambda x: BN()(checkpoint_name(Dense()(x), "saved")),
    "kernel mask": lambda x: nn.Conv(3, (1,), mask=MASK)(BN()(x)),
    "keyword input": lambda x: BN()(x=Dense()(inputs=x)),
    "unused beside": lambda x: BN()(Dense()(x)) + Dense()(x),
    "unknown padding, no shift": lambda x: nn.Conv(3, (3,))(
        BN(use_bias=False, name="zero mean")(x)
    ),
}


@pytest.mark.parametrize("f", FOLDED.values(), ids=FOLDED)
def test_folded(f):
    model, variables = mini(f)
    if "zero mean" in variables["params"]:
        variables["batch_stats"]["zero mean"]["mean"] *= 0
    folded = fold.linen(model, variables, jax.ShapeDtypeStruct(ROWS.shape, ROWS.dtype))
    assert not folded.kept and "batch_stats" not in folded.variables
    y, expected = folded.apply(folded.variables, ROWS), model.apply(variables, ROWS)
    tolerances.assert_close(y, expected, np.float32, 64)
    assert "rsqrt" not in str(jax.make_jaxpr(folded.apply)(folded.variables, ROWS))


def test_dtypes_are_kept():
    """A layer in bfloat16 with a norm in float32 gives float32 as before."""
    model, variables = mini(lambda x: BN(dtype=jnp.float32)(Dense(dtype=jnp.bfloat16)(x)))
    exact = mini(lambda x: BN()(Dense()(x)))[0].apply(variables, ROWS)
    folded = fold.linen(model, variables, ROWS)
    y, before = folded.apply(folded.variables, ROWS), model.apply(variables, ROWS)
    assert y.dtype == before.dtype == jnp.float32
    # Input, kernel and output are each rounded once, with and without folding.
    for result in (y, before):
        assert tolerances.error(result, exact) <= 3 * tolerances.unit(jnp.bfloat16)


# --- linen: what is not, and why -------------------------------------------------------


class OwnCall(bnjax.linen.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x)


def tied(x):
    dense = Dense()
    y = BN()(dense(x))
    return y @ dense.variables["params"]["kernel"].T


def sometimes(x):
    dense = Dense()
    return BN()(dense(x)) + dense(2 * x)


def mixing():
    def apply(params, state, x, train, **options):
        return x[..., ::-1], state

    return bnjax.Norm(bnjax.bn_init, apply)


def scanned(x):
    body = nn.scan(
        Mini, variable_broadcast=["params", "batch_stats"], split_rngs={"params": False}, length=2
    )(lambda carry: (BN()(Dense()(carry)), None))
    return body(x)[0]


def stacked(x):
    axes = {"params": 0, "batch_stats": 0}
    lifted = nn.vmap(Mini, variable_axes=axes, split_rngs={"params": True})
    return lifted(lambda x: BN()(Dense()(x)))(x)


KEPT = {
    "skip connection": (lambda x: (y := Dense()(x)) + BN()(y), "Dense_0 also goes to `add`"),
    "output": (lambda x: (y := Dense()(x), BN()(y)), "Dense_0 is also an output of the model"),
    "nonlinearity": (lambda x: BN()(nn.relu(Dense()(x))), "its input comes from `max`"),
    "reshape": (lambda x: BN()(Dense()(x).reshape(11, 1, 3)), "its input comes from `reshape`"),
    "alone": (lambda x: BN()(x), "comes from the model's input.*goes to the model's output"),
    "mask": (lambda x: BN()(Dense()(x), mask=jnp.ones((11, 1), bool)), "called with a mask"),
    "other axis": (lambda x: BN(axis=0)(Dense()(x)), r"feature axes \(0,\) of an input of shape"),
    "several axes": (lambda x: BN(axis=(0, 1))(Dense()(x)), r"feature axes \(0, 1\)"),
    "kernel read": (tied, "`kernel` of Dense_0 is also read by `transpose`"),
    "called without": (sometimes, "the output of Dense_0 also goes to `add`"),
    "own dot": (lambda x: BN()(Dense(dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k))(x)),
                "Dense_0 has a `dot_general` of its own"),
    "own call": (lambda x: OwnCall(True)(Dense()(x)), "is a OwnCall with a `__call__` of its own"),
    "mixing norm": (lambda x: BN(norm=mixing())(Dense()(x)), "not one finite scale and shift"),
    "zeros at the borders": (lambda x: nn.Conv(3, (3,))(BN()(x)), "padding='SAME' sees zeros"),
    "kernel computed": (lambda x: BN()(nn.WeightNorm(Dense())(x)),
                        "`kernel` of Dense_0.* is shared, stacked or computed"),
    "computed kernel mask": (lambda x: nn.Conv(3, (1,), mask=jnp.ones((1, 3, 3)))(BN()(x)),
                             "the mask of Conv_0 is computed in the model"),
    "scan": (scanned, "called inside a loop, a branch or another transformation"),
    "stacked": (stacked, "is shared, stacked or computed"),
}  # fmt: skip


@pytest.mark.parametrize("f, why", KEPT.values(), ids=KEPT)
def test_kept(f, why):
    model, variables = mini(f)
    with pytest.raises(ValueError, match=rf"(?s)no BatchNorm can be folded:\n  .*{why}"):
        fold.linen(model, variables, ROWS)


# --- linen: the call ------------------------------------------------------------------


def test_some_are_kept():
    """What can be folded is; the rest works as before, and is reported."""
    model, variables = mini(lambda x: BN()(nn.relu(BN()(Dense()(x)))))
    folded = fold.linen(model, variables, ROWS)
    assert folded.folded == {"BatchNorm_1": "Dense_0"}
    reason = "into a layer before it: its input comes from `max`; into one after it: its output "
    assert folded.kept == {"BatchNorm_0": reason + "goes to the model's output"}
    assert set(folded.variables["batch_stats"]) == {"BatchNorm_0"}
    expected = model.apply(variables, ROWS)
    tolerances.assert_close(folded.apply(folded.variables, ROWS), expected, np.float32, 64)


def test_overflow_names_the_layer():
    model, variables = mini(lambda x: BN(use_scale=False)(Dense(param_dtype=jnp.float16)(x)))
    variables["batch_stats"]["BatchNorm_0"]["var"] *= 0
    model = Mini(lambda x: BN(use_scale=False, epsilon=1e-12)(Dense(param_dtype=jnp.float16)(x)))
    with pytest.raises(ValueError, match="folding into 'Dense_0': the folded `kernel` must fit"):
        fold.linen(model, variables, ROWS)


def test_bad_statistics_are_kept():
    model, variables = mini(lambda x: BN()(Dense()(x)))
    variables["batch_stats"]["BatchNorm_0"]["var"] *= jnp.nan
    with pytest.raises(ValueError, match=r"BatchNorm_0: running statistics must be finite"):
        fold.linen(model, variables, ROWS)


def test_pairs():
    """Those named are folded, whichever side the norm is on; the others are kept."""
    model, variables = mini(lambda x: both_sides(x).sum(0, keepdims=True))
    folded = fold.linen(model, variables, ROWS, pairs={"d": "a"})
    assert folded.folded == {"a": "d"} and folded.kept == {"b": "not in `pairs`"}
    assert set(folded.variables["params"]) == {"b", "d"}
    assert set(folded.variables["batch_stats"]) == {"b"}
    expected = model.apply(variables, ROWS)
    tolerances.assert_close(folded.apply(folded.variables, ROWS), expected, np.float32, 64)
    every = fold.linen(model, variables, ROWS, pairs=[("d", "b"), ("a", "d")])
    assert every.folded == {"a": "d", "b": "d"}
    tolerances.assert_close(every.apply(every.variables, ROWS), expected, np.float32, 64)


@pytest.mark.parametrize(
    "pairs, match",
    [
        ({"x": "a"}, r"got 'x'. Known are the layers \['d', 'e'\] and .* \['a', 'b'\]"),
        ([("d", "d")], "a pair must be one layer and one BatchNorm, got \\('d', 'd'\\)"),
        (["da"], "`pairs` must hold pairs of paths, got 'da'"),
        ({}, "`pairs` must name one pair at least"),
        ([("d", "a"), ("d", "a")], "name each BatchNorm once"),
        (
            {"e": "b"},
            r"'b' cannot be folded into 'e': before it, .* from d; after it, .* from `max`",
        ),
    ],
)
def test_pairs_that_cannot_be(pairs, match):
    model, variables = mini(lambda x: Dense(name="e")(nn.relu(both_sides(x))))
    with pytest.raises(ValueError, match=match):
        fold.linen(model, variables, ROWS, pairs=pairs)


class Flagged(nn.Module):
    @nn.compact
    def __call__(self, x, train, mask=None, skip=False):
        y = x if skip else nn.Dense(3, name="d")(x)
        inference = jnp.logical_not(train) if isinstance(train, jax.Array) else not train
        return bnjax.linen.BatchNorm(inference, name="b")(y, mask=mask)


def test_training():
    """Neither folding nor the folded model takes what only training can mean."""
    model = Flagged()
    variables = trained(jax.eval_shape(functools.partial(model.init, train=False), KEY, ROWS))
    for flag in (True, jnp.array(False)):
        with pytest.raises(ValueError, match="'b' must be called with use_running_average=True"):
            fold.linen(model, variables, ROWS, flag)
    folded = fold.linen(model, variables, ROWS, False)
    with pytest.raises(ValueError, match="'b' must be called with use_running_average=True"):
        folded.apply(folded.variables, ROWS, True)
    with pytest.raises(ValueError, match=r"'b' is folded into 'd'.*: b is called with a mask"):
        folded.apply(folded.variables, ROWS, False, mask=jnp.ones((11, 1), bool))
    with pytest.raises(ValueError, match=r"'b' is folded into 'd'.*'b' is called without 'd'"):
        folded.apply(folded.variables, ROWS, False, skip=True)


def test_no_normalization():
    model, variables = mini(lambda x: Dense()(x))
    with pytest.raises(ValueError, match=r"called none.*It called \['Dense_0'\]"):
        fold.linen(model, variables, ROWS)


def test_metadata_and_frozen_trees():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = Mini(lambda x: BN()(Dense(kernel_init=init)(x)))
    variables = flax.core.freeze(trained(jax.eval_shape(model.init, KEY, ROWS)))
    folded = fold.linen(model, variables, ROWS)
    kernel = folded.variables["params"]["Dense_0"]["kernel"]
    assert isinstance(folded.variables, flax.core.FrozenDict)
    assert kernel.names == (None, "model") and kernel.value.dtype == jnp.float32
    expected = model.apply(variables, ROWS)
    tolerances.assert_close(folded.apply(folded.variables, ROWS), expected, np.float32, 64)

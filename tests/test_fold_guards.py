"""bnjax.fold where models do more than one call shows: never other numbers in silence."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import linen as nn
from flax import nnx
from fold_layers import KEY, ROWS, Mini, assert_same, few, mini, trained

import bnjax.linen
from bnjax import fold

BN = functools.partial(bnjax.linen.BatchNorm, True)
Dense = functools.partial(nn.Dense, 3)


# --- kept, with a reason ----------------------------------------------------------------


class Rounded(nn.Dense):
    def param(self, name, *args, **kwargs):
        return jnp.round(super().param(name, *args, **kwargs))


class Defaults(nn.Dense):
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.ones


class Scope(nn.Module):
    both: bool = True

    @nn.compact
    def __call__(self, x):
        dense, norm = Dense(use_bias=False), BN(use_bias=False)
        nn.share_scope(self, dense)
        if self.both:
            nn.share_scope(self, norm)
        return norm(dense(x))


def rounding(*arrays, **options):
    return nn.dtypes.promote_dtype(*(jax.tree.map(jnp.round, a) for a in arrays), **options)


KEPT = {
    "own param": (lambda x: BN()(Rounded(3)(x)), "Dense.*is a Rounded with a `param` of its own"),
    "own promotion": (lambda x: BN()(Dense(promote_dtype=rounding)(x)),
                      "Dense_0 has a `promote_dtype` of its own"),
    "complex": (lambda x: nn.BatchNorm(True)(Dense(param_dtype=jnp.complex64)(x)),
                "BatchNorm_0 computes in complex64|Dense_0 computes in complex64"),
    "shared scope": (lambda x: Scope()(x), "Scope_0 shares its scope with another layer"),
}  # fmt: skip


@pytest.mark.parametrize("f, why", KEPT.values(), ids=KEPT)
def test_kept(f, why):
    model = Mini(f)
    variables = trained(jax.eval_shape(model.init, KEY, ROWS))
    why = why.replace("Dense.*", "Rounded_0 ")
    with pytest.raises(ValueError, match=rf"(?s)no BatchNorm can be folded:\n  .*({why})"):
        fold.linen(model, variables, ROWS)


def test_subclass_with_defaults():
    model, variables = mini(lambda x: BN()(Defaults(3)(x)))
    assert_same(fold.linen(model, variables, ROWS), model, variables, ROWS)


def test_layer_in_the_scope_of_the_model():
    model = Scope(both=False)
    variables = trained(jax.eval_shape(model.init, KEY, ROWS))
    folded = fold.linen(model, variables, ROWS)
    assert set(folded.variables["params"]) == {"kernel", "bias"}
    assert_same(folded, model, variables, ROWS)


def test_outputs_that_are_no_arrays():
    model, variables = mini(lambda x: {"y": BN()(Dense()(x)), "kind": "logits", "n": 3})
    folded = fold.linen(model, variables, ROWS)
    y = folded.apply(folded.variables, ROWS)
    assert y["kind"] == "logits" and y["n"] == 3
    tolerances.assert_close(y["y"], model.apply(variables, ROWS)["y"], np.float32, 64)


def test_outputs_that_hide_arrays():
    """Whether the output of the layer is in there cannot be seen."""
    _, variables = mini(lambda x: BN()(Dense()(x)))
    hides = Mini(lambda x: types.SimpleNamespace(y=(y := Dense()(x)), z=BN()(y)))
    with pytest.raises(TypeError, match=r"must return arrays.*got SimpleNamespace.*Fix: "):
        fold.linen(hides, variables, ROWS)


# --- a norm before the layer, at large means ---------------------------------------------


def after(deviations, **options):
    model, variables = mini(lambda x: Dense()(BN(**options)(x)))
    statistics = variables["batch_stats"]["BatchNorm_0"]
    width = jnp.sqrt(statistics["var"] + 1e-5)
    statistics["mean"] = width * jnp.array([0.0, -deviations, 1.0])
    return model, variables, ROWS + np.asarray(statistics["mean"])


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"norm": bnjax.batch_norm()}])
def test_large_means(options):
    """Of a layer that would take them in, only where they are small or it is told to."""
    model, variables, x = after(9.0, **options)
    assert_same(fold.linen(model, variables, x), model, variables, x)
    model, variables, x = after(11.0, **options)
    why = "means of up to 11 deviations.*cost accuracy.*`pairs`"
    with pytest.raises(ValueError, match=f"(?s)no BatchNorm can be folded.*{why}"):
        fold.linen(model, variables, x)
    folded = fold.linen(model, variables, x, pairs={"Dense_0": "BatchNorm_0"})
    assert_same(folded, model, variables, x)


def test_traced_means():
    """Unknown while they are traced, so that only `pairs` fold them into the layer after."""
    model, variables, x = after(9.0)

    @functools.partial(jax.jit, static_argnums=2)
    def run(variables, x, pairs):
        folded = fold.linen(model, variables, x, pairs=None if pairs is None else [pairs])
        return folded.apply(folded.variables, x)

    with pytest.raises(ValueError, match=r"(?s)no BatchNorm can be.*its statistics are traced"):
        run(variables, x, None)
    y = run(variables, x, ("BatchNorm_0", "Dense_0"))
    tolerances.assert_close(y, model.apply(variables, x), np.float32, 64 * 9)


# --- nnx --------------------------------------------------------------------------------


class Feature(nnx.Variable):
    pass


def in_variable(model, x):
    model.kept[...] = model.dense(x)
    return nn.relu(model.norm(model.kept[...]))


def in_attribute(model, x):
    model.kept = model.dense(x)
    return nn.relu(model.norm(model.kept))


def in_new_variable(model, x):
    y = model.dense(x)
    model.new = Feature(y)
    return nn.relu(model.norm(y))


@pytest.mark.parametrize(
    "call, kept",
    [
        (in_variable, lambda: Feature(jnp.zeros((11, 3)))),
        (in_variable, lambda: nnx.BatchStat(jnp.zeros((11, 3)))),
        (in_attribute, lambda: nnx.data(jnp.zeros((11, 3)))),
        (in_new_variable, lambda: None),
    ],
)
def test_nnx_stored_activations(call, kept):
    """All that the call stores is an output, whatever holds it."""
    model = few(call)
    model.kept = kept()
    with pytest.raises(ValueError, match="output of dense is also an output of the model"):
        fold.nnx(model, ROWS)


def test_nnx_counters():
    """What the call changes besides stands in no way."""

    def counted(model, x):
        model.kept[...] += 1
        return model.norm(model.dense(x))

    model = few(counted)
    model.kept = Feature(jnp.zeros(()))
    folded = fold.nnx(model, ROWS)
    tolerances.assert_close(folded.model(ROWS), model(ROWS), np.float32, 64)


def tie(model, holder):
    if holder == "layer":
        model.other.kernel = model.dense.kernel
    elif holder == "model":
        model.kernel = model.dense.kernel
    elif holder == "list":
        model.held = nnx.List([model.dense.kernel])
    else:
        model.held = nnx.data({"a": (model.dense.kernel,)})


@pytest.mark.parametrize("holder", ["layer", "model", "list", "dict"])
def test_nnx_tied_kernels(holder):
    """Another holder of the kernel may be called otherwise than in the trace."""
    model = few(lambda m, x: nn.relu(m.norm(m.dense(x))))
    assert fold.nnx(model, ROWS).folded == {"norm": "dense"}
    tie(model, holder)
    with pytest.raises(ValueError, match="`kernel` of dense is also held by"):
        fold.nnx(model, ROWS)


@pytest.mark.parametrize("side", ["before", "after"])
def test_nnx_kernel_mask(side):
    """The mask is a constant, though the trace sees an array of the model."""
    mask = np.random.default_rng(0).random((1, 3, 3)) < 0.5
    model = few(lambda m, x: m.norm(m.dense(x)) if side == "after" else m.dense(m.norm(x)))
    model.dense = nnx.Conv(3, 3, (1,), mask=jnp.asarray(mask), rngs=nnx.Rngs(0))
    folded = fold.nnx(model, ROWS)
    tolerances.assert_close(folded.model(ROWS), model(ROWS), np.float32, 64)


def test_nnx_outputs_that_are_no_arrays():
    model = few(lambda m, x: {"y": m.norm(m.dense(x)), "kind": "logits"})
    assert fold.nnx(model, ROWS).model(ROWS)["kind"] == "logits"


def test_nnx_own_methods():
    model = few(lambda m, x: m.norm(m.dense(x)))
    model.dense.promote_dtype = lambda values, **options: values
    with pytest.raises(ValueError, match="dense has a `promote_dtype` of its own"):
        fold.nnx(model, ROWS)


def test_nnx_large_means():
    model = few(lambda m, x: m.dense(m.norm(x)))
    model.norm.mean[...] = 11 * jnp.sqrt(model.norm.var[...] + 1e-5)
    with pytest.raises(ValueError, match="means of up to 11 deviations"):
        fold.nnx(model, ROWS)
    assert fold.nnx(model, ROWS, pairs=[("dense", "norm")]).folded == {"norm": "dense"}

"""bnjax.fold.linen: the folded model in other calls than that of folding, and what it reads."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import linen as nn
from fold_layers import KEY, ROWS, Mini, assert_same, mini, trained

import bnjax.linen
from bnjax import fold

BN = functools.partial(bnjax.linen.BatchNorm, True)
Dense = functools.partial(nn.Dense, 3)


# --- linen: variables ------------------------------------------------------------------


@pytest.mark.parametrize("norm", [bnjax.linen.BatchNorm, nn.BatchNorm])
def test_surplus_variables(norm):
    """What the modules do not use is not folded, as it is not read in evaluation."""
    model, variables = mini(
        lambda x: norm(True, use_scale=False, use_bias=False)(Dense(use_bias=False)(x))
    )
    params = variables["params"]
    params["Dense_0"]["bias"] = jnp.full(3, 3.0)
    params["BatchNorm_0"] = {"scale": jnp.full(3, 3.0), "bias": jnp.full(3, 3.0)}
    variables["batch_stats"]["BatchNorm_0"]["scale"] = jnp.full(3, 5.0)
    assert_same(fold.linen(model, variables, ROWS), model, variables, ROWS)


def test_other_collections_stay():
    """Only parameters and statistics of a norm are removed."""
    model, variables = mini(lambda x: BN()(Dense()(x)))
    average = {"BatchNorm_0": {"scale": jnp.ones(3)}, "Dense_0": {"bias": jnp.ones(3)}}
    folded = fold.linen(model, {**variables, "average": average}, ROWS)
    assert folded.variables["average"] == average
    assert set(folded.variables) == {"params", "average"}
    assert set(folded.variables["params"]) == {"Dense_0"}


# --- linen: calls other than the one of folding ----------------------------------------


INNER, INNER_VARIABLES = mini(lambda x: BN(name="b")(Dense(name="d")(x)))


class Ways(nn.Module):
    """Layer and norm, together and apart."""

    def setup(self):
        self.d, self.b = Dense(), BN()

    def __call__(self, x, way="both"):
        y = self.d(x)
        if way == "sow":
            self.sow("intermediates", "y", y)
        if way == "layer":
            return y
        if way == "norm":
            return self.b(x)
        if way == "beside":
            return self.b(x) + y
        if way == "mask":
            return self.b(y, mask=jnp.ones((11, 1), bool))
        if way == "nested":
            return INNER.apply(INNER_VARIABLES, self.b(y))
        return self.b(nn.relu(y) if way == "relu" else y)

    def features(self, x):
        return self.d(x)

    def again(self, x):
        return nn.relu(self(self(x)))


APART = {
    "layer alone": ({"way": "layer"}, "'d' is called without 'b'"),
    "norm on something else": ({"way": "norm"}, "the input of b comes from the model's input"),
    "as many calls of both": ({"way": "beside"}, "the input of b comes from the model's input"),
    "something between": ({"way": "relu"}, "the input of b comes from `max`"),
    "mask": ({"way": "mask"}, "b is called with a mask"),
    "other method": ({"method": "features"}, "'d' is called without 'b'"),
    "function as method": ({"method": Ways.features}, "'d' is called without 'b'"),
    "captured": ({"capture_intermediates": True}, "output of d is also an output of the model"),
    "sown": ({"way": "sow", "mutable": ["intermediates"]}, "d is also an output of the model"),
    "all mutable": ({"mutable": True}, "is also returned"),
    "nested": ({"way": "nested"}, "is shared, stacked or computed"),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("call, why", APART.values(), ids=APART)
def test_calls_apart(call, why, jit):
    """A call whose data flow is another one is refused, each time."""
    variables = trained(jax.eval_shape(Ways().init, KEY, ROWS))
    folded = fold.linen(Ways(), variables, ROWS)
    run = jax.jit(lambda v, x: folded.apply(v, x, **call)) if jit else folded.apply
    for _ in range(2):
        with pytest.raises(ValueError, match=f"'b' is folded into 'd'.*{why}.*Fix: "):
            run(folded.variables, ROWS, **({} if jit else call))


class Settings(nn.Module):
    """A layer and a norm whose fields depend on the call."""

    @nn.compact
    def __call__(self, x, epsilon=1e-5, bias=True, shift=True, soft=None, mask=False, before=False):
        norm = None if soft is None else bnjax.batch_norm(epsilon=1.0 if soft else 1e-5)
        bn = BN(epsilon=epsilon, use_bias=shift, norm=norm, name="b")
        mask = np.tri(3)[None] if mask else None
        d = nn.Conv(3, (1,), use_bias=bias, mask=mask, name="d")
        x = x[:, None]
        return (d(bn(x)) if before else bn(d(x)))[:, 0]


CHANGED = {
    "epsilon": ({}, {"epsilon": 1.0}, "b has another epsilon or norm"),
    "norm": ({"soft": False}, {"soft": True}, "b has another epsilon or norm"),
    "or none": ({}, {"soft": True}, "b has another epsilon or norm"),
    "no bias": ({}, {"bias": False}, r"d has another set of variables, \['kernel'\]"),
    "a bias": ({"bias": False}, {"bias": True}, "d has another set of variables"),
    "no shift": ({}, {"shift": False}, "b has another set of variables"),
    "mask": ({"before": True}, {"before": True, "mask": True}, "d has another mask"),
}


@pytest.mark.parametrize("first, second, why", CHANGED.values(), ids=CHANGED)
def test_settings_that_change(first, second, why):
    variables = trained(jax.eval_shape(Settings().init, KEY, ROWS))
    folded = fold.linen(Settings(), variables, ROWS, **first)
    assert_same(folded, Settings(), variables, ROWS[:3], **first)
    run = jax.jit(lambda v, x, which: folded.apply(v, x, **(second if which else first)),
                  static_argnums=2)  # fmt: skip
    expected = Settings().apply(variables, ROWS[:5], **first)
    tolerances.assert_close(run(folded.variables, ROWS[:5], False), expected, np.float32, 64)
    with pytest.raises(ValueError, match=f"'b' is folded into 'd'.*{why}.*Fix: "):
        run(folded.variables, ROWS, True)


def test_layout_that_changes():
    class Transposed(nn.Module):
        @nn.compact
        def __call__(self, x, swapped=False):
            return BN()(nn.ConvTranspose(3, (1,), transpose_kernel=swapped)(x[:, None]))

    variables = trained(jax.eval_shape(Transposed().init, KEY, ROWS))
    folded = fold.linen(Transposed(), variables, ROWS)
    with pytest.raises(ValueError, match="has another layout of its kernel"):
        folded.apply(folded.variables, ROWS, swapped=True)


def test_a_path_called_with_several_settings():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            d, b = Dense(name="d"), BN(name="b")
            first = b(d(x))
            other = BN(epsilon=2.0, parent=self.scope.push("b", reuse=True))
            return first, other(d(x))

    variables = trained(jax.eval_shape(Twice().init, KEY, ROWS))
    with pytest.raises(ValueError, match="b is called again with another epsilon or norm"):
        fold.linen(Twice(), variables, ROWS)


def test_typed_keys():
    """As jax.random.key makes, though nothing draws from them."""
    model, variables = mini(lambda x: BN()(Dense()(x)))
    rngs = {"dropout": jax.random.key(1)}
    folded = fold.linen(model, variables, ROWS, rngs=rngs)
    assert_same(folded, model, variables, ROWS, rngs=rngs)
    assert_same(folded, model, variables, ROWS)


def test_calls_that_fit():
    """Other methods, flags, shapes and dtypes are fine where layer and norm go together."""
    variables = trained(jax.eval_shape(Ways().init, KEY, ROWS))
    folded = fold.linen(Ways(), variables, ROWS)
    same = functools.partial(assert_same, folded, Ways(), variables)
    same(ROWS[:2], way="whatever")
    same(ROWS, method="again")
    same(ROWS, method=Ways.again)
    same(ROWS, way="sow")
    same(jnp.ones((2, 3), jnp.int32))
    same(ROWS, mutable=["unused"])
    same(ROWS, mutable=flax.core.DenyList(["params", "batch_stats", "intermediates"]), way="sow")


@pytest.mark.parametrize("use_bias", [True, False])
def test_other_variables(use_bias):
    """Those of before are not taken for folded ones."""
    model, variables = mini(lambda x: BN()(Dense(use_bias=use_bias)(x)))
    folded = fold.linen(model, variables, ROWS)
    with pytest.raises(ValueError, match="got some with 'batch_stats/BatchNorm_0/mean'"):
        folded.apply(variables, ROWS)


def test_dtype_follows_the_call():
    """As that of the unfolded model does: bfloat16 in, bfloat16 out."""
    model = Mini(lambda x: BN(param_dtype=jnp.bfloat16)(Dense(param_dtype=jnp.bfloat16)(x)))
    variables = trained(jax.eval_shape(model.init, KEY, ROWS))
    folded = fold.linen(model, variables, ROWS)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = ROWS.astype(dtype)
        y, expected = folded.apply(folded.variables, x), model.apply(variables, x)
        assert y.dtype == expected.dtype
        assert tolerances.error(y, expected) <= 8 * tolerances.unit(jnp.bfloat16)


def test_same_calls_are_checked_once(monkeypatch):
    """The call of folding is checked already; another one when it is first seen."""
    model, variables = mini(lambda x: BN()(Dense()(x)))
    folded = fold.linen(model, variables, jax.ShapeDtypeStruct(ROWS.shape, ROWS.dtype))
    traces = []
    make_jaxpr = jax.make_jaxpr
    monkeypatch.setattr(jax, "make_jaxpr", lambda f: traces.append(f) or make_jaxpr(f))
    for x in (ROWS, jnp.asarray(ROWS), 2 * ROWS):
        folded.apply(folded.variables, x)
    assert len(traces) == 0
    for x in (ROWS[:4], ROWS[4:8]):
        folded.apply(folded.variables, x)
    assert len(traces) == 1


def test_collections_that_come_later():
    """As a cache: it may decide the flow, and its shapes are those of the call."""

    class Cached(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = Dense()(x)
            if self.has_variable("cache", "stop"):
                return y
            y = BN()(y)
            return y + self.get_variable("cache", "h") if self.has_variable("cache", "h") else y

    model = Cached()
    variables = trained(jax.eval_shape(model.init, KEY, ROWS))
    folded = fold.linen(model, variables, ROWS)
    for size in (3, 5):
        cache = {"cache": {"h": jnp.ones((size, 3))}}
        y = folded.apply({**folded.variables, **cache}, ROWS[:size])
        expected = model.apply({**variables, **cache}, ROWS[:size])
        tolerances.assert_close(y, expected, np.float32, 64)
    for _ in range(2):
        with pytest.raises(ValueError, match="'Dense_0' is called without 'BatchNorm_0'"):
            folded.apply({**folded.variables, "cache": {"stop": jnp.ones(())}}, ROWS)


# --- linen: nn.jit ----------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(BN(name="b")(Dense(name="d")(x)))


class Method(nn.Module):
    def setup(self):
        self.d, self.b = Dense(), BN()

    @nn.jit
    def __call__(self, x):
        return nn.relu(self.b(self.d(x)))


JitBlock, JitDense = nn.jit(Block), nn.jit(nn.Dense)
CACHED = {
    "block": lambda x: JitBlock()(x),
    "method": lambda x: Method()(x),
    "layer": lambda x: nn.relu(BN()(JitDense(3, use_bias=False)(x))),
    "broadcast": lambda x: nn.vmap(
        JitBlock, variable_axes={"params": None, "batch_stats": None}, split_rngs={"params": False}
    )()(x[None]),
}


@pytest.mark.parametrize("f", CACHED.values(), ids=CACHED)
def test_jit_blocks(f):
    """Whatever nn.jit has compiled before: of the model, of its folds, of other variables."""
    model, variables = mini(f)
    expected = model.apply(variables, ROWS)
    for _ in range(2):
        folded = fold.linen(model, variables, ROWS)
        assert len(folded.folded) == 1 and not folded.kept
        for _ in range(2):
            assert_same(folded, model, variables, ROWS)
    y = jax.jit(folded.apply)(folded.variables, ROWS)
    tolerances.assert_close(y, expected, np.float32, 64)
    tolerances.assert_close(model.apply(variables, ROWS), expected, np.float32, 0)


def test_jit_blocks_folded_otherwise():
    """Two folds whose variables look the same, and mean something else."""

    class Between(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = functools.partial(Dense, use_bias=False)
            return dense(name="last")(BN(name="b")(dense(name="first")(x)))

    block = nn.jit(Between)
    model, variables = mini(lambda x: block(name="m")(x))
    for name in ("first", "last"):
        variables["params"]["m"][name]["bias"] = jnp.full(3, 3.0, jnp.float32)
    for name in ("first", "last"):
        folded = fold.linen(model, variables, ROWS, pairs=[(f"m/{name}", "m/b")])
        assert_same(folded, model, variables, ROWS)


def test_converted_models():
    """`convert` steps aside for folding, and for the folded model."""
    model, variables = mini(lambda x: nn.BatchNorm(True)(nn.relu(nn.BatchNorm(True)(Dense()(x)))))
    expected = model.apply(variables, ROWS)
    folded = fold.linen(model, variables, ROWS)
    with bnjax.linen.convert():
        inside = fold.linen(model, variables, ROWS)
        assert inside.folded == folded.folded == {"BatchNorm_1": "Dense_0"}
        assert inside.kept.keys() == {"BatchNorm_0"}
        for each in (folded, inside):
            y = each.apply(each.variables, ROWS)
            tolerances.assert_close(y, expected, np.float32, 64)
        assert_same(folded, model, variables, ROWS)
    assert_same(inside, model, variables, ROWS)

"""bnjax.fold on networks of linen and nnx: the same numbers, and no normalization left."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import linen as nn
from flax import nnx
from fold_layers import KEY, ROWS, few, quickly, trained

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import fold

RNG = np.random.default_rng(0)
X = RNG.normal(1, 1, (4, 11, 11, 3)).astype(np.float32)


class LinenNet(nn.Module):
    """Norms before, after and on both sides of layers; a skip connection; all kinds of layers."""

    norm: type | None = bnjax.linen.BatchNorm
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        def norm(x):
            return x if self.norm is None else self.norm(use_running_average=not train)(x)

        bias = {"use_bias": self.use_bias}
        x = nn.relu(norm(nn.Conv(8, (3, 3), padding="VALID", **bias)(norm(x))))
        skip = norm(nn.Conv(16, (1, 1), strides=2, **bias)(x))
        x = nn.relu(norm(nn.Conv(16, (3, 3), strides=2, feature_group_count=2, **bias)(x)))
        x = norm(nn.Conv(16, (3, 3), kernel_dilation=2, feature_group_count=16, **bias)(x))
        x = nn.relu(x + skip)
        x = nn.ConvTranspose(8, (3, 3), strides=(2, 2), transpose_kernel=True, **bias)(x)
        x = nn.relu(norm(x)).sum((1, 2)) / 16
        return nn.Dense(5)(nn.relu(norm(nn.Dense(10, **bias)(x))))


class Identity:
    def __init__(self, features, rngs):
        pass

    def __call__(self, x):
        return x


class NNXBlock(nnx.Module):
    def __init__(self, norm, bias, rngs):
        conv = functools.partial(nnx.Conv, use_bias=bias, rngs=rngs)
        self.skip = nnx.Sequential(conv(8, 16, (1, 1), strides=2), norm(16, rngs=rngs))
        convs = (
            conv(8, 16, (3, 3), strides=2, feature_group_count=2),
            conv(16, 16, (3, 3), kernel_dilation=2, feature_group_count=16),
        )
        self.layers = nnx.List([nnx.Dict(conv=c, norm=norm(16, rngs=rngs)) for c in convs])

    def __call__(self, x):
        y = x
        for i, layer in enumerate(self.layers):
            y = layer["norm"](layer["conv"](nn.relu(y) if i else y))
        return nn.relu(y + self.skip(x))


class NNXNet(nnx.Module):
    def __init__(self, norm=bnjax.nnx.BatchNorm, bias=False, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.first = norm(3, rngs=rngs)
        self.conv = nnx.Conv(3, 8, (3, 3), padding="VALID", use_bias=bias, rngs=rngs)
        self.second = norm(8, rngs=rngs)
        self.block = NNXBlock(norm, bias, rngs)
        self.up = nnx.ConvTranspose(16, 8, (3, 3), strides=(2, 2), transpose_kernel=True,
                                    use_bias=bias, rngs=rngs)  # fmt: skip
        self.third = norm(8, rngs=rngs)
        self.head = nnx.Sequential(
            nnx.Linear(8, 10, use_bias=bias, rngs=rngs), norm(10, rngs=rngs), nn.relu,
            nnx.Linear(10, 5, rngs=rngs),
        )  # fmt: skip

    def __call__(self, x):
        x = self.block(nn.relu(self.second(self.conv(self.first(x)))))
        return self.head(nn.relu(self.third(self.up(x))).sum((1, 2)) / 16)


def linen_net(norm):
    """Evaluation, folded and plain, each a function and its arguments; and float64."""
    model = LinenNet(norm)
    variables = trained(jax.eval_shape(model.init, KEY, X))
    folded = fold.linen(model, variables, X)
    bare = LinenNet(None, use_bias=True)
    return (
        (model.apply, variables),
        (folded.apply, folded.variables),
        (bare.apply, folded.variables),
        folded,
    )


def nnx_net(norm):
    model = nnx.eval_shape(lambda: NNXNet(norm))
    nnx.update(model, trained(nnx.state(model)))
    model.eval()
    folded = fold.nnx(model, X)

    def parts(model):
        graph, state = nnx.split(model)
        return (lambda state, x: nnx.merge(graph, state)(x)), state

    bare = nnx.eval_shape(lambda: NNXNet(Identity, bias=True))
    nnx.update(bare, nnx.state(folded.model))
    return parts(model), parts(folded.model), parts(bare), folded


NETS = {
    "linen": (linen_net, bnjax.linen.BatchNorm),
    "linen, flax": (linen_net, nn.BatchNorm),
    "nnx": (nnx_net, bnjax.nnx.BatchNorm),
    "nnx, flax": (nnx_net, nnx.BatchNorm),
}


def wide(tree):
    return jax.tree.map(lambda v: jnp.asarray(np.asarray(v), jnp.float64), tree)


@pytest.mark.parametrize("make, norm", NETS.values(), ids=NETS)
def test_network(x64, make, norm):
    """Folded and not, against float64."""
    plain, folded, _, _ = make(norm)
    assert jax.tree.leaves(folded[1])[0].dtype == jnp.float32
    run, tree = plain
    expected = np.asarray(quickly(run)(wide(tree), X.astype(np.float64)))
    assert expected.dtype == np.float64
    errors = [tolerances.error(jax.jit(run)(tree, X), expected) for run, tree in (folded, plain)]
    assert errors[0] <= max(3 * errors[1], tolerances.values(np.float32, 144))
    assert errors[0] <= tolerances.values(np.float32, 144)


def program(run, tree):
    """The compiled computations less names and source lines."""
    text = jax.jit(run).lower(tree, X).compile().as_text()
    text = text[re.search(r"(?m)^%|^ENTRY", text).start() :]
    text = re.sub(r", (metadata|frontend_attributes)=\{[^}]*\}", "", text)
    return re.sub(r"%?[\w.-]*[A-Za-z][\w.-]*\.\d+", "name", text)


NORMALIZATION = re.compile(r"= \S+ (rsqrt|sqrt|divide|power|subtract)\(")


@pytest.mark.parametrize("make, norm", NETS.values(), ids=NETS)
def test_program(make, norm):
    """Nothing is left of the normalization: the program is that of the network without it."""
    plain, folded, bare, report = make(norm)
    assert not report.kept and len(report.folded) == 7
    programs = [program(*p) for p in (plain, folded, bare)]
    assert "rsqrt" in NORMALIZATION.findall(programs[0])
    assert "convolution" in programs[1] and not NORMALIZATION.findall(programs[1])
    assert programs[1] == programs[2]


# --- nnx ---------------------------------------------------------------------------------


def nnx_tied(model, x):
    return model.norm(model.dense(x)) @ model.dense.kernel[...].T


def test_nnx_copy():
    """The given model stays as it was; the copy evaluates, and refuses to train."""
    model = few(nnx.jit(lambda m, x: m.norm(nnx.remat(lambda m, x: m.dense(x))(m, x))))
    before, expected = jax.tree.map(np.asarray, nnx.state(model)), model(ROWS)
    folded = fold.nnx(model, ROWS).model
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    assert isinstance(model.norm, bnjax.nnx.BatchNorm) and not nnx.state(folded, nnx.BatchStat)
    tolerances.assert_close(folded(ROWS), expected, np.float32, 64)
    for training in (nnx.view(folded, use_running_average=False), folded.train() or folded):
        with pytest.raises(ValueError, match=r"a folded BatchNorm must be called with .*eval\(\)"):
            training(ROWS)
    model.train()
    with pytest.raises(ValueError, match=r"'norm' must be called with use_running_average=True"):
        fold.nnx(model, ROWS)


def test_nnx_shared_module():
    """Wherever the norm is held, it is folded."""
    model = few(lambda m, x: m.held["norm"](m.dense(x)) + m.norm(m.dense(2 * x)))
    model.held = nnx.data({"norm": model.norm})
    folded = fold.nnx(model, ROWS, pairs={"dense": "held/norm"}).model
    assert folded.held["norm"] is folded.norm
    tolerances.assert_close(folded(ROWS), model(ROWS), np.float32, 64)


NNX_KEPT = {
    "skip connection": (lambda m, x: (y := m.dense(x)) + m.norm(y), "dense also goes to `add`"),
    "nonlinearity": (lambda m, x: m.norm(nn.relu(m.dense(x))), "its input comes from `max`"),
    "kernel read": (nnx_tied, "`kernel` of dense is also read by `transpose`"),
    "mask": (lambda m, x: m.norm(m.dense(x), mask=jnp.ones((11, 1), bool)), "with a mask"),
}


@pytest.mark.parametrize("call, why", NNX_KEPT.values(), ids=NNX_KEPT)
def test_nnx_kept(call, why):
    with pytest.raises(ValueError, match=f"(?s)no BatchNorm can be folded.*{why}"):
        fold.nnx(few(call), ROWS)


def test_nnx_shared_variable():
    model = few(lambda m, x: m.norm(m.dense(x)) + m.other(x))
    assert fold.nnx(model, ROWS).folded == {"norm": "dense"}
    model.other.kernel = model.dense.kernel
    with pytest.raises(ValueError, match="`kernel` of dense is also held by other"):
        fold.nnx(model, ROWS)
    model.norm.scale = model.other.bias
    with pytest.raises(ValueError, match="`scale` of norm is also held by other"):
        fold.nnx(model, ROWS)


@pytest.mark.parametrize("norm", [bnjax.nnx.BatchNorm, nnx.BatchNorm])
def test_nnx_channels_first(norm):
    model = few(lambda m, x: m.norm(m.dense(x)), norm=norm, axis=0)
    with pytest.raises(ValueError, match=r"norm has the feature axes \(0,\)"):
        fold.nnx(model, ROWS[:3])


def test_nnx_wants_a_module():
    with pytest.raises(TypeError, match=r"`model` must be an nnx\.Module, got LinenNet"):
        fold.nnx(LinenNet(), X)


def test_flax_is_not_imported():
    code = "import sys, bnjax.fold; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_nnx_model_of_numpy_arrays_is_not_changed():
    """As a checkpoint may restore it."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), bnjax.nnx.BatchNorm(4, rngs=rngs))
    model(jax.random.normal(jax.random.key(0), (8, 3)) * 3 + 1)
    model.eval()
    graph, variables = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(np.array, variables))
    before, x = jax.tree.map(np.copy, nnx.state(model)), jnp.ones((2, 3))
    folded = fold.nnx(model, x)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_allclose(folded.model(x), model(x), atol=1e-5)

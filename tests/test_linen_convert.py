"""bnjax.linen.convert: models written for flax.linen, computed by bnjax within a context."""

import functools
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tolerances import assert_close, error

import bnjax.linen
from bnjax.linen import convert

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (16, 4)).astype(np.float32)
MASK = np.arange(16)[:, None] % 5 < 3
# The variance of flax's layer cancels there, so that it shows who computed.
FAR = (RNG.normal(0, 1, (1024, 4)) + 1e4).astype(np.float32)
TRUTH = (FAR - FAR.mean(0, dtype=np.float64)) / FAR.std(0, dtype=np.float64)
KEY = jax.random.key(0)
MUTABLE = ["batch_stats"]
close = functools.partial(assert_close, dtype=np.float32, n=1000)


def norm(**fields):
    return nn.BatchNorm(**{"use_running_average": False, "momentum": 0.5, **fields})


def step(layer, x=X):
    """Variables, output and updates of a new layer."""

    @jax.jit
    def run(x):
        variables = layer.init(KEY, x)
        return variables, *layer.apply(variables, x, mutable=MUTABLE)

    return run(x)


def converted(layer):
    """Whether bnjax computes it, here: by the running variance, of the first of stacked layers."""
    updates = step(layer, FAR)[2]
    (var,) = (v for path, v in jax.tree.leaves_with_path(updates) if "'var'" in str(path[-1]))
    return error(var.reshape(-1, 4)[0], 0.5 + 0.5 * FAR.var(0, dtype=np.float64)) < 1e-3


FIELDS = {
    "default": {},
    "axis": {"axis": 0},
    "axes": {"axis": (0, 1)},
    "dtype": {"dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.bfloat16},
    "neither": {"use_scale": False, "use_bias": False},
    "initializers": {"scale_init": nn.initializers.normal(), "epsilon": 0.1, "name": "norm_7"},
    "reductions": {"force_float32_reductions": False, "use_fast_variance": False},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_every_field(fields):
    """Bit for bit as bnjax's layer with these fields; the variables are flax's."""
    x = X if fields.get("axis") != (0, 1) else np.stack([X, X * 2], -1)
    with convert():
        found = step(norm(**fields), x)
    ours = {"use_running_average": False, "momentum": 0.5, **fields}
    expected = step(bnjax.linen.BatchNorm(**ours), x)
    chex.assert_trees_all_equal(found, expected)
    flax = step(norm(**fields), x)
    chex.assert_trees_all_equal(found[0], flax[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, flax)


CALLS = {
    "positional": lambda layer, v, run: layer.apply(v, X, run, mutable=MUTABLE),
    "keyword": lambda layer, v, run: layer.apply(
        v, X, use_running_average=run, mask=MASK, mutable=MUTABLE
    ),
    "all keywords": lambda layer, v, run: layer.apply(
        v, x=X, mask=MASK, use_running_average=run, mutable=MUTABLE
    ),
    "mask": lambda layer, v, run: layer.apply(v, X, run, mask=MASK[:, 0, None], mutable=MUTABLE),
    "traced": lambda layer, v, run: layer.apply(v, X, jnp.array(run), mutable=MUTABLE),
}


@pytest.mark.parametrize("run", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_arguments(call, run):
    layer, ours = nn.BatchNorm(), bnjax.linen.BatchNorm()
    variables = layer.init(KEY, X, True)
    with convert():
        found = call(layer, variables, run)
    chex.assert_trees_all_equal(found, call(ours, variables, run))
    assert np.any(found[1]["batch_stats"]["mean"] != 0) != run


def test_same_errors_as_flax():
    """For arguments and variables that flax refuses too."""
    bad = {"params": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
    for call in (
        lambda: nn.BatchNorm().init(KEY, X),
        lambda: norm().init(KEY, X, True),
        lambda: norm().apply({}, X),
        lambda: norm().apply(bad, X, mutable=MUTABLE),
        lambda: norm().init(KEY, X, nonsense=1),
    ):
        errors = []
        for context in (convert(), nn.intercept_methods(lambda f, a, k, _: f(*a, **k))):
            with context, pytest.raises(Exception) as info:  # noqa: PT011
                call()
            errors.append(info.type)
        assert errors[0] is errors[1]


class Calling(nn.BatchNorm):
    """A subclass whose own code goes on around flax's."""

    @nn.compact
    def __call__(self, x, **call):
        return 3 * super().__call__(x, **call)


class Inheriting(nn.BatchNorm):
    extra: int = 0


class Overriding(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, **call):
        return x + 1


def test_subclasses():
    call = {"use_running_average": False, "momentum": 0.5}
    with convert():
        assert converted(Inheriting(**call, extra=2))
        variables, y, new = step(Calling(**call), FAR)
        chex.assert_trees_all_equal(step(Overriding(**call))[1], X + 1)
    close(y, 3 * TRUTH)
    chex.assert_trees_all_equal(variables, Calling(**call).init(KEY, FAR))
    expected = step(bnjax.linen.BatchNorm(**call), FAR)[2]
    chex.assert_trees_all_equal(new, expected)


class Setup(nn.Module):
    """Made in setup, called twice, with other layers beside."""

    def setup(self):
        # With a bias, so that no mean is a rounding error; flax's slow variance is right.
        self.norm = norm(bias_init=nn.initializers.normal(1.0), use_fast_variance=False)
        last = norm(axis=-1, use_fast_variance=False)
        self.layers = [nn.Dense(4), last, nn.LayerNorm()]

    def __call__(self, x, train=True):
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(nn.tanh(x))


def test_a_model():
    """The variables are flax's, and so are the numbers where flax is right."""
    flax = step(Setup())
    with convert():
        ours = step(Setup())
    chex.assert_trees_all_equal(ours[0], flax[0])
    assert_close(ours[1:], flax[1:], np.float32, n=3 * 1000)  # three layers in a row


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return norm()(x), None


AXES = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
LIFTED = {
    "scan": lambda: nn.Sequential([nn.scan(Block, length=2, **AXES)(), lambda x, _: x]),
    "remat": lambda: nn.remat(nn.BatchNorm)(False, momentum=0.5),
    "jit": lambda: nn.jit(nn.BatchNorm)(False, momentum=0.5),
    "vmap": lambda: nn.Sequential([
        lambda x: jnp.stack([x, x]),
        nn.vmap(nn.BatchNorm, **AXES)(False, momentum=0.5),
    ]),
    "remat of scan": lambda: nn.Sequential(
        [nn.remat(nn.scan(nn.remat(Block), length=2, **AXES))(), lambda x, _: x]
    ),
}  # fmt: skip


@pytest.mark.parametrize("lift", LIFTED.values(), ids=LIFTED)
def test_lifted(lift):
    """Within transformations; with flax's variables, and its gradients where it is right."""

    def grads(layer, variables):
        def loss(params):
            return jnp.sum(
                jnp.sin(layer.apply({**variables, "params": params}, X, mutable=MUTABLE)[0])
            )

        return jax.jit(jax.grad(loss))(variables["params"])

    flax = step(lift())
    expected = grads(lift(), flax[0])
    assert not converted(lift())
    with convert():
        assert converted(lift())
        ours = step(lift())
        found = grads(lift(), ours[0])
    assert not converted(lift())
    chex.assert_trees_all_equal(ours[0], flax[0])
    close((ours[1:], found), (flax[1:], expected))


@pytest.mark.parametrize("inside_first", [True, False])
def test_compiled_functions(inside_first):
    """What was compiled outside is not used inside, and the other way round."""
    layer = norm()
    variables = layer.init(KEY, FAR)
    apply = functools.partial(layer.apply, variables, mutable=MUTABLE)
    run = jax.jit(lambda x: apply(x)[0])
    for inside in (inside_first, not inside_first, inside_first):
        if inside:
            with convert():
                y = run(FAR)
        else:
            y = run(FAR)
        assert (error(y, TRUTH) < 1e-3) == inside


def test_is_undone():
    """After exceptions, also of the layer's, and at the end of the inner of two contexts."""
    with pytest.raises(ZeroDivisionError), convert():
        raise ZeroDivisionError
    assert not converted(norm())
    with pytest.raises(ValueError, match="`axis` must"), convert():
        norm(axis=7).init(KEY, X)
    assert not converted(norm())
    with convert():
        with convert():
            assert converted(norm())
        assert converted(norm())
    assert not converted(norm())


def test_is_of_this_thread():
    found = []
    with convert():
        thread = threading.Thread(target=lambda: found.append(converted(norm())))
        thread.start()
        thread.join()
    assert found == [False]


def test_layers_of_bnjax_are_left_alone():
    layer = bnjax.linen.BatchNorm(False, momentum=bnjax.cumulative(), unbiased=True)
    expected = step(layer)
    with convert():
        chex.assert_trees_all_equal(step(layer), expected)


def test_beside_other_interceptors():
    """One from outside of the context sees the call of the layer, as it would without."""
    seen = []

    def watch(method, args, kwargs, context):
        seen.append((type(context.module), context.method_name))
        return method(*args, **kwargs)

    with nn.intercept_methods(watch):
        step(norm())
        with convert():
            assert converted(norm())
    assert seen == [(nn.BatchNorm, "__call__")] * 4


def test_mapped_axis():
    """Masked parts are merged by count, as flax's layers do not."""
    layer, whole = norm(axis_name="i"), bnjax.linen.BatchNorm(False, momentum=0.5)
    with convert():
        variables = layer.init(KEY, X)
        call = functools.partial(layer.apply, variables, mutable=MUTABLE)
        y, _ = jax.vmap(lambda x, m: call(x, mask=m), axis_name="i")(
            X.reshape(2, 8, 4), MASK.reshape(2, 8, 1)
        )
    close(y.reshape(16, 4), whole.apply(variables, X, mask=MASK, mutable=MUTABLE)[0])
    assert MASK[:8].sum() != MASK[8:].sum()

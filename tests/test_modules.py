"""linen = nnx = bn_apply: the same numbers, the same program, about flax's time to trace."""

import cProfile
import functools
import itertools
import pstats
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx

SHAPE = (4, 6, 5)
NAMES = ("mean", "var", "count")


def arrays(axis, dtype):
    """x, mask, params and state; the parameters are representable in the dtype."""
    rng = np.random.default_rng(0)
    size = SHAPE[axis]
    x = jnp.asarray(rng.normal(3, 2, SHAPE), dtype)
    mask = jnp.asarray(rng.random(SHAPE) < 0.6)
    scale, bias = (jnp.asarray(rng.normal(1, 1, size), dtype) for _ in range(2))
    mean, var = (jnp.asarray(rng.uniform(1, 2, size), jnp.float32) for _ in range(2))
    params = bnjax.BNParams(scale, bias)
    return x, mask, params, bnjax.BNState(mean, var, jnp.full(size, 3, jnp.int32))


def run_function(params, state, x, train, mask, options):
    return bnjax.bn_apply(params, state, x, train, mask=mask, **options)


def run_linen(params, state, x, train, mask, options):
    names = NAMES if callable(options["momentum"]) else NAMES[:2]
    variables = {"params": params._asdict(), "batch_stats": {n: getattr(state, n) for n in names}}
    layer = bnjax.linen.BatchNorm(**options)
    call = {"use_running_average": jnp.logical_not(train), "mask": mask}
    if isinstance(train, bool):
        call["use_running_average"] = not train
    y, new = layer.apply(variables, x, mutable=["batch_stats"], **call)
    return y, state._replace(**new["batch_stats"])


def run_nnx(params, state, x, train, mask, options):
    size = params.scale.shape[0]
    dtype = params.scale.dtype
    layer = bnjax.nnx.BatchNorm(size, param_dtype=dtype, rngs=nnx.Rngs(0), **options)
    layer.scale[...], layer.bias[...] = params
    names = NAMES if callable(options["momentum"]) else NAMES[:2]
    for name in names:
        getattr(layer, name)[...] = getattr(state, name)
    flag = not train if isinstance(train, bool) else jnp.logical_not(train)
    y = layer(x, use_running_average=flag, mask=mask)
    return y, state._replace(**{name: getattr(layer, name)[...] for name in names})


MOMENTA = {"number": 0.9, "cumulative": bnjax.cumulative(), "debiased": bnjax.debiased(0.5)}


@pytest.mark.parametrize("train", [True, False, "traced"])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_bits(masked, dtype, axis, momentum, train):
    x, mask, params, state = arrays(axis, dtype)
    options = {"axis": axis, "momentum": MOMENTA[momentum], "epsilon": 1e-3, "dtype": dtype}
    flag = jnp.array(True) if train == "traced" else train
    call = (params, state, x, flag, mask if masked else None, options)
    expected = run_function(*call)
    if momentum == "number":  # modules keep no count then
        expected = (expected[0], expected[1]._replace(count=state.count))
    chex.assert_trees_all_equal(run_linen(*call), expected)
    chex.assert_trees_all_equal(run_nnx(*call), expected)
    learned = train is not False
    assert bool(jnp.any(expected[1].mean != state.mean)) == learned


@pytest.mark.parametrize("x_dtype, options", [
    (jnp.float32, {}),
    (jnp.bfloat16, {}),
    (jnp.bfloat16, {"dtype": jnp.bfloat16}),
    (jnp.float32, {"unbiased": True}),
    (jnp.float32, {"norm": bnjax.batch_norm(momentum=0.5, unbiased=True)}),
    (jnp.int32, {}),
])  # fmt: skip
def test_linen_is_nnx_where_dtypes_promote(x_dtype, options):
    """Also where neither x nor the output have the parameters' dtype."""
    x = (10 * arrays(-1, jnp.float32)[0]).astype(x_dtype)
    layer = bnjax.nnx.BatchNorm(SHAPE[-1], rngs=nnx.Rngs(0), **options)
    linen = bnjax.linen.BatchNorm(use_running_average=False, **options)
    variables = linen.init(jax.random.key(0), x)
    y, new = linen.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(layer(x), y)
    chex.assert_trees_all_equal(layer.var[...], new["batch_stats"]["var"])


@pytest.mark.parametrize("linen, module", [(nn, nnx), (bnjax.linen, bnjax.nnx)])
@pytest.mark.parametrize("train", [True, False])
def test_without_dtype_linen_and_nnx_promote_as_flaxs_do(linen, module, train):
    """nnx with the statistics too: no reason but flax, where the two differ in this."""
    x, narrow = arrays(-1, jnp.bfloat16)[0], {"param_dtype": jnp.bfloat16}
    options = {"use_running_average": not train, **narrow}
    y, _ = linen.BatchNorm(**options).init_with_output(jax.random.key(0), x)
    z = module.BatchNorm(SHAPE[-1], rngs=nnx.Rngs(0), **options)(x)
    assert (y.dtype, z.dtype) == (jnp.bfloat16, jnp.float32)


def without_names(text):
    """The computations of a compiled program less names and source lines."""
    text = text[re.search(r"(?m)^%", text).start() :]
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    return re.sub(r"%?[\w.-]*[A-Za-z][\w.-]*\.\d+", "name", text)


def compiled(loss, params, stats, x):
    step = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))
    return step.lower(params, stats, x).compile()


@pytest.fixture(scope="module")
def programs():
    """A training step of the function and of both modules, from the same arguments."""
    x = arrays(-1, jnp.float32)[0]
    graph, params, stats = nnx.split(
        bnjax.nnx.BatchNorm(SHAPE[-1], momentum=0.9, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat
    )
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    linen = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.9)

    def function_loss(params, stats, x):
        state = bnjax.BNState(stats["mean"], stats["var"], jnp.zeros(x.shape[-1], jnp.int32))
        params = bnjax.BNParams(params["scale"], params["bias"])
        y, new = bnjax.bn_apply(params, state, x, True, momentum=0.9)
        return jnp.sum(jnp.sin(y)), {"mean": new.mean, "var": new.var}

    def linen_loss(params, stats, x):
        y, new = linen.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), new["batch_stats"]

    def nnx_loss(params, stats, x):
        layer = nnx.merge(graph, nnx.State({**params, **stats}))
        y = layer(x)
        return jnp.sum(jnp.sin(y)), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    losses = {"function": function_loss, "linen": linen_loss, "nnx": nnx_loss}
    return {name: compiled(loss, params, stats, x) for name, loss in losses.items()}


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_the_same_program(programs, module):
    """A step of the module costs what a step of the bare function costs."""
    ours, bare = programs[module], programs["function"]
    assert "fusion" in bare.as_text() or "reduce" in bare.as_text()
    assert ours.cost_analysis() == bare.cost_analysis()
    assert without_names(ours.as_text()) == without_names(bare.as_text())


class Net(nn.Module):
    layer: type
    sizes: tuple[int, ...] = (100, 100, 100)

    @nn.compact
    def __call__(self, x, train):
        for size in self.sizes:
            x = self.layer(use_running_average=not train)(nn.Dense(size, use_bias=False)(x))
            x = nn.sigmoid(x)
        return nn.Dense(10)(x)


class NNXNet(nnx.Module):
    def __init__(self, layer):
        rngs = nnx.Rngs(0)
        sizes = (64, 100, 100, 100)
        self.dense = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.norms = nnx.List([layer(b, rngs=rngs) for b in sizes[1:]])

    def __call__(self, x):
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = nnx.sigmoid(norm(dense(x)))
        return x


X = jax.ShapeDtypeStruct((60, 64), jnp.float32)


def trace_linen_init(layer):
    jax.eval_shape(functools.partial(Net(layer).init, train=False), jax.random.key(0), X)


def trace_linen_step(layer):
    net = Net(layer)
    variables = jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), X)

    def loss(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        y, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y * y), new

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda: step.trace(variables["params"], variables["batch_stats"], X)


def trace_nnx_step(layer):
    net = NNXNet(layer)
    step = nnx.jit(nnx.value_and_grad(lambda net, x: jnp.sum(net(x) ** 2)))
    return lambda: step.lower(net, X)


def calls(run):
    """Python calls made, a measure of the time to trace that is the same on every machine."""
    jax.clear_caches()
    profile = cProfile.Profile()
    profile.runcall(run)
    return pstats.Stats(profile).total_calls


TRACED = {
    "linen init": (lambda layer: lambda: trace_linen_init(layer), "linen"),
    "linen step": (trace_linen_step, "linen"),
    "nnx init": (lambda layer: lambda: NNXNet(layer), "nnx"),
    "nnx step": (trace_nnx_step, "nnx"),
}
LAYERS = {
    "linen": (bnjax.linen.BatchNorm, nn.BatchNorm),
    "nnx": (bnjax.nnx.BatchNorm, nnx.BatchNorm),
}


@pytest.mark.parametrize("what", TRACED)
def test_tracing_takes_about_as_long_as_flaxs(what):
    prepare, module = TRACED[what]
    counts = []
    for layer in LAYERS[module]:
        run = prepare(layer)
        run()  # what only a first call does
        counts.append(calls(run))
    ours, flax = counts
    assert ours <= 1.2 * flax, f"{ours} calls against {flax}"

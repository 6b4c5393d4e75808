"""bnjax.diagnostics.report: its numbers, which layers it shows, and what it refuses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnosed import (
    BIAS,
    EPSILON,
    KERNEL,
    LABELS,
    MEAN,
    RNG,
    SCALE,
    VAR,
    C,
    N,
    X,
    close,
    one_layer,
    params,
    state,
)
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import diagnostics
from bnjax._diagnostics import activations
from bnjax._models import kinds


def functional():
    def model(variables, x):
        (p1, s1), (p2, s2) = variables
        y, s1 = bnjax.bn_apply(p1, s1, x, False, epsilon=EPSILON, momentum=0.75)
        y = jnp.tanh(y) @ KERNEL
        y, s2 = bnjax.bn_apply(p2, s2, y, False, epsilon=EPSILON, momentum=0.75)
        return jax.nn.relu(y), ((p1, s1), (p2, s2))

    return model, tuple((params(i), state(i)) for i in range(2)), {}


class Linen(nn.Module):
    layer: type

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.layer, not train, epsilon=EPSILON, momentum=0.75)
        x = jnp.tanh(norm(name="z")(x)) @ KERNEL
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.relu(norm(name="a")(x))


def linen(layer):
    given = {name: (params(i), state(i)) for i, name in enumerate("za")}
    variables = {
        "params": {k: p._asdict() for k, (p, _) in given.items()},
        "batch_stats": {k: {"mean": s.mean, "var": s.var} for k, (_, s) in given.items()},
    }
    return Linen(layer), variables, {"call": evaluated}


def evaluated(apply, x):
    return apply(x, train=False)


class NNX(nnx.Module):
    def __init__(self, layer):
        rngs = nnx.Rngs(0)
        norm = functools.partial(layer, C, epsilon=EPSILON, momentum=0.75, rngs=rngs)
        self.z, self.dropout, self.a = norm(), nnx.Dropout(0.5, rngs=rngs), norm()

    def __call__(self, x):
        return nnx.relu(self.a(self.dropout(jnp.tanh(self.z(x)) @ KERNEL)))


def of_nnx(layer):
    model = NNX(layer)
    for i, norm in enumerate((model.z, model.a)):
        for name, value in (params(i)._asdict() | state(i)._asdict()).items():
            if hasattr(norm, name):
                getattr(norm, name)[...] = value
    return model, None, {}


MODELS = {
    "functional": functional,
    "linen": functools.partial(linen, bnjax.linen.BatchNorm),
    "flax.linen": functools.partial(linen, nn.BatchNorm),
    "nnx": functools.partial(of_nnx, bnjax.nnx.BatchNorm),
    "flax.nnx": functools.partial(of_nnx, nnx.BatchNorm),
}


def hellinger(mean, var, other_mean, other_var):
    """sqrt(1 - integral sqrt(p q)), by the trapezoidal rule."""
    reach = 12 * np.sqrt(max(var, other_var))
    ends = min(mean, other_mean) - reach, max(mean, other_mean) + reach
    t = np.unique(
        [*np.linspace(*ends, 200001), *(mean + np.sqrt(var) * np.linspace(-12, 12, 20001))]
    )

    def density(m, v):
        return np.exp(-((t - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)

    both = np.sqrt(density(mean, var) * density(other_mean, other_var))
    return np.sqrt(max(1 - np.trapezoid(both, t), 0))


def oracle(i, x, derivative):
    """Per channel, and y of training mode."""
    mean, var = x.mean(0), x.var(0)
    running_mean, running_var = MEAN[i].astype(float), VAR[i].astype(float)
    y, other = (
        (x - mean) / np.sqrt(var + EPSILON),
        (x - running_mean) / np.sqrt(running_var + EPSILON),
    )
    whole = y * SCALE[i] + BIAS[i]
    steepest = derivative(np.linspace(-3, 3, 601)).max()
    return whole, {
        "mean": mean,
        "var": var,
        "running_mean": running_mean,
        "running_var": running_var,
        "entries": np.full(C, len(x)),
        "mean_gap": np.abs(mean - running_mean) / np.sqrt(running_var + EPSILON),
        "log_var_ratio": np.log(var + EPSILON) - np.log(running_var + EPSILON),
        "output_difference": np.sqrt(((y - other) ** 2).mean(0)),
        "distance": [
            hellinger(*moments)
            for moments in zip(
                mean, var + EPSILON, running_mean, running_var + EPSILON, strict=True
            )
        ],
        "dead": (np.abs(SCALE[i]) < 1e-3) | (var < EPSILON / 10),
        "exploding": np.sqrt(np.maximum(var, running_var)) > 1e4 * 3,
        "untrained": np.zeros(C),
        "saturated": (derivative(whole) < steepest / 10).mean(0),
    }


def overall_oracle(outputs):
    """Of both modes' outputs."""
    expected, rows = {}, np.arange(N)
    for mode, output in outputs.items():
        expected[f"loss_{mode}"] = (np.log(np.exp(output).sum(1)) - output[rows, LABELS]).mean()
        expected[f"accuracy_{mode}"] = (output.argmax(1) == LABELS).mean()
    size = np.mean([output.var(0).sum() for output in outputs.values()])
    apart = ((outputs["training"] - outputs["evaluation"]) ** 2).sum(1).mean()
    return expected | {"output_difference": np.sqrt(apart / size)}


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_an_oracle(name):
    """Of all kinds of models, with layers in the order of their calls."""
    hidden, first = oracle(0, X.astype(float), lambda z: 1 - np.tanh(z) ** 2)
    y, second = oracle(1, np.tanh(hidden) @ KERNEL, lambda z: (z > 0) * 1.0)
    model, variables, call = MODELS[name]()
    result = diagnostics.report(model, variables, X, labels=LABELS, **call)
    output = functional()[0](functional()[1], X)[0]
    outputs = {"training": np.maximum(y, 0), "evaluation": np.asarray(output, float)}
    for quantity, value in overall_oracle(outputs).items():
        close(result.overall[quantity], value)
    paths = [r.layer for r in result.records]
    assert paths == (["0/1", "1/1"] if name == "functional" else ["z", "a"])
    for record, expected, activation in zip(
        result.records, (first, second), ("tanh", "relu"), strict=True
    ):
        assert record.per_channel.keys() == expected.keys()
        for quantity, value in expected.items():
            # The integral is of limited accuracy near 0.
            n = 10**5 if quantity == "distance" else 1000
            close(record.per_channel[quantity].astype(float), np.asarray(value, float), n=n)
        rms = {
            k: np.sqrt(np.mean(np.square(expected[k]))) for k in ("mean_gap", "output_difference")
        }
        close(record.mean_gap, rms["mean_gap"])
        close(record.output_difference, rms["output_difference"])
        close(record.log_var_ratio, np.median(expected["log_var_ratio"]))
        close(record.distance, np.mean(expected["distance"]), n=10**5)
        close(record.saturated, np.mean(expected["saturated"]))
        assert (record.channels, record.entries, record.momentum) == (C, N, 0.75)
        assert record.activation == activation
        assert record.updates == (7 if name == "functional" else None)
        assert (record.not_finite, record.bad_statistics, record.untrained) == (0, 0, 0)
    assert [(r.dead, r.exploding) for r in result.records] == [(2, 1), (0, 0)]
    assert result.rows()[0]["layer"] == paths[0] and "per_channel" not in result.rows()[0]


def test_masked_entries_count_nowhere():
    mask = RNG.random((N, C)) < 0.5
    mask[:, 1] = [True, *[False] * (N - 1)]
    x = np.where(mask, X, np.nan).astype(np.float32)
    model = one_layer(after=jax.nn.sigmoid, mask=mask, epsilon=EPSILON)
    (r,) = diagnostics.report(model, (params(0), state(0)), x).records
    assert (r.not_finite, r.entries, r.activation) == (0, 1, "sigmoid")
    np.testing.assert_array_equal(r.per_channel["entries"], mask.sum(0))
    for c in range(C):
        own = X[mask[:, c], c].astype(float)
        close(r.per_channel["mean"][c], own.mean())
        y = (own - own.mean()) / np.sqrt(own.var() + EPSILON) * SCALE[0, c] + BIAS[0, c]
        share = (np.exp(-y) / (1 + np.exp(-y)) ** 2 < 0.025).mean()
        close(r.per_channel["saturated"][c], share)
    assert list(r.per_channel["dead"]) == [False, False, True, True]  # of one entry, nothing known


def test_what_is_not_finite():
    x, var = X.copy(), VAR.copy()
    x[[1, 2], [0, 1]], var[0, 2] = np.nan, np.inf
    variables = (params(0), state(0)._replace(var=jnp.asarray(var[0])))
    (r,) = diagnostics.report(one_layer(), variables, x).records
    assert (r.not_finite, r.bad_statistics) == (2, 1)
    assert r.per_channel["exploding"].tolist() == [True, False, True, False]


def test_counts_and_momentum():
    momenta = {0.9: 0.9, bnjax.cumulative(): 0.75, bnjax.debiased(0.5): 7 / 15}
    counts = jnp.array([3, 3, 0, 3])

    def model(variables, x):
        p, states = variables
        new = [
            bnjax.bn_apply(p, s, x, False, momentum=m)[1]
            for s, m in zip(states, momenta, strict=True)
        ]
        return x, (p, new)

    variables = (params(0), [state(0)._replace(count=counts)] * 3)
    for r, weight in zip(
        diagnostics.report(model, variables, X).records, momenta.values(), strict=True
    ):
        assert (r.updates, r.untrained) == (0, 0.25)
        close(r.momentum, weight)


def test_initial_statistics_without_count_are_untrained():
    model, variables, call = linen(nn.BatchNorm)
    stats = {"z": {"mean": np.zeros(C), "var": np.ones(C)}, "a": variables["batch_stats"]["a"]}
    result = diagnostics.report(model, {**variables, "batch_stats": stats}, X, **call)
    assert [r.untrained for r in result.records] == [1, 0]
    assert result.findings[0].cause == "never-updated" and result.findings[0].layers == ("z",)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(bnjax.linen.BatchNorm(True)(nn.Dense(C)(x))), None


class Unusual(nn.Module):
    """One layer, one of several calls, stacked ones, and one that is not called."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(bnjax.linen.BatchNorm(not train)(x))
        shared = bnjax.linen.BatchNorm(not train, name="shared")
        x = shared(shared(x) + 1)
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, **axes, length=3)(name="stacked")(x, None)
        if train or self.is_initializing():
            bnjax.linen.BatchNorm(not train, name="apart")(x)
        return x


def test_layers_of_unusual_models():
    shapes = jax.eval_shape(Unusual().init, jax.random.key(0), X)
    variables = jax.tree.map(lambda v: np.ones(v.shape, v.dtype), shapes)
    result = diagnostics.report(Unusual(), variables, X)
    paths = ["BatchNorm_0", "shared", "stacked/BatchNorm_0"]
    assert [r.layer for r in result.records] == paths
    assert [r.activation for r in result.records] == ["tanh", "", ""]
    assert [r.channels for r in result.records] == [C, C, 3 * C]
    assert [r.entries for r in result.records] == [N, 2 * N, N]


def test_several_feature_axes():
    x = RNG.normal(0, 1, (N, 2, 3)).astype(np.float32)
    norm = bnjax.batch_norm(axis=(1, 2))
    p, s = norm.init((2, 3))
    s = s._replace(count=s.count + 1)
    batches = [RNG.normal(3, 1, (N, 2, 3)).astype(np.float32) for _ in range(4)]
    result = diagnostics.report(one_layer(norm), (p, s), x, train_batches=batches)
    np.testing.assert_allclose(result.records[0].per_channel["mean"], x.mean(0).ravel(), atol=1e-6)
    assert {f.cause for f in result.findings} == {"lagging", "domain-shift"}


def test_stacked_layers():
    """Of lax.scan, whose statistics have an axis of layers."""

    def model(variables, x):
        def layer(y, own):
            y, s = bnjax.bn_apply(*own, y, False)
            return y + 1, (own[0], s)

        return jax.lax.scan(layer, x, variables)

    p, s = jax.tree.map(lambda a, b: jnp.stack([a, b]), *((params(i), state(i)) for i in (0, 1)))
    result = diagnostics.report(model, (p, s), X, train_batches=[X[::2], X[1::2]])
    (r,) = result.records
    close(r.per_channel["mean"], np.concatenate([X.mean(0), BIAS[0] + 1]), scale=1)
    assert (r.channels, r.updates, r.activation) == (2 * C, 7, "")
    assert result.findings[0].cause == "stale"


@pytest.mark.parametrize(
    ("activation", "after"),
    [
        ("relu", jax.nn.relu),
        ("tanh", lambda y: jnp.tanh(y.astype(jnp.bfloat16).reshape(-1, 2, 2))),
        ("sigmoid", lambda y: jax.nn.sigmoid(y[:, None].transpose(0, 2, 1))),
        ("relu", lambda y: jax.nn.relu(nn.max_pool(y[..., None], (2,), (2,)))),
        ("relu", lambda y: (jnp.maximum(y, 0), jax.nn.relu(y))),
        ("", lambda y: jax.nn.relu(y + 1)),
        ("", lambda y: jnp.maximum(y, jnp.flip(y))),
        ("", lambda y: jax.nn.relu(y) + y),
        ("", jax.nn.gelu),
        ("", jax.nn.silu),
        ("", jax.nn.softmax),
        ("", jax.nn.leaky_relu),
    ],
)
def test_activation_that_follows(activation, after):
    subject = kinds.subject(one_layer(after=after), (params(0), state(0)), None)
    assert activations.following(subject, X) == {"1": activation}

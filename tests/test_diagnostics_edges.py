"""bnjax.diagnostics.report: what it refuses, and batches and models at the edges."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diagnosed import LABELS, MEAN, RNG, VAR, C, N, X, close, one_layer, params, state
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tolerances import assert_close

import bnjax
import bnjax.linen
from bnjax import diagnostics

GOOD = (params(0), state(0))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "`train_batches` must hold at least 2 .* got 0. Fix", {"train_batches": []}),
        (ValueError, "`train_batches` must hold at least 2 .* got 1. Fix", {"train_batches": [X]}),
        (
            ValueError,
            "`labels` must be integers.* shape \\(60, 4\\), got .* \\(59,\\)",
            {"labels": LABELS[1:]},
        ),
        (ValueError, "`labels` must be integers.* got float32", {"labels": np.eye(C)[LABELS]}),
        (ValueError, "`labels` must be in \\[0, classes\\)", {"labels": LABELS - 1}),
        (ValueError, "`labels` must be given where a `loss` is", {"loss": lambda y, x: y.mean()}),
        (ValueError, "`loss` must return a scalar", {"loss": lambda y, x: y, "labels": X}),
        (ValueError, "`steps` must be at least 1", {"steps": 0}),
        (
            ValueError,
            "must have the structure of `batch`.* Fix: .images for images, labels in loader.",
            {"train_batches": [(X, LABELS)] * 2},
        ),
    ],
)
def test_arguments_are_checked(error, message, arguments):
    with pytest.raises(error, match=message):
        diagnostics.report(MODEL, GOOD, X, **arguments)


MODEL = one_layer()


def test_not_within_jit():
    def within(variables, x):
        return diagnostics.report(MODEL, variables, x).overall

    for fixed in ((), (0,), (1,)):
        arguments = [v for i, v in enumerate((GOOD, X)) if i not in fixed]
        called = {(): within, (0,): lambda x: within(GOOD, x), (1,): lambda v: within(v, X)}[fixed]
        with pytest.raises(TypeError, match=r"needs values, got a traced .* Fix: call it outside"):
            jax.jit(called)(*arguments)


def test_model_whose_layers_are_not_called():
    def model(variables, x):
        return x, variables

    with pytest.raises(ValueError, match=r"got none that was called. Fix: a `call`"):
        diagnostics.report(model, GOOD, X)


def batches(number=4, size=N):
    return [
        RNG.normal(MEAN[1], np.sqrt(VAR[1]), (size, C)).astype(np.float32) for _ in range(number)
    ]


FITTING = (params(1), state(1))


def causes(batch, variables=FITTING, model=MODEL, **options):
    return [f.cause for f in diagnostics.report(model, variables, batch, **options).findings]


def test_batches_that_say_little():
    """Of one example, constant, of several sizes: no finding, no warning, no NaN under way."""
    given = batches(5)
    assert causes(given[0], train_batches=given) == []  # with the evaluated one
    assert causes(given[0], train_batches=[*given, given[0][:30], given[0][:1]]) == []
    assert causes(given[0][:1]) == []
    with jax.debug_nans(True):
        assert causes(
            0 * X, (params(1), state(1)._replace(mean=jnp.zeros(C), var=jnp.zeros(C)))
        ) == ["dead-channels"]


def test_batches_that_are_not_finite():
    given, bad = batches(), batches()
    bad[1][0, 0] = np.nan
    assert causes(bad[1]) == ["not-finite-input"]
    assert causes(bad[1], train_batches=given) == ["not-finite-input"]
    assert causes(given[0], train_batches=bad) == ["not-finite-input"]
    assert causes(given[0], train_batches=[bad[1]] * 3) == ["not-finite-input"]
    gone = state(1)._replace(mean=jnp.full(C, jnp.nan), var=jnp.full(C, jnp.nan))
    assert causes(given[0], (params(1), gone), train_batches=given) == ["poisoned"]
    found = diagnostics.report(MODEL, (params(1), gone), given[0])
    close(found.records[0].per_channel["mean"], given[0].mean(0, dtype=float))


def test_trees_of_batches_placed_on_devices(devices):
    """With labels inside, and a model without scale."""
    places = NamedSharding(Mesh(np.array(devices), ("d",)), PartitionSpec("d"))
    s = state(1)

    def model(variables, batch):
        return MODEL((bnjax.BNParams(None, None), variables), batch["x"])

    def tree(x):
        return {"x": x, "y": np.zeros(len(x), int)}

    given = [tree(b[:56]) for b in batches()]
    report = functools.partial(diagnostics.report, model, s)
    one = report(given[0], train_batches=given)
    several = report(jax.device_put(given[0], places), train_batches=jax.device_put(given, places))
    for quantity, value in one.records[0].per_channel.items():
        close(several.records[0].per_channel[quantity].astype(float), value.astype(float))
    assert one.findings == several.findings == ()


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = bnjax.linen.BatchNorm(True, axis_name="i", use_scale=False, dtype=jnp.bfloat16)
        return nn.sigmoid(norm(x))


def test_bfloat16_and_an_axis_that_is_not_mapped():
    x = batches()[0].astype(jnp.bfloat16)
    variables = {"params": {"BatchNorm_0": {"bias": np.zeros(C, np.float32)}}}
    variables["batch_stats"] = {"BatchNorm_0": {"mean": MEAN[1], "var": VAR[1]}}
    result = diagnostics.report(Small(), variables, x)
    close(result.records[0].per_channel["mean"], x.astype(float).mean(0))
    assert result.records[0].activation == "sigmoid" and result.findings == ()


def test_float64(x64):
    x = X.astype(np.float64)
    wide = jax.tree.map(lambda v: v.astype(float) if v.dtype == jnp.float32 else v, GOOD)
    (r,) = diagnostics.report(MODEL, wide, x).records
    assert_close(r.per_channel["var"], x.var(0), dtype=np.float64, n=N)


SMALL = nn.jit(Small)


class Jitted(nn.Module):
    """Layers whose traces JAX keeps for the next model that has them."""

    tag: int

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True, name="z_first")(x)
        return SMALL(name="a_second")(x)


def test_order_of_calls_behind_jit():
    variables = Jitted(0).init(jax.random.key(0), X)
    for tag in range(2):
        report = diagnostics.report(Jitted(tag), variables, X)
        names = [record.layer.split("/")[0] for record in report.records]
        assert names == sorted(names, reverse=True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_statistics(dtype):
    """What is counted and summed is not narrow: 70,000 entries are more than float16 holds."""
    x = np.random.default_rng(0).normal(20, 3, (70_000, 2)).astype(np.float32)
    narrow = state(0)._replace(
        mean=jnp.zeros(2, dtype), var=jnp.ones(2, dtype), count=np.zeros(2, int)
    )
    model, given = one_layer(), (bnjax.BNParams(None, None), narrow)
    found = bnjax.recalibrate(model, given, [x[:256], x[256:]])[1]
    np.testing.assert_array_equal(found.mean, x.mean(0, dtype=np.float64).astype(dtype))
    np.testing.assert_array_equal(found.var, x.var(0, dtype=np.float64).astype(dtype))
    (record,) = diagnostics.report(model, given, x).records
    assert record.entries == 70_000 and np.isfinite(record.mean_gap)

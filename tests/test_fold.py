"""bnjax.fold on arrays: the map, and kernels of every layout before and after it.

References are lax's convolutions in float64 with normalization written in NumPy.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import linen as nn
from fold_layers import EXACT, LAYERS, Case, normalize, quickly, statistics

import bnjax
from bnjax import fold
from bnjax._fold.layouts import Layout, borders


def assert_as_good(case, actual, expected, channels=1.0):
    """float32 against float64; sums have as many terms as a kernel has inputs."""
    assert actual.dtype == jnp.float32
    tolerances.assert_close(actual, expected, np.float32, case.fan_in * channels)


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_into_previous(x64, case):
    x, kernel, bias = case.arrays()
    params, state, epsilon = statistics(case.outputs)
    a = fold.affine(params, state, epsilon=epsilon)
    new, new_bias = fold.into_previous(kernel, bias, a, **case.axes)
    y, expected = case(x, new), case.exact(x, kernel)
    assert new.shape == kernel.shape and new_bias.shape == (case.outputs,)
    for given, found in (
        (bias, new_bias),
        (None, fold.into_previous(kernel, None, a, **case.axes)[1]),
    ):
        full = normalize(case.add(expected, given), params, state, epsilon, case.axis)
        assert_as_good(case, case.add(y, found), full)


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_into_next(x64, case):
    x, kernel, bias = case.arrays()
    params, state, epsilon = statistics(case.inputs)
    a = fold.affine(params, state, epsilon=epsilon)
    axes = case.axes if case.dense else {**case.axes, "padding": case.padding}
    new, new_bias = fold.into_next(a, kernel, bias, **axes)
    normal = normalize(np.asarray(x, np.float64), params, state, epsilon, case.axis)
    y, expected = case(x, new), case.exact(normal, kernel)
    assert new.shape == kernel.shape and new_bias.shape == (case.outputs,)
    for given, found in ((bias, new_bias), (None, fold.into_next(a, kernel, None, **axes)[1])):
        assert_as_good(case, case.add(y, found), case.add(expected, given))


# --- where a shift before is a bias after -------------------------------------------

PADDINGS = ["VALID", "SAME", "CIRCULAR", 0, 1, -1, [(1, 0), (0, 0)], [(-1, 0), 0]]
GEOMETRIES = [
    *itertools.product(["conv"], [*PADDINGS, "REFLECT"], [1, 3], [1, 2], [1, 2]),
    *itertools.product(["transposed"], PADDINGS, [1, 3], [1, 2], [1, 2]),
]


@pytest.mark.parametrize("kind, padding, size, strides, dilation", GEOMETRIES)
def test_borders(kind, padding, size, strides, dilation):
    """The rule says yes if and only if flax's own layer turns constants into constants."""
    options = {"padding": padding, "use_bias": False, "kernel_size": (size, size)}
    twice = (dilation, dilation)
    if kind == "conv":
        layer = nn.Conv(1, strides=strides, kernel_dilation=twice, **options)
        layout = Layout(padding=padding)
    else:
        layer = nn.ConvTranspose(1, strides=(strides,) * 2, kernel_dilation=twice, **options)
        layout = Layout(padding=padding, input_dilation=(strides,) * 2, transposed=True)
    kernel = np.random.default_rng(0).random((size, size, 1, 1)).astype(np.float32) + 1
    constant = []
    inputs = [np.ones((1, n, n + 2, 1), np.float32) for n in (9, 10, 11)]
    run = quickly(lambda xs: [layer.apply({"params": {"kernel": kernel}}, x) for x in xs])
    for y in run(inputs):
        constant.append(bool(np.ptp(y) < 1e-5))
        if constant[-1]:
            np.testing.assert_allclose(y, kernel.sum(), rtol=1e-5)
    shift = fold.Affine(np.ones(1), np.ones(1))
    assert (borders(layout, kernel.shape, shift) is None) == all(constant)
    assert borders(layout, kernel.shape, fold.Affine(np.ones(1), np.zeros(1))) is None


@pytest.mark.parametrize(
    "options, why",
    [
        ({"padding": "SAME"}, "a convolution with padding='SAME' sees zeros outside"),
        ({"padding": ((1, 0),)}, r"padding=\(\(1, 0\),\) sees zeros outside"),
        ({"padding": "CAUSAL"}, "padding='CAUSAL' sees zeros outside"),
        ({}, "`padding` is not given, and it must add no zeros"),
        ({"padding": "VALID", "input_dilation": 2}, "its input is dilated by 2"),
        ({"padding": "VALID", "transposed": True}, "a transposed convolution with padding='VALID'"),
    ],
)
def test_refused_at_borders(options, why):
    a = fold.Affine(np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match=f"shift of a normalization cannot.*{why}.*Fix: "):
        fold.into_next(a, jnp.ones((3, 2, 2)), None, **options)
    kernel, bias = fold.into_next(
        fold.Affine(np.full(2, 3.0), np.zeros(2)), jnp.ones((3, 2, 2)), None, **options
    )
    assert np.all(kernel == 3) and np.all(bias == 0)


# --- the map ------------------------------------------------------------------------


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_affine_is_evaluation(use_scale, use_bias):
    params, state, epsilon = statistics(5)
    params = bnjax.BNParams(params.scale if use_scale else None, params.bias if use_bias else None)
    a = fold.affine(params, state, epsilon=epsilon)
    assert a.scale.dtype == a.shift.dtype == np.float64
    x = np.random.default_rng(0).normal(2, 3, (7, 5)).astype(np.float32)
    y, _ = bnjax.bn_apply(params, state, x, False, epsilon=epsilon)
    tolerances.assert_close(y, x * a.scale + a.shift, np.float32, 1)
    full = bnjax.BNParams(*(jnp.full(5, d) if p is None else p for d, p in zip((1, 0), params)))  # noqa: B905
    expected = normalize(np.asarray(x, np.float64), full, state, epsilon, -1)
    np.testing.assert_allclose(x * a.scale + a.shift, expected, rtol=1e-12, atol=1e-12)


def test_traced():
    """Under jit and grad, in float32."""
    params, state, epsilon = statistics(4)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)

    @jax.jit
    def both(params, state, kernel):
        a = fold.affine(params, state, epsilon=epsilon)
        return fold.into_previous(kernel, None, a), fold.into_next(a, kernel.T, jnp.ones(3))

    a = fold.affine(params, state, epsilon=epsilon)
    expected = fold.into_previous(kernel, None, a), fold.into_next(a, kernel.T, jnp.ones(3))
    tolerances.assert_close(both(params, state, kernel), expected, np.float32, 4)
    # Of the fixed statistics, with a kernel that is traced.
    previous = jax.jit(lambda kernel: fold.into_previous(kernel, None, a))(kernel)
    tolerances.assert_close(previous, expected[0], np.float32, 4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_rounded_once(dtype):
    """In the dtypes of kernel and bias; each entry is the nearest to the exact product."""
    params, state, epsilon = statistics(8, dtype=dtype)
    a = fold.affine(params, state, epsilon=epsilon)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 8)), dtype)
    new, bias = fold.into_previous(kernel, jnp.ones(8), a)
    assert new.dtype == dtype and bias.dtype == jnp.float32
    assert fold.into_previous(kernel, None, a)[1].dtype == dtype
    exact = np.asarray(kernel, np.float64) * a.scale
    assert np.all(
        np.abs(np.asarray(new, np.float64) - exact) <= tolerances.unit(dtype) * abs(exact)
    )
    _, bias = fold.into_next(fold.Affine(a.scale[:4], a.shift[:4]), kernel, None, padding="VALID")
    exact = np.einsum("hwio,i->o", np.asarray(kernel, np.float64), a.shift[:4])
    np.testing.assert_allclose(np.asarray(bias, np.float64), exact, rtol=tolerances.unit(dtype))


def test_placement_is_kept(devices):
    mesh = jax.sharding.Mesh(np.array(devices), ("i",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "i"))
    kernel = jax.device_put(jnp.ones((3, 16)), sharding)
    a = fold.Affine(np.arange(16.0), np.ones(16))
    new, _ = fold.into_previous(kernel, None, a)
    assert new.sharding == sharding
    np.testing.assert_array_equal(new[0], a.scale.astype(np.float32))


def evaluation(params, state, epsilon):
    return lambda y: np.asarray(bnjax.bn_apply(params, state, y, False, epsilon=epsilon)[0])


MEANS = pytest.mark.parametrize("mean", [0, 100, 1e4])


@MEANS
@pytest.mark.parametrize("source", ["bias", "inputs"])
def test_large_means_before(x64, mean, source):
    """Into the layer before: no worse than the layer itself, wherever the mean comes from."""
    case = Case(2, inputs=16, outputs=16, padding="VALID")
    x, kernel, bias = case.arrays()
    params, state, epsilon = statistics(16, mean)
    if source == "inputs":
        x = x + mean
    y = np.asarray(case.exact(x, kernel))
    if source == "bias":
        bias = state.mean
    else:
        moments = (jnp.asarray(v, jnp.float32) for v in (y.mean((0, 1, 2)), y.var((0, 1, 2))))
        state = bnjax.BNState(*moments, state.count)
    expected = normalize(case.add(y, bias), params, state, epsilon, -1)
    new, new_bias = fold.into_previous(kernel, bias, fold.affine(params, state, epsilon=epsilon))
    plain = evaluation(params, state, epsilon)(case.add(case(x, kernel), bias))
    plain, folded = (
        tolerances.error(v, expected) for v in (plain, case.add(case(x, new), new_bias))
    )
    bound = tolerances.values(np.float32, case.fan_in)
    assert folded <= max(2 * plain, bound)
    assert folded <= bound or source == "inputs"


@MEANS
def test_large_means_after(x64, mean):
    """Into the layer after: the mean costs what it is in deviations, as is documented."""
    case = Case(2, inputs=16, outputs=16, padding="VALID")
    x, kernel, _ = case.arrays()
    params, state, epsilon = statistics(16, mean)
    x = x + state.mean.reshape(1, 1, 1, -1)
    normal = normalize(np.asarray(x, np.float64), params, state, epsilon, -1)
    expected = case.exact(normal, kernel)
    a = fold.affine(params, state, epsilon=epsilon)
    new, new_bias = fold.into_next(a, kernel, None, padding="VALID")
    plain = case(evaluation(params, state, epsilon)(x), kernel)
    bound = tolerances.values(np.float32, case.fan_in)
    assert tolerances.error(plain, expected) <= bound
    folded = tolerances.error(case.add(case(x, new), new_bias), expected)
    assert folded <= bound * (1 + mean)
    assert mean < 1e4 or folded > 10 * bound  # which is why the layer before goes first


# --- errors -------------------------------------------------------------------------

A = fold.Affine(np.ones(4), np.ones(4))


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: fold.into_previous(jnp.ones((3, 5)), None, A), ValueError,
         r"the normalization has 4 channels, but `kernel` of shape \(3, 5\) has 5 output channels"),
        (lambda: fold.into_next(A, jnp.ones((3, 4)), None), ValueError,
         r"has 4 channels, but `kernel` of shape \(3, 4\) has 3 input channels, by input_axis=0"),
        (lambda: fold.into_next(A, jnp.ones((3, 4, 4)), None, groups=2, padding="VALID"),
         ValueError, r"4 channels, but .* has 8 input channels, by input_axis=1 and groups=2"),
        (lambda: fold.into_previous(jnp.ones((3, 4)), jnp.ones(3), A), ValueError,
         r"`bias` must have one entry per output channel, shape \(4,\)"),
        (lambda: fold.into_previous(jnp.ones(4), None, A), ValueError, "two axes or more"),
        (lambda: fold.into_previous(jnp.ones((3, 4)), None, A, groups=3), ValueError,
         "`groups` must be a positive int that divides the 4 channels on axis 1"),
        (lambda: fold.into_previous(jnp.ones((3, 4)), None, A, groups=True), ValueError,
         "`groups` must be a positive int"),
        (lambda: fold.into_previous(jnp.ones((3, 4)), None, A, input_axis=1), ValueError,
         "`output_axis` and `input_axis` must differ, got -1 and 1"),
        (lambda: fold.into_previous(jnp.ones((3, 4)), None, A, output_axis=2), ValueError,
         r"`output_axis` must be an int in \[-2, 2\)"),
        (lambda: fold.into_previous(jnp.ones((3, 4)), None, A, transposed=1), TypeError,
         "`transposed` must be True or False"),
        (lambda: fold.into_previous(jnp.ones((3, 4), int), None, A), TypeError,
         "`kernel` must have a real floating dtype"),
        (lambda: fold.into_previous(jnp.ones((3, 4)), None, (1, 2)), TypeError,
         r"must be an Affine\(scale, shift\), got tuple. Fix: fold.affine"),
        (lambda: fold.into_previous(jnp.ones((3, 4)), None, fold.Affine(*[np.ones((2, 2))] * 2)),
         ValueError, "several feature axes cannot be folded"),
        (lambda: fold.into_previous(
            jnp.ones((3, 4), jnp.float16), None, fold.Affine(np.full(4, 1e6), np.ones(4))),
         ValueError, "folded `kernel` must fit into its dtype, float16, got values up to 1e[+]06"),
        (lambda: fold.affine(*bnjax.bn_init(3)[::-1]), TypeError, "a BNParams and a BNState"),
        (lambda: fold.affine(bnjax.bn_init(3)[0], bnjax.bn_init(4)[1]), ValueError,
         r"`params.scale` must have the shape of `state.mean`, \(4,\), got \(3,\)"),
        (lambda: fold.affine(*bnjax.bn_init(3), epsilon=-1.0), ValueError, "`epsilon` must be in"),
    ],
)  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("name, value", [("var", 0.0), ("var", -1.0), ("mean", np.nan)])
def test_bad_statistics(name, value):
    params, state = bnjax.bn_init(3)
    state = state._replace(**{name: getattr(state, name).at[1].set(value)})
    with pytest.raises(ValueError, match=r"finite with var \+ epsilon above 0.*channels \[1\]"):
        fold.affine(params, state, epsilon=0.0)

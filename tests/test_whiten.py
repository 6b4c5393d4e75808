"""Whitening: values, states and derivatives beside float64, in every mode and at any mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tolerances
from messages import check_message

import bnjax
from bnjax import BNState, WhitenState, _whitening
from bnjax._whitening import Root

N, G, GROUPS = 96, 3, 3
C = G * GROUPS
METHODS = ("newton-schulz", "eigh")
MEANS = np.repeat([0.0, 1e3, 1e4], G)
RNG = np.random.default_rng(0)
# Correlated within groups, of condition numbers below 10.
MIX = np.eye(C) + 0.4 * RNG.normal(size=(C, C))
X = (RNG.normal(size=(N, C)) @ MIX + MEANS).astype("f")
MASK = RNG.random((N, 1)) < 0.7
W = RNG.normal(size=(N, C)).astype("f")
OF_STATE = tuple(RNG.normal(size=s).astype("f") for s in ((C,), (C,), (GROUPS, G, G)))
PARAMS = bnjax.BNParams(*RNG.uniform(0.5, 1.5, (2, C)).astype("f"))
COV = np.stack([q @ q.T + np.eye(G) for q in RNG.normal(size=(GROUPS, G, G))]).astype("f")
STATE = WhitenState(
    MEANS.astype("f"), np.einsum("gii->gi", COV).reshape(C), np.full(C, 7, np.int32), COV
)


@functools.cache
def derivatives(method):
    """y, the new state and all gradients, as one program."""
    norm = bnjax.whiten(G, method=method, momentum=0.5)

    @functools.partial(jax.jit, static_argnames="train")
    def run(params, state, x, mask, w, of_state, epsilon, train):
        rest, count = (*state[:2], *state[3:]), state.count

        def f(params, rest, x):
            given = WhitenState(*rest[:2], count, rest[2])
            y, new = norm.apply(params, given, x, train, mask=mask, epsilon=epsilon)
            return (y, (*new[:2], new.cov)), new.count

        (y, new), vjp, count = jax.vjp(f, params, rest, x, has_aux=True)
        return y, new, count, vjp((w, of_state))

    return lambda *args, epsilon=1e-5, train=True: run(*args, epsilon, train=train)


def assert_groups_close(found, expected, tolerance, axis=-1):
    """Group by group, each beside its own bound."""
    found, expected = (np.moveaxis(np.asarray(v, np.float64), axis, 0) for v in (found, expected))
    for i, bound in enumerate(tolerance):
        own = slice(i * G, (i + 1) * G) if len(found) == C else i
        error = tolerances.error(found[own], expected[own])
        assert error < bound, f"group {i}: error {error:.2g}, bound {bound:.2g}"


# Of condition numbers below 10, beside the bound of a variance.
BOUNDS = [
    10 * tolerances.variance(jnp.float32, N, m) + tolerances.values(jnp.float32, N)
    for m in (0.0, 1e3, 1e4)
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_oracle(method, masked):
    """y, the new state, the gradients by all that has one; masked entries hold what they like."""
    mask, x = (MASK, np.where(MASK, X, [np.nan, np.inf, 7] * GROUPS)) if masked else (None, X)
    x = x.astype("f")
    y, new, count, grads = derivatives(method)(PARAMS, STATE, x, mask, W, OF_STATE)
    expected, of = reference.whiten(PARAMS, STATE, x, mask, W, OF_STATE, momentum=0.5)
    np.testing.assert_array_equal(count, STATE.count + 1)
    assert_groups_close(y, expected.y, BOUNDS)
    assert_groups_close(grads[2], of.x, BOUNDS)
    for found, wanted in zip(new[:2], (expected.mean, expected.var), strict=True):
        assert_groups_close(found, wanted, BOUNDS)
    assert_groups_close(new[2], expected.cov, BOUNDS, axis=0)
    assert_groups_close(grads[0].scale, of.scale, BOUNDS)
    assert_groups_close(grads[0].bias, of.bias, BOUNDS)
    diagonal = np.diagonal(new[2], axis1=1, axis2=2).reshape(C)
    tolerances.assert_close(diagonal, new[1], jnp.float32, N)
    for found, weight in zip(grads[1], OF_STATE, strict=True):  # of the old state
        tolerances.assert_close(found, 0.5 * weight, jnp.float32, N)


def test_inference():
    """The inverse root of the running covariance, whose diagonal is the running variance."""
    state = STATE._replace(cov=STATE.cov - 5 * np.eye(G, dtype="f"))
    run = derivatives("newton-schulz")
    y, new, count, grads = run(PARAMS, state, X, None, W, OF_STATE, train=False)
    expected, of = reference.whiten(PARAMS, STATE, X, None, W, None, train=False)
    assert_groups_close(y, expected.y, BOUNDS)
    for found, given in zip((*new, count), (*state[:2], state.cov, state.count), strict=True):
        np.testing.assert_array_equal(found, given)
    assert_groups_close(grads[2], of.x, BOUNDS)
    # Beside the weights of the state, which is returned as it came.
    of_mean, of_var, of_cov = (a - b for a, b in zip(grads[1], OF_STATE, strict=True))
    assert_groups_close(of_mean, of.mean, BOUNDS)
    wanted = np.einsum("gii->gi", of.cov)
    assert_groups_close(of_var, wanted.reshape(C), BOUNDS)
    symmetric = (of_cov + of_cov.transpose(0, 2, 1)) / 2
    assert_groups_close(symmetric, of.cov * (1 - np.eye(G)), BOUNDS, axis=0)


def test_output_covariance():
    """The identity, less epsilon's share: cov / (cov + epsilon) in the eigenbasis."""
    x = X - X.mean(0, dtype=np.float64)
    for epsilon in (0.0, 1e-5, 0.5):
        y = derivatives("newton-schulz")(PARAMS, STATE, X, None, W, OF_STATE, epsilon=epsilon)[0]
        y = (np.asarray(y, np.float64) - PARAMS.bias) / PARAMS.scale
        for i, bound in enumerate(BOUNDS):
            z, own = (v[:, G * i : G * (i + 1)] for v in (y, x))
            cov = own.T @ own / N
            shrunk = cov @ np.linalg.inv(cov + epsilon * np.eye(G))
            assert np.abs(z.T @ z / N - shrunk).max() < 2 * bound


def test_groups_of_one_are_bn_apply():
    """With masks that differ between channels, a schedule, unbiased; in both modes."""
    mask = np.random.default_rng(1).random((N, C)) < 0.5
    mask[:, 0], mask[1:, 1] = False, False
    options = {"momentum": bnjax.debiased(0.9), "unbiased": True, "epsilon": 0.1}
    counts = np.arange(C, dtype=np.int32)
    state = BNState(*STATE[:2], counts)
    one = bnjax.whiten(1, **options)

    def of(apply, cov):
        @jax.jit
        def run(params, mean, var, x, train):
            def f(params, mean, var, x):
                given = type(state)(mean, var, counts)
                y, new = apply(params, given if cov is None else (*given, cov), x, train)
                return (y, *new[:2]), (new[2], new[3:])

            return jax.vjp(f, params, mean, var, x, has_aux=True)

        def both(train):
            out, vjp, aux = run(PARAMS, *state[:2], X, train)
            return out, vjp((W, *OF_STATE[:2])), aux

        return both

    plain = of(functools.partial(bnjax.bn_apply, mask=mask, **options), None)
    whitened = of(
        lambda p, s, *rest: one.apply(p, WhitenState(*s), *rest, mask=mask),
        state.var[:, None, None],
    )
    for train in (True, False):
        (found, grads, (count, (cov,))), (wanted, expected, (n, _)) = whitened(train), plain(train)
        tolerances.assert_close((found, grads), (wanted, expected), jnp.float32, N)
        np.testing.assert_array_equal(count, n)
        tolerances.assert_close(cov[:, 0, 0], found[2], jnp.float32, N)


def test_groups_of_one_with_a_mask_for_some_feature_axes():
    """Which differs along one of two feature axes, and is broadcast along the other."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (16, 2, 3)).astype(np.float32)
    mask = rng.random((16, 2, 1)) < 0.7
    options = {"axis": (1, 2), "mask": mask}
    norm = bnjax.whiten(1)
    params, state = norm.init((2, 3))
    y, new = norm.apply(params, state, x, True, **options)
    expected, old = bnjax.bn_apply(params, bnjax.BNState(*state[:3]), x, True, **options)
    tolerances.assert_close((y, *new[:3]), (expected, *old), jnp.float32, 16)


def test_forward_mode_at_large_means():
    """Along dx = x y hardly moves: sums and differences of large numbers cancel."""
    norm = bnjax.whiten(G)
    params, state = norm.init(C)
    f = jax.jit(lambda x, dx: jax.jvp(lambda x: norm.apply(params, state, x, True)[0], (x,), (dx,)))
    h = 1e-5
    for dx in (X, W):
        found = np.asarray(f(X, dx)[1], np.float64)
        ahead, back = (X + t * dx.astype(np.float64) for t in (h, -h))
        ahead, back = (
            reference.whiten(params, state, v, None, W, None)[0].y for v in (ahead, back)
        )
        assert np.abs(found - (ahead - back) / (2 * h)).max() < tolerances.TWO_PASS_FLOOR


def hadamard():
    """Orthogonal columns: the covariance has the eigenvalues 1, 1, 4, 4, on a diagonal."""
    h = np.array([[1.0]])
    for _ in range(3):
        h = np.block([[h, h], [h, -h]])
    return h[:, 1:5] * [1, 1, 2, 2] + [0, 3, 0, 100]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_second_order_at_equal_eigenvalues(method):
    """In all combinations of modes, beside finite differences of the oracle's gradient."""
    norm, x = bnjax.whiten(4, method=method), hadamard()
    params, state = norm.init(4, param_dtype=jnp.float64)
    rng = np.random.default_rng(1)
    w, v, other = rng.normal(size=(3, *x.shape))
    of_state = tuple(rng.normal(size=s.shape) for s in (*state[:2], state.cov))

    def f(x):
        y, new = norm.apply(params, state, x, True)
        return sum(map(jnp.vdot, (w, *of_state), (y, *new[:2], new.cov)))

    @jax.jit
    def found(x):
        gradient, forward_over_reverse = jax.jvp(jax.grad(f), (x,), (v,))
        reverse_over_reverse = jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x)
        along = jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (other,))
        return (gradient, forward_over_reverse, reverse_over_reverse), along

    def oracle(x):
        return reference.whiten(params, state, x, None, w, of_state)[1].x

    h = 1e-5
    second = (oracle(x + h * v) - oracle(x - h * v)) / (2 * h)
    gradients, along = found(x)
    for one, wanted in zip(gradients, (oracle(x), second, second), strict=True):
        np.testing.assert_allclose(one, wanted, atol=1e-7 * np.abs(second).max())
    np.testing.assert_allclose(along, [np.vdot(oracle(x), v), np.vdot(second, other)], rtol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_entries_than_channels(method):
    """A singular covariance: finite, and what there is of it is right."""
    x, mask = 100 * X, np.arange(N)[:, None] % 48 == 0
    none = jax.tree.map(np.zeros_like, OF_STATE)
    w = W * mask
    y, new, count, grads = derivatives(method)(PARAMS, STATE, x, mask, w, none)
    expected = reference.whiten(PARAMS, STATE, x, mask, w, None)[0].y
    assert np.abs(y - expected)[mask[:, 0], :G].max() < 1e-2
    np.testing.assert_array_equal(count, STATE.count + 1)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((y, new, grads)))
    assert np.abs(grads[2][:, :G]).max() < 1


def test_nan_stays_in_its_group():
    run = derivatives("newton-schulz")
    x = X.copy()
    x[5, 1] = np.nan
    clean, found = (run(PARAMS, STATE, v, None, W, OF_STATE) for v in (X, x))
    assert np.isnan(found[0][:, :G]).all()
    np.testing.assert_array_equal(found[2], STATE.count + np.repeat([0, 1, 1], G))
    for new, old in zip(found[1], (*STATE[:2], STATE.cov), strict=True):
        np.testing.assert_array_equal(new[: len(old) // GROUPS], old[: len(old) // GROUPS])
    assert_groups_close(found[0][:, G:], clean[0][:, G:], BOUNDS[1:])
    assert_groups_close(found[3][2][:, G:], clean[3][2][:, G:], BOUNDS[1:])


def test_nothing_to_learn_from():
    """One entry: normalized with itself; none: with what runs, with the derivative of that."""
    run = derivatives("newton-schulz")
    y, new, count, _ = run(PARAMS, STATE, X, np.arange(N)[:, None] == 3, W, OF_STATE)
    np.testing.assert_array_equal(count, STATE.count)
    np.testing.assert_array_equal(new[2], STATE.cov)
    assert np.abs(y[3] - PARAMS.bias).max() < 1e-5
    found = run(PARAMS, STATE, X, np.zeros((N, 1), bool), W, OF_STATE)
    wanted = run(PARAMS, STATE, X, None, W, OF_STATE, train=False)
    tolerances.assert_close(found[0], wanted[0], jnp.float32, N)
    tolerances.assert_close(found[3][2], wanted[3][2], jnp.float32, N)


def test_condition_numbers():
    """Both roots, and how far so many iterations go: to 2.25^(k - 4)."""
    conditions = np.array([1, 1e2, 1e3, 1e4, 1e5])
    matrices = []
    for condition in conditions:
        q = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
        matrices.append((q * np.geomspace(1, 1 / condition, 8)) @ q.T)
    a = np.stack(matrices).astype("f")
    for how in (Root("newton-schulz", None), Root("newton-schulz", 12), Root("eigh", None)):
        z = np.asarray(jax.jit(functools.partial(_whitening._inverse_root, how))(a), np.float64)
        error = np.abs(z @ a @ z - np.eye(8)).max((1, 2))
        k = how.iterations or 20
        bound = 32 * tolerances.unit(jnp.float32) * conditions
        assert (error < bound)[conditions <= 2.25 ** (k - 4)].all(), error
        assert (error > bound)[conditions > 2.25 ** (k - 1)].all(), error


def test_residuals():
    """Reverse mode keeps x in its own dtype, and matrices."""
    norm = bnjax.whiten(G)
    x = jnp.asarray(X, jnp.bfloat16)
    params, state = norm.init(C)
    _, vjp = jax.vjp(lambda p, x: norm.apply(p, state, x, True)[0], params, x)
    large = [v for v in jax.tree.leaves(vjp) if v.size >= x.size]
    assert [v.dtype for v in large] == [x.dtype] and large[0].size == x.size


NORM = bnjax.whiten(2)
P4, S4 = NORM.init(4)
X4 = jnp.ones((6, 4))
REFUSED = {
    "zero": (lambda: bnjax.whiten(0), (ValueError, "group_size", "at least 1", "0", "")),
    "float": (lambda: bnjax.whiten(2.0), (TypeError, "group_size", "an int", "2.0", "")),
    "method": (
        lambda: bnjax.whiten(2, method="cholesky"),
        (ValueError, "method", "one of ['newton-schulz', 'eigh']", "cholesky", ""),
    ),
    "iterations": (
        lambda: bnjax.whiten(2, iterations=0), (ValueError, "iterations", "at least 1", "0", "")),
    "iterations of eigh": (
        lambda: bnjax.whiten(2, iterations=5, method="eigh"),
        (ValueError, "iterations", "None for eigh", "5", 'method="newton-schulz"'),
    ),
    "option": (
        lambda: bnjax.whiten(2, groups=2),
        (TypeError, "whiten", "options of `bn_apply`", "groups", ""),
    ),
    "divides": (
        lambda: NORM.init(5),
        (ValueError, "group_size", "divide the number of channels, 5", "2", "whiten(1)"),
    ),
    "divides x": (
        lambda: bnjax.whiten(4).apply(*NORM.init(6), jnp.ones((2, 6)), True),
        (ValueError, "group_size", "divide the number of channels, 6", "4", "whiten(2)"),
    ),
    "state": (
        lambda: NORM.apply(P4, BNState(*S4[:3]), X4, True),
        (TypeError, "state", "a WhitenState", "BNState", "whiten(2).init"),
    ),
    "cov": (
        lambda: NORM.apply(P4, S4._replace(cov=jnp.ones((1, 4, 4))), X4, True),
        (ValueError, "state.cov", "shape (2, 2, 2)", "(1, 4, 4)", "whiten(2).init"),
    ),
    "integers": (
        lambda: NORM.apply(P4, S4._replace(cov=jnp.ones((2, 2, 2), int)), X4, True),
        (TypeError, "state.cov", "floating", "int32", "astype"),
    ),
    "mask": (
        lambda: NORM.apply(P4, S4, X4, True, mask=X4 > 0),
        (ValueError, "mask", "size 1 along the feature axes (1,)", "(6, 4)", "mask.all((1,)"),
    ),
    "momentum": (
        lambda: NORM.apply(P4, S4, X4, True, momentum=jnp.ones(4)),
        (ValueError, "momentum", "one number", "(4,)", ""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    check_message(*REFUSED[name])

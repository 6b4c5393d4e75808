"""Schedules of the running average, against the averages that they stand for, in float64."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import assert_close, error, unit

import bnjax

RNG = np.random.default_rng(0)
STEPS = 6
XS = RNG.normal(RNG.normal(2, 3, (STEPS, 1, 3)), 2, (STEPS, 10, 3)).astype(np.float32)
BATCH_MEANS, BATCH_VARS = XS.mean(1, dtype=np.float64), XS.var(1, dtype=np.float64)
PARAMS, STATE = bnjax.bn_init(3)
U = unit(jnp.float32)
close = functools.partial(assert_close, dtype=np.float32, n=100)


def train(momentum, state=STATE, **options):
    """The states after each step of a scan."""

    def step(state, x):
        _, state = bnjax.bn_apply(PARAMS, state, x, True, momentum=momentum, **options)
        return state, state

    return jax.jit(lambda state: jax.lax.scan(step, state, XS)[1])(state)


def averages(weights, batches):
    """After each step, the average of the batches so far with weights(t) of t batches."""
    return np.stack(
        [np.average(batches[:t], axis=0, weights=weights(t)) for t in range(1, STEPS + 1)]
    )


def test_cumulative_is_the_plain_average():
    states = train(bnjax.cumulative())
    close(states.mean, averages(np.ones, BATCH_MEANS))
    close(states.var, averages(np.ones, BATCH_VARS))
    np.testing.assert_array_equal(states.count[-1], [STEPS] * 3)


def test_cumulative_as_torch():
    """momentum=None: running += (new - running) / num_batches_tracked, variance unbiased."""
    mean, var = np.zeros(3), np.ones(3)
    states = train(bnjax.cumulative(), unbiased=True)
    for tracked in range(1, STEPS + 1):
        factor = 1 / tracked
        mean = (1 - factor) * mean + factor * BATCH_MEANS[tracked - 1]
        var = (1 - factor) * var + factor * BATCH_VARS[tracked - 1] * 10 / 9
        close((states.mean[tracked - 1], states.var[tracked - 1]), (mean, var))


@pytest.mark.parametrize("m", [0.0, 0.5, 0.9, 0.99, 0.99999])
def test_debiased_is_adams_correction(m):
    """The average from 0, divided by 1 - m**t."""
    states = train(bnjax.debiased(m))
    mean = var = np.zeros(3)
    for t in range(1, STEPS + 1):
        mean = m * mean + (1 - m) * BATCH_MEANS[t - 1]
        var = m * var + (1 - m) * BATCH_VARS[t - 1]
        corrected = mean / (1 - m**t), var / (1 - m**t)
        close((states.mean[t - 1], states.var[t - 1]), corrected)
    close(states.mean, averages(lambda t: m ** np.arange(t)[::-1] + (t == 1), BATCH_MEANS))


@pytest.mark.parametrize("schedule", [bnjax.cumulative(), bnjax.debiased(0.99), bnjax.debiased(0)])
def test_first_update_replaces_the_initial_values(schedule):
    """Entirely: whatever they are, nothing of them is left."""
    x = XS[0]
    odd = STATE._replace(mean=jnp.array([1e30, -5.0, 0.0]), var=jnp.array([3.0, 1e30, 0.0]))
    _, new = bnjax.bn_apply(PARAMS, odd, x, True, momentum=schedule)
    assert_close(new.mean, BATCH_MEANS[0], np.float32, 10)
    assert_close(new.var, BATCH_VARS[0], np.float32, 10)


COUNTS = np.array([0, 1, 2, 3, 10, 100, 999, 10**4, 10**5, 10**6, 2**31 - 1])


@pytest.mark.parametrize("m", [0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.9999999])
def test_debiased_weights(m):
    """m (1 - m**t) / (1 - m**(t+1)) to a few roundings, at any m and t."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.log(m)
        old = np.expm1(np.where(COUNTS == 0, 0, COUNTS * rate))
        expected = np.where(COUNTS == 0, 0, m * old / np.expm1((COUNTS + 1) * rate))
    got = bnjax.debiased(m)(jnp.asarray(COUNTS, jnp.int32))
    chex.assert_type(got, jnp.float32)
    assert error(got, expected, scale=1.0) <= 4 * U
    assert np.all((got >= 0) & (got < 1))


def test_cumulative_weights():
    got = bnjax.cumulative()(jnp.asarray(COUNTS, jnp.int32))
    chex.assert_type(got, jnp.float32)
    assert error(got, COUNTS / (COUNTS + 1), scale=1.0) <= 2 * U


@pytest.mark.parametrize("schedule", [bnjax.cumulative(), bnjax.debiased(0.9)])
def test_form_of_schedules(schedule):
    """Elementwise, of any shape, NumPy or traced, as those of optax."""
    counts = np.arange(6, dtype=np.int32)
    whole = schedule(jnp.asarray(counts))
    chex.assert_trees_all_equal(schedule(jnp.asarray(counts.reshape(2, 3))), whole.reshape(2, 3))
    chex.assert_trees_all_equal(schedule(counts), whole)
    chex.assert_trees_all_equal(jnp.stack([schedule(jnp.asarray(c)) for c in counts]), whole)
    close(jax.jit(schedule)(counts), whole)
    chex.assert_trees_all_equal(jax.vmap(schedule)(jnp.asarray(counts)), whole)


def test_debiased_of_a_traced_momentum():
    got = jax.jit(lambda m: bnjax.debiased(m)(jnp.arange(4)))(0.9)
    close(got, bnjax.debiased(0.9)(jnp.arange(4)))


SCHEDULES = {
    "constant": optax.constant_schedule(0.7),
    "linear": optax.linear_schedule(0.0, 0.9, 4),
    "exponential": optax.exponential_decay(0.9, 3, 0.5),
    "cosine": optax.cosine_decay_schedule(1.0, 5),
    "joined": optax.join_schedules([bnjax.cumulative(), optax.constant_schedule(0.8)], [3]),
    "cumulative": bnjax.cumulative(),
    "debiased": bnjax.debiased(0.9),
    "own": lambda count: jnp.where(count < 3, 0.2, 0.6),
    "counter": lambda count: jnp.clip(count, 0, 1),  # integer weights
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_any_schedule(schedule):
    """Under jit and scan, with a count of its own for every channel."""
    counts = np.array([0, 2, 5], np.int32)
    states = train(schedule, STATE._replace(count=jnp.asarray(counts)))
    mean, var = np.zeros(3), np.ones(3)
    for t in range(STEPS):
        m = np.array([schedule(jnp.asarray(c + t)) for c in counts], np.float64)
        assert np.all((m >= 0) & (m <= 1))
        mean = m * mean + (1 - m) * BATCH_MEANS[t]
        var = m * var + (1 - m) * BATCH_VARS[t]
        close((states.mean[t], states.var[t]), (mean, var))
    np.testing.assert_array_equal(states.count[-1], counts + STEPS)


def test_skipped_batches_do_not_count():
    """A batch that a channel refused leaves the plain average of the others."""
    xs = XS.copy()
    xs[0, 0, 0] = xs[3, 2, 1] = np.nan
    state = STATE
    for x in xs:
        _, state = jax.jit(
            functools.partial(bnjax.bn_apply, train=True, momentum=bnjax.cumulative())
        )(PARAMS, state, x)
    np.testing.assert_array_equal(state.count, [5, 5, 6])
    kept = np.array([[1, 2, 3, 4, 5], [0, 1, 2, 4, 5]])
    close(state.mean[0], BATCH_MEANS[kept[0], 0].mean())
    close(state.mean[1], BATCH_MEANS[kept[1], 1].mean())
    close(state.mean[2], BATCH_MEANS[:, 2].mean())


def test_arguments():
    assert not inspect.signature(bnjax.cumulative).parameters
    assert list(inspect.signature(bnjax.debiased).parameters) == ["momentum"]
    assert bnjax.debiased(np.float64(0.5))(jnp.array([1])) == jnp.float32(1 / 3)

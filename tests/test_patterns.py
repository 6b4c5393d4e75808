"""What recalibration, switches and the pure state are for, as users would write it."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from tolerances import assert_close

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import recalibrate
from bnjax.optim import labels

RNG = np.random.default_rng(0)
C = 4
KEY = jax.random.key(0)
BATCHES = RNG.normal(RNG.normal(1, 2, (3, 1, C)), 2, (3, 6, C)).astype(np.float32)
KERNEL = RNG.normal(0, 1, (C, C)).astype(np.float32)
MUTABLE = ["batch_stats"]
close = functools.partial(assert_close, dtype=np.float32, n=1000)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(bnjax.linen.BatchNorm, not train, momentum=0.9)
        return norm()(nn.Dense(C)(jnp.tanh(norm()(x))))


def evaluated(apply, batch):
    return apply(batch, train=False)


def loss(params, stats, x, train=True):
    """And the new statistics."""
    given = {"params": params, "batch_stats": stats}
    y, new = Model().apply(given, x, train, mutable=MUTABLE)
    return jnp.mean((jnp.sin(y) - jnp.cos(x)) ** 2), new["batch_stats"]


def fit(optimizer, steps=12, train=True, variables=None):
    """Parameters, their moving average, statistics."""
    variables = variables or Model().init(KEY, BATCHES[0], False)
    params, stats = variables["params"], variables["batch_stats"]
    state, mean = optimizer.init(params), params

    @jax.jit
    def step(params, stats, state, mean, x):
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, x, train)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, stats, state, optax.incremental_update(params, mean, 0.2)

    for i in range(steps):
        params, stats, state, mean = step(params, stats, state, mean, BATCHES[i % 3])
    return params, mean, stats


@functools.cache
def fitted():
    return fit(optax.MultiSteps(optax.sgd(0.3), every_k_schedule=3))


def gap(variables, x):
    """Between evaluation and batch statistics, the largest over the outputs."""
    x = x.reshape(-1, C)
    evaluation = Model().apply(variables, x, False)
    with bnjax.linen.switch(moments="batch", learn=False):
        batch = Model().apply(variables, x, False)
    return float(np.abs(evaluation - batch).max())


@pytest.mark.parametrize("use", ["averaged weights", "accumulated gradients", "new domain"])
def test_recalibration(use):
    """The running statistics are not those of weights and data; recalibrated they are."""
    params, mean, stats = fitted()
    variables = {"params": mean if use == "averaged weights" else params, "batch_stats": stats}
    x = -0.5 * BATCHES + 2 if use == "new domain" else BATCHES
    found = recalibrate(Model(), variables, list(x), call=evaluated, passes=2)
    assert gap(variables, x) > 0.1
    assert gap(found, x) < 1e-4
    chex.assert_trees_all_equal(found["params"], variables["params"])


def test_parameters_train_while_statistics_are_frozen():
    """Fine-tuning, with train=True all over the model."""
    params, _, stats = fitted()
    variables = {"params": params, "batch_stats": stats}
    with bnjax.linen.switch(moments="running", learn=False):
        tuned = fit(optax.sgd(0.1), 6, variables=variables)
    chex.assert_trees_all_equal(tuned[2], stats)
    # The same as training in evaluation mode.
    close(tuned[0], fit(optax.sgd(0.1), 6, train=False, variables=variables)[0])
    assert not np.allclose(tuned[0]["Dense_0"]["kernel"], params["Dense_0"]["kernel"])


@pytest.mark.parametrize("frozen", ["all", "norm"])
def test_statistics_train_while_parameters_are_frozen(frozen):
    """All parameters, or those of normalizations only."""
    params, _, stats = fitted()
    rule = {"norm": optax.set_to_zero(), "other": optax.sgd(0.1)}
    optimizer = optax.set_to_zero() if frozen == "all" else optax.multi_transform(rule, labels)
    tuned, _, new = fit(optimizer, 6, variables={"params": params, "batch_stats": stats})
    for name in params:
        moved = not np.array_equal(*(jax.tree.leaves(p[name])[0] for p in (tuned, params)))
        assert moved == (frozen == "norm" and name == "Dense_0")
    assert np.any(new["BatchNorm_0"]["mean"] != stats["BatchNorm_0"]["mean"])


def test_adaptation_at_test_time():
    """To a shifted domain: by moments of each batch, or with statistics that follow."""
    params, _, stats = fitted()
    x = 3 * BATCHES[0] - 5
    run = functools.partial(Model().apply, {"params": params, "batch_stats": stats})
    evaluation, training = run(x, False), run(x, True, mutable=MUTABLE)[0]
    with bnjax.linen.switch(moments="batch", learn=False):
        close(run(x, False), training)
    assert np.abs(evaluation - training).max() > 0.5
    adapted = {"params": params, "batch_stats": stats}
    with bnjax.linen.switch(moments="batch", learn=True):
        for _ in range(60):
            _, new = Model().apply(adapted, x, False, mutable=MUTABLE)
            adapted = {**adapted, **new}
    assert np.abs(Model().apply(adapted, x, False) - training).max() < 0.05


def test_a_second_forward_pass_leaves_no_trace():
    """As that of a perturbed input, or of perturbed weights, in one step of training."""
    norm, again = bnjax.batch_norm(), bnjax.switch(bnjax.batch_norm(), learn=False)
    params, state = norm.init(C)
    y, new = norm.apply(params, state, BATCHES[0], True)
    z, after = again.apply(params, new, BATCHES[0] * 2 + 1, True)
    chex.assert_trees_all_equal(after, new)
    close(z, y)


# Statistics of their own for each domain, parameters of all.
DOMAINS = 3
DOMAIN_OF = (0, 2, 0, 1, 2, 2)
STREAM = [(d, (d + 1) * x + d) for d, x in zip(DOMAIN_OF, (*BATCHES, *BATCHES), strict=True)]


def split_apply(params, states, x, domain, train):
    """A state per domain, stacked, of which the traced `domain` picks one."""
    state = jax.tree.map(lambda v: v[domain], states)
    y, state = bnjax.bn_apply(params, state, x, train, momentum=0.9)
    return y, jax.tree.map(lambda v, new: v.at[domain].set(new), states, state)


def separate(train_first=STREAM):
    """Outputs and states of a layer for each domain, in float64."""
    states = [(np.zeros(C), np.ones(C), 0)] * DOMAINS
    outputs = []
    for d, x in train_first:
        mean, var, count = states[d]
        inputs = reference.Inputs(x, np.ones(C), np.zeros(C), mean, var, 1e-5)
        out = reference.forward(inputs, momentum=0.9, count=count)
        outputs.append(out.y)
        states[d] = (out.mean, out.var, out.count)
    return outputs, states


def test_domains_of_a_function():
    """One compiled program for all domains; recalibrated, each has its own data's moments."""
    params, state = bnjax.bn_init(C)
    states = jax.tree.map(lambda v: jnp.stack([v] * DOMAINS), state)
    step = jax.jit(chex.assert_max_traces(split_apply, 1), static_argnums=4)
    outputs = []
    for domain, x in STREAM:
        y, states = step(params, states, x, jnp.array(domain), True)
        outputs.append(y)
    expected = separate()
    close(outputs, expected[0])
    close(tuple(states), tuple(map(np.stack, zip(*expected[1], strict=True))))

    def model(variables, batch):
        y, states = split_apply(*variables, batch["x"], batch["domain"], False)
        return y, (variables[0], states)

    batches = [{"x": x, "domain": np.array(d)} for d, x in STREAM]
    found = recalibrate(model, (params, states), batches)[1]
    for domain in range(DOMAINS):
        whole = reference.moments(np.stack([x for d, x in STREAM if d == domain]))
        close((found.mean[domain], found.var[domain]), (whole.mean, whole.var))
        assert np.all(found.count[domain] == DOMAIN_OF.count(domain))


def test_domains_of_linen():
    """A tree of statistics for each."""
    layer = bnjax.linen.BatchNorm(False, momentum=0.9)
    variables = layer.init(KEY, BATCHES[0])
    stats, outputs = [variables["batch_stats"]] * DOMAINS, []
    for domain, x in STREAM:
        given = {"params": variables["params"], "batch_stats": stats[domain]}
        y, new = layer.apply(given, x, mutable=MUTABLE)
        stats[domain] = new["batch_stats"]
        outputs.append(y)
    expected = separate()
    close(outputs, expected[0])
    close([(s["mean"], s["var"]) for s in stats], [s[:2] for s in expected[1]])


def test_domains_of_nnx():
    """States that are swapped, of one model whose parameters train."""
    model = nnx.Sequential(bnjax.nnx.BatchNorm(C, momentum=0.9, rngs=nnx.Rngs(0)))

    def statistics():
        return jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))

    states, outputs = [statistics() for _ in range(DOMAINS)], []
    for domain, x in STREAM:
        nnx.update(model, states[domain])
        outputs.append(model(x))
        states[domain] = statistics()
    expected = separate()
    close(outputs, expected[0])
    found = [s["layers"][0] for s in states]
    close([(s["mean"][...], s["var"][...]) for s in found], [s[:2] for s in expected[1]])

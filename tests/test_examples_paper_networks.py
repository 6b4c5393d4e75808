"""The networks of paper_mnist.py, many at once, against each of them alone in float64."""

import example_runs
import jax
import numpy as np
import paper_experiments
import paper_network
import paper_runs
import paper_trainer
import paper_training
import pytest
from paper_network import KERNELS
from paper_runs import CHUNK, RECORDS, REGULARIZED, SEEDS
from paper_training import BATCH_SIZE


@pytest.fixture(scope="module", autouse=True)
def small():
    with paper_runs.small():
        yield


@pytest.fixture(scope="module")
def digits():
    return example_runs.data.load("digits")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def masks_of(keys, seed, number, dropout):
    """Factors of both hidden layers' units: 0, or what keeps their mean."""
    key = jax.random.fold_in(keys.noise[seed], number)
    shape = BATCH_SIZE, paper_network.UNITS
    kept = [jax.random.bernoulli(k, 1 - dropout, shape) for k in jax.random.split(key, 2)]
    return [np.asarray(k) / (1 - dropout) for k in kept]


def derivative(params, images, labels, masks):
    """Of the mean cross-entropy in training, by hand; gradients by the names of params."""
    norm = hasattr(params["hidden"], "scale")
    h, layers = images, []
    for i, kernel in enumerate([params["first"], *params["others"]]):
        u = h @ kernel
        if norm:
            deviation = np.sqrt(u.var(0) + 1e-5)
            x = (u - u.mean(0)) / deviation
            z = x * params["hidden"].scale[i] + params["hidden"].bias[i]
        else:
            deviation, x, z = None, None, u + params["hidden"][i]
        layers.append((h, deviation, x, sigmoid(z)))
        h = layers[-1][3] * masks[i]
    logits = h @ params["last"] + params["last bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    d = (p / p.sum(1, keepdims=True) - np.eye(10)[labels]) / len(labels)
    grads = {"last": h.T @ d, "last bias": d.sum(0)}
    d, kernels, shifts = d @ params["last"].T, [], []
    for i, (h, deviation, x, s) in reversed(list(enumerate(layers))):
        d = d * masks[i] * s * (1 - s)
        shifts.append((np.sum(d * x, 0), d.sum(0)) if norm else d.sum(0))
        if norm:
            d = d * params["hidden"].scale[i]
            d = (d - d.mean(0) - x * (d * x).mean(0)) / deviation
        kernels.append(h.T @ d)
        d = d @ (params["others"][i - 1] if i else params["first"]).T
    shifts = np.array(shifts[::-1])
    hidden = type(params["hidden"])(shifts[:, 0], shifts[:, 1]) if norm else shifts
    return grads | {"first": kernels[-1], "others": np.array(kernels[-2::-1]), "hidden": hidden}


def state_of(trainer, group, seed, place):
    """One network, in float64."""
    return jax.tree.map(lambda v: np.float64(v[seed, place]), trainer.states[group.name])


def batches_of(trainer, seed, steps):
    """Indices of the first batches of a seed, by the position in an endless row."""
    count = trainer.experiment.examples or len(trainer.train_data[1])
    epochs = -(-steps * BATCH_SIZE // count)
    order = [
        jax.random.permutation(jax.random.fold_in(trainer.keys.order[seed], e), count)
        for e in range(epochs)
    ]
    row = np.concatenate(order)[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE)
    if trainer.experiment.examples is None:
        return row
    own = paper_training.members(
        jax.tree.map(lambda v: v[seed], trainer.keys), len(trainer.train_data[1]), count
    )
    return np.asarray(own)[row]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_training_many_is_training_each(digits, batch_norm):
    """Two chunks with dropout and penalties of each network, in NumPy."""
    trainer = paper_trainer.Trainer(paper_experiments.EXPERIMENTS["regularize"], digits, SEEDS)
    group = trainer.experiment.groups[not batch_norm]
    assert group.architecture.batch_norm == batch_norm
    places = [(seed, i) for seed in range(SEEDS) for i in range(len(REGULARIZED))]
    expected = {place: state_of(trainer, group, *place).params for place in places}
    for seed, i in places:
        choice, params = list(REGULARIZED.values())[i], expected[seed, i]
        for number, batch in enumerate(batches_of(trainer, seed, RECORDS * CHUNK)):
            images = np.float64(digits.train_images[batch])
            masks = masks_of(trainer.keys, seed, number, choice.dropout)
            grads = derivative(params, images, digits.train_labels[batch], masks)
            for name in KERNELS:
                kernel = params[name]
                grads[name] = grads[name] + choice.l2 * kernel + choice.l1 * np.sign(kernel)
            params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
        expected[seed, i] = params
    for _ in range(RECORDS):
        trainer.advance()
    for place in places:
        found = state_of(trainer, group, *place).params
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()),
            found,
            expected[place],
        )


@pytest.mark.parametrize("batch_norm", [True, False])
def test_measured_numbers_are_those_of_the_networks(digits, batch_norm):
    """Gradients before training; accuracy and percentiles in evaluation after it."""
    experiment = paper_experiments.EXPERIMENTS["curves"]._replace(gradients=True)
    trainer = paper_trainer.Trainer(experiment, digits, SEEDS)
    group, seed, place = experiment.groups[not batch_norm], 1, 1
    params = state_of(trainer, group, seed, place).params
    norms = []
    for batch in batches_of(trainer, seed, 20):
        images, labels = np.float64(digits.train_images[batch]), digits.train_labels[batch]
        grads = derivative(params, images, labels, [1.0] * 3)
        norms.append([np.linalg.norm(g) for g in (grads["first"], *grads["others"])])
    trainer.advance()
    row = _row(trainer.log["gradients"], group, seed, "1")
    found = [row[f"layer {i}"] for i in (1, 2, 3)]
    np.testing.assert_allclose(found, np.mean(norms, 0), rtol=1e-3)  # written with four digits

    params, statistics = state_of(trainer, group, seed, place)
    h = np.float64(digits.test_images)
    for i, kernel in enumerate([params["first"], *params["others"]]):
        z = h @ kernel
        if batch_norm:
            z = (z - statistics.mean[i]) / np.sqrt(statistics.var[i] + 1e-5)
            z = z * params["hidden"].scale[i] + params["hidden"].bias[i]
        else:
            z = z + params["hidden"][i]
        h = sigmoid(z)
    right = (h @ params["last"] + params["last bias"]).argmax(1) == digits.test_labels
    low, median, high = np.percentile(z, (15, 50, 85), axis=0)
    row = _row(trainer.log["metrics"], group, seed, "1")
    assert abs(row["test_accuracy"] - right.mean()) < 1.5 / len(right)
    found = [row[name] for name in ("p15", "p50", "p85", "spread")]
    expected = [low[0], median[0], high[0], (high - low).mean()]
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
    assert np.isnan(row["drift"])
    before = trainer.medians[group.name].copy()
    trainer.advance()
    drift = np.abs(trainer.medians[group.name] - before).mean(-1)[seed, place]
    row = _row(trainer.log["metrics"][-len(trainer.log["metrics"]) // 2 :], group, seed, "1")
    assert row["drift"] == pytest.approx(drift, rel=1e-3)


def _row(rows, group, seed, rate):
    (found,) = (
        row
        for row in rows
        if (row["network"], row["seed"], row["rate"]) == (group.network, seed, rate)
    )
    return found

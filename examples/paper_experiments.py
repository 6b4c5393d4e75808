"""The experiments of paper_mnist.py: which networks, how long, and what is measured of them."""

from typing import Any

import numpy as np
from paper_network import KERNELS, Architecture, Choice
from paper_trainer import Experiment, Group, Row, Trainer

BY_RATE = ("rate",)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
PERCENTILES = (15, 50, 85)
UNIT = 0  # whose inputs are shown; all units count for drift and spread
SMALL = 1e-3  # weights below it count as small

Choices = dict[tuple[str, ...], Choice]


def accuracy(trainer: Trainer, group: Group) -> Row:
    found, _ = trainer.evaluate(group)
    return {"test_accuracy": np.asarray(found.accuracy)}


def distribution(trainer: Trainer, group: Group) -> Row:
    """Percentiles of an input of the last hidden layer's activation, and how all move.

    drift: mean over the units of |median - median of the record before|; spread: of
    the distance between the outer percentiles.
    """
    found, inputs = trainer.evaluate(group, inputs=True)
    # A diverged network's inputs may be infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        low, median, high = percentiles(np.asarray(inputs))
        drift = np.abs(median - trainer.medians[group.name]).mean(-1)
        spread = (high - low).mean(-1)
    trainer.medians[group.name] = median
    return {
        "test_accuracy": np.asarray(found.accuracy),
        **{f"p{q}": p[..., UNIT] for q, p in zip(PERCENTILES, (low, median, high), strict=True)},
        "drift": drift,
        "spread": spread,
    }


def percentiles(inputs: np.ndarray) -> np.ndarray:
    """PERCENTILES over the examples: [3, seeds, choices, units]."""
    found = np.empty((len(PERCENTILES), *inputs.shape[:2], inputs.shape[-1]), np.float32)
    for index in np.ndindex(inputs.shape[:2]):
        units_first = np.ascontiguousarray(inputs[index].T)
        found[(slice(None), *index)] = np.percentile(units_first, PERCENTILES, axis=1)
    return found


def generalization(trainer: Trainer, group: Group) -> Row:
    """Both accuracies and losses, in evaluation mode, and the share of small weights."""
    train, _ = trainer.evaluate(group, on_training=True)
    test, _ = trainer.evaluate(group)
    params = trainer.states[group.name].params
    small = [np.abs(np.asarray(params[name])) < SMALL for name in KERNELS]
    flat = np.concatenate([v.reshape(*v.shape[:2], -1) for v in small], -1)
    return {
        "eval_train_loss": np.asarray(train.loss),
        "test_loss": np.asarray(test.loss),
        "train_accuracy": np.asarray(train.accuracy),
        "test_accuracy": np.asarray(test.accuracy),
        "small_weights": flat.mean(-1),
    }


REGULARIZATIONS = {
    "none": {},
    "dropout 0.2": {"dropout": 0.2},
    "dropout 0.5": {"dropout": 0.5},
    "L2 0.001": {"l2": 1e-3},
    "L1 0.0001": {"l1": 1e-4},
    "dropout 0.2, L2 0.001": {"dropout": 0.2, "l2": 1e-3},
}


def by_rate(*rates: float) -> Choices:
    return {(f"{rate:g}",): Choice(rate) for rate in rates}


def regularized(*rates: float) -> Choices:
    """Each regularization at each rate, so that each can be judged at its best one."""
    return {
        (name, f"{rate:g}"): Choice(rate, **numbers)
        for name, numbers in REGULARIZATIONS.items()
        for rate in rates
    }


def groups(activations: tuple[str, ...], choices: Choices, **options: Any) -> tuple[Group, ...]:
    """With and without batch normalization."""
    return tuple(
        Group(Architecture(activation, batch_norm, **options), choices)
        for activation in activations
        for batch_norm in (True, False)
    )


def curves(*rates: float) -> Experiment:
    sigmoid = groups(("sigmoid",), by_rate(*rates))
    return Experiment(sigmoid, BY_RATE, steps=50_000, records=50, measure=distribution)


EXPERIMENTS = {
    "rates": Experiment(
        groups(("sigmoid", "relu"), by_rate(*RATES)),
        BY_RATE,
        steps=2000,
        records=5,
        measure=accuracy,
    ),
    "depth": Experiment(
        groups(("sigmoid", "tanh"), by_rate(0.03, 0.3), depth=30),
        BY_RATE,
        steps=1000,
        records=10,
        measure=accuracy,
        gradients=True,
    ),
    # Near the best rate of either network in `rates`; and one that is low for the one without.
    "curves": curves(1.0, 3.0),
    "low_rate": curves(0.1),
    "regularize": Experiment(
        groups(("sigmoid",), regularized(0.3, 1.0, 3.0, 10.0), regularized=True)
        + groups(("relu",), regularized(0.03, 0.1, 0.3, 1.0), regularized=True),
        ("regularization", "rate"),
        steps=2000,
        records=5,
        measure=generalization,
        examples=1000,
    ),
}

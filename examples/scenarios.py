"""Networks that do worse in evaluation than in training, each for one known reason.

A scenario trains a small MLP on the digits, with the failure planted in its training
or in what is evaluated, and knows what may mend it: `SCENARIOS`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax
from data import Dataset
from gap_training import (
    MLP,
    Accuracy,
    Batches,
    Evaluation,
    cut,
    evaluate,
    evaluation_of,
    of_one_class,
    shuffled,
    train,
)

import bnjax

LONG = 1500  # steps where batches are small, or of one class
CLASS_SIZE, CLASS_RATE = 40, 0.02  # the test data have 43 to 46 images of a class
SLOW = 0.999  # weight of the old value in an average that takes thousands of steps
CORRUPT = -5  # the step whose batch is corrupt, from the end
AVERAGED_RATE = 0.1  # of Adam, constant and high, as for averages of weights
PAIR_RATE = 1e-3  # of Adam
SHOWN = 16  # training batches that the doctor sees


class Case(NamedTuple):
    """A trained network, the batches that it was trained on, and accuracies after remedies."""

    model: MLP
    variables: Any
    test: Evaluation
    batches: Batches
    remedies: Mapping[str, Callable[[], Accuracy]] = {}

    @property
    def train_batches(self) -> list[np.ndarray]:
        """The last ones, as training got them."""
        return list(self.batches.images[-SHOWN:])


class Scenario(NamedTuple):
    """`cause`: what the doctor should name first, "" where nothing is wrong."""

    cause: str
    build: Callable[[Dataset, int], Case]


def recalibrated(
    model: MLP, variables: Any, test: Evaluation, images: np.ndarray
) -> Callable[[], Accuracy]:
    """Statistics anew from unlabelled images."""

    def mended() -> Accuracy:
        batches = list(cut(images, np.zeros(len(images))).images)
        return test.accuracy(model, bnjax.recalibrate(model, variables, batches, call=evaluate))

    return mended


def retrained(
    seed: int, batches: Batches, test: Evaluation, model: MLP | None = None, **options: Any
) -> Callable[[], Accuracy]:
    """Another network, trained on other batches."""

    def mended() -> Accuracy:
        trained = train(seed, batches, model=model, **options)
        return test.accuracy(model or MLP(), trained.variables)

    return mended


def healthy(dataset: Dataset, seed: int) -> Case:
    batches = shuffled(dataset, seed)
    return Case(MLP(), train(seed, batches).variables, evaluation_of(dataset), batches)


def single_class(dataset: Dataset, seed: int) -> Case:
    """The network learns to tell the class from what is left of it in its own batch."""
    train_data, test_data = dataset[1:3], dataset[3:5]
    batches = of_one_class(*train_data, seed, LONG, CLASS_SIZE)
    variables = train(seed, batches, rate=CLASS_RATE).variables
    test = Evaluation(*test_data, of_one_class(*test_data, seed, dataset.classes, CLASS_SIZE))
    remedies = {
        "shuffle, train anew": retrained(seed, shuffled(dataset, seed), evaluation_of(dataset)),
        "recalibrate": recalibrated(MLP(), variables, test, dataset.train_images),
    }
    return Case(MLP(), variables, test, batches, remedies)


def lagging(dataset: Dataset, seed: int) -> Case:
    """Most of the average is still the initial 0 and 1."""
    batches, test, model = shuffled(dataset, seed), evaluation_of(dataset), MLP(SLOW)
    variables = train(seed, batches, model=model).variables
    remedies = {
        "recalibrate": recalibrated(model, variables, test, dataset.train_images),
        "momentum=0.9, train anew": retrained(seed, batches, test),
    }
    return Case(model, variables, test, batches, remedies)


def poisoned(dataset: Dataset, seed: int) -> Case:
    """One batch of raw pixels, 0 to 16 in place of 0 to 1.

    Training normalizes it away. One with a NaN would do nothing here, and leave NaN for
    good in the statistics of most other layers.
    """
    batches, test = shuffled(dataset, seed), evaluation_of(dataset)
    batches.images[CORRUPT] *= 16
    variables = train(seed, batches).variables
    remedies = {"recalibrate": recalibrated(MLP(), variables, test, dataset.train_images)}
    return Case(MLP(), variables, test, batches, remedies)


def weight_averaging(dataset: Dataset, seed: int) -> Case:
    """Averaged weights with the statistics of the last ones."""
    batches, test = shuffled(dataset, seed), evaluation_of(dataset)
    trained = train(seed, batches, optimizer=optax.adam, rate=AVERAGED_RATE)
    variables = trained.variables | {"params": trained.averaged}
    remedies = {"recalibrate": recalibrated(MLP(), variables, test, dataset.train_images)}
    return Case(MLP(), variables, test, batches, remedies)


def domain_shift(change: Callable[[np.random.Generator, np.ndarray], np.ndarray]) -> Any:
    """Evaluated on images that were changed in a way that training never saw."""

    def build(dataset: Dataset, seed: int) -> Case:
        batches, rng = shuffled(dataset, seed), np.random.default_rng(seed)
        variables = train(seed, batches).variables
        # Those for the remedy are other images, and nobody labelled them.
        other, images = (
            change(rng, part).astype(np.float32)
            for part in (dataset.train_images, dataset.test_images)
        )
        test = evaluation_of(dataset._replace(test_images=images))
        remedies = {"recalibrate on the new domain": recalibrated(MLP(), variables, test, other)}
        if change is inverted:
            as_in_training = functools.partial(evaluation_of(dataset).accuracy, MLP(), variables)
            remedies = {"invert back": as_in_training, **remedies}
        return Case(MLP(), variables, test, batches, remedies)

    return build


def noisy(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    return np.maximum(images, rng.uniform(0, 0.7, images.shape))


def dim(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    return 0.3 * images + 0.2


def inverted(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    return 1 - images


def batch_of_2(dataset: Dataset, seed: int) -> Case:
    """y is +1 or -1, whatever x: training sees which of two is larger, and no more."""
    batches, pairs = shuffled(dataset, seed, LONG, 2), evaluation_of(dataset, 2)
    options = {"optimizer": optax.adam, "rate": PAIR_RATE}
    variables = train(seed, batches, **options).variables
    larger = shuffled(dataset, seed)
    remedies = {
        "renorm, train anew": retrained(seed, batches, pairs, MLP(norm=_renorm()), **options),
        "batches of 64, train anew": retrained(seed, larger, evaluation_of(dataset)),
        "recalibrate": recalibrated(MLP(), variables, pairs, dataset.train_images),
    }
    return Case(MLP(), variables, pairs, batches, remedies)


@functools.cache
def _renorm() -> bnjax.Norm:
    """One object, for which training is compiled once."""
    return bnjax.renorm(momentum=bnjax.debiased(0.99))


SCENARIOS = {
    "healthy": Scenario("", healthy),
    "single-class": Scenario("not-shuffled", single_class),
    "lagging": Scenario("lagging", lagging),
    "poisoned": Scenario("poisoned", poisoned),
    "noisy-images": Scenario("domain-shift", domain_shift(noisy)),
    "dim-images": Scenario("domain-shift", domain_shift(dim)),
    "inverted-images": Scenario("domain-shift", domain_shift(inverted)),
    "batch-of-2": Scenario("small-batches", batch_of_2),
    "weight-averaging": Scenario("stale", weight_averaging),
}

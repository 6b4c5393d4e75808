"""What an experiment is, and what carries it out: states, records, compiled programs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import paper_training as paper
import training
from data import Dataset
from paper_network import UNITS, Architecture, Choice

WITH, WITHOUT = "with", "without"

Row = dict[str, Any]


class Group(NamedTuple):
    """Networks of one program: a `Choice` for each combination of labels."""

    architecture: Architecture
    choices: dict[tuple[str, ...], Choice]

    @property
    def name(self) -> str:
        return f"{self.architecture.activation}-{self.network}"

    @property
    def network(self) -> str:
        return WITH if self.architecture.batch_norm else WITHOUT


class Experiment(NamedTuple):
    """`labels` are the columns of the choices' labels; each chunk of steps ends with a record.

    `examples` is the number of training examples, all by default. `measure(trainer,
    group)` returns columns of arrays [seeds, choices].
    """

    groups: tuple[Group, ...]
    labels: tuple[str, ...]
    steps: int
    records: int
    measure: Callable[["Trainer", Group], Row]
    examples: int | None = None
    gradients: bool = False

    def scaled(self, scale: float) -> "Experiment":
        """Fewer steps, and records by the root of it."""
        records = max(2, round(self.records * min(1, scale) ** 0.5))
        chunk = max(1, round(self.steps * scale / records))
        return self._replace(steps=chunk * records, records=records)

    def decisive(self) -> Row:
        """What determines the results, by name, for settings.json."""
        networks = {
            group.name: {
                "layers": group.architecture.depth,
                **{", ".join(labels): list(choice) for labels, choice in group.choices.items()},
            }
            for group in self.groups
        }
        examples = self.examples or "all"
        return {
            "steps": self.steps,
            "records": self.records,
            "training examples": examples,
            "networks": networks,
        }


class Trainer:
    """States of all networks of an experiment, the rows so far, and what advances both."""

    def __init__(self, experiment: Experiment, dataset: Dataset, seeds: int) -> None:
        self.experiment, self.seeds = experiment, seeds
        self.train_data = jax.device_put((dataset.train_images, dataset.train_labels))
        self.test_data = jax.device_put((dataset.test_images, dataset.test_labels))
        self.keys = paper.keys_of(seeds)
        features = dataset.train_images.shape[1]
        self.states: dict[str, Any] = {
            group.name: paper.create_all(
                self.keys,
                architecture=group.architecture,
                choices=len(group.choices),
                features=features,
                classes=dataset.classes,
            )
            for group in experiment.groups
        }
        # Of the record before, by which the drift is told.
        self.medians = {
            group.name: np.full((seeds, len(group.choices), UNITS), np.nan, np.float32)
            for group in experiment.groups
        }
        self.log: dict[str, Any] = {"step": 0, "metrics": [], "gradients": []}

    def advance(self) -> None:
        """Train all networks up to the next record, and measure them."""
        start, chunk = self.log["step"], self.experiment.steps // self.experiment.records
        if start == 0:
            self._record_gradients(0)
        for group in self.experiment.groups:
            loss = self._train(group, start, chunk)
            columns = {"train_loss": loss, **self.experiment.measure(self, group)}
            self.log["metrics"] += self._rows(group, start + chunk, columns)
        self.log["step"] = start + chunk
        if self.log["step"] == self.experiment.steps:
            self._record_gradients(self.log["step"])

    def evaluate(self, group: Group, *, on_training: bool = False, inputs: bool = False) -> Any:
        data = self.train_data if on_training else self.test_data
        return self.call(
            group,
            paper.evaluate,
            *data,
            examples=self.experiment.examples if on_training else None,
            inputs=inputs,
        )

    def call(self, group: Group, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """A compiled function of all networks of the group."""
        args = (self.states[group.name], self.keys, *args)
        return program(function, args, group.architecture, static)(*args)

    def _train(self, group: Group, start: int, chunk: int) -> np.ndarray:
        # Positions are counted in Python's integers, which do not overflow.
        examples = self.experiment.examples
        count = examples or len(self.train_data[1])
        epoch, offset = divmod(start * paper.BATCH_SIZE, count)
        choices = jax.tree.map(lambda *v: jnp.array(v, jnp.float32), *group.choices.values())
        args = self.states[group.name], choices, self.keys, *self.train_data, start, epoch, offset
        static = {"steps": chunk, "examples": examples}
        run = program(paper.train_chunk, args, group.architecture, static, donate=True)
        self.states[group.name], loss = run(*args)
        return np.asarray(loss)

    def _rows(self, group: Group, step: int, columns: Row) -> list[Row]:
        return [
            {
                "step": step,
                "activation": group.architecture.activation,
                "network": group.network,
                **dict(zip(self.experiment.labels, labels, strict=True)),
                "seed": seed,
                **{name: rounded(column[seed, i]) for name, column in columns.items()},
            }
            for i, labels in enumerate(group.choices)
            for seed in range(self.seeds)
        ]

    def _record_gradients(self, step: int) -> None:
        if not self.experiment.gradients:
            return
        for group in self.experiment.groups:
            norms = np.asarray(self.call(group, paper.gradient_norms, *self.train_data))
            layers = {f"layer {i + 1}": norms[..., i] for i in range(norms.shape[-1])}
            self.log["gradients"] += self._rows(group, step, layers)


def program(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    architecture: Architecture,
    static: dict[str, Any],
    donate: bool = False,
) -> Callable[..., Any]:
    """Compiled once for all arguments of these shapes."""
    shapes = tuple((jnp.shape(v), str(jnp.result_type(v))) for v in jax.tree.leaves(args))
    key = function, architecture, tuple(static.items()), shapes
    if key not in PROGRAMS:
        bound = functools.partial(function, architecture=architecture, **static)
        PROGRAMS[key] = training.compiled(bound, args, donate=donate)
    return PROGRAMS[key]


PROGRAMS: dict[Any, Callable[..., Any]] = {}


def rounded(value: Any) -> float:
    """Four digits, which is what the seeds leave of any of these numbers, and more."""
    return float(f"{float(value):.4g}")

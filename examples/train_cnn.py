"""Train a small CNN with and without batch normalization, side by side; then fold it away.

Stages of three 3 x 3 convolutions, each stage at half the size of the one
before, SGD with momentum, weight decay on all but scale and bias of the
normalizations. Both networks start from the same weights and see the same
batches. At the end, batch normalization is folded into the convolutions, and
the folded network is compared with the unfolded one. Results go to a run
folder (runs/cnn-001 and so on): metrics.csv, curves.png, folded.csv and
checkpoints. A run that was stopped or killed at any moment continues with
--resume, to the same bits.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cnn
import jax
import numpy as np
import options
import report
import run_folder
import script
from data import Dataset
from flax import nnx
from options import SettingsError
from rich.console import Console
from training import Trainer, compiled

from bnjax import fold

FOLDED = "folded.csv"
ROUNDS = 20  # of the comparison of times


@dataclasses.dataclass(frozen=True)
class Settings(options.Settings):
    channels: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage of three convolutions."""
    residual: bool = False
    """Add shortcuts around each stage's last two convolutions, whose last scale starts at zero."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters but scale and bias of the normalizations."""
    steps: int = 600


def check(settings: Settings) -> None:
    options.check_sizes("--channels", settings.channels)
    if not 0 <= settings.weight_decay < math.inf:
        raise SettingsError(
            f"--weight-decay: must be at least 0 and finite, got {settings.weight_decay}. "
            "Write for example --weight-decay 1e-4."
        )


def check_images(settings: Settings, dataset: Dataset) -> None:
    if dataset.shape is None:
        raise SettingsError(
            f"--data {settings.data}: its features have no image shape, which convolutions need. "
            "Use digits, mnist or cifar10, or train_mlp.py."
        )


def side_by_side(
    programs: Sequence[Callable[[jax.Array], jax.Array]], images: jax.Array
) -> np.ndarray:
    """The time of the first program divided by that of the second, in each of many rounds."""
    seconds = []
    for _ in range(ROUNDS + 1):
        marks = [time.perf_counter()]
        for program in programs:
            jax.block_until_ready(program(images))
            marks.append(time.perf_counter())
        seconds.append(np.diff(marks))
    first, second = np.transpose(seconds[1:])  # less the warm-up
    return first / second


def compare_folded(trainer: Trainer, dataset: Dataset) -> dict[str, Any]:
    """The row of folded.csv: the trained network folded, and as it is."""
    images, labels = trainer.test_data
    model = cnn.in_evaluation(trainer.states["bn"])
    folded = fold.nnx(model, images[:1])
    if folded.kept:
        raise RuntimeError(f"batch normalization was not folded away: {folded.kept}")
    some = images[: cnn.CHUNK]
    answers, programs = [], []
    for network in (model, folded.model):
        graph, variables = nnx.split(network)
        of_all = partial(_call, graph, cnn.model_logits)
        answers.append(np.asarray(compiled(of_all, (variables, images))(variables, images)))
        of_some = compiled(partial(_call, graph, cnn.CNN.__call__), (variables, some))
        programs.append(partial(of_some, variables))
    ratios = np.percentile(side_by_side(programs, some), [50, 25, 75])
    right = [int((logits.argmax(-1) == labels).sum()) for logits in answers]
    return {
        "data": dataset.name,
        "training_images": len(dataset.train_labels),
        "accuracy": right[0] / len(labels),
        "folded_accuracy": right[1] / len(labels),
        "largest_logit": float(np.abs(answers[0]).max()),
        "difference": float(np.abs(answers[1] - answers[0]).max()),
        **dict(zip(("time_ratio", "time_low", "time_high"), map(float, ratios), strict=True)),
    }


def _call(
    graph: Any, function: Callable[[Any, jax.Array], jax.Array], variables: Any, images: jax.Array
) -> jax.Array:
    return function(nnx.merge(graph, variables), images)


def conclude(
    trainer: Trainer, dataset: Dataset, folder: run_folder.RunFolder, console: Console
) -> None:
    if not trainer.settings.bn:
        return
    row = compare_folded(trainer, dataset)
    folder.write_table(FOLDED, [row])
    console.print(report.folded_table(row))
    print(f"Folded: {folder.path / FOLDED}")


def _kind(settings: Any) -> str:
    return "residual CNN" if settings.residual else "CNN"


SCRIPT = script.Script(
    name="cnn",
    file=Path(__file__),
    description=__doc__,
    settings=Settings,
    networks=cnn.networks,
    check=check,
    check_data=check_images,
    title=lambda s: f"{_kind(s)} {'-'.join(map(str, s.channels))}",
    network_words=lambda s: f"{_kind(s)} of {' '.join(map(str, s.channels))} channels",
    optimizer_words=lambda s: (
        f"SGD with momentum 0.9, learning rate {s.learning_rate:g}, weight decay {s.weight_decay:g}"
    ),
    conclude=conclude,
)
main = partial(script.main, SCRIPT)

if __name__ == "__main__":
    sys.exit(main())

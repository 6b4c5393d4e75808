"""Settings that the training scripts share, and the checks of their values."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import data
import tyro


class SettingsError(ValueError):
    """An option has a value that cannot work; the message names it and the fix."""


@dataclasses.dataclass(frozen=True)
class Settings:
    data: str = "digits"
    """digits (comes with scikit-learn), mnist or cifar10 (with --data-dir), or openml:NAME
    (downloads)."""
    data_dir: Path | None = None
    """Folder of MNIST's four gzipped IDX files, or of the files of CIFAR-10's binary version; for
    openml, the folder that caches downloads."""
    learning_rate: float = 0.1
    """Step size of SGD."""
    batch_size: int = 64
    """Examples in each step."""
    steps: int = 1000
    """Training steps of each network."""
    bn: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """With --no-bn, only the network without batch normalization is trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the layers compute in; parameters and running statistics are always float32."""
    seed: int = 0
    """Decides the initial weights and the order of the examples."""
    eval_every: int = 100
    """Steps between evaluations; a checkpoint is written at each, and they run as one call."""
    target: float = 0.97
    """Test accuracy for the column "steps to" of the table, as a fraction."""
    run_dir: Path | None = None
    """Run folder. Default: the next free runs/NAME-NNN, with --resume the newest of them."""
    resume: bool = False
    """Continue the run in the run folder, with the same settings."""

    def not_results(self) -> set[str]:
        """Names of the settings that choose where and how a run is carried out.

        They leave its results alone. Of the data, the contents count, not their place.
        """
        return {"data_dir", "run_dir", "resume", "target"}


def check_names(option: str, chosen: Sequence[str], known: Iterable[str]) -> None:
    """Refuse names that are unknown, given twice, or none."""
    unknown = sorted(set(chosen) - set(known))
    if unknown or not chosen:
        raise SettingsError(
            f"{option}: needs one or more of {', '.join(known)}, got "
            f"{' '.join(unknown) or 'nothing'}."
        )
    if len(set(chosen)) < len(chosen):
        raise SettingsError(f"{option}: needs each only once, got {' '.join(chosen)}.")


def check(settings: Settings) -> None:
    """Refuse values that cannot work, before anything is read or written."""
    at_least = {"--batch-size": 1, "--steps": 1, "--eval-every": 1, "--seed": 0}
    for option, low in at_least.items():
        value = getattr(settings, option[2:].replace("-", "_"))
        if not low <= value < 2**31:
            raise SettingsError(
                f"{option}: must be at least {low} and below 2**31, got {value}. Change {option}."
            )
    if not 0 < settings.learning_rate < math.inf:
        raise SettingsError(
            f"--learning-rate: must be positive and finite, got {settings.learning_rate}. "
            "Write for example --learning-rate 0.1."
        )
    if not 0 < settings.target <= 1:
        raise SettingsError(
            f"--target: must be a fraction above 0 and at most 1, got {settings.target}. "
            "Write for example --target 0.97."
        )
    if settings.bn and settings.batch_size < 2:
        raise SettingsError(
            "--batch-size: batch normalization needs at least 2 examples, got 1. "
            "Raise --batch-size, or train without it (--no-bn)."
        )


def check_sizes(option: str, sizes: tuple[int, ...]) -> None:
    """Refuse sizes of layers that are none."""
    if not sizes or min(sizes) < 1:
        got = " ".join(map(str, sizes)) or "nothing"
        raise SettingsError(
            f"{option}: needs one or more sizes of at least 1, got {got}. "
            f"Write for example {option} 100 100."
        )


def check_batch(settings: Settings, dataset: data.Dataset) -> None:
    count = len(dataset.train_labels)
    if settings.batch_size > count:
        raise SettingsError(
            f"--batch-size: {settings.batch_size} is more than the {count} training examples of "
            f"{dataset.name}. Use at most {count}."
        )


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def command_line(settings: Settings) -> list[str]:
    """Arguments that say the same: all settings that differ from their defaults."""
    arguments = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            arguments += [flag(field.name) if value else flag(f"no_{field.name}")]
        else:
            values = value if isinstance(value, tuple) else [value]
            arguments += [flag(field.name), *map(str, values)]
    return arguments


def decisive(settings: Settings, dataset: data.Dataset) -> dict[str, Any]:
    """Option name -> value, for all that determines the results."""
    left_out = settings.not_results()
    found = {
        flag(name): value
        for name, value in dataclasses.asdict(settings).items()
        if name not in left_out
    }
    # A command line has --no-bn or nothing.
    found["--no-bn"] = not found.pop("--bn")
    found["contents of the data (SHA-256)"] = dataset.fingerprint()
    return found

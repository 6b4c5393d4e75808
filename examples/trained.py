"""A network of a finished or stopped run, from its run folder."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import cnn
import data
import jax
import jax.numpy as jnp
import run_folder
import script
import train_cnn
import train_mlp
import train_multihost
from options import SettingsError

SCRIPTS = (train_mlp.SCRIPT, train_cnn.SCRIPT, train_multihost.SCRIPT)


class Trained(NamedTuple):
    """A network by the last checkpoint of its run."""

    state: Any  # whose variables are on the CPU
    dataset: data.Dataset
    dtype: Any  # of its layers
    step: int


def newest() -> Path:
    """The run folder whose metrics were written last."""
    found = [
        path for s in SCRIPTS for path in run_folder.RUNS.glob(f"{s.name}-*/{run_folder.METRICS}")
    ]
    if not found:
        raise SettingsError(
            f"--run-dir: there is no run in {run_folder.RUNS}/ to export. Train a network first "
            "(make train), or name its run folder with --run-dir."
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def settings_of(path: Path, data_dir: Path | None) -> tuple[script.Script, Any]:
    """The script that made a run, and the settings that it was given."""
    file = path / run_folder.SETTINGS
    try:
        stored = dict(json.loads(file.read_bytes())["settings"])
    except OSError as error:
        raise SettingsError(
            f"--run-dir {path}: is not a run folder ({file}: {error.strerror or error}). "
            "Name one that a training script has made."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{file}: is damaged ({type(error).__name__}: {error}). Name another --run-dir."
        ) from None
    values = {
        name[2:].replace("-", "_"): tuple(value) if isinstance(value, list) else value
        for name, value in stored.items()
        if name.startswith("--")
    }
    values["bn"] = not values.pop("no_bn", False)
    for example in SCRIPTS:
        kind: Any = example.settings
        if values.keys() <= {field.name for field in dataclasses.fields(kind)}:
            given = kind(**values, run_dir=path, resume=True, data_dir=data_dir)
            return example, given
    makers = ", ".join(example.file.name for example in SCRIPTS)
    raise SettingsError(
        f"--run-dir {path}: must be a run of {makers}, got one of another script. Name another."
    )


def restore(path: Path, network: str, data_dir: Path | None) -> Trained:
    """The network of that name, bn or no-bn.

    Raises:
      SettingsError, DataError, RunFolderError: with a message for the user.
    """
    example, given = settings_of(path, data_dir)
    if given.data in ("mnist", "cifar10") and given.data_dir is None:
        raise SettingsError(
            f"--data-dir: is needed, as the network was trained on {given.data}, whose images "
            "tell its input. Add the folder that the training was given."
        )
    dataset = script.load(example, given)
    networks = example.networks(given, dataset)
    if network not in networks:
        raise SettingsError(
            f"--network {network}: {path} has only {' and '.join(networks)}. "
            f"Add --network {next(iter(networks))}."
        )
    with contextlib.closing(script.open_run(example, given, dataset)) as folder:
        found = folder.restore({name: network.state for name, network in networks.items()})
    if found is None:
        raise SettingsError(
            f"--run-dir {path}: has no checkpoint yet. Continue the training (--resume), at least "
            "to its first evaluation."
        )
    states, log = found
    state = on_cpu(states[network])
    return Trained(state, dataset, jnp.dtype(given.dtype), log["step"])


def on_cpu(state: Any) -> Any:
    """With its network's variables there, wherever the training left them."""
    names = ["variables"] if isinstance(state, cnn.State) else ["params", "batch_stats"]
    cpu = first_cpu()
    return state.replace(**{name: jax.device_put(getattr(state, name), cpu) for name in names})


def first_cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise SettingsError(
            f"JAX_PLATFORMS: must have cpu among them, where the network is put ({error}). "
            "Set it to cuda,cpu or the like."
        ) from None

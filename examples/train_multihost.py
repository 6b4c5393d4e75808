"""Train one network on all devices of all processes, to the same numbers on any number of them.

Each step's batch is split over the devices, and batch normalization, loss and
gradients are those of the whole batch; the last batch of an epoch has what is left,
however few examples that are. So --batch-size is that of the whole, and a run may
continue (--resume) on other devices, in other processes or in another --style.

On this machine, for a trial: 2 processes with 4 CPU devices each.
    python examples/train_multihost.py --local-processes 2 --local-devices 4

On a TPU pod, the same command on each host; jax finds the others.
    python examples/train_multihost.py --cluster

On a GPU cluster with Slurm, a process for each GPU.
    srun --ntasks-per-node=8 --gpus-per-node=8 python examples/train_multihost.py --cluster

By hand: I is 0 in the first process, which listens at HOST:PORT, and 1 in the second.
    python examples/train_multihost.py --coordinator HOST:PORT --num-processes 2 --process-id I

At the start, processes wait up to five minutes for each other. The run folder must be
on a file system that all of them share. When one of them is lost, the others end
within --heartbeat-timeout seconds and a few more, with a report of jax's;
--local-processes ends them in seconds, and says which one was lost. Start all
processes again with --resume: only the steps since the last evaluation are lost.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import cnn
import jax
import launcher
import options
import parallel
import processes
import run_folder
import script
import train_cnn
import train_mlp
import tyro
from data import Dataset
from options import SettingsError
from training import Network, Trainer

SCRIPTS = {"mlp": train_mlp.SCRIPT, "cnn": train_cnn.SCRIPT}
NETWORKS = {"mlp": train_mlp.networks, "cnn": cnn.networks}
ONLY = {"mlp": ("hidden", "activation"), "cnn": ("channels", "residual", "weight_decay")}
PLACES = (
    "style",
    "local_processes",
    "local_devices",
    "cluster",
    "coordinator",
    "num_processes",
    "process_id",
    "heartbeat_timeout",
)


@dataclasses.dataclass(frozen=True)
class Settings(train_cnn.Settings, train_mlp.Settings):
    network: Literal["mlp", "cnn"] = "mlp"
    """mlp has --hidden and --activation; cnn has --channels, --residual and --weight-decay."""
    style: Literal["jit", "pmap", "shard_map"] = "jit"
    """How the devices are programmed. The numbers are the same."""
    batch_size: int = 64
    """Examples in each step, over all devices."""
    steps: int = 1000
    """Training steps."""
    eval_every: int = 100
    """Steps between evaluations; a checkpoint is written at each."""
    bn: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = True
    """With --no-bn, the network has no batch normalization."""
    local_processes: int | None = None
    """Start so many processes on this machine, on its CPU, for a trial."""
    local_devices: int | None = None
    """CPU devices of each process, for a trial. Default: those that are there; with
    --local-processes, 1."""
    cluster: bool = False
    """Join the processes that a cluster has started: TPU pods, Slurm, Open MPI, Kubernetes."""
    coordinator: str | None = None
    """Join processes started by hand: HOST:PORT of process 0, where PORT is free."""
    num_processes: int | None = None
    """With --coordinator: how many there are."""
    process_id: int | None = None
    """With --coordinator: which one this is, from 0."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process is lost, and the others end."""

    def not_results(self) -> set[str]:
        others = [names for network, names in ONLY.items() if network != self.network]
        return super().not_results().union(PLACES, *others)


def check(settings: Settings) -> None:
    for field in dataclasses.fields(settings):
        network = next((n for n, names in ONLY.items() if field.name in names), settings.network)
        if network != settings.network and getattr(settings, field.name) != field.default:
            raise SettingsError(
                f"{options.flag(field.name)}: is a setting of --network {network}, got --network "
                f"{settings.network}. Leave it out, or add --network {network}."
            )
    SCRIPTS[settings.network].check(settings)
    for name in ("local_processes", "local_devices", "num_processes", "heartbeat_timeout"):
        value = getattr(settings, name)
        if value is not None and not 1 <= value < 2**31:
            raise SettingsError(
                f"{options.flag(name)}: must be at least 1 and below 2**31, got {value}. "
                f"Change {options.flag(name)}."
            )
    _check_joining(settings)


def _check_joining(settings: Settings) -> None:
    ways = ("local_processes", "cluster", "coordinator")
    given = [options.flag(name) for name in ways if getattr(settings, name)]
    if len(given) > 1:
        raise SettingsError(
            f"{given[0]}: does not go with {' and '.join(given[1:])}, as each is a way to find the "
            "processes of the run. Choose one."
        )
    by_hand = {name: getattr(settings, name) for name in ("num_processes", "process_id")}
    missing = [options.flag(name) for name, value in by_hand.items() if value is None]
    if settings.coordinator is None:
        if len(missing) < 2:
            name = next(options.flag(n) for n, value in by_hand.items() if value is not None)
            raise SettingsError(
                f"{name}: needs --coordinator HOST:PORT, the address of process 0. Add it, or "
                "leave all three out to train in one process."
            )
        if not given:
            _check_alone()
        return
    host, _, port = settings.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SettingsError(
            f"--coordinator: must be HOST:PORT, got {settings.coordinator}. Write for example "
            "--coordinator 10.0.0.1:8476."
        )
    if missing:
        raise SettingsError(
            f"--coordinator: needs {' and '.join(missing)} too. Write for example --num-processes "
            "2 --process-id 0 in the first process, and --process-id 1 in the second."
        )
    _check_process_id(settings)


def _check_alone() -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        count = os.environ.get(name, "1")
        if count != "1":
            raise SettingsError(
                f"--cluster: is missing, as this is one of {count} processes ({name}), each of "
                "which would train for itself. Add --cluster."
            )


def _check_process_id(settings: Settings) -> None:
    assert settings.num_processes is not None and settings.process_id is not None
    if not 0 <= settings.process_id < settings.num_processes:
        raise SettingsError(
            f"--process-id: must be from 0 to {settings.num_processes - 1}, as --num-processes is "
            f"{settings.num_processes}, got {settings.process_id}. Change one of them."
        )


def begin(settings: Settings, argv: Sequence[str]) -> int | None:
    """Start the processes and wait for them, or be one of them."""
    if settings.local_processes is not None:
        return start(settings, argv)
    if settings.local_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", settings.local_devices)
    if settings.cluster or settings.coordinator is not None:
        try:
            processes.join(
                settings.coordinator,
                settings.num_processes,
                settings.process_id,
                heartbeat_timeout=settings.heartbeat_timeout,
            )
        except (ValueError, RuntimeError) as error:
            where = "--cluster" if settings.cluster else f"--coordinator {settings.coordinator}"
            reason = str(error).rstrip(".")
            raise SettingsError(
                f"{where}: jax found no processes to join ({reason}). Check how this was started, "
                "or leave it out to train in one process."
            ) from None
    return None


def start(settings: Settings, argv: Sequence[str]) -> int:
    """Start processes by hand, as it were, after finding that their settings can work."""
    dataset = script.load(SCRIPT, settings)
    folder = script.run_path(SCRIPT, settings)
    if folder.is_dir():
        decisive = options.decisive(settings, dataset)
        run_folder.check(folder, settings=decisive, made_with={}, resume=settings.resume)
    address = launcher.free_address()
    commands = []
    for index in range(settings.local_processes or 0):
        own = dataclasses.replace(
            settings,
            local_processes=None,
            local_devices=settings.local_devices or 1,
            coordinator=address,
            num_processes=settings.local_processes,
            process_id=index,
            run_dir=folder,
        )
        commands.append([sys.executable, str(SCRIPT.file), *options.command_line(own)])
    # Otherwise, jax lets the whole network in.
    status = launcher.Launcher().run(commands, {"JAX_COORDINATOR_BIND_ADDRESS": address})
    if status not in (0, 2):
        command = script.resume_command(SCRIPT, argv, folder)
        words = "Stopped. To continue" if status > 128 else "To continue"
        print(f"{words}, with any number of processes:\n  {command}", file=sys.stderr)
    return status


def check_data(settings: Settings, dataset: Dataset) -> None:
    SCRIPTS[settings.network].check_data(settings, dataset)


def networks(settings: Settings, dataset: Dataset) -> dict[str, Network]:
    name = "bn" if settings.bn else "no-bn"
    axis_name = parallel.STYLES[settings.style].axis_name
    return {name: NETWORKS[settings.network](settings, dataset, axis_name)[name]}


def trainer(settings: Settings, dataset: Dataset, networks: dict[str, Network]) -> Trainer:
    return parallel.Trainer(settings, dataset, networks, style=settings.style)


def made_with(settings: Settings) -> dict[str, str]:
    return {
        **run_folder.made_with(),
        "devices": str(jax.device_count()),
        "processes": str(processes.count()),
        "style": settings.style,
    }


def device_words(settings: Settings) -> str:
    device, count = jax.devices()[0], processes.count()
    return (
        f"Devices: {jax.device_count()} {device.platform} ({device.device_kind}) of {count} "
        f"process{'es' if count > 1 else ''}, in the style of {settings.style}, {settings.dtype}"
    )


def stopped(command: str) -> None:
    if launcher.launched():
        return  # it says how to continue
    where = ", in each process" if processes.count() > 1 else ""
    print(f"Stopped. To continue{where}:\n  {command}", file=sys.stderr)


def failed_elsewhere(message: str) -> None:
    if not launcher.launched():
        print(f"Error: {message}", file=sys.stderr)


SCRIPT = script.Script(
    name="multihost",
    file=Path(__file__),
    description=__doc__,
    settings=Settings,
    networks=networks,
    check=check,
    check_data=check_data,
    begin=begin,
    trainer=trainer,
    side_by_side=False,
    made_with=made_with,
    device_words=device_words,
    title=lambda s: SCRIPTS[s.network].title(s),
    network_words=lambda s: SCRIPTS[s.network].network_words(s),
    optimizer_words=lambda s: SCRIPTS[s.network].optimizer_words(s),
    stopped=stopped,
    failed_elsewhere=failed_elsewhere,
)


def main(argv: Sequence[str] | None = None) -> int:
    launcher.end_with_launcher()
    with processes.leaving():
        return script.main(SCRIPT, argv)


if __name__ == "__main__":
    sys.exit(main())

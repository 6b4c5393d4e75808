"""One device against several: largest differences of outputs, gradients and state.

    python benchmarks/devices.py

Writes results/devices.csv: every way of running the layer (ways.py) on 2, 4 and 8 devices
of one process and on 2 processes of 2 devices each, which this script starts, against one
device. Differences are normwise, beside the largest entry. The devices are those of the CPU.
"""

import argparse
import functools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hlo
import jax
import numpy as np
import results
import ways

DEVICES = (2, 4, 8)
PROCESSES, DEVICES_OF_PROCESS = 2, 2
LAYOUTS = [f"{n} devices" for n in DEVICES]
LAYOUTS.append(f"{PROCESSES} processes x {DEVICES_OF_PROCESS} devices")
MASKS = {"no mask": False, "uneven mask": True}
QUANTITIES = ("outputs", "gradients", "state")
PATIENCE = 600  # seconds; only a hang takes longer

Copies = dict[str, list[str]]


class Measured(NamedTuple):
    differences: dict[str, float]  # of each quantity
    copies: Copies  # of the new state
    collectives: list[hlo.Collective]  # none where jax does not show the program


def measure(way: ways.Way, devices: Sequence[Any], masked: bool) -> Measured:
    """The results on the devices of this process, against those of one device."""
    grid = way.grid(len(devices)) if masked else None
    program = way.program(ways.problem(grid), devices)
    found, text = program.run()
    expected = ways.on_one_device(grid)
    differ = differences(found, expected, program.of_process)
    return Measured(differ, copies(found.state), hlo.collectives(text) if text else [])


def differences(found: ways.Results, expected: Any, of_process: bool = False) -> dict[str, float]:
    """`expected`: y, state, and the gradients of the parameters and of x, of all devices."""
    y, state, params, x = expected
    rows = functools.partial(_difference, own=of_process)
    vectors = functools.partial(_difference, own=False)
    values = {
        "outputs": [rows(found.y, y)],
        "gradients": [rows(found.x, x), *map(vectors, found.params, params)],
        "state": list(map(vectors, found.state, state)),
    }
    return {name: float(np.max(errors)) for name, errors in values.items()}


def _difference(found: jax.Array, expected: Any, own: bool) -> float:
    """NaN where an entry is; a vector may have come from each device."""
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max() or 1.0
    if expected.ndim > 1:
        expected = (ways.own(expected) if own else expected).reshape(found.shape)
    expected = np.broadcast_to(expected, found.shape)
    shards = found.addressable_shards
    errors = [np.asarray(shard.data, np.float64) - expected[shard.index] for shard in shards]
    return float(np.max([np.abs(error).max() for error in errors]) / scale)


def copies(state: Any) -> Copies:
    """The distinct bits that devices of this process hold of each part of each vector."""
    found = dict[str, set[str]]()
    for name, vector in state._asdict().items():
        for shard in vector.addressable_shards:
            key = f"{name} from channel {shard.index[-1].start or 0}"
            rows = np.asarray(shard.data).reshape(-1, shard.data.shape[-1])
            found.setdefault(key, set()).update(row.tobytes().hex() for row in rows)
    return {key: sorted(bits) for key, bits in found.items()}


def in_processes(masks: Sequence[str] = tuple(MASKS)) -> list[dict[str, Measured]]:
    """What each of several real processes on this machine measured, by `key`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.json" for i in range(PROCESSES)]
        address = f"127.0.0.1:{_free_port()}"
        script = [sys.executable, __file__, "--address", address, "--masks", *masks]
        run_all([[*script, "--process", str(i), "--file", str(f)] for i, f in enumerate(files)])
        loaded = [json.loads(file.read_text()) for file in files]
    return [{name: _measured(*value) for name, value in process.items()} for process in loaded]


def _measured(differ: Any, copies: Any, collectives: Any) -> Measured:
    return Measured(differ, copies, [hlo.Collective(*c) for c in collectives])


def key(way: str, mask: str) -> str:
    return f"{way}; {mask}"


def run_all(commands: Sequence[Sequence[str]], patience: float = PATIENCE) -> None:
    """Runs the commands at the same time; when one fails or all take too long, ends the others."""
    with tempfile.TemporaryFile() as output:
        env = _environment(os.environ)
        started = [
            subprocess.Popen(c, env=env, stdout=output, stderr=subprocess.STDOUT) for c in commands
        ]
        try:
            problem = _wait(started, time.monotonic() + patience)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if problem:
            output.seek(0)
            said = output.read().decode(errors="replace")[-4000:]
            raise RuntimeError(f"{problem} (limit {patience:g} s). The processes said:\n{said}")


def _wait(started: Sequence[subprocess.Popen[bytes]], deadline: float) -> str:
    """What went wrong, or nothing."""
    while time.monotonic() < deadline:
        states = [process.poll() for process in started]
        for i, state in enumerate(states):
            if state:
                return f"Process {i} of {len(started)} ended with status {state}"
        if None not in states:
            return ""
        time.sleep(0.05)
    return f"The {len(started)} processes did not end in time"


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Without a number of devices, which each process sets for itself.

    Stripped, since XLA takes flags that begin with a space for the name of a file.
    """
    flags = variables.get("XLA_FLAGS", "")
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", flags).strip()
    folder = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (folder, variables.get("PYTHONPATH"))))
    return {**variables, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def one_process(address: str, process: int, masks: Sequence[str], file: Path) -> None:
    """What each of the processes does."""
    jax.config.update("jax_num_cpu_devices", DEVICES_OF_PROCESS)
    jax.distributed.initialize(address, PROCESSES, process, initialization_timeout=60)
    measured = {
        key(name, mask): measure(way, jax.devices(), MASKS[mask])
        for name, way in ways.WAYS.items()
        for mask in masks
    }
    file.write_text(json.dumps(measured))


def rows() -> list[dict[str, Any]]:
    """Of devices.csv. The difference of several processes is the largest of theirs."""
    processes = in_processes()
    table = []
    for name, way in ways.WAYS.items():
        for mask, masked in MASKS.items():
            layouts = [[measure(way, jax.devices()[:n], masked)] for n in DEVICES]
            layouts.append([process[key(name, mask)] for process in processes])
            for quantity in QUANTITIES:
                cells = [np.max([m.differences[quantity] for m in layout]) for layout in layouts]
                texts = (f"{cell:.1e}" for cell in cells)
                row = {"way": name, "mask": mask, "quantity": quantity}
                table.append(row | dict(zip(LAYOUTS, texts, strict=True)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own = parser.add_argument_group("for the processes that this script starts")
    own.add_argument("--address")
    own.add_argument("--process", type=int)
    own.add_argument("--masks", nargs="+", choices=MASKS)
    own.add_argument("--file", type=Path)
    arguments = parser.parse_args()
    if arguments.file:
        one_process(arguments.address, arguments.process, arguments.masks, arguments.file)
        return
    os.environ.update(_environment(os.environ))
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    results.write("devices", rows())


if __name__ == "__main__":
    main()

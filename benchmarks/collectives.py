"""Collectives of one layer, counted in compiled programs: how many, and how many bytes.

    python benchmarks/collectives.py

Writes results/allreduces.csv, for every way of running the layer (ways.py) on eight devices
of the CPU, and results/collectives.csv, for TPU topologies of 4 to 256 devices. These are
compiled for, not run on: no TPU is needed, but libtpu is (`pip install libtpu`). Without it
results/collectives.csv stays as it is.

What runs in any case is counted: not the further passes over the data, which are made
where the variance would not be accurate, and which cost an all-reduce each.
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import hlo
import jax
import jax.numpy as jnp
import results
import ways

from bnjax import BNParams, BNState

CPU_DEVICES = 8
ROWS_PER_DEVICE = 16
TOPOLOGIES = {4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
CHANNELS = (64, 512, 2048)
TPU_WAYS = ("jit, auto", "shard_map, grad inside", "shard_map without vma, grad inside")


class Cost(NamedTuple):
    """Of a training step of one layer, on each device."""

    forward: int  # all-reduces
    forward_bytes: int
    backward: int
    backward_bytes: int
    condition_bytes: int  # all-reduced to decide on another pass over the data


def shapes(rows: int, channels: int, masked: bool) -> ways.Problem:
    """A problem to compile for, without data."""
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32)
    count = jax.ShapeDtypeStruct((channels,), jnp.int32)
    x = jax.ShapeDtypeStruct((rows, channels), jnp.float32)
    mask = jax.ShapeDtypeStruct((rows, channels), jnp.bool_) if masked else None
    return ways.Problem(BNParams(vector, vector), BNState(vector, vector, count), x, x, mask)


def cost(way: ways.Way, problem: ways.Problem, devices: Sequence[Any]) -> Cost:
    """Backward is what a step has beyond the program of outputs and state alone."""
    forward, step = (
        hlo.collectives(way.program(problem, devices, only).compiled().as_text())
        for only in (True, False)
    )
    others = {c.kind for c in step if c.place != "branch"} - {"all-reduce"}
    if others:
        raise RuntimeError(f"only all-reduces were expected, got {sorted(others)}")
    count, size = _always(forward)
    count_of_step, size_of_step = _always(step)
    condition = sum(c.bytes for c in step if c.place == "condition")
    return Cost(count, size, count_of_step - count, size_of_step - size, condition)


def _always(found: Sequence[hlo.Collective]) -> tuple[int, int]:
    sizes = [c.bytes for c in found if c.place == "always"]
    return len(sizes), sum(sizes)


def row(
    name: str, masked: bool, rows: int, channels: int, devices: Sequence[Any]
) -> dict[str, Any]:
    """Of a table: the cost of one way of running the layer, for so many rows in all."""
    found = cost(ways.WAYS[name], shapes(rows, channels, masked), devices)
    mask = "mask" if masked else "no mask"
    where = {"way": name, "mask": mask, "devices": len(devices), "channels": channels}
    return where | found._asdict()


def on_cpu() -> Iterator[dict[str, Any]]:
    """Every way, on eight devices of the CPU, with and without a mask."""
    devices = jax.devices("cpu")[:CPU_DEVICES]
    for name in ways.WAYS:
        for masked in (False, True):
            yield row(name, masked, ways.N, ways.C, devices)


def on_tpu(
    *,
    names: Sequence[str] = TPU_WAYS,
    channels: Sequence[int] = CHANNELS,
    devices: Sequence[int] = tuple(TOPOLOGIES),
) -> Iterator[dict[str, Any]]:
    """In programs compiled for TPU v5e topologies."""
    from jax.experimental import topologies

    # What libtpu would otherwise ask a TPU machine for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    for count in devices:
        name = f"v5e:{TOPOLOGIES[count]}"
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        for c in channels:
            for way in names:
                for masked in (False, True):
                    yield row(way, masked, count * ROWS_PER_DEVICE, c, topology.devices)


def libtpu() -> str | None:
    """Its version, where it is installed."""
    if importlib.util.find_spec("libtpu") is None:
        return None
    return importlib.metadata.version("libtpu")


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    results.write("allreduces", list(on_cpu()))
    version = libtpu()
    if version is None:
        print("libtpu is not installed: results/collectives.csv stays as it is.", file=sys.stderr)
        return
    results.write("collectives", list(on_tpu()), also=f"libtpu {version}")


if __name__ == "__main__":
    main()

"""What compiled programs move, keep and reduce, for every layer: no program is run.

    python benchmarks/counts.py
    python benchmarks/counts.py --platform tpu     # needs libtpu, no TPU
    python benchmarks/counts.py --platform cuda    # needs JAX's CUDA plugin, no GPU

Writes results/counts-PLATFORM.csv. Sizes are in units of x, for each device and, in a stack, for
each layer:

read, written       by kernels, of main memory (hlo.kernels), whatever the values are
branches            both, in one round of what runs only where it is needed
temporary           memory beside arguments and results, at most at one time
xla                 bytes accessed, as XLA's cost analysis has them where there is one: it counts
                    a loop's body once, and of a condition's branches too
xla_always          the same of the program without what runs only where it is needed

Kernels are those that run in any case. The residuals, arrays of the size of x that the backward
pass keeps and their bytes per entry, do not depend on the platform. All-reduces are counted where
several devices share the batch.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import hlo
import jax.numpy as jnp
import programs
import results
from layers import Bnjax, EquinoxBatch, Layer, Linen, available
from other_layers import LAYERS, Torch
from programs import DEVICES, Case

PEERS = [kind for kind in LAYERS if kind is not Torch] + [EquinoxBatch]
DTYPES = ("float32", "bfloat16")
MATRICES = ((60, 100), (1024, 1024), (8192, 1024))
# Inputs of batch normalization in ResNet-50; more of them where there is more memory.
BATCHES = {"cpu": 32, "tpu": 256, "cuda": 256}
IMAGES = ((56, 56, 64), (28, 28, 256))
# Of convolution, batch norm and relu; the minutes that these take are for two layers only.
STACKS = (((64, 28, 28, 256), 8), ((128, 28, 28, 256), 4))


def cases(platform: str) -> Iterator[Case]:
    batch = BATCHES[platform]
    inputs = [(shape, -1) for shape in MATRICES]
    inputs += [((batch, *image), -1) for image in IMAGES]
    inputs += [((batch, c, height, width), 1) for height, width, c in IMAGES]
    for dtype in DTYPES:
        for shape, axis in inputs:
            yield Case("forward + backward", shape, dtype, axis)
        for program in ("forward", "evaluation"):
            yield Case(program, (batch, *IMAGES[-1]), dtype)
    for program in ("forward", "forward + backward"):
        yield Case(program, (batch, *IMAGES[-1]), devices=DEVICES)
    for shape, depth in STACKS:
        yield Case("stack", shape, "bfloat16", depth=depth)


def counted(case: Case, layer: Layer, devices: Sequence[Any]) -> dict[str, Any]:
    """The counts of one program."""
    program = programs.compiled(case, layer, devices)
    text, unit = program.as_text(), case.size() * case.depth
    found = hlo.kernels(text)
    always = [k for k in found if k.place != "branch"]
    reduced = [c for c in hlo.collectives(text) if c.place != "branch"]
    xla = _analysis(program).get("bytes accessed")
    return {
        "read": _sizes(sum(k.read for k in always) / unit),
        "written": _sizes(sum(k.written for k in always) / unit),
        "branches": _sizes(sum(k.read + k.written for k in found if k.place == "branch") / unit),
        "kernels": len(always),
        "temporary": _sizes(program.memory_analysis().temp_size_in_bytes / unit),
        "xla": "" if xla is None else _sizes(xla / unit),
        "all_reduces": len(reduced),
        "all_reduce_bytes": sum(c.bytes for c in reduced),
    }


def _analysis(program: Any) -> dict[str, float]:
    """Empty where a platform has none."""
    found = program.cost_analysis()
    return (found[0] if isinstance(found, list) else found) or {}


def shape(case: Case) -> str:
    return "x".join(map(str, case.shape))


def _sizes(value: float) -> str:
    return f"{value:.2f}"


def residuals(case: Case, layer: Layer) -> dict[str, Any]:
    """Arrays of the size of x, and their bytes per entry; of a small batch, as of any other."""
    x = jnp.ones((8, *case.shape[1:]), case.dtype)
    full = [size for count, size in layer.residuals(x) if count == x.size]
    return {"residuals": len(full), "residual_bytes": sum(full)}


def row(case: Case, kind: type[Layer], devices: Sequence[Any], platform: str) -> dict[str, Any]:
    layer = case.layer(kind)
    where = case._asdict() | {"shape": shape(case), "layer": kind.name}
    kept: dict[str, Any] = {"residuals": "", "residual_bytes": ""}
    if platform == "cpu" and case.program == "forward + backward" and case.devices == 1:
        kept = residuals(case, layer)
    found = counted(case, layer, devices)
    return where | found | {"xla_always": always(case, layer, devices, found)} | kept


def always(case: Case, layer: Layer, devices: Sequence[Any], found: dict[str, Any]) -> str:
    """What XLA's analysis counts where nothing branches."""
    if not found["xla"] or not isinstance(layer, Bnjax):
        return str(found["xla"])
    with programs.without_branches():
        again = counted(case, layer, devices)
    if float(again["branches"]):
        raise RuntimeError(f"{case}, {layer.name}: branches that cannot be left out.")
    return str(again["xla"])


def rows(platform: str) -> Iterator[dict[str, Any]]:
    devices = programs.devices(platform)
    kinds = list(available(PEERS))
    for case in cases(platform):
        for kind in kinds:
            if case.program == "stack" and kind not in (Bnjax, Linen):
                continue
            print(f"{platform}: {case.program} {case.shape} {case.dtype}, {kind.name}", flush=True)
            yield row(case, kind, devices, platform)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--platform", choices=["cpu", "tpu", "cuda"], default="cpu")
    platform = parser.parse_args().platform
    compiler = programs.version(platform)
    if compiler is None:
        print(
            f"results/counts-{platform}.csv stays as it is: nothing that compiles for "
            f"{programs.PLATFORMS[platform].title} is installed. "
            f"In an environment of its own: {programs.PLATFORMS[platform].install}",
            file=sys.stderr,
        )
        return 0
    programs.prepare(platform)
    results.write(f"counts-{platform}", list(rows(platform)), also=f"compiled {compiler}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

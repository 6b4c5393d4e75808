"""Export a trained network to one file, which a server runs without the code that trained it.

Takes a run folder of train_mlp.py, train_cnn.py or train_multihost.py. The file holds the
evaluation of its last checkpoint as one function, images [batch, features] -> logits
[batch, classes]: its weights are constants, the batch may have any size, and one program
serves all of --platforms. Before it is written, a process that has neither bnjax nor flax
runs it on the CPU, and its answers are compared with those of the network.

What is exported must be evaluation, bound to the running statistics: they are constants
too. In training, batch normalization takes mean and variance of the batch, so that each
answer would depend on the other images that happen to be asked for with it.

A file is read by versions of jaxlib up to six months newer, or three weeks older, than
the one that wrote it (https://docs.jax.dev/en/latest/export/export.html). So keep the
run folder, and export it again for newer ones.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cnn
import command
import jax
import jax.numpy as jnp
import numpy as np
import options
import run_folder
import train_mlp
import trained
from jax import export
from options import SettingsError
from rich.console import Console
from rich.table import Table
from trained import Trained

from bnjax import fold

Function = Callable[[jax.Array], jax.Array]

SUFFIX = ".jaxexport"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
SIZES = 1, 64  # batches of the comparison
# Of the largest logit, by which compiled programs may differ: in roundings of the dtype, and in
# all, as few roundings of bfloat16 are much.
ROUNDINGS, LARGEST = 64, 0.05

LOAD = """\
import jax
from jax import export

with open({path!r}, "rb") as file:
    predict = jax.jit(export.deserialize(bytearray(file.read())).call)
"""
WITHOUT_THEIR_CODE = """\
import sys

sys.modules.update(bnjax=None, flax=None)  # importing them fails
"""
ANSWER = """
import numpy as np

with np.load(sys.argv[1]) as batches:
    np.savez(sys.argv[2], **{name: predict(images) for name, images in batches.items()})
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    run_dir: Path | None = None
    """Run folder of train_mlp.py, train_cnn.py or train_multihost.py. Default: the one in runs/
    that was written to last."""
    network: Literal["bn", "no-bn"] = "bn"
    """With batch normalization or without."""
    folded: bool = False
    """Fold batch normalization into the layers before it, so that nothing of it is left."""
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")
    """What the file will run on: cpu, cuda, rocm, tpu. None of them is needed for the export."""
    out: Path | None = None
    """The file to write, or to replace. Default: model.jaxexport in the run folder."""
    data_dir: Path | None = None
    """Folder of the data that the network was trained on, where the training needed one."""


def check(settings: Settings) -> None:
    options.check_names("--platforms", settings.platforms, PLATFORMS)
    if settings.folded and settings.network == "no-bn":
        raise SettingsError(
            "--folded: the network no-bn has no batch normalization to fold. Leave one of both out."
        )
    out = settings.out
    if out is None:
        return
    if out.suffix != SUFFIX:  # so that no slip replaces a file of another kind
        raise SettingsError(
            f"--out {out}: must end in {SUFFIX}. Write for example --out {out.stem}{SUFFIX}."
        )
    if not out.parent.is_dir() or out.is_dir():
        wrong = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise SettingsError(f"--out {out}: {wrong}. Name a file in a folder that exists.")


def evaluation(state: Any) -> Function:
    """The network's logits with the running statistics, for batches of any size."""
    if isinstance(state, cnn.State):
        # Not cnn.logits, whose loop over parts of the batch needs to know its size.
        return cnn.in_evaluation(state)
    return partial(train_mlp.logits, state)


def folded_evaluation(state: Any, images: np.ndarray) -> Function:
    """The same without batch normalization, which the layers before it have taken in."""
    found: Any
    function: Function
    if isinstance(state, cnn.State):
        found = fold.nnx(cnn.in_evaluation(state), images)
        function = found.model
    else:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        found = fold.linen(state.apply_fn.__self__, variables, images, train=False)
        function = partial(found.apply, found.variables, train=False)
    if found.kept:
        raise RuntimeError(f"batch normalization was not folded away: {found.kept}")
    return function


def exported(function: Function, features: int, platforms: Sequence[str]) -> export.Exported:
    """One program for all platforms and batch sizes."""
    (batch,) = export.symbolic_shape("batch")

    def logits(images: jax.Array) -> jax.Array:  # the name that errors will tell
        return function(images)

    images = jax.ShapeDtypeStruct((batch, features), jnp.float32)
    return export.export(jax.jit(logits), platforms=platforms)(images)


def serialized(program: export.Exported) -> bytes:
    try:
        return bytes(program.serialize())
    except ImportError as error:
        raise SettingsError(
            f"jax cannot write the file ({error}). Install it: pip install flatbuffers."
        ) from None


def answers(content: bytes, batches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a process without bnjax and flax answers on the CPU, with the file alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, asked, answered = (folder / part for part in ("model", "asked.npz", "answered.npz"))
        model.write_bytes(content)
        np.savez(asked, **batches)  # type: ignore[arg-type]  # of NumPy's options
        program = WITHOUT_THEIR_CODE + LOAD.format(path=str(model)) + ANSWER
        process = subprocess.run(
            [sys.executable, "-c", program, asked, answered],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # others may be busy with this process
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise RuntimeError(f"the exported file does not run:\n{process.stderr}")
        with np.load(answered) as found:
            return dict(found)


def compare(content: bytes, network: Trained, original: Function) -> Table:
    """The exported function beside the network, on test images in batches of several sizes."""
    images = network.dataset.test_images
    batches = {str(len(images[:size])): images[:size] for size in SIZES}
    found = answers(content, batches)
    table = Table(
        title="The file in a new process on the CPU, without bnjax and flax", title_justify="left"
    )
    for column in ("batch size", "largest difference / largest logit", "same classes"):
        table.add_column(column, justify="right")
    with jax.default_device(trained.first_cpu()):
        for size, batch in batches.items():
            wanted = np.asarray(jax.jit(lambda images: original(images))(batch))
            if not np.isfinite(wanted).all():
                raise SettingsError(
                    f"--network: after step {network.step} its logits are not finite, since its "
                    "training diverged. Train again with a lower --learning-rate."
                )
            ratio = float(np.abs(found[size] - wanted).max() / np.abs(wanted).max())
            if not ratio <= min(ROUNDINGS * float(jnp.finfo(network.dtype).eps), LARGEST):
                raise RuntimeError(f"the exported file differs: {ratio:.1e}, batch of {size}")
            same = int((found[size].argmax(-1) == wanted.argmax(-1)).sum())
            table.add_row(size, f"{ratio:.1e}", f"{same} of {size}")
    return table


def write(path: Path, content: bytes) -> None:
    try:
        run_folder.write_atomically(path, content)
    except OSError as error:
        raise SettingsError(
            f"--out {path}: cannot be written ({error.strerror or error}). Name another file."
        ) from None


def run(settings: Settings) -> None:
    check(settings)
    path = settings.run_dir or trained.newest()
    network = trained.restore(path, settings.network, settings.data_dir)
    print(f"Run folder: {path}, step {network.step}, network {settings.network}", flush=True)
    images = network.dataset.test_images
    original = evaluation(network.state)
    function = folded_evaluation(network.state, images[:1]) if settings.folded else original
    program = exported(function, images.shape[1], settings.platforms)
    content = serialized(program)
    table = compare(content, network, original) if "cpu" in settings.platforms else None
    out = settings.out or path / f"model{SUFFIX}"
    write(out, content)
    (given,), (returned,) = program.in_avals, program.out_avals
    print(f"Function: {given.str_short()} -> {returned.str_short()}")
    print(f"Platforms: {', '.join(program.platforms)}")
    if table is None:
        print("Note: it was not run, which is done for cpu only.")
    else:
        Console().print(table)
    print(f"Exported: {out} ({len(content):,} bytes)\n")
    print("Where jax and flatbuffers are installed, it is loaded and run by\n")
    print(f"{LOAD.format(path=str(out))}logits = predict(images)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given command line; returns the exit status."""
    return command.run(run, Settings, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())

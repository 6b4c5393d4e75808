"""Programs of a layer of layers.py, compiled for a CPU, a TPU and a GPU; the last two need none.

What a layer stores and all arrays are arguments, so that nothing is known while compiling but
shapes and dtypes. Outputs, gradients and the new statistics are results. y is cast to the dtype
of x, for the layers that return another: a stack of layers does so too.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from layers import Equinox, Layer

from bnjax import _moments

H100 = Path(__file__).parent / "h100_target.txtpb"  # the card's figures, as XLA reads them
KERNEL = (3, 3)
DEVICES = 4

P = PartitionSpec


class Case(NamedTuple):
    program: str  # of PROGRAMS
    shape: tuple[int, ...]
    dtype: str = "float32"
    axis: int = -1  # of the channels
    depth: int = 1  # layers of a stack
    devices: int = 1  # that share the batch, under jit

    def layer(self, kind: type[Layer]) -> Layer:
        """Made for inputs of this dtype, and to give outputs of it."""
        dtype = jnp.dtype(self.dtype)
        # equinox refuses an input that is not of its parameters' dtype.
        options = {"param_dtype": dtype} if issubclass(kind, Equinox) else {}
        if dtype != jnp.float32:
            options["dtype"] = dtype
        return kind(self.shape[self.axis], axis=self.axis, **options)

    def size(self) -> int:
        """Bytes of x on each device."""
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize // self.devices


def forward(layer: Layer, trained: Any, carried: Any, x: Any) -> Any:
    """y and the new statistics, in training."""
    y, (_, carried) = layer.apply((trained, carried), x, True)
    return y.astype(x.dtype), carried


def evaluation(layer: Layer, trained: Any, carried: Any, x: Any) -> Any:
    return layer.apply((trained, carried), x, False)[0].astype(x.dtype)


def training(layer: Layer, trained: Any, carried: Any, x: Any, dy: Any) -> Any:
    """Forward and backward: y, the new statistics, and gradients of what is trained and of x."""
    y, backward, new = jax.vjp(
        lambda trained, x: forward(layer, trained, carried, x), trained, x, has_aux=True
    )
    return y, new, backward(dy)


def stack(layer: Layer, weights: Any, trained: Any, carried: Any, x: Any, dy: Any) -> Any:
    """A training step of 3x3 convolution, batch norm and relu, several times."""

    def loss(weights: Any, trained: Any) -> Any:
        y, new = x, []
        for w, *of_layer in zip(weights, trained, carried, strict=True):
            y = lax.conv_general_dilated(
                y, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y, statistics = forward(layer, *of_layer, y)
            y = jax.nn.relu(y)
            new.append(statistics)
        return jnp.sum(y * dy, dtype=jnp.float32), new

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, trained)


PROGRAMS: dict[str, Callable[..., Any]] = {
    "forward": forward,
    "forward + backward": training,
    "evaluation": evaluation,
    "stack": stack,
}


@contextlib.contextmanager
def without_branches() -> Iterator[None]:
    """Programs of bnjax that end with its first pass: without what runs only where it is needed."""
    with mock.patch.object(_moments, "refined", lambda _, first: first):
        jax.clear_caches()  # which hold what was traced before
        try:
            yield
        finally:
            jax.clear_caches()


def compiled(case: Case, layer: Layer, devices: Sequence[Any]) -> Any:
    """For these devices, of which none is needed."""
    mesh = Mesh(np.array(devices[: case.devices]), ("batch",))

    def like(v: Any) -> Any:
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, P()))

    dtype, channels = jnp.dtype(case.dtype), case.shape[case.axis]
    x = jax.ShapeDtypeStruct(case.shape, dtype, sharding=NamedSharding(mesh, P("batch")))
    arguments: list[Any] = list(jax.tree.map(like, layer.variables))
    if case.program == "stack":
        kernel = like(np.zeros((*KERNEL, channels, channels), dtype))
        arguments = [[part] * case.depth for part in (kernel, *arguments)]
    arguments += [x] if case.program in ("forward", "evaluation") else [x, x]
    function = PROGRAMS[case.program]
    return jax.jit(lambda *a: function(layer, *a)).lower(*arguments).compile()


# --- platforms -------------------------------------------------------------------------


class Platform(NamedTuple):
    title: str
    modules: tuple[str, ...]  # one of which must be installed
    install: str
    environment: dict[str, str]
    topology: Callable[[], dict[str, Any]]


PLATFORMS = {
    "tpu": Platform(
        "TPU v5e",
        ("libtpu",),
        "pip install 'bnjax[tpu]'",
        # What libtpu would otherwise ask a TPU machine for.
        {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes
        },
        lambda: {"topology_name": "v5e:2x2"},
    ),
    "cuda": Platform(
        "H100",
        ("jax_cuda13_plugin", "jax_cuda12_plugin"),
        "pip install 'bnjax[cuda]'",
        {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"},
        lambda: {
            "topology_name": "",
            "target_config": H100.read_text(encoding="utf-8"),
            "topology": f"1x1x{DEVICES}",
        },
    ),
}


def version(platform: str) -> str | None:
    """What compiles for it, with its version; None if it is not installed."""
    if platform == "cpu":
        return "for the CPU"
    for module in PLATFORMS[platform].modules:
        if importlib.util.find_spec(module):
            name = module.replace("_", "-")
            return f"for {PLATFORMS[platform].title} by {name} {importlib.metadata.version(name)}"
    return None


def prepare(platform: str) -> None:
    """To be called before JAX has started."""
    if platform != "cpu":
        for name, value in PLATFORMS[platform].environment.items():
            os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu,cuda" if platform == "cuda" else "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)


def devices(platform: str) -> Sequence[Any]:
    """To compile for."""
    from jax.experimental import topologies

    if platform == "cpu":
        return jax.devices("cpu")[:DEVICES]
    given = PLATFORMS[platform].topology()
    return topologies.get_topology_desc(platform=platform, **given).devices

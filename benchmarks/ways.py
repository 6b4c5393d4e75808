"""Every way of running the layer on several devices, each as one program.

A program takes a training step: outputs, the new state, and the gradients of a loss that
takes both, with respect to x, scale and bias. All ways compute the same numbers; one device
computes them too (`on_one_device`). Programs run on any number of devices, of one process
or of several, each of which passes the rows of its own; and they can be compiled without
running, from shapes (`jax.ShapeDtypeStruct`) and for devices that are not there.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import bnjax
from bnjax import BNParams, BNState

N, C = 64, 6
MOMENTUM = 0.5
P = PartitionSpec
_RNG = np.random.default_rng(0)
X = _RNG.normal(3, 2, (N, C)).astype(np.float32)
W = _RNG.normal(size=(N, C)).astype(np.float32)
PARAMS = BNParams(*_RNG.uniform(0.5, 1.5, (2, C)).astype(np.float32))
STATE = BNState(np.zeros(C, np.float32), np.ones(C, np.float32), np.zeros(C, np.int32))
_CHANCE = _RNG.random((N, C))

Grid = tuple[int, int]  # parts of the rows and of the channels, one on each device


class Problem(NamedTuple):
    """The arguments of a step, whole: arrays of NumPy, or shapes to compile for."""

    params: Any
    state: Any
    x: Any
    w: Any
    mask: Any


class Results(NamedTuple):
    y: Any
    state: Any
    params: Any  # their gradients
    x: Any  # its gradient


class Program(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    mesh: Mesh | None = None
    of_process: bool = False  # takes and returns the rows of this process, as pmap does

    def compiled(self) -> Any:
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return self.function.lower(*self.args).compile()

    def run(self) -> tuple[Any, str]:
        """What it returns, and the compiled program as text, where jax shows it."""
        if self.of_process:
            return self.function(*self.args), ""
        compiled = self.compiled()
        return compiled(*self.args), compiled.as_text()


class Way(NamedTuple):
    build: Callable[..., Program]
    channels: int = 1  # parts of the channels

    def grid(self, devices: int) -> Grid:
        return devices // self.channels, self.channels

    def program(self, problem: Problem, devices: Sequence[Any], forward: bool = False) -> Program:
        """A step on these devices; `forward`: only outputs and the new state."""
        return self.build(problem, devices, forward)


def problem(grid: Grid | None = None) -> Problem:
    """Without a mask, or with devices that hold very different numbers of entries."""
    return Problem(PARAMS, STATE, X, W, None if grid is None else uneven(grid))


def uneven(grid: Grid) -> np.ndarray:
    """From 0 to nearly all entries; the first device has none."""
    chance = np.linspace(0.02, 1, N)[:, None] ** 2
    mask = chance > _CHANCE
    mask[: N // grid[0], : C // grid[1]] = False
    return mask


def coefficients(channels: int) -> np.ndarray:
    """Of the new mean and variance in the loss, [2, C]."""
    return np.cos(np.arange(2 * channels, dtype=np.float32)).reshape(2, channels)


def loss(axis_name: Any, parts: int | None, *args: Any) -> tuple[jax.Array, Any]:
    """sum(y * w + y**2 / 10) + u . mean + v . var, as a part of one device or, with None, whole."""
    params, state, x, w, mask = args
    y, new = bnjax.bn_apply(
        params, state, x, True, axis_name=axis_name, mask=mask, momentum=MOMENTUM
    )
    u, v = coefficients(x.shape[-1])
    of_state = jnp.sum(u * new.mean) + jnp.sum(v * new.var)
    of_y = jnp.sum(y * w + 0.1 * y**2)
    whole = jax.lax.psum(of_y, axis_name) + of_state if parts is None else of_y + of_state / parts
    return whole, (y, new)


def step(loss: Callable[..., Any], forward: bool, *args: Any) -> Any:
    if forward:
        return loss(*args)[1]
    (params, x), (y, state) = jax.grad(loss, (0, 2), has_aux=True)(*args)
    return Results(y, state, params, x)


@functools.cache
def on_one_device(grid: Grid | None) -> Any:
    """The results that the ways are compared with, in float32 and in this process."""
    f = jax.jit(functools.partial(step, functools.partial(loss, None, 1), False))
    return jax.tree.map(np.asarray, f(*problem(grid)))


def _mesh(devices: Sequence[Any], shape: tuple[int, ...], names: Any, types: AxisType) -> Mesh:
    return Mesh(np.array(devices).reshape(shape), names, axis_types=(types,) * len(shape))


def own(rows: Any) -> Any:
    """The rows of this process."""
    count = len(rows) // jax.process_count()
    return rows[jax.process_index() * count :][:count]


def _put(v: Any, sharding: NamedSharding, rows: bool) -> Any:
    """An array over all devices, of which each process gives its own rows, or all of a vector."""
    if isinstance(v, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding)
    return jax.make_array_from_process_local_data(sharding, own(v) if rows else v, v.shape)


def _placed(problem: Problem, mesh: Mesh, vectors: P, data: P) -> tuple[Any, ...]:
    vector = functools.partial(_put, sharding=NamedSharding(mesh, vectors), rows=False)
    rows = functools.partial(_put, sharding=NamedSharding(mesh, data), rows=True)
    params, state, *arrays = problem
    return (*jax.tree.map(vector, (params, state)), *jax.tree.map(rows, arrays))


def _jit(types: AxisType, channels: int, problem: Problem, devices: Any, forward: bool) -> Program:
    """Under jit with a sharded batch, and with sharded channels where they have several parts."""
    names = ("batch", "channels")[: 1 if channels == 1 else 2]
    shape = (len(devices) // channels, channels)[: len(names)]
    mesh = _mesh(devices, shape, names, types)
    function = functools.partial(step, functools.partial(loss, None, 1), forward)
    return Program(jax.jit(function), _placed(problem, mesh, P(*names[1:]), P(*names)), mesh)


def _shard_map(
    names: tuple[str, ...], vma: bool, inside: bool, problem: Problem, devices: Any, forward: bool
) -> Program:
    """shard_map with check_vma or without, differentiated inside or outside."""
    parts = len(devices)
    shape = (2, parts // 2) if len(names) == 2 else (parts,)
    mesh = _mesh(devices, shape, names, AxisType.Auto)
    local, total = (functools.partial(loss, _axis_name(names), p) for p in (parts, None))

    def gradients(*args: Any) -> Any:
        if vma or forward:
            return step(total, forward, *args)
        # Gradients of parameters are local, and belong to the summed loss.
        results = step(local, forward, *args)
        return results._replace(params=jax.lax.psum(results.params, names))

    data = P(names)
    specs = (P(), P(), data, data, data)
    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, check_vma=vma)
    if inside:
        function = shard(
            gradients, out_specs=(data, P()) if forward else Results(data, P(), P(), data)
        )
    else:
        function = functools.partial(step, shard(total, out_specs=(P(), (data, P()))), forward)
    return Program(jax.jit(function), _placed(problem, mesh, P(), data))


def _mapped(names: tuple[str, ...], parts: int, forward: bool) -> Callable[..., Any]:
    """A step for pmap and vmap: gradients of the parameters are summed by the caller."""
    axis_name = _axis_name(names)

    def function(*args: Any) -> Any:
        results = step(functools.partial(loss, axis_name, parts), forward, *args)
        if forward:
            return results
        return results._replace(params=jax.lax.psum(results.params, axis_name))

    return function


def _vmap(names: tuple[str, ...], problem: Problem, devices: Any, forward: bool) -> Program:
    """vmap over a leading axis of parts that is sharded; nested, with two parts on each device."""
    lead = (len(devices), 2)[: len(names)]
    function = _mapped(names, math.prod(lead), forward)
    for name in reversed(names):
        function = jax.vmap(function, in_axes=(None, None, 0, 0, 0), axis_name=name)
    mesh = _mesh(devices, (len(devices),), ("devices",), AxisType.Auto)
    return Program(jax.jit(function), _placed(_split(problem, lead), mesh, P(), P("devices")))


def _pmap(problem: Problem, devices: Any, forward: bool) -> Program:
    several = jax.process_count() > 1
    function = jax.pmap(
        _mapped(("i",), len(devices), forward),
        axis_name="i",
        in_axes=(None, None, 0, 0, 0),
        devices=None if several else devices,
    )
    params, state, *arrays = _split(problem, (len(devices),))
    rows = jax.tree.map(own, arrays) if several else arrays
    return Program(function, (params, state, *rows), of_process=several)


def _split(problem: Problem, lead: tuple[int, ...]) -> Problem:
    def split(v: Any) -> Any:
        shape = (*lead, v.shape[0] // math.prod(lead), *v.shape[1:])
        return (
            jax.ShapeDtypeStruct(shape, v.dtype)
            if isinstance(v, jax.ShapeDtypeStruct)
            else v.reshape(shape)
        )

    params, state, *arrays = problem
    return Problem(params, state, *jax.tree.map(split, arrays))


def _axis_name(names: tuple[str, ...]) -> Any:
    return names if len(names) > 1 else names[0]


def _way(build: Callable[..., Program], *options: Any) -> Way:
    return Way(functools.partial(build, *options))


def _jit_way(types: AxisType, channels: int) -> Way:
    return Way(functools.partial(_jit, types, channels), channels)


ONE, TWO = ("i",), ("i", "j")
WAYS = {
    "jit, auto": _jit_way(AxisType.Auto, 1),
    "jit, explicit": _jit_way(AxisType.Explicit, 1),
    "jit, auto, channels too": _jit_way(AxisType.Auto, 2),
    "jit, explicit, channels too": _jit_way(AxisType.Explicit, 2),
    "shard_map, grad inside": _way(_shard_map, ONE, True, True),
    "shard_map, grad outside": _way(_shard_map, ONE, True, False),
    "shard_map without vma, grad inside": _way(_shard_map, ONE, False, True),
    "shard_map without vma, grad outside": _way(_shard_map, ONE, False, False),
    "shard_map over two axes": _way(_shard_map, TWO, True, True),
    "shard_map over two axes without vma": _way(_shard_map, TWO, False, True),
    "pmap": Way(_pmap),
    "vmap": _way(_vmap, ONE),
    "vmap of vmap": _way(_vmap, TWO),
}

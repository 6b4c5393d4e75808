"""The layers that are compared, behind one interface.

All normalize arrays of shape [n, C] over n, and images with the channels last, or second with
`axis=1`. `variables` is what a layer stores, in two pytrees, what is trained and what is carried,
and `apply` is a pure function of it, for torch as far as torch has one. Every layer runs as it
comes; only momentum, epsilon, axis and dtypes are set.
"""

import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import numpy as np

import bnjax

EPSILON = 1e-5
Statistics = tuple[np.ndarray, np.ndarray]


class Options(NamedTuple):
    channels: int
    momentum: Any = 0.9  # weight of the old value, for all of them
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: Any = None
    axis: int = -1  # of the channels: the last, or 1


class Layer:
    """A layer of JAX, made with `Options`."""

    name = ""  # of the column
    module = ""  # to import
    package = ""  # to install
    unbiased = False  # whether the running variance takes n/(n-1)
    variables: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        self.options = Options(*args, **options)
        self.variables = self.build(self.options)

    def build(self, o: Options) -> Any:
        """`(trained, carried)`, as the layer starts."""
        raise NotImplementedError

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        """`(y, new variables)`; `mask` has shape [n], or the rank of `x`."""
        raise NotImplementedError

    def running(self, variables: Any) -> Statistics:
        raise NotImplementedError

    def step(self, x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """One compiled call in training; keeps the new running statistics."""
        y, self.variables = jax.jit(lambda v, x: self.apply(v, x, True, mask))(
            self.variables, jnp.asarray(x)
        )
        return np.asarray(y)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.apply(self.variables, jnp.asarray(x), False)[0])

    def jvp(self, x: np.ndarray, dx: np.ndarray) -> np.ndarray:
        return np.asarray(jax.jvp(lambda x: self.apply(self.variables, x)[0], (x,), (dx,))[1])

    def grad(self, x: np.ndarray, w: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Of sum(w * y**3)."""

        def loss(x: jax.Array) -> jax.Array:
            y = self.apply(self.variables, x, True, mask)[0]
            return jnp.where(w == 0, 0, w * y**3).sum()

        return np.asarray(jax.grad(loss)(jnp.asarray(x)))

    def grad_grad(self, x: np.ndarray, w: np.ndarray, dx: np.ndarray) -> np.ndarray:
        """Of the product of `grad` and `dx`."""

        def loss(x: jax.Array) -> jax.Array:
            return (w * self.apply(self.variables, x)[0] ** 3).sum()

        return np.asarray(jax.grad(lambda x: (jax.grad(loss)(x) * dx).sum())(jnp.asarray(x)))

    def residuals(self, x: Any) -> list[tuple[int, int]]:
        """Size and bytes per entry of the distinct arrays that the backward pass keeps."""
        backward = jax.vjp(lambda x: self.apply(self.variables, x)[0], x)[1]
        leaves = [leaf for leaf in jax.tree.leaves(backward) if hasattr(leaf, "nbytes")]
        distinct = {id(leaf): leaf for leaf in leaves}
        return [(leaf.size, leaf.dtype.itemsize) for leaf in distinct.values()]


class Bnjax(Layer):
    name = module = package = "bnjax"

    def build(self, o: Options) -> Any:
        self.call = {
            "momentum": bnjax.cumulative() if o.momentum is None else o.momentum,
            "epsilon": EPSILON,
            "dtype": o.dtype,
            "axis": o.axis,
            "axis_name": o.axis_name,
        }
        return bnjax.bn_init(o.channels, param_dtype=o.param_dtype)

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        params, state = variables
        y, state = bnjax.bn_apply(params, state, x, train, mask=_in_rank(mask, x), **self.call)
        return y, (params, state)

    def running(self, variables: Any) -> Statistics:
        return np.asarray(variables[1].mean), np.asarray(variables[1].var)


class Linen(Layer):
    name, module, package = "flax.linen", "flax.linen", "flax"

    def build(self, o: Options) -> Any:
        import flax.linen as nn

        self.layer = nn.BatchNorm(epsilon=EPSILON, **_of_flax(o))
        x = jnp.zeros((2, o.channels), o.param_dtype)
        variables = self.layer.init(jax.random.key(0), x, use_running_average=True)
        return variables["params"], variables["batch_stats"]

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        y, new = self.layer.apply(
            {"params": variables[0], "batch_stats": variables[1]},
            x,
            use_running_average=_not(train),
            mask=_in_rank(mask, x),
            mutable=["batch_stats"],
        )
        return y, (variables[0], new["batch_stats"])

    def running(self, variables: Any) -> Statistics:
        return np.asarray(variables[1]["mean"]), np.asarray(variables[1]["var"])


class Nnx(Layer):
    name, module, package = "flax.nnx", "flax.nnx", "flax"

    def build(self, o: Options) -> Any:
        from flax import nnx

        self.nnx = nnx
        layer = nnx.BatchNorm(o.channels, epsilon=EPSILON, rngs=nnx.Rngs(0), **_of_flax(o))
        self.graph, *variables = nnx.split(layer, nnx.Param, ...)
        return tuple(variables)

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        # A copy: nnx forbids to update a Variable that was made outside of a trace.
        layer = self.nnx.merge(self.graph, *variables, copy=True)
        y = layer(x, use_running_average=_not(train), mask=_in_rank(mask, x))
        return y, self.nnx.state(layer, self.nnx.Param, ...)

    def running(self, variables: Any) -> Statistics:
        return np.asarray(variables[1]["mean"][...]), np.asarray(variables[1]["var"][...])


class Haiku(Layer):
    name, module, package = "haiku", "haiku", "dm-haiku"

    def build(self, o: Options) -> Any:
        import haiku as hk

        def transformed(axis_name: Any) -> Any:
            def call(x: Any, train: Any, **options: Any) -> Any:
                layer = hk.BatchNorm(
                    True,
                    True,
                    o.momentum,
                    eps=EPSILON,
                    cross_replica_axis=axis_name,
                    data_format="channels_last" if o.axis == -1 else "channels_first",
                )
                return layer(x, train, **options)

            return hk.transform_with_state(call)

        self.call = transformed(o.axis_name).apply
        x = jnp.zeros((2, o.channels), o.param_dtype)
        return transformed(None).init(None, x, True)

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        # They are of the rank of x, here of two.
        shape = [1] * x.ndim
        shape[self.options.axis] = self.options.channels
        params, state = _reshaped(variables, shape)
        y, state = self.call(params, state, None, x, train, **_given(mask))
        return y, (variables[0], _reshaped(state, [1, -1]))

    def running(self, variables: Any) -> Statistics:
        state = variables[1]
        mean, var = (state[f"batch_norm/~/{k}_ema"]["average"] for k in ("mean", "var"))
        return np.asarray(mean).ravel(), np.asarray(var).ravel()


class Equinox(Layer):
    """Its default mode, "ema": the running averages normalize in training too.

    It takes channels before the axes of an image only: others are transposed, and y back.
    """

    name = module = package = "equinox"
    mode: dict[str, Any] = {}  # noqa: RUF012

    def build(self, o: Options) -> Any:
        import equinox as eqx

        self.eqx = eqx
        axes = "batch" if o.axis_name is None else ("batch", o.axis_name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it advises against its default
            layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
                o.channels,
                axes,
                eps=EPSILON,
                momentum=o.momentum,
                dtype=o.param_dtype,
                **self.mode,
            )
        arrays, self.static = eqx.partition(layer, eqx.is_array)
        return arrays, state

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        layer = self.eqx.combine(variables[0], self.static)
        y, state = jax.vmap(
            lambda x, state: layer(x, state, inference=_not(train), **_given(mask)),
            axis_name="batch",
            in_axes=(0, None),
            out_axes=(0, None),
        )(jnp.moveaxis(x, self.options.axis, 1), variables[1])
        return jnp.moveaxis(y, 1, self.options.axis), (variables[0], state)

    def running(self, variables: Any) -> Statistics:
        layer = self.eqx.combine(variables[0], self.static)
        mean, var = variables[1].get(layer.ema_state_index or layer.batch_state_index)
        return np.asarray(mean), np.asarray(var)


class EquinoxBatch(Equinox):
    name, mode = "equinox, mode='batch'", {"mode": "batch"}


def _not(train: Any) -> Any:
    return not train if isinstance(train, bool) else jnp.logical_not(train)


def _in_rank(mask: Any, x: Any) -> Any:
    """With axes of size 1 at the end, to the rank of `x`."""
    return None if mask is None else jnp.reshape(mask, mask.shape + (1,) * (x.ndim - mask.ndim))


def _of_flax(o: Options) -> dict[str, Any]:
    return {name: value for name, value in o._asdict().items() if name != "channels"}


def _reshaped(tree: Any, shape: list[int]) -> Any:
    return jax.tree.map(lambda v: v.reshape(shape) if v.ndim else v, tree)


def _given(mask: Any) -> dict[str, Any]:
    return {} if mask is None else {"mask": mask}


def available(layers: list[type[Layer]]) -> Iterator[type[Layer]]:
    """Those that are installed; says which are not."""
    for layer in layers:
        if importlib.util.find_spec(layer.module.split(".")[0]):
            yield layer
        else:
            print(f"{layer.package} is not installed, so there is no column {layer.name}.")


def versions() -> str:
    names = ["jax", "flax", "dm-haiku", "equinox", "keras", "torch"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)

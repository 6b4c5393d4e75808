"""What to fold: statistics, layers of every layout by lax, small models; the layer in NumPy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tolerances
from flax import linen as nn
from flax import nnx
from jax import lax

import bnjax
import bnjax.nnx

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).normal(1, 1, (11, 3)).astype(np.float32)


def trained(tree):
    """Parameters and statistics as of a trained network."""

    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = rng.normal(size=leaf.shape)
        if "kernel" in name:
            fan_in = np.prod(leaf.shape[:-1])
            return jnp.asarray(noise / fan_in**0.5, leaf.dtype)
        if "var" in name:
            return jnp.asarray(np.exp(noise), leaf.dtype)
        if "scale" in name:
            return jnp.asarray(1 + 0.3 * noise, leaf.dtype)
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree.map_with_path(fill, tree)


class Mini(nn.Module):
    """A network as one function of its input."""

    f: Callable

    @nn.compact
    def __call__(self, x, **call):
        return self.f(x, **call)


def mini(f, x=ROWS):
    model = Mini(f)
    return model, trained(jax.eval_shape(model.init, KEY, x))


def assert_same(folded, model, variables, *args, **kwargs):
    y = folded.apply(folded.variables, *args, **kwargs)
    expected = model.apply(variables, *args, **kwargs)
    assert [v.dtype for v in jax.tree.leaves(y)] == [v.dtype for v in jax.tree.leaves(expected)]
    tolerances.assert_close(y, expected, np.float32, 64)


class Few(nnx.Module):
    def __init__(self, call, norm=bnjax.nnx.BatchNorm, **options):
        rngs = nnx.Rngs(0)
        self.dense, self.other = (nnx.Linear(3, 3, rngs=rngs) for _ in range(2))
        self.norm = norm(3, rngs=rngs, **options)
        self.call = call

    def __call__(self, x):
        return self.call(self, x)


def few(call, **options):
    model = Few(call, **options)
    nnx.update(model, trained(nnx.state(model)))
    model.eval()
    return model


def quickly(function):
    """Compiled without optimization, which takes seconds for convolutions in float64."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


SPATIAL = {1: (12,), 2: (8, 7), 3: (6, 5, 4)}


def statistics(channels, mean=1.0, seed=0, dtype=np.float32):
    """Parameters, state and epsilon as training leaves them, at a mean of so many deviations."""
    rng = np.random.default_rng(seed)
    var = np.exp(rng.normal(size=channels))
    means = mean * np.sqrt(var) * np.sign(rng.normal(size=channels))
    params = (rng.normal(1, 0.5, channels), rng.normal(size=channels))
    state = (means + rng.normal(size=channels), var)
    params = bnjax.BNParams(*(jnp.asarray(v, dtype) for v in params))
    count = jnp.ones(channels, jnp.int32)
    return params, bnjax.BNState(*(jnp.asarray(v, jnp.float32) for v in state), count), 1e-3


def normalize(y, params, state, epsilon, axis):
    """The reference: float64 NumPy."""
    shape = [1] * y.ndim
    shape[axis] = -1
    gamma, beta, mean, var = (
        np.asarray(v, np.float64).reshape(shape) for v in (*params, *state[:2])
    )
    return (y - mean) / np.sqrt(var + epsilon) * gamma + beta


class Case:
    """A layer: how it convolves, and where its kernel has its channels."""

    def __init__(self, dims=2, inputs=6, outputs=8, size=3, padding="SAME", first=False,
                 groups=1, transposed=False, dense=False, layout=None, **options):  # fmt: skip
        self.axis = 1 if first else -1
        self.options = options
        self.groups, self.transposed, self.padding = groups, transposed, padding
        self.inputs, self.outputs, self.dense = inputs, outputs, dense
        spatial = () if dense else (size,) * dims
        if dense:
            self.kernel_shape = (outputs, inputs) if first else (inputs, outputs)
            self.x_shape = (5, inputs)
        else:
            inp, out = (inputs, outputs // groups) if transposed else (inputs // groups, outputs)
            letters = "DHW"[-dims:] if dims < 4 else ""
            self.layout = layout or (f"OI{letters}" if first else f"{letters}IO")
            sizes = {"I": inp, "O": out, **dict(zip(letters, spatial, strict=True))}
            self.kernel_shape = tuple(sizes[letter] for letter in self.layout)
            image = SPATIAL[dims]
            self.x_shape = (2, inputs, *image) if first else (2, *image, inputs)
            data = f"NC{letters}" if first else f"N{letters}C"
            self.numbers = (data, self.layout, data)
        self.fan_in = int(np.prod(spatial)) * inputs // groups

    @property
    def axes(self):
        names = {"output_axis": 0, "input_axis": 1} if self.axis == 1 else {}
        if self.dense:
            return {"output_axis": 0, "input_axis": 1} if self.kernel_shape[0] == self.outputs \
                else {}  # fmt: skip
        names = {"output_axis": self.layout.index("O"), "input_axis": self.layout.index("I")}
        return {**names, "groups": self.groups, "transposed": self.transposed}

    def arrays(self, dtype=np.float32, seed=1):
        rng = np.random.default_rng(seed)
        shapes = (self.x_shape, self.kernel_shape, (self.outputs,))
        x, kernel, bias = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
        return x, kernel / self.fan_in**0.5, bias

    def __call__(self, x, kernel):
        if self.dense:
            return x @ (kernel.T if self.axis == 1 else kernel)
        if self.transposed:
            return self._transposed(x, kernel)
        strides = self.options.get("strides", (1,) * (x.ndim - 2))
        options = {k: v for k, v in self.options.items() if k != "strides"}
        return lax.conv_general_dilated(
            x, kernel, strides, self.padding, dimension_numbers=self.numbers,
            feature_group_count=self.groups, **options,
        )  # fmt: skip

    def exact(self, x, kernel):
        """The call in float64."""
        return quickly(self.__call__)(*(jnp.asarray(v, jnp.float64) for v in (x, kernel)))

    def add(self, y, bias):
        shape = [1] * y.ndim
        shape[self.axis] = -1
        return y if bias is None else y + np.asarray(bias, y.dtype).reshape(shape)

    def _transposed(self, x, kernel):
        """Group by group, as lax has no groups here."""
        data, spec, out = self.numbers
        inp = spec.index("I")
        # lax reads the kernel of transpose_kernel=True as that of the convolution it transposes.
        spec = spec.translate(str.maketrans("IO", "OI"))
        strides = self.options.get("strides", (1,) * (x.ndim - 2))
        parts = zip(
            jnp.split(x, self.groups, self.axis), jnp.split(kernel, self.groups, inp), strict=True
        )
        return jnp.concatenate(
            [
                lax.conv_transpose(
                    x, k, strides, self.padding, dimension_numbers=(data, spec, out),
                    transpose_kernel=True,
                )
                for x, k in parts
            ],
            self.axis,
        )  # fmt: skip


LAYERS = {
    "dense": Case(dense=True),
    "dense, torch": Case(dense=True, first=True),
    "1d": Case(1),
    "2d": Case(2),
    "3d": Case(3),
    "1d, channels first": Case(1, first=True),
    "2d, channels first": Case(2, first=True),
    "3d, channels first": Case(3, first=True),
    "strided": Case(2, strides=(2, 3)),
    "dilated": Case(2, rhs_dilation=(2, 2)),
    "input dilated": Case(2, lhs_dilation=(2, 1), padding=((1, 2), (0, 1))),
    "grouped": Case(2, groups=2),
    "grouped, channels first": Case(2, groups=2, first=True),
    "depthwise": Case(2, inputs=4, outputs=4, groups=4),
    "depthwise, multiplied": Case(2, inputs=4, outputs=12, groups=4),
    "as many inputs as outputs": Case(2, inputs=4, outputs=4),
    "odd axes": Case(2, layout="OHIW"),
    "transposed": Case(2, transposed=True, strides=(2, 2)),
    "transposed, channels first": Case(2, transposed=True, first=True, layout="IOHW"),
    "transposed, grouped": Case(
        2, transposed=True, first=True, layout="IOHW", groups=2, strides=(2, 1)
    ),
    "transposed, depthwise": Case(
        1, 4, 8, transposed=True, first=True, layout="IOW", groups=4, strides=(2,)
    ),
}


# Those where every output sees the whole kernel.
EXACT = {
    "dense": {"dense": True},
    "dense, torch": {"dense": True, "first": True},
    "1d": {"dims": 1},
    "2d": {"dims": 2},
    "3d": {"dims": 3, "padding": ((0, 0), (0, 0), (0, -1))},
    "channels first": {"dims": 2, "first": True},
    "1 by 1": {"dims": 2, "size": 1, "padding": "SAME", "strides": (2, 2)},
    "strided": {"strides": (2, 3)},
    "dilated": {"rhs_dilation": (2, 2)},
    "grouped": {"groups": 2},
    "grouped, channels first": {"groups": 2, "first": True},
    "depthwise, multiplied": {"inputs": 4, "outputs": 12, "groups": 4},
    "transposed": {"transposed": True, "padding": ((0, 0), (0, 0))},
    "transposed, grouped": {
        "transposed": True, "padding": ((0, 0), (-1, 0)), "groups": 2, "first": True,
        "layout": "IOHW", "inputs": 4,
    },
}  # fmt: skip
EXACT = {name: Case(**{"padding": "VALID", **options}) for name, options in EXACT.items()}

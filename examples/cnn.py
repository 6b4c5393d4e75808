"""The network of train_cnn.py in flax.nnx, and the pure functions that train and evaluate it."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from data import Dataset
from flax import nnx, serialization
from training import Network, cross_entropy, over_devices

from bnjax.nnx import BatchNorm
from bnjax.optim import decay_mask

CHUNK = 1000  # images that are evaluated at once, which bounds the memory


class Layer(nnx.Module):
    """Convolution, then BatchNorm (optional).

    The convolution's bias would be removed again by the batch mean, so it is left
    out where batch normalization follows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        strides: int = 1,
        batch_norm: bool,
        scale_init: Any = nnx.initializers.ones,
        axis_name: str | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (3, 3),
            strides,
            use_bias=not batch_norm,
            kernel_init=nnx.initializers.he_normal(),
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = (
            BatchNorm(
                outputs,
                momentum=0.9,
                scale_init=scale_init,
                axis_name=axis_name,
                dtype=dtype,
                rngs=rngs,
            )
            if batch_norm
            else None
        )

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = self.conv(x)
        return x if self.norm is None else self.norm(x, mask=mask)


class Stage(nnx.Module):
    """A layer that sets size and channels, then two more: a block with a shortcut if residual.

    The last scale of a residual block starts at zero, and so the block as the
    identity (Goyal et al. 2017, section 5.1).
    """

    def __init__(
        self, inputs: int, outputs: int, *, strides: int, residual: bool, **options: Any
    ) -> None:
        init = nnx.initializers.zeros if residual else nnx.initializers.ones
        self.entry = Layer(inputs, outputs, strides=strides, **options)
        self.first = Layer(outputs, outputs, **options)
        self.second = Layer(outputs, outputs, scale_init=init, **options)
        self.residual = residual

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = nnx.relu(self.entry(x, mask))
        y = self.second(nnx.relu(self.first(x, mask)), mask)
        return nnx.relu(x + y if self.residual else y)


class CNN(nnx.Module):
    """A stage for each number of channels, each at half the size of the one before; then Linear.

    Takes flat features, of images of the given shape. `mask` says which of them
    count in training: a boolean for each.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: tuple[int, ...],
        classes: int,
        *,
        residual: bool,
        batch_norm: bool,
        axis_name: str | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.shape = shape
        inputs = (shape[-1], *channels)
        self.stages = nnx.List(
            [
                Stage(
                    inputs[i],
                    inputs[i + 1],
                    strides=1 if i == 0 else 2,
                    residual=residual,
                    batch_norm=batch_norm,
                    axis_name=axis_name,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(len(channels))
            ]
        )
        self.head = nnx.Linear(channels[-1], classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = x.reshape(-1, *self.shape)
        pixels = None if mask is None else mask[:, None, None, None]
        for stage in self.stages:
            x = stage(x, pixels)
        return self.head(x.mean((1, 2))).astype(jnp.float32)


def convolve_by_matmul(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Any, **options: Any
) -> jax.Array:
    """jax.lax.conv_general_dilated for NHWC images, as one product with a matrix of patches.

    On CPUs, XLA runs the derivatives of convolutions many times slower inside of a
    loop, and so of a scan, than outside (https://github.com/jax-ml/jax/issues/12868).
    """
    height, width, _, outputs = kernel.shape
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    patches = [
        x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, outputs)


@flax.struct.dataclass
class State:
    """Everything that training changes: the variables of model and optimizer, and a key."""

    variables: Any
    key: jax.Array
    graph: Any = flax.struct.field(pytree_node=False)


def _to_dict(variables: Any) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(variables)}


def _from_dict(variables: Any, values: dict[str, jax.Array]) -> Any:
    return nnx.from_flat_state(
        [
            (path, variable.replace(values[".".join(map(str, path))]))
            for path, variable in nnx.to_flat_state(variables)
        ]
    )


# How a checkpoint names what is in an nnx.State.
serialization.register_serialization_state(nnx.State, _to_dict, _from_dict)


def train_step(
    state: State,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    *,
    axis_name: str | None = None,
) -> tuple[State, jax.Array]:
    """One step of the optimizer on one batch; returns the batch's mean cross-entropy as well."""
    model, optimizer = nnx.merge(state.graph, state.variables)

    def loss_fn(model: CNN) -> jax.Array:
        return cross_entropy(model(images, mask), labels, mask, axis_name)

    loss, grads = over_devices(nnx.value_and_grad(loss_fn)(model), axis_name)
    optimizer.update(model, grads)
    return State(nnx.state((model, optimizer)), state.key, state.graph), loss


def in_evaluation(state: State) -> CNN:
    """The model of a state, with running statistics and plain convolutions."""
    model: CNN = nnx.merge(state.graph, state.variables)[0]
    model.eval()
    set_convolution(model, jax.lax.conv_general_dilated)
    return model


def set_convolution(model: CNN, function: Any) -> None:
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Conv):
            module.conv_general_dilated = function


def model_logits(model: CNN, images: jax.Array) -> jax.Array:
    return jax.lax.map(lambda image: model(image)[0], images, batch_size=CHUNK)


def logits(state: State, images: jax.Array) -> jax.Array:
    return model_logits(in_evaluation(state), images)


def networks(settings: Any, dataset: Dataset, axis_name: str | None = None) -> dict[str, Network]:
    """The networks before training, with equal kernels and one order of the examples."""
    init_key, order_key = jax.random.split(jax.random.key(settings.seed))

    plain = _model(settings, dataset, False, init_key, axis_name)
    models = {"no-bn": plain}
    if settings.bn:
        models = {"bn": _model(settings, dataset, True, init_key, axis_name), **models}
        nnx.update(models["bn"], nnx.state(plain, lambda path, _: path[-1] == "kernel"))
    found = {}
    for name, model in models.items():
        if jax.default_backend() == "cpu":
            set_convolution(model, convolve_by_matmul)
        graph, variables = nnx.split((model, _optimizer(settings, model)))
        # Copies, as each state is donated with all of its buffers.
        state = jax.tree.map(jnp.copy, State(variables, order_key, graph))
        found[name] = Network(state, partial(train_step, axis_name=axis_name), logits)
    return found


def _model(
    settings: Any, dataset: Dataset, batch_norm: bool, key: jax.Array, axis_name: str | None
) -> CNN:
    assert dataset.shape is not None  # as the script has checked
    return CNN(
        dataset.shape,
        settings.channels,
        dataset.classes,
        residual=settings.residual,
        batch_norm=batch_norm,
        axis_name=axis_name,
        dtype=jnp.dtype(settings.dtype),
        rngs=nnx.Rngs(key),
    )


def _optimizer(settings: Any, model: CNN) -> nnx.Optimizer[CNN]:
    # The plain network has no scale and bias to spare.
    mask = partial(decay_mask, missing_ok=True)
    transform = optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=mask),
        optax.sgd(settings.learning_rate, momentum=0.9),
    )
    return nnx.Optimizer(model, transform, wrt=nnx.Param)

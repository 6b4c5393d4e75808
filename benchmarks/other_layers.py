"""The layers of keras and torch, behind the interface of layers.py."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from layers import EPSILON, Bnjax, Equinox, Haiku, Layer, Linen, Nnx, Options, Statistics


class Keras(Layer):
    name, module, package = "keras (jax)", "keras", "keras"

    def build(self, o: Options) -> Any:
        import keras

        policy = jnp.dtype(o.param_dtype).name
        if o.dtype is not None and o.dtype != o.param_dtype:
            policy = f"mixed_{jnp.dtype(o.dtype).name}"
        synchronized = {} if o.axis_name is None else {"synchronized": True}

        @functools.cache
        def layer(rank: int) -> Any:
            layer = keras.layers.BatchNormalization(
                o.axis, momentum=o.momentum, epsilon=EPSILON, dtype=policy, **synchronized
            )
            shape = [None] * rank
            shape[o.axis] = o.channels
            layer.build(tuple(shape))
            return layer

        self.layer = layer  # of a rank of x
        return (
            [v.value for v in layer(2).trainable_variables],
            [v.value for v in layer(2).non_trainable_variables],
        )

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        trained, carried = variables
        layer = self.layer(x.ndim)
        y, carried = layer.stateless_call(trained, carried, x, training=train, mask=mask)
        return y, (trained, carried)

    def running(self, variables: Any) -> Statistics:
        mean, var = variables[1]
        return np.asarray(mean), np.asarray(var)


class Torch(Layer):
    """Runs eagerly, as torch does; `variables` is not used."""

    name, module, package = "torch", "torch", "torch"
    unbiased = True

    def build(self, o: Options) -> Any:
        import torch

        class BatchNorm(torch.nn.BatchNorm1d):
            """Of any rank: BatchNorm2d differs in this check only."""

            def _check_input_dim(self, x: Any) -> None:
                pass

        self.torch = torch
        self.layer = BatchNorm(
            o.channels,
            eps=EPSILON,
            momentum=None if o.momentum is None else 1 - o.momentum,
            dtype=getattr(torch, jnp.dtype(o.param_dtype).name),
        )

    def tensor(self, x: Any) -> Any:
        if x.dtype == jnp.bfloat16:  # NumPy's is unknown to torch
            return self.tensor(np.asarray(x, np.float32)).bfloat16()
        return self.torch.from_numpy(np.array(x))

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        self.layer.train(bool(train))
        # With the channels last in memory, torch takes a view.
        x = x.movedim(self.options.axis, 1)
        y = self.layer(x, **({} if mask is None else {"mask": mask}))
        return y.movedim(1, self.options.axis), None

    def running(self, variables: Any) -> Statistics:
        return self.layer.running_mean.numpy(), self.layer.running_var.numpy()

    def step(self, x: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        return self._numpy(self.apply(None, self.tensor(x), True, mask)[0])

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        return self._numpy(self.apply(None, self.tensor(x), False)[0])

    def jvp(self, x: np.ndarray, dx: np.ndarray) -> np.ndarray:
        forward = self.torch.autograd.forward_ad
        with forward.dual_level():
            y, _ = self.apply(None, forward.make_dual(self.tensor(x), self.tensor(dx)))
            return self._numpy(forward.unpack_dual(y).tangent)

    def grad(self, x: np.ndarray, w: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        x = self.tensor(x).requires_grad_()
        return self._numpy(self._grad(x, w, mask, create_graph=False))

    def grad_grad(self, x: np.ndarray, w: np.ndarray, dx: np.ndarray) -> np.ndarray:
        x = self.tensor(x).requires_grad_()
        product = (self._grad(x, w, None, create_graph=True) * self.tensor(dx)).sum()
        return self._numpy(self.torch.autograd.grad(product, x)[0])

    def _grad(self, x: Any, w: np.ndarray, mask: Any, create_graph: bool) -> Any:
        loss = (self.tensor(w) * self.apply(None, x, True, mask)[0] ** 3).sum()
        return self.torch.autograd.grad(loss, x, create_graph=create_graph)[0]

    def residuals(self, x: Any) -> list[tuple[int, int]]:
        kept = {}

        def pack(tensor: Any) -> Any:
            kept[tensor.data_ptr()] = (tensor.numel(), tensor.element_size())
            return tensor

        with self.torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.apply(None, self.tensor(x).requires_grad_())
        return list(kept.values())

    def _numpy(self, tensor: Any) -> np.ndarray:
        if tensor.dtype == self.torch.bfloat16:
            return tensor.detach().float().numpy().astype(jnp.bfloat16)
        return tensor.detach().numpy()


LAYERS: list[type[Layer]] = [Bnjax, Linen, Nnx, Haiku, Equinox, Keras, Torch]

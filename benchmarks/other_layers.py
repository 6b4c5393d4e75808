"""The layers of keras and torch, behind the interface of layers.py."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from layers import EPSILON, Bnjax, Equinox, Haiku, Layer, Linen, Nnx, Statistics


class Keras(Layer):
    name, module, package = "keras (jax)", "keras", "keras"

    def __init__(
        self,
        channels: int,
        momentum: Any = 0.9,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        axis_name: Any = None,
    ) -> None:
        import keras

        policy = jnp.dtype(param_dtype).name
        if dtype is not None and dtype != param_dtype:
            policy = f"mixed_{jnp.dtype(dtype).name}"
        synchronized = {} if axis_name is None else {"synchronized": True}
        self.layer = keras.layers.BatchNormalization(
            momentum=momentum, epsilon=EPSILON, dtype=policy, **synchronized
        )
        self.layer.build((None, channels))
        self.variables = (
            [v.value for v in self.layer.trainable_variables],
            [v.value for v in self.layer.non_trainable_variables],
        )

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        trained, carried = variables
        y, carried = self.layer.stateless_call(trained, carried, x, training=train, mask=mask)
        return y, (trained, carried)

    def running(self, variables: Any) -> Statistics:
        mean, var = variables[1]
        return np.asarray(mean), np.asarray(var)


class Torch(Layer):
    """Runs eagerly, as torch does; `variables` is not used."""

    name, module, package = "torch", "torch", "torch"
    unbiased = True

    def __init__(
        self,
        channels: int,
        momentum: Any = 0.9,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        axis_name: Any = None,
    ) -> None:
        import torch

        self.torch = torch
        self.layer = torch.nn.BatchNorm1d(
            channels,
            eps=EPSILON,
            momentum=None if momentum is None else 1 - momentum,
            dtype=getattr(torch, jnp.dtype(param_dtype).name),
        )
        self.variables = None

    def tensor(self, x: Any) -> Any:
        if x.dtype == jnp.bfloat16:  # NumPy's is unknown to torch
            return self.tensor(np.asarray(x, np.float32)).bfloat16()
        return self.torch.from_numpy(np.array(x))

    def apply(self, variables: Any, x: Any, train: Any = True, mask: Any = None) -> Any:
        self.layer.train(bool(train))
        return self.layer(x, **({} if mask is None else {"mask": mask})), None

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

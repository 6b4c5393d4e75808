"""Trains a layer of each framework and writes what came out, for tests/test_interop*.py.

    python tests/golden/make_interop.py [CASE ...]

Needs the packages of the `benchmarks` extra. The network is y = batch_norm(W x) over
[N, C, L], the loss mean((y - target)**2); W, scale and bias are trained by gradient
descent. Three steps make the checkpoint, five more are what bnjax has to repeat.
Writes interop/CASE.json, and interop/data.json where it is missing.
"""

import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FOLDER = pathlib.Path(__file__).parent / "interop"
WARM_UP, STEPS, RATE = 3, 5, 0.1


class Peer(NamedTuple):
    """A network in some framework; `step` trains and returns (network, y)."""

    version: str
    start: Callable[[np.ndarray], Any]
    step: Callable[[Any, np.ndarray, np.ndarray], tuple[Any, Any]]
    evaluate: Callable[[Any, np.ndarray], Any]
    arrays: Callable[[Any], dict[str, Any]]  # "W", and the layer's in its framework's names


def load(name: str) -> Any:
    """A golden file; numbers with a point are float32."""

    def arrays(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: arrays(v) for key, v in value.items()}
        if isinstance(value, list):
            return np.array(value, np.float32)
        return np.array(value) if isinstance(value, int) else value

    return arrays(json.loads((FOLDER / f"{name}.json").read_text()))


def save(name: str, record: dict[str, Any]) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, str):
            return value
        value = np.asarray(value)
        if value.dtype.kind in "iu":
            return value.tolist()
        # Nine digits name every float32.
        return np.array([float(f"{v:.9g}") for v in value.flat]).reshape(value.shape).tolist()

    lines = (f"{json.dumps(key)}: {json.dumps(plain(value))}" for key, value in record.items())
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def data() -> dict[str, np.ndarray]:
    """x and target of all steps, [8, N, 3, L], and the first W, [3, 3]."""
    rng = np.random.default_rng(0)
    shape = (WARM_UP + STEPS, 4, 3, 2)
    return {
        "x": rng.normal(1, 2, shape).round(3),
        "target": rng.normal(0, 1, shape).round(3),
        "W": (rng.normal(0, 0.05, (3, 3))).round(4),
    }


def record(peer: Peer, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a network does: the checkpoint, y of the steps after it, the arrays at the end."""
    net, outputs = peer.start(given["W"]), []
    batches = list(zip(given["x"], given["target"], strict=True))
    for batch in batches[:WARM_UP]:
        net, _ = peer.step(net, *batch)
    result = {"made with": peer.version, "checkpoint": peer.arrays(net)}
    result["evaluated"] = np.array(peer.evaluate(net, given["x"][0]))
    for batch in batches[WARM_UP:]:
        net, y = peer.step(net, *batch)
        outputs.append(np.array(y))
    return {
        **result,
        "y": np.stack(outputs),
        "end": peer.arrays(net),
        "evaluated at the end": np.array(peer.evaluate(net, given["x"][0])),
    }


def project(w: Any, x: Any) -> Any:
    return jnp.einsum("ncl,cd->ndl", x, w)


def jax_step(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Gradient descent; `apply(params, state, h, train) -> (y, state)`."""

    @jax.jit
    def step(net: Any, x: Any, target: Any) -> Any:
        def loss(trained: Any) -> Any:
            y, state = apply(trained[1], net[1], project(trained[0], x), True)
            return jnp.mean((y - target) ** 2), (y, state)

        grads, (y, state) = jax.grad(loss, has_aux=True)(net[0])
        return (jax.tree.map(lambda v, g: v - RATE * g, net[0], grads), state), y

    return step


def jax_peer(version: str, params: Any, state: Any, apply: Any, arrays: Any) -> Peer:
    return Peer(
        version,
        lambda w: ((jnp.asarray(w), params), state),
        jax_step(apply),
        lambda net, x: apply(net[0][1], net[1], project(net[0][0], x), False)[0],
        lambda net: {"W": np.array(net[0][0]), **arrays(net[0][1], net[1])},
    )


def resume(
    apply: Callable[..., Any], params: Any, state: Any, w: Any, given: dict[str, np.ndarray]
) -> tuple[dict[str, Any], tuple[Any, Any, Any]]:
    """`record` from the checkpoint on, by `apply(params, state, h, train)`; (W, params, state)."""
    peer = jax_peer("", params, state, apply, lambda params, state: {})
    net, outputs = peer.start(w), []
    result = {"evaluated": peer.evaluate(net, given["x"][0])}
    for x, target in zip(given["x"][WARM_UP:], given["target"][WARM_UP:], strict=True):
        net, y = peer.step(net, x, target)
        outputs.append(y)
    result |= {"y": np.stack(outputs), "evaluated at the end": peer.evaluate(net, given["x"][0])}
    return result, (*net[0], net[1])


def torch_peer(**options: Any) -> Peer:
    import torch

    def start(w: np.ndarray) -> Any:
        w = torch.tensor(w, requires_grad=True)
        return w, torch.nn.BatchNorm1d(3, **options)

    def step(net: Any, x: np.ndarray, target: np.ndarray) -> Any:
        w, layer = net
        layer.train()
        trained = [w, *layer.parameters()]
        y = layer(torch.einsum("ncl,cd->ndl", torch.from_numpy(x), w))
        grads = torch.autograd.grad(((y - torch.from_numpy(target)) ** 2).mean(), trained)
        with torch.no_grad():
            for value, grad in zip(trained, grads, strict=True):
                value -= RATE * grad
        return net, y.detach().numpy()

    def evaluate(net: Any, x: np.ndarray) -> Any:
        w, layer = net
        layer.eval()
        with torch.no_grad():
            return layer(torch.einsum("ncl,cd->ndl", torch.from_numpy(x), w)).numpy()

    def arrays(net: Any) -> dict[str, Any]:
        found = {"W": net[0], **net[1].state_dict()}
        return {name: value.detach().numpy().copy() for name, value in found.items()}

    return Peer(f"torch {torch.__version__}", start, step, evaluate, arrays)


def keras_peer(**options: Any) -> Peer:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    layer = keras.layers.BatchNormalization(axis=1, **options)
    layer.build((None, 3, 2))
    names = [v.name for v in layer.variables]
    first = [v.value for v in layer.trainable_variables]
    state = [v.value for v in layer.non_trainable_variables]

    def apply(params: Any, state: Any, h: Any, train: bool) -> Any:
        return layer.stateless_call(params, state, h, training=train)

    def arrays(params: Any, state: Any) -> dict[str, Any]:
        return {k: np.array(v) for k, v in zip(names, [*params, *state], strict=True)}

    return jax_peer(f"keras {keras.__version__}", first, state, apply, arrays)


def haiku_peer(**options: Any) -> Peer:
    import haiku as hk

    net = hk.transform_with_state(
        lambda h, train: hk.BatchNorm(data_format="channels_first", **options)(h, train)
    )
    params, state = net.init(jax.random.key(0), jnp.ones((4, 3, 2)), True)

    def apply(params: Any, state: Any, h: Any, train: bool) -> Any:
        return net.apply(params, state, None, h, train)

    def arrays(params: Any, state: Any) -> dict[str, Any]:
        return jax.tree.map(np.array, {"params": dict(params), "state": dict(state)})

    return jax_peer(f"dm-haiku {hk.__version__}", params, state, apply, arrays)


def equinox_peer(**options: Any) -> Peer:
    import equinox as eqx

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", **options)

    def with_params(params: Any) -> Any:
        return eqx.tree_at(lambda m: (m.weight, m.bias), layer, params, is_leaf=lambda v: v is None)

    def apply(params: Any, state: Any, h: Any, train: bool) -> Any:
        module = eqx.nn.inference_mode(with_params(params), not train)
        mapped = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return mapped(h, state)

    def arrays(params: Any, state: Any) -> dict[str, Any]:
        marks = ("batch_counter", "batch_state_index", "ema_first_time_index", "ema_state_index")
        indices = {mark: getattr(layer, mark) for mark in marks}
        found = {k: state.get(v) for k, v in indices.items() if v is not None}
        found |= {k: v for k, v in zip(("weight", "bias"), params, strict=True) if v is not None}
        found = {k: np.array(v) for k, v in found.items()}
        return {k: v.astype(int) if v.dtype == bool else v for k, v in found.items()}

    first = (layer.weight, layer.bias)
    return jax_peer(f"equinox {eqx.__version__}", first, state, apply, arrays)


CASES: dict[str, Callable[[], Peer]] = {
    "torch": torch_peer,
    "torch_cumulative": lambda: torch_peer(momentum=None, eps=1e-3),
    "keras": keras_peer,
    "haiku": lambda: haiku_peer(create_scale=True, create_offset=True, decay_rate=0.9),
    "equinox": lambda: equinox_peer(momentum=0.9, mode="batch"),
    "equinox_ema": lambda: equinox_peer(momentum=0.9, mode="ema"),
}


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    if not (FOLDER / "data.json").exists():
        save("data", data())
    for name in names or CASES:
        save(name, record(CASES[name](), load("data")))


if __name__ == "__main__":
    main(sys.argv[1:])

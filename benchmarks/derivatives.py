"""Error of the derivatives, for float32 inputs of a large mean.

    python benchmarks/derivatives.py

Writes results/derivatives.csv: bnjax, flax.linen, and the plain formula with a
centred two-pass variance under JAX's own differentiation, all in float32, against
that formula in float64. Errors are relative to the largest entry of the truth;
for the derivative along dx = x, which is nearly 0, they are absolute.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from layers import EPSILON, Bnjax, Linen, available

jax.config.update("jax_enable_x64", True)  # for the truth; float32 inputs stay float32

MEANS = (0, 10, 100, 1e3, 1e4)  # in standard deviations
SHAPE = (2000, 64)
Function = Callable[..., jax.Array]


def two_pass(x: jax.Array) -> jax.Array:
    centred = x - x.mean(0)
    return centred * jax.lax.rsqrt((centred * centred).mean(0) + EPSILON)


def quantities(f: Function, dtype: Any, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    x, w, t = (jnp.asarray(data[name], dtype) for name in ("x", "w", "t"))

    def loss(x: jax.Array) -> jax.Array:
        y = f(x)
        return (y * w + 0.1 * y**3).sum()

    def along(g: Function, dx: jax.Array) -> np.ndarray:
        return np.asarray(jax.jit(lambda x, dx: jax.jvp(g, (x,), (dx,))[1])(x, dx), np.float64)

    return {
        "jvp, random dx": along(f, t),
        "jvp, dx = x": along(f, x),
        "gradient": np.asarray(jax.jit(jax.grad(loss))(x), np.float64),
        "Hessian times random dx": along(jax.grad(loss), t),
        "Hessian times x": along(jax.grad(loss), x),
    }


def candidates() -> dict[str, Function]:
    result: dict[str, Function] = {"two-pass": two_pass}
    for layer in available([Bnjax, Linen]):
        instance = layer(SHAPE[1])
        result[layer.name] = lambda x, i=instance: i.apply(i.variables, x)[0]
    return dict(sorted(result.items()))


def main() -> None:
    rng, rows = np.random.default_rng(0), []
    noise, w, t = rng.standard_normal((3, *SHAPE))
    functions = candidates()
    for mean in MEANS:
        data = {"x": (noise + mean).astype(np.float32), "w": w, "t": t}
        data = {name: value.astype(np.float32) for name, value in data.items()}
        truth = quantities(two_pass, np.float64, data)
        measured = {name: quantities(f, np.float32, data) for name, f in functions.items()}
        for quantity, right in truth.items():
            size = 1.0 if quantity == "jvp, dx = x" else np.abs(right).max()
            cells = {
                name: f"{np.abs(values[quantity] - right).max() / size:.1e}"
                for name, values in measured.items()
            }
            rows.append({"mean": f"{mean:g}", "quantity": quantity, **cells})
    results.write("derivatives", rows)


if __name__ == "__main__":
    main()

"""How often more than one pass over the data runs while the example trains.

    python benchmarks/corrections.py
    python benchmarks/corrections.py --data mnist --data-dir DIR

Trains the network of examples/train_mlp.py with its default settings, but for batches
of 128 (a batch of fewer than 64 entries never needs another pass), and makes the
first pass over the input of each BatchNorm at each step once more: another pass runs
where it leaves a channel ill-conditioned. Beside it, what would be if the sums were
taken about 0 instead of the running mean. Writes results/corrections.csv, in which
the rows of other data sets stay.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import data
from train_mlp import Settings, TrainState, create_states, train_step
from training import batch_indices

from bnjax import _moments, _sums
from bnjax._reduce import Reduction

BATCH = 128


def condition(x: jax.Array, near: jax.Array) -> jax.Array:
    """offset**2 / var of each channel, as the first pass finds them."""
    if _sums.are_few(Reduction((0,)), x, None):
        raise ValueError(f"Batches of {len(x)} are summed in another way.")
    first = _moments._pass(Reduction((0,)), x, None, near)
    return first.offset**2 / first.var


def observed_step(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, list[tuple[jax.Array, jax.Array]]]:
    """A training step; for each BatchNorm the conditions about running mean and 0."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    _, captured = state.apply_fn(
        variables,
        images,
        train=True,
        capture_intermediates=True,
        mutable=["batch_stats", "intermediates"],
    )
    conditions = []
    for i in range(len(state.batch_stats)):
        # Dense_i is the layer before BatchNorm_i; the last one has none behind it.
        x = captured["intermediates"][f"Dense_{i}"]["__call__"][0]
        running = state.batch_stats[f"BatchNorm_{i}"]["mean"]
        conditions.append((condition(x, running), condition(x, jnp.zeros_like(running))))
    return train_step(state, images, labels)[0], conditions


def observe(settings: Settings) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each layer both conditions of all channels at all steps, [steps, C]."""
    dataset = data.load(settings.data, settings.data_dir)
    state = create_states(settings, dataset, {"bn": True})["bn"]
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    batches = batch_indices(
        state.key,
        len(labels),
        jnp.int32(0),
        jnp.int32(0),
        steps=settings.steps,
        batch_size=settings.batch_size,
    )

    @jax.jit
    def train(state: Any, batches: jax.Array) -> Any:
        def body(state: Any, batch: jax.Array) -> Any:
            return observed_step(state, images[batch], labels[batch])

        return jax.lax.scan(body, state, batches)[1]

    return [(np.asarray(near), np.asarray(zero)) for near, zero in train(state, batches)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    settings = Settings(data=arguments.data, data_dir=arguments.data_dir, batch_size=BATCH)
    rows: list[dict[str, Any]] = []
    if (results.RESULTS / "corrections.csv").exists():
        rows = [row for row in results.read("corrections")[0] if row["data"] != settings.data]
    for number, (near, zero) in enumerate(observe(settings), start=1):
        more, about_zero = (~(c <= _sums.WELL_CONDITIONED) for c in (near, zero))
        rows.append(
            {
                "data": settings.data,
                "layer": number,
                "steps": len(near),
                "steps with another pass": f"{more.any(1).mean():.1%}",
                "after the first tenth": f"{more[len(more) // 10 :].any(1).mean():.1%}",
                "steps, if about 0": f"{about_zero.any(1).mean():.1%}",
                "largest mean / deviation": f"{np.sqrt(zero.max()):.1f}",
            }
        )
    results.write("corrections", rows)


if __name__ == "__main__":
    main()

"""bnjax.diagnostics.untrained; and how long a report takes."""

import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import diagnostics


class TestUntrained:
    """`untrained`, of all trees that hold running statistics."""

    def test_functional(self):
        params, state = bnjax.bn_init(2)
        _, learned = bnjax.bn_apply(params, state, jnp.ones((4, 2)), train=True)
        part = state._replace(count=jnp.array([0, 3]))
        tree = {"old": learned, "new": [state], "part": part}
        assert diagnostics.untrained(tree) == ("new/0", "part")
        assert diagnostics.untrained(learned) == ()

    @pytest.mark.parametrize("layer", [bnjax.linen.BatchNorm, nn.BatchNorm])
    def test_linen(self, layer):
        variables = layer(True).init(jax.random.key(0), jnp.ones((4, 2)))
        new = {"params": {}, "batch_stats": {"a": variables["batch_stats"]}}
        assert diagnostics.untrained(new) == ("a",)
        old = {"mean": np.zeros(2), "var": np.array([1, 1.5])}
        assert diagnostics.untrained({"batch_stats": {"a": old}}) == ()

    @pytest.mark.parametrize("layer", [bnjax.nnx.BatchNorm, nnx.BatchNorm])
    def test_nnx(self, layer):
        class Model(nnx.Module):
            def __init__(self):
                rngs = nnx.Rngs(0)
                self.norms = nnx.List([layer(2, rngs=rngs), layer(2, rngs=rngs)])
                self.dropout = nnx.Dropout(0.5, rngs=rngs)

        model = Model()
        model.norms[0].mean[...] = jnp.ones(2)
        for tree in (model, nnx.state(model), nnx.to_pure_dict(nnx.state(model))):
            assert diagnostics.untrained(tree) == ("norms/1",)

    def test_what_it_refuses(self):
        state = bnjax.bn_init(2)[1]
        with pytest.raises(ValueError, match=r"must hold running statistics.* Fix"):
            diagnostics.untrained({"params": {"scale": np.ones(2)}})
        with pytest.raises(TypeError, match="needs values, got traced statistics at 'a'"):
            jax.jit(lambda s: diagnostics.untrained({"a": s}))(state)


def fifty_layers(variables, x):
    """As blocks of ten, which compile sooner."""

    def layer(x, own):
        norm, kernel = own
        y, state = bnjax.bn_apply(*norm, x @ kernel, False)
        return jax.nn.relu(y), ((norm[0], state), kernel)

    updated = []
    for block in variables:
        x, new = jax.lax.scan(layer, x, block)
        updated.append(new)
    return x, updated


def test_report_takes_no_longer_than_five_forward_passes():
    layers, width, size = 10, 256, 512
    kernels = np.random.default_rng(0).normal(0, 0.1, (layers, width, width)).astype(np.float32)
    norm = jax.tree.map(lambda v: jnp.stack([v] * layers), bnjax.bn_init(width))
    variables = [(norm, jnp.asarray(kernels))] * 5
    x = np.random.default_rng(0).normal(0, 1, (size, width)).astype(np.float32)
    forward = jax.jit(lambda variables, x: fifty_layers(variables, x)[0])

    def taken(function, *arguments):
        start = time.process_time()
        jax.block_until_ready(function(*arguments))
        return time.process_time() - start

    def report():
        return [r.mean_gap for r in diagnostics.report(fifty_layers, variables, x).records]

    taken(forward, variables, x), taken(report)
    ratios = [taken(report) / taken(forward, variables, x) for _ in range(9)]
    assert statistics.median(ratios) <= 5, ratios

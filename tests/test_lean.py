"""The checkpoint policies: what is kept, what is computed twice, and that results stay."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark_scripts import hlo
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import BNParams, BNState

N, C, DEPTH = 64, 4, 3
POLICIES = {"inputs": bnjax.save_inputs, "moments": bnjax.save_moments}
NORMS = {
    "batch_norm": bnjax.batch_norm(momentum=0.5),
    "ghost": bnjax.ghost(4, momentum=0.5),
    "renorm": bnjax.renorm(momentum=0.5),
    "microbatches": bnjax.microbatches(2, momentum=0.5),
    "whiten": bnjax.whiten(2, momentum=0.5),
}


def network(norm, key=0, **options):
    """Parameters, states and a stack of products, norms and activations with a way around."""
    rng = np.random.default_rng(key)
    params, states = [], []
    for _ in range(DEPTH):
        of_norm, state = norm.init(C)
        of_norm = BNParams(*(v + rng.normal(0, 0.3, C).astype(np.float32) for v in of_norm))
        params.append((jnp.asarray(rng.normal(size=(C, C)), jnp.float32), of_norm))
        states.append(state)

    def apply(params, states, x):
        new = []
        for (w, of_norm), state in zip(params, states, strict=True):
            y, state = norm.apply(of_norm, state, x @ w, True, **options)
            x = jnp.tanh(y + x)
            new.append(state)
        return x, new

    return params, states, apply


def data(key=1):
    x, w = np.random.default_rng(key).normal(size=(2, N, C)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(w)


def loss(apply, states, w, params, x):
    y, states = apply(params, states, x)
    return jnp.sum(y * w), states


def full_size(function, *args):
    """The arrays of the size of x that the backward pass keeps, without arguments.

    By their values: outside of jit nested functions return one array more than once.
    """
    given = {v.tobytes() for v in jax.tree.leaves(args)}
    leaves = jax.tree.leaves(jax.vjp(function, *args)[1])
    kept = {v.tobytes(): v for v in leaves if v.size >= N * C}
    return [v for key, v in kept.items() if key not in given]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NORMS)
def test_same_results(name, policy):
    """Loss, running statistics, which learn once, and gradients: to rounding, and under jit."""
    params, states, apply = network(NORMS[name])
    x, w = data()
    lean = jax.checkpoint(apply, policy=POLICIES[policy])

    def gradients(apply):
        function = jax.value_and_grad(functools.partial(loss, apply, states, w), (0, 1), True)
        return jax.jit(function)(params, x)

    chex.assert_trees_all_close(gradients(lean), gradients(apply), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mode", ["jvp", "Hessian", "vmap", "traced train", "mask", "inference"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_mode(policy, mode):
    x, w = data()
    options = {"mask": jnp.asarray(np.arange(N)[:, None] % 3 > 0)} if mode == "mask" else {}
    params, states, apply = network(NORMS["batch_norm"], **options)
    if mode in ("traced train", "inference"):
        params, states, apply = of_flag(mode == "inference")

    def result(apply):
        def f(params, x):
            return loss(apply, states, w, params, x)[0]

        if mode == "jvp":
            return jax.jvp(f, (params, x), (params, w))
        if mode == "Hessian":
            return jax.jvp(jax.grad(f, (0, 1)), (params, x), (params, w))
        if mode == "vmap":
            return jax.vmap(jax.grad(f), (None, 0))(params, jnp.stack([x, 2 * x + w]))
        return jax.grad(f, (0, 1))(params, x)

    lean = jax.checkpoint(apply, policy=POLICIES[policy])
    expected, found = (jax.jit(functools.partial(result, a))() for a in (apply, lean))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def of_flag(inference):
    norm = NORMS["batch_norm"]
    params, state = norm.init(C)

    def apply(params, states, x):
        train = False if inference else x[0, 0] < 1e9
        y, state = norm.apply(params, states, jnp.sin(x), train)
        return jnp.tanh(y), state

    return params, state, apply


@pytest.mark.parametrize("name", NORMS)
def test_what_is_kept(name):
    """One array a layer with `save_inputs`, none with `save_moments`; two or three without."""
    params, states, apply = network(NORMS[name])
    x, _ = data()

    def kept(policy):
        f = apply if policy is None else jax.checkpoint(apply, policy=policy)
        return full_size(lambda p, x: f(p, states, x)[0], params, x)

    assert len(kept(bnjax.save_inputs)) == DEPTH
    assert kept(bnjax.save_moments) == []
    assert len(kept(None)) >= 2 * DEPTH


def test_kept_in_its_own_dtype():
    params, states, apply = network(NORMS["batch_norm"])
    x, _ = data()
    lean = jax.checkpoint(apply, policy=bnjax.save_inputs)
    params = [(w.astype(jnp.bfloat16), p) for w, p in params]
    found = full_size(lambda p, x: lean(p, states, x)[0], params, x.astype(jnp.bfloat16))
    assert {a.dtype for a in found} == {jnp.dtype(jnp.bfloat16)}


def sums(jaxpr):
    """Sums in it, and in all that it calls, of arrays of two axes: over the batch."""
    count = 0
    for equation in jaxpr.eqns:
        operands = [v.aval for v in equation.invars]
        count += equation.primitive.name == "reduce_sum" and operands[0].ndim == 2
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            count += sums(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize("way", ["jit", "shard_map", "check_vma"])
@pytest.mark.parametrize("policy", POLICIES)
def test_all_reduces(policy, way, devices):
    """Recomputation makes none: one forward and one backward for each layer."""
    norm = NORMS["batch_norm"]
    mapped = way != "jit"
    params, states, apply = network(norm, **({"axis_name": "i"} if mapped else {}))
    mesh = jax.make_mesh(
        (4,), ("i",), devices=devices[:4], axis_types=(jax.sharding.AxisType.Auto,)
    )
    x, _ = data()

    def step(apply, params, x):
        (_, new), grads = jax.value_and_grad(
            lambda x: loss(apply, states, 1.0, params, x), has_aux=True
        )(x)
        return grads, new

    def program(apply):
        function = functools.partial(step, apply)
        if mapped:
            function = jax.shard_map(
                function,
                mesh=mesh,
                in_specs=(P(), P("i")),
                out_specs=(P("i"), P()),
                check_vma=way == "check_vma",
            )
        sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("i")))
        lowered = jax.jit(function).lower(params, sharded)
        compiled = lowered.compile()
        reduces = [c for c in hlo.collectives(compiled.as_text()) if c.place == "always"]
        # Before XLA, which on the CPU finds what is computed twice in spite of barriers.
        written = sums(jax.make_jaxpr(function)(params, sharded).jaxpr)
        return len(reduces), written, compiled(params, sharded)

    expected, found = program(apply), program(jax.checkpoint(apply, policy=POLICIES[policy]))
    assert found[0] == expected[0] == 2 * DEPTH
    assert found[1] == expected[1]
    chex.assert_trees_all_close(found[2], expected[2], rtol=2e-5, atol=2e-6)


def test_in_a_scan():
    """As JAX advises there, with prevent_cse=False."""
    params, states, apply = network(NORMS["batch_norm"])
    x, w = data()
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *zip(params, states, strict=True))

    def layers(wrap):
        def body(x, layer):
            y, new = apply([layer[0]], [layer[1]], x)
            return y, new[0]

        def f(x):
            y, new = lax.scan(wrap(body), x, stacked)
            return jnp.sum(y * w), new

        return jax.jit(jax.value_and_grad(f, has_aux=True))(x)

    lean = functools.partial(jax.checkpoint, policy=bnjax.save_inputs, prevent_cse=False)
    chex.assert_trees_all_close(layers(lean), layers(lambda f: f), rtol=2e-5, atol=2e-6)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(bnjax.linen.BatchNorm(use_running_average=False)(nn.Dense(C)(x)))
        return x


def test_linen():
    """nn.remat: same variables, same results, one array a layer."""
    x, w = data()
    plain, lean = Linen(), nn.remat(Linen, policy=bnjax.save_inputs)()
    variables = plain.init(jax.random.key(0), x)
    chex.assert_trees_all_equal(variables, lean.init(jax.random.key(0), x))

    def f(model, params):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        y, new = model.apply(given, x, mutable=["batch_stats"])
        return jnp.sum(y * w), new

    expected, found = (
        jax.jit(jax.value_and_grad(functools.partial(f, model), has_aux=True))(variables["params"])
        for model in (plain, lean)
    )
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-6)
    kept = full_size(lambda p: f(lean, p)[0], variables["params"])
    assert len([a for a in kept if a.shape == (N, C)]) <= 4  # of two layers, w, and x


def test_nnx():
    x, w = data()

    class Model(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(C, C, rngs=nnx.Rngs(0))
            self.norm = bnjax.nnx.BatchNorm(C, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.relu(self.norm(self.dense(x)))

    def run(wrap):
        model = Model()
        apply = wrap(lambda model, x: model(x))
        grads = nnx.jit(nnx.grad(lambda model: jnp.sum(apply(model, x) * w)))(model)
        return nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    lean = run(functools.partial(nnx.remat, policy=bnjax.save_inputs))
    chex.assert_trees_all_close(lean, run(lambda f: f), rtol=2e-5, atol=2e-6)


def test_beside_other_names():
    """A policy of one's own: these names and others."""
    both = jax.checkpoint_policies.save_only_these_names("bnjax_input", "bnjax_moments", "mine")
    either = jax.checkpoint_policies.save_from_both_policies(
        bnjax.save_inputs, jax.checkpoint_policies.save_only_these_names("mine")
    )
    params, state = bnjax.bn_init(C)
    x, _ = data()

    def layer(x):
        y, _ = bnjax.bn_apply(params, state, jnp.sin(x), True)
        return jnp.sin(checkpoint_name(jnp.cos(y), "mine"))

    for policy in (both, either):
        assert len(full_size(jax.checkpoint(layer, policy=policy), x)) == 2


def test_shapes_of_states_are_kept():
    """A lean step can be carried by a loop."""
    params, states, apply = network(NORMS["batch_norm"])
    x, _ = data()
    lean = jax.checkpoint(apply, policy=bnjax.save_inputs)
    new = jax.eval_shape(lambda: lean(params, states, x)[1])
    assert isinstance(new[0], BNState)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, states)

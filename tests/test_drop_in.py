"""A ResNet-18 and an MLP of flax with only the import changed: the same trees, the same numbers.

The truth is the model with flax's layers in float64. What bnjax may err is what flax errs in
float32, since nothing else of the two programs differs.
"""

import chex
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
import tolerances
from flax import linen as nn

import bnjax.linen
import bnjax.nnx

SEEDS, STEPS = 7, 2
OPTIMIZER = optax.sgd(0.01, momentum=0.9)
# Where the truth of a leaf can be stored without error, an error of its own in each.
FLOOR = 4 * tolerances.unit(np.float32)


@pytest.fixture(params=models.ALL)
def pair(request):
    """The model with flax's layers, and with bnjax's."""
    return tuple(module.ALL[request.param]() for module in (models, models.with_bnjax()))


def test_only_the_import_is_changed():
    changed = models.with_bnjax()
    assert changed.LinenBatchNorm is bnjax.linen.BatchNorm
    assert changed.NNXBatchNorm is bnjax.nnx.BatchNorm
    assert (changed.nn, changed.nnx) == (models.nn, models.nnx)


def test_same_tree(pair):
    """Paths, types of variables and their metadata, shapes and dtypes."""
    theirs, ours = (jax.eval_shape(model.init, jax.random.key(0)) for model in pair)
    chex.assert_trees_all_equal_structs(ours, theirs)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    paths = [[path for path, _ in jax.tree.leaves_with_path(tree)] for tree in (ours, theirs)]
    assert paths[0] == paths[1]
    assert len(jax.tree.leaves(ours)) in (14, 102)
    x = jnp.ones(pair[0].x_shape)
    for train in (True, False):
        results = [
            jax.eval_shape(lambda v, m=model, t=train: m.apply(v, x, t), theirs) for model in pair
        ]
        chex.assert_trees_all_equal_shapes_and_dtypes(*results)
        chex.assert_trees_all_equal_structs(*results)


@pytest.mark.parametrize("name", ["linen MLP", "nnx MLP"])
def test_same_initial_values(name):
    """As the layers draw the same random numbers, so do those that come after them."""
    variables = [
        module.ALL[name]().init(jax.random.key(7)) for module in (models, models.with_bnjax())
    ]
    chex.assert_trees_all_equal(*variables)


def draw(tree, rng):
    """Variables as training leaves them."""

    def leaf(path, like):
        name = jax.tree_util.keystr(path)
        noise = rng.normal(size=like.shape)
        if "var" in name:
            return np.exp(0.3 * noise).astype(like.dtype)
        if "kernel" in name:
            noise = noise * np.sqrt(2 / np.prod(like.shape[:-1]))
        return ((1.0 if "scale" in name else 0.0) + 0.3 * noise).astype(like.dtype)

    return jax.tree.map_with_path(leaf, tree)


def training_step(model):
    """(variables, optimizer's state, x, labels) -> the next ones, and what there is to see."""

    def step(variables, opt_state, x, labels):
        def loss(params):
            y, stats = model.apply({**variables, "params": params}, x, True)
            values = optax.softmax_cross_entropy_with_integer_labels(y, labels)
            return values.mean(), (y, stats)

        grads, (y, stats) = jax.grad(loss, has_aux=True)(variables["params"])
        evaluated, kept = model.apply(variables, x, False)
        updates, opt_state = OPTIMIZER.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        seen = {"y": y, "evaluated": evaluated, "kept": kept, "grads": grads, "batch_stats": stats}
        return {"params": params, "batch_stats": stats}, opt_state, seen

    return step


def runs(model, variables, xs, labels, **options):
    """By seed, what some steps of training show."""
    start = OPTIMIZER.init(variables[0]["params"])
    args = (variables[0], start, xs[0, 0], labels[0, 0])
    step = jax.jit(training_step(model)).lower(*args).compile(options)
    found = []
    for tree, batches, targets in zip(variables, xs, labels, strict=True):
        opt_state, seen = start, []
        for x, target in zip(batches, targets, strict=True):
            tree, opt_state, new = step(tree, opt_state, x, target)
            seen.append(new)
        found.append(jax.tree.map(np.asarray, (seen, tree)))
    return found


def errors(found, truth):
    """By leaf, the median over the seeds of the error's norm, in units of the truth's.

    Where rounding turns the sign of a relu's argument, its derivative jumps: that is
    as likely in the one as in the other, and rare, so that the median leaves it out.
    """

    def relative(ours, wanted):
        wanted = np.asarray(wanted, np.float64)
        assert np.any(wanted), "nothing to compare"
        return np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)

    by_seed = [
        jax.tree.map(relative, ours, wanted) for ours, wanted in zip(found, truth, strict=True)
    ]
    return jax.tree.map(lambda *leaves: float(np.median(leaves)), *by_seed)


def test_same_numbers(pair):
    """y in training and evaluation, gradients, statistics, parameters, over steps of training."""
    rng = np.random.default_rng(0)
    shape = (SEEDS, STEPS, *pair[0].x_shape)
    xs = rng.normal(1, 2, shape).astype(np.float32)
    labels = rng.integers(0, 10, shape[:3])
    abstract = jax.eval_shape(pair[0].init, jax.random.key(0))
    variables = [draw(abstract, rng) for _ in range(SEEDS)]
    theirs, ours = (runs(model, variables, xs, labels) for model in pair)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), (variables, xs))
        # The reference is compiled without LLVM's optimizations, which is faster.
        truth = runs(pair[0], *wide, labels, xla_backend_optimization_level=0)
    chex.assert_trees_all_equal_dtypes(ours, theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(truth)} == {np.dtype(np.float64)}
    for found, tree in zip(ours, variables, strict=True):
        chex.assert_trees_all_equal(found[0][0]["kept"], tree["batch_stats"])
    found, allowed = (jax.tree.leaves_with_path(errors(run, truth)) for run in (ours, theirs))
    for (path, our), (_, their) in zip(found, allowed, strict=True):
        bound = tolerances.TIMES_TWO_PASS * their + FLOOR
        name = jax.tree_util.keystr(path)
        assert our <= bound, f"{name}: bnjax errs by {our:.2g}, flax by {their:.2g}"


NORMS = (bnjax.linen.BatchNorm, nn.BatchNorm)
X = np.random.default_rng(0).normal(3, 2, (16, 8)).astype(np.float32)


def same_variables(module, *args):
    ours, theirs = (module(norm).init(jax.random.key(0), X, *args) for norm in NORMS)
    chex.assert_trees_all_equal_structs(ours, theirs)
    chex.assert_trees_all_equal(ours, theirs)
    return ours


class Scope(nn.Module):
    """A layer whose variables are those of the module around it."""

    norm: type

    def setup(self):
        self.inner = self.norm(use_running_average=False)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


def test_share_scope():
    variables = same_variables(Scope)
    assert set(variables["params"]) == {"scale", "bias"}
    results = [Scope(norm).apply(variables, X, mutable=["batch_stats"]) for norm in NORMS]
    tolerances.assert_close(*results, np.float32, n=16)


class Network(nn.Module):
    norm: type

    def setup(self):
        self.norms = [self.norm(momentum=0.9, name=None) for _ in range(2)]
        self.named = {"last": self.norm(epsilon=1e-3)}

    def __call__(self, x, train):
        for norm in self.norms:
            x = norm(x, not train)
        return self.named["last"](x, use_running_average=not train)

    def first(self, x):
        return self.norms[0](x, True)


def test_setup_bind_and_method():
    variables = same_variables(Network, True)
    assert set(variables["params"]) == {"norms_0", "norms_1", "named_last"}
    ours = Network(bnjax.linen.BatchNorm)
    expected = ours.apply(variables, X, method=Network.first)
    bound = ours.bind(variables)
    chex.assert_trees_all_equal(bound.norms[0](X, True), expected)
    tolerances.assert_close(expected, X / np.sqrt(np.float32(1 + 1e-5)), np.float32, n=1)
    layer, own = bound.norms[0].unbind()
    chex.assert_trees_all_equal(layer.apply(own, X, True), expected)
    mutable = ours.bind(variables, mutable=["batch_stats"])
    mutable(X, True)
    _, new = ours.apply(variables, X, True, mutable=["batch_stats"])
    chex.assert_trees_all_equal(mutable.variables["batch_stats"], new["batch_stats"])


def test_tabulate():
    """The same table as flax's, with a row for each layer."""
    tables = [
        nn.tabulate(
            Network(norm), jax.random.key(0), compute_flops=False, console_kwargs={"width": 200}
        )(X, True)
        for norm in NORMS
    ]
    assert tables[0] == tables[1]
    assert tables[0].count("BatchNorm") == 3


def test_sown_and_captured():
    """Filters of intermediates see the layer, by its name."""
    model = Network(bnjax.linen.BatchNorm)
    variables = model.init(jax.random.key(0), X, True)
    y, new = model.apply(variables, X, False, capture_intermediates=True)
    captured = new["intermediates"]
    chex.assert_trees_all_equal(captured["named_last"]["__call__"][0], y)
    assert set(captured) == {"norms_0", "norms_1", "named_last", "__call__"}

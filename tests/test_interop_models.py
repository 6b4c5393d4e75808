"""bnjax.interop on whole models: no layer is lost or mistaken, and what is odd is an error."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from messages import check_message
from test_interop import equinox_module, keras_arrays, torch_arrays, under

import bnjax
from bnjax import interop

ONES = np.ones(3, np.float32)
STATISTICS = {"mean": ONES, "var": ONES}
NORM = {"scale": ONES, "bias": ONES, **STATISTICS}


# --- keras: variables by path --------------------------------------------------------


def keras_variables(*prefixes, arrays=keras_arrays):
    """As keras' model.variables: in a list, and each knows its path."""
    return [
        types.SimpleNamespace(path=f"{prefix}/{name}", numpy=lambda value=value: value)
        for prefix in prefixes
        for name, value in arrays().items()
    ]


def dense():
    return {"kernel": np.ones((3, 3), "f")}


def test_variables_of_keras_as_they_are():
    variables = keras_variables("net/bn", "bn") + keras_variables("d", "d", arrays=dense)
    by_path = {v.path: v for v in variables}
    layers = interop.each(interop.from_keras, variables)
    assert list(layers) == ["bn", "net/bn"]
    for path, layer in layers.items():
        np.testing.assert_equal(layer, interop.from_keras(by_path, path))
        np.testing.assert_equal(layer, interop.from_keras(tuple(variables), path))
    # Variables that two layers share come twice, and are the same.
    assert list(interop.each(interop.from_keras, variables + variables)) == list(layers)


def layer_norm():
    return {"gamma": ONES}


@pytest.mark.parametrize("other", [keras_arrays, layer_norm])
@pytest.mark.parametrize(
    "call",
    [
        lambda variables: interop.each(interop.from_keras, variables),
        lambda variables: interop.from_keras(variables, "bn"),
    ],
)
def test_paths_of_keras_must_be_unique(call, other):
    """As in a model of two models, each with a layer of this name."""
    variables = keras_variables("bn", "top") + keras_variables("bn", arrays=other)
    check_message(
        lambda: call(variables),
        (
            ValueError, "variables", "must have unique paths",
            f"several at {[f'bn/{name}' for name in other()]}",
            "Fix: layer by layer, from_keras({v.name: v for v in layer.variables})",
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "variables, got",
    [
        ([ONES], "ndarray in list"),
        ((v for v in keras_variables("bn")), "generator"),
        ("bn/gamma", "str"),
    ],
)
def test_variables_of_keras_know_their_paths(variables, got):
    check_message(
        lambda: interop.from_keras(variables, "bn"),
        (TypeError, "variables", "must map names to arrays", got, "Fix: model.variables"),
    )


# --- torch: what it does not have ----------------------------------------------------


def test_feature_axes_for_torch_and_keras():
    layer = interop.Layer(*bnjax.bn_init((2, 3)), {"axis": (1, 2), "unbiased": True})
    rule = "must be one axis for torch"
    fix = "Fix: x, params and state with these axes reshaped to one"
    check_message(lambda: interop.to_torch(layer), (ValueError, "axis", rule, "(1, 2)", fix))
    one = interop.Layer(*bnjax.bn_init(3), {"axis": (1,), "unbiased": True})
    assert interop.to_torch(one)[1]["num_features"] == 3
    one.options["unbiased"] = False
    assert interop.to_keras(one)[1]["axis"] == 1


def schedule_layer(momentum):
    return interop.Layer(*bnjax.bn_init(2), {"momentum": momentum, "unbiased": True})


LEAVES_CUMULATIVE = {
    "capped": lambda c: jnp.minimum(c / (c + 1), 0.9999),
    "one count": lambda c: jnp.where(c == 3_141_592, 0.5, c / (c + 1)),
    "late": lambda c: jnp.where(c > 2**30 + 12345, 0.5, c / (c + 1)),
}


@pytest.mark.parametrize("schedule", LEAVES_CUMULATIVE.values(), ids=LEAVES_CUMULATIVE)
def test_schedules_that_leave_the_cumulative_one(schedule):
    with pytest.raises(ValueError, match=r"`momentum` must be a number for torch \(but for `cumu"):
        interop.to_torch(schedule_layer(schedule))
    assert interop.to_torch(schedule_layer(bnjax.cumulative()))[1]["momentum"] is None


@pytest.mark.parametrize("momentum", [{}, {"momentum": None}])
def test_layers_of_torch_with_a_counter_only(momentum):
    """A counter tells that there were running statistics."""
    network = under("a.", torch_arrays()) | under("b.", torch_arrays())
    network = {k: v for k, v in network.items() if not k.startswith("b.running")}
    with pytest.raises(ValueError, match=r"`b` must hold.*missing \['running_mean', 'runn") as info:
        interop.each(interop.from_torch, network, **momentum)
    assert info.value.__notes__ == ["Layer: 'b'."]
    assert list(interop.each(interop.from_torch, network, pattern="a")) == ["a"]


# --- flax: linen or nnx --------------------------------------------------------------


def nnx_model(**attributes):
    model = nnx.Module()
    for name, make in attributes.items():
        setattr(model, name, make(3, rngs=nnx.Rngs(0)))
    return nnx.state(model)


def linear(size, rngs):
    return nnx.Linear(size, size, rngs=rngs)


def affine_free(size, rngs):
    return nnx.BatchNorm(size, use_scale=False, use_bias=False, rngs=rngs)


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize(
    "attributes, names",
    [
        ({"params": linear, "bn": nnx.BatchNorm}, ["bn"]),
        ({"batch_stats": linear, "bn": nnx.BatchNorm}, ["bn"]),
        ({"params": linear, "bn": affine_free}, ["bn"]),
        ({"params": nnx.BatchNorm, "fc": linear}, ["params"]),
        ({"params": linear, "batch_stats": nnx.BatchNorm}, ["batch_stats"]),
    ],
)
def test_attributes_of_nnx_named_as_collections(attributes, names, pure):
    state = nnx_model(**attributes)
    layers = interop.each(interop.from_flax, nnx.to_pure_dict(state) if pure else state)
    assert list(layers) == names
    with_scale = attributes[names[0]] is nnx.BatchNorm
    np.testing.assert_array_equal(layers[names[0]].params.scale, ONES if with_scale else None)


def test_collections_of_linen_inside_something():
    """As in a checkpoint: read as nnx, its layers would have no scale and no bias."""
    variables = {"params": {"a": {"scale": ONES, "bias": ONES}}, "batch_stats": {"a": STATISTICS}}
    check_message(
        lambda: interop.each(interop.from_flax, {"model": variables, "step": np.ones(())}),
        (
            ValueError, "variables", "must hold params and batch_stats at its top",
            "them in 'model'", "Fix: variables['model']",
        ),
    )  # fmt: skip


def test_a_state_of_nnx_is_none_of_linen():
    """These names alone do not tell; the type does."""
    state = nnx_model(batch_stats=affine_free, bn=nnx.BatchNorm)
    assert list(interop.each(interop.from_flax, state)) == ["batch_stats", "bn"]


def test_parameters_of_linen_are_no_statistics():
    """Of a layer with parameters of these names."""
    variables = {
        "params": {"gauss": {**STATISTICS, "bias": ONES}, "bn": {"scale": ONES}},
        "batch_stats": {"bn": STATISTICS, "steps": {"count": np.ones((), int)}},
        "cache": {"other": NORM},
    }
    assert list(interop.each(interop.from_flax, variables)) == ["bn"]


def test_half_of_the_statistics():
    with pytest.raises(ValueError, match=r"`bn` must hold .*missing \['var'\]"):
        interop.each(interop.from_flax, {"bn": {"mean": ONES}, "norm": NORM})
    with pytest.raises(ValueError, match=r"Without a `prefix`, .*missing \['var'\]"):
        interop.from_flax({"mean": ONES})


LOST = {
    "all statistics": ("Block_0/BatchNorm_1", {}),
    "but its counter": ("Block_0/norm", {"norm": {"count": np.ones(3, int)}}),
}


@pytest.mark.parametrize("name, statistics", LOST.values(), ids=LOST)
def test_norms_of_linen_that_lack_statistics(name, statistics):
    own = name.rpartition("/")[2]
    block = {own: {"scale": ONES}, "LayerNorm_0": {"scale": ONES}, "BatchNorm_0": {"scale": ONES}}
    variables = {
        "params": {"Block_0": block},
        "batch_stats": {"Block_0": {"BatchNorm_0": STATISTICS, **statistics}},
    }
    with pytest.raises(ValueError, match=rf"`{name}` must hold .*missing \['mean', 'var'\]"):
        interop.each(interop.from_flax, variables)
    found = interop.each(interop.from_flax, variables, pattern="*BatchNorm_0")
    assert list(found) == ["Block_0/BatchNorm_0"]


# --- equinox: parts and stacks -------------------------------------------------------

TRAINED = {"batch_counter": np.array(1), "batch_state_index": np.ones((2, 3), "f")}
MODES = {
    "batch_counter": TRAINED,
    "ema_first_time_index": {
        "ema_first_time_index": np.array(0),
        "ema_state_index": np.ones((2, 3), "f"),
    },
}


class State:
    """As equinox': it raises where an index is not there."""

    def __init__(self, arrays):
        self.get = arrays.__getitem__


@pytest.mark.parametrize("mark", MODES)
def test_equinox_state_of_another_model(mark):
    module, arrays = equinox_module(MODES[mark])
    for missing in arrays:
        rest = State({k: v for k, v in arrays.items() if k != missing})
        check_message(
            lambda rest=rest: interop.from_equinox({"bn": module}, rest, "bn", mode="batch"),
            (
                ValueError, "state", "must be the equinox.nn.State of this model",
                f"one without bn/{missing}", "Fix: model, state = equinox.nn.make_with_state",
            ),
        )  # fmt: skip


@pytest.mark.parametrize("mark", MODES)
def test_equinox_ensemble(mark):
    """As from filter_vmap: every array with one axis more."""
    module, arrays = equinox_module({k: np.stack([v, v]) for k, v in MODES[mark].items()})
    check_message(
        lambda: interop.from_equinox({"bn": module}, State(arrays), "bn", mode="batch"),
        (
            ValueError, f"bn/{mark}", "must be one number", "shape (2,), as of layers stacked",
            "Fix: one layer at a time, model, state = jax.tree.map(",
        ),
    )  # fmt: skip


def test_equinox_part_of_a_model():
    """Without the arrays, as the second of equinox.partition, it looks like affine-free."""
    module, arrays = equinox_module(TRAINED)
    module.channelwise_affine = True
    check_message(
        lambda: interop.from_equinox(module, State(arrays)),
        (ValueError, "weight", "must be an array", "None", "Fix: equinox.combine"),
    )
    module.channelwise_affine = False
    assert interop.from_equinox(module, State(arrays)).params == (None, None)

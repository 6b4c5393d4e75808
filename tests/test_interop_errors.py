"""bnjax.interop: errors state the rule, name both sides and the fix."""

import numpy as np
import pytest
from messages import check_message
from test_interop import equinox_module, haiku_trees, keras_arrays, torch_arrays, under

import bnjax
from bnjax import interop

ONES = np.ones(3, "f")
NETWORK = {**under("layer1.bn1.", torch_arrays()), **under("layer1.bn2.", torch_arrays())}
EQUINOX = {"batch_counter": np.array(1), "batch_state_index": np.ones((2, 3), "f")}


def without(arrays, name):
    return {k: v for k, v in arrays.items() if k != name}


def renamed(arrays, old, new):
    return {new if k == old else k: v for k, v in arrays.items()}


def layer(state=None, params=None, **options):
    first, start = bnjax.bn_init(3)
    return interop.Layer(
        first._replace(**params or {}),
        start._replace(**state or {}),
        {"momentum": 0.9, "unbiased": True, **options},
    )


# call; error, what the message begins with, rule, what came, fix
NAMES = {
    "prefix": (
        lambda: interop.from_torch(NETWORK, "layer1.bn3"),
        ValueError, "`prefix`", "must name a batch norm",
        "'layer1.bn3'. Batch norms there: ['layer1.bn2', 'layer1.bn1']", "",
    ),
    "prefix of a part": (
        lambda: interop.from_torch(NETWORK, "layer1"),
        ValueError, "`layer1`", "must hold ['running_mean', 'running_var']",
        "missing ['running_mean', 'running_var'], unknown ['bn1.bias'", "",
    ),
    "no prefix": (
        lambda: interop.from_torch(NETWORK),
        ValueError, "Without a `prefix`", "must hold ['running_mean', 'running_var']",
        "Batch norms there: ['layer1.bn1', 'layer1.bn2']", "",
    ),
    "no batch norm": (
        lambda: interop.from_torch({"fc.weight": ONES}, "bn"),
        ValueError, "`prefix`", "must name a batch norm",
        "'bn'. No batch norm with running statistics is there", "",
    ),
    "prefix type": (
        lambda: interop.from_torch(NETWORK, 3),
        TypeError, "`prefix`", "must be the name of a layer", "int", "",
    ),
    "mapping": (
        lambda: interop.from_torch([ONES] * 4),
        TypeError, "`state_dict`", "must map names to arrays", "list",
        "Fix: module.state_dict()",
    ),
    "missing": (
        lambda: interop.from_torch(without(NETWORK, "layer1.bn1.running_var"), "layer1.bn1"),
        ValueError, "`layer1.bn1`", "must hold ['running_mean', 'running_var']",
        "missing ['running_var']", "track_running_stats=False",
    ),
    "renamed": (
        lambda: interop.from_torch(renamed(torch_arrays(), "weight", "gamma")),
        ValueError, "Without a `prefix`", "nothing else but ['weight', 'bias'",
        "unknown ['gamma']", "",
    ),
    "untracked": (
        lambda: interop.from_torch(torch_arrays(), track_running_stats=False),
        ValueError, "Without a `prefix`", "must hold ['weight']", "unknown ['num_batches", "",
    ),
    "renorm": (
        lambda: interop.from_keras(
            under("bn/", {**keras_arrays(), "renorm_mean": ONES}), "bn"),
        ValueError, "`bn`", "nothing else but ['gamma', 'beta']", "unknown ['renorm_mean']", "",
    ),
    "haiku state": (
        lambda: interop.from_haiku(*haiku_trees(prefix="a"), decay_rate=0.9),
        ValueError, "`prefix`", "must name a batch norm", "'batch_norm'. Batch norms there: ['a']",
        "",
    ),
    "flax statistics": (
        lambda: interop.from_flax({"params": {"bn": {"scale": ONES}}}, "bn"),
        ValueError, "`bn`", "must hold ['mean', 'var']", "missing ['mean', 'var']", "",
    ),
    "equinox prefix": (
        lambda: interop.from_equinox({"bn": equinox_module(EQUINOX)[0]}, EQUINOX, "norm"),
        ValueError, "`prefix`", "must name a batch norm of the model, of ['bn']", "'norm'", "",
    ),
    "pattern": (
        lambda: interop.each(interop.from_torch, NETWORK, pattern="layer2.*"),
        ValueError, "`pattern`", "must match a batch norm, one of ['layer1.bn1', 'layer1.bn2']",
        "'layer2.*'", "",
    ),
    "convert": (
        lambda: interop.each(interop.to_torch, NETWORK),
        TypeError, "`convert`", "must be one of ['from_equinox', ", "to_torch",
        "each(from_torch, state_dict, momentum=0.01)",
    ),
}  # fmt: skip

ARRAYS = {
    "channels": (
        lambda: interop.from_torch(under("bn.", torch_arrays(weight=np.ones(4, "f"))), "bn"),
        ValueError, "`bn.weight` and `bn.running_mean`", "must have one shape", "(4,) and (3,)",
        "",
    ),
    "statistics": (
        lambda: interop.from_keras({**keras_arrays(), "moving_variance": np.ones(4, "f")}),
        ValueError, "`moving_variance` and `moving_mean`", "must have one shape",
        "(4,) and (3,)", "",
    ),
    "layout": (
        lambda: interop.from_torch(torch_arrays(bias=np.ones((1, 3, 1, 1), "f"))),
        ValueError, "`bias`", "must have shape [C]", "(1, 3, 1, 1)", "Fix: bias.reshape(-1)",
    ),
    "stacked": (
        lambda: interop.from_flax({"mean": np.ones((2, 3), "f"), "var": np.ones((2, 3), "f")}),
        ValueError, "`mean`", "must have shape [C]", "(2, 3).", "",
    ),
    "empty": (
        lambda: interop.from_torch({k: np.ones(0, "f") for k in ("running_mean", "running_var")}),
        ValueError, "`running_mean`", "must have shape [C]", "(0,)", "",
    ),
    "dtype": (
        lambda: interop.from_torch(torch_arrays(weight=np.ones(3, int))),
        TypeError, "`weight`", "must have a real floating dtype", "int64 of shape (3,)", "",
    ),
    "no array": (
        lambda: interop.from_torch(torch_arrays(weight="ones")),
        TypeError, "`weight`", "must be an array of numbers", "str", "",
    ),
    "haiku layout": (
        lambda: interop.from_haiku(*haiku_trees((1, 3, 1, 1)), decay_rate=0.9),
        ValueError, "`batch_norm/mean_ema.average`",
        "must have shape (1, ..., 1, C) for data_format='channels_last'", "(1, 3, 1, 1)",
        "Fix: data_format as in the haiku module",
    ),
    "haiku channels first": (
        lambda: interop.from_haiku(
            *haiku_trees((1, 1, 1, 3)), decay_rate=0.9, data_format="NCHW"),
        ValueError, "`batch_norm/mean_ema.average`",
        "must have shape (1, C, 1, ...) for data_format='NCHW'", "(1, 1, 1, 3)", "",
    ),
    "haiku vector": (
        lambda: interop.from_haiku(*haiku_trees((3,)), decay_rate=0.9),
        ValueError, "`batch_norm/mean_ema.average`", "must have shape (1, ..., 1, C)", "(3,)", "",
    ),
    "haiku hidden": (
        lambda: interop.from_haiku(*hidden_of_size(4), decay_rate=0.9),
        ValueError, "`batch_norm/var_ema.hidden` and `batch_norm/var_ema.average`",
        "must have one size", "4 and 3", "",
    ),
    "haiku counters": (
        lambda: interop.from_haiku(*counter_of_var(5), decay_rate=0.9),
        ValueError, "`batch_norm/mean_ema.counter` and `batch_norm/var_ema.counter`",
        "must be equal", "2 and 5", "",
    ),
    "haiku decay": (
        lambda: interop.from_haiku(*haiku_trees(), decay_rate=0.99),
        ValueError, "`decay_rate`",
        "must be that of `batch_norm/mean_ema.average` and `batch_norm/mean_ema.hidden`", "0.99",
        "",
    ),
    "counter": (
        lambda: interop.from_torch(torch_arrays(num_batches_tracked=np.array(2**31))),
        ValueError, "`num_batches_tracked`", "must be in [0, 2147483647]", "2147483648", "",
    ),
    "counter dtype": (
        lambda: interop.from_torch(torch_arrays(num_batches_tracked=np.array(2.0))),
        ValueError, "`num_batches_tracked`", "must be an integer", "float64 of shape ()", "",
    ),
    "no counter": (
        lambda: interop.from_torch(
            without(torch_arrays(), "num_batches_tracked"), momentum=None),
        ValueError, "`num_batches_tracked`", "must be there for momentum=None", "['bias', ", "Fix",
    ),
    "no count": (
        lambda: interop.from_flax({"mean": ONES, "var": ONES}, momentum=bnjax.cumulative()),
        ValueError, "`count`", "must be in the variables for a schedule", "['mean', 'var']",
        "Fix: add the number of updates",
    ),
}  # fmt: skip

OPTIONS = {
    "momentum": (
        lambda: interop.from_torch(torch_arrays(), momentum=1.5),
        ValueError, "`momentum`", "must be in [0, 1]", "1.5", "",
    ),
    "keras momentum": (
        lambda: interop.from_keras(keras_arrays(), momentum=None),
        TypeError, "`momentum`", "must be a real number", "None", "",
    ),
    "eps": (
        lambda: interop.from_torch(torch_arrays(), eps=-1.0),
        ValueError, "`eps`", "must be in [0, inf]", "-1.0", "",
    ),
    "track": (
        lambda: interop.from_torch(torch_arrays(), track_running_stats=1),
        TypeError, "`track_running_stats`", "must be True or False", "1", "",
    ),
    "data_format": (
        lambda: interop.from_haiku({}, {}, decay_rate=0.9, data_format="last"),
        ValueError, "`data_format`", "must be 'channels_last', 'channels_first'", "'last'", "",
    ),
    "data_format type": (
        lambda: interop.from_haiku({}, {}, decay_rate=0.9, data_format=1),
        TypeError, "`data_format`", "must be a str", "1", "",
    ),
    "equinox mode": (
        lambda: interop.from_equinox(*equinox_module(
            {"ema_first_time_index": np.array(0), "ema_state_index": np.ones((2, 3))})),
        ValueError, "`mode`", "must be 'batch' for the layer ''", "'ema'", "Fix: mode='batch'",
    ),
    "equinox other mode": (
        lambda: interop.from_equinox(*equinox_module(EQUINOX), mode="ema"),
        ValueError, "`mode`", "must be 'batch' or None", "'ema'", "",
    ),
    "equinox state": (
        lambda: interop.from_equinox(equinox_module(EQUINOX)[0], 3),
        TypeError, "`state`", "must be the equinox.nn.State", "int", "Fix: model, state = ",
    ),
    "biased for torch": (
        lambda: interop.to_torch(layer(unbiased=False)),
        ValueError, "`unbiased`", "must be True for torch", "False", "'unbiased': True",
    ),
    "schedule for torch": (
        lambda: interop.to_torch(layer(momentum=bnjax.debiased(0.9))),
        ValueError, "`momentum`", "must be a number for torch (but for `cumulative()`)",
        "debiased", "'momentum': 0.99",
    ),
    "counts for torch": (
        lambda: interop.to_torch(layer(
            {"count": np.array([1, 2, 2])}, momentum=bnjax.cumulative())),
        ValueError, "`state.count`", "must be equal for all channels with cumulative()",
        "[1 2 2]", "Fix: a momentum that is a number",
    ),
    "bias alone for torch": (
        lambda: interop.to_torch(layer(params={"scale": None})),
        ValueError, "`params.scale`", "must be an array where there is a bias", "None", "Fix",
    ),
    "unbiased for keras": (
        lambda: interop.to_keras(layer()),
        ValueError, "`unbiased`", "must be False for keras", "True", "'unbiased': False",
    ),
    "schedule for keras": (
        lambda: interop.to_keras(layer(unbiased=False, momentum=bnjax.cumulative())),
        ValueError, "`momentum`", "must be a number for keras", "cumulative", "'momentum': 0.99",
    ),
    "axes for keras": (
        lambda: interop.to_keras(interop.Layer(*bnjax.bn_init((2, 3)), {"axis": (1, 2)})),
        ValueError, "`axis`", "must be one axis for keras", "(1, 2)", "",
    ),
    "shapes": (
        lambda: interop.to_torch(layer({"var": np.ones(4, "f")})),
        ValueError, "`state.var` and `state.mean`", "must have one shape", "(4,) and (3,)", "",
    ),
    "options": (
        lambda: interop.to_flax(layer(axis_name="i")),
        ValueError, "`options`", "must be of ['axis', 'momentum', 'epsilon', 'unbiased']",
        "['axis_name'] too", "Fix: leave them out",
    ),
    "no layer": (
        lambda: interop.to_torch(bnjax.bn_init(3)),
        TypeError, "`layer`", "must be an interop.Layer", "tuple",
        "Fix: interop.Layer(params, state, options)",
    ),
}  # fmt: skip


def hidden_of_size(size):
    params, state = haiku_trees()
    state["batch_norm/~/var_ema"]["hidden"] = np.ones((1, size), "f")
    return params, state


def counter_of_var(count):
    params, state = haiku_trees()
    state["batch_norm/~/var_ema"]["counter"] = np.array(count)
    return params, state


CASES = {**NAMES, **ARRAYS, **OPTIONS}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_message(case):
    call, *expected = case
    if expected[1].startswith("`"):
        expected[1] = expected[1].strip("`")
        check_message(call, expected)
        return
    with pytest.raises(expected[0]) as info:
        call()
    assert all(part in str(info.value) for part in expected[1:])


@pytest.mark.parametrize(
    "call",
    [
        lambda: interop.each(
            interop.from_torch, {**NETWORK, "layer1.bn2.bias": np.ones(4, "f")}, momentum=0.2
        ),
        lambda: interop.to_torch({"layer1.bn1": layer(), "layer1.bn2": layer(unbiased=False)}),
        lambda: interop.to_flax({"layer1.bn1": layer(), "layer1.bn2": 3}),
    ],
)
def test_note_names_the_layer(call):
    with pytest.raises((TypeError, ValueError)) as info:
        call()
    assert info.value.__notes__ == ["Layer: 'layer1.bn2'."]


def test_rounding_of_the_decay_rate_is_no_error():
    """In half precision 1 - decay**counter is coarse; a right rate must pass."""
    for dtype in (np.float16, np.float32):
        for decay in (0.0, 0.5, 0.99, 0.999):
            for counter in (1, 10, 1000):
                trees = haiku_trees(counter=counter, decay=decay, dtype=dtype)
                interop.from_haiku(*trees, decay_rate=decay)


def test_values_that_are_not_finite_come_along():
    layer = interop.from_torch(torch_arrays(running_mean=np.array([np.nan, np.inf, 1], "f")))
    np.testing.assert_array_equal(layer.state.mean, [np.nan, np.inf, 1])
    params, state = haiku_trees()
    state["batch_norm/~/mean_ema"]["average"][0, 0] = np.inf
    assert np.isinf(interop.from_haiku(params, state, decay_rate=0.9).state.mean[0])

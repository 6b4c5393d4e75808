"""Bad calls of bn_apply: each raises, eagerly and while tracing, with a message to act on.

A row: keyword arguments -> exception, option, rule, what came, fix. The message names the
option in backticks, states the rule, shows what came and, where one is obvious, the fix.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import check_message

import bnjax

FEATURES = 3
X = jnp.arange(12.0).reshape(4, FEATURES)
PARAMS, STATE = bnjax.bn_init(FEATURES)
NAN = float("nan")
PER_CHANNEL = jnp.array([0.1, 0.2, 0.3])
OTHER = bnjax.bn_init(4)


def params(**fields):
    return {"params": PARAMS._replace(**fields)}


def state(**fields):
    return {"state": STATE._replace(**fields)}


APPLY = {
    "params: tuple": (
        {"params": tuple(PARAMS)},
        (TypeError, "params", "BNParams(scale, bias)", "tuple", "bn_init(features)"),
    ),
    "params: dict": (
        {"params": {"scale": X[0]}},
        (TypeError, "params", "BNParams(scale, bias)", "dict", "bn_init(features)"),
    ),
    "params and state swapped": (
        {"params": STATE, "state": PARAMS},
        (TypeError, "state", "BNState(mean, var, count)", "BNParams", "bn_init(features)"),
    ),
    "params: other features": (
        {"params": OTHER[0]},
        (ValueError, "params.scale", "feature axes (1,) of `x`, (3,)", "(4,)", "bn_init(3)"),
    ),
    "scale: shape": (
        params(scale=jnp.ones(1)),
        (ValueError, "params.scale", "feature axes (1,) of `x`, (3,)", "(1,)", "bn_init(3)"),
    ),
    "scale: int": (
        params(scale=jnp.ones(3, int)),
        (TypeError, "params.scale", "floating", "int32", "params.scale.astype(jnp.float32)"),
    ),
    "bias: complex": (
        params(bias=jnp.ones(3, complex)),
        (TypeError, "params.bias", "real floating", "complex64", ".astype(jnp.float32)"),
    ),
    "bias: list": (
        params(bias=[0.0, 0.0, 0.0]),
        (TypeError, "params.bias", "array", "list", "jnp.asarray(params.bias, jnp.float32)"),
    ),
    "state: tuple": (
        {"state": tuple(STATE)},
        (TypeError, "state", "BNState(mean, var, count)", "tuple", "bn_init(features)"),
    ),
    "state: other features": (
        {"state": OTHER[1]},
        (ValueError, "state.mean", "feature axes (1,) of `x`, (3,)", "(4,)", "bn_init(3)"),
    ),
    "mean: int": (
        state(mean=jnp.zeros(3, int)),
        (TypeError, "state.mean", "floating", "int32", "state.mean.astype(jnp.float32)"),
    ),
    "mean: None": (
        state(mean=None),
        (TypeError, "state.mean", "array", "NoneType", "jnp.asarray(state.mean, jnp.float32)"),
    ),
    "var: rank": (
        state(var=jnp.ones((1, 3))),
        (ValueError, "state.var", "feature axes (1,) of `x`, (3,)", "(1, 3)", "bn_init(3)"),
    ),
    "count: float": (
        state(count=jnp.zeros(3)),
        (TypeError, "state.count", "integers", "float32", "jnp.zeros((3,), jnp.int32)"),
    ),
    "count: bool": (
        state(count=jnp.zeros(3, bool)),
        (TypeError, "state.count", "integers", "bool", "jnp.zeros((3,), jnp.int32)"),
    ),
    "count: Python int": (
        state(count=0),
        (TypeError, "state.count", "array of signed integers", "int", "jnp.zeros((3,), jnp.int32)"),
    ),
    "count: scalar": (
        state(count=jnp.zeros((), jnp.int32)),
        (ValueError, "state.count", "per channel, shape (3,)", "()", "jnp.full((3,), n"),
    ),
    "x: int": ({"x": X.astype(int)}, (TypeError, "x", "floating", "int32", ".astype(jnp.float32)")),
    "x: bool": ({"x": X > 0}, (TypeError, "x", "floating", "bool", "x.astype(jnp.float32)")),
    "x: complex": (
        {"x": X.astype(complex)},
        (TypeError, "x", "real floating", "complex64 of shape (4, 3)", "x.astype(jnp.float32)"),
    ),
    "x: list": ({"x": [[1.0, 2.0, 3.0]]}, (TypeError, "x", "array", "list", "jnp.asarray(x, ")),
    "x: Python float": ({"x": 1.0}, (TypeError, "x", "array", "float", "jnp.asarray(x, ")),
    "x: None": ({"x": None}, (TypeError, "x", "JAX or NumPy array", "NoneType", "jnp.asarray(x")),
    "x: rank 0": (
        {"x": jnp.ones(())},
        (ValueError, "x", "at least one axis", "scalar", "x[None, None]"),
    ),
    "axis: above": ({"axis": 2}, (ValueError, "axis", "[-2, 2) for `x` of shape (4, 3)", "2", "")),
    "axis: below": ({"axis": -3}, (ValueError, "axis", "[-2, 2) for `x` of", "-3", "")),
    "axis: one of two": ({"axis": (0, 7)}, (ValueError, "axis", "[-2, 2) for `x` of", "7", "")),
    "axis: twice": ({"axis": (1, -1)}, (ValueError, "axis", "distinct", "(1, -1)", "")),
    "axis: float": ({"axis": 1.0}, (TypeError, "axis", "int or a tuple of ints", "1.0", "")),
    "axis: str": ({"axis": "1"}, (TypeError, "axis", "int or a tuple of ints", "'1'", "")),
    "axis: bool": ({"axis": True}, (TypeError, "axis", "int or a tuple of ints", "True", "")),
    "axis: None": ({"axis": None}, (TypeError, "axis", "int or a tuple of ints", "None", "")),
    "axis: nested bool": (
        {"axis": (0, False)},
        (TypeError, "axis", "int or a tuple of ints", "(0, False)", ""),
    ),
    "axis: other size": (
        {"axis": 0},
        (ValueError, "state.mean", "feature axes (0,) of `x`, (4,)", "(3,)", "bn_init(4)"),
    ),
    "axis: two for one": (
        {"axis": (0, 1)},
        (ValueError, "state.mean", "feature axes (0, 1) of `x`", "(3,)", "bn_init((4, 3))"),
    ),
    "train: int": ({"train": 1}, (TypeError, "train", "bool", "1", "train=True or train=False")),
    "train: None": ({"train": None}, (TypeError, "train", "bool", "None", "train=True")),
    "train: str": ({"train": "train"}, (TypeError, "train", "bool", "'train'", "train=True")),
    "train: float": ({"train": 1.0}, (TypeError, "train", "bool", "1.0", "train=True")),
    "train: of shape (1,)": (
        {"train": jnp.array([True])},
        (TypeError, "train", "boolean scalar array", "bool and shape (1,)", "train=True"),
    ),
    "train: int array": (
        {"train": jnp.array(1)},
        (TypeError, "train", "boolean scalar array", "int32 and shape ()", "train=True"),
    ),
    "momentum: above 1": ({"momentum": 1.5}, (ValueError, "momentum", "in [0, 1]", "1.5", "")),
    "momentum: negative": ({"momentum": -0.1}, (ValueError, "momentum", "in [0, 1]", "-0.1", "")),
    "momentum: NaN": ({"momentum": NAN}, (ValueError, "momentum", "in [0, 1]", "nan", "")),
    "momentum: large": ({"momentum": 10**30}, (ValueError, "momentum", "in [0, 1]", "10000", "")),
    "momentum: str": ({"momentum": "0.9"}, (TypeError, "momentum", "real number", "'0.9'", "")),
    "momentum: bool": ({"momentum": True}, (TypeError, "momentum", "real number", "True", "")),
    "momentum: bool array": (
        {"momentum": jnp.array(True)},
        (TypeError, "momentum", "real number", "Array(True", ""),
    ),
    "momentum: complex": ({"momentum": 1j}, (TypeError, "momentum", "real number", "1j", "")),
    "momentum: None": ({"momentum": None}, (TypeError, "momentum", "real number", "None", "")),
    "momentum: shape": (
        {"momentum": jnp.ones(4)},
        (ValueError, "momentum", "scalar or have one entry per channel, shape (3,)", "(4,)", ""),
    ),
    "momentum: one entry NaN": (
        {"momentum": PER_CHANNEL.at[1].set(NAN)},
        (ValueError, "momentum", "in [0, 1]", "nan", ""),
    ),
    "momentum: unused in evaluation": (
        {"momentum": 2.0, "train": False},
        (ValueError, "momentum", "in [0, 1]", "2.0", ""),
    ),
    "schedule: constant out of range": (
        {"momentum": lambda _: -1.0},
        (ValueError, "momentum(state.count)", "in [0, 1]", "-1.0", ""),
    ),
    "schedule: shape": (
        {"momentum": lambda _: jnp.ones(7)},
        (ValueError, "momentum(state.count)", "one entry per channel, shape (3,)", "(7,)", ""),
    ),
    "schedule: None": (
        {"momentum": lambda _: None},
        (TypeError, "momentum(state.count)", "real number", "None", ""),
    ),
    "schedule: bool": (
        {"momentum": lambda count: count > 0},
        (TypeError, "momentum(state.count)", "real number", "bool", ""),
    ),
    "epsilon: negative": ({"epsilon": -1e-5}, (ValueError, "epsilon", "in [0, ", "-1e-05", "")),
    "epsilon: NaN": ({"epsilon": NAN}, (ValueError, "epsilon", "in [0, ", "nan", "")),
    "epsilon: inf": (
        {"epsilon": float("inf")},
        (ValueError, "epsilon", "in [0, ", "inf", ""),
    ),
    "epsilon: str": ({"epsilon": "1e-5"}, (TypeError, "epsilon", "real number", "'1e-5'", "")),
    "epsilon: None": ({"epsilon": None}, (TypeError, "epsilon", "real number", "None", "")),
    "epsilon: callable": ({"epsilon": len}, (TypeError, "epsilon", "real number", "len", "")),
    "epsilon: shape": (
        {"epsilon": jnp.ones(2)},
        (ValueError, "epsilon", "scalar or have one entry per channel, shape (3,)", "(2,)", ""),
    ),
    "epsilon: one entry negative": (
        {"epsilon": PER_CHANNEL - 0.15},
        (ValueError, "epsilon", "in [0, ", "-0.0", ""),
    ),
    "unbiased: int": ({"unbiased": 1}, (TypeError, "unbiased", "True or False", "1", "")),
    "unbiased: None": ({"unbiased": None}, (TypeError, "unbiased", "True or False", "None", "")),
    "unbiased: array": (
        {"unbiased": jnp.array(True)},
        (TypeError, "unbiased", "True or False", "Array(True", ""),
    ),
    "mask: list": ({"mask": [[True] * 3] * 4}, (TypeError, "mask", "booleans", "list", "Fix:")),
    "mask: bool": ({"mask": True}, (TypeError, "mask", "array of booleans", "bool", "Fix:")),
    "mask: int": (
        {"mask": jnp.ones((4, 3), int)},
        (TypeError, "mask", "True where an entry counts", "int32", "jnp.asarray(mask, bool)"),
    ),
    "mask: float": (
        {"mask": np.ones((4, 3), np.float32)},
        (TypeError, "mask", "array of booleans", "float32", "jnp.asarray(mask, bool)"),
    ),
    "mask: rank": (
        {"mask": jnp.ones(4, bool)},
        (ValueError, "mask", "rank of `x` and broadcast to its shape (4, 3)", "(4,)", "[:, None]"),
    ),
    "mask: higher rank": (
        {"mask": jnp.ones((1, 4, 3), bool)},
        (ValueError, "mask", "rank of `x`", "(1, 4, 3)", "Fix:"),
    ),
    "mask: shape": (
        {"mask": jnp.ones((4, 2), bool)},
        (ValueError, "mask", "broadcast to its shape (4, 3)", "(4, 2)", "Fix:"),
    ),
    "mask: shape, in evaluation": (
        {"mask": jnp.ones((5, 1), bool), "train": False},
        (ValueError, "mask", "broadcast to its shape (4, 3)", "(5, 1)", "Fix:"),
    ),
    "axis_name: list": (
        {"axis_name": ["i"]},
        (TypeError, "axis_name", "a name or a tuple of names", "['i']", ""),
    ),
    "axis_name: not mapped": (
        {"axis_name": "devices"},
        (ValueError, "axis_name", "pmap, vmap or shard_map", "'devices'", "vmap(f, axis_name="),
    ),
    "groups: no name": (
        {"axis_index_groups": [[0, 1]]},
        (ValueError, "axis_index_groups", "needs `axis_name`", "[[0, 1]]", ""),
    ),
    "groups: no name, in evaluation": (
        {"axis_index_groups": [[0]], "train": False},
        (ValueError, "axis_index_groups", "needs `axis_name`", "[[0]]", ""),
    ),
    "dtype: int": ({"dtype": jnp.int32}, (TypeError, "dtype", "floating dtype", "int32", "")),
    "dtype: complex": ({"dtype": "complex64"}, (TypeError, "dtype", "floating", "complex64", "")),
    "dtype: garbage": ({"dtype": "half-ish"}, (TypeError, "dtype", "floating", "half-ish", "")),
    "dtype: number": ({"dtype": 3}, (TypeError, "dtype", "floating dtype", "3", "")),
}


def bn_apply(arguments):
    call = {"params": PARAMS, "state": STATE, "x": X, "train": True, **arguments}
    inputs = [call.pop(name) for name in ("params", "state", "x", "train")]
    return bnjax.bn_apply(*inputs, **call)


@pytest.mark.parametrize("arguments, expected", APPLY.values(), ids=APPLY)
def test_bn_apply(arguments, expected):
    check_message(lambda: bn_apply(arguments), expected)


@pytest.mark.parametrize("arguments, expected", APPLY.values(), ids=APPLY)
def test_bn_apply_while_tracing(arguments, expected):
    """The same messages where params, state, x, train and mask are tracers."""
    whole = {"params": PARAMS, "state": STATE, "x": X, **arguments}
    names = ("params", "state", "x", "train", "mask")
    leaves, structure = jax.tree.flatten({k: v for k, v in whole.items() if k in names})
    traced = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]

    def call(arrays):
        arrays = iter(arrays)
        mixed = [
            next(arrays) if is_array else leaf
            for leaf, is_array in zip(leaves, traced, strict=True)
        ]
        return bn_apply({**whole, **jax.tree.unflatten(structure, mixed)})

    arrays = [leaf for leaf, is_array in zip(leaves, traced, strict=True) if is_array]
    check_message(lambda: jax.eval_shape(call, arrays), expected)

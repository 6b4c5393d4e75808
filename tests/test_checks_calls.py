"""Bad calls of everything but bn_apply, and odd calls that are fine.

Rows as in test_checks.py: call -> exception, option, rule, what came, fix.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import check_message

import bnjax
from bnjax import linen

X = jnp.arange(12.0).reshape(4, 3)
PARAMS, STATE = bnjax.bn_init(3)
NAN = float("nan")


def module(x=X, init=False, collections=("params", "batch_stats"), call=None, **fields):
    """One training step of the linen module, or its initialisation."""
    plain = linen.BatchNorm(use_running_average=False)
    layer = linen.BatchNorm(**{"use_running_average": False, **fields})
    if init:
        return layer.init(jax.random.key(0), x)
    variables = plain.init(jax.random.key(0), X)
    variables = {name: variables[name] for name in collections}
    return layer.apply(variables, x, mutable=["batch_stats"], **(call or {}))


def stats(**changes):
    tree = {"mean": jnp.zeros(3), "var": jnp.ones(3), **changes}
    variables = {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, "batch_stats": tree}
    return linen.BatchNorm(use_running_average=True).apply(variables, X)


MOMENTS = bnjax.moments(X)
BOUND = bnjax.batch_norm(momentum=0.9, axis=-1)

# Calls of everything else.
OTHERS = {
    "init: zero": (
        lambda: bnjax.bn_init(0),
        (ValueError, "features", "positive", "0", ""),
    ),
    "init: negative": (
        lambda: bnjax.bn_init((3, -1)),
        (ValueError, "features", "positive", "(3, -1)", ""),
    ),
    "init: float": (
        lambda: bnjax.bn_init(3.0),
        (TypeError, "features", "int or a tuple of ints", "3.0", "bn_init(x.shape[-1])"),
    ),
    "init: str": (
        lambda: bnjax.bn_init("3"),
        (TypeError, "features", "int or a tuple of ints", "'3'", "bn_init(x.shape[-1])"),
    ),
    "init: bool": (
        lambda: bnjax.bn_init(True),
        (TypeError, "features", "int or a tuple of ints", "True", "bn_init(x.shape[-1])"),
    ),
    "init: array": (
        lambda: bnjax.bn_init(np.ones(3, np.float32)),
        (TypeError, "features", "int or a tuple of ints", "float32", "x.shape[-1]"),
    ),
    "init: None": (
        lambda: bnjax.bn_init(None),
        (TypeError, "features", "int or a tuple of ints", "None", "bn_init(x.shape[-1])"),
    ),
    "init: param_dtype int": (
        lambda: bnjax.bn_init(3, param_dtype=int),
        (TypeError, "param_dtype", "floating dtype", "int", ""),
    ),
    "init: param_dtype garbage": (
        lambda: bnjax.bn_init(3, param_dtype="f33"),
        (TypeError, "param_dtype", "floating dtype", "'f33'", ""),
    ),
    "init: use_scale": (
        lambda: bnjax.bn_init(3, use_scale=1),
        (TypeError, "use_scale", "True or False", "1", ""),
    ),
    "init: use_bias": (
        lambda: bnjax.bn_init(3, use_bias=None),
        (TypeError, "use_bias", "True or False", "None", ""),
    ),
    "batch_norm: torch's name": (
        lambda: bnjax.batch_norm(eps=1e-3),
        (TypeError, "batch_norm", "options of `bn_apply`", "['eps']", "'epsilon'"),
    ),
    "batch_norm: option of init": (
        lambda: bnjax.batch_norm(use_scale=False),
        (TypeError, "batch_norm", "options of `bn_apply`", "['use_scale']", ""),
    ),
    "batch_norm: bound to another value": (
        lambda: BOUND.apply(PARAMS, STATE, X, True, momentum=0.8),
        (TypeError, "momentum", "bound to 0.9", "0.8", "give it in one place"),
    ),
    "debiased: 1": (
        lambda: bnjax.debiased(1.0),
        (ValueError, "momentum", "in [0, 1)", "1.0", "cumulative()"),
    ),
    "debiased: negative": (
        lambda: bnjax.debiased(-0.1),
        (ValueError, "momentum", "in [0, 1", "-0.1", ""),
    ),
    "debiased: NaN": (
        lambda: bnjax.debiased(NAN),
        (ValueError, "momentum", "in [0, 1", "nan", ""),
    ),
    "debiased: str": (
        lambda: bnjax.debiased("0.9"),
        (TypeError, "momentum", "real number", "'0.9'", ""),
    ),
    "merge: nothing": (
        lambda: bnjax.merge(),
        (ValueError, "merge", "at least one `Moments`", "none", ""),
    ),
    "merge: shapes": (
        lambda: bnjax.merge(MOMENTS, bnjax.moments(X[:, :2])),
        (ValueError, "merge", "one shape", "[(2,), (3,)]", ""),
    ),
    "moments: int": (
        lambda: bnjax.moments(X.astype(int)),
        (TypeError, "x", "floating", "int32", "x.astype(jnp.float32)"),
    ),
    "moments: axis": (
        lambda: bnjax.moments(X, axis=2),
        (ValueError, "axis", "[-2, 2) for `x` of shape (4, 3)", "2", ""),
    ),
    "moments: mask": (
        lambda: bnjax.moments(X, mask=jnp.ones(4, bool)),
        (ValueError, "mask", "rank of `x`", "(4,)", "mask[:, None]"),
    ),
    "moments: groups": (
        lambda: bnjax.moments(X, axis_index_groups=[[0]]),
        (ValueError, "axis_index_groups", "needs `axis_name`", "[[0]]", ""),
    ),
    "moments: axis_name": (
        lambda: bnjax.moments(X, axis_name="i"),
        (ValueError, "axis_name", "pmap, vmap or shard_map", "'i'", "vmap(f, axis_name='i')"),
    ),
    "linen: momentum": (
        lambda: module(momentum=2.0),
        (ValueError, "momentum", "in [0, 1]", "2.0", ""),
    ),
    "linen: epsilon": (
        lambda: module(epsilon=-1.0),
        (ValueError, "epsilon", "in [0, ", "-1.0", ""),
    ),
    "linen: axis": (
        lambda: module(axis=5),
        (ValueError, "axis", "[-2, 2) for `x` of shape (4, 3)", "5", ""),
    ),
    "linen: at initialisation": (
        lambda: module(init=True, momentum=2.0),
        (ValueError, "momentum", "in [0, 1]", "2.0", ""),
    ),
    "linen: use_running_average int": (
        lambda: module(use_running_average=1),
        (TypeError, "use_running_average", "bool", "1", "use_running_average=True"),
    ),
    "linen: mask rank": (
        lambda: module(call={"mask": jnp.ones((1, 4, 3), bool)}),
        (ValueError, "mask", "shape (4, 3)", "(1, 4, 3)", "Fix:"),
    ),
    "linen: complex": (
        lambda: module(x=X.astype(complex)),
        (TypeError, "x", "real floating", "complex64", "x.astype(jnp.float32)"),
    ),
    "linen: axis_name": (
        lambda: module(axis_name="batch"),
        (ValueError, "axis_name", "pmap, vmap or shard_map", "'batch'", "vmap(f, axis_name="),
    ),
    "linen: groups": (
        lambda: module(axis_index_groups=((0,),)),
        (ValueError, "axis_index_groups", "needs `axis_name`", "((0,),)", ""),
    ),
    "linen: unbiased": (
        lambda: module(unbiased=1),
        (TypeError, "unbiased", "True or False", "1", ""),
    ),
    "linen: norm and momentum": (
        lambda: module(norm=bnjax.batch_norm(), momentum=0.9),
        (ValueError, "momentum", "bound in `norm`", "momentum=0.9", "batch_norm(momentum=0.9)"),
    ),
    "linen: norm and epsilon": (
        lambda: module(norm=bnjax.batch_norm(), epsilon=1e-3),
        (ValueError, "epsilon", "bound in `norm`", "epsilon=0.001", "batch_norm(epsilon=0.001)"),
    ),
    "linen: norm and unbiased": (
        lambda: module(norm=bnjax.batch_norm(), unbiased=True),
        (ValueError, "unbiased", "bound in `norm`", "unbiased=True", "batch_norm(unbiased=True)"),
    ),
    "linen: norm binds axis": (
        lambda: module(norm=bnjax.batch_norm(axis=0)),
        (TypeError, "axis", "bound to 0", "-1", "give it in one place"),
    ),
    "linen: shape of statistics": (
        lambda: stats(mean=jnp.zeros(4)),
        (ValueError, "batch_stats/mean", "feature axes of `x`, (3,)", "(4,)", "right `axis`"),
    ),
    "linen: dtype of statistics": (
        lambda: stats(var=jnp.ones(3, int)),
        (TypeError, "state.var", "floating", "int32", ".astype(jnp.float32)"),
    ),
    "linen: rank 0": (
        lambda: module(x=jnp.ones(())),
        (ValueError, "x", "at least one axis", "scalar", "x[None, None]"),
    ),
}


@pytest.mark.parametrize("call, expected", OTHERS.values(), ids=OTHERS)
def test_other_calls(call, expected):
    check_message(call, expected)


@pytest.mark.parametrize("call, expected", OTHERS.values(), ids=OTHERS)
def test_other_calls_while_tracing(call, expected):
    check_message(lambda: jax.eval_shape(call), expected)


def test_schedule_out_of_range():
    """Known only where the count is: a traced value cannot be looked at."""
    call = lambda momentum: bnjax.bn_apply(PARAMS, STATE, X, True, momentum=momentum)  # noqa: E731
    check_message(
        lambda: call(lambda count: count + 2.0),
        (ValueError, "momentum(state.count)", "in [0, 1]", "[2. 2. 2.]", ""),
    )


def test_groups_without_support():
    """JAX has none under vmap: the message names the way out."""
    step = lambda x: bnjax.bn_apply(  # noqa: E731
        PARAMS, STATE, x, True, axis_name="i", axis_index_groups=[[0], [1]]
    )
    with pytest.raises(NotImplementedError, match="`axis_index_groups` must be None") as info:
        jax.vmap(step, axis_name="i")(X.reshape(2, 2, 3))
    assert "got ((0,), (1,))" in str(info.value)
    assert "Fix: split the axis 'i' in two mapped axes" in str(info.value)


def test_unknown_option_of_apply():
    with pytest.raises(TypeError, match="unexpected keyword argument 'eps'"):
        bnjax.bn_apply(PARAMS, STATE, X, True, eps=1e-3)
    with pytest.raises(TypeError, match="positional"):
        bnjax.bn_apply(PARAMS, STATE, X, True, -1)
    with pytest.raises(TypeError, match="positional"):
        bnjax.bn_init(3, True)


# Calls that Python, NumPy or JAX would refuse with a message of theirs, or accept.
ODD = {
    "groups: number": (
        lambda: bnjax.bn_apply(PARAMS, STATE, X, False, axis_name="i", axis_index_groups=3),
        (TypeError, "axis_index_groups", "", "3", ""),
    ),
    "groups: str": (
        lambda: bnjax.bn_apply(PARAMS, STATE, X, False, axis_name="i", axis_index_groups="ab"),
        (TypeError, "axis_index_groups", "", "ab", ""),
    ),
    "momentum: beyond float": (
        lambda: bnjax.bn_apply(PARAMS, STATE, X, True, momentum=10**400),
        (ValueError, "momentum", "in [0, 1]", "", ""),
    ),
    "batch_norm: array bound twice": (
        lambda: bnjax.batch_norm(momentum=X[0] / 9).apply(
            PARAMS, STATE, X, True, momentum=X[0] / 8
        ),
        (TypeError, "momentum", "bound", "", "give it in one place"),
    ),
    "merge: list": (
        lambda: bnjax.merge([MOMENTS, MOMENTS]),
        (TypeError, "merge", "Moments", "list", "merge(*"),
    ),
    "merge: states": (
        lambda: bnjax.merge(STATE, STATE),
        (TypeError, "merge", "Moments", "BNState", ""),
    ),
    "count: unsigned": (
        lambda: bnjax.bn_apply(PARAMS, STATE._replace(count=jnp.zeros(3, jnp.uint32)), X, True),
        (TypeError, "state.count", "", "uint32", "jnp.int32"),
    ),
    "schedule: factory not called": (
        lambda: bnjax.bn_apply(PARAMS, STATE, X, True, momentum=bnjax.cumulative),
        (TypeError, "momentum", "schedule", "", ""),
    ),
    "init: param_dtype None": (  # NumPy reads it as float64
        lambda: bnjax.bn_init(3, param_dtype=None),
        (TypeError, "param_dtype", "floating dtype", "None", ""),
    ),
    "linen: norm of another type": (
        lambda: module(norm=bnjax.batch_norm),
        (TypeError, "norm", "Norm", "function", "batch_norm()"),
    ),
    "linen: norm and momentum array": (
        lambda: module(norm=bnjax.batch_norm(), momentum=X[0] / 9),
        (ValueError, "momentum", "bound in `norm`", "", ""),
    ),
    "linen: norm binds axis_name": (
        lambda: module(init=True, norm=bnjax.batch_norm(axis_name="i")),
        (TypeError, "axis_name", "bound", "", "BatchNorm(axis_name="),
    ),
}


@pytest.mark.parametrize("call, expected", ODD.values(), ids=ODD)
def test_odd_values(call, expected):
    check_message(call, expected)

"""Functional models: function(variables, batch) -> (output, updated state)."""

from collections.abc import Mapping
from typing import Any

import jax

from bnjax import _observe
from bnjax._microbatches import MicrobatchState
from bnjax._models import common
from bnjax._models.common import Call, Layer, Program, Static, Subject
from bnjax._observe import Mode, Observed, Seen
from bnjax._types import BNState
from bnjax._whiten import WhitenState

_FIX = "Fix: variables=(params, state) for model(variables, batch) -> (output, state)."


def subject(model: Any, variables: Any, call: Call | None) -> Subject:
    """`model(variables, batch)`, with a BNState for each layer somewhere in `variables`."""
    if call is not None:
        raise ValueError(
            "`call` must be None for a functional model, which is called as it is, got "
            f"{call!r}. Fix: model=lambda variables, batch: ..."
        )
    layers = {path: _layer(state) for path, state in _states(variables).items()}
    is_linen = isinstance(variables, Mapping) and "batch_stats" in variables
    fix = "Fix: the linen module itself, not its `apply`." if is_linen else _FIX
    common.require_layers(layers, "in `variables`: no BNState", fix)

    def replaced(statistics: Mapping[str, Layer]) -> Any:
        def replace(path: str, state: Any) -> Any:
            new = statistics.get(path)
            return state if new is None else state._replace(**common.fields(new))

        return _map_states(replace, variables)

    return Subject("functional", Program(_run, Static(model), None), variables, layers, replaced)


def _run(
    model: Static, call: Call | None, mode: Mode, variables: Any, batch: Any
) -> tuple[Any, dict[str, Seen]]:
    def wrap(path: str, state: Any) -> Observed:
        return Observed(state, _observe.room(state, mode), mode, path)

    result = model.value(_map_states(wrap, variables), batch)
    found: dict[str, Seen] = {}
    for leaf in jax.tree.leaves(result, is_leaf=_is_observed):
        if _is_observed(leaf):
            found[leaf.path] = leaf.seen
    if not found or not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "a functional model must return (output, state), with the states that its layers "
            f"returned, got {jax.tree.structure(result)}. {_FIX}"
        )
    return result[0], found


def _is_state(value: Any) -> bool:
    return isinstance(value, (BNState, MicrobatchState, WhitenState))


def _layer(state: Any) -> Layer:
    return Layer(state.mean, state.var, state.count, getattr(state, "cov", None))


def _is_observed(value: Any) -> bool:
    return isinstance(value, Observed)


def _states(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_state)
    return {_named(path): leaf for path, leaf in leaves if _is_state(leaf)}


def _map_states(function: Any, tree: Any) -> Any:
    """`function(path, state)` of all states in a tree."""

    def one(path: Any, leaf: Any) -> Any:
        return function(_named(path), leaf) if _is_state(leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_state)


def _named(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")

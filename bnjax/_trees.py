"""Trees of variables: where a leaf is, whatever holds it."""

from typing import Any

import jax


def by_layer(tree: Any) -> dict[str, dict[str, Any]]:
    """The leaves of each module by name, by the place of the module, parts joined by "/"."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        layer, name = place(path)
        found.setdefault("/".join(layer), {})[name] = leaf
    return found


def place(path: tuple[Any, ...]) -> tuple[tuple[str, ...], str]:
    """The module's place in the tree, and the name of its leaf."""
    # What boxes a parameter (nnx.Variable, nn.Partitioned) has it as its attribute `value`.
    while path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    # Compared as strings: keys and attributes are one, and so are 0 and "0" after a restore.
    keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    return keys[:-1], keys[-1] if keys else ""

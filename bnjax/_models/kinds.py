"""Which kind of model something is, without importing Flax for it."""

import sys
from typing import Any

from bnjax._models.common import Call, Subject


def subject(model: Any, variables: Any, call: Call | None) -> Subject:
    """A functional, linen or nnx model with its variables."""
    if _is_module(model, "linen"):
        from bnjax._models import linen as of_linen

        return of_linen.subject(model, variables, call)
    if is_nnx(model):
        from bnjax._models import nnx as of_nnx

        return of_nnx.subject(model, variables, call)
    if not callable(model):
        raise TypeError(
            "`model` must be a function of (variables, batch), a linen or an nnx module, got "
            f"{type(model).__name__}."
        )
    from bnjax._models import functional

    return functional.subject(model, variables, call)


def is_nnx(model: Any) -> bool:
    """Whether it is an nnx module."""
    return _is_module(model, "nnx")


def _is_module(model: Any, kind: str) -> bool:
    flax = sys.modules.get(f"flax.{kind}")
    return flax is not None and isinstance(model, flax.Module)

"""Which kind of model something is, without importing Flax for it."""

import sys
from collections.abc import Callable
from typing import Any

from bnjax._models.common import Call, Subject


def subject(model: Any, variables: Any, call: Call | None) -> Subject:
    """A functional, linen or nnx model with its variables."""
    linen, nnx = (sys.modules.get(f"flax.{name}") for name in ("linen", "nnx"))
    if linen is not None and isinstance(model, linen.Module):
        from bnjax._models import linen as of_linen

        return of_linen.subject(model, variables, call)
    if nnx is not None and isinstance(model, nnx.Module):
        from bnjax._models import nnx as of_nnx

        return of_nnx.subject(model, variables, call)
    if not isinstance(model, Callable):  # type: ignore[arg-type]
        raise TypeError(
            "`model` must be a function of (variables, batch), a linen or an nnx module, got "
            f"{type(model).__name__}."
        )
    from bnjax._models import functional

    return functional.subject(model, variables, call)

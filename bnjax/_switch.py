"""Switches: which moments normalize, and whether the running statistics learn, whatever `train`."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from bnjax import _checks
from bnjax._observe import PREFIX, Observed
from bnjax._types import BNParams, Norm

Source = Literal["batch", "running"]


class Switch(NamedTuple):
    """The two switches, checked; None leaves it to `train`."""

    moments: Source | None
    learn: bool | None

    def of(self, norm: Norm) -> Norm:
        """The norm with these switches; those that it has already go first."""
        if norm.state._fields[-1].startswith(PREFIX):  # observed, as a mode of its own says
            return norm
        inner = getattr(norm.apply, "__self__", None)
        if isinstance(inner, _Switched):
            own = {k: v for k, v in inner.switch._asdict().items() if v is not None}
            return self._replace(**own).of(inner.norm)
        always = self.learn is True or norm.always_updates
        return norm._replace(apply=_Switched(self, norm).apply, always_updates=always)


def switch(norm: Norm, *, moments: Source | None = None, learn: bool | None = None) -> Norm:
    """A `Norm` that normalizes with given moments, and learns or not, whatever `train` says.

    y = (x - mean) / sqrt(var + epsilon) * scale + bias, with mean and var as switched.

    moments="running", learn=False: frozen. Parameters train on fixed statistics, as when a
    trained network is fine-tuned, also where `model.train()` is called.
    moments="batch", learn=False: batch statistics at evaluation; in training, a forward pass
    that leaves no trace, such as the second one of a step.
    moments="batch", learn=True: the same, and the running statistics adapt to what is
    evaluated.
    moments="running", learn=True: the statistics follow the data, without influence on y
    and its derivatives.

    Args:
      norm: the `Norm` that normalizes, such as `batch_norm()`.
      moments: "batch", "running", or None for what `train` says.
      learn: whether the running statistics are updated in every call, in none, or None for
        what `train` says.

    Returns:
      `Norm`, with the state of the given one. Of a norm that is switched already, the
      switches that were given stay.

    Raises:
      TypeError, ValueError: other values, or none that switches anything.

    Example:
      >>> import jax.numpy as jnp, bnjax
      >>> norm = bnjax.switch(bnjax.batch_norm(), moments="batch", learn=False)
      >>> params, state = norm.init(1)
      >>> y, state = norm.apply(params, state, jnp.array([[1.0], [3.0]]), train=False)
      >>> print(y[:, 0].round(3), state.count)
      [-1.  1.] [0]

    Source: batch statistics at evaluation: Nado et al. (2020), "Evaluating
    prediction-time batch normalization for robustness under covariate shift".
    """
    if not isinstance(norm, Norm):
        raise TypeError(f"`norm` must be a Norm, got {norm!r}. Fix: switch(batch_norm(), ...).")
    return checked(moments, learn).of(norm)


def checked(moments: Any, learn: Any) -> Switch:
    """The switches, from what a caller gave."""
    if moments is not None and moments not in get_args(Source):
        raise ValueError(f'`moments` must be "batch", "running" or None, got {moments!r}.')
    if learn is not None:
        learn = _checks.static_flag("learn", learn)
    if moments is None and learn is None:
        raise ValueError(
            "`moments` or `learn` must be given, got None for both, which switches nothing. "
            'Fix: moments="running", learn=False for frozen statistics.'
        )
    return Switch(moments, learn)


class _Switched(NamedTuple):
    """The application of a switched norm."""

    switch: Switch
    norm: Norm

    def apply(
        self, params: BNParams, state: Any, x: jax.Array, train: bool | jax.Array, **call: Any
    ) -> tuple[jax.Array, Any]:
        if isinstance(state, Observed):  # which has switches of its own
            return self.norm.apply(params, state, x, train, **call)
        train = _checks.flag("train", train)
        batch = train if self.switch.moments is None else self.switch.moments == "batch"
        learn = train if self.switch.learn is None else self.switch.learn
        y, new = self.norm.apply(params, state, x, batch, **call)
        if learn is batch:
            return y, new
        if learn is not False and batch is not True:
            new = self.norm.apply(params, state, x, True, **call)[1]
        return y, _chosen(learn, new, state)


def _chosen(learn: bool | jax.Array, new: Any, old: Any) -> Any:
    if isinstance(learn, bool):
        return new if learn else old
    return jax.tree.map(lambda n, o: jnp.where(learn, n, o), new, old)

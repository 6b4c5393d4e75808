"""Batch normalization folded away: into the kernels beside it, or out of a whole Flax model.

At inference the layer is one affine map per channel, and a Dense or a convolution
takes that in. `affine`, `into_previous` and `into_next` work on arrays of any
framework's layout; `linen` and `nnx` on models, and import Flax when called.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from bnjax._fold.kernels import affine, into_next, into_previous
from bnjax._fold.layouts import Affine

if TYPE_CHECKING:
    from bnjax._fold.linen import LinenFold
    from bnjax._fold.nnx import NNXFold

__all__ = ["Affine", "affine", "into_next", "into_previous", "linen", "nnx"]

_Pairs = Mapping[str, str] | Iterable[tuple[str, str]]


def linen(
    model: Any,
    variables: Mapping[str, Any],
    *args: Any,
    pairs: _Pairs | None = None,
    **kwargs: Any,
) -> "LinenFold":
    """Folds BatchNorm layers, bnjax's and flax's, of a flax.linen model.

    conv' = gamma / sqrt(var + epsilon) * (conv - mean) + beta for each that goes
    into the Dense, Conv or ConvTranspose before it; `into_next` has that for the
    layer after it, which is taken where there is none before.

    What follows what is read off the data flow of the evaluation, not off names: a
    layer is folded only if all that it makes goes into the normalization and
    nowhere else (no skip connection, not an output), in every call of the two.
    Whatever is not folded is in `kept`, with the reason: also a normalization that
    only the layer after it could take, if a |mean| / sqrt(var + epsilon) of it is
    above 10 or traced, as that costs accuracy.

    Args:
      model: module; its source is not changed.
      variables: of `model.init` or of training, with "batch_stats".
      *args, **kwargs: as for `model.apply` in evaluation; arrays may be
        `jax.ShapeDtypeStruct`.
      pairs: of paths, as `{"Conv_0": "BatchNorm_0"}` or `[("block/Conv_0",
        "block/BatchNorm_0")]`, which are then folded, at any mean, and no others.
        By default all that can be.

    Returns:
      `(apply, variables, folded, kept)`. `apply(variables, *args, **kwargs)` is the
      `model.apply` of the folded model, and only that takes the new variables:
      layers without a bias got one. `folded`: path of a normalization -> that of
      the layer it went into. `kept`: path -> reason.

    Raises:
      ValueError: a normalization that is called in training; nothing that can be
      folded; pairs that are unknown or cannot be folded. From `apply`: a call, such
      as of another method or with other flags, in which layer and normalization do
      not go together as above; variables that are not the folded ones.
      TypeError: a model that returns objects whose arrays cannot be seen.

    Note:
      Kernels are folded in float64 and rounded once, to their own dtype. A layer
      that takes in the normalization before it gets inputs that are not centred,
      and errs by about 0.6 r times as much as the unfolded pair at means of r
      deviations: at 10 still within the rounding of a float32 sum, at 100 by 2e-5.

      `apply` traces the model once more for each new set of static arguments,
      shapes and dtypes, other than those of folding, to see that it is still right.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from bnjax import fold
      >>> from bnjax.linen import BatchNorm
      >>> model = nn.Sequential([nn.Dense(4, use_bias=False), BatchNorm(True), nn.relu])
      >>> x = jnp.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> folded = fold.linen(model, variables, x)
      >>> y = jax.jit(folded.apply)(folded.variables, x)
      >>> print(folded.folded, list(folded.variables))
      {'layers_1': 'layers_0'} ['params']

    Source: Jacob et al. (2018), https://arxiv.org/abs/1712.05877, section 3.2.
    """
    from bnjax._fold import linen as of_linen

    return of_linen.fold(model, variables, args, kwargs, pairs)


def nnx(model: Any, *args: Any, pairs: _Pairs | None = None, **kwargs: Any) -> "NNXFold":
    """Folds BatchNorm layers, bnjax's and flax's, of a flax.nnx model.

    conv' = gamma / sqrt(var + epsilon) * (conv - mean) + beta, and the rest, as in
    `linen`, for Linear, Conv and ConvTranspose.

    Args:
      model: module in evaluation (`model.eval()`); it is not changed.
      *args, **kwargs: of a call `model(*args, **kwargs)`; arrays may be
        `jax.ShapeDtypeStruct`.
      pairs: of paths, as `{"blocks/0/conv": "blocks/0/bn"}` or a list of pairs,
        which are then folded, and no others. By default all that can be.

    Returns:
      `(model, folded, kept)`: a copy, in which identities stand where
      normalizations were, and layers without a bias have one; `folded` and `kept`
      as in `linen`. Arrays that did not change are shared with the given model.

    Raises:
      TypeError, ValueError: as in `linen`, when folding.

    Warning:
      The copy is right for calls in which layer and normalization go together as
      in the given one. Others, in which a layer is called without its
      normalization (by another method or flag, or from outside), are not noticed,
      unlike those of `linen`, and get the normalized output; nor are models whose
      code asks for the class or the attributes of a layer. Leave such layers out of
      `pairs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from bnjax import fold
      >>> from bnjax.nnx import BatchNorm
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), BatchNorm(4, rngs=rngs), nnx.relu)
      >>> model.eval()
      >>> folded = fold.nnx(model, jnp.ones((2, 3)))
      >>> y = nnx.jit(folded.model)(jnp.ones((2, 3)))
      >>> print(folded.folded, folded.kept)
      {'layers/1': 'layers/0'} {}

    Source: Jacob et al. (2018), https://arxiv.org/abs/1712.05877, section 3.2.
    """
    from bnjax._fold import nnx as of_nnx

    return of_nnx.fold(model, args, kwargs, pairs)

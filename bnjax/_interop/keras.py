"""Layers of Keras 3: their variables by name or path."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnjax._interop import common
from bnjax._interop.common import Layer

_STATISTICS = ("moving_mean", "moving_variance")
_PARAMS = ("gamma", "beta")
_BY_LAYER = "from_keras({v.name: v for v in layer.variables})"


def names(variables: Any) -> list[str]:
    """Batch norms of a model's variables, by path."""
    return _source(variables).names()


def from_keras(
    variables: Sequence[Any] | Mapping[str, Any],
    prefix: str = "",
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    axis: int = -1,
) -> Layer:
    """A batch norm of Keras 3 from its variables.

    keras: moving = momentum * moving + (1 - momentum) * batch, with the biased
    variance: bnjax's convention. There is no counter, so `count` is 0.

    Args:
      variables: `model.variables` with a prefix; or name -> keras variable or
        array, as `{v.name: v for v in layer.variables}` without. `moving_mean` and
        `moving_variance`, [C], and where there are, `gamma` and `beta`, [C].
      prefix: path of the layer, as "sequential/batch_normalization".
      momentum, epsilon, axis: of the keras layer, whose attributes they are.

    Returns:
      `Layer`, with copies of the arrays.

    Raises:
      TypeError, ValueError: names that are missing or unknown (renorm=True is not
      supported), a path that two batch norms of the model have (keras allows it: a
      mapping by path would keep one of them), shapes that do not fit each other,
      options out of range.

    Example:
      >>> import numpy as np
      >>> from bnjax import interop
      >>> layer = interop.from_keras({
      ...     "gamma": np.ones(2, "f"), "beta": np.zeros(2, "f"),
      ...     "moving_mean": np.ones(2, "f"), "moving_variance": np.ones(2, "f")})
      >>> print(layer.options)
      {'axis': -1, 'momentum': 0.99, 'epsilon': 0.001, 'unbiased': False}

    Source: keras.layers.BatchNormalization, Keras 3.
    """
    found = common.entries(_source(variables), prefix, _STATISTICS, _PARAMS)
    return common.convert(
        {
            "scale": found.get("gamma"),
            "bias": found.get("beta"),
            "mean": found["moving_mean"],
            "var": found["moving_variance"],
        },
        0,
        {
            "axis": axis,
            "momentum": common.number("momentum", momentum),
            "epsilon": common.number("epsilon", epsilon, high=float("inf")),
            "unbiased": False,
        },
    )


def to_keras(
    layer: Layer | Mapping[str, Layer], prefix: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Variables and constructor's arguments of a batch norm for Keras 3.

    The inverse of `from_keras`, exact for parameters and statistics; keras has no
    counter.

    Args:
      layer: a `Layer`, or several by path: path -> Layer.
      prefix: path of the layer, or what comes before all paths.

    Returns:
      `(variables, kwargs)`: arrays by name, in the order of keras, so that
      `keras_layer.set_weights(list(variables.values()))`; and
      `keras.layers.BatchNormalization(**kwargs)`; for several layers path -> kwargs.

    Raises:
      TypeError, ValueError: what keras does not have: a schedule as momentum,
      unbiased=True, several feature axes.

    Example:
      >>> import bnjax
      >>> from bnjax import interop
      >>> variables, kwargs = interop.to_keras(interop.Layer(*bnjax.bn_init(2), {}))
      >>> print(list(variables))
      ['gamma', 'beta', 'moving_mean', 'moving_variance']
      >>> print(kwargs)
      {'axis': -1, 'momentum': 0.99, 'epsilon': 1e-05, 'center': True, 'scale': True}

    Source: keras.layers.BatchNormalization, Keras 3.
    """
    return common.export(_export, layer, prefix, "/")


def _export(layer: Layer, start: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    (scale, bias), (mean, var, _), options = layer
    if options["unbiased"]:
        raise ValueError(
            "`unbiased` must be False for keras, whose moving variance is biased, got "
            f"{options['unbiased']!r}. Fix: layer._replace(options={{**layer.options, "
            "'unbiased': False}), if the variance may be learned so from now on."
        )
    arrays: dict[str, Any] = dict(
        zip((*_PARAMS, *_STATISTICS), (scale, bias, mean, var), strict=True)
    )
    kwargs = {
        "axis": common.one_axis(layer, "keras"),
        "momentum": common.constant(layer, "keras"),
        "epsilon": options["epsilon"],
        "center": bias is not None,
        "scale": scale is not None,
    }
    return {start + name: v for name, v in arrays.items() if v is not None}, kwargs


def _source(variables: Any) -> common.Source:
    if isinstance(variables, Sequence) and not isinstance(variables, str):
        variables = _by_path(variables)
    arrays = common.mapping("variables", variables, " Fix: model.variables.")
    return common.Source(arrays, "/", common.owners(arrays, "/", _STATISTICS))


def _by_path(variables: Sequence[Any]) -> dict[str, Any]:
    """path -> variable, where no path of a batch norm stands for two variables."""
    arrays: dict[str, Any] = {}
    twice: set[str] = set()
    for variable in variables:
        if not isinstance(path := getattr(variable, "path", None), str):
            raise TypeError(
                "`variables` must map names to arrays, or be variables with a path, got "
                f"{type(variable).__name__} in {type(variables).__name__}. Fix: model.variables, "
                f"or of one layer {_BY_LAYER}."
            )
        if arrays.setdefault(path, variable) is not variable:
            twice.add(path)
    norms = common.owners(arrays, "/", _STATISTICS)
    if of_norms := [path for path in arrays if path in twice and path.rpartition("/")[0] in norms]:
        raise ValueError(
            "`variables` must have unique paths where there are batch norms, got several at "
            f"{common.listed(of_norms)}. Fix: layer by layer, {_BY_LAYER}."
        )
    return arrays

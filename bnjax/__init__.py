"""bnjax: batch normalization for JAX that can be trusted."""

from bnjax._functional import BNParams, BNState, Norm, batch_norm, bn_apply, bn_init
from bnjax._moments import Moments, merge, moments
from bnjax._momentum import cumulative, debiased

__all__ = [
    "BNParams",
    "BNState",
    "Moments",
    "Norm",
    "batch_norm",
    "bn_apply",
    "bn_init",
    "cumulative",
    "debiased",
    "merge",
    "moments",
]

__version__ = "0.1.0"

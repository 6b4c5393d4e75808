"""Batch normalization for flax.nnx: the layer, and what is done to whole models."""

from bnjax._nnx.layer import BatchNorm
from bnjax._nnx.models import convert, revert, switch

__all__ = ["BatchNorm", "convert", "revert", "switch"]

# Its name in messages and in pickles.
BatchNorm.__module__ = "bnjax.nnx"

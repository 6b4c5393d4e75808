"""bnjax: batch normalization for JAX that can be trusted."""

from bnjax._functional import batch_norm, bn_apply, bn_init
from bnjax._ghost import ghost
from bnjax._lean import save_inputs, save_moments
from bnjax._merge import merge
from bnjax._microbatches import MicrobatchState, microbatches
from bnjax._moments import moments
from bnjax._momentum import cumulative, debiased
from bnjax._population import recalibrate
from bnjax._renorm import renorm
from bnjax._replicas import merge_states
from bnjax._switch import switch
from bnjax._types import BNParams, BNState, Moments, Norm
from bnjax._whiten import WhitenState, whiten

__all__ = [
    "BNParams",
    "BNState",
    "MicrobatchState",
    "Moments",
    "Norm",
    "WhitenState",
    "batch_norm",
    "bn_apply",
    "bn_init",
    "cumulative",
    "debiased",
    "ghost",
    "merge",
    "merge_states",
    "microbatches",
    "moments",
    "recalibrate",
    "renorm",
    "save_inputs",
    "save_moments",
    "switch",
    "whiten",
]

__version__ = "0.1.0"

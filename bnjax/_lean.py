"""What of a layer is worth keeping for the backward pass: policies for `jax.checkpoint`.

A layer names its input and its moments, with which output and derivatives are computed. Names
change nothing by themselves; a policy chooses by them.
"""

from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

INPUT = "bnjax_input"
MOMENTS = "bnjax_moments"

Tree = TypeVar("Tree")

_SAVE_INPUTS = jax.checkpoint_policies.save_only_these_names(INPUT, MOMENTS)
_SAVE_MOMENTS = jax.checkpoint_policies.save_only_these_names(MOMENTS)


def save_inputs(primitive: Any, *operands: Any, **options: Any) -> bool:
    """Checkpoint policy: keep what enters the layers; recompute what leaves them.

    Of y = activation(bn(x)) the backward pass keeps x and a few vectors per channel, and
    computes y anew in one elementwise pass, for the convolution or the product that took it.
    Without it, x and y are kept. No sum over the batch and no all-reduce is made twice, and
    results are the same.

    What is neither the input of a layer of bnjax nor of the checkpointed function is
    recomputed, a convolution too if no layer follows it. In a residual network one function of
    two or three blocks keeps the sum at their end only.

    Args:
      primitive, *operands, **options: what JAX asks about; not for you to give.

    Returns:
      Whether JAX may keep the result.

    Raises:
      TypeError: called without what JAX gives.

    Note:
      This is for GPUs and CPUs. XLA for TPU recomputes y inside the next convolution by itself, and
      with this policy takes more memory than without: use `save_moments` there. Before jax
      0.11.1 XLA for the CPU found both computations of y to be one: there it saved nothing.
      Leave `prevent_cse` as it is: without it y is kept too. Names for policies of your own:
      "bnjax_input" and "bnjax_moments".

    Example:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> params, state = bnjax.bn_init(2)
      >>> def block(w, x):
      ...     y, _ = bnjax.bn_apply(params, state, x @ w, True)
      ...     return jax.nn.relu(y)
      >>> lean = jax.checkpoint(block, policy=bnjax.save_inputs)
      >>> w, x = jnp.eye(2), jnp.array([[1.0, 4.0], [2.0, 2.0], [3.0, 9.0]])
      >>> loss = lambda block: lambda w: (block(w, block(w, x)) ** 3).sum()
      >>> print(jnp.allclose(jax.grad(loss(lean))(w), jax.grad(loss(block))(w)))
      True

    Source: Chen et al. (2016), https://arxiv.org/abs/1604.06174
    """
    return bool(_SAVE_INPUTS(primitive, *operands, **options))


def save_moments(primitive: Any, *operands: Any, **options: Any) -> bool:
    """Checkpoint policy: keep the moments of the layers; recompute all else.

    Of y = activation(bn(x)) the backward pass keeps a few vectors per channel, and computes x
    and y anew from the inputs of the checkpointed function. Like `jax.checkpoint` without a
    policy, but no sum over the batch and no all-reduce is made twice. It keeps less than
    `save_inputs`, on TPUs too, and makes products and convolutions a second time.

    Args:
      primitive, *operands, **options: what JAX asks about; not for you to give.

    Returns:
      Whether JAX may keep the result.

    Raises:
      TypeError: called without what JAX gives.

    Example:
      >>> import jax, jax.numpy as jnp, bnjax
      >>> params, state = bnjax.bn_init(2)
      >>> def layer(x):
      ...     return bnjax.bn_apply(params, state, x, True)[0]
      >>> lean = jax.checkpoint(layer, policy=bnjax.save_moments)
      >>> x = jnp.array([[1.0, 4.0], [2.0, 2.0], [3.0, 9.0]])
      >>> loss = lambda layer: lambda x: (layer(x) ** 3).sum()
      >>> print(jnp.allclose(jax.grad(loss(lean))(x), jax.grad(loss(layer))(x)))
      True

    Source: Chen et al. (2016), https://arxiv.org/abs/1604.06174
    """
    return bool(_SAVE_MOMENTS(primitive, *operands, **options))


def named_input(x: jax.Array) -> jax.Array:
    """The input of a layer, of which all else is computed."""
    return checkpoint_name(x, INPUT)


def named_moments(vectors: Tree) -> Tree:
    """Vectors per channel: with them no policy needs the sums again."""
    return checkpoint_name(vectors, MOMENTS)

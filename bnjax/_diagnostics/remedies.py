"""The remedy of each cause, as code, for each kind of model."""

_KINDS = ("functional", "linen", "nnx")
# Of the call, which differs where the model is called by a `call`.
_END = "<end>"
_RECALIBRATE = {
    "functional": "variables = bnjax.recalibrate(model, variables, {}",
    "linen": "variables = bnjax.recalibrate(model, variables, {}",
    "nnx": "bnjax.recalibrate(model, None, {}",
}


def _everywhere(code: str) -> dict[str, str]:
    return dict.fromkeys(_KINDS, code)


def _recalibrated(batches: str, further: str = "") -> dict[str, str]:
    return {kind: code.format(batches) + _END + further for kind, code in _RECALIBRATE.items()}


def remedy(cause: str, kind: str, called: bool) -> str:
    """The code; with `call`, where the report has one."""
    own = REMEDIES[cause][kind]
    return own.replace(_END, ", call=call)" if called else ")")


REMEDIES: dict[str, dict[str, str]] = {
    "poisoned": _recalibrated(
        "train_batches", "  # bnjax's layers learn from no batch with NaN or Inf"
    ),
    "never-updated": {
        "functional": "y, state = bnjax.bn_apply(params, state, x, train=True)  # keep the state",
        "linen": "y, updates = model.apply(variables, x, train=True, mutable=['batch_stats'])\n"
        "variables = {**variables, **updates}",
        "nnx": "model.train()  # for training, and model.eval() only for evaluation",
    },
    "updates-stopped": _everywhere(
        "assert jnp.isfinite(x).all()  # of training batches, and train=True in every step"
    ),
    "small-batches": _everywhere(
        "norm=bnjax.renorm()  # in training; or larger batches: batch_size=32"
    ),
    "not-shuffled": _everywhere(
        "order = rng.permutation(len(images))  # anew for each epoch, before batches are cut"
    ),
    "lagging": _recalibrated(
        "train_batches", "  # or train with momentum=0.9, or bnjax.debiased(0.99)"
    ),
    "stale": _recalibrated("train_batches"),
    "mismatch": _recalibrated(
        "train_batches", "  # or report(..., train_batches=train_batches), for the cause"
    ),
    "domain-shift": _recalibrated("batches_of_the_new_domain", "  # no labels needed"),
    "not-finite-input": _everywhere("assert jnp.isfinite(x).all()  # of the data"),
    "dead-channels": _everywhere(
        "optax.adamw(rate, mask=bnjax.optim.decay_mask)  # no weight decay of scale and bias"
    ),
    "exploding-channels": _everywhere("optax.chain(optax.clip_by_global_norm(1.0), optimizer)"),
    "saturated": _everywhere("optax.adamw(rate / 10)  # a smaller learning rate"),
}

"""bnjax.diagnostics.report: causes that are planted, their remedies, and networks without any."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
import bnjax.optim
from bnjax import diagnostics

C, SIZE, NUMBER = 8, 64, 16
KERNEL = np.random.default_rng(1).normal(0, 1, (C, C)).astype(np.float32)
MOMENTUM = bnjax.cumulative()  # with a count in all kinds of models
KINDS = ("functional", "linen", "nnx")


def mostly(kind):
    """All kinds of models, of which one is for every run: what they show is the same numbers."""
    return [pytest.param(k, marks=[pytest.mark.slow] * (k != kind)) for k in KINDS]


TRACES = []


def functional(variables, x):
    TRACES.append("functional")
    (p1, s1), (p2, s2) = variables
    y, s1 = bnjax.bn_apply(p1, s1, x, False, momentum=MOMENTUM)
    y, s2 = bnjax.bn_apply(p2, s2, jnp.tanh(y) @ KERNEL, False, momentum=MOMENTUM)
    return jax.nn.relu(y), ((p1, s1), (p2, s2))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        TRACES.append("linen")
        norm = functools.partial(bnjax.linen.BatchNorm, not train, momentum=MOMENTUM)
        return nn.relu(norm(name="1")(jnp.tanh(norm(name="0")(x)) @ KERNEL))


class NNX(nnx.Module):
    def __init__(self):
        norm = functools.partial(bnjax.nnx.BatchNorm, C, momentum=MOMENTUM, rngs=nnx.Rngs(0))
        self.norms = nnx.List([norm(), norm()])

    def __call__(self, x):
        TRACES.append("nnx")
        return nnx.relu(self.norms[1](jnp.tanh(self.norms[0](x)) @ KERNEL))


def evaluated(apply, batch):
    return apply(batch, train=False)


class Case(NamedTuple):
    """Two layers as (params, state), and what the doctor sees."""

    layers: list
    batch: np.ndarray
    train_batches: list | None
    steps: int | None = None

    def subject(self, kind):
        """model, variables and further arguments."""
        if kind == "functional":
            return functional, tuple(self.layers), {}
        if kind == "linen":
            variables = {
                "params": {str(i): p._asdict() for i, (p, _) in enumerate(self.layers)},
                "batch_stats": {str(i): s._asdict() for i, (_, s) in enumerate(self.layers)},
            }
            return Linen(), variables, {"call": evaluated}
        model = NNX()
        for norm, layer in zip(model.norms, self.layers, strict=True):
            for name, value in (layer[0]._asdict() | layer[1]._asdict()).items():
                getattr(norm, name)[...] = value
        return model, None, {}

    def report(self, kind="functional"):
        model, variables, options = self.subject(kind)
        given = {"train_batches": self.train_batches, "steps": self.steps}
        return diagnostics.report(model, variables, self.batch, **given, **options)

    def causes(self, kind="functional"):
        return [f.cause for f in self.report(kind).findings]

    def with_state(self, change, of=(0, 1)):
        """`change(mean, var)` -> new ones."""
        layers = list(self.layers)
        for i in of:
            p, s = layers[i]
            mean, var = change(s.mean, s.var)
            layers[i] = p, s._replace(mean=jnp.asarray(mean), var=jnp.asarray(var))
        return self._replace(layers=layers)

    def with_params(self, **new):
        (p, s), second = self.layers
        p = p._replace(**{k: jnp.full(C, v, jnp.float32) for k, v in new.items()})
        return self._replace(layers=[(p, s), second]).trained()

    def trained(self):
        """With the statistics of the training batches."""
        variables = bnjax.recalibrate(functional, tuple(self.layers), self.train_batches)
        return self._replace(layers=list(variables))


def examples(rng, number, size=SIZE):
    level = np.random.default_rng(2).normal(0, 2, C)
    return list(rng.normal(level, 1.5, (number, size, C)).astype(np.float32))


@functools.cache
def healthy():
    rng = np.random.default_rng(0)
    batch, *batches = examples(rng, NUMBER + 1)
    return Case([bnjax.bn_init(C) for _ in range(2)], batch, batches).trained()


def sorted_batches():
    rows = np.concatenate(healthy().train_batches)
    return list(rows[rows[:, 0].argsort()].reshape(NUMBER, SIZE, C))


def changed(name, value):
    """An entry of the evaluated batch."""
    batch = healthy().batch.copy()
    batch[0, 0] = value
    return healthy()._replace(**{name: batch})


def exploding():
    def wide(x):
        return np.concatenate([x[:, :1] * 1e6, x[:, 1:]], 1)

    case = healthy()
    return case._replace(
        batch=wide(case.batch), train_batches=[*map(wide, case.train_batches)]
    ).trained()


def initial(mean, var):
    return 0 * mean, 0 * var + 1


def counted(case, count):
    layers = [(p, s._replace(count=jnp.full(C, count, jnp.int32))) for p, s in case.layers]
    return case._replace(layers=layers)


def never(case):
    return counted(case.with_state(initial), 0)


PLANTED = {
    "poisoned": lambda: healthy().with_state(lambda m, v: (m + 1, 10 * v)),
    "never-updated": lambda: never(healthy()),
    "updates-stopped": lambda: healthy()._replace(steps=100),
    "small-batches": lambda: healthy()._replace(
        train_batches=examples(np.random.default_rng(3), NUMBER, 2)
    ),
    "not-shuffled": lambda: healthy()._replace(train_batches=sorted_batches()).trained(),
    "lagging": lambda: healthy().with_state(lambda m, v: (m / 2, (v + 1) / 2)),
    "stale": lambda: healthy().with_state(lambda m, v: (m + jnp.sqrt(v) * SIGNS, v)),
    "mismatch": lambda: PLANTED["stale"]()._replace(train_batches=None),
    "domain-shift": lambda: healthy()._replace(batch=2 * healthy().batch + 1),
    "not-finite-input": lambda: changed("batch", np.nan),
    "dead-channels": lambda: healthy().with_params(scale=1e-4),
    "exploding-channels": exploding,
    "saturated": lambda: healthy().with_params(scale=30.0),
}
SIGNS = np.array([1, -1] * (C // 2), np.float32)


@pytest.mark.parametrize("kind", mostly("linen"))
def test_planted_cause_is_named_first(kind):
    """And nothing is traced, thus compiled, again for other values of the same shapes."""
    assert healthy().causes(kind) == []
    planted = {cause: make() for cause, make in PLANTED.items()}
    del planted["small-batches"]
    TRACES.clear()
    for cause, case in planted.items():
        found = case.report(kind)
        assert [f.cause for f in found.findings][:1] == [cause]
        assert str(found).startswith(f"{cause}: ")
        assert set(found.findings[0].remedy.splitlines()) <= set(
            map(str.strip, str(found).splitlines())
        )
        compile(found.findings[0].remedy, cause, "exec")
    assert TRACES == []


def test_small_batches():
    (first, *_) = PLANTED["small-batches"]().report().findings
    assert (
        first.cause == "small-batches" and "has 2 entries per channel in 0/1, 1/1" in first.sentence
    )


RECALIBRATED = ("poisoned", "lagging", "stale", "mismatch", "domain-shift")


@pytest.mark.parametrize("kind", mostly("nnx"))
@pytest.mark.parametrize("cause", RECALIBRATED)
def test_remedy_of_statistics_mends_them(cause, kind):
    case = PLANTED[cause]()
    model, variables, options = case.subject(kind)
    new = [case.batch, *(2 * b + 1 for b in healthy().train_batches)]
    names = {"bnjax": bnjax, "model": model, "variables": variables, **options}
    names |= {"train_batches": healthy().train_batches, "batches_of_the_new_domain": new}
    exec(case.report(kind).findings[0].remedy, names)
    given = new if cause == "domain-shift" else names["train_batches"]
    after = diagnostics.report(
        model, names["variables"], case.batch, train_batches=given, steps=None, **options
    )
    assert after.findings == ()


@pytest.mark.parametrize("kind", mostly("functional"))
def test_other_remedies_run(kind):
    case = healthy()
    model, variables, _ = case.subject(kind)
    x = np.array([[1.0], [np.nan]], np.float32)
    names = {"bnjax": bnjax, "jnp": jnp, "optax": optax, "model": model, "variables": variables}
    names |= {"x": case.batch, "rng": np.random.default_rng(0), "images": case.batch, "rate": 0.1}
    names |= {"optimizer": optax.sgd(0.1), "params": case.layers[0][0], "state": case.layers[0][1]}
    others = PLANTED.keys() - {*RECALIBRATED, *([] if kind == "functional" else ["small-batches"])}
    for cause in sorted(others):
        code = PLANTED[cause]().report(kind).findings[0].remedy
        exec(code, names)
        if code.startswith("assert"):
            with pytest.raises(AssertionError):
                exec(code, names | {"x": x})
    if kind == "functional":
        assert int(names["state"].count[0]) == int(case.layers[0][1].count[0]) + 1
    if kind == "linen":
        assert int(names["variables"]["batch_stats"]["0"]["count"][0]) == NUMBER + 1
    if kind == "nnx":
        assert not model.norms[0].use_running_average


def test_remedy_names_the_call():
    assert PLANTED["stale"]().report("linen").findings[0].remedy.endswith(", call=call)")
    assert PLANTED["stale"]().report("functional").findings[0].remedy.endswith("train_batches)")


def both(*changes):
    case = healthy()
    for change in changes:
        case = change(case)
    return case


def stale(case):
    return case.with_state(lambda m, v: (m + jnp.sqrt(v) * SIGNS, v))


def lagging(case):
    return case.with_state(lambda m, v: (m / 2, (v + 1) / 2))


def far(case):
    return case._replace(batch=case.batch + 9)


def lost(case):
    return case.with_state(lambda m, v: (m * jnp.nan, v), of=(0,))


COMBINED = {
    "poisoned, never-updated": lambda: both(
        lost, lambda c: c._replace(layers=[c.layers[0], never(c).layers[1]])
    ),
    "poisoned, domain-shift": lambda: both(lost, far),
    "never-updated, domain-shift": lambda: both(never, far),
    "not-shuffled, stale": lambda: both(
        lambda c: c._replace(train_batches=sorted_batches()).trained(), stale
    ),
    "small-batches, lagging": lambda: both(lagging, lambda c: c._replace(train_batches=SMALL)),
    "domain-shift, stale": lambda: both(stale, far),
    "domain-shift, lagging": lambda: both(lagging, far),
    "stale, dead-channels": lambda: stale(PLANTED["dead-channels"]()),
    "stale, saturated": lambda: stale(PLANTED["saturated"]()),
    "updates-stopped, stale": lambda: both(stale, lambda c: c._replace(steps=100)),
    "domain-shift, not-finite-input": lambda: both(
        far, lambda c: c._replace(train_batches=[*c.train_batches, c.batch * np.nan])
    ),
}
SMALL = examples(np.random.default_rng(3), NUMBER, 2)


@pytest.mark.parametrize("expected", COMBINED)
def test_two_causes_are_both_named(expected):
    assert ", ".join(COMBINED[expected]().causes()) == expected


def test_no_finding_where_statistics_follow_the_data():
    """Moving averages of other batches of the same data, seen by few and by many batches."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        case = healthy()._replace(train_batches=examples(rng, 40)).trained()
        few = 2 + seed
        given = case._replace(batch=examples(rng, 1)[0], train_batches=examples(rng, few))
        assert given.causes() == [], seed
        assert given._replace(train_batches=None).causes() == [], seed


def test_channels_that_hardly_vary_are_no_gap():
    """As pixels near the border, most of them 0, and one of them seldom lit."""
    rng = np.random.default_rng(0)

    def rare(batches, lit):
        found = [np.concatenate([0 * b[:, :3], b[:, 3:]], 1) for b in batches]
        found[0][:lit, 0] = 1
        return found

    case = healthy()._replace(train_batches=rare(examples(rng, 16), 1)).trained()
    given = case._replace(
        batch=rare(examples(rng, 1), 0)[0], train_batches=rare(examples(rng, 16), 0)
    )
    assert given.causes() == given._replace(train_batches=None).causes() == []
    assert lagging(given).causes() == ["lagging"]
    assert far(given).causes() == ["domain-shift"]

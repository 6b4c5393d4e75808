"""bnjax.interop with the real keras, haiku and equinox, and with torch where it is installed.

torch is large, so it is in the `benchmarks` extra, and `make test-torch` requires it. Elsewhere
tests/test_interop.py has numbers of its layers.
"""

import importlib.util
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_interop
from test_interop import CONVERT, FIVE_STEPS, assert_continues
from tolerances import error

import bnjax
from bnjax import interop

RNG = np.random.default_rng(0)
X = RNG.normal(3, 2, (8, 3, 4, 4)).astype(np.float32)


@pytest.fixture(autouse=True)
def leave_the_others_alone():
    """Their warnings and their promotion of ranks are not what is tested."""
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        yield


def package(name):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    optional = name == "torch" and not os.environ.get("BNJAX_REQUIRE_TORCH")
    if optional and importlib.util.find_spec(name) is None:
        pytest.skip("torch is not installed: make test-torch")
    return importlib.import_module(name)


def marks(name):
    return name.partition("_")[0]


LIVE = {
    "torch": ("torch_peer", {}, {}),
    "torch momentum": ("torch_peer", {"momentum": 0.4, "eps": 0.1}, {"momentum": 0.4, "eps": 0.1}),
    "torch cumulative": ("torch_peer", {"momentum": None}, {"momentum": None}),
    "torch without parameters": ("torch_peer", {"affine": False}, {}),
    "keras": ("keras_peer", {}, {}),
    "keras momentum": (
        "keras_peer", {"momentum": 0.5, "epsilon": 0.1}, {"momentum": 0.5, "epsilon": 0.1}),
    "keras without scale": ("keras_peer", {"scale": False}, {}),
    "keras without center": ("keras_peer", {"center": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize("peer, made_with, given", LIVE.values(), ids=LIVE)
def test_training_continues(peer, made_with, given):
    name = marks(peer)
    package(name)
    record = make_interop.record(
        getattr(make_interop, peer)(**made_with), make_interop.load("data")
    )
    assert_continues(record, lambda arrays: CONVERT[name](arrays, **given))


@pytest.mark.parametrize("scale", [True, False])
def test_haiku_training_continues(scale):
    """With one of the parameters; the golden case has both."""
    package("haiku")
    peer = make_interop.haiku_peer(create_scale=scale, create_offset=not scale, decay_rate=0.9)
    record = make_interop.record(peer, make_interop.load("data"))
    assert_continues(record, CONVERT["haiku"])


@pytest.mark.parametrize("affine", [True, False])
def test_equinox_training_continues(affine):
    package("equinox")
    peer = make_interop.equinox_peer(momentum=0.9, mode="batch", channelwise_affine=affine)
    assert_continues(make_interop.record(peer, make_interop.load("data")), CONVERT["equinox"])


@pytest.mark.parametrize("case", make_interop.CASES)
def test_golden_arrays_are_what_comes_out(case):
    """The files beside this test, made again."""
    package({"torch_cumulative": "torch", "equinox_ema": "equinox"}.get(case, case))
    record = make_interop.record(make_interop.CASES[case](), make_interop.load("data"))
    golden = make_interop.load(case)
    del record["made with"], golden["made with"]
    found, wanted = (dict(jax.tree.leaves_with_path(tree)) for tree in (record, golden))
    assert found.keys() == wanted.keys()
    for path, value in found.items():
        assert error(value, wanted[path]) <= FIVE_STEPS, path


# --- torch --------------------------------------------------------------------------


def torch_model(torch, **options):
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5, **options))
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3, **options), block)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        for _ in range(3):
            model(torch.from_numpy(X))
    return model


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"momentum": 0.3}])
def test_torch_round_trip_is_exact(options):
    torch = package("torch")
    model = torch_model(torch, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    momentum = {"momentum": options["momentum"]} if "momentum" in options else {}
    layers = interop.each(interop.from_torch, model.state_dict(), **momentum)
    assert list(layers) == ["0", "1.1"]
    with torch.no_grad():
        model(torch.from_numpy(X))  # in place, so that shared memory would show
    state_dict, kwargs = interop.to_torch(layers)
    for name, value in state_dict.items():
        tensor = torch.from_numpy(value)
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    for name, layer in layers.items():
        new = torch.nn.BatchNorm2d(**kwargs[name])
        arrays, _ = interop.to_torch(layer)
        new.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=True)
        old = dict(model.named_modules())[name]
        assert (new.momentum, new.eps, new.affine) == (old.momentum, old.eps, old.affine)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_torch_dtypes(dtype):
    torch = package("torch")
    model = torch_model(torch)[0].to(getattr(torch, dtype))
    layer = interop.from_torch(model.state_dict())
    assert layer.params.scale.dtype == jnp.dtype(dtype)
    new = torch.nn.BatchNorm2d(3, dtype=getattr(torch, dtype))
    state_dict = {k: torch.from_numpy(v) for k, v in interop.to_torch(layer)[0].items()}
    new.load_state_dict(state_dict, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(new.state_dict()[name], value), name


def test_torch_without_running_statistics():
    torch = package("torch")
    module = torch.nn.BatchNorm2d(3, track_running_stats=False)
    torch.nn.init.normal_(module.weight)
    with pytest.raises(ValueError, match="track_running_stats=False"):
        interop.from_torch(module.state_dict())
    layer = interop.from_torch(module.state_dict(), track_running_stats=False)
    y, _ = bnjax.bn_apply(layer.params, layer.state, X, True, **layer.options)
    assert error(y, module.eval()(torch.from_numpy(X)).detach().numpy()) <= FIVE_STEPS


# --- keras --------------------------------------------------------------------------


def test_keras_model_and_back():
    keras = package("keras")
    model = keras.Sequential([
        keras.layers.BatchNormalization(name="first"),
        keras.layers.Conv2D(5, 3),
        keras.layers.BatchNormalization(name="second", center=False),
    ])  # fmt: skip
    model(X.transpose(0, 2, 3, 1), training=True)
    layers = interop.each(interop.from_keras, model.variables)
    for name, layer in layers.items():
        old = model.get_layer(name.rpartition("/")[2])
        variables, kwargs = interop.to_keras(layer)
        new = keras.layers.BatchNormalization(**kwargs)
        new.build((None, None, None, layer.state.mean.size))
        new.set_weights(list(variables.values()))
        assert [v.name for v in new.variables] == list(variables) == [v.name for v in old.variables]
        for a, b in zip(new.get_weights(), old.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
        for option in ("axis", "momentum", "epsilon", "center", "scale"):
            assert getattr(new, option) == getattr(old, option), option
    assert [name.rpartition("/")[2] for name in layers] == ["first", "second"]
    layer = interop.from_keras({v.name: v for v in model.get_layer("first").variables})
    y, _ = bnjax.bn_apply(*layer[:2], X.transpose(0, 2, 3, 1), False, **layer.options)
    theirs = model.get_layer("first")(X.transpose(0, 2, 3, 1), training=False)
    assert error(y, theirs) <= FIVE_STEPS


def test_keras_model_with_a_path_twice():
    """keras takes names of layers as they are, in each model of a model."""
    keras = package("keras")

    def part(name):
        x = keras.Input((3,))
        norm = keras.layers.BatchNormalization(name="bn")
        return keras.Model(x, norm(keras.layers.LayerNormalization(name="ln")(x)), name=name)

    first, second = part("first"), part("second")
    x = keras.Input((3,))
    model = keras.Model(x, second(first(x)))
    first.get_layer("bn").gamma.assign([1, 2, 3])
    with pytest.raises(ValueError, match=r"must have unique paths .*'bn/gamma', 'bn/beta', 'bn/m"):
        interop.each(interop.from_keras, model.variables)
    layers = [
        interop.from_keras({v.name: v for v in part.get_layer("bn").variables})
        for part in (first, second)
    ]
    np.testing.assert_array_equal([layer.params.scale for layer in layers], [[1, 2, 3], [1] * 3])


# --- haiku and equinox --------------------------------------------------------------


def test_haiku_model():
    hk = package("haiku")

    class Block(hk.Module):
        def __init__(self):
            super().__init__()
            self.bn = hk.BatchNorm(True, True, decay_rate=0.9, name="bn")

        def __call__(self, x, train, local=False):
            return self.bn(x, train, local)

    net = hk.transform_with_state(
        lambda x, train, local=False: hk.Linear(3)(Block()(x, train, local))
    )
    x = X[..., 0]
    params, state = net.init(jax.random.key(0), x, True)
    layer = interop.each(interop.from_haiku, params, state, decay_rate=0.9)["block/~/bn"]
    np.testing.assert_array_equal(layer.state.count, 0)
    for i in range(3):
        batch = (i + 2) * x
        _, state = net.apply(params, state, None, batch, True)
        _, new = bnjax.bn_apply(*layer[:2], batch, True, **layer.options)
        layer = layer._replace(state=new)
    there = interop.from_haiku(params, state, "block/~/bn", decay_rate=0.9)
    np.testing.assert_array_equal(layer.state.count, there.state.count)
    assert error(layer.state.mean, there.state.mean) <= FIVE_STEPS
    assert error(layer.state.var, there.state.var) <= FIVE_STEPS
    linear = params["linear"]
    local, _ = bnjax.bn_apply(there.params, there.state, x, True, **there.options)
    theirs, _ = net.apply(params, state, None, x, False, local=True)
    assert error(local @ linear["w"] + linear["b"][None, None], theirs) <= FIVE_STEPS
    with pytest.raises(ValueError, match="`decay_rate` must be that of"):
        interop.from_haiku(params, state, "block/~/bn", decay_rate=0.99)


def equinox_steps(eqx, mode, steps):
    """A trained model in equinox; its batch norm is at `layers/1`."""

    class Model(eqx.Module):
        layers: list

        def __init__(self):
            bn = eqx.nn.BatchNorm(3, "batch", momentum=0.8, eps=1e-2, mode=mode)
            self.layers = [eqx.nn.Identity(), bn]

        def __call__(self, x, state):
            return self.layers[1](x, state)

    model, state = eqx.nn.make_with_state(Model)()
    run = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    for _ in range(steps):
        _, state = run(jnp.asarray(X), state)
    return model, state, run


@pytest.mark.parametrize("mode", ["batch", "ema"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_equinox_model(mode, steps):
    """Evaluation, and the running statistics after another step, of the module itself."""
    eqx = package("equinox")
    model, state, run = equinox_steps(eqx, mode, steps)
    layers = interop.each(interop.from_equinox, model, state, mode="batch")
    assert list(layers) == ["layers/1"]
    layer = layers["layers/1"]
    if (mode, steps) != ("ema", 0):  # which equinox leaves without numbers
        evaluated, _ = jax.vmap(
            eqx.nn.inference_mode(model), axis_name="b", in_axes=(0, None), out_axes=(0, None)
        )(jnp.asarray(X), state)
        y, _ = bnjax.bn_apply(layer.params, layer.state, X, False, **layer.options)
        assert error(y, evaluated) <= FIVE_STEPS
    x = 2 * X
    _, state = run(jnp.asarray(x), state)
    _, new = bnjax.bn_apply(layer.params, layer.state, x, True, **layer.options)
    there = interop.from_equinox(model, state, "layers/1", mode="batch").state
    assert error(new.mean, there.mean) <= FIVE_STEPS
    if (mode, steps) == ("batch", 0):
        # equinox's initial variance 1 is not debiased: 0.8 * 1 / (1 - 0.8) of it stay.
        assert error(new.var + 4, there.var) <= FIVE_STEPS
    else:
        assert error(new.var, there.var) <= FIVE_STEPS


def test_equinox_inside_the_same_vmap():
    eqx = package("equinox")
    model, state, run = equinox_steps(eqx, "batch", 2)
    layer = interop.from_equinox(model.layers[1], state, axis=0)

    def one(x):
        return bnjax.bn_apply(
            layer.params, layer.state, x, True, axis_name="batch", **layer.options
        )[0]

    y = jax.vmap(one, axis_name="batch")(X)
    assert error(y, run(jnp.asarray(X), state)[0]) <= FIVE_STEPS


def test_equinox_errors():
    """What the state of equinox raises, and what its filters do."""
    eqx = package("equinox")

    def make(_, mode="batch"):
        return eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode=mode)

    (model, state), (_, other) = make(0), make(1, "ema")
    with pytest.raises(ValueError, match="got one without batch_state_index"):
        interop.from_equinox(model, other)
    with pytest.raises(ValueError, match="`weight` must be an array where channelwise_affine"):
        interop.from_equinox(eqx.partition(model, eqx.is_array)[1], state)
    stacked = eqx.filter_vmap(make)(jnp.arange(2))
    with pytest.raises(ValueError, match=r"`batch_counter` must be one number, got shape \(2,\)"):
        interop.from_equinox(*stacked)
    one = jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, stacked)
    np.testing.assert_equal(interop.from_equinox(*one)[:2], interop.from_equinox(model, state)[:2])

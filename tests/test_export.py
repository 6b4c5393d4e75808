"""jax.export: one file for all platforms and batch sizes, and what is in it."""

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import linen as nn
from flax import nnx
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax import fold

PLATFORMS = ("cpu", "cuda", "tpu")
SIZES = (1, 5)
IMAGE = (6, 6, 3)
COLLECTIVES = ("all_reduce", "all_gather", "all_to_all", "collective")


def exported(function, *specs):
    return export.export(jax.jit(function), platforms=PLATFORMS)(*specs)


def spec(shape, dtype=jnp.float32, **options):
    """Of an array; the shape as jax.export writes it, as in "batch, 6, 6, 3"."""
    return jax.ShapeDtypeStruct(export.symbolic_shape(shape, **options), dtype)


def normal(*shape, dtype=jnp.float32, key=0):
    """By NumPy, so that nothing of it gets into a program that is traced."""
    return (3 + 2 * np.random.default_rng(key).standard_normal(shape)).astype(dtype)


def layer(channels=3):
    """A trained one."""
    params, state = bnjax.bn_init(channels)
    params = params._replace(scale=normal(channels, key=1), bias=normal(channels, key=2))
    return params, state._replace(mean=normal(channels, key=3), var=normal(channels, key=4) ** 2)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = bnjax.linen.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(2)(nn.relu(x).mean((1, 2)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = bnjax.nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def linen_model():
    """A network and its variables after some training."""
    net, x = LinenNet(), normal(8, *IMAGE)
    variables = net.init(jax.random.key(0), x, train=False)
    updates = net.apply(variables, x, train=True, mutable=["batch_stats"])[1]
    return net, {**variables, **updates}


def nnx_model():
    model = NNXNet(nnx.Rngs(0))
    model(normal(8, *IMAGE))
    model.eval()
    return model


def functional(x):
    return bnjax.bn_apply(*layer(), x, train=False)[0]


def masked(x):
    return bnjax.bn_apply(*layer(), x, train=False, mask=jnp.isfinite(x))[0]


def linen():
    net, variables = linen_model()
    return lambda x: net.apply(variables, x, train=False)


def folded_linen():
    net, variables = linen_model()
    folded = fold.linen(net, variables, normal(2, *IMAGE), train=False)
    assert not folded.kept
    return lambda x: folded.apply(folded.variables, x, train=False)


def with_nnx():
    model = nnx_model()
    return lambda x: model(x)


def folded_nnx():
    folded = fold.nnx(nnx_model(), normal(2, *IMAGE))
    assert not folded.kept
    return lambda x: folded.model(x)


CASES = {
    "functional": (lambda: functional, jnp.float32),
    "bfloat16": (lambda: functional, jnp.bfloat16),
    "masked": (lambda: masked, jnp.float32),
    "linen": (linen, jnp.float32),
    "linen, folded": (folded_linen, jnp.float32),
    "nnx": (with_nnx, jnp.float32),
    "nnx, folded": (folded_nnx, jnp.float32),
}
LAYERS = ("functional", "bfloat16", "masked")  # alone, without reductions of a network's own

PROGRAM = """
import pathlib, sys, warnings
warnings.simplefilter("error")
sys.modules.update(bnjax=None, flax=None)  # importing them fails
import jax, numpy as np
from jax import export
folder = pathlib.Path(sys.argv[1])
asked = np.load(folder / "asked.npz")
answers = {}
for path in folder.glob("*.jaxexport"):
    program = export.deserialize(bytearray(path.read_bytes()))
    for size, x in asked.items():
        y = jax.jit(program.call)(x.astype(program.in_avals[0].dtype))
        answers[f"{path.stem} {size}"] = np.asarray(y, np.float32)
np.savez(folder / "answers.npz", **answers)
"""


@pytest.fixture(scope="module")
def programs():
    """Name -> the original function, its exported form."""
    made = {name: (make(), dtype) for name, (make, dtype) in CASES.items()}
    return {
        name: (function, exported(function, spec("batch, 6, 6, 3", dtype)))
        for name, (function, dtype) in made.items()
    }


@pytest.fixture(scope="module")
def answers(programs, tmp_path_factory):
    """Name and batch size -> what a process without bnjax and flax answers."""
    folder = tmp_path_factory.mktemp("exported")
    np.savez(folder / "asked.npz", **{str(size): normal(size, *IMAGE) for size in SIZES})
    for name, (_, program) in programs.items():
        (folder / f"{name}.jaxexport").write_bytes(program.serialize())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with np.load(folder / "answers.npz") as found:
        return dict(found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_a_process_without_bnjax_gives_the_same_numbers(programs, answers, name, size):
    function, _ = programs[name]
    dtype = CASES[name][1]
    wanted = jax.jit(function)(normal(size, *IMAGE).astype(dtype)).astype(jnp.float32)
    rounded = None if dtype == jnp.float32 else dtype
    tolerances.assert_close(answers[f"{name} {size}"], wanted, jnp.float32, 27, rounded_to=rounded)


@pytest.mark.parametrize("name", CASES)
def test_the_program_is_evaluation_and_nothing_else(programs, name):
    _, program = programs[name]
    assert program.platforms == PLATFORMS
    assert program.nr_devices == 1
    assert [str(aval.shape) for aval in program.in_avals] == ["(batch, 6, 6, 3)"]
    text = program.mlir_module()
    assert not [word for word in COLLECTIVES if word in text]
    assert "stablehlo.while" not in text  # no second pass over the batch
    targets = re.findall(r"custom_call @(\w+)", text)
    assert set(targets) == {"shape_assertion"}
    if name in LAYERS:
        assert "stablehlo.reduce(" not in text  # nothing is summed over the batch
    assert ("rsqrt" in text) == ("folded" not in name)


def test_the_words_that_are_looked_for_are_those_of_training():
    """So that the test above can fail."""
    train = exported(
        lambda x: bnjax.bn_apply(*layer(), x, train=True)[0], spec("batch, 6, 6, 3")
    ).mlir_module()
    assert "stablehlo.reduce(" in train and "stablehlo.while" in train


def test_weights_and_statistics_are_constants():
    """What training does after the export, in place, does not reach the program."""
    model, x = nnx_model(), normal(5, *IMAGE)
    program = exported(lambda x: model(x), spec("batch, 6, 6, 3"))
    before = model(x)
    model.train()
    model(100 * x)
    model.eval()
    assert tolerances.error(model(x), before) > 0.01
    tolerances.assert_close(program.call(x), before, jnp.float32, 27)


def test_a_batch_over_several_devices(devices):
    """The program is of one device, and follows its input to several."""
    program = exported(functional, spec("batch, 6, 6, 3"))
    sharding = NamedSharding(Mesh(np.asarray(devices), ("data",)), PartitionSpec("data"))
    x = normal(16, *IMAGE)
    found = jax.jit(program.call)(jax.device_put(x, sharding))
    assert found.sharding.is_equivalent_to(sharding, found.ndim)
    chex.assert_trees_all_close(found, jax.jit(functional)(x), rtol=1e-6, atol=1e-6)


def test_height_and_width_may_be_symbolic():
    net, variables = linen_model()
    function = partial(net.apply, variables, train=False)
    program = exported(function, spec("batch, height, width, 3"))
    for shape in ((1, 3, 3, 3), (2, 9, 5, 3)):
        x = normal(*shape)
        tolerances.assert_close(program.call(x), jax.jit(function)(x), jnp.float32, 27)


# --- training ----------------------------------------------------------------------------


def train(x, train=True, **options):
    y, state = bnjax.bn_apply(*layer(), x, train, **options)
    return y, tuple(state)


def step(x, *mask):
    """Everything that a training step takes from the layer."""

    def loss(x):
        y, state = train(x, unbiased=True, mask=mask[0] if mask else None)
        return (y**3).sum(), (y, state)

    return jax.value_and_grad(loss, has_aux=True)(x)


@pytest.mark.parametrize("name", ["plain", "mask", "traced"])
def test_training_with_a_batch_of_any_size(name):
    """The count is symbolic in the program, and right in every call."""
    x = spec("batch, 3")
    scope = {"scope": x.shape[0].scope}
    function, further = {
        "plain": (step, []),
        "mask": (step, [spec("batch, 1", jnp.bool_, **scope)]),
        "traced": (train, [jax.ShapeDtypeStruct((), jnp.bool_)]),
    }[name]
    program = exported(function, x, *further)
    for size in (1, 7):
        kept = {
            "plain": [()],
            "mask": [(jnp.arange(size)[:, None] % 3 > 0,)],
            "traced": [(jnp.array(True),), (jnp.array(False),)],
        }[name]
        for rest in kept:
            x = normal(size, 3)
            found, wanted = program.call(x, *rest), jax.jit(function)(x, *rest)
            chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
            largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
            tolerances.assert_close(found, wanted, jnp.float32, size, scale=largest)


def test_a_mask_of_another_size_is_refused():
    x = spec("batch, 3")
    mask = spec("other, 1", jnp.bool_, scope=x.shape[0].scope)
    with pytest.raises(ValueError, match=r"`mask` must have the rank of `x`.*\(batch, 3\)"):
        exported(lambda x, m: train(x, mask=m), x, mask)


# --- accelerators that are not there --------------------------------------------------------

ON_TPU = """
import sys
sys.modules.update(bnjax=None, flax=None)
import jax, jax.numpy as jnp
from jax import export
from jax.experimental import topologies
with open(sys.argv[1], "rb") as file:
    program = export.deserialize(bytearray(file.read()))
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
where = jax.sharding.SingleDeviceSharding(topology.devices[0])
x = jax.ShapeDtypeStruct((7, 6, 6, 3), jnp.float32, sharding=where)
print(jax.jit(program.call).lower(x).compile().as_text())
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"
)
def test_the_file_compiles_for_tpus(programs, tmp_path):
    file = tmp_path / "nnx.jaxexport"
    file.write_bytes(programs["nnx"][1].serialize())
    names = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    environment = {**os.environ, **names, "TPU_WORKER_HOSTNAMES": "localhost"}
    done = subprocess.run(
        [sys.executable, "-c", ON_TPU, file],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "f32[7,2]" in done.stdout

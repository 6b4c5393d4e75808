"""Process-wide settings of the tests: eight CPU devices, nothing silent.

jax reads the environment when it is imported, so this comes first.
"""

import os
import sys
import zlib

if "jax" in sys.modules:
    raise RuntimeError(
        "tests/conftest.py must run before jax is imported, so that the tests get eight CPU "
        "devices. Run pytest without plugins or options that import jax."
    )

DEVICES = 8
# The last one counts, so that a caller's other flags are kept.
_FLAGS = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}"]
os.environ["XLA_FLAGS"] = " ".join(_FLAGS).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"

import chex  # noqa: E402
import flax  # noqa: E402
import jax  # noqa: E402
import jaxlib  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_report_header():
    modules = (jax, jaxlib, flax, chex)
    return ", ".join(f"{module.__name__} {module.__version__}" for module in modules)


def pytest_addoption(parser):
    parser.addoption(
        "--one-in",
        type=int,
        default=1,
        metavar="N",
        help="run every test, but of the cases of a parametrized one the first and about one in N",
    )


def pytest_collection_modifyitems(config, items):
    chance, begun, left_out = config.getoption("--one-in"), set(), []
    if chance < 1:
        raise pytest.UsageError(f"--one-in: must be at least 1, got {chance}.")
    for item in list(items):
        test = item.nodeid.split("[")[0]
        # By its name: a case is in or out in all processes.
        if test in begun and zlib.crc32(item.nodeid.encode()) % chance:
            items.remove(item)
            left_out.append(item)
        begun.add(test)
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def devices():
    """The eight CPU devices; a test of several devices fails without them."""
    found = jax.devices()
    assert len(found) == DEVICES, f"{DEVICES} CPU devices are needed, found {found}"
    assert {device.platform for device in found} == {"cpu"}
    return found


@pytest.fixture
def x64():
    """float64 for the length of one test."""
    with jax.enable_x64(True):
        yield

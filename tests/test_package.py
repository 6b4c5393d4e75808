"""The package: what importing it costs, its public names and their documentation."""

import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnjax
from bnjax import linen

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name in bnjax.__all__ if inspect.isfunction(getattr(bnjax, name))]
TUPLES = [name for name in bnjax.__all__ if name not in FUNCTIONS]


def in_a_new_process(code):
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_import_is_light():
    """Neither Flax, what reports need, nor another framework; and no device is touched."""
    heavy = ["flax", "matplotlib", "rich", "tqdm", "torch", "keras", "tensorflow", "haiku", "optax"]
    loaded = in_a_new_process(
        "import bnjax, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    assert "bnjax" in loaded and "jax" in loaded
    assert not set(heavy) & set(loaded)


def test_import_initialises_no_backend():
    code = (
        "import bnjax, bnjax.linen\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    assert in_a_new_process(code) == ["False"]


def test_flax_modules_are_imported_explicitly():
    code = "import bnjax, sys; print(hasattr(bnjax, 'linen'), 'bnjax.linen' in sys.modules)"
    assert in_a_new_process(code) == ["False", "False"]


def test_all():
    """Sorted, without duplicates, and just the public names that are no submodules."""
    assert bnjax.__all__ == sorted(set(bnjax.__all__), key=lambda name: (name.islower(), name))
    public = {
        name
        for name, value in vars(bnjax).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(bnjax.__all__)


def test_no_logic_in_init():
    source = inspect.getsource(bnjax)
    assert not re.search(r"^(def|class|if|for|while|with|try)\b", source, re.MULTILINE)


@pytest.mark.parametrize("name", [*FUNCTIONS, *TUPLES])
def test_docstring(name):
    value = getattr(bnjax, name)
    summary, _, rest = inspect.cleandoc(value.__doc__).partition("\n")
    assert summary.endswith((".", ":")) or rest, summary
    assert not summary.startswith(f"{name}("), "a generated docstring"
    assert "$" not in value.__doc__ and ":math:" not in value.__doc__, "plain-text maths"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_sections(name):
    """Arguments, all of them; results, errors, a runnable example, the source; a formula."""
    value = getattr(bnjax, name)
    doc, parameters = inspect.cleandoc(value.__doc__), inspect.signature(value).parameters
    sections = ["Args", "Returns", "Raises", "Example", "Source"]
    if not parameters:
        sections = ["Returns", "Example", "Source"]
    places = [doc.find(f"\n{section}:") for section in sections]
    assert all(place > 0 for place in places), dict(zip(sections, places, strict=True))
    assert places == sorted(places)
    assert " = " in doc[: places[0]], "the formula"
    assert ">>> " in doc
    described = re.findall(r"(?m)^  ([\w*, ]+):", doc[: doc.find("\nReturns:")])
    described = {word.strip("* ") for words in described for word in words.split(",")}
    assert described == set(parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keyword_only_options(name):
    """Whatever has a default is given by name."""
    for parameter in inspect.signature(getattr(bnjax, name)).parameters.values():
        if parameter.default is not parameter.empty:
            assert parameter.kind is parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", bnjax.__all__)
def test_annotations(name):
    value = getattr(bnjax, name)
    if name in FUNCTIONS:
        signature = inspect.signature(value)
        annotations = [p.annotation for p in signature.parameters.values()]
        assert inspect.Signature.empty not in [*annotations, signature.return_annotation]
    else:
        assert set(value.__annotations__) == set(value._fields)


def test_linen_docstring():
    doc = inspect.cleandoc(linen.BatchNorm.__doc__)
    for field in inspect.signature(linen.BatchNorm).parameters:
        assert field in ("parent", "name") or re.search(rf"(?m)^  .*\b{field}\b.*:", doc), field
    assert ">>> " in doc and "Source:" in doc


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", bnjax.__version__)
    assert bnjax.__version__ in (ROOT / "CHANGELOG.md").read_text()
    try:
        installed = importlib.metadata.version("bnjax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert installed == bnjax.__version__


def test_typed():
    assert (Path(bnjax.__file__).parent / "py.typed").exists()

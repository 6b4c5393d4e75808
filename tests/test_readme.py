"""The README: its Python runs as it stands, its links lead somewhere, no name is left out.

Blocks fenced as ```python run in order, in one namespace, in an empty folder. A block after
the comment <!-- no-run --> does not.
"""

import re
import textwrap
from pathlib import Path

import jax
import pytest

import bnjax

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = tuple(ROOT / folder / "README.md" for folder in (".", "benchmarks", "examples"))
NO_RUN = "<!-- no-run -->"
FENCE = re.compile(r"(?ms)^( *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^\1```[ ]*$")
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
REFERENCE = re.compile(r"(?m)^\s*\[[^\]]+\]:\s*(\S+)")
ATTRIBUTE = re.compile(r"""(?:src|href)=["']([^"']+)["']""")


def blocks(text):
    """(line, code, whether it runs) of each block of Python."""
    found = []
    for match in FENCE.finditer(text):
        if match["language"].split()[:1] == ["python"]:
            before = text[: match.start()].rstrip()
            line = text.count("\n", 0, match.start("code"))
            found.append((line, textwrap.dedent(match["code"]), not before.endswith(NO_RUN)))
    return found


def links(text):
    """Targets of links and images outside of code."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return [link for kind in (LINK, REFERENCE, ATTRIBUTE) for link in kind.findall(text)]


def anchors(text):
    """GitHub's names of the headings."""
    titles = re.findall(r"(?m)^#+ +(.+?) *#*$", FENCE.sub("", text))
    kept = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.replace(" ", "-") for title in kept}


def broken(text, folder):
    """Relative links that lead nowhere."""
    wrong = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        target = folder / path if path else None
        if target is not None and not target.exists():
            wrong.append(link)
        elif anchor and (target is None or target.suffix == ".md"):
            page = target.read_text() if target is not None else text
            wrong += [link] * (anchor not in anchors(page))
    return wrong


@pytest.mark.parametrize("page", [PAGES[0], PAGES[2]], ids=["README", "examples"])
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(page.read_text())
    assert any(runs for _, _, runs in found), "no block of Python that runs"
    namespace = {"__name__": "__main__"}
    for line, code, runs in found:
        assert ">>>" not in code, f"{page}:{line + 1}: a doctest cannot be copied and run"
        if runs:
            # Padded, so that a traceback names the line of the page.
            program = compile("\n" * line + code, str(page), "exec")
            with jax.numpy_rank_promotion("allow"):  # the default, as users have it
                exec(program, namespace)


def test_first_example_is_short():
    found = blocks(README.read_text())
    assert found, "no block of Python"
    assert found[0][2], "the first example does not run"
    assert len(found[0][1].strip().splitlines()) <= 12


def test_only_python_is_fenced_with_a_language_that_could_run():
    """So that no example escapes this test by another name."""
    languages = {m["language"].strip() for m in FENCE.finditer(README.read_text())}
    assert not languages & {"py", "python3", "Python", "pycon", "ipython", "{python}"}


@pytest.mark.parametrize("name", bnjax.__all__)
def test_every_public_name_occurs(name):
    assert re.search(rf"(?<![\w.]){name}\b|\bbnjax\.{name}\b", README.read_text())


@pytest.mark.parametrize("module", ["diagnostics", "fold", "interop", "linen", "nnx", "optim"])
def test_every_module_occurs(module):
    assert f"bnjax.{module}" in README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=["README", "benchmarks", "examples"])
def test_links(page):
    assert not broken(page.read_text(), page.parent)


def test_length():
    assert len(README.read_text().splitlines()) <= 400


# --- this file's own tools, on a page with everything in it ------------------------

PAGE = f"""
# Title of `it`, 100 %

```python
x = 1
```
{NO_RUN}

```python
boom
```
- item
  ```python
  y = 2
  ```
```bash
[no](link.md) in code
```
[a](tests/conftest.py) ![b](missing.png "title") [c](#title-of-it-100-) [d](#nowhere)
[e](https://example.org/x.md) `[f](g.md)` <img src="gone.svg"> [h](tests/conftest.py#L3)

[ref]: also/missing.md
"""


def test_blocks_of_a_page():
    assert blocks(PAGE) == [
        (4, "x = 1\n", True),
        (9, "boom\n", False),
        (13, "y = 2\n", True),
    ]


def test_broken_links_of_a_page():
    wanted = {"missing.png", "#nowhere", "gone.svg", "also/missing.md"}
    assert set(broken(PAGE, ROOT)) == wanted


def test_named_tests_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", README.read_text())
    assert len(named) >= 10
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"

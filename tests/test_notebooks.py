"""The notebooks: each runs in short mode, and is saved as it can be read without running.

What a notebook claims it asserts itself; here, that it does so when it is run again.
"""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
from benchmark_scripts import claims
from example_runs import PATIENCE, ROOT, paths_with_bnjax

RUN = ROOT / "notebooks" / "run.py"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
LINES = 15
BYTES = 1_000_000
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def outputs(path):
    return list(itertools.chain.from_iterable(cell["outputs"] for cell in code(path)))


def execute(*argv):
    # As a user has it: without this process's eight devices, and with pictures.
    ours = ("XLA_FLAGS", "MPLBACKEND")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env["PYTHONPATH"] = paths_with_bnjax()
    command = [sys.executable, str(RUN), *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)


def test_there_are_notebooks():
    numbers = [int(path.stem.split("_")[0]) for path in NOTEBOOKS]
    assert numbers == list(range(1, 7))


@every
def test_runs_in_short_mode(path, tmp_path):
    done = execute("--short", "--to", str(tmp_path), path.stem)
    assert done.returncode == 0, done.stderr
    again = tmp_path / path.name
    assert_complete(again)
    # Not the verdicts alone: a claim that "holds partly" still does when two of its parts change.
    assert {r["claim"]: r["parts"] for r in claims.of(again)} == {
        r["claim"]: r["parts"] for r in claims.of(path)
    }


@every
def test_is_saved_with_its_outputs(path):
    assert_complete(path)
    assert path.stat().st_size < BYTES


def assert_complete(path):
    """Run from top to bottom, without a warning or an error; with pictures."""
    cells = code(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    found = outputs(path)
    assert not [o for o in found if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in found)


@every
def test_cells_are_short(path):
    long = [c["source"][0] for c in read(path)["cells"] if len(c["source"]) > LINES]
    assert not long


@every
def test_every_verdict_is_asserted(path):
    """A cell that shows a verdict, or the next one, fails where it is another one."""
    sources = ["".join(cell["source"]) for cell in code(path)]
    shown = [i for i, s in enumerate(sources) if re.search(r"(?<!def )\bclaim\(", s)]
    assert len(shown) == len(list(claims.of(path)))
    assert all("assert verdict ==" in "".join(sources[i : i + 2]) for i in shown)


@every
def test_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(work|tmp|root|home|Users)/", text)


def test_beginnings_are_one():
    """What notebooks repeat, as each must run alone, is the same in all."""
    installs = {"".join(code(path)[0]["source"]) for path in NOTEBOOKS}
    assert len(installs) == 1
    assert "%pip install" in installs.pop()
    sources = ["".join(cell["source"]) for path in NOTEBOOKS for cell in code(path)]
    assert len({s for s in sources if s.startswith("def claim(")}) == 1


def test_all_claims_have_a_verdict():
    assert list(claims.saved()) == list(claims.CLAIMS)


def test_links_lead_to_headings():
    for record in claims.saved().values():
        path, anchor = record["link"].split("#")
        cells = read(ROOT / path)["cells"]
        found = {claims.anchor(h) for cell in cells for h in claims.headings(cell)}
        assert anchor in found
        assert anchor.startswith(f"{record['claim']}.")


def test_a_claim_that_fails_ends_the_run(tmp_path, monkeypatch):
    """Otherwise nothing above shows anything."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "run.py").write_bytes(RUN.read_bytes())
    cell = {"cell_type": "code", "source": ["assert 1 == 2"], "metadata": {}, "outputs": []}
    cell |= {"id": "a", "execution_count": None}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "1_wrong.ipynb").write_text(json.dumps(notebook))
    monkeypatch.setattr(sys.modules[__name__], "RUN", folder / "run.py")
    before = (folder / "1_wrong.ipynb").read_bytes()
    done = execute()
    assert done.returncode == 1
    assert "assert 1 == 2" in done.stderr
    assert (folder / "1_wrong.ipynb").read_bytes() == before


@pytest.mark.parametrize(
    "argv, said",
    [(["no_such"], "NAME must be of 1_batch_norm"), (["--short"], "Add --to DIR")],
    ids=["name", "short"],
)
def test_bad_input(argv, said):
    done = execute(*argv)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())

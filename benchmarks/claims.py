"""The verdicts on claims: what the notebooks found, and examples/paper_mnist.py on MNIST.

A notebook's cell leaves its verdict in the metadata of its output, so that the saved
notebook is the only place where the numbers are.
"""

import json
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
CLAIMS = range(1, 28)
VERDICTS = ("holds", "holds partly", "fails")
AT_LENGTH = "examples/README.md#paper_mnistpy"


class ClaimError(ValueError):
    """A saved notebook cannot be used; the message says which and why."""


def saved(folder: Path = NOTEBOOKS) -> dict[int, dict[str, Any]]:
    """All verdicts by the number of their claim: text, measured, verdict, link."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        for record in of(path):
            if record["claim"] in found:
                raise ClaimError(f"{path.name}: claim {record['claim']} has two verdicts.")
            found[record["claim"]] = record
    return dict(sorted(found.items()))


def of(path: Path) -> Iterator[dict[str, Any]]:
    """The verdicts of a notebook, in its order; the link is that of the claim's heading."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    titles = [heading for cell in cells for heading in headings(cell)]
    for cell in cells:
        for output in cell.get("outputs", []):
            record = output.get("metadata", {}).get("bnjax")
            if record is None:
                continue
            if record["verdict"] not in VERDICTS:
                raise ClaimError(f"{path.name}: {record['verdict']!r} is not of {VERDICTS}.")
            own = [title for title in titles if title.startswith(f"{record['claim']}.")]
            if len(own) != 1:
                raise ClaimError(
                    f"{path.name}: claim {record['claim']} needs one heading, has {own}."
                )
            yield {**record, "link": f"{path.parent.name}/{path.name}#{anchor(own[0])}"}


def headings(cell: dict[str, Any]) -> list[str]:
    """Of a cell of text."""
    if cell["cell_type"] != "markdown":
        return []
    return re.findall(r"(?m)^#+ +(.+?) *$", "".join(cell["source"]))


def anchor(heading: str) -> str:
    """Jupyter's name of a heading, as a part of a link."""
    return urllib.parse.quote(heading.replace(" ", "-"))


def with_parts(row: dict[str, str]) -> str:
    """A verdict of paper_mnist.py, and how many of its parts hold."""
    answers = [part.rsplit(": ", 1)[1] for part in row["parts"].split("; ")]
    return f"{row['verdict']} ({answers.count('yes')} of {len(answers)} parts)"


def rows(at_length: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row for each claim; `at_length`: verdicts on more data, after longer training."""
    found = saved()
    if missing := sorted(set(CLAIMS) - set(found)):
        raise ClaimError(f"no notebook has a verdict on the claims {missing}. Run make notebooks.")
    longer = {int(row["claim"]): with_parts(row) for row in at_length}
    shown = []
    for number, record in found.items():
        verdict = f"[{record['verdict']}]({record['link']})"
        if number in longer:
            verdict += f"; [MNIST]({AT_LENGTH}): {longer[number]}"
        claim = f"{number}. {record['text']}"
        measured = record["measured"].replace("|", "\\|")  # which would end a cell
        shown.append({"claim": claim, "measured": measured, "verdict": verdict})
    return shown

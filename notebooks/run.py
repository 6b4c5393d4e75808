"""Executes notebooks, and saves them with their outputs.

python notebooks/run.py                    all, in place
python notebooks/run.py 2_why_it_trains    one
python notebooks/run.py --short --to DIR   few seeds and steps, as the tests do, saved elsewhere
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent
CELL_SECONDS = 600
# Cropping a figure draws it twice.
UNCROPPED = ("--InlineBackend.print_figure_kwargs={'bbox_inches': None}",)


def numbered() -> list[str]:
    return sorted(path.stem for path in HERE.glob("[0-9]*.ipynb"))


def executed(path: Path, options: Sequence[str] = ()) -> Any:
    """The notebook with its outputs, without what differs from run to run.

    options: of the kernel's command line.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.clear()
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        record_timing=False,
        extra_arguments=list(options),
        shutdown_kernel="immediate",  # nothing is left to save, and asking it takes seconds
        resources={"metadata": {"path": str(HERE)}},
    )
    client.execute()
    # The kernel's answer names the version of Python.
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def write(notebook: Any, path: Path) -> None:
    """Replaces the file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="without .ipynb; default: all")
    parser.add_argument("--short", action="store_true", help="few seeds and steps")
    parser.add_argument("--to", type=Path, default=HERE, metavar="DIR", help="where to save")
    options = parser.parse_args()
    names = [name.removesuffix(".ipynb") for name in options.names] or numbered()
    if unknown := sorted(set(names) - set(numbered())):
        parser.error(f"NAME must be of {', '.join(numbered())}, got {', '.join(unknown)}.")
    if options.short and options.to.resolve() == HERE.resolve():
        parser.error("--short would replace the saved results. Add --to DIR.")
    os.environ.pop("BNJAX_SHORT", None)
    if options.short:
        os.environ["BNJAX_SHORT"] = "1"
        # Most of a short run is compilation.
        flags = os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=1"
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    options.to.mkdir(parents=True, exist_ok=True)
    for name in names:
        began = time.perf_counter()
        try:
            notebook = executed(HERE / f"{name}.ipynb", UNCROPPED if options.short else ())
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        write(notebook, options.to / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The same numbers in several real processes, and what happens when one of them does not end."""

import sys
import time

import jax.numpy as jnp
import pytest
import tolerances
from benchmark_scripts import devices as script
from benchmark_scripts import ways

MASK = "uneven mask"
BOUND = tolerances.values(jnp.float32, ways.N)


def test_one_device_is_many_processes():
    """Every way, in one start of the processes, one of which has a device without entries.

    With one all-reduce forward and one backward; pmap of several processes does not show
    its program.
    """
    processes = script.in_processes([MASK])
    assert len(processes) == script.PROCESSES
    for process in processes:
        assert list(process) == [script.key(way, MASK) for way in ways.WAYS]
        for name, measured in process.items():
            errors = measured.differences
            assert all(error <= BOUND for error in errors.values()), (name, errors)
            assert measured.copies == processes[0][name].copies, f"{name}: processes drift apart"
            assert all(len(bits) == 1 for bits in measured.copies.values()), name
            always = [c.kind for c in measured.collectives if c.place == "always"]
            assert always == ["all-reduce"] * (0 if name.startswith("pmap") else 2), name


PYTHON = [sys.executable, "-c"]
HANGS = [*PYTHON, "import time; time.sleep(600)"]


@pytest.mark.parametrize(
    "other, message",
    [
        ([*PYTHON, "print('no disk'); raise SystemExit(3)"], r"(?s)1 of 2.*status 3.*no disk"),
        (HANGS, r"The 2 processes did not end in time \(limit 1 s\)"),
    ],
)
def test_a_process_that_fails_ends_the_others(other, message):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        script.run_all([HANGS, other], patience=60 if "raise" in other[-1] else 1)
    assert time.monotonic() - began < 30

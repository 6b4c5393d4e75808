"""How many all-reduces a layer needs, and of how many bytes."""

import json
import os
import subprocess
import sys

import pytest
from benchmark_scripts import FOLDER, collectives, hlo, results, ways


def backward_floats(way):
    """Per channel of a device: sums of dy and of dy * (x - mean), which scale and bias share.

    Without check_vma JAX sums what is sent back to three sums of the forward pass, and the
    caller sums the gradients of scale and bias.
    """
    mapped = "without vma" in way or way in ("pmap", "vmap", "vmap of vmap")
    return 5 if mapped else 2


def assert_formula(row):
    """Sums, sums of squares and, with a mask, counts; in float32, on any number of devices."""
    channels = int(row["channels"]) // ways.WAYS[row["way"]].channels
    masked = row["mask"] == "mask"
    forward = (3 if masked else 2) * channels
    assert int(row["forward"]) == int(row["backward"]) == 1, row
    assert int(row["forward_bytes"]) == 4 * forward, row
    # A loss that is summed over the devices brings a float of its own.
    of_loss = "grad outside" in row["way"] and "without" in row["way"]
    assert int(row["backward_bytes"]) == 4 * (backward_floats(row["way"]) * channels + of_loss), row


def assert_complete(rows, names, devices, channels):
    """Without any that is missing or that comes twice."""
    found = [(r["way"], r["mask"], int(r["devices"]), int(r["channels"])) for r in rows]
    masks = ("no mask", "mask")
    wanted = {(w, m, d, c) for w in names for m in masks for d in devices for c in channels}
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("rows, channels", [(64, 6), (1024, 16)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["jit, auto", "shard_map, grad inside"])
def test_bytes_are_those_of_the_channels(way, masked, rows, channels, devices):
    """Whatever the size of the batch is."""
    assert_formula(collectives.row(way, masked, rows, channels, devices))


def test_few_entries_sharded_under_jit(devices):
    """Their sums are about the first two entries, which the other devices have to be told."""
    row = collectives.row("jit, auto", False, 32, 6, devices)
    assert (row["forward"], row["forward_bytes"]) == (2, 4 * (2 + 2) * 6)
    assert (row["backward"], row["backward_bytes"]) == (1, 4 * 2 * 6)


def test_the_table_of_all_ways():
    rows, _ = results.read("allreduces")
    assert_complete(rows, ways.WAYS, [collectives.CPU_DEVICES], [ways.C])
    for row in rows:
        assert_formula(row)
        assert int(row["condition_bytes"]) == (ways.WAYS[row["way"]].channels > 1)


def test_the_table_of_topologies():
    """Up to 256 devices: the bytes do not depend on their number."""
    rows, _ = results.read("collectives")
    assert max(collectives.TOPOLOGIES) == 256
    names = collectives.TPU_WAYS, collectives.TOPOLOGIES, collectives.CHANNELS
    assert_complete(rows, *names)
    for row in rows:
        assert_formula(row)
        assert row["condition_bytes"] == "0"


@pytest.mark.skipif(collectives.libtpu() is None, reason="needs libtpu: pip install libtpu")
def test_compiled_for_tpus():
    """In a process of its own, which may not take long."""
    options = {"names": ["jit, auto", "shard_map, grad inside"], "channels": [64]}
    program = (
        f"import json, sys; sys.path.insert(0, {str(FOLDER)!r}); import collectives; "
        f"print(json.dumps(list(collectives.on_tpu(devices=[4, 256], **{options}))))"
    )
    path = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert_complete(rows, options["names"], [4, 256], options["channels"])
    for row in rows:
        assert_formula(row)


# --- the reader of compiled programs -------------------------------------------------

PROGRAM = """\
HloModule jit_f, entry_computation_layout={(f32[8,6]{1,0})->f32[6]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%inner (p: f32[6]) -> f32[6] {
  ROOT %all-reduce.9 = f32[6]{0:T(128)S(1)} all-reduce(f32[6]{0} %p), to_apply=%add
}

%body (p: (s32[], f32[6])) -> (s32[], f32[6]) {
  %called = f32[6]{0} fusion(f32[6]{0} %q), kind=kLoop, calls=%inner
}

%condition (p: (s32[], f32[6])) -> pred[] {
  ROOT %any = pred[] all-reduce(pred[] %ill), to_apply=%or
}

%branch.clone (p: f32[6]) -> f32[6] {
  ROOT %gathered = bf16[2,6]{1,0} all-gather(bf16[1,6]{1,0} %p), dimensions={0}
}

ENTRY %main.1_spmd (x: f32[8,6]) -> f32[6] {
  %start = (f32[6]{0:T(128)}, /*index=1*/f32[]) all-reduce-start(f32[6] %x, f32[] %y), to_apply=%add
  %done = (f32[6]{0:T(128)}, f32[]) all-reduce-done(f32[6] %start)
  %part = f32[6]{0} get-tuple-element((f32[6]{0}, f32[]) %all-reduce.1), index=0
  %loop = (s32[], f32[6]{0}) while(%tuple), condition=%condition, body=%body
  %chosen = f32[6]{0} conditional(%i, %x, %x), branch_computations={%branch.clone, %inner}
  ROOT %last = f32[6]{0} call(f32[6]{0} %part), to_apply=%inner
}
"""


def test_collectives_of_a_program():
    assert sorted(hlo.collectives(PROGRAM)) == sorted(
        [
            hlo.Collective("all-reduce", 28, "always"),
            hlo.Collective("all-reduce", 1, "condition"),
            hlo.Collective("all-reduce", 24, "branch"),
            hlo.Collective("all-gather", 24, "branch"),
            hlo.Collective("all-reduce", 24, "branch"),
            hlo.Collective("all-reduce", 24, "always"),
        ]
    )


def test_not_a_compiled_program():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.collectives("module @jit_f {\n}")

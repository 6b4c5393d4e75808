"""What compiled programs move and keep: the present counts, and how they are counted."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from benchmark_scripts import FOLDER, counts, hlo, programs, results
from layers import Bnjax, Linen

IMAGES, SMALL = (8, 14, 14, 64), (60, 100)
# Sizes of x moved, of 3, 8 and 2 that streaming kernels need; kernels; temporary sizes of x. No
# more than now, in either version of JAX. [C] vectors come on top, not small beside 60 x 100.
MOST = {
    (IMAGES, "forward", "float32"): (4, 20, 0),
    (IMAGES, "forward", "bfloat16"): (4, 20, 0),
    (IMAGES, "forward + backward", "float32"): (10, 26, 0),
    (IMAGES, "forward + backward", "bfloat16"): (10, 26, 0),
    (IMAGES, "evaluation", "float32"): (2, 2, 0),
    (IMAGES, "evaluation", "bfloat16"): (2, 2, 0),
    (SMALL, "forward", "float32"): (6.3, 8, 0),
    (SMALL, "forward", "bfloat16"): (11.8, 10, 2),
    (SMALL, "forward + backward", "float32"): (12.9, 14, 0),
    (SMALL, "forward + backward", "bfloat16"): (22.5, 16, 4),
    (SMALL, "evaluation", "float32"): (2, 2, 0),
    (SMALL, "evaluation", "bfloat16"): (2, 2, 0),
}
VECTORS = 0.2


def sizes(row, *names):
    return sum(float(row[name]) for name in names)


def count(kind, *case, devices=None, **options):
    case = programs.Case(*case, **options)
    return counts.counted(case, case.layer(kind), devices or jax.devices())


@pytest.mark.parametrize("case", MOST, ids=str)
def test_programs_for_the_cpu_take_no_more_than_now(case):
    shape, program, dtype = case
    moved, kernels, temporary = MOST[case]
    ours = count(Bnjax, program, shape, dtype)
    assert sizes(ours, "read", "written") <= moved + VECTORS
    assert ours["kernels"] <= kernels
    assert sizes(ours, "temporary") <= temporary + VECTORS


@pytest.mark.parametrize("dtype, number", [("float32", 2), ("bfloat16", 1)])
def test_what_small_gradients_add_per_channel_is_made_once(dtype, number):
    """A vector more in MOST: as fast as without, in each entry, only for narrow arrays."""
    case = programs.Case("forward + backward", SMALL, dtype)
    text = programs.compiled(case, case.layer(Bnjax), jax.devices()).as_text()
    made = re.findall(r"ROOT \S+ = f32\[100\]\S* divide\(", text)
    assert len(made) == number


@pytest.mark.parametrize("case", MOST, ids=str)
def test_programs_for_the_cpu_move_no_more_than_those_of_flax(case):
    """With its wrong variance. But small forward passes do: they write x - shift."""
    shape, program, dtype = case
    ours, theirs = (count(kind, program, shape, dtype) for kind in (Bnjax, Linen))
    more = 2.5 if (shape, program) == (SMALL, "forward") else VECTORS
    assert sizes(ours, "read", "written") <= sizes(theirs, "read", "written") + more
    assert sizes(theirs, "branches") == 0


def test_branches_are_left_out_of_what_the_analysis_of_xla_always_counts():
    """And only while that is counted."""
    case = programs.Case("forward + backward", IMAGES)
    for kind in (Bnjax, Linen):
        layer = case.layer(kind)
        found = counts.counted(case, layer, jax.devices())
        always = float(counts.always(case, layer, jax.devices(), found))
        assert always <= sizes(found, "xla") - sizes(found, "branches") + VECTORS
        assert (always < sizes(found, "xla")) == (kind is Bnjax)
        assert counts.counted(case, layer, jax.devices()) == found


@pytest.mark.parametrize("dtype", counts.DTYPES)
def test_channels_first_move_no_more(dtype):
    last = count(Bnjax, "forward + backward", IMAGES, dtype)
    first = count(Bnjax, "forward + backward", (8, 64, 14, 14), dtype, axis=1)
    assert sizes(first, "read", "written") <= sizes(last, "read", "written") + VECTORS


@pytest.mark.parametrize("kind", [Bnjax, Linen])
@pytest.mark.parametrize("dtype", counts.DTYPES)
def test_agrees_with_the_analysis_of_xla(kind, dtype):
    """Which exists for the CPU, and counts what runs once in a loop and in a condition too."""
    row = count(kind, "forward + backward", IMAGES, dtype)
    assert sizes(row, "read", "written", "branches") == pytest.approx(sizes(row, "xla"), rel=0.01)


@pytest.mark.parametrize("dtype", counts.DTYPES)
@pytest.mark.parametrize("shape, axis", [((60, 100), -1), (IMAGES, -1), ((8, 64, 14, 14), 1)])
def test_one_copy_of_x_is_kept(shape, axis, dtype):
    case = programs.Case("forward + backward", shape, dtype, axis)
    found = counts.residuals(case, case.layer(Bnjax))
    assert found == {"residuals": 1, "residual_bytes": jnp.dtype(dtype).itemsize}


@pytest.mark.parametrize("program, number", [("forward", 1), ("forward + backward", 2)])
def test_all_reduces(program, number, devices):
    row = count(Bnjax, program, IMAGES, devices=devices)
    assert row["all_reduces"] == 0
    case = programs.Case(program, IMAGES, devices=4)
    assert counts.counted(case, case.layer(Bnjax), devices)["all_reduces"] == number


# --- the tables ------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_results_hold_every_case_once(platform):
    rows, comment = results.read(f"counts-{platform}")
    assert "compiled for" in comment
    found = [tuple(row[name] for name in programs.Case._fields) for row in rows]
    wanted = {
        tuple(str(value) for value in (case._asdict() | {"shape": counts.shape(case)}).values())
        for case in counts.cases(platform)
    }
    for layer in ("bnjax", "flax.linen"):
        of_layer = [case for case, row in zip(found, rows, strict=True) if row["layer"] == layer]
        assert len(of_layer) == len(wanted)
        assert set(of_layer) == wanted


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_results_of_all_reduces(platform):
    rows, _ = results.read(f"counts-{platform}")
    for row in rows:
        number = {"forward": 1, "forward + backward": 2}.get(row["program"])
        if row["layer"] == "bnjax":
            assert row["all_reduces"] == str(0 if row["devices"] == "1" else number), row


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_results_are_no_more_than_those_of_flax(platform):
    """By our count and by XLA's own, but for [C] vectors."""
    rows, _ = results.read(f"counts-{platform}")
    layers = ("bnjax", "flax.linen")
    for ours, theirs in zip(*([r for r in rows if r["layer"] == n] for n in layers), strict=True):
        assert sizes(ours, "read", "written") <= sizes(theirs, "read", "written") + VECTORS, ours
        if ours["xla"]:
            assert sizes(ours, "xla_always") <= sizes(theirs, "xla_always") + VECTORS, ours


# --- compiled for what is not here -----------------------------------------------------

PROGRAM = """
import json, sys
sys.path.insert(0, {folder!r})
import counts, hlo, jax, jax.numpy as jnp, programs
from layers import Bnjax, Linen
from programs import Case
programs.prepare({platform!r})
devices = programs.devices({platform!r})
found = []
for program in ("forward", "forward + backward", "evaluation"):
    for dtype in counts.DTYPES:
        case = Case(program, (64, 28, 28, 256), dtype)
        found.append([counts.counted(case, case.layer(kind), devices) for kind in (Bnjax, Linen)])
case = Case("forward + backward", (64, 28, 28, 256), devices=4)
found.append(counts.counted(case, case.layer(Bnjax), devices)["all_reduces"])
here = jax.sharding.SingleDeviceSharding(devices[0])
x = jax.ShapeDtypeStruct((2**16, 2048), jnp.float32, sharding=here)
text = jax.jit(lambda x: x - x.mean(0, keepdims=True)).lower(x).compile().as_text()
kernels = hlo.kernels(text)
found.append([sum(k.read for k in kernels), sum(k.written for k in kernels)])
print(json.dumps(found))
"""


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_compiled_for(platform):
    """In a process of its own: no more moved than by Flax, one all-reduce each way."""
    if programs.version(platform) is None:
        pytest.skip(f"needs {programs.PLATFORMS[platform].install}")
    path = os.pathsep.join(filter(None, (str(FOLDER.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=str(FOLDER), platform=platform)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    *pairs, all_reduces, centred = json.loads(done.stdout.splitlines()[-1])
    for ours, theirs in pairs:
        assert sizes(ours, "read", "written") <= sizes(theirs, "read", "written") + VECTORS
    assert all_reduces == 2
    # Counted by hand: x is read for the mean, and again for the difference, which is written.
    size = 4 * 2**16 * 2048
    assert centred == pytest.approx([2 * size, size], rel=0.01)


# --- the counting ----------------------------------------------------------------------


def test_a_program_counted_by_hand():
    """x is read for the mean, and again for the difference, which is written."""
    x = jax.ShapeDtypeStruct((1024, 128), jnp.float32)
    found = hlo.kernels(
        jax.jit(lambda x: x - x.mean(0, keepdims=True)).lower(x).compile().as_text()
    )
    vector = 4 * 128
    assert sum(k.read for k in found) == pytest.approx(2 * 1024 * vector, abs=8 * vector)
    assert sum(k.written for k in found) == pytest.approx(1024 * vector, abs=8 * vector)


TEXT = """\
HloModule jit_f, is_scheduled=true

%part (p.0: f32[8,4], p.1: s32[], p.2: f32[8]) -> f32[2,4] {
  %p.0 = f32[8,4]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = f32[8]{0} parameter(2)
  %total = f32[] reduce(%p.2, %p.1), dimensions={0}, to_apply=%add
  ROOT %slice.1 = f32[2,4]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={2,4}
}

%update (q.0: f32[8,4], q.1: f32[2,4], q.2: s32[]) -> (f32[8,4], f32[2,4]) {
  %q.0 = f32[8,4]{1,0} parameter(0)
  %q.1 = f32[2,4]{1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %twice = f32[2,4]{1,0} add(%q.1, %q.1)
  %new = f32[8,4]{1,0} dynamic-update-slice(%q.0, %twice, %q.2, %q.2)
  ROOT %both = (f32[8,4]{1,0}, f32[2,4]{1,0}) tuple(%new, %twice)
}

%body (b: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %b = (s32[], f32[8,4]{1,0}) parameter(0)
  %b.1 = f32[8,4]{1,0} get-tuple-element(%b), index=1
  %b.2 = f32[8,4]{1,0} copy(%b.1)
}

%condition (c: (s32[], f32[8,4])) -> pred[] {
  %c = (s32[], f32[8,4]{1,0}) parameter(0)
  %c.1 = s32[] get-tuple-element(%c), index=0
  ROOT %c.2 = pred[] compare(%c.1, %c.1), direction=LT
}

%keep (k: f32[8,4]) -> f32[8,4] {
  %k = f32[8,4]{1,0} parameter(0)
  ROOT %k.1 = f32[8,4]{1,0} copy(%k)
}

%more (m: f32[8,4]) -> f32[8,4] {
  %m = f32[8,4]{1,0} parameter(0)
  %m.0 = f32[4]{0} reduce(%m), dimensions={0}, to_apply=%add
  ROOT %m.1 = f32[8,4]{1,0} multiply(%m, %m.0)
}

%later (l: f32[8,4]) -> bf16[8,4] {
  %l = f32[8,4]{1,0} parameter(0)
  ROOT %l.1 = bf16[8,4]{1,0} convert(%l)
}

ENTRY %main.1 (x: f32[8,4], i: s32[], v: f32[8]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %v = f32[8]{0:T(8)S(1)} parameter(2)
  %cut = f32[2,4]{1,0:T(8,128)(2,1)} fusion(%x, %i, %v), calls=%part, metadata={op_name="f"}
  %put = (f32[8,4]{1,0}, f32[2,4]{1,0}) fusion(%x, %cut, %i), kind=kLoop, calls=%update
  %put.0 = f32[8,4]{1,0} get-tuple-element(%put), index=0
  %copy-start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0}, u32[]{:S(2)}) copy-start(%put.0)
  %slice-start = ((f32[8,4]{1,0}), f32[1,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)
  %near = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %row = f32[1,4]{1,0:S(1)} slice-done(%slice-start)
  %joined = f32[8,4]{1,0} custom-call(%row, %near), custom_call_target="ConcatBitcast"
  %called = f32[8,4]{1,0} custom-call(%x, %x, /*index=2*/%near), custom_call_target="other"
  %t = (s32[], f32[8,4]{1,0}) tuple(%i, %called)
  %loop = (s32[], f32[8,4]{1,0}) while(%t), condition=%condition, body=%body
  %either = f32[8,4]{1,0} conditional(%i, %x, %x), branch_computations={%keep, %more}
  %begun = ((f32[8,4]{1,0}), bf16[8,4]{1,0}) async-start(%x), calls=%later
  %ended = bf16[8,4]{1,0} async-done(%begun)
  %reduced-start = f32[8]{0} all-reduce-start(%v), to_apply=%add
  %reduced = f32[8]{0} all-reduce-done(%reduced-start)
  ROOT %last = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_of_a_program():
    """x has 128 bytes, its slices have 32 and 16, i has 4; v, near and row are on the chip."""
    assert hlo.kernels(TEXT) == [
        hlo.Kernel("fusion", 32 + 4, 32, "always"),
        hlo.Kernel("fusion", 32 + 4, 32 + 32, "always"),
        hlo.Kernel("copy", 128, 0, "always"),
        hlo.Kernel("slice", 16, 0, "always"),
        hlo.Kernel("custom-call", 128, 128, "always"),
        hlo.Kernel("compare", 4, 1, "condition"),
        hlo.Kernel("copy", 128, 128, "branch"),
        hlo.Kernel("copy", 128, 128, "always"),
        hlo.Kernel("branch", 128 + 16, 16, "branch"),
        hlo.Kernel("convert", 128, 64, "always"),
        hlo.Kernel("all-reduce", 0, 32, "always"),
    ]


BRANCHES = """\
%one (o: f32[4]) -> f32[4] {
  ROOT %o.1 = f32[4]{0} all-reduce(%o), to_apply=%add
}

%two (t: f32[4]) -> f32[4] {
  %t.1 = f32[4]{0} all-reduce(%t), to_apply=%add
  ROOT %t.2 = f32[4]{0} all-reduce(%t.1), to_apply=%add
}

ENTRY %main (x: f32[4], i: s32[]) -> f32[4] {
  ROOT %either = f32[4]{0} conditional(%i, %x, %x), branch_computations={%one, %two}
}
"""


def test_what_all_branches_reduce_is_reduced_always():
    found = hlo.collectives(BRANCHES)
    assert found == [hlo.Collective("all-reduce", 16, place) for place in ("always", "branch")]


def test_bytes():
    shape = "(f32[8,4]{1,0:T(8,128)S(1)}, /*index=1*/bf16[3]{0}, token[], pred[])"
    assert hlo.bytes_of(shape) == 128 + 6 + 1
    assert hlo.bytes_of(shape, memory=True) == 6 + 1
    with pytest.raises(KeyError, match="f8e4m3fn"):
        hlo.bytes_of("f8e4m3fn[2]")

"""export_model.py: the file, run without bnjax; what it says; bad options."""

import contextlib
import json
import re
import shutil
import subprocess
import sys

import example_runs
import export_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained
from example_runs import contents, data, options, refused, script, train_cnn, train_mlp
from jax import export

import bnjax._fold.nnx  # noqa: F401  before jax compiles anything: it compiles anew after this

main = export_model.main
ONLY_WRITE = ["--platforms", "cuda", "tpu"]  # what cannot be run here is not compared


def saved(example, folder, **settings):
    """A run of one step, whose checkpoint holds other numbers than a new network."""

    def moved(v):
        return v + 0.1 if jnp.issubdtype(v.dtype, jnp.floating) else v

    dataset = data.load("digits")
    given = example.settings(**settings, run_dir=folder)
    networks = example.networks(given, dataset)
    states = jax.tree.map(moved, {name: network.state for name, network in networks.items()})
    with contextlib.closing(script.open_run(example, given, dataset)) as opened:
        opened.save(states, {"step": 1, "metrics": [{"step": 1}]})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs in runs/, as `make train` names them; the newest is the CNN's."""
    folder = tmp_path_factory.mktemp("trained") / "runs"
    saved(train_mlp.SCRIPT, folder / "mlp-001", hidden=(8,))
    saved(train_mlp.SCRIPT, folder / "plain", hidden=(8,), bn=False)
    saved(train_cnn.SCRIPT, folder / "cnn-001", channels=(2,))
    return folder


def answers(program, images):
    return np.asarray(jax.jit(export.deserialize(bytearray(program)).call)(images))


def test_the_newest_run_is_exported_and_runs_without_bnjax(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs.parent)
    before = contents(runs)
    assert main(["--folded"]) == 0
    said = capsys.readouterr().out
    assert "Run folder: runs/cnn-001, step 1, network bn" in said
    assert "float32[batch,64] -> float32[batch,10]" in said and "cpu, cuda, tpu" in said
    ratios = re.findall(r"│ +(\d+) │ +([\d.e+-]+) │ +(\d+) of (\d+) │", said)
    assert [row[0] for row in ratios] == ["1", "64"]
    for size, ratio, same, of in ratios:
        assert float(ratio) < 1e-5 and same == of == size
    (made,) = (path for path in contents(runs) if path not in before)
    assert str(made) == "cnn-001/model.jaxexport"
    assert "rsqrt" not in export.deserialize(bytearray((runs / made).read_bytes())).mlir_module()


def test_the_lines_for_a_server_load_the_file(runs, tmp_path, capsys):
    out = tmp_path / "served.jaxexport"
    assert main(["--run-dir", str(runs / "mlp-001"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    program = said[said.index("import jax\n") :]
    images = data.load("digits").test_images[:3]
    check = f"import numpy as np\nimages = np.load({str(tmp_path / 'images.npy')!r})\n{program}"
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{check}\nprint(np.asarray(logits).tolist())"],
        capture_output=True,
        text=True,
        timeout=example_runs.PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    wanted = answers(out.read_bytes(), images)
    np.testing.assert_allclose(json.loads(done.stdout), wanted, rtol=1e-5, atol=1e-5)


def test_networks_and_platforms_are_those_asked_for(runs, tmp_path, capsys):
    texts = {}
    for name, extra in {"bn": [], "no-bn": ["--network", "no-bn"], "folded": ["--folded"]}.items():
        out = tmp_path / f"{name}.jaxexport"
        argv = ["--run-dir", str(runs / "mlp-001"), "--out", str(out), *ONLY_WRITE, *extra]
        assert main(argv) == 0
        program = export.deserialize(bytearray(out.read_bytes()))
        assert program.platforms == ("cuda", "tpu")
        texts[name] = program.mlir_module()
    assert "it was not run" in capsys.readouterr().out
    assert {name: text.count("stablehlo.rsqrt") for name, text in texts.items()} == {
        "bn": 1,
        "no-bn": 0,
        "folded": 0,
    }


@pytest.mark.slow  # above, the checkpoints were written without training
@pytest.mark.parametrize("example", [train_mlp, train_cnn], ids=["mlp", "cnn"])
def test_a_trained_network(example, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert example.main(["--steps", "60", "--eval-every", "60", "--run-dir", run]) == 0
    assert main(["--run-dir", run, "--folded"]) == 0
    assert "64 of 64" in capsys.readouterr().out


@pytest.fixture
def network():
    """Of three images; its logits are what a test says."""
    images = np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2)
    dataset = data.Dataset("three", *[images, np.arange(3)] * 2, 3)
    return trained.Trained(None, dataset, jnp.dtype(jnp.float32), step=4)


def answered(monkeypatch, function):
    monkeypatch.setattr(
        export_model, "answers", lambda _, batches: {k: function(x) for k, x in batches.items()}
    )


def test_an_export_that_differs_is_an_error(network, monkeypatch):
    answered(monkeypatch, lambda x: x)
    assert export_model.compare(b"", network, lambda x: x).row_count == 2
    answered(monkeypatch, lambda x: 1.001 * x)
    with pytest.raises(RuntimeError, match="differs"):
        export_model.compare(b"", network, lambda x: x)
    answered(monkeypatch, lambda x: x / 0)
    with np.errstate(all="ignore"), pytest.raises(RuntimeError, match="differs"):
        export_model.compare(b"", network, lambda x: x)


# --- bad options -----------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["--run-dir", "there is no run in runs", "make train"]),
        (["--run-dir", "nowhere"], ["--run-dir nowhere", "is not a run folder"]),
        (["--platforms", "gpu"], ["--platforms", "cpu, cuda, rocm, tpu", "gpu"]),
        (["--platforms", "cpu", "cpu"], ["--platforms", "only once"]),
        (["--platforms"], ["--platforms", "nothing"]),
        (["--network", "mlp"], ["--network", "no-bn"]),
        (["--network", "no-bn", "--folded"], ["--folded", "no batch normalization"]),
        (["--out", "model.bin"], ["--out model.bin", "--out model.jaxexport"]),
        (["--out", "no/model.jaxexport"], ["there is no folder no"]),
        (["--wings", "2"], ["--wings"]),
    ],
)
def test_bad_option_is_named_and_leaves_nothing(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    message = refused(main, capsys, argv)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_lacks_is_named(runs, tmp_path, capsys):
    plain = str(runs / "plain")
    message = refused(main, capsys, ["--run-dir", plain])
    assert "has only no-bn. Add --network no-bn." in message
    message = refused(main, capsys, ["--run-dir", str(runs / "mlp-001"), "--data-dir", "."])
    assert "--data-dir" in message and "Leave --data-dir out" in message


def changed(runs, folder, change):
    """A copy of a run with other settings.json, as a dict or as it stands."""
    shutil.copytree(runs / "mlp-001", folder)
    path = folder / "settings.json"
    stored = json.loads(path.read_text())
    found = change(stored["settings"])
    path.write_text(found if isinstance(found, str) else json.dumps(stored))
    return ["--run-dir", str(folder)]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda settings: settings.update({"--scenarios": []}), "of another script"),
        (lambda settings: settings.update({"--data": "mnist"}), "--data-dir: is needed"),
        (lambda settings: '{"settings": ', "settings.json: is damaged"),
        (
            lambda settings: settings.update({"contents of the data (SHA-256)": "0"}),
            "belongs to a run with other settings",
        ),
    ],
)
def test_a_run_that_cannot_be_read_is_named(runs, tmp_path, capsys, change, words):
    assert words in refused(main, capsys, changed(runs, tmp_path / "run", change))
    assert not (tmp_path / "run" / "model.jaxexport").exists()


def test_a_run_without_a_checkpoint_is_named(runs, tmp_path, capsys):
    argv = changed(runs, tmp_path / "run", lambda settings: None)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "has no checkpoint yet" in refused(main, capsys, argv)


def test_a_diverged_network_is_named(network, monkeypatch):
    answered(monkeypatch, lambda x: x)
    with pytest.raises(options.SettingsError, match=r"not finite.* lower --learning-rate"):
        export_model.compare(b"", network, lambda x: x * jnp.nan)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    out = tmp_path / "model.jaxexport"
    (out / "full").mkdir(parents=True)
    with pytest.raises(options.SettingsError, match=f"--out {out}: cannot be written"):
        export_model.write(out, b"")


def test_jax_without_the_cpu_is_named(monkeypatch):
    def missing(**options):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", missing)
    with pytest.raises(options.SettingsError, match="JAX_PLATFORMS: must have cpu"):
        trained.first_cpu()

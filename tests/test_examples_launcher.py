"""launcher.py and the options of train_multihost.py: all processes end together, or none starts."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tyro
from example_runs import (
    POSIX,
    ROOT,
    at,
    contents,
    launcher,
    launching,
    options,
    refused,
    run_folder,
    script,
    train_multihost,
)

main = train_multihost.main
PRELUDE = "import os, signal, sys, time\n"
STUBBORN = (
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', file=sys.stderr, flush=True)\n"
    "time.sleep(60)"
)


def python(code):
    return [sys.executable, "-c", PRELUDE + code]


@POSIX
@pytest.mark.parametrize(
    "first, second, status, words",
    [
        (
            "time.sleep(60)",
            "os._exit(3)",
            1,
            "Process 1 (pid {1}) was lost: it ended with status 3",
        ),
        (STUBBORN, "time.sleep(1); os.abort()", 1, "Process 1 (pid {1}) was lost: it ended by SIG"),
        ("pass", "pass", 0, ""),
        ("sys.exit(2)", "sys.exit(2)", 2, ""),
        ("sys.exit(2)", "time.sleep(0.5); os.abort()", 2, ""),
        ("sys.exit('[1] no')", "time.sleep(60)", 1, "[0] [1] no\nProcess 0 (pid {0}) was lost"),
    ],
)
def test_launcher_ends_all_and_says_which_was_lost(monkeypatch, first, second, status, words):
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    began = time.monotonic()
    with launching() as (started, said):
        assert launcher.Launcher().run([python(first), python(second)], {}) == status
    assert time.monotonic() - began < 10
    expected = words.format(*(process.child.pid for process in started))
    assert expected in said.getvalue() if words else said.getvalue() == ""


@POSIX
@pytest.mark.parametrize("obeys", [True, False])
def test_ctrl_c_stops_all_and_a_second_one_at_once(monkeypatch, obeys):
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    answer = "sys.exit(130)" if obeys else "None"
    code = (
        f"signal.signal(signal.SIGINT, lambda *_: {answer})\n"
        "print('up', file=sys.stderr, flush=True)\n"
        "[time.sleep(0.1) for _ in range(600)]"
    )
    with launching() as (started, said):
        interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
        at(lambda: said.getvalue().count("up") == 2, interrupt)
        if not obeys:
            at(lambda: "at once with another" in said.getvalue(), interrupt)
        assert launcher.Launcher().run([python(code)] * 2, {}) == 130
    expected = 130 if obeys else -signal.SIGTERM
    assert [process.child.returncode for process in started] == [expected] * 2


@POSIX
def test_an_error_after_ctrl_c_is_shown(monkeypatch):
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    code = (
        "def stop(*_):\n  print('full disk', file=sys.stderr, flush=True); os._exit(2)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "print('up', file=sys.stderr, flush=True)\ntime.sleep(60)"
    )
    with launching() as (_, said):
        at(lambda: "up" in said.getvalue(), lambda: os.kill(os.getpid(), signal.SIGINT))
        launcher.Launcher().run([python(code)], {})
    assert "full disk" in said.getvalue()


@POSIX
def test_processes_do_not_outlive_the_launcher():
    child = "import launcher, os, time\nlauncher.end_with_launcher()\nprint('up', os.getpid())"
    child += "\ntime.sleep(60)"
    code = (
        f"import sys, launcher\nlauncher.Launcher().run([[sys.executable, '-c', {child!r}]], {{}})"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline().split()[1])
        process.kill()
        # Both have the pipe, so it ends when both have: a process that is gone may still be listed.
        rest = threading.Thread(target=process.stdout.read, daemon=True)
        rest.start()
        rest.join(10)
        if rest.is_alive():
            os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"process {pid} outlived the launcher by 10 seconds")


def test_settings_survive_the_command_line():
    for settings in (
        train_multihost.Settings(),
        train_multihost.Settings(
            hidden=(8, 4), bn=False, run_dir=run_folder.RUNS / "a b", resume=True, process_id=0
        ),
    ):
        argv = options.command_line(settings)
        config = (tyro.conf.FlagCreatePairsOff,)
        assert tyro.cli(train_multihost.Settings, args=argv, config=config) == settings


# --- bad options -----------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--local-processes", "0"], ["--local-processes", "at least 1", "got 0"]),
        (["--local-processes", "2", "--local-devices", "0"], ["--local-devices", "got 0"]),
        (["--local-processes", "2", "--cluster"], ["--local-processes", "--cluster"]),
        (["--local-processes", "2", "--coordinator", "a:1"], ["--coordinator", "Choose one"]),
        (["--process-id", "1"], ["--process-id", "needs --coordinator HOST:PORT"]),
        (["--num-processes", "2"], ["--num-processes", "needs --coordinator HOST:PORT"]),
        (["--coordinator", "a:1"], ["--coordinator", "--num-processes and --process-id"]),
        (
            ["--coordinator", "a", "--num-processes", "2", "--process-id", "0"],
            ["--coordinator", "HOST:PORT", "got a"],
        ),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            ["--process-id", "from 0 to 1", "got 2"],
        ),
        (["--heartbeat-timeout", "0"], ["--heartbeat-timeout", "got 0"]),
        (["--style", "xmap"], ["--style", "shard_map"]),
        (["--channels", "8"], ["--channels", "--network cnn"]),
        (["--network", "cnn", "--hidden", "8"], ["--hidden", "--network mlp"]),
        (["--network", "cnn", "--channels", "0"], ["--channels", "got 0"]),
        (["--hidden", "0"], ["--hidden", "got 0"]),
        (["--local-processes", "2", "--data", "mnist"], ["--data mnist", "--data-dir"]),
        (["--local-processes", "2", "--batch-size", "1348"], ["--batch-size", "1347"]),
        (["--local-processes", "2", "--resume"], ["there is no run", "multihost-NNN"]),
    ],
)
def test_bad_option_is_named_and_starts_nothing(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "Process", None)
    message = refused(main, capsys, argv)
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_run_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "Process", None)
    (tmp_path / "settings.json").write_text('{"settings": {"--steps": 5}, "made_with": {}}')
    before = contents(tmp_path)
    argv = ["--local-processes", "2", "--run-dir", str(tmp_path)]
    assert "is not empty" in refused(main, capsys, argv)
    message = refused(main, capsys, [*argv, "--resume"])
    assert "--steps: run folder has 5, command line has 1000" in message
    assert contents(tmp_path) == before


def test_one_of_several_processes_does_not_train_alone(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    message = refused(main, capsys, [])
    assert "one of 4 processes" in message and "Add --cluster" in message


def test_processes_with_other_settings_are_refused():
    everyones = [{"--steps": 5, "style": "jit"}, {"--steps": 6, "style": "jit"}]
    with pytest.raises(options.SettingsError, match="--steps: process 0 has 5, process 1 has 6"):
        script.require_same(everyones)
    script.require_same(everyones[:1] * 3)

"""train_multihost.py: the same numbers on any devices; lost, stopped and continued there."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shlex
import signal
import sys
import time

import jax
import numpy as np
import pytest
import tolerances
from example_runs import (
    PATIENCE,
    POSIX,
    ROOT,
    at,
    data,
    evaluations,
    launcher,
    launching,
    options,
    parallel,
    rows_of,
    script,
    start,
    train_multihost,
    wait_until,
)
from flax import serialization

main = train_multihost.main
SMALL = {"hidden": (8,), "batch_size": 61, "eval_every": 4}  # 5 examples in the last batch


@functools.cache
def networks(style, **settings):
    """They take seconds to make, and are never changed."""
    settings = train_multihost.Settings(style=style, **settings)
    return train_multihost.networks(settings, data.load("digits"))


def trainer(devices, dataset=None, **settings):
    """The training of a network on these devices."""
    others = {"style", "batch_size", "steps", "eval_every"}
    of_network = {name: value for name, value in settings.items() if name not in others}
    settings = train_multihost.Settings(**settings)
    dataset = data.load("digits") if dataset is None else dataset
    style = "jit" if settings.style == "jit" else "shard_map"
    return parallel.Trainer(
        settings, dataset, networks(style, **of_network), style=settings.style, devices=devices
    )


def train(trained):
    while trained.log["step"] < trained.settings.steps:
        trained.advance()
    return trained


def values(states):
    """Floats of a state or of states, by name."""
    found = jax.tree_util.tree_leaves_with_path(serialization.to_state_dict(states))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in found
        if jax.numpy.issubdtype(leaf.dtype, np.floating)
    }


# --- on any number of devices ----------------------------------------------


@pytest.fixture(scope="module")
def few():
    """Digits of which the last batch of 20 has 5."""
    digits = data.load("digits")
    return digits._replace(
        train_images=digits.train_images[:65],
        train_labels=digits.train_labels[:65],
        test_images=digits.test_images[:50],
        test_labels=digits.test_labels[:50],
    )


NETWORKS = {"mlp": {"hidden": (8,)}, "cnn": {"network": "cnn", "channels": (4,)}}


@pytest.fixture(scope="module")
def plain(few):
    """Losses and state after two epochs in plain loops, of which no batch is padded or split."""
    results = {}
    for name, options_ in NETWORKS.items():
        network = networks("jit", **options_)["bn"]
        state, step, losses = network.state, jax.jit(network.step), []
        for epoch in range(2):
            key = jax.random.fold_in(network.state.key, epoch)
            order = np.asarray(jax.random.permutation(key, 65))
            for rows in np.split(order, [20, 40, 60]):
                state, loss = step(state, few.train_images[rows], few.train_labels[rows])
                losses.append(float(loss))
        logits = np.asarray(jax.jit(network.logits)(state, few.test_images), np.float64)
        picked = logits[np.arange(50), few.test_labels]
        test_loss = (np.log(np.exp(logits).sum(-1)) - picked).mean()
        right = (logits.argmax(-1) == few.test_labels).mean()
        results[name] = values(state), np.mean(losses), test_loss, right
    return results


@pytest.mark.parametrize(
    "network, style, count",
    [
        ("mlp", "jit", 8),
        ("cnn", "shard_map", 3),
        ("mlp", "pmap", 8),
    ],
)
def test_uneven_batches_are_those_of_one_device(
    devices, monkeypatch, few, plain, network, style, count
):
    """On 8 devices, one has no example of any batch, and six have none of the last."""
    monkeypatch.setattr(parallel, "TEST_ROWS", 24)  # several batches of test data, the last uneven
    settings = {"batch_size": 20, "steps": 8, "eval_every": 8, **NETWORKS[network]}
    trained = train(trainer(devices[:count], few, style=style, **settings))
    state, train_loss, test_loss, right = plain[network]
    tolerances.assert_close(values(trained.states["bn"]), state, np.float32, 20 * 64)
    (row,) = trained.log["metrics"]
    bound = tolerances.values(np.float32, 20)
    assert math.isclose(row["train_loss"], train_loss, rel_tol=bound)
    assert math.isclose(row["test_loss"], test_loss, rel_tol=bound)
    assert row["test_accuracy"] == right
    assert trained.examples(8) == 130


def test_200_steps_on_8_devices_and_on_1_end_in_the_same_loss(devices):
    settings = {"hidden": (16,), "batch_size": 60, "steps": 200, "eval_every": 100}
    settings |= {"learning_rate": 0.1, "activation": "relu"}
    eight, one = (train(trainer(devices[:n], **settings)).log["metrics"][-1] for n in (8, 1))
    assert eight["train_loss"] < 0.5
    for name in ("train_loss", "test_loss"):
        assert math.isclose(eight[name], one[name], rel_tol=1e-5)


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own(devices):
    orders = []
    for count, style in ((1, "jit"), (8, "pmap")):
        trained = trainer(devices[:count], style=style, batch_size=100, hidden=(8,))
        batches = [trained.rows(step) for step in range(2 * 14)]
        assert [len(rows) for rows in batches] == 2 * [*[100] * 13, 47]
        orders.append(np.concatenate(batches))
    np.testing.assert_array_equal(*orders)
    epochs = orders[0].reshape(2, -1)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(1347), (2, 1)))
    assert (epochs[0] != epochs[1]).any()


def test_processes_read_only_what_their_devices_need(devices):
    asked = []

    class Images:
        def __getitem__(self, rows):
            asked.append(len(rows))
            return np.zeros((len(rows), 3), np.float32)

    style = parallel.Jit(devices)
    labels = np.arange(100)
    batch = style.batch(Images(), labels, np.arange(5, 25), style.padded(20))
    assert asked == [0, *[3] * 8]
    np.testing.assert_array_equal(batch.labels[:20], labels[5:25])
    np.testing.assert_array_equal(batch.mask, np.arange(24) < 20)


# --- lost, stopped, continued ----------------------------------------------


@POSIX
def test_lost_process_is_named_and_the_run_continues_anywhere_to_the_same_result(
    devices, tmp_path, capfd
):
    """2 processes of 2 devices, then 1 of 8, then 2 of 1, each in another style; against 1 of 1."""
    folder, settings = tmp_path / "run", {**SMALL, "steps": 60}
    flags = options.command_line(train_multihost.Settings(**settings))
    flags += ["--run-dir", str(folder)]

    with launching() as (started, said):
        killed_at = []

        def kill():
            killed_at.append(time.monotonic())
            os.kill(started[1].child.pid, signal.SIGKILL)

        at(lambda: evaluations(folder) >= 2, kill)
        assert main([*flags, "--local-processes", "2", "--local-devices", "2"]) == 1
    assert time.monotonic() - killed_at[0] < launcher.GRACE + 5
    lines = said.getvalue().splitlines()
    pid = started[1].child.pid
    assert f"Process 1 (pid {pid}) was lost: it ended by SIGKILL. Ending the others." in lines
    assert lines[-2] == "To continue, with any number of processes:"
    python, file, *argv = shlex.split(lines[-1])
    assert (python, ROOT / file) == (sys.executable, train_multihost.SCRIPT.file)
    assert argv == [*flags[:-2], *argv[-7:]] and argv[-1] == "--resume"
    assert 2 <= evaluations(folder) < 14

    done = evaluations(folder)
    at(lambda: evaluations(folder) > done, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main([*flags, "--resume", "--style", "shard_map"]) == 130
    output = capfd.readouterr()
    assert f"Continuing from step {4 * done}" in output.out
    assert "Stopped. To continue:" in output.err
    assert "devices 4, processes 2, style jit, and continues with" in output.out

    with launching() as (_, said):
        assert main([*flags, "--resume", "--style", "pmap", "--local-processes", "2"]) == 0
    assert said.getvalue() == ""
    output = capfd.readouterr().out
    assert "Devices: 2 cpu (cpu) of 2 processes" in output and "Gloo" not in output
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    check_like_one_device(devices, folder, settings)


def check_like_one_device(devices, folder, settings):
    one = train(trainer(devices[:1], **settings))
    bound = tolerances.values(np.float32, 61)
    rows = rows_of(folder)
    assert len(rows) == 15
    for row, expected in zip(rows, one.log["metrics"], strict=True):
        assert int(row["step"]) == expected["step"]
        assert math.isclose(float(row["train_loss"]), expected["train_loss"], rel_tol=bound)
        assert math.isclose(float(row["test_loss"]), expected["test_loss"], rel_tol=bound)
    settings = train_multihost.Settings(**settings, run_dir=folder, resume=True)
    opened = script.open_run(train_multihost.SCRIPT, settings, data.load("digits"))
    with contextlib.closing(opened):
        states, log = opened.restore(trainer(devices[1:2], **SMALL).states)
    assert log["step"] == 60
    tolerances.assert_close(values(states), values(one.states), np.float32, 61 * 64)
    assert float(rows[-1]["test_loss"]) < float(rows[0]["test_loss"])
    stored = json.loads((folder / "settings.json").read_text())["settings"]
    assert "--hidden" in stored and "--channels" not in stored
    assert not {options.flag(name) for name in train_multihost.PLACES} & set(stored)


@POSIX
def test_silent_process_ends_the_others_by_the_heartbeat(tmp_path):
    timeout, folder = 5, tmp_path / "run"
    settings = train_multihost.Settings(
        **SMALL,
        steps=100000,
        run_dir=folder,
        coordinator=launcher.free_address(),
        num_processes=2,
        process_id=0,
        heartbeat_timeout=timeout,
    )
    both = [dataclasses.replace(settings, process_id=i) for i in range(2)]
    processes = [start(train_multihost.SCRIPT, options.command_line(s), tmp_path) for s in both]
    try:
        wait_until(lambda: evaluations(folder) >= 1, processes[0])
        processes[1].send_signal(signal.SIGSTOP)
        _, errors = processes[0].communicate(timeout=2 * timeout + 10)
        assert processes[0].returncode not in (0, None)
        assert "stopped sending heartbeats" in errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@POSIX
def test_what_one_process_refuses_ends_all(tmp_path):
    """With one reason, and long before the heartbeat would."""
    address, began = launcher.free_address(), time.monotonic()
    processes = []
    for index in range(2):
        settings = train_multihost.Settings(
            **SMALL,
            steps=8 + index,
            run_dir=tmp_path / "run",
            coordinator=address,
            num_processes=2,
            process_id=index,
            heartbeat_timeout=PATIENCE,
        )
        argv = options.command_line(settings)
        processes.append(start(train_multihost.SCRIPT, argv, tmp_path))
    said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert all("Error:" in errors and "--steps" in errors for errors in said), said
    assert time.monotonic() - began < PATIENCE / 3

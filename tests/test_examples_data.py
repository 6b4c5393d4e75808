"""Data of the example scripts: MNIST, CIFAR-10 and openml, and files that are no good."""

import gzip
import struct
import urllib.error

import numpy as np
import pytest
from example_runs import data, refused, script, train_cnn, train_mlp

main = train_mlp.main
SMALL = ["--hidden", "8", "--batch-size", "20", "--eval-every", "4"]  # compiles and runs fast


def small_run(folder, *extra):
    return [*SMALL, "--steps", "8", "--run-dir", str(folder), *extra]


# --- MNIST -----------------------------------------------------------------

FILES = [
    f"{part}-{what}-ubyte.gz"
    for part in ("train", "t10k")
    for what in ("images-idx3", "labels-idx1")
]


def idx(values, magic=None):
    """An IDX file of unsigned bytes, gzipped; `magic` overrides the right first number."""
    values = np.asarray(values, np.uint8)
    header = struct.pack(f">{values.ndim + 1}I", magic or 0x800 + values.ndim, *values.shape)
    return gzip.compress(header + values.tobytes())


@pytest.fixture
def tiny_mnist(tmp_path):
    """Four small files in MNIST's format: 40 training and 20 test images of 5 x 4."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part, count in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 5, 4))
        images[0, 0, :2] = 0, 255
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count) % 10))
    return folder


def test_mnist_files_are_read(tiny_mnist):
    dataset = data.load("mnist", tiny_mnist)
    assert dataset.train_images.shape == (40, 20) and dataset.test_images.shape == (20, 20)
    assert dataset.train_images.dtype == np.float32 and dataset.train_labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.train_images[0, :2], [0, 1])
    np.testing.assert_array_equal(dataset.test_labels, np.arange(20) % 10)
    assert dataset.classes == 10 and dataset.shape == (5, 4, 1)


def test_mnist_trains_and_its_contents_count_not_its_place(tiny_mnist, tmp_path, capsys):
    argv = [*SMALL, "--steps", "4", "--data", "mnist", "--run-dir", str(tmp_path / "run")]
    assert main([*argv, "--data-dir", str(tiny_mnist)]) == 0
    moved = tiny_mnist.rename(tmp_path / "moved")
    argv = [*argv, "--data-dir", str(moved), "--resume"]
    assert main(argv) == 0
    (moved / FILES[3]).write_bytes(idx(np.zeros(20)))
    assert "contents of the data" in refused(main, capsys, argv)


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def flip(name):
    def damage(folder):
        raw = bytearray((folder / name).read_bytes())
        raw[len(raw) // 2] ^= 0xFF
        (folder / name).write_bytes(raw)

    return damage


def to_folder(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


BAD_FILES = {
    "missing": (FILES[2], lambda folder: (folder / FILES[2]).unlink(), "no such file"),
    "folder": (FILES[0], to_folder(FILES[0]), "cannot be read"),
    "truncated": (FILES[0], truncate(FILES[0]), "truncated"),
    "empty": (FILES[1], replace(FILES[1], b""), "ends within its header"),
    "not gzip": (FILES[1], replace(FILES[1], b"<html>not found</html>"), "not a valid gzip file"),
    "flipped": (FILES[0], flip(FILES[0]), "gzip"),
    "swapped": (FILES[0], replace(FILES[0], idx(np.zeros(40))), "must begin with"),
    "wrong magic": (FILES[1], replace(FILES[1], idx(np.zeros(40), 2052)), "found 2052"),
    "short header": (FILES[0], replace(FILES[0], gzip.compress(b"\0\0\x08\x03")), "header"),
    "no images": (FILES[0], replace(FILES[0], idx(np.zeros((0, 5, 4)))), "holds no images"),
    "short": (
        FILES[0],
        replace(FILES[0], gzip.compress(struct.pack(">4I", 2051, 40, 5, 4) + bytes(799))),
        "promises 800 bytes",
    ),
    "long": (
        FILES[1],
        replace(FILES[1], gzip.compress(struct.pack(">2I", 2049, 40) + bytes(41))),
        "found 41",
    ),
    "counts": (FILES[1], replace(FILES[1], idx(np.zeros(39))), "39 labels"),
    "labels": (FILES[3], replace(FILES[3], idx(np.full(20, 10))), "0 to 9"),
    "sizes": (FILES[2], replace(FILES[2], idx(np.zeros((20, 4, 4)))), "4 x 4"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_file_is_named_and_leaves_nothing(tiny_mnist, tmp_path, capsys, kind):
    name, damage, words = BAD_FILES[kind]
    damage(tiny_mnist)
    argv = small_run(tmp_path / "run", "--data", "mnist", "--data-dir", str(tiny_mnist))
    message = refused(main, capsys, argv)
    assert str(tiny_mnist / name) in message
    assert words in message
    assert not (tmp_path / "run").exists()


# --- CIFAR-10 --------------------------------------------------------------


def records(labels, rng=None):
    """A file of CIFAR-10's binary version: a byte of label, then 3 x 32 x 32 of an image, each."""
    images = (
        np.zeros((len(labels), 3072)) if rng is None else rng.integers(0, 256, (len(labels), 3072))
    )
    return np.concatenate([np.asarray(labels)[:, None], images], 1).astype(np.uint8).tobytes()


PARTS = "data_batch_2.bin", "data_batch_5.bin", "test_batch.bin"


@pytest.fixture
def tiny_cifar(tmp_path):
    """Two of the five training files, of 20 images each, and one for testing, of 10."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar"
    folder.mkdir()
    for name, count in zip(PARTS, (20, 20, 10), strict=True):
        (folder / name).write_bytes(records(np.arange(count) % 10, rng))
    return folder


def test_cifar_files_are_read(tiny_cifar):
    dataset = data.load("cifar10", tiny_cifar)
    assert dataset.name == "CIFAR-10 (2 of 5 training files)"
    assert dataset.shape == (32, 32, 3) and dataset.classes == 10
    assert dataset.train_images.shape == (40, 3072) and dataset.test_images.shape == (10, 3072)
    assert dataset.train_images.dtype == np.float32 and dataset.train_labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.train_labels, np.arange(40) % 10)
    for index, part in ((3, PARTS[0]), (23, PARTS[1])):
        image = dataset.train_images[index].reshape(dataset.shape)
        raw = (tiny_cifar / part).read_bytes()[3 * 3073 + 1 : 4 * 3073]
        for y, x, channel in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (5, 7, 1), (31, 31, 2)):
            assert image[y, x, channel] == np.float32(raw[1024 * channel + 32 * y + x]) / 255
    for part in data.CIFAR_PARTS:
        (tiny_cifar / part).write_bytes(records(np.arange(1)))
    assert data.load("cifar10", tiny_cifar).name == "CIFAR-10"


BAD_CIFAR = {
    "no training": (
        "data_batch_1.bin",
        lambda folder: [(folder / part).unlink() for part in PARTS[:2]],
        "no such file",
    ),
    "no test": (PARTS[2], lambda folder: (folder / PARTS[2]).unlink(), "no such file"),
    "folder": (PARTS[0], to_folder(PARTS[0]), "cannot be read"),
    "truncated": (PARTS[1], truncate(PARTS[1]), "found 61440 bytes"),
    "empty": (PARTS[2], replace(PARTS[2], b""), "found 0 bytes"),
    "CIFAR-100": (PARTS[2], replace(PARTS[2], records([9, 10])), "labels must be 0 to 9, found 10"),
}


@pytest.mark.parametrize("kind", BAD_CIFAR)
def test_bad_cifar_file_is_named_and_leaves_nothing(tiny_cifar, tmp_path, capsys, kind):
    name, damage, words = BAD_CIFAR[kind]
    damage(tiny_cifar)
    argv = ["--data", "cifar10", "--data-dir", tiny_cifar, "--run-dir", tmp_path / "run"]
    message = refused(train_cnn.main, capsys, argv)
    assert str(tiny_cifar / name) in message
    assert words in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("example", [train_mlp, train_cnn])
def test_cifar_can_be_trained_on(tiny_cifar, example):
    dataset = data.load("cifar10", tiny_cifar)
    small = {"channels": (2,)} if example is train_cnn else {"hidden": (8,)}
    settings = example.Settings(**small, batch_size=20, steps=2, eval_every=2, bn=False)
    trained = script.trainer(example.SCRIPT, settings, dataset)
    trained.advance()
    assert np.isfinite(trained.log["metrics"][0]["train_loss"])


# --- digits, openml --------------------------------------------------------


def test_digits_are_split_the_same_way_each_time():
    first, second = data.load("digits"), data.load("digits")
    assert first.fingerprint() == second.fingerprint()
    assert first.shape == (8, 8, 1)
    assert len(first.train_images) == 1347 and len(first.test_images) == 450
    assert first.train_images.min() == 0 and first.train_images.max() == 1
    share = np.bincount(first.test_labels) / len(first.test_labels)
    np.testing.assert_allclose(share, 0.1, atol=0.005)


class FakeBunch:
    """What scikit-learn's fetch_openml returns."""

    details = {"version": "3"}

    def __init__(self, features, target):
        self.data, self.target = features, target


def openml(monkeypatch, answer):
    def fetch(name, **options):
        assert name == "flowers"
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(data.datasets, "fetch_openml", fetch)


def test_openml_features_are_scaled_and_classes_numbered(monkeypatch):
    features = np.stack([np.linspace(-5, 20, 40), np.full(40, 7.0)], 1)
    openml(monkeypatch, FakeBunch(features, np.array(["rose", "iris"] * 20, object)))
    dataset = data.load("openml:flowers")
    assert dataset.name == "openml:flowers version 3"
    assert dataset.classes == 2 and dataset.shape is None
    assert dataset.train_images.dtype == np.float32
    np.testing.assert_array_equal(dataset.train_images.min(0), [0, 0])
    np.testing.assert_array_equal(dataset.train_images.max(0), [1, 0])
    assert set(dataset.test_labels) == {0, 1}


NAMES = np.array(["rose", "iris"] * 20, object)
OPENML_ERRORS = {
    "no network": (urllib.error.URLError("Name or service not known"), "Check the network"),
    "no such set": (ValueError("No known data set"), "Check the name"),
    "gone": (urllib.error.HTTPError("", 412, "Precondition", None, None), "Check the name"),
    "text": (FakeBunch(np.full((40, 2), "red", object), NAMES), "not dense numbers"),
    "missing": (FakeBunch(np.full((40, 2), np.nan), NAMES), "missing values"),
    "regression": (FakeBunch(np.zeros((40, 2)), np.arange(40.0)), "no classification problem"),
    "no target": (FakeBunch(np.zeros((40, 2)), None), "no single target"),
    "rare": (FakeBunch(np.zeros((41, 2)), np.append(NAMES, "oak")), "cannot be split"),
}


@pytest.mark.parametrize("kind", OPENML_ERRORS)
def test_openml_data_that_cannot_be_used_is_named(monkeypatch, capsys, tmp_path, kind):
    answer, words = OPENML_ERRORS[kind]
    openml(monkeypatch, answer)
    message = refused(main, capsys, small_run(tmp_path / "run", "--data", "openml:flowers"))
    assert "--data openml:flowers" in message and words in message


def test_convolutions_need_images(monkeypatch, capsys, tmp_path):
    openml(monkeypatch, FakeBunch(np.zeros((80, 2)), np.array(["rose", "iris"] * 40, object)))
    argv = ["--data", "openml:flowers", "--batch-size", "20", "--run-dir", tmp_path / "run"]
    message = refused(train_cnn.main, capsys, argv)
    assert "--data openml:flowers: its features have no image shape" in message
    assert not (tmp_path / "run").exists()

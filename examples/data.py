"""Data sets of the examples, as flat float32 features and int32 labels.

    load("digits")               scikit-learn's bundled 8 x 8 digits, no download
    load("mnist", folder)        the four gzipped IDX files of MNIST in `folder`
    load("cifar10", folder)      CIFAR-10's binary version: data_batch_1.bin to data_batch_5.bin,
                                 of which some may be missing, and test_batch.bin
    load("openml:NAME", cache)   downloaded and cached by scikit-learn

Features lie in [0, 1]: pixels are divided by their largest possible value,
OpenML's columns by their range in the training part (so test values may lie
slightly outside). Whatever is wrong with the data raises DataError, whose
message names the file or the option, and the fix.
"""

import gzip
import hashlib
import math
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
MNIST_CLASSES = CIFAR_CLASSES = 10
CIFAR_SHAPE = 3, 32, 32  # channels first
CIFAR_RECORD = 1 + math.prod(CIFAR_SHAPE)  # the label comes first
CIFAR_PARTS = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


class DataError(ValueError):
    """The data cannot be used; the message says which and what to do."""


class Dataset(NamedTuple):
    """Training and test part of a classification problem.

    Images have shape [count, features] and dtype float32; labels have shape
    [count], dtype int32, and lie in [0, classes). `shape` is that of one image,
    (height, width, channels), or None where features are no pixels.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    shape: tuple[int, int, int] | None = None

    def fingerprint(self) -> str:
        """SHA-256 over the contents, which tells whether two runs saw the same data."""
        digest = hashlib.sha256()
        for array in self[1:5]:
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a data set by its command-line name: digits, mnist, cifar10 or openml:NAME."""
    if name == "digits":
        if data_dir is not None:
            raise DataError(
                f"--data-dir: digits come with scikit-learn, so {data_dir} would not be read. "
                "Leave --data-dir out, or choose --data mnist."
            )
        return _digits()
    if name == "mnist":
        if data_dir is None:
            raise DataError(
                "--data mnist: needs --data-dir DIR, the folder with MNIST's four gzipped IDX "
                "files. Add it, or use --data digits, which needs no files."
            )
        return _mnist(Path(data_dir))
    if name == "cifar10":
        if data_dir is None:
            raise DataError(
                "--data cifar10: needs --data-dir DIR, the folder with the files of CIFAR-10's "
                "binary version. Add it, or use --data digits, which needs no files."
            )
        return _cifar10(Path(data_dir))
    if name.startswith("openml:") and name != "openml:":
        return _openml(name.removeprefix("openml:"), data_dir)
    raise DataError(
        f"--data {name}: unknown data set. Use digits, mnist, cifar10, or openml:NAME "
        "(for example openml:mnist_784)."
    )


def _digits() -> Dataset:
    images, labels = datasets.load_digits(return_X_y=True)
    dataset = _split("digits", (images / 16).astype(np.float32), labels.astype(np.int32))
    return dataset._replace(shape=(8, 8, 1))


def _split(name: str, images: np.ndarray, labels: np.ndarray) -> Dataset:
    """Keep a quarter for testing: stratified by class, and the same in every run."""
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=0
    )
    return Dataset(name, train_x, train_y, test_x, test_y, int(labels.max()) + 1)


def _mnist(folder: Path) -> Dataset:
    parts: list[np.ndarray] = []
    for prefix in ("train", "t10k"):
        images_file = folder / f"{prefix}-images-idx3-ubyte.gz"
        labels_file = folder / f"{prefix}-labels-idx1-ubyte.gz"
        images = _read_idx(images_file, IMAGES_MAGIC, "images")
        labels = _read_idx(labels_file, LABELS_MAGIC, "labels")
        if len(images) != len(labels):
            raise DataError(
                f"{labels_file}: holds {len(labels)} labels, but {images_file.name} holds "
                f"{len(images)} images. Take both files from the same data set."
            )
        if labels.max() >= MNIST_CLASSES:
            raise DataError(
                f"{labels_file}: labels must be 0 to 9, found {labels.max()}. "
                "Fetch MNIST's file again."
            )
        if parts and images.shape[1:] != parts[0].shape[1:]:
            raise DataError(
                f"{images_file}: images are {_size(images)}, but those for training are "
                f"{_size(parts[0])}. Take all four files from the same data set."
            )
        parts += [images, labels]
    train_x, test_x = (_scaled(x) for x in parts[::2])
    train_y, test_y = (y.astype(np.int32) for y in parts[1::2])
    shape = (*parts[0].shape[1:], 1)
    return Dataset("MNIST", train_x, train_y, test_x, test_y, MNIST_CLASSES, shape)


def _scaled(pixels: np.ndarray) -> np.ndarray:
    """Bytes as flat features in [0, 1]."""
    return (pixels.reshape(len(pixels), -1) / np.float32(255)).astype(np.float32)


def _size(images: np.ndarray) -> str:
    return " x ".join(str(n) for n in images.shape[1:])


def _read_idx(path: Path, magic: int, what: str) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes.

    An IDX file is a big-endian header (a magic number whose last byte is the
    number of dimensions, then the length of each) followed by the values.
    """
    raw = _gunzip(path)
    header = 4 + 4 * (magic & 0xFF)
    if len(raw) < header:
        raise DataError(f"{path}: ends within its header of {header} bytes. Fetch the file again.")
    found, *shape = struct.unpack(f">{header // 4}I", raw[:header])
    if found != magic:
        raise DataError(
            f"{path}: is not an IDX file of {what}: it must begin with the number {magic}, "
            f"found {found}. Check that the file has its right name, or fetch it again."
        )
    size = math.prod(shape)
    if size == 0:
        raise DataError(f"{path}: holds no {what} (shape {tuple(shape)}). Fetch the file again.")
    if len(raw) - header != size:
        raise DataError(
            f"{path}: its header promises {size} bytes of {what} (shape {tuple(shape)}), "
            f"found {len(raw) - header}. Fetch the file again."
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _gunzip(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. Put MNIST's four gzipped IDX files into one folder and "
            "name it with --data-dir."
        ) from None
    except EOFError:
        raise DataError(f"{path}: the gzip file is truncated. Fetch the file again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: is not a valid gzip file ({error}). Fetch the file again."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Check --data-dir."
        ) from None


def _cifar10(folder: Path) -> Dataset:
    present = [folder / part for part in CIFAR_PARTS if (folder / part).exists()]
    if not present:
        raise DataError(
            f"{folder / CIFAR_PARTS[0]}: no such file. Put the files of CIFAR-10's binary version "
            "into one folder and name it with --data-dir."
        )
    parts = [_read_cifar(path) for path in present]
    train_x, train_y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    test_x, test_y = _read_cifar(folder / "test_batch.bin")
    name = "CIFAR-10"
    if len(present) < len(CIFAR_PARTS):
        name += f" ({len(present)} of {len(CIFAR_PARTS)} training files)"
    shape = (*CIFAR_SHAPE[1:], CIFAR_SHAPE[0])
    return Dataset(name, train_x, train_y, test_x, test_y, CIFAR_CLASSES, shape)


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a file of records: a byte of label, then an image, red plane first."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. It holds the test images of CIFAR-10's binary version; put it "
            "into the folder that --data-dir names."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Check --data-dir."
        ) from None
    if not raw or len(raw) % CIFAR_RECORD:
        raise DataError(
            f"{path}: must hold whole records of {CIFAR_RECORD} bytes, a label and an image, found "
            f"{len(raw)} bytes. Unpack CIFAR-10's binary version again."
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, CIFAR_RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= CIFAR_CLASSES:
        raise DataError(
            f"{path}: labels must be 0 to 9, found {labels.max()}. Take the binary version of "
            "CIFAR-10, not of CIFAR-100."
        )
    return _scaled(np.moveaxis(records[:, 1:].reshape(-1, *CIFAR_SHAPE), 1, -1)), labels


def _openml(name: str, cache: Path | None) -> Dataset:
    try:
        # scikit-learn warns before each retry and when a name has several active versions; the
        # version goes into the data set's name instead.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The other parser needs pandas.
            bunch = datasets.fetch_openml(
                name, data_home=cache, as_frame=False, parser="liac-arff", n_retries=1
            )
    except (OSError, ValueError) as error:  # URLError and ConnectionError are OSErrors
        reason = getattr(error, "reason", None) or error
        if isinstance(error, ValueError) or getattr(error, "code", None) in (404, 412):
            fix = "Check the name on openml.org; if a cached file is damaged, delete it."
        else:
            fix = "Check the network, or use --data digits, which needs no download."
        raise DataError(f"--data openml:{name}: could not be fetched ({reason}). {fix}") from None
    return _from_openml(f"openml:{name}", bunch)


def _from_openml(name: str, bunch: Any) -> Dataset:
    """Turn what fetch_openml returns into features in [0, 1] and numbered classes."""
    if bunch.target is None or np.ndim(bunch.target) != 1:
        raise DataError(f"--data {name}: has no single target column. Choose another data set.")
    try:
        features = np.asarray(bunch.data, np.float32)
    except (TypeError, ValueError):  # text columns, or a sparse matrix
        raise DataError(
            f"--data {name}: has columns that are not dense numbers. Choose another data set."
        ) from None
    if not np.isfinite(features).all():
        raise DataError(f"--data {name}: has missing values. Choose another data set.")
    if not isinstance(bunch.target[0], str):
        raise DataError(
            f"--data {name}: its target is not a class label, so this is no classification "
            "problem. Choose another data set."
        )
    classes, labels = np.unique(bunch.target, return_inverse=True)
    try:
        data = _split(
            f"{name} version {bunch.details['version']}", features, labels.astype(np.int32)
        )
    except ValueError as error:
        raise DataError(f"--data {name}: cannot be split for training and test: {error}") from None
    low, high = data.train_images.min(0), data.train_images.max(0)
    width = np.where(high > low, high - low, 1)
    return data._replace(
        train_images=((data.train_images - low) / width).astype(np.float32),
        test_images=((data.test_images - low) / width).astype(np.float32),
        classes=len(classes),
    )

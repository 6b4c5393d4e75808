"""What the processes of one run do together: find each other, agree, and end.

Alone, as in the scripts that train on one device, a process agrees with itself.
Otherwise every process calls the same functions in the same order.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


class ElsewhereError(RuntimeError):
    """Another process cannot go on; the message names it and says why."""


_shared: list[BaseException] = []  # errors that all processes know of
_replaced: list[TextIO] = []  # standard output as it was


def join(
    coordinator: str | None, count: int | None, index: int | None, *, heartbeat_timeout: int
) -> None:
    """Meet the other processes; without an address, jax asks the cluster for it.

    A process that is lost ends the others within `heartbeat_timeout` seconds, and
    so does one that leaves without them.
    """
    # It would take SIGTERM for an announcement, and go on.
    jax.config.update("jax_enable_preemption_service", False)
    _silence_libraries()
    jax.distributed.initialize(
        coordinator,
        count,
        index,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )


def _silence_libraries() -> None:
    """Leave standard output to Python: gloo would write a line for each connection."""
    sys.stdout.flush()
    _replaced.append(sys.stdout)
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Leave together with the others; at once, if an error comes that they do not know of."""
    try:
        yield
    except BaseException as error:
        if shared(error):
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = (str(error).splitlines() or ["no reason given"])[0]
            print(f"Error: another process was lost, or jax failed: {reason}", file=sys.stderr)
        else:
            traceback.print_exc()
        leave_at_once(1)
    finally:
        while _replaced:
            sys.stdout.close()
            sys.stdout = _replaced.pop()
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def leave_at_once(status: int) -> None:
    """End without waiting for the others, which notice by the missing heartbeat at the latest."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return count() == 1 or jax.process_index() == 0


def together(function: Callable[[], T]) -> T:
    """What `function` returns, called in every process; if it fails in one, it does in all.

    Raises:
      Its own error in the first process in which it failed, ElsewhereError in the
      others.
    """
    if count() == 1:
        return function()
    failed = None
    try:
        result = function()
    except Exception as error:
        failed = error
    messages = _gather("" if failed is None else str(failed) or type(failed).__name__)
    guilty = next((index for index, message in enumerate(messages) if message), None)
    if guilty is None:
        return result
    if failed is None or guilty != jax.process_index():
        failed = ElsewhereError(f"process {guilty} ended: {messages[guilty]}")
    _shared.append(failed)
    raise failed


def shared(error: BaseException) -> bool:
    """Whether all processes know of the error, and so end in the same way."""
    return count() == 1 or error in _shared


def on_first(function: Callable[[], Any]) -> Any:
    """What `function` returns in the first process, which alone calls it; as JSON can say it."""
    if count() == 1:
        return function()
    found = together(lambda: json.dumps(function()) if first() else "")
    return json.loads(_gather(found)[0])


def any_of(flag: bool) -> bool:
    """Whether it is set in one of the processes at least."""
    return flag if count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def everyones(value: Any) -> list[Any]:
    """The values of all processes, in their order; as JSON can say them."""
    return [json.loads(text) for text in _gather(json.dumps(value))]


def _gather(text: str) -> list[str]:
    if count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(raw)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(raw)] = raw
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]

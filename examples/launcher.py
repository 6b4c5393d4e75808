"""Starts the processes of a trial run on this machine, and ends them together.

Whatever happens to one process, the others end within a bounded time, and so does
the launcher: they get SIGTERM at once, and SIGKILL after GRACE seconds. They do
not outlive the launcher either: each one ends when its standard input does.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

GRACE = 5  # seconds between SIGTERM and SIGKILL
FOLLOW = 10  # seconds in which the others end as well where all of them know the reason
KNOWN = {2, 130}  # exit statuses of such ends: a wrong setting, Ctrl-C
AFTERMATH = {1, -signal.SIGABRT}  # of those that lost another: by an error, and by jax
LAUNCHED = "BNJAX_EXAMPLE_LAUNCHED"  # in the environment of the processes


def launched() -> bool:
    return LAUNCHED in os.environ


def end_with_launcher() -> None:
    """In a process that was started here: end when the launcher is gone."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    if launched():
        threading.Thread(target=watch, daemon=True).start()


def free_address() -> str:
    """An address of this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Process:
    """A started process; its errors are passed on line by line, with its number in front."""

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        environment: dict[str, str],
        events: queue.SimpleQueue[Any],
    ) -> None:
        self.index = index
        self.held: list[str] | None = None  # lines that are kept back, once there are such
        self.child = subprocess.Popen(
            command,
            env={**os.environ, **environment, LAUNCHED: "1"},
            stdin=subprocess.PIPE,
            stdout=None if index == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,  # a terminal's Ctrl-C comes here, and is passed on from here
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, args=(events,), daemon=True).start()

    def _pass_on(self) -> None:
        assert self.child.stderr is not None
        with self.child.stderr as lines:
            for line in lines:
                if self.held is None:
                    self._show(line)
                else:
                    self.held.append(line)

    def _show(self, line: str) -> None:
        print(f"[{self.index}] {line}", end="", file=sys.stderr, flush=True)

    def _wait(self, events: queue.SimpleQueue[Any]) -> None:
        self.child.wait()
        self._reader.join(1)
        assert self.child.stdin is not None
        self.child.stdin.close()
        events.put(self)

    def hold(self) -> None:
        """Keep back what it says from now on: it is told to end, and may end badly."""
        if self.held is None:
            self.held = []

    def show_held(self) -> None:
        for line in self.held or ():
            self._show(line)

    def send(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(signum)

    def ending(self) -> str:
        status = self.child.returncode
        how = f"with status {status}" if status >= 0 else f"by {signal.Signals(-status).name}"
        text = f"Process {self.index} (pid {self.child.pid}) was lost: it ended {how}."
        if status == -signal.SIGABRT:
            text += " So jax ends it if another one does not answer; it says which one."
        return text


@contextlib.contextmanager
def signals_to(events: queue.SimpleQueue[Any]) -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    previous = {n: signal.signal(n, lambda signum, frame: events.put(signum)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Launcher:
    """Starts commands, and waits until all have ended; see `run`."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.running: list[Process] = []
        self.statuses: list[int] = []
        self.lost: Process | None = None
        self.stopped: int | None = None  # the signal that asked to stop
        # What to do if some are running then.
        self.next: tuple[float, Callable[[], None]] | None = None

    def run(self, commands: Sequence[Sequence[str]], environment: dict[str, str]) -> int:
        """The exit status: 0, 2 for wrong settings, 1 for a loss, 128 + a signal to stop."""
        with signals_to(self.events):
            try:
                for index, command in enumerate(commands):
                    self.running.append(Process(index, command, environment, self.events))
                while self.running:
                    self._handle_next()
            finally:
                self._kill()
        if self.lost is not None:
            return 1
        if self.stopped is not None and any(self.statuses):
            return 128 + self.stopped
        return next((status for status in self.statuses if status in KNOWN), max(self.statuses))

    def _handle_next(self) -> None:
        timeout = None if self.next is None else max(0, self.next[0] - time.monotonic())
        try:
            event = self.events.get(timeout=timeout)
        except queue.Empty:
            assert self.next is not None
            self.next[1]()
            return
        if isinstance(event, Process):
            self._ended(event)
        elif event == signal.SIGINT and self.stopped is None:
            self.stopped = event
            print("Stopping at the next evaluation; at once with another Ctrl-C.", file=sys.stderr)
            self._send(signal.SIGINT)
            for process in self.running:
                process.hold()
        else:
            self.stopped = self.stopped or event
            self._terminate()

    def _ended(self, process: Process) -> None:
        self.running.remove(process)
        status = process.child.returncode
        self.statuses.append(abs(status))
        if status == 0 or self.lost is not None:
            return
        # After an end for a known reason, others may end because they miss that process.
        follows = self.next is not None and status in AFTERMATH
        if self.stopped is not None or status in KNOWN or follows:
            if self.next is None:
                self._in(FOLLOW, self._terminate)
                if status not in (130, -signal.SIGINT):
                    process.show_held()
            return
        # Those that lost it may end before the news of its end comes here.
        ended = [process, *(other for other in self.running if other.child.poll())]
        self.lost = min(ended, key=lambda each: each.child.returncode in AFTERMATH)
        others = " Ending the others." if self.running else ""
        print(f"{self.lost.ending()}{others}", file=sys.stderr, flush=True)
        self._terminate()

    def _terminate(self) -> None:
        for process in self.running:
            process.hold()
        self._send(signal.SIGTERM)
        self._in(GRACE, self._kill)

    def _kill(self) -> None:
        self._send(signal.SIGKILL)
        self._in(GRACE, self._kill)

    def _in(self, seconds: float, action: Callable[[], None]) -> None:
        self.next = time.monotonic() + seconds, action

    def _send(self, signum: int) -> None:
        for process in self.running:
            process.send(signum)

"""Several processes that convert one checkpoint together, each its share: who they are, and what they tell each other.

Law: what one process tells comes to all, in the order of their ranks; when one ends early, killed or by an error, each
of the others gets a JobError that names it, as soon as it asks, and none waits for it.
Each is connected to the first, the coordinator, by TCP: the operating system closes the connection of a process that is
gone. `jax.distributed` is not what carries this: its service ends the other processes by an abort in C++ when the
coordinator is gone, before anything could be said. `Job.of_jax` takes ranks and addresses from it where it runs.
Knows texts; knows nothing of checkpoints.
"""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import numpy as np

from bridge._errors import BridgeError

_PATIENCE = 300.0  # seconds until all processes are there
_LENGTH = 8  # bytes in front of a message
#: A host that is off closes nothing: after so many seconds without a sign, the first sign and their number.
_KEEP_ALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))


class JobError(BridgeError, RuntimeError):
    """Processes that work together cannot: one has ended early, has not come, or was asked for something else."""

    def __init__(self, problem: str, expected: str, found: str):
        self.problem, self.expected, self.found = problem, expected, found
        super().__init__(
            f"{problem}\n  expected: {expected}\n  found: {found}\n"
            "Nothing is at the target unless all of it was written. Start all processes again, with the same arguments "
            "and resume=True (--resume)."
        )


class Job:
    """This process among those that do one thing together; `Job()` is a process by itself.

    Every process makes the same calls in the same order.

    Attributes:
      rank: which of them it is; 0 is the one that coordinates, and finishes what all have done.
      count: how many there are.

    >>> Job().gather("alone")
    ['alone']
    """

    def __init__(self, rank: int = 0, count: int = 1, connections: Sequence[socket.socket] = ()):
        self.rank, self.count = rank, count
        #: of rank 0: to each of the others, in their order; of the others: to rank 0
        self._connections = list(connections)
        self._early: dict[socket.socket, list[dict[str, Any]]] = {each: [] for each in connections}

    @classmethod
    def join(cls, coordinator: str, rank: int, count: int, *, patience: float = _PATIENCE) -> Job:
        """The job whose process 0 is at `coordinator`; returns when all processes are there.

        Args:
          coordinator: "host:port" of process 0, which listens there until all have come.
          rank, count: which process this is, from 0 on, of how many.
          patience: seconds that the others have to come.

        Raises:
          JobError: no such rank or address, two processes have one rank, or one has not come in time.

        Example::

            with Job.join("10.0.0.1:4321", rank=1, count=4) as job:
                convert("run/linen", "run/nnx", to="nnx", job=job)
        """
        host, port = _address(coordinator)
        if not (0 <= rank < count):
            raise JobError("no such process in the job", f"a rank from 0 to {count - 1}", f"rank {rank}")
        if count == 1:
            return cls()
        deadline = time.monotonic() + patience
        if rank:
            return cls(rank, count, [_connected(host, port, rank, count, deadline)])
        try:
            server = socket.create_server((host, port), backlog=count)
        except OSError as error:
            raise JobError("process 0 cannot listen", f"the right to listen at {coordinator}", str(error)) from error
        with server:
            return cls(0, count, _accepted(server, count, deadline))

    @classmethod
    def of_jax(cls, *, patience: float = _PATIENCE) -> Job:
        """The job that `jax.distributed.initialize` has made this process part of; `Job()` where there is none."""
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() == 1:
            return cls()
        with socket.create_server(("", 0), backlog=jax.process_count()) as server:
            own = f"{_own_address()}:{server.getsockname()[1]}".encode()
            padded = np.frombuffer(own.ljust(64), np.uint8)
            told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode().strip()
            deadline = time.monotonic() + patience
            if jax.process_index() == 0:
                return cls(0, jax.process_count(), _accepted(server, jax.process_count(), deadline))
        host, port = _address(told)
        rank, count = jax.process_index(), jax.process_count()
        return cls(rank, count, [_connected(host, port, rank, count, deadline)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the job."""
        for each in self._connections:
            each.close()

    def gather(self, text: str = "") -> list[str]:
        """What each process tells, in the order of their ranks. Returns when all have told.

        Raises:
          JobError: one of them has ended.
        """
        if self.count == 1:
            return [text]
        if self.rank:
            self._send(self._connections[0], {"text": text})
            return self._next(self._connections[0])["texts"]
        texts = [text, *(message["text"] for message in self._in_order())]
        for each in self._connections:
            self._send(each, {"texts": texts})
        return texts

    def agree(self, what: str, text: str) -> None:
        """Raise JobError unless each process has the same text for `what`."""
        for rank, other in enumerate(self.gather(text)):
            if other != text:
                raise JobError(
                    f"the processes of a job have another {what}",
                    f"the same for all: {text:.200}",
                    f"process {rank}: {other:.200}",
                )

    def check(self) -> None:
        """Raise JobError if one of the others has ended. Does not wait."""
        if not self._connections:
            return
        ready, _, _ = select.select(self._connections, [], [], 0)
        for each in ready:
            self._early[each].append(self._receive(each))

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error in here ends the work of all processes."""
        try:
            yield
        except BaseException as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            found = error.found if isinstance(error, JobError) else f"process {self.rank} has failed: {first}"
            for each in self._connections:
                with suppress(OSError):
                    _write(each, {"failed": found})
            self.close()
            raise

    # messages

    def _in_order(self) -> list[dict[str, Any]]:
        """The next message of each connection. Whoever ends first is told of, whichever it is."""
        waiting = [each for each in self._connections if not self._early[each]]
        while waiting:
            ready, _, _ = select.select(waiting, [], [])
            for each in ready:
                self._early[each].append(self._receive(each))
            waiting = [each for each in waiting if not self._early[each]]
        return [self._early[each].pop(0) for each in self._connections]

    def _next(self, connection: socket.socket) -> dict[str, Any]:
        early = self._early[connection]
        return early.pop(0) if early else self._receive(connection)

    def _receive(self, connection: socket.socket) -> dict[str, Any]:
        try:
            message = _read(connection)
        except OSError:
            message = None
        if message is None:
            raise self._ended(f"process {self._rank_of(connection)} has ended")
        if "failed" in message:
            raise self._ended(message["failed"])
        return message

    def _send(self, connection: socket.socket, message: dict[str, Any]) -> None:
        try:
            _write(connection, message)
        except OSError:
            self._receive(connection)  # it may have told why, before it ended
            raise self._ended(f"process {self._rank_of(connection)} has ended") from None

    def _rank_of(self, connection: socket.socket) -> int:
        return 0 if self.rank else 1 + self._connections.index(connection)

    def _ended(self, found: str) -> JobError:
        return JobError("a process of the job has ended early", f"all {self.count} processes, until the end", found)


def _address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\S+):(\d{1,5})", text)
    if match is None:
        raise JobError("no address of a coordinator", "host:port", repr(text))
    return match[1].strip("[]"), int(match[2])


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:  # a host without a name: the others can only be on it
        return "127.0.0.1"


def _connected(host: str, port: int, rank: int, count: int, deadline: float) -> socket.socket:
    """A connection to process 0, which may come later than this one."""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise JobError("process 0 has not come", f"it at {host}:{port}", str(error)) from error
            time.sleep(0.1)
    _keep_alive(connection)
    _write(connection, {"rank": rank, "count": count})
    answer = _read(connection)
    if answer is None or "refused" in answer:
        connection.close()
        found = "it has ended" if answer is None else answer["refused"]
        raise JobError("process 0 has not begun the job", f"a job of {count} processes", found)
    connection.settimeout(None)
    return connection


def _accepted(server: socket.socket, count: int, deadline: float) -> list[socket.socket]:
    """The connections of all others, in the order of their ranks."""
    there: dict[int, socket.socket] = {}
    try:
        while len(there) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            connection, _ = server.accept()
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            hello = _hello(connection)
            if hello is None:  # somebody who looks what is at this port
                connection.close()
                continue
            rank = hello.get("rank")
            if hello.get("count") != count or rank in there or rank not in range(1, count):
                found = f"process {rank} of {hello.get('count')}, with {sorted([0, *there])} of {count} there"
                there[-1] = connection
                raise JobError("a process does not belong to the job", f"each rank of {count} once", found)
            _keep_alive(connection)
            there[rank] = connection
    except JobError as error:
        _refuse(there.values(), error.found)
        raise
    except OSError as error:
        found = f"none of rank {sorted(set(range(count)) - {0, *there})}"
        _refuse(there.values(), found)
        raise JobError("not all processes have come", f"{count} processes", found) from error
    for each in there.values():
        _write(each, {"begin": count})
        each.settimeout(None)
    return [there[rank] for rank in range(1, count)]


def _refuse(connections: Iterable[socket.socket], why: str) -> None:
    for each in connections:
        with suppress(OSError):
            _write(each, {"refused": why})
        each.close()


def _hello(connection: socket.socket) -> dict[str, Any] | None:
    """What a process says first; None where it is none of ours."""
    try:
        hello = _read(connection, most=1000)
    except (OSError, ValueError):
        return None
    return hello if isinstance(hello, dict) else None


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE:
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _write(connection: socket.socket, message: dict[str, Any]) -> None:
    content = json.dumps(message).encode()
    connection.sendall(len(content).to_bytes(_LENGTH, "big") + content)


def _read(connection: socket.socket, most: int = 1 << 40) -> dict[str, Any] | None:
    """The next message; None where there is none any more, or one of more than `most` bytes."""
    length = int.from_bytes(_exactly(connection, _LENGTH), "big")
    content = _exactly(connection, length) if length <= most else b""
    return json.loads(content) if content else None


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            return b""
        parts += part
    return bytes(parts)

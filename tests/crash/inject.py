"""Runs a function in a child process and stops it, or lets a call fail, at an exactly chosen file-system call.

Every file-system call of the child, of all its threads and of the programs it starts waits for an answer of ours
before the kernel carries it out: seccomp's user notification, seccomp_unotify(2), needs no privilege, no tracer and no
package. So calls are counted in one order for the whole child and only where they are about the data directory; the
answer is "go on", an errno, a short count after part of a write was done in its stead, or a signal to the whole
process group before the call. strace can neither count over threads (its `when=` is for each thread by itself) nor
tell descriptors apart, nor write less than was asked; an audit hook sees neither writes and fsyncs nor other programs.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import multiprocessing
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path

from tests.crash.calls import AUDIT_ARCH, CHANGING, CREATING, VERBS, WRITING, Call, Reader, memory, numbers

_NOTIFICATION = struct.Struct("<QII iIQ6Q")  # struct seccomp_notif
_ANSWER = struct.Struct("<QqiI")  # struct seccomp_notif_resp
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
_SYS_PIDFD_GETFD = 438
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_PR_SET_NO_NEW_PRIVS = 38
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
PATIENCE = 60.0
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Action:
    """What is done to the n-th of the calls that it is about, and to all calls of `then` that follow."""

    verbs: frozenset[str]
    error: int = 0
    then: frozenset[str] = frozenset()
    short: bool = False
    signal: int = 0  # to the whole process group, as a terminal or a service manager sends it
    programs: bool = False

    @property
    def kills(self) -> bool:
        return self.signal == signal.SIGKILL

    def meets(self, call: Call) -> bool:
        return call.verb in self.verbs and (call.actor == "program") == self.programs

    def lasts(self, call: Call) -> bool:
        return call.verb in self.then and (call.actor == "program") == self.programs


_ROOM = CREATING | WRITING | {"fsync"}
_ALTERING = CHANGING - {"fsync", "lock"}
_ANY = CHANGING | {"open", "read", "list"}
ACTIONS = {
    "kill": Action(CHANGING | {"send"}, signal=signal.SIGKILL),
    "kill-program": Action(CHANGING, signal=signal.SIGKILL, programs=True),
    "SIGINT": Action(CHANGING | {"send"}, signal=signal.SIGINT),
    "ENOSPC": Action(_ROOM, errno.ENOSPC, then=_ROOM),
    "EDQUOT": Action(_ROOM, errno.EDQUOT, then=_ROOM),
    "EIO": Action(_ANY, errno.EIO),
    "EROFS": Action(_ALTERING, errno.EROFS, then=_ALTERING),
    "ENOLCK": Action(frozenset({"lock"}), errno.ENOLCK, then=frozenset({"lock"})),
    "EMFILE": Action(frozenset({"open", "create"}), errno.EMFILE),
    "short": Action(frozenset({"write"}), short=True),
    "full": Action(frozenset({"write"}), errno.ENOSPC, then=_ROOM, short=True),
}
"""`full` writes half of what the n-th call was to write, and from then on the disk is full. EROFS is what a disk that
had an error is, from then on, and ENOLCK what a network file system without locks says.
"""


@dataclass(frozen=True)
class Injection:
    """An action at the n-th call it is about, counted from 1."""

    action: str
    n: int


@dataclass
class Outcome:
    """How a child ended. `status` is negative for a signal, None for a child that hung and was ended."""

    status: int | None = None
    stdout: str = ""
    stderr: str = ""
    struck: list[Call] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    hung: bool = False

    def count(self, action: str) -> int:
        """How many calls there are to strike at."""
        return sum(map(ACTIONS[action].meets, self.calls))


def run(body: Callable[[], int], root: Path, scratch: Path, injection: Injection | None = None) -> Outcome:
    """Runs `body` in a child with every call about `root` supervised; `scratch` is for its output.

    With an injection, only the calls that it is about are. Must be called where no other thread runs, as it forks.
    """
    action = ACTIONS[injection.action] if injection else None
    ours, theirs = socket.socketpair()
    child = _start(body, scratch, theirs, numbers(action.verbs | action.then if action else frozenset(VERBS)))
    theirs.close()
    with ours:
        _, listeners, _, _ = socket.recv_fds(ours, 1, 1)
    assert child.pid
    assert listeners, f"calls cannot be supervised here: {(scratch / 'stderr').read_text()}"
    supervisor = _Supervisor(listeners[0], child.pid, root, action, injection.n if injection else 0)
    try:
        if not supervisor.watch(time.monotonic() + PATIENCE):
            os.killpg(child.pid, signal.SIGKILL)
            supervisor.outcome.hung = True
    finally:
        os.close(listeners[0])
    return _end(child, scratch, supervisor.outcome)


def run_freely(body: Callable[[], int], scratch: Path) -> Outcome:
    """Runs `body` in a child as nobody watches it."""
    child = _start(body, scratch, None, [])
    child.join(PATIENCE)
    outcome = Outcome()
    if child.exitcode is None and child.pid:
        os.killpg(child.pid, signal.SIGKILL)
        outcome.hung = True
    return _end(child, scratch, outcome)


def _start(body: Callable[[], int], scratch: Path, theirs: socket.socket | None, watched: list[int]) -> ForkProcess:
    child = multiprocessing.get_context("fork").Process(target=_child, args=(body, theirs, scratch, watched))
    child.start()
    return child


def _end(child: ForkProcess, scratch: Path, outcome: Outcome) -> Outcome:
    child.join()
    outcome.status = None if outcome.hung else child.exitcode
    outcome.stdout, outcome.stderr = ((scratch / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return outcome


class _Supervisor:
    def __init__(self, listener: int, pid: int, root: Path, action: Action | None, n: int) -> None:
        self.outcome = Outcome()
        self._listener = listener
        self._pid = pid
        self._reader = Reader(root, pid)
        self._action = action
        self._left = n

    def watch(self, deadline: float) -> bool:
        """Answers until everything that the child started has ended; False when it had not in time."""
        waiting = select.poll()
        waiting.register(self._listener, select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            for _, events in waiting.poll(left * 1000):
                if events & select.POLLIN:
                    self._answer()
                elif events & select.POLLHUP:
                    return True
        return False

    def _answer(self) -> None:
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return  # whoever asked is gone
            raise
        cookie, tid, _, number, _, _, *args = _NOTIFICATION.unpack(buffer)
        call = self._reader.read(tid, number, tuple(args))
        answer = (0, 0, _CONTINUE)
        if call is not None:
            self.outcome.calls.append(call)
            if self._strikes(call):
                if not self._begin(call):
                    return
                answer = self._fail(call)
        try:
            fcntl.ioctl(self._listener, _SEND, _ANSWER.pack(cookie, *answer))
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.EINPROGRESS):
                raise

    def _strikes(self, call: Call) -> bool:
        if self._action is None:
            return False
        if self._left == 0:
            return self._action.lasts(call)
        self._left -= self._action.meets(call)
        return self._left == 0

    def _begin(self, call: Call) -> bool:
        """Whether the call is answered at all: nobody answers the dead."""
        self.outcome.struck.append(call)
        assert self._action is not None
        if self._action.signal:
            os.killpg(self._pid, self._action.signal)
        return not self._action.kills

    def _fail(self, call: Call) -> tuple[int, int, int]:
        """Value, error and flags of the answer."""
        action = self._action
        assert action is not None
        first = len(self.outcome.struck) == 1
        if action.short and first and call.name in ("write", "pwrite64") and (size := call.args[2]) > 1:
            return _write_instead(call, size // 2), 0, 0
        if not action.error:
            return 0, 0, _CONTINUE  # a single byte cannot be halved
        return 0, -action.error, 0


def _write_instead(call: Call, size: int) -> int:
    """Does a part of a write(2) or pwrite(2) for the process that asked for it."""
    fd = _borrow(call.tid, call.args[0])
    try:
        data = memory(call.tid, call.args[1], size)
        return os.pwrite(fd, data, call.args[3]) if call.name == "pwrite64" else os.write(fd, data)
    finally:
        os.close(fd)


def _borrow(tid: int, number: int) -> int:
    """Another process's open file, position and all: pidfd_getfd(2)."""
    leader = next(
        int(line.split()[1]) for line in Path(f"/proc/{tid}/status").read_text().splitlines() if line[:5] == "Tgid:"
    )
    process = os.pidfd_open(leader)
    try:
        fd: int = _LIBC.syscall(_SYS_PIDFD_GETFD, process, int(number), 0)
    finally:
        os.close(process)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return fd


# --- in the child ---


def _child(body: Callable[[], int], theirs: socket.socket | None, scratch: Path, watched: list[int]) -> None:
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        fd = os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(fd, number)
        os.close(fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    if theirs:
        listener = _install(watched)
        socket.send_fds(theirs, [b"!"], [listener])
        os.close(listener)
        theirs.close()
    sys.exit(body())


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _install(watched: list[int]) -> int:
    """From now on, every call with one of these numbers waits for whoever reads the returned descriptor."""
    tests = [
        (_LOAD, 0, 0, 4),  # offsetof(struct seccomp_data, arch)
        (_EQUAL, 1, 0, AUDIT_ARCH),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, 0),  # nr
    ]
    for left, number in zip(range(len(watched), 0, -1), watched, strict=True):
        tests.append((_EQUAL, left, 0, number))
    tests += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _NOTIFY)]
    code = b"".join(struct.pack("<HBBI", *test) for test in tests)
    program = _Program(len(tests), code)
    if os.geteuid() != 0:
        _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    fd: int = _LIBC.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, ctypes.byref(program))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return fd

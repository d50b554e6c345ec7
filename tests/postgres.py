"""A real PostgreSQL server of its own, on a Unix socket and a loopback port, for as long as a test run lasts.

Its databases order texts as a German does unless told otherwise, as those of many hosts do: nothing may rest on that.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

USER, PASSWORD = "systemfiles", "correct-horse"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PATIENCE = 60.0  # seconds for a start or a stop on a busy machine


class Server:
    """A server; it can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = _free_port()
        self._account = _account()
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self._initialise()

    def start(self) -> None:
        """Starts it; returns once it answers."""
        deadline = time.monotonic() + _PATIENCE
        while not self._try_to_start(deadline):
            assert time.monotonic() < deadline, self._log()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Ends it: at once with SIGKILL, else without waiting for those who are connected."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(_PATIENCE)
            self._process = None

    def new_database(self, template: str = "template1") -> str:
        """Makes a database; returns the URL by which it is reached over TCP, with a password."""
        name = f"test_{next(self._numbers)}"
        with self.connection() as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        return self.url(name)

    def url(self, name: str) -> str:
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def socket_url(self, name: str) -> str:
        """The same over the Unix socket."""
        return f"postgresql://{USER}@/{name}?host={self.directory}&port={self.port}"

    def connection(self, name: str = "postgres") -> psycopg.Connection:
        """One that commits each statement."""
        return psycopg.connect(self.socket_url(name), autocommit=True)

    def _initialise(self) -> None:
        data, secret = self.directory / "data", self.directory / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (self.directory, secret):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)
        self._run(
            *(_program("initdb"), "-D", data, "-U", USER, "--pwfile", secret, "--no-sync"),
            *("--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8"),
            *("--locale=C", "--locale-provider=icu", "--icu-locale=de-DE"),
        )

    def _try_to_start(self, deadline: float) -> bool:
        """False when it ended again: processes of a killed one may still hold its memory."""
        settings = {
            "fsync": "off",
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self.directory,
            "max_connections": 60,
            "shared_buffers": "32MB",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [_program("postgres"), "-D", self.directory / "data", *options],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                preexec_fn=_die_with_parent,
                **self._identity(),
            )
        while time.monotonic() < deadline:
            with contextlib.suppress(psycopg.OperationalError), self.connection():
                return True
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        return False

    def _run(self, *words: str | Path) -> None:
        done = subprocess.run(
            words, check=False, capture_output=True, text=True, cwd=self.directory, **self._identity()
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _identity(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}

    def _log(self) -> str:
        return (self.directory / "log").read_text()[-4000:]


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """Runs one until the block ends, and leaves nothing."""
    # directly below /tmp: its user must get there, and the address of a socket has at most 107 bytes
    directory = Path(tempfile.mkdtemp(prefix="systemfiles-pg-", dir="/tmp"))
    try:
        running = Server(directory)
        try:
            running.start()
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One server for each worker."""
    with server() as running:
        yield running


def _program(name: str) -> Path:
    """A program of the newest PostgreSQL; Debian keeps them out of PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
    found = str(places[-1]) if places else shutil.which(name)
    assert found, f"{name} is not installed: doit setup tests=yes"
    return Path(found)


def _account() -> pwd.struct_passwd:
    """Who runs it: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    names = {account.pw_name for account in pwd.getpwall()}
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

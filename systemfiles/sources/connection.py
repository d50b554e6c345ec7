"""Connections whose answers come in time.

A socket's time-out starts anew with every byte, so an origin that sends one byte now and then would hold a client for
days in the head of an answer, between two chunks of its body, in trailers, or with one `100 Continue` after another.
Here the whole head, and each piece of the body with all that frames it, must come within the read time-out. And what
is sent must be taken within as long, not within the time-out for connecting.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


SENDING = 30.0
"""seconds within which the other side has to take what is sent, or some of it"""


class TimelyAdapter(HTTPAdapter):
    """What a `requests` session needs so that its answers come in time, through a proxy, too."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*args, **options)
        manager.pool_classes_by_scheme = _POOLS
        return manager


class _Timed(io.RawIOBase):
    """A socket's bytes until a moment that `allow` moves."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, seconds: float | None) -> None:
        self._raw = raw
        self._sock = sock
        self._seconds = seconds
        self._until = 0.0
        self.allow()

    def allow(self) -> None:
        self._until = time.monotonic() + (self._seconds or 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        if self._seconds is not None:
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._timed = _Timed(self.fp.detach(), sock, sock.gettimeout())
        self.fp = io.BufferedReader(self._timed)

    def read1(self, n: int = -1) -> bytes:
        self._timed.allow()
        return super().read1(n)


class _Connection(HTTPConnection):
    response_class = _Response

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(SENDING)

    def request(self, *args: Any, **options: Any) -> None:
        if self.sock:  # from an earlier answer, of which it has some time left
            self.sock.settimeout(SENDING)
        super().request(*args, **options)


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


_POOLS: MutableMapping[str, Any] = {"http": _Pool, "https": _TlsPool}

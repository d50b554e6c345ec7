"""Real OCI registries on loopback: Debian's docker-registry, open, with Basic or with token authentication."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import bcrypt
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

USER, PASSWORD = "operator", "correct horse"
SERVICE = "test-registry"
ISSUER = "test-issuer"


_FIELD = re.compile(r'(\S+?)=("(?:[^"\\]|\\.)*"|\S*)')


class Answer(NamedTuple):
    """What was answered to one request: the Host it was sent to, and how many bytes the body had that was written."""

    host: str
    method: str
    path: str
    status: int
    written: int


class Registry:
    """A running registry: its `host`, and what it was asked for."""

    def __init__(self, host: str, log: Path) -> None:
        self.host = host
        self._log = log

    def requests(self, method: str, pattern: str) -> list[str]:
        """The paths of answered requests of this method that match, from the access log."""
        lines = re.findall(r'"([A-Z]+) (\S+) HTTP/1\.[01]" (\d+)', self._log.read_text())
        return [path for verb, path, status in lines if verb == method and status != "401" and re.search(pattern, path)]

    def answers(self) -> list[Answer]:
        """All answers so far, in order; of a registry that logs at the level "info"."""
        lines = [line for line in self._log.read_text().splitlines() if 'msg="response completed' in line]
        fields = ({name: value.strip('"') for name, value in _FIELD.findall(line)} for line in lines)
        return [
            Answer(
                each["http.request.host"],
                each["http.request.method"],
                each["http.request.uri"],
                int(each["http.response.status"]),
                int(each["http.response.written"]),
            )
            for each in fields
        ]


@contextlib.contextmanager
def registry(directory: Path, *, auth: str = "none", level: str = "error") -> Iterator[Registry]:
    """Runs a registry until the block ends; `auth` is "none", "htpasswd" or "token", `level` is that of its log."""
    directory.mkdir(parents=True)
    port = _free_port()
    with contextlib.ExitStack() as stack:
        settings = {"none": "", "htpasswd": _htpasswd(directory) if auth == "htpasswd" else ""}
        if auth == "token":
            settings["token"] = _token(directory, stack.enter_context(_token_server(directory)))
        config = directory / "config.yml"
        config.write_text(
            f"version: 0.1\n"
            f"log: {{level: {level}, accesslog: {{disabled: false}}}}\n"
            f"storage: {{filesystem: {{rootdirectory: {directory}/data}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '127.0.0.1:{port}'}}\n{settings[auth]}"
        )
        log = directory / "log"
        program = shutil.which("docker-registry")
        assert program, "docker-registry is not installed: doit setup tests=yes"
        with log.open("wb") as output:
            process = subprocess.Popen([program, "serve", str(config)], stdout=output, stderr=subprocess.STDOUT)
        stack.callback(_end, process)
        _wait(f"http://127.0.0.1:{port}/v2/", process, log)
        yield Registry(f"127.0.0.1:{port}", log)


def docker_config(directory: Path, host: str, *, user: str = USER, password: str = PASSWORD) -> Path:
    """A DOCKER_CONFIG directory with one login."""
    directory.mkdir(parents=True, exist_ok=True)
    encoded = base64.b64encode(f"{user}:{password}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {host: {"auth": encoded}}}))
    return directory


def _htpasswd(directory: Path) -> str:
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
    (directory / "htpasswd").write_text(f"{USER}:{hashed}\n")
    return f"auth: {{htpasswd: {{realm: test, path: {directory}/htpasswd}}}}\n"


def _token(directory: Path, realm: str) -> str:
    return (
        f"auth: {{token: {{realm: '{realm}', service: {SERVICE}, issuer: {ISSUER}, "
        f"rootcertbundle: {directory}/certificate.pem}}}}\n"
    )


@contextlib.contextmanager
def _token_server(directory: Path) -> Iterator[str]:
    """The other half of docker's token protocol: Basic credentials in, a signed and scoped token out."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(key)
    (directory / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    chain = [base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()]
    expected = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") != expected:
                self.send_error(401)
                return
            query = parse_qs(urlsplit(self.path).query)
            kind, name, actions = query["scope"][0].split(":")
            now = int(time.time())
            claims = {
                "iss": ISSUER,
                "aud": SERVICE,
                "sub": USER,
                "iat": now,
                "nbf": now - 10,
                "exp": now + 300,
                "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
            }
            body = json.dumps({"token": jwt.encode(claims, key, algorithm="ES256", headers={"x5c": chain})}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/token"
    finally:
        server.shutdown()
        server.server_close()


def _certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except urllib.error.HTTPError:
            return  # it answers, if only to ask who we are
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        else:
            return
    msg = f"no registry at {url}: {log.read_text()}"
    raise AssertionError(msg)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

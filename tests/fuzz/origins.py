"""What hosts on the network say, and what lies in the files that hold credentials, given to those who read it.

No request leaves the process: `Canned` has the answers. They are written as HTTP has them, one after the other::

    206
    Content-Range: bytes 0-6/7

    content
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import requests
from requests.adapters import BaseAdapter
from urllib3 import HTTPResponse

from systemfiles.content.descriptors import Descriptor
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.files import NewFile
from systemfiles.foundation.manifests import DOCKER_MANIFEST, IMAGE_INDEX, IMAGE_MANIFEST, INDEXES, choose
from systemfiles.sources.credentials import Credential, credential_for
from systemfiles.sources.http import download, try_each
from systemfiles.sources.login import Login
from systemfiles.sources.oci import Reference, Repository
from systemfiles.sources.transport import Bounds, Transport

HOST = "r.example.com"
SEPARATOR = b"\n===\n"
CONTENT = b"content"
_QUICK = Bounds(attempts=3, pause=0, longest_pause=0, total=60, enough=1)
_MOST_ANSWERS = 40


class Canned(Transport):
    """The network as `data` has it: each request gets the next answer, and the last one again and again."""

    def __init__(self, data: bytes) -> None:
        super().__init__(_QUICK)
        self._requests = requests.Session()
        self._requests.trust_env = False
        for scheme in ("http://", "https://"):
            self._requests.mount(scheme, _Adapter(data.split(SEPARATOR)))

    def _session(self) -> requests.Session:
        return self._requests


class _Adapter(BaseAdapter):
    def __init__(self, answers: list[bytes]) -> None:
        super().__init__()
        self._answers = answers
        self._given = 0

    def send(self, request: requests.PreparedRequest, *_: object, **__: object) -> requests.Response:
        self._given += 1
        assert self._given <= _MOST_ANSWERS, "it asks again and again"
        answer = self._answers[min(self._given, len(self._answers)) - 1]
        head, _blank, body = answer.partition(b"\n\n")
        status, *lines = head.decode("latin-1").split("\n")
        response = requests.Response()
        response.url = request.url or ""
        response.request = request
        response.status_code = int(status) if status.isascii() and status.isdigit() and len(status) == 3 else 200
        response.reason = "Whatever"
        for line in lines:
            name, _colon, value = line.partition(":")
            response.headers[name.strip()] = value.strip()
        response.raw = HTTPResponse(body=io.BytesIO(body), preload_content=False)
        return response

    def close(self) -> None:
        return


def answers(*parts: bytes) -> bytes:
    return SEPARATOR.join(parts)


# --- downloads: Content-Range, Content-Length, Retry-After, Location ---

DOWNLOADS = (
    b'200\nContent-Length: 7\nETag: "a"\n\ncontent',
    answers(b'200\nContent-Length: 7\nETag: "a"\n\ncont', b'206\nContent-Range: bytes 4-6/7\nETag: "a"\n\nent'),
    answers(b"503\nRetry-After: 0\n\n", b"429\nRetry-After: Fri, 20 Nov 2026 12:00:00 GMT\n\n", b"200\n\ncontent"),
    answers(b"302\nLocation: https://cdn.example.com:443/x?a=b#c\n\n", b"307\nLocation: ../y\n\n", b"200\n\ncontent"),
)
DOWNLOAD_WORDS = (
    *(b"200", b"206", b"301", b"308", b"401", b"416", b"500", b"503", b"bytes */7", b"bytes 0-6/*", b"\nRetry-After: "),
    *(
        b"9" * 400,
        b"9" * 5000,
        b"-0000",
        b"Mon, 1 Jan 1 00:00:00 -0000",
        b"31 Feb 99999 99:99:99 +9999",
        b"\nLocation: ",
    ),
    *(b"http://", b"https://[", b"//[::1", b"file:///etc/passwd", b"https://a:b@c:99999/", b"\xe2\x84\x80", b"xn--"),
    *(b"\nContent-Length: ", b"\nContent-Encoding: gzip", b"W/", SEPARATOR, b"\n\n"),
)


def take_download(data: bytes, work: Path) -> None:
    transport = Canned(data)
    url = f"https://{HOST}/kernel"
    with NewFile(work / "tmp") as out:

        def get(place: str) -> None:
            digest = Digest.of(CONTENT)
            download(transport.open, transport, place, out, subject="kernel", digest=digest, size=len(CONTENT))

        try_each([url], get, subject="kernel")
        assert out.digest() == Digest.of(CONTENT)


# --- registries ---

DIGEST = Digest.of(CONTENT)
PART = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": DIGEST, "size": 7, "annotations": {"a": "b"}}
PLATFORM = {"os": "linux", "architecture": "amd64", "variant": "v8", "os.features": []}
MANIFESTS = (
    {"schemaVersion": 2, "mediaType": IMAGE_MANIFEST, "config": PART, "layers": [PART, PART], "annotations": {}},
    {"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": PART, "layers": [PART]},
    {
        "schemaVersion": 2,
        "mediaType": IMAGE_INDEX,
        "manifests": [
            {**PART, "mediaType": IMAGE_MANIFEST, "platform": PLATFORM},
            {**PART, "mediaType": IMAGE_MANIFEST, "platform": {"os": "unknown", "architecture": "unknown"}},
            {**PART, "mediaType": IMAGE_INDEX},
        ],
    },
)


def take_manifest(data: bytes, _: Path) -> None:
    def get(_: str) -> None:
        repository = Repository(HOST, "a/b", transport=Canned(b"200\n\n" + data), environ={})
        manifest = repository.manifest("latest")
        assert manifest.digest == Digest.of(data)
        chosen = choose(manifest, Arch.X86_64, subject="x") if manifest.media_type in INDEXES else []
        layers = [] if chosen else manifest.value.get("layers")
        for part in [*chosen, *(layers if isinstance(layers, list) else [])]:
            found = Descriptor.from_json(part)
            assert Digest.parse(found.digest) == found.digest
            assert found.size >= 0

    try_each(["a"], get, subject="image")


CHALLENGES = (
    b'Bearer realm="https://auth.example.com/token",service="r.example.com",scope="repository:a/b:pull"',
    b'Basic realm="a"',
    b'Negotiate, Bearer realm="https://r.example.com/token?a=b", Basic realm="b, c=d"',
)
TOKENS = ({"token": "abc", "expires_in": 300}, {"access_token": "abc"})
TOKEN_WORDS = ("token", "access_token", "a b", "a\nb", "\u20ac", "a" * 70_000)
CHALLENGE_WORDS = (
    *(b"Bearer ", b"Basic ", b"Digest ", b'realm="', b'"', b"\\", b", ", b"=", b"https://", b"http://", b"//", b"["),
    *(b"https://[::1]:0/", b"https://localhost", b"https://a@b", b"https://\xff/", b"https://a..b/", b"https://", b"?"),
    *(b"401", b"403", b"302\nLocation: /", SEPARATOR, b"," * 900, b" " * 900, b"a" * 900, b'a="' * 300),
)


def after(challenge: bytes, token: bytes = b'{"token":"abc"}') -> bytes:
    """A registry that asks for a login, the server that sells tokens, and the registry again."""
    return answers(b"401\nWWW-Authenticate: " + challenge + b"\n\n", b"200\n\n" + token, b"200\n\n" + CONTENT)


LOGINS = tuple(after(challenge, json.dumps(token).encode()) for challenge in CHALLENGES for token in TOKENS)


def take_challenge(data: bytes, work: Path) -> None:
    take_login(after(data.replace(b"\n", b" ")), work)


def take_token(data: bytes, work: Path) -> None:
    take_login(after(CHALLENGES[0], data), work)


def take_login(data: bytes, work: Path) -> None:
    """A request, the challenge it is answered with, the token that is bought, and the request again."""

    def log_in(place: str) -> None:
        repository = Repository(HOST, "a/b", transport=Canned(data), environ={"SYSTEMFILES_CREDENTIALS": AS_ME})
        with NewFile(Path(place)) as out:
            repository.blob(DIGEST, len(CONTENT), out, subject="x")

    try_each([str(work)], log_in, subject="image")


AS_ME = f"{HOST}=basic:me:secret"


def take_reference(data: bytes, _: Path) -> None:
    reference = Reference.parse(data.decode("utf-8", "surrogateescape"))
    assert Reference.parse(str(reference)) == reference
    assert ".." not in reference.repository.split("/")


REFERENCES = (b"busybox", b"docker.io/library/busybox:1.37@" + DIGEST.encode(), b"http://[::1]:5000/a/b-c_d.e:v1")

# --- credentials ---

DOCKER_CONFIGS = (
    {"auths": {HOST: {"auth": "bWU6c2VjcmV0"}, f"https://{HOST}": {"username": "me", "password": "secret"}}},
    {"auths": {HOST: {"identitytoken": "abc"}}, "credHelpers": {HOST: "no-such-helper"}, "credsStore": "nothing"},
)
CONFIG_WORDS = ("auths", "auth", "username", "password", "identitytoken", "credHelpers", "credsStore", HOST, "bWU=")
NETRC = f"machine {HOST} login me password secret\ndefault login you\nmacdef x\ny\n\n# end\n".encode()
NETRC_WORDS = (b"machine ", b"login ", b"password ", b"default ", b"macdef ", b"account ", b'"', b"\\", b"#")
PAIRS = f"{HOST}=basic:me:secret other.example=bearer:abc".encode()
PAIR_WORDS = (b"=", b":", b"basic:", b"bearer:", HOST.encode())


def use_credential(credential: Credential | None) -> None:
    """What is done with one: it becomes a header, or the form that buys a token."""
    if credential is None:
        return
    transport = Canned(b'200\n\n{"token":"abc"}')

    def get(_: str) -> None:
        for scheme in ('Bearer realm="https://r.example.com/token"', 'Basic realm="x"'):
            Login(f"{HOST}/a/b", f"https://{HOST}/v2/a/b/", credential, transport).answer(scheme, None)

    try_each(["a"], get, subject="image")


def take_docker_config(data: bytes, work: Path) -> None:
    (work / "config.json").write_bytes(data)
    use_credential(credential_for(HOST, registry=True, environ={"DOCKER_CONFIG": str(work), "HOME": str(work)}))


def take_netrc(data: bytes, work: Path) -> None:
    path = work / "netrc"
    path.write_bytes(data)
    path.chmod(0o600)
    use_credential(credential_for(HOST, environ={"NETRC": str(path), "HOME": str(work)}))


def take_pairs(data: bytes, work: Path) -> None:
    text = data.replace(b"\0", b"").decode("utf-8", "surrogateescape")
    use_credential(credential_for(HOST, environ={"SYSTEMFILES_CREDENTIALS": text, "HOME": str(work)}))

"""Signatures of manifests in a registry, laid out as cosign does, so that `cosign verify --key` reads them too.

::

    sha256-<hex>.sig            a tag: the manifest of the signatures of sha256:<hex>
    ├── layers[0]               the payload: JSON that names the digest ("simple signing")
    │   └── annotation dev.cosignproject.cosign/signature     base64 of the signature of the payload's bytes
    └── layers[1] …             the same payload, signed with another key

Keys are Ed25519, or ECDSA on P-256 with SHA-256, in PEM. A key's id is the sha256 of its public half in DER
(SubjectPublicKeyInfo). What the payload says beside the digest is not relied on: the index that is signed says itself
which version it is.

Sources: cosign, specs/SIGNATURE_SPEC.md; containers/image, docs/atomic-signature.md ("JSON data format"); RFC 8032.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import InvalidDigest, ToolMissing, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

PAYLOAD = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
KEY_ID = "io.systemfiles.key"
"""On a signature: the id of the key that made it; a hint for messages, which nothing relies on."""
MOST_SIGNATURES = 8
"""of one index, that anybody looks at"""
LARGEST_PAYLOAD = 64 << 10
_TYPE = "cosign container image signature"
_LARGEST_KEY = 64 << 10
_KINDS = "an Ed25519 key, or an ECDSA key on P-256, in PEM"


def tag_of(digest: Digest) -> str:
    """The tag that the signatures of a manifest have."""
    return f"sha256-{digest.hex}.sig"


def payload(name: str, digest: Digest) -> bytes:
    """What is signed: that `name`, a repository, has `digest`. The same bytes for the same arguments."""
    critical = {
        "identity": {"docker-reference": name},
        "image": {"docker-manifest-digest": digest},
        "type": _TYPE,
    }
    return json.dumps({"critical": critical, "optional": {}}, sort_keys=True, separators=(",", ":")).encode()


def signed_digest(data: bytes) -> Digest | None:
    """The digest that a payload names; None when it is no payload of this kind."""
    try:
        critical = json.loads(data)["critical"]
        return Digest.parse(critical["image"]["docker-manifest-digest"]) if critical["type"] == _TYPE else None
    except (ValueError, KeyError, TypeError, RecursionError, InvalidDigest):
        return None


class PublicKey:
    """What signatures are checked with."""

    def __init__(self, key: ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        self._key = key
        self.id = Digest.of(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))

    @classmethod
    def read(cls, pem: str) -> PublicKey:
        """The key in `pem`, or in the file that it is the absolute path of. Raises UsageError, ToolMissing."""
        _require_cryptography()
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        inline = pem.lstrip().startswith("-----BEGIN")
        where = "a trusted key" if inline else pem
        data = pem.encode() if inline else _read(Path(pem))
        try:
            return cls(_usable(load_pem_public_key(data), where))
        except (ValueError, UnsupportedAlgorithm) as error:
            msg = f"{where} is not a public key that can be used"
            raise UsageError(msg, details=[("expected", _KINDS)]) from error

    def made(self, signature: bytes, data: bytes) -> bool:
        """Whether the other half of this key made `signature` of `data`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            if isinstance(self._key, ec.EllipticCurvePublicKey):
                self._key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
            else:
                self._key.verify(signature, data)
        except InvalidSignature:
            return False
        return True


class PrivateKey:
    """What signatures are made with."""

    def __init__(self, key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key())

    @classmethod
    def read(cls, path: Path) -> PrivateKey:
        """The key in the PEM file at `path`, without a password. Raises UsageError, ToolMissing."""
        _require_cryptography()
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            return cls(_usable(load_pem_private_key(_read(path), password=None), path))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
            msg = f"{path} is not a private key that can be used"
            expected = f"{_KINDS}, without a password"
            hint = "make one: openssl genpkey -algorithm ed25519 -out release.pem"
            raise UsageError(msg, details=[("expected", expected)], hint=hint) from error

    def sign(self, data: bytes) -> bytes:
        """The signature of `data`; with Ed25519 the same each time."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.sign(data, ec.ECDSA(hashes.SHA256()))
        return self._key.sign(data)


class Trust:
    """Whose signatures count: those of `keys`, but for the ones whose ids are `revoked`."""

    def __init__(self, keys: Iterable[PublicKey], revoked: Iterable[str]) -> None:
        self._keys = tuple(keys)
        self._revoked = frozenset(revoked)

    def fault(self, digest: Digest, data: bytes, annotations: dict[str, Any]) -> str | None:
        """Why a signature of `digest` does not count; None when it does. `data` is its payload."""
        try:
            signature = base64.b64decode(str(annotations.get(SIGNATURE)), validate=True)
        except ValueError:
            return "one is no base64"
        if signed_digest(data) != digest:
            return "one is of something else"
        for key in self._keys:
            if key.made(signature, data):
                return f"one is of the revoked key {key.id}" if key.id in self._revoked else None
        told = str(annotations.get(KEY_ID))
        if told in self._revoked:
            return f"one is of the revoked key {told}"
        return "one is of a key that is not trusted here"


def _usable(key: Any, where: object) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    curves = ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey
    if isinstance(key, ed25519.Ed25519PublicKey | ed25519.Ed25519PrivateKey):
        return key
    if isinstance(key, curves) and isinstance(key.curve, ec.SECP256R1):
        return key
    msg = f"{where} is a key of another kind"
    raise ValueError(msg)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_LARGEST_KEY)
    except OSError as error:
        msg = f"the key {path} cannot be read ({error.strerror})"
        raise UsageError(msg) from error


def _require_cryptography() -> None:
    try:
        import cryptography
    except ImportError as error:
        missing = "cryptography"
        raise ToolMissing(missing, hint="pip install 'systemfiles[signing]'") from error
    assert cryptography

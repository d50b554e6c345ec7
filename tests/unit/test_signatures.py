"""Signatures in cosign's layout."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import UsageError
from systemfiles.sources.signatures import (
    KEY_ID,
    SIGNATURE,
    PrivateKey,
    PublicKey,
    Trust,
    payload,
    signed_digest,
    tag_of,
)

DIGEST = Digest.of(b"an index")
Private = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def saved(path: Path, key: Private, *, password: bytes | None = None) -> Path:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    return path


def public(key: Private) -> str:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.fixture(params=["ed25519", "p256"])
def key(request: pytest.FixtureRequest) -> Private:
    return (
        ed25519.Ed25519PrivateKey.generate() if request.param == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    )


def test_the_layout_is_cosigns() -> None:
    """Of which cosign's specification gives these very names."""
    assert tag_of(DIGEST) == f"sha256-{DIGEST.hex}.sig"
    assert json.loads(payload("registry.example.com/kernel", DIGEST)) == {
        "critical": {
            "identity": {"docker-reference": "registry.example.com/kernel"},
            "image": {"docker-manifest-digest": DIGEST},
            "type": "cosign container image signature",
        },
        "optional": {},
    }


def test_a_signature_is_one_that_the_library_of_the_keys_accepts(key: Private, tmp_path: Path) -> None:
    mine = PrivateKey.read(saved(tmp_path / "key", key))
    data = payload("r/k", DIGEST)
    signature = mine.sign(data)
    theirs = load_pem_public_key(public(key).encode())
    if isinstance(theirs, ec.EllipticCurvePublicKey):
        from cryptography.hazmat.primitives import hashes

        theirs.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    else:
        assert isinstance(theirs, ed25519.Ed25519PublicKey)
        theirs.verify(signature, data)
    assert PublicKey.read(public(key)).id == mine.public.id


def test_what_does_not_count_is_told(key: Private, tmp_path: Path) -> None:
    mine, data = PrivateKey.read(saved(tmp_path / "key", key)), payload("r/k", DIGEST)
    note = {SIGNATURE: base64.b64encode(mine.sign(data)).decode()}
    trust = Trust([PublicKey.read(public(key))], [])
    assert trust.fault(DIGEST, data, note) is None
    assert trust.fault(Digest.of(b"another"), data, note) == "one is of something else"
    assert "not trusted" in str(trust.fault(DIGEST, data.replace(b"r/k", b"r/j"), note))
    assert "not trusted" in str(trust.fault(DIGEST, data.replace(b"r/k", b"r/j"), {**note, KEY_ID: []}))
    assert "base64" in str(trust.fault(DIGEST, data, {SIGNATURE: "é"}))
    assert "base64" in str(trust.fault(DIGEST, data, {SIGNATURE: "?"}))
    assert trust.fault(DIGEST, data, {}) is not None
    assert mine.public.id in str(Trust([mine.public], [mine.public.id]).fault(DIGEST, data, note))


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b'{"critical": {}}', b'{"critical": {"type": 1, "image": []}}', b"[" * 100_000, b"\xff"],
)
def test_what_is_no_payload_names_nothing(data: bytes) -> None:
    assert signed_digest(data) is None


def test_a_payload_of_another_type_names_nothing() -> None:
    assert signed_digest(payload("r/k", DIGEST).replace(b"cosign container", b"another kind of")) is None
    assert signed_digest(payload("r/k", DIGEST)) == DIGEST


@pytest.mark.parametrize("other", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())])
def test_keys_of_another_kind_are_refused(other: Private, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="private key"):
        PrivateKey.read(saved(tmp_path / "key", other))
    with pytest.raises(UsageError, match="public key"):
        PublicKey.read(public(other))


def test_a_key_with_a_password_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "key", ed25519.Ed25519PrivateKey.generate(), password=b"secret")
    with pytest.raises(UsageError, match="without a password"):
        PrivateKey.read(path)


def test_a_key_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        PublicKey.read(str(tmp_path / "none.pub"))
    (tmp_path / "empty").write_text("")
    with pytest.raises(UsageError, match="openssl genpkey"):
        PrivateKey.read(tmp_path / "empty")

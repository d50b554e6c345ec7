"""The values everything else speaks in: architectures, digests, and errors that say what to do."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from systemfiles.foundation import errors
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import CHUNK, Digest, Hasher, hash_file, hash_stream
from systemfiles.foundation.errors import InvalidDigest, SystemFilesError, UnsupportedArch
from systemfiles.foundation.units import human_size

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["x86_64", "amd64", "X86_64", " AMD64\n"])
def test_every_spelling_of_x86_64_is_one_architecture(name: str) -> None:
    assert Arch.parse(name) is Arch.X86_64


@pytest.mark.parametrize("name", ["aarch64", "arm64", "ARM64"])
def test_every_spelling_of_aarch64_is_one_architecture(name: str) -> None:
    assert Arch.parse(name) is Arch.AARCH64


@pytest.mark.parametrize("name", ["", "i386", "armhf", "x86-64", "arm64/v8", "../amd64", "amd64\0"])
def test_other_architectures_are_refused_with_those_that_are_not(name: str) -> None:
    with pytest.raises(UnsupportedArch) as caught:
        Arch.parse(name)
    assert caught.value.arch == name
    assert {"x86_64", "aarch64"} <= set(caught.value.supported)


def test_the_host_is_one_of_them() -> None:
    assert Arch.host() is Arch.parse(os.uname().machine)


def test_an_architecture_knows_what_others_call_it_and_its_kernel() -> None:
    assert [(str(arch), arch.debian, arch.kernel_file) for arch in Arch] == [
        ("x86_64", "amd64", "vmlinux"),
        ("aarch64", "arm64", "Image"),
    ]


def test_a_full_sha256_digest_is_taken_and_is_its_own_text() -> None:
    digest = Digest.parse(f"sha256:{HEX}")
    assert (digest, digest.hex) == (f"sha256:{HEX}", HEX)
    assert Digest.from_hex(HEX) == digest


NOT_DIGESTS = [
    "",
    "sha256",
    "sha256:",
    HEX,
    f"sha256:{HEX[:-1]}",
    f"sha256:{HEX}0",
    f"sha256:{HEX.upper()}",
    f"SHA256:{HEX}",
    f"sha256:{HEX}\n",
    f" sha256:{HEX}",
    f"sha256::{HEX}",
    f"sha512:{HEX}{HEX}",
    f"sha1:{HEX[:40]}",
    "sha256:../../../../etc/passwd",
    "sha256:" + "../" * 21 + "a",
    f"sha256:{HEX[:-1]}\u0661",
    f"sha256:{HEX[:-1]}\0",
]


@pytest.mark.parametrize("text", NOT_DIGESTS)
def test_anything_but_a_full_sha256_digest_is_refused(text: str) -> None:
    with pytest.raises(InvalidDigest) as caught:
        Digest.parse(text)
    assert caught.value.text == text


@given(st.text(max_size=80) | st.from_regex(r"sha256:[0-9a-fA-F./]{60,68}", fullmatch=True))
@example(f"sha256:{HEX}")
@settings(max_examples=50)
def test_what_is_taken_for_a_digest_is_always_safe_as_a_file_name(text: str) -> None:
    try:
        digest = Digest.parse(text)
    except InvalidDigest:
        return
    assert len(digest.hex) == 64
    assert set(digest.hex) <= set("0123456789abcdef")
    assert digest == text


@pytest.mark.parametrize("hexadecimal", ["", HEX[:-2], f"{HEX[:-3]}/..", f"sha256:{HEX}"])
def test_other_than_64_hex_digits_are_no_digest(hexadecimal: str) -> None:
    with pytest.raises(InvalidDigest):
        Digest.from_hex(hexadecimal)


def test_an_absurdly_long_text_is_not_repeated_in_full() -> None:
    with pytest.raises(InvalidDigest) as caught:
        Digest.parse("x" * 1_000_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_bytes_streams_and_files_have_the_digest_that_hashlib_gives(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "data"
    path.write_bytes(data)
    hasher = Hasher()
    hasher.update(memoryview(data)[: size // 2])
    hasher.update(bytearray(data[size // 2 :]))
    expected = "sha256:" + hashlib.sha256(data).hexdigest()
    assert Digest.of(data) == hasher.digest() == expected
    assert hasher.size == size
    assert hash_file(path) == hash_stream(io.BytesIO(data)) == (expected, size)


EVERY_ERROR: list[SystemFilesError] = [
    errors.SystemFilesError("it failed", details=[("where", Path("/x"))], hint="try again"),
    errors.InvalidName("kernel", "../x", rule="a-z"),
    errors.InvalidDigest("sha256:x"),
    errors.UsageError("no such option", hint="see --help"),
    errors.CatalogError("versions.toml", [("line 3, kernel.x", "is bad"), ("file", "is worse")]),
    errors.UnknownVersion("kernel", "k1", known=iter(["k2", "k3"])),
    errors.UnsupportedArch("mips", supported=iter(["x86_64"]), subject="kernel k1"),
    errors.NotProvisioned("kernel", "k1", "x86_64", looked_in=Path("/data/k1")),
    errors.NotProvisioned("kernel", "rolling", "x86_64", looked_in=Path("/data"), stands_for="k1"),
    errors.IncompatiblePair("k1", "i1", requires="k2"),
    errors.IntegrityError("file", expected="good", got="bad", consequence="it was not used"),
    errors.SignatureRefused("index", expected="a signature", got="no signature", consequence="it was refused"),
    errors.DigestMismatch(Path("/f"), expected="sha256:a", got="sha256:b", consequence="it was discarded"),
    errors.SizeMismatch(Path("/f"), expected="3 bytes", got="4 bytes", consequence="it was discarded"),
    errors.InvalidKernel(Path("/k"), expected="an ELF", found="a web page"),
    errors.InvalidArchive(Path("/a.deb"), "it is cut off"),
    errors.UnknownModule(["virtio_blk", "nosuch"]),
    errors.SnapshotMismatch("pin snapshot-42", differences={"hypervisor": ("v49.0", "v50.0")}, hint="unpin it"),
    errors.PinNotFound("snapshot-42", looked_in=Path("/d/system/pins")),
    errors.AssetNotFound("kernel-k1-x86_64"),
    errors.AssetExists("kernel-k1-x86_64"),
    errors.AssetInUse("kernel-k1-x86_64", leases=2, holders=["vm-7", "vm-8"]),
    errors.LeaseNotFound("01KAG5W5X8J8Q2M2Y7R1VJZ3TN"),
    errors.LeasesLost(Path("/d/registry.sqlite")),
    errors.VersionConflict("initrd", "i1", "aarch64", changes={"init.sha256": ("aa", "bb"), "tree": (1, 2)}),
    errors.SourceError("nothing came"),
    errors.SourceUnavailable("kernel k1", tried=[("http://a", "HTTP 404"), ("http://b", "refused")], hint="wait"),
    errors.SourceRefused("package p", "no SHA256", hint="another profile"),
    errors.StoreError("unwritable"),
    errors.NotFound("sha256:a", looked_in=Path("/blobs")),
    errors.LockTimeout(Path("/l"), seconds=1.5, holder="process 7 (systemfiles) since then"),
    errors.NoSpace(Path("/d"), needed=100, free=10),
    errors.NoSpace(Path("/d"), needed=None, free=0),
    errors.ToolMissing("apt-get", hint="use Debian"),
    errors.ToolFailed("apt-get 'a b'", status=100, output="E: no\n", hint="look"),
]


def _kinds(kind: type[SystemFilesError]) -> set[type[SystemFilesError]]:
    return {kind}.union(*map(_kinds, kind.__subclasses__()))


def test_no_kind_of_error_is_left_out_below() -> None:
    ours = {kind for kind in _kinds(SystemFilesError) if kind.__module__ == errors.__name__}
    assert {kind.__name__ for kind in ours} == {type(error).__name__ for error in EVERY_ERROR}


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_every_error_survives_pickling_and_copying_with_its_facts(error: SystemFilesError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert vars(twin) == vars(error)


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_every_error_prints_its_summary_first_and_then_all_its_facts(error: SystemFilesError) -> None:
    first, *rest = str(error).split("\n")
    assert first == error.summary
    printed = "\n".join(rest)
    for label, value in (*error.details, *([("hint", error.hint)] if error.hint else [])):
        assert label in printed
        assert value in printed


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_every_fact_of_an_error_is_in_what_it_prints(error: SystemFilesError) -> None:
    text = str(error)
    for name, fact in vars(error).items():
        if name in ("details", "hint", "seconds", "consequence", "status") or fact is None:
            continue
        values = fact.items() if isinstance(fact, dict) else fact if isinstance(fact, tuple) else [fact]
        for value in values:
            parts = value if isinstance(value, tuple) else (value,)
            for part in parts:
                leaves = part if isinstance(part, tuple) else (part,)
                assert all(str(leaf).strip() in text for leaf in leaves), name


def test_the_facts_stand_in_columns() -> None:
    error = errors.NotProvisioned("kernel", "ch-v6.16.9", "x86_64", looked_in="/data/kernel/ch-v6.16.9/x86_64")
    assert str(error) == (
        "kernel ch-v6.16.9 (x86_64) is not provisioned\n"
        "  looked in   /data/kernel/ch-v6.16.9/x86_64\n"
        "  provide it  systemfiles provision --kernel ch-v6.16.9 --arch x86_64"
    )


def test_a_changed_version_says_which_input_changed_from_what_to_what() -> None:
    error = errors.VersionConflict("kernel", "k1", "x86_64", changes={"init.sha256": ("aa", "bb")})
    assert "init.sha256  aa -> bb" in str(error)
    assert error.changes == {"init.sha256": ("aa", "bb")}


def test_a_mismatch_says_subject_expected_got_and_consequence() -> None:
    error = errors.DigestMismatch("/f", expected="sha256:a", got="sha256:b", consequence="it was discarded")
    assert isinstance(error, errors.IntegrityError)
    assert [label for label, _ in error.details] == ["expected", "got", "so"]
    assert (error.subject, error.expected, error.got) == ("/f", "sha256:a", "sha256:b")


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (53_269_000, "50.8 MiB"), (5 << 30, "5.0 GiB")],
)
def test_sizes_are_written_as_people_read_them(size: int, words: str) -> None:
    assert human_size(size) == words

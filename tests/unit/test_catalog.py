"""versions.toml: what is shipped, what is laid over it, and every fault of a bad one at once."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from systemfiles.foundation import catalog as module
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import AptBusybox, load_catalog, read_catalog, shipped_catalog
from systemfiles.foundation.errors import CatalogError, UnknownVersion, UnsupportedArch

SHA = "ab" * 32
KERNEL = f'[kernel."k1".files.x86_64]\nurl = "https://example.com/vmlinux"\nsha256 = "{SHA}"\n'


@pytest.fixture(autouse=True)
def _no_catalog_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYSTEM_CATALOG", tmp_path / "etc" / "versions.toml")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if "schema" in text else "schema = 1\n" + text)
    return path


def faults(path: Path, text: str) -> dict[str, str]:
    with pytest.raises(CatalogError) as caught:
        read_catalog(write(path, text))
    assert caught.value.path == path
    return dict(caught.value.faults)


# what is shipped


def test_the_shipped_kernel_is_the_release_of_cloud_hypervisor() -> None:
    release = "https://github.com/cloud-hypervisor/linux/releases/download/ch-release-v6.16.9-20260508"
    files = load_catalog(environ={}).kernel["ch-v6.16.9"].files
    assert {str(arch): (file.url, file.sha256) for arch, file in files.items()} == {
        "x86_64": (f"{release}/vmlinux-x86_64", "9d3570b47d5abb069ca00edfbfcef4c68306a9c3d078a01f10082b258f1001b8"),
        "aarch64": (f"{release}/Image-arm64", "69d1b1235381ec50f1b45cf771a7dff4a9013d452833ab34682d6283e2114010"),
    }


def test_the_shipped_profiles_are_a_pinned_pair_and_a_rolling_one() -> None:
    shipped = load_catalog(environ={})
    pinned, debian = shipped.find_profile(None), shipped.find_profile("debian")
    assert pinned == shipped.find_profile("cloud-hypervisor")
    assert not shipped.find_kernel(pinned.kernel, Arch.X86_64).rolling
    assert not shipped.find_initrd(pinned.initrd).rolling
    assert shipped.find_kernel(debian.kernel, Arch.AARCH64).rolling
    assert shipped.find_initrd(debian.initrd).busybox == AptBusybox(apt="busybox-static")


def test_a_catalog_is_a_value() -> None:
    assert load_catalog(environ={}) == load_catalog(environ={}) == read_catalog(shipped_catalog())
    with pytest.raises(ValueError, match="frozen"):
        load_catalog(environ={}).default_profile = "other"


# overlays


def test_an_overlay_adds_entries_and_leaves_the_others(tmp_path: Path) -> None:
    merged = load_catalog(write(tmp_path / "mine.toml", KERNEL), environ={})
    assert merged.kernel["k1"].files[Arch.X86_64].sha256 == SHA
    assert set(read_catalog(shipped_catalog()).kernel) < set(merged.kernel)


def test_the_callers_file_beats_the_hosts_which_beats_the_shipped_one(tmp_path: Path) -> None:
    text = '[kernel.{name}]\nsummary = "{who}"\napt = {{ x86_64 = "linux-image" }}\n'
    write(
        module.SYSTEM_CATALOG,
        'default_profile = "debian"\n'
        + text.format(name="debian-cloud", who="host")
        + text.format(name="k", who="host"),
    )
    mine = write(tmp_path / "mine.toml", text.format(name="k", who="mine"))
    merged = load_catalog(mine, environ={})
    assert merged.kernel["debian-cloud"].summary == "host"
    assert merged.kernel["k"].summary == "mine"
    assert merged.default_profile == "debian"
    assert load_catalog(environ={}).kernel["k"].summary == "host"


def test_an_entry_is_replaced_as_a_whole(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.toml", '[kernel.debian-cloud]\napt = { x86_64 = "linux-image" }\n')
    entry = load_catalog(mine, environ={}).kernel["debian-cloud"]
    assert (entry.summary, entry.arches) == ("", (Arch.X86_64,))


def test_the_file_named_by_the_caller_beats_the_environments(tmp_path: Path) -> None:
    one = write(tmp_path / "one.toml", KERNEL.replace("k1", "one"))
    two = write(tmp_path / "two.toml", KERNEL.replace("k1", "two"))
    assert "one" in load_catalog(environ={"SYSTEMFILES_CATALOG": str(one)}).kernel
    both = load_catalog(two, environ={"SYSTEMFILES_CATALOG": str(one)})
    assert "two" in both.kernel
    assert "one" not in both.kernel


def test_a_named_file_that_is_missing_is_no_reason_to_go_on_without_it(tmp_path: Path) -> None:
    for overlay, environ in ((tmp_path / "no.toml", {}), (None, {"SYSTEMFILES_CATALOG": str(tmp_path / "no.toml")})):
        with pytest.raises(CatalogError, match="No such file"):
            load_catalog(overlay, environ=environ)


def test_a_faulty_catalog_of_the_host_is_named(tmp_path: Path) -> None:
    write(module.SYSTEM_CATALOG, "nonsense = 1")
    with pytest.raises(CatalogError) as caught:
        load_catalog(environ={})
    assert caught.value.path == module.SYSTEM_CATALOG


# faults


def test_every_fault_is_reported_at_once_with_its_line_and_key_path(tmp_path: Path) -> None:
    text = f"""schema = 1
colour = "red"

[kernel.k1.files.x86_64]
url = "ftp://example.com/x"
sha256 = "{SHA[:-1]}"
size = 0

[kernel.k2]
summary = "no source"

[kernel."Bad Name"]
apt = {{ x86_64 = "linux-image" }}

[kernel.k3]
apt = {{ mips = "linux-image" }}

[initrd.i1]
init = "v1"
busybox = "busybox:latest"
load = ["virtio blk"]

[profile.p]
kernel = "k1"
"""
    found = faults(tmp_path / "bad.toml", text)
    assert {
        "line 2, colour",
        "line 5, kernel.k1.files.x86_64.url",
        "line 6, kernel.k1.files.x86_64.sha256",
        "line 7, kernel.k1.files.x86_64.size",
        "line 9, kernel.k2",
        "line 12, kernel.Bad Name",
        "line 16, kernel.k3.apt.mips",
        "line 21, initrd.i1.load.0",
        "line 23, profile.p.initrd",
    } <= set(found)
    assert any(where.startswith("line 20, initrd.i1.busybox") for where in found)
    assert "mips" in found["line 16, kernel.k3.apt.mips"]
    assert "a-z" in found["line 12, kernel.Bad Name"]


def test_the_faults_are_printed_one_to_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.toml", "one = 1\ntwo = 2\n")
    with pytest.raises(CatalogError) as caught:
        read_catalog(path)
    assert str(caught.value).splitlines()[0] == f"{path} has 2 faults"
    assert len(str(caught.value).splitlines()) == 3


def test_broken_syntax_is_a_fault_with_its_line(tmp_path: Path) -> None:
    assert "line 3" in faults(tmp_path / "bad.toml", "schema = 1\n\n[kernel\n")["syntax"]


@pytest.mark.parametrize("version", ["", "schema = 2", 'schema = "1"', "schema = [1]"])
def test_another_schema_is_not_guessed_at(tmp_path: Path, version: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(version + "\n")
    with pytest.raises(CatalogError, match="schema"):
        read_catalog(path)


@pytest.mark.parametrize(
    "name", ["../x", "..", ".x", "-x", "a/b", "A", "a b", "a\\nb", "", "x" * 97, "a\\u0000", "\\u00e9", "a:b", "a+b"]
)
def test_a_name_that_may_not_be_a_file_name_and_a_tag_is_refused(tmp_path: Path, name: str) -> None:
    found = faults(tmp_path / "bad.toml", f'[kernel."{name}"]\napt = {{ x86_64 = "linux-image" }}\n')
    assert len(found) == 1
    assert "is not a version name" in "".join(found.values())


@pytest.mark.parametrize("name", ["x" * 96, "0", "a..b", "v1.0.0-3fa9c1d20b7e", "6.1.192-2_p1"])
def test_a_name_that_may_be_both_is_taken(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "good.toml", f'[kernel."{name}"]\napt = {{ x86_64 = "linux-image" }}\n')
    assert name in read_catalog(path).kernel


@pytest.mark.parametrize("url", ["", "vmlinux", "/vmlinux", "ftp://a/b", "https://a/b c", "javascript:x", "https://"])
def test_only_urls_that_can_be_fetched_are_taken(tmp_path: Path, url: str) -> None:
    text = KERNEL.replace("https://example.com/vmlinux", url)
    assert list(faults(tmp_path / "bad.toml", text)) == ["line 3, kernel.k1.files.x86_64.url"]


@pytest.mark.parametrize(
    "busybox",
    [
        "busybox",
        "registry.example/busybox:1",
        f"busybox@sha256:{SHA}",
        f"registry.example/b@sha256:{SHA[1:]}",
        "../x@sha256:",
    ],
)
def test_a_busybox_of_a_registry_is_pinned_by_digest(tmp_path: Path, busybox: str) -> None:
    found = faults(tmp_path / "bad.toml", f'[initrd.i1]\ninit = "v1"\nbusybox = "{busybox}"\n')
    assert all(where.startswith("line 4, initrd.i1.busybox") for where in found)


def test_a_kernel_has_one_source(tmp_path: Path) -> None:
    both = '[kernel.k1]\napt = { x86_64 = "linux-image" }\n' + KERNEL
    assert "either 'files'" in "".join(faults(tmp_path / "bad.toml", both).values())


@pytest.mark.parametrize("spelling", ["amd64", "x86_64", "AMD64"])
def test_a_file_may_use_every_spelling_of_an_architecture(tmp_path: Path, spelling: str) -> None:
    entry = read_catalog(write(tmp_path / "good.toml", KERNEL.replace("x86_64", spelling))).kernel["k1"]
    assert entry.arches == (Arch.X86_64,)


def test_one_architecture_under_two_spellings_is_a_fault(tmp_path: Path) -> None:
    found = faults(tmp_path / "bad.toml", '[kernel.k1]\napt = { amd64 = "linux-one", x86_64 = "linux-two" }\n')
    assert any("kernel.k1" in where for where in found)


def test_names_that_refer_to_nothing_are_all_reported(tmp_path: Path) -> None:
    text = 'default_profile = "nope"\n[profile.p]\nkernel = "no-kernel"\ninitrd = "no-initrd"\n'
    with pytest.raises(CatalogError) as caught:
        load_catalog(write(tmp_path / "bad.toml", text), environ={})
    assert dict(caught.value.faults) == {
        "default_profile": "there is no profile 'nope'",
        "profile.p.kernel": "there is no kernel 'no-kernel'",
        "profile.p.initrd": "there is no initrd 'no-initrd'",
    }


# mirrors


def test_mirrors_are_asked_in_the_order_environment_caller_host(tmp_path: Path) -> None:
    write(module.SYSTEM_CATALOG, '[mirrors]\n"https://github.com/" = ["https://host/"]\n')
    mine = write(tmp_path / "mine.toml", '[mirrors]\n"https://github.com/" = ["https://mine/", "https://mine2/"]\n')
    environ = {
        "SYSTEMFILES_MIRRORS": "https://github.com/=https://env/  registry.example/=r.example/hub/\nhttps://github.com/=https://env2/?a=b"
    }
    assert load_catalog(mine, environ=environ).mirrors == {
        "https://github.com/": (
            "https://env/",
            "https://env2/?a=b",
            "https://mine/",
            "https://mine2/",
            "https://host/",
        ),
        "registry.example/": ("r.example/hub/",),
    }


@pytest.mark.parametrize("value", ["https://github.com/", "=https://x/", "https://github.com/=", "a=b c"])
def test_mirrors_of_the_environment_that_are_no_pairs_are_refused(value: str) -> None:
    with pytest.raises(CatalogError) as caught:
        load_catalog(environ={"SYSTEMFILES_MIRRORS": value})
    assert caught.value.path == "SYSTEMFILES_MIRRORS"


# looking up


def test_what_is_not_there_is_named_with_what_is() -> None:
    shipped = load_catalog(environ={})
    for find in (shipped.find_profile, shipped.find_initrd, lambda name: shipped.find_kernel(name, Arch.X86_64)):
        with pytest.raises(UnknownVersion) as caught:
            find("../nope")
        assert caught.value.version == "../nope"
        assert len(caught.value.known) >= 2


def test_a_kernel_that_an_architecture_lacks_is_unsupported_there(tmp_path: Path) -> None:
    merged = load_catalog(write(tmp_path / "mine.toml", KERNEL), environ={})
    with pytest.raises(UnsupportedArch) as caught:
        merged.find_kernel("k1", Arch.AARCH64)
    assert caught.value.supported == ("x86_64",)
    assert "kernel k1" in caught.value.summary


# hostile files


def faults_of(path: Path) -> tuple[tuple[str, str], ...]:
    """What is wrong with the file; nothing when it is a catalog."""
    try:
        read_catalog(path)
    except CatalogError as error:
        return error.faults or (("file", "a CatalogError without a fault"),)
    return ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF\x02\x01\x01" + bytes(500),
        b"\xff\xfe\xfa",
        b"schema = 1\0",
        b"schema = 1\n" * 2,
        b"x = " + b"[" * 100_000,
        b"x = " + b"{a=" * 100_000,
        b"[" + b"a." * 20_000 + b"a]\n",
        b"a." * 20_000 + b"a = 1\n",
        b"schema = " + b"9" * 100_000,
        b"schema = 1\n" + b'[kernel."x"]\n' * 3,
        b"schema = 1\n" + b"".join(b"k%d = 1\n" % n for n in range(10_000)),
        b'schema = 1\nkernel = "x"\ninitrd = []\nprofile = 3\nmirrors = {a = 1}\n',
        b'schema = 1\n[kernel.k]\napt = {x86_64 = "p", amd64 = 5}\n',
        b"#" * ((1 << 20) + 1),
    ],
    ids=lambda content: repr(content[:16]),
)
def test_a_hostile_file_is_a_catalog_error_in_no_time(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hostile.toml"
    path.write_bytes(content)
    began = time.monotonic()
    assert faults_of(path)
    assert time.monotonic() - began < 2


def test_a_file_that_is_far_too_long_is_not_read_in_full(tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    with path.open("wb") as stream:
        stream.truncate(64 << 20)
    tracemalloc.start()
    try:
        assert faults_of(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_directory_is_a_catalog_error(tmp_path: Path) -> None:
    assert faults_of(tmp_path)


KEYS = st.sampled_from(
    ["schema", "default_profile", "profile", "kernel", "initrd", "mirrors", "files", "apt", "x86_64", "url", "sha256"]
) | st.text(max_size=5).map(lambda text: '"' + "".join(c for c in text if c.isalnum()) + '"')
VALUES = st.recursive(
    st.sampled_from(
        ["1", "true", '"x"', "1.5", "nan", "-9999999999999999999999", "1979-05-27", "[]", "{}", f'"{SHA}"']
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.tuples(KEYS, inner).map(lambda pair: f"{{{pair[0]} = {pair[1]}}}")
    ),
    max_leaves=6,
)
LINES = st.one_of(
    st.lists(KEYS, min_size=1, max_size=4).map(lambda keys: f"[{'.'.join(keys)}]"),
    st.tuples(KEYS, VALUES).map(lambda pair: f"{pair[0]} = {pair[1]}"),
)


@given(st.lists(LINES, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
def test_toml_of_any_shape_is_a_catalog_or_a_catalog_error(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "any.toml"
    path.write_text("\n".join(["schema = 1", *lines]))
    assert all(where and what for where, what in faults_of(path))


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
def test_bytes_of_any_kind_are_a_catalog_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.toml"
    path.write_bytes(content)
    assert all(where and what for where, what in faults_of(path))

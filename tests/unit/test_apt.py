"""The host's own apt, asked about archives made here: what it resolves, and what it means when it cannot."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceRefused, SourceUnavailable, ToolMissing
from systemfiles.foundation.files import NewFile
from systemfiles.foundation.lockfile import PackagePin
from systemfiles.sources.apt import Apt, apt_proxies
from systemfiles.sources.http import fetch

SHA = "ab" * 32


def stanza(name: str, version: str, *, arch: str = "amd64", depends: str = "", sha256: str | None = SHA) -> str:
    """One package in a Packages index (deb-packages(5) and the archive's repository format)."""
    fields = {
        "Package": name,
        "Version": version,
        "Architecture": arch,
        "Maintainer": "nobody <nobody@example.com>",
        "Depends": depends,
        "Filename": f"./{name}_{version}_{arch}.deb",
        "Size": "7",
        "MD5sum": "0" * 32,
        "SHA256": sha256,
        "Description": "a package",
    }
    return "".join(f"{field}: {value}\n" for field, value in fields.items() if value) + "\n"


class Host:
    """What apt is told of this host, and nothing else: archives on this disk."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.config = root / "apt.conf"
        self.sources = root / "sources.list"
        self.sources.write_text("")
        self.configure()
        monkeypatch.setenv("APT_CONFIG", str(self.config))

    def configure(self, **settings: str) -> None:
        settings = {
            "Dir::Etc::sourcelist": str(self.sources),
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Sandbox::User": "root",  # what apt drops root for cannot read a test's directory
            **{name.replace("_", "::"): value for name, value in settings.items()},
        }
        self.config.write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))

    def archive(self, name: str, *stanzas: str) -> Path:
        """Adds an archive with these packages to the sources."""
        directory = self.root / name
        directory.mkdir()
        (directory / "Packages").write_text("".join(stanzas))
        with self.sources.open("a") as sources:
            sources.write(f"deb [trusted=yes] file://{directory} ./\n")
        return directory

    def apt(self, arch: Arch = Arch.X86_64) -> Apt:
        """apt after an update."""
        state = self.root / f"state-{arch}"
        state.mkdir(exist_ok=True)
        apt = Apt(arch, state)
        apt.update()
        return apt


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


# packages


def test_a_package_is_located_with_its_url_size_and_digest(host: Host) -> None:
    archive = host.archive("main", stanza("busybox-static", "1:1.35.0-4+b7"))
    apt = host.apt()
    package = apt.locate("busybox-static")
    assert (package.name, package.version, package.size, package.sha256) == ("busybox-static", "1:1.35.0-4+b7", 7, SHA)
    assert package.url.startswith("file:")
    assert str(archive) in package.url
    assert apt.failed_sources == ()


def test_the_newest_version_is_located(host: Host) -> None:
    host.archive("main", stanza("thing", "1.9-1"), stanza("thing", "1.10~rc1-1", sha256="cd" * 32))
    host.archive("security", stanza("thing", "1.10-1", sha256="ef" * 32))
    package = host.apt().locate("thing")
    assert (package.version, package.sha256) == ("1.10-1", "ef" * 32)


def test_the_hosts_preferences_are_honoured(host: Host) -> None:
    host.archive("main", stanza("thing", "1.9-1"), stanza("thing", "1.10-1", sha256="cd" * 32))
    (host.root / "preferences").write_text("Package: thing\nPin: version 1.9-1\nPin-Priority: 1001\n")
    host.configure(Dir_Etc_preferences=str(host.root / "preferences"))
    package = host.apt().locate("thing")
    assert (package.version, package.sha256) == ("1.9-1", SHA)


@pytest.mark.parametrize(("arch", "version"), [(Arch.X86_64, "1-1"), (Arch.AARCH64, "2-1")])
def test_either_architecture_is_located_on_any_host(host: Host, arch: Arch, version: str) -> None:
    host.archive("main", stanza("thing", "1-1", arch="amd64"), stanza("thing", "2-1", arch="arm64"))
    assert host.apt(arch).locate("thing").version == version


def test_a_metapackage_is_followed_to_the_package_with_the_kernel(host: Host) -> None:
    host.archive(
        "main",
        stanza(
            "linux-image-cloud-amd64",
            "6.1.192-2",
            depends="linux-base (>= 4), linux-image-6.1.0-40-cloud-amd64 (= 6.1.192-2)",
        ),
        stanza(
            "linux-image-6.1.0-40-cloud-amd64",
            "6.1.192-2",
            depends="kmod, linux-base | linux-initramfs-tool",
            sha256="cd" * 32,
        ),
    )
    package = host.apt().locate_kernel("linux-image-cloud-amd64")
    assert (package.name, package.sha256) == ("linux-image-6.1.0-40-cloud-amd64", "cd" * 32)


def test_a_package_with_a_kernel_of_its_own_is_that_kernel(host: Host) -> None:
    host.archive("main", stanza("linux-image-6.1", "1-1"))
    assert host.apt().locate_kernel("linux-image-6.1").name == "linux-image-6.1"


def test_what_was_located_can_be_kept_and_fetched(host: Host) -> None:
    """Whatever the kind of the operator's sources: archives on a disk are read as archives on the web are."""
    content = b"package"
    archive = host.archive("main", stanza("thing", "1-1", sha256=hashlib.sha256(content).hexdigest()))
    (archive / "thing_1-1_amd64.deb").write_bytes(content)
    package = host.apt().locate("thing")
    pin = PackagePin(
        package=package.name, version=package.version, url=package.url, size=package.size, sha256=package.sha256
    )
    with NewFile(host.root / "tmp") as out:
        fetch(pin.url, out, subject="thing", digest=Digest.from_hex(pin.sha256), size=pin.size)
        assert out.path.read_bytes() == content


# what can go wrong


Ask = Callable[[Apt, str], object]
ASKED = pytest.mark.parametrize("ask", [Apt.locate, Apt.locate_kernel])


@ASKED
def test_an_absent_package_is_unavailable_with_what_else_there_is(host: Host, ask: Ask) -> None:
    host.archive("main", stanza("thing", "1-1"))
    with pytest.raises(SourceUnavailable) as caught:
        ask(host.apt(), "nothing")
    assert caught.value.subject == "package nothing (amd64)"
    assert "another profile" in str(caught.value.hint)
    assert caught.value.tried[0][1]


def test_a_package_of_another_architecture_alone_is_unavailable(host: Host) -> None:
    host.archive("main", stanza("thing", "1-1", arch="amd64"))
    with pytest.raises(SourceUnavailable, match="arm64"):
        host.apt(Arch.AARCH64).locate("thing")


@ASKED
def test_sources_that_fail_are_the_reason_when_a_package_is_missing(host: Host, ask: Ask) -> None:
    host.sources.write_text(f"deb [trusted=yes] file://{host.root}/gone ./\n")
    apt = host.apt()
    assert any("gone" in line for line in apt.failed_sources)
    with pytest.raises(SourceUnavailable) as caught:
        ask(apt, "thing")
    assert any("gone" in why for _, why in caught.value.tried)


def test_sources_that_fail_do_not_matter_to_packages_of_others(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    host.sources.write_text(f"deb [trusted=yes] file://{host.root}/gone ./\n")
    host.archive("main", stanza("thing", "1-1"))
    apt = host.apt()
    assert apt.locate("thing").version == "1-1"
    assert apt.failed_sources
    assert "gone" in caplog.text


def test_a_host_without_sources_has_nothing(host: Host) -> None:
    with pytest.raises(SourceUnavailable):
        host.apt().locate("thing")


def test_an_archive_that_nobody_signed_is_not_believed(host: Host) -> None:
    archive = host.archive("main", stanza("thing", "1-1"))
    host.sources.write_text(f"deb file://{archive} ./\n")
    apt = host.apt()
    assert apt.failed_sources
    with pytest.raises(SourceUnavailable):
        apt.locate("thing")


def test_broken_sources_are_reported(host: Host) -> None:
    host.sources.write_text("this is no source\n")
    apt = host.apt()
    assert apt.failed_sources
    with pytest.raises(SourceUnavailable) as caught:
        apt.locate("thing")
    assert "sources.list" in str(caught.value)


def test_a_package_without_a_sha256_is_refused(host: Host) -> None:
    host.archive("main", stanza("thing", "1-1", sha256=None))
    with pytest.raises((SourceRefused, SourceUnavailable)) as caught:
        host.apt().locate("thing")
    assert "another profile" in str(caught.value.hint)


def test_a_host_without_apt_is_told_what_else_there_is(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ToolMissing) as caught:
        host.apt()
    assert caught.value.tool == "apt-get"
    assert "profile" in str(caught.value.hint)


def test_the_hosts_own_lists_are_not_touched(host: Host) -> None:
    lists = Path("/var/lib/apt/lists")
    before = sorted(lists.iterdir()) if lists.is_dir() else []
    host.archive("main", stanza("thing", "1-1"))
    host.apt().locate("thing")
    assert (sorted(lists.iterdir()) if lists.is_dir() else []) == before


# proxies


def test_apts_proxies_are_found_by_scheme(host: Host) -> None:
    assert apt_proxies() == {}
    host.configure(Acquire_http_Proxy="http://proxy.example:3128/", Acquire_https_Proxy="DIRECT")
    assert apt_proxies() == {"http": "http://proxy.example:3128/"}
    host.configure(Acquire_http_Proxy="http://us er:p'w@proxy.example/")
    assert apt_proxies() == {"http": "http://us er:p'w@proxy.example/"}


def test_a_host_without_apt_has_no_proxies_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert apt_proxies() == {}

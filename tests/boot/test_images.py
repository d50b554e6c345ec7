"""Images that no one here made boot as they are: what is in them does its work, and the machine ends as it should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from systemfiles.foundation.lock import locked
from systemfiles.recipes.disks import needs_recovery
from systemfiles.recipes.probe import serving
from tests.registries import registry

from .guest import Host
from .images import HERE, Images, Workspace, make
from .qemu import HOST

pytestmark = pytest.mark.boot

NETWORK = ("--hostname", "guest", "--address", "10.0.2.15/24", "--gateway", "10.0.2.2", "--dns", "10.0.2.3")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Made once for the whole run; of several workers one makes them and the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    directory, whole = base / "images", base / "images-mirror"
    with locked(base / "images.lock"):
        if not whole.exists():
            shutil.rmtree(directory, ignore_errors=True)  # what a worker left whose attempt failed
            directory.mkdir()
            whole.write_text(make(directory).mirror)
    return Images(directory / "layout", whole.read_text())


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    """Its place goes when the test ends: there are disks of hundreds of megabytes in it."""
    place = tmp_path / "workspace"
    place.mkdir()
    yield Workspace(place / "data", place)
    shutil.rmtree(place)


def check_overlay(path: Path) -> None:
    """What a guest wrote is whole, without a journal to replay."""
    assert not needs_recovery(path)
    subprocess.run(["e2fsck", "-fn", path], check=True, capture_output=True)


@pytest.mark.parametrize("format", ["ext4", "erofs"])
def test_debian_boots_into_its_shell_which_does_as_it_is_told(
    host: Host, workspace: Workspace, images: Images, format: str
) -> None:
    """It is a machine with a network; what debootstrap has installed finds nothing amiss."""
    workspace.copy_in(images, "debian")
    disks = workspace.disks("debian", *NETWORK, format=format)
    with serving("from the host") as port:
        told = (
            "PS1=",
            "echo shell $0 ${BASH_VERSION%%.*} $HOSTNAME",
            "echo audit $(dpkg --audit | wc -l) $?",
            'echo packages $(dpkg-query -W -f "\\${db:Status-Abbrev}\\n" | sort -u)',
            "apt-get --version | sed 1q",
            f"getent ahostsv4 {images.mirror_host} | sed '1s/^/address /;q'",
            f"/usr/lib/apt/apt-helper download-file http://{HOST}:{port}/ /tmp/got; cat /tmp/got; echo",
            "rm /etc/debian_version && ls /etc/debian_version",
            "exit 7",
        )
        typed = "\n" * 32 + "".join(f"{line}\n" for line in told)
        outcome = host.boot(HERE, disks, network=True, typed=typed.encode())
    assert outcome.exit == 7, outcome.console
    assert outcome.clean, outcome.console
    assert outcome.errors == ()
    assert "shell /bin/bash 5 guest" in outcome.lines, outcome.console
    assert "audit 0 0" in outcome.lines, outcome.console
    assert "packages ii" in outcome.lines, outcome.console
    assert re.search(r"^apt [0-9.]+ \(", outcome.console, re.MULTILINE), outcome.console
    assert re.search(r"^address [0-9.]+ ", outcome.console, re.MULTILINE), outcome.console
    assert "from the host" in outcome.lines, outcome.console
    assert "ls: cannot access '/etc/debian_version': No such file or directory" in outcome.lines
    check_overlay(disks["overlay"])


def test_systemd_is_pid_1_all_of_its_units_start_and_it_ends_the_machine(
    host: Host, workspace: Workspace, images: Images
) -> None:
    workspace.copy_in(images, "systemd")
    disks = workspace.disks("systemd", *NETWORK, "--init-mode", "systemd")
    for boot in (1, 2):
        outcome = host.boot(HERE, disks, network=True, memory=512, limit=240)
        assert "state running" in outcome.lines, outcome.console
        assert not re.search(r"^failed ", outcome.console, re.MULTILINE), outcome.console
        assert not re.search(r"^journal .*mount", outcome.console, re.MULTILINE), outcome.console
        mounted = re.findall(r"^mounted (\S+) (\S+) (\S+)$", outcome.console, re.MULTILINE)
        where = [path for path, _, _ in mounted]
        assert len(where) == len(set(where))  # nothing is mounted over what we had mounted
        assert {("/", "overlay"), ("/proc", "proc"), ("/sys/fs/cgroup", "cgroup2"), ("/dev", "devtmpfs")} <= {
            (path, kind) for path, kind, _ in mounted
        }
        assert "variable hello from the image" in outcome.lines
        assert outcome.lines.count("kept from guest") == boot - 1
        assert (outcome.status, outcome.panic, outcome.exit) == (0, None, None), outcome.console  # init is not there
        assert "reboot: Power down" in outcome.console
        check_overlay(disks["overlay"])


def test_a_program_with_nothing_beside_it_runs_from_a_registry(
    host: Host, workspace: Workspace, images: Images
) -> None:
    with registry(workspace.directory / "registry") as running:
        reference = f"{running.host}/tools/ldconfig:1"
        there = ["--format", "v2s2", "--dest-tls-verify=false", f"docker://{reference}"]
        subprocess.run(["skopeo", "copy", "--quiet", f"oci:{images.layout}:static", *there], check=True)
        disks = workspace.disks(reference)
    outcome = host.boot(HERE, disks)
    assert re.search(r"^ldconfig \(.*\) [0-9.]+$", outcome.console, re.MULTILINE), outcome.console
    assert (outcome.exit, outcome.errors, outcome.clean) == (0, (), True), outcome.console
    # the words behind the dashes take the place of its Cmd
    outcome = host.boot(HERE, workspace.disks(reference, "--", "--no-such-option"))
    assert "unrecognized option '--no-such-option'" in outcome.console
    assert (outcome.exit, outcome.errors, outcome.clean) == (64, (), True), outcome.console

"""Volumes and the disks themselves: which device a name means, what they may be formatted with, and what lasts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from systemfiles.recipes.disks import write_config_disk, write_overlay_disk
from systemfiles.recipes.guestconfig import Volume

from .guest import Host, shell
from .qemu import Q35, VIRT

pytestmark = pytest.mark.boot


def test_a_device_is_named_by_its_letter_or_path_too(host: Host) -> None:
    script = "cat /archive/value; cat /made/here/value; echo changed >/made/here/value"
    volumes = [Volume("vdd", "/archive", "ro"), Volume("/dev/vde", "/made/here", "rw")]
    disks = host.disks(Q35, shell(script, volumes=volumes))
    disks["archive"] = host.directory / "archive"
    replace(host, root_format="squashfs").write_root(disks["archive"], {"value": (b"from an archive\n", 0o644)})
    disks["writable"] = host.volume("writable", {"value": (b"from a disk\n", 0o644)})
    outcome = host.boot(Q35, disks, serials=False)
    assert "from an archive" in outcome.lines, outcome.console
    assert "from a disk" in outcome.lines
    assert outcome.exit == 0
    assert outcome.clean
    assert b"changed\n" in disks["writable"].read_bytes()


def test_a_volume_is_as_it_was_once_its_overlay_is_a_new_one(host: Host) -> None:
    def config(word: str) -> str:
        return f"cat /data/value; echo 'written by the {word}' >/data/value; ls /data"

    volume = Volume("base", "/data", "overlay", "upper")
    disks = host.disks(VIRT, shell(config("first"), volumes=[volume]))
    disks["base"] = host.volume("base", {"value": (b"as delivered\n", 0o644)})
    before = disks["base"].read_bytes()
    seen = []
    for boot in ("first", "second", "third"):
        if boot != "second":
            disks["upper"] = host.directory / f"upper-{boot}"
            write_overlay_disk(disks["upper"], 4 << 20)
        write_config_disk(disks["config"], shell(config(boot), volumes=[volume]))
        outcome = host.boot(VIRT, disks)
        assert outcome.exit == 0, outcome.console
        seen += [line for line in outcome.lines if line.startswith(("as ", "written "))]
    assert seen == ["as delivered", "written by the first", "as delivered"]
    assert disks["base"].read_bytes() == before


def test_a_volume_that_cannot_be_written_is_refused(host: Host) -> None:
    disks = host.disks(Q35, shell("true", volumes=[Volume("data", "/data", "rw")]))
    disks["data"] = host.volume("data", {})
    outcome = host.boot(Q35, disks, locked=["data"])
    assert outcome.errors == ("cannot write the volume data (it is read-only)",), outcome.console
    assert outcome.exit == 125
    assert outcome.clean


@pytest.mark.parametrize("format", ["erofs", "squashfs"])
def test_all_that_is_only_read_may_be_of_any_format(host: Host, format: str) -> None:
    other = replace(host, root_format=format)
    script = shell("cat /data/value; echo changed >/data/value", volumes=[Volume("base", "/data", "overlay", "upper")])
    disks = host.disks(Q35, script)
    for name, tree in (("rootfs", host.tree(Q35)), ("config", {"config.sh": (script.script(), 0o600)})):
        disks[name].unlink()
        other.write_root(disks[name], tree)
    disks |= {name: host.directory / name for name in ("base", "upper")}
    other.write_root(disks["base"], {"value": (b"as delivered\n", 0o644)})
    write_overlay_disk(disks["upper"], 4 << 20)
    outcome = host.boot(Q35, disks)
    assert "as delivered" in outcome.lines, outcome.console
    assert outcome.exit == 0
    assert outcome.clean


def test_an_overlay_disk_needs_nothing_on_it(host: Host) -> None:
    disks = host.disks(VIRT, shell("cat /kept && exit; echo kept >/kept; ls /bin/sh"))
    disks["overlay"] = host.volume("empty", {})
    first, second = host.boot(VIRT, disks), host.boot(VIRT, disks)
    assert "/bin/sh" in first.lines, first.console
    assert "kept" in second.lines, second.console
    assert second.clean

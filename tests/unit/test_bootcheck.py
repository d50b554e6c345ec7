"""What a boot check makes of what it is told: steps, findings, and the report of them."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from systemfiles.foundation import cpio
from systemfiles.foundation.errors import InvalidArchive
from systemfiles.recipes import contract, guests
from systemfiles.recipes.bootreport import ENDING, STEPS, Findings, Report, State, brief
from systemfiles.recipes.guestconfig import GuestConfig
from systemfiles.recipes.probe import Probe

SUBJECT = {"arch": "x86_64", "kernel": "k1", "initrd": "v1", "machine": "q35", "accel": "tcg"}


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (1, "cannot load module overlay (No such file or directory)"),
        (1, "cannot mount /proc, /sys and /dev (No such device)"),
        (2, "missing disk: overlay config (waited 5 s, and there is: vda)"),
        (3, "cannot mount the rootfs disk vda as ext4, squashfs or erofs (Invalid argument)"),
        (3, "cannot write the overlay disk vdb (no space is left on it)"),
        (4, "cannot mount the config disk vdc as ext4, squashfs or erofs (Invalid argument)"),
        (4, "config.sh is broken (it ends the shell that reads it)"),
        (5, "missing network device: eth0 (waited 5 s)"),
        (5, "cannot write /etc/resolv.conf (it is no file, or no space is left)"),
        (6, "missing disk: data (waited 5 s)"),
        (6, "cannot write the volume data (it is read-only)"),
        (6, "cannot write the volume's overlay disk changes (no space is left on it)"),
        (6, "cannot mount a volume on /data (No such file or directory)"),
        (7, "cannot mount the image's /proc, /sys and /dev (No such device)"),
        (8, "entrypoint nginx not found (PATH is /bin)"),
        (8, "cannot run as nobody (the image knows no such user)"),
        (8, "something new (who knows)"),
        (9, "entrypoint /sbin/init not found (PATH is /bin)"),
        (9, "bad INIT_MODE runit (it is either not set or systemd)"),
    ],
)
def test_what_init_says_belongs_to_a_step(step: int, error: str) -> None:
    assert contract.step_of_error(error) == step


def report(findings: Findings, console: str = "", **more: object) -> Report:
    return Report(SUBJECT, findings, 3, 7.94, 0.409, console, **more)  # type: ignore[arg-type]


def complete() -> Findings:
    findings = Findings()
    for step in STEPS:
        findings.expect(step, "it", 1, 1)
    return findings


def test_a_contract_that_holds_is_a_line_for_each_step() -> None:
    told = report(complete())
    assert told.holds
    lines = told.text().splitlines()
    assert lines[0] == "x86_64: kernel k1, initrd v1, QEMU q35 (tcg)"
    assert [line.split() for line in lines[1:11]] == [
        [*([str(step)] if step != ENDING else []), *name.split(), "ok"] for step, name in STEPS.items()
    ]
    assert lines[11:] == ["init -> entrypoint 0.41 s (guest time); 3 boots in 7.9 s", "the guest contract holds"]


def test_what_fails_is_told_with_what_was_expected_and_where_the_log_is(tmp_path: Path) -> None:
    findings = complete()
    findings.guest = "as a user"
    findings.expect(5, "/etc/resolv.conf", "nameserver 10.0.2.3", None)
    console = "\x1b[2Jhello\tthere\n\nsystemfiles-probe word: started x\nbye\n"
    text = report(findings, console, log=tmp_path / "a.log").text()
    assert (
        "   5  network                       FAILED\n"
        "     /etc/resolv.conf (as a user)\n"
        "       expected  nameserver 10.0.2.3\n"
        "       seen      nothing\n"
    ) in text
    assert text.endswith(
        "the guest contract does not hold (network)\nthe last lines of the serial log:\n"
        f"  | \\x1b[2Jhello    there\n  | bye\nserial log: {tmp_path}/a.log"
    )


def test_a_step_that_nobody_saw_does_not_hold_and_one_that_was_left_out_may() -> None:
    findings = Findings()
    for step in range(1, ENDING):
        findings.expect(step, "it", 1, 1)
    assert findings.state(ENDING) is State.UNSEEN
    assert not report(findings).holds
    findings.leave_out(ENDING)
    assert findings.state(ENDING) is State.LEFT_OUT
    assert report(findings).holds


def test_a_report_is_plain_values_too() -> None:
    findings = complete()
    findings.expect(8, "words", "\x1b", "\udcff")
    plain = json.loads(json.dumps(report(findings).to_dict()))
    assert plain["holds"] is False
    assert plain["init_seconds"] == 0.409
    assert plain["steps"][7] == {
        "step": 8,
        "name": "entrypoint",
        "state": "FAILED",
        "problems": [{"what": "words", "expected": "\x1b", "seen": "\udcff"}],
    }
    assert plain["steps"][-1]["step"] is None


def test_what_a_guest_tells_is_shown_in_one_line_that_does_no_harm() -> None:
    assert brief("a\n\x1b]0;title\x07  b") == "a \\x1b]0;title\\x07 b"
    assert len(brief("x" * 10_000)) < 250


ASKED = Probe(b"", frozenset({"overlay"}), "word")


def test_of_what_the_probe_tells_the_first_counts_and_nobody_else_can_tell_it() -> None:
    lines = ["word: shm 1777;", "word: shm 0;", "word: e ", "other: a b", ": a b"]
    console = "x systemfiles-probe word: a b\n" + "".join(f"systemfiles-probe {line}\n" for line in lines)
    assert ASKED.facts(console) == {"shm": "1777;", "e": ""}
    assert ASKED.told("shm").search(console)
    assert not ASKED.told("a").search(console)


TOLD = (
    *("cmdline", "environ", "ids", "mounts", "shm", "serials", "modules"),
    *("address", "routes", "clock", "directory", "fetched", "passwd", "group"),
)


def test_nothing_that_a_guest_tells_is_more_than_a_finding() -> None:
    for value in ("", ";;;", "zz", "Uid:\tx", "ff" * 10, f"{'9' * 5000}.00 1", f"Groups:{'9' * 5000}"):
        facts = dict.fromkeys(TOLD, value)
        findings = Findings()
        contract.check_any(findings, facts, ASKED.modules, ["rootfs"])
        contract.check_network(findings, facts, ASKED.nonce)
        contract.check_full(findings, facts, ASKED, ASKED.full())
        contract.check_user(findings, facts, ASKED)
        contract.check_image(findings, facts, ASKED.user())
        contract.check_systemd(findings, facts, ASKED)
        assert set(findings.problems) == {1, 2, 3, 4, 5, 6, 7, 8, 9}
        assert contract.init_seconds(facts) is None


IDS = "Uid:\t7\t7\t7\t7;Gid:\t8\t8\t8\t8;Groups:\t8 9;"
FILES = {"passwd": b"web:x:7:8::/srv:/bin/sh\n".hex(), "group": b"logs:x:9:web\n".hex()}


@pytest.mark.parametrize(
    ("facts", "wrong"),
    [
        ({"ids": IDS}, set()),
        ({"ids": IDS.replace("8 9", "8")}, {"its groups"}),
        ({"ids": IDS.replace("Gid:\t8", "Gid:\t0")}, {"its gid"}),
        ({"ids": IDS.replace("Uid:\t7\t7", "Uid:\t7\t0")}, {"its uid"}),
        ({"ids": IDS, "environ": b"HOME=/\0".hex()}, {"the home directory"}),
    ],
)
def test_an_image_that_names_its_user_is_held_to_its_own_files(facts: dict[str, str], wrong: set[str]) -> None:
    findings = Findings()
    told = {"environ": b"HOME=/srv\0".hex(), "directory": "/", **FILES, **facts}
    contract.check_image(findings, told, GuestConfig(entrypoint=["x"], user="web"))
    assert {problem.what for problem in findings.problems.get(8, ())} == wrong


def test_a_user_who_cannot_read_who_it_is_is_not_held_to_it() -> None:
    findings = Findings()
    told = {"environ": b"HOME=/srv\0".hex(), "directory": "/", "ids": IDS}
    contract.check_image(findings, told, GuestConfig(entrypoint=["x"], user="web"))
    assert 8 not in findings.problems


def test_the_time_of_init_is_told_to_anybody() -> None:
    assert contract.init_seconds({"clock": "1.52 111"}) == pytest.approx(0.41)


def test_patterns_are_met_in_whole_lines_however_much_is_written() -> None:
    first, second = ASKED.told("started"), ASKED.told("time")
    watch = guests.Watch({first: 60.0, second: 10.0})
    assert watch(b"\nsystemfiles-probe word: sta") is None
    assert watch(b"rted image\r\n") == 60.0
    for _ in range(100):
        assert watch(b"y\n" * 50_000) is None
    assert watch(b"x" * 200_000 + b"\nsystemfiles-probe other: time over\n") is None
    assert watch(b"systemfiles-probe word: time over\nsystemfiles-probe word: started\n") == 10.0
    assert watch.met == {first, second}


def initrd(path: Path, records: Iterable[cpio.Record], *, packed: bool = True) -> Path:
    out = io.BytesIO()
    cpio.write(records, out)
    path.write_bytes(gzip.compress(out.getvalue()) if packed else out.getvalue())
    return path


@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
def test_the_probe_takes_busybox_and_the_modules_to_load_from_the_initrd(tmp_path: Path, packed: bool) -> None:
    path = initrd(
        tmp_path / "initrd",
        [
            cpio.file("bin/ash", b"binary", mode=0o755),
            cpio.hardlink("bin/busybox", "bin/ash"),
            cpio.file("etc/modules", b"virtio-pci\noverlay\nbuilt_in\n"),
            cpio.file("lib/modules/6.1/kernel/virtio_pci.ko.xz", b""),
            cpio.file("lib/modules/6.1/kernel/overlay.ko", b""),
            cpio.file("lib/modules/6.1/kernel/erofs.ko", b""),
        ],
        packed=packed,
    )
    taken = Probe.of(path)
    assert (taken.busybox, taken.modules) == (b"binary", frozenset({"virtio_pci", "overlay"}))
    assert taken.nonce != Probe.of(path).nonce


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8b\x08", b"070701", gzip.compress(b"x" * 500), gzip.compress(b"0" * (257 << 20), 1)],
    ids=["empty", "truncated", "short", "no-cpio", "bomb"],
)
def test_an_initrd_that_is_none_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(content)
    with pytest.raises(InvalidArchive, match=str(path)):
        Probe.of(path)


def test_an_initrd_without_busybox_is_refused(tmp_path: Path) -> None:
    path = initrd(tmp_path / "initrd", [cpio.symlink("bin/busybox", "ash"), cpio.file("bin/ash", b"")])
    with pytest.raises(InvalidArchive, match="holds no bin/busybox, which the probe needs"):
        Probe.of(path)

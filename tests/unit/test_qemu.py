"""How QEMU is started, heard and stopped, whatever it does. A shell script stands in for the emulator."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from systemfiles.bootfiles import BootFiles, InitrdFile, KernelFile
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import ToolFailed, ToolMissing, UsageError
from systemfiles.recipes import console, qemu
from systemfiles.recipes.console import Outcome
from systemfiles.recipes.qemu import Q35, VIRT, Machine

KERNEL = KernelFile(Path("/k/vmlinux"), "k1", Arch.X86_64, "0" * 64, 1)
FILES = BootFiles(KERNEL, InitrdFile(Path("/i/initrd"), "v1", Arch.X86_64, "0" * 64, 1, "0" * 64))
OF_THE_HOST, FOREIGN = (Q35, VIRT) if os.uname().machine == "x86_64" else (VIRT, Q35)

Emulator = Callable[[str], None]


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """Makes a script what is found as QEMU."""

    def make(script: str) -> None:
        directory = tmp_path / "bin"
        directory.mkdir()
        for machine in (Q35, VIRT):
            program = directory / f"qemu-system-{machine.arch}"
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    return make


def run(**options: object) -> Outcome:
    return qemu.boot(Q35, FILES, {}, **options)  # type: ignore[arg-type]


def value(words: list[str], option: str) -> list[str]:
    return [words[number + 1] for number, word in enumerate(words) if word == option]


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_disks_have_their_names_for_serials_in_their_order_and_some_are_locked(emulator: Emulator) -> None:
    emulator("")
    disks = {"rootfs": Path("/d/rootfs"), "odd": Path("/d/a,b=c")}
    words = qemu.command(Q35, FILES, disks, locked=["rootfs"])
    assert value(words, "-drive") == [
        "if=none,format=raw,id=rootfs,file=/d/rootfs,readonly=on",
        "if=none,format=raw,id=odd,file=/d/a,,b=c",
    ]
    assert value(words, "-device") == [
        "virtio-blk-pci,drive=rootfs,serial=rootfs",
        "virtio-blk-pci,drive=odd,serial=odd",
    ]
    assert not any("serial=" in device for device in value(qemu.command(Q35, FILES, disks, serials=False), "-device"))


def test_the_kernels_arguments_come_from_the_boot_files_the_machine_and_the_caller(emulator: Emulator) -> None:
    emulator("")
    machine = Machine("odd", "x86_64", (), "device", "of=machine")
    (append,) = value(qemu.command(machine, FILES, {}, arguments="of=caller"), "-append")
    assert append == f"{FILES.cmdline('qemu')} of=machine of=caller"


def test_a_closed_network_leads_to_one_port_alone(emulator: Emulator) -> None:
    emulator("")
    assert value(qemu.command(Q35, FILES, {}), "-netdev") == []
    (closed,) = value(qemu.command(Q35, FILES, {}, server=8080), "-netdev")
    assert closed == "user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:80-tcp:127.0.0.1:8080"


@pytest.mark.parametrize(("machine", "gic"), [(Q35, []), (VIRT, ["gic-version=max"])], ids=str)
def test_kvm_takes_the_hosts_processor(emulator: Emulator, machine: Machine, gic: list[str]) -> None:
    emulator("")
    words = qemu.command(machine, FILES, {}, accel="kvm")
    assert value(words, "-accel") == ["kvm"]
    assert value(words, "-cpu")[-1] == "host"
    assert value(words, "-machine")[1:] == gic


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("machine", "package"), [(Q35, "qemu-system-x86"), (VIRT, "qemu-system-arm")], ids=str)
def test_a_missing_emulator_names_its_package(
    machine: Machine, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match=f"qemu-system-{machine.arch}.*\n.*apt-get install {package}"):
        qemu.require_usable(machine)


def test_kvm_is_refused_for_another_architecture(emulator: Emulator) -> None:
    emulator("")
    with pytest.raises(UsageError, match=f"KVM cannot run an {FOREIGN.arch} guest.*\n.*accel=tcg"):
        qemu.require_usable(FOREIGN, "kvm")


def test_kvm_is_refused_where_its_device_cannot_be_opened(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulator("")
    monkeypatch.setattr(qemu, "_KVM", tmp_path / "kvm")
    with pytest.raises(UsageError, match="kvm cannot be opened \\(No such file or directory\\)"):
        qemu.boot(OF_THE_HOST, FILES, {}, accel="kvm")


def test_an_unknown_acceleration_is_refused(emulator: Emulator) -> None:
    emulator("")
    with pytest.raises(UsageError, match="there is no acceleration 'hvf'"):
        run(accel="hvf")


# ── how it runs and ends ─────────────────────────────────────────────────────────────────────────────────────────────


def test_its_output_is_the_console_and_goes_to_the_log_as_it_is(emulator: Emulator, tmp_path: Path) -> None:
    emulator("cat; printf 'x\\r\\n\\377\\033[2J'")
    (tmp_path / "log").write_bytes(b"before\n")
    outcome = run(typed=b"typed\n", log=tmp_path / "log")
    assert outcome.status == 0
    assert outcome.lines == ["typed", "x", "\\xff\x1b[2J"]
    assert (tmp_path / "log").read_bytes() == b"before\ntyped\nx\r\n\xff\x1b[2J"
    assert console.shown(outcome.console) == "typed\nx\n\\xff\\x1b[2J"


def test_a_failure_of_qemu_itself_is_told_with_what_it_wrote(emulator: Emulator) -> None:
    emulator("echo 'qemu: no such disk' >&2; exit 1")
    with pytest.raises(ToolFailed, match="status 1") as failure:
        run()
    assert failure.value.output == "qemu: no such disk"


def is_there(pid: Path) -> bool:
    return Path(f"/proc/{int(pid.read_text())}").exists()


def test_the_time_limit_stops_it_and_the_log_has_what_came_before(emulator: Emulator, tmp_path: Path) -> None:
    emulator(f"echo $$ >{tmp_path}/pid; echo started; exec sleep 100")
    outcome = run(limit=0.5, log=tmp_path / "log")
    assert outcome.status is None
    assert outcome.seconds < 5
    assert not is_there(tmp_path / "pid")
    assert (tmp_path / "log").read_text() == outcome.console == "started\n"


def test_a_guest_that_writes_for_ever_costs_no_more_than_was_agreed(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "HEAD", 100_000)
    emulator("echo first; yes; echo never")
    outcome = run(limit=1, log=tmp_path / "log")
    assert outcome.status is None
    assert outcome.lines[0] == "first"
    assert "bytes are left out here]" in outcome.console
    assert outcome.lines[-2] == "y"
    assert len(outcome.console) < 100_000 + console.TAIL + 100
    assert (tmp_path / "log").read_text() == outcome.console


def test_who_watches_sees_every_piece_and_may_shorten_the_time(emulator: Emulator) -> None:
    emulator("echo one; sleep 0.3; echo two; exec sleep 100")
    seen: list[bytes] = []

    def watch(piece: bytes) -> float | None:
        seen.append(piece)
        return 0.2 if b"two" in piece else None

    outcome = run(watch=watch)
    assert (outcome.status, outcome.lines) == (None, ["one", "two"])
    assert outcome.seconds < 5
    assert seen == [b"one\n", b"two\n"]


def test_who_is_told_of_progress_may_interrupt_it(emulator: Emulator, tmp_path: Path) -> None:
    emulator(f"echo $$ >{tmp_path}/pid; echo started; exec sleep 100")

    def progress(subject: str, done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=progress, log=tmp_path / "log")
    assert not is_there(tmp_path / "pid")
    assert (tmp_path / "log").read_text() == "started\n"


def test_progress_ends_with_all_that_was_written(emulator: Emulator) -> None:
    emulator("echo 12345")
    told: list[tuple[str, int, int | None]] = []
    run(progress=lambda *seen: told.append(seen))
    assert told[-1] == ("boot x86_64", 6, 6)


BOOTS = """
from tests.unit.test_qemu import run
run(limit=100)
"""


def test_it_does_not_outlive_a_process_that_is_killed(emulator: Emulator, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    emulator(f"echo $$ >{pid}.new; mv {pid}.new {pid}; exec sleep 100")
    with subprocess.Popen([sys.executable, "-c", BOOTS], cwd=Path(__file__).parents[2]) as process:
        wait_until(pid.exists)
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_there(pid))


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ── what is read out of a console ────────────────────────────────────────────────────────────────────────────────────


def test_an_outcome_knows_what_init_and_the_kernel_said() -> None:
    text = "x\nsystemfiles: error: no config.sh (why)\n\nsystemfiles: exit 125\n[ 1.0] reboot: Power down\n"
    outcome = Outcome(0, text, 1.0)
    assert (outcome.exit, outcome.errors, outcome.panic, outcome.clean) == (125, ("no config.sh (why)",), None, True)
    outcome = Outcome(0, "[ 1.0] Kernel panic - not syncing: Attempted to kill init!\n", 1.0)
    assert (outcome.exit, outcome.panic, outcome.clean) == (None, "Attempted to kill init!", False)

"""`systemfiles boot` and `doit boot`: what holds is said to hold, and what is broken is found where it is broken."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from systemfiles import BootFiles
from systemfiles.content.descriptors import IMAGE_CONFIG, MANIFEST, canonical, manifest
from systemfiles.content.images import Image
from systemfiles.content.layout import Layout
from systemfiles.foundation import cpio, cpioreader
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceRefused, UsageError
from systemfiles.foundation.paths import Paths
from systemfiles.recipes import console, imagecheck
from systemfiles.recipes.bootcheck import check_and_keep_log, check_boot
from systemfiles.recipes.bootreport import ENDING, STEPS, Report, State
from tests.conftest import ARCHES, CHECKOUT, Provisioned, doit

from .guest import GROUP, PASSWD, Entry, layer

pytestmark = pytest.mark.boot

SABOTAGE = {
    "nothing can write the names of servers": (
        '[ -z "$init_servers" ] || write_file /etc/resolv.conf "$init_servers"',
        ":",
    ),
    "volumes to be read are writable": ("ro) mount_read_only", "ro) mount_writable"),
    "/dev has no links": ("cp -a /etc/dev/* /dev", "mkdir /dev/pts /dev/shm"),
    "the working directory is ignored": ('enter_workdir "${WORKDIR:-/}"', "cd /"),
    "nobody has groups": ("init_name=$init_word init_uid", "init_uid"),
    "nobody has what the image says": (
        'find_user "${RUN_AS:-0}"',
        "export HOME=\"/\"; init_name='' init_uid=5 init_gid=6",
    ),
    "a disk that is only to be read is written to": ("ro,noload", "rw"),
    "words are split once more": ('eval "set -- $ENTRYPOINT $CMD"', "set -- $(eval echo $ENTRYPOINT $CMD)"),
    "signals end at init": ("trap 'forward TERM' TERM", "trap : TERM"),
    "no exit marker": ("printf '\\nsystemfiles: exit %s\\n' \"$status\"", ":"),
    "no modules": ("[ -s /etc/modules ] || return 0", "return 0"),
    "no PID 1 for anybody": (
        "exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME",
        "exit; #",
    ),
    "it is reset, not switched off": ("poweroff -f", "reboot -f"),
    "a journal is left to replay": ("    settle_disks\n    printf", "    printf"),
    "the entrypoint has no session of its own": ('"$init_busybox" setsid "$init_busybox" "$@"', '"$init_busybox" "$@"'),
    "nothing is in /etc/hosts": ("[ -s /etc/hosts ] || write_file", ": write_file"),
    "failures are kept to itself": ("printf 'systemfiles: error: %s\\n' \"$init_line\"", ":"),
    "hangs": ("boot() {", "boot() {\n    while :; do sleep 1; done"),
    "writes for ever": ("boot() {", "boot() {\n    while :; do echo; echo and on; done"),
    "panics": ("init() {", "init() {\n    exit 3"),
}


def sabotaged(files: BootFiles, directory: Path, *names: str) -> BootFiles:
    """These files with another init script in the initrd."""
    records = list(cpioreader.read(io.BytesIO(gzip.decompress(files.initrd.path.read_bytes()))))
    (number,) = (number for number, record in enumerate(records) if record.name == "init")
    data = records[number].data
    assert isinstance(data, bytes)
    script = data.decode()
    for name in names:
        good, bad = SABOTAGE[name]
        assert good in script, name
        script = script.replace(good, bad)
    records[number] = replace(records[number], data=script.encode())
    out = io.BytesIO()
    cpio.write(records, out)
    path = directory / "sabotaged"
    path.write_bytes(gzip.compress(out.getvalue(), 1))
    return files._replace(initrd=files.initrd._replace(path=path))


def failed(report: Report) -> set[int]:
    return {step for step in STEPS if report.findings.state(step) is State.FAILED}


def what(report: Report, step: int) -> set[str]:
    return {problem.what for problem in report.findings.problems.get(step, ())}


def systemfiles(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "systemfiles.cli", *map(str, words)]
    return subprocess.run(command, cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=600)


# ── the pair as it is ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arch", ARCHES)
def test_the_contract_holds_for_what_was_provisioned(provisioned: Provisioned, arch: str) -> None:
    ran = systemfiles("boot", "--profile", "debian", "--arch", arch, "--data-dir", provisioned.data_dir, "--json")
    told = json.loads(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert told["holds"]
    assert {step["state"] for step in told["steps"]} == {"ok"}
    assert (told["arch"], told["boots"], told["log"]) == (arch, 4, None)
    assert 0.05 < told["init_seconds"] < 20


def test_doit_prints_the_report_of_each_target(provisioned: Provisioned) -> None:
    ran = doit("boot", "profile=debian", "arch=x86_64", f"data_dir={provisioned.data_dir}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ".  boot:v1.0.0-debian:x86_64" in ran.stdout
    assert "   the guest contract holds\n" in ran.stdout


def test_a_contract_that_does_not_hold_is_a_failure_whose_log_is_kept(provisioned: Provisioned, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    subprocess.run(["cp", "-a", provisioned.data_dir, data_dir], check=True)
    ran = systemfiles("boot", "--profile", "debian", "--arch", "x86_64", "--data-dir", data_dir, "--limit", "0.05")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "\nthe guest contract does not hold (ending)\n" in ran.stdout
    (log,) = (data_dir / "logs").glob("boot-debian-cloud-*-v1.0.0-*-x86_64.log")
    assert log.stat().st_mode & 0o777 == 0o600
    assert ran.stdout.endswith(f"\nserial log: {log}\n")
    assert log.read_text().startswith("=== boot 1: as root, with everything ===\n")
    assert ": started full\n" in log.read_text()


def test_a_pair_that_is_not_there_is_told_as_ever(tmp_path: Path) -> None:
    ran = systemfiles("boot", "--profile", "debian", "--data-dir", tmp_path)
    assert ran.returncode == 1
    assert "is not provisioned" in ran.stderr


def test_a_time_limit_that_is_none_is_refused(provisioned: Provisioned, tmp_path: Path) -> None:
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="is no time for an entrypoint to run"):
            check_boot(provisioned.boot_files("x86_64"), tmp_path, limit=limit)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["kernel=ch-v6.16.9"], "a kernel alone does not boot a guest"),
        (["profile=debian", "accel=hvf"], "accel=hvf is neither accel=tcg nor accel=kvm"),
        (["profile=debian", "image="], "image= names no image"),
    ],
    ids=str,
)
def test_doit_refuses_what_cannot_be_booted(words: list[str], error: str, provisioned: Provisioned) -> None:
    ran = doit("-s", "boot", *words, "arch=x86_64", f"data_dir={provisioned.data_dir}")
    assert ran.returncode != 0
    assert error in ran.stderr


# ── an initrd that is broken ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arch", "names", "steps"),
    [
        (
            "x86_64",
            ["nothing can write the names of servers", "volumes to be read are writable", "/dev has no links"],
            {5: "/etc/resolv.conf", 6: "the reference disk, which is only to be read", 7: "where /dev/fd leads"},
        ),
        (
            "aarch64",
            ["the working directory is ignored", "nobody has groups", "no exit marker"],
            {8: "the working directory", ENDING: "the last line of init"},
        ),
        (
            "x86_64",
            ["a disk that is only to be read is written to", "words are split once more", "no PID 1 for anybody"],
            {
                3: "the rootfs disk, which is only to be read",
                4: "the config disk, which is only to be read",
                6: "the template disk, which is only to be read",
                8: "word 5, byte for byte",
                9: "the kernel (as PID 1)",
            },
        ),
        ("aarch64", ["signals end at init"], {8: "TERM as sent to init", ENDING: "the last line of init"}),
        ("x86_64", ["no modules"], {2: "what init says"}),
        (
            "x86_64",
            ["it is reset, not switched off", "a journal is left to replay", "nothing is in /etc/hosts"],
            {5: "a line for localhost in /etc/hosts", ENDING: "the overlay disk"},
        ),
        (
            "x86_64",
            ["the entrypoint has no session of its own", "failures are kept to itself"],
            {8: "the session, which is its own", ENDING: "what init says (with an entrypoint that is missing)"},
        ),
        ("aarch64", ["panics"], {ENDING: "the kernel"}),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else "",
)
def test_what_is_broken_fails_in_its_step(
    provisioned: Provisioned, tmp_path: Path, arch: str, names: list[str], steps: dict[int, str]
) -> None:
    files = sabotaged(provisioned.boot_files(arch), tmp_path, *names)
    report = check_boot(files, tmp_path)
    assert not report.holds
    assert failed(report) == {*steps}, report.text()
    for step, problem in steps.items():
        assert any(told.startswith(problem) or problem in told for told in what(report, step)), report.text()


@pytest.mark.parametrize(("name", "start"), [("hangs", 4), ("writes for ever", 20)])  # on a busy host init is late
def test_a_guest_that_never_starts_its_entrypoint_is_stopped_in_time(
    provisioned: Provisioned, tmp_path: Path, name: str, start: float
) -> None:
    (tmp_path / "data").write_bytes(b"not a directory that could take a log")
    files = sabotaged(provisioned.boot_files("x86_64"), tmp_path, name)
    report = check_and_keep_log(files, Paths(tmp_path / "data"), start=start)
    assert failed(report) == {ENDING}, report.text()
    assert {report.findings.state(step) for step in range(1, 10)} == {State.UNSEEN}
    (problem,) = report.findings.problems[ENDING]
    assert (problem.what, problem.expected) == ("the entrypoint", f"started within {start:g} s")
    assert problem.seen.startswith("nothing of it after ")
    assert start < report.seconds < start + 30
    assert report.log is not None
    try:
        assert ("and on" in report.log.read_text()) == (name == "writes for ever")
        assert report.log.stat().st_size < 10 << 20
    finally:
        report.log.unlink()  # it is where temporary files are


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def image(provisioned: Provisioned, directory: Path, tree: dict[str, Entry], arch: str, **config: object) -> Image:
    path = directory / "layer"
    path.write_bytes(layer(tree).read())
    return Image("example:1", Digest.of(b"its manifest"), Arch.parse(arch), {"config": config}, (path,))


def with_shell(provisioned: Provisioned, arch: str) -> dict[str, Entry]:
    return {"bin/busybox": provisioned.busybox(arch), "bin/sh": "busybox"}


def note(report: Report, name: str = "it") -> str:
    (told,) = (line.partition(" ")[2].strip() for line in report.notes if line.startswith(f"{name} "))
    return told


@pytest.mark.parametrize("arch", ARCHES)
def test_an_image_without_a_shell_runs_unchanged_after_the_probe(
    provisioned: Provisioned, tmp_path: Path, arch: str
) -> None:
    tree: dict[str, Entry] = {"od": provisioned.busybox(arch)}
    words = ["/od", "-An", "-v", "-tx1", "/proc/self/cmdline", "/proc/self/environ"]
    environment = ["A=it's $(not) `run`", "NOT.A-NAME=x", "-u=y", "IFS=e", "EMPTY=", "PATH=/nowhere"]
    config = {"Entrypoint": words[:1], "Cmd": words[1:], "Env": environment, "User": "7:8", "WorkingDir": "/made"}
    report = check_boot(
        provisioned.boot_files(arch), tmp_path, image=image(provisioned, tmp_path, tree, arch, **config)
    )
    assert report.holds, report.text()
    assert report.findings.state(9) is State.LEFT_OUT
    assert note(report) == "ended with the status 0"
    assert report.init_seconds is not None  # though this user may not read the kernel's log
    assert 0.05 < report.init_seconds < 20
    lines = (tmp_path / "serial.log").read_text(errors="replace").splitlines()
    dumped = bytes.fromhex("".join(line for line in lines if line.startswith(" ")))
    assert dumped.startswith("\0".join([*words, ""]).encode())
    arrived = dumped[len("\0".join(words)) + 1 :].removesuffix(b"\0").split(b"\0")
    assert sorted(arrived) == sorted(map(str.encode, [*environment, "HOME=/"]))


@pytest.mark.parametrize(
    ("script", "user", "end"),
    [
        ("trap 'exit 5' TERM; while :; do busybox sleep 0.1; done", "", "asked to end, it ended with the status 5"),
        ("trap 'exit 6' TERM; while :; do busybox sleep 0.1; done", "9", "asked to end, it ended with the status 6"),
        ("trap '' TERM; echo -n a prompt; busybox sleep 100", "", "and 1 s after it was asked to end: stopped"),
        ("trap '' TERM; while :; do echo and on; done", "", "and 1 s after it was asked to end: stopped"),
    ],
    ids=["as-root", "as-a-user", "deaf", "chatty"],
)
def test_a_server_is_asked_to_end_after_its_time(
    provisioned: Provisioned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, user: str, end: str
) -> None:
    monkeypatch.setattr(imagecheck, "_GRACE", 1.0)
    monkeypatch.setattr(console, "HEAD", 20_000)  # of what one writes that never stops, this is all that is kept
    tree = with_shell(provisioned, "x86_64")
    server = image(provisioned, tmp_path, tree, "x86_64", Cmd=["sh", "-c", script], Env=["PATH=/bin"], User=user)
    report = check_boot(provisioned.boot_files("x86_64"), tmp_path, image=server, limit=1)
    assert report.holds, report.text()
    assert note(report).startswith("still ran after 1 s")
    assert note(report).endswith(end)
    assert report.seconds < 30


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"Cmd": ["nginx"]}, "entrypoint nginx not found (PATH is "),
        ({"Cmd": ["/foreign"]}, "cannot run entrypoint /foreign (it was built for another architecture)"),
        ({"Cmd": ["/text"]}, "cannot run entrypoint /text (it is neither an ELF program nor a script"),
        ({"Cmd": ["/bin/sh"], "User": "nobody"}, "cannot run as nobody (the image knows no such user)"),
        ({"Cmd": ["/sbin/init"]}, "entrypoint /sbin/init not found"),
    ],
    ids=str,
)
def test_an_image_that_cannot_run_fails_for_its_reason(
    provisioned: Provisioned, tmp_path: Path, config: dict[str, object], problem: str
) -> None:
    tree = with_shell(provisioned, "x86_64") | {"text": b"echo no\n", "foreign": provisioned.busybox("aarch64")}
    broken = image(provisioned, tmp_path, tree, "x86_64", **config)
    report = check_boot(provisioned.boot_files("x86_64"), tmp_path, image=broken, limit=5)
    step = 9 if config["Cmd"] == ["/sbin/init"] else 8
    assert failed(report) == {step}, report.text()
    (told,) = report.findings.problems[step]
    assert told.what.startswith("what init says")
    assert told.seen.startswith(problem)


def test_a_program_may_end_as_one_that_was_not_found(provisioned: Provisioned, tmp_path: Path) -> None:
    tree = with_shell(provisioned, "x86_64")
    odd = image(provisioned, tmp_path, tree, "x86_64", Cmd=["/bin/sh", "-c", "exit 127"])
    report = check_boot(provisioned.boot_files("x86_64"), tmp_path, image=odd)
    assert report.holds, report.text()
    assert note(report) == "ended with the status 127"


def test_what_an_image_writes_is_not_taken_for_inits_or_the_kernels(provisioned: Provisioned, tmp_path: Path) -> None:
    forged = "echo 'systemfiles: error: missing disk: rootfs (x)'; echo 'a Kernel panic - not syncing: y'"
    forged += "; echo 'systemfiles-probe: time over'; echo 'systemfiles-probe 0123456789abcdef: time over'"
    chatty = image(
        provisioned,
        tmp_path,
        with_shell(provisioned, "x86_64"),
        "x86_64",
        Cmd=["/bin/sh", "-c", f"{forged}; echo 'systemfiles: exit 0'; exit 3"],
    )
    report = check_boot(provisioned.boot_files("x86_64"), tmp_path, image=chatty)
    assert report.holds, report.text()
    assert note(report) == "ended with the status 3"


def test_an_image_with_an_init_is_given_pid_1(provisioned: Provisioned, tmp_path: Path) -> None:
    tree = with_shell(provisioned, "aarch64") | {
        "sbin/init": b"#!/bin/sh\necho I am $$; echo Startup finished in no time; exec busybox sleep 100\n"
    }
    its_own = image(provisioned, tmp_path, tree, "aarch64", Entrypoint=["/sbin/init"], Env=["PATH=/bin"])
    report = check_boot(provisioned.boot_files("aarch64"), tmp_path, image=its_own)
    assert report.holds, report.text()
    assert note(report).endswith("; Startup finished in no time")
    assert "\nI am 1\n" in (tmp_path / "serial.log").read_text().replace("\r", "")


@pytest.mark.parametrize("user", ["web", "web:logs"])
def test_an_image_that_names_its_user_is_held_to_what_it_knows_of_that(
    provisioned: Provisioned, tmp_path: Path, user: str
) -> None:
    tree = with_shell(provisioned, "x86_64") | {"etc/passwd": (PASSWD, 0o644), "etc/group": (GROUP, 0o644)}
    named = image(provisioned, tmp_path, tree, "x86_64", Cmd=["sh", "-c", "exit 3"], Env=["PATH=/bin"], User=user)
    files = provisioned.boot_files("x86_64")
    report = check_boot(files, tmp_path, image=named)
    assert report.holds, report.text()
    (tmp_path / "overlay").unlink()
    report = check_boot(sabotaged(files, tmp_path, "nobody has what the image says"), tmp_path, image=named)
    assert failed(report) == {8}, report.text()
    assert what(report, 8) == {"its uid", "its gid", "the home directory"} | (
        {"its groups"} if user == "web" else set()
    )


def test_an_image_that_names_nothing_to_run_is_refused(provisioned: Provisioned, tmp_path: Path) -> None:
    empty = image(provisioned, tmp_path, {}, "x86_64")
    with pytest.raises(SourceRefused, match="example:1 was refused: its configuration names nothing to run"):
        check_boot(provisioned.boot_files("x86_64"), tmp_path, image=empty)


def test_an_image_of_the_content_store_is_booted_by_its_name(provisioned: Provisioned, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    subprocess.run(["cp", "-a", provisioned.data_dir, data_dir], check=True)
    layout = Layout(Paths(data_dir))
    content = layer(with_shell(provisioned, "x86_64")).read()
    part = layout.add_bytes(content, "application/vnd.oci.image.layer.v1.tar")
    value = {"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/sh", "-c", "exit 3"]}}
    config = layout.add_bytes(canonical(value), IMAGE_CONFIG)
    layout.name("three:1", layout.add_bytes(manifest(config, [part], {}), MANIFEST))
    ran = systemfiles("boot", "three:1", "--profile", "debian", "--arch", "x86_64", "--data-dir", data_dir)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "image       three:1 (sha256:" in ran.stdout
    assert "it          ended with the status 3\n" in ran.stdout

"""BootFiles: what a VM record keeps, and gives back exactly."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from systemfiles import Arch, BootFiles, InitrdFile, KernelFile, UsageError
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import DigestMismatch, StoreError, SystemFilesError

KERNEL, INITRD = b"kernel" * 1000, b"initrd" * 1000


@pytest.fixture
def boot(tmp_path: Path) -> BootFiles:
    source = tmp_path / "data"
    source.mkdir()
    for name, data in (("vmlinux", KERNEL), ("initrd", INITRD)):
        (source / name).write_bytes(data)
        (source / name).chmod(0o444)
    return BootFiles(
        KernelFile(source / "vmlinux", "k1", Arch.X86_64, Digest.of(KERNEL).hex, len(KERNEL)),
        InitrdFile(source / "initrd", "v1-0123", Arch.X86_64, Digest.of(INITRD).hex, len(INITRD), "ef" * 32),
    )


def on(boot: BootFiles, arch: Arch) -> BootFiles:
    return BootFiles(boot.kernel._replace(arch=arch), boot.initrd._replace(arch=arch))


@pytest.mark.parametrize(
    ("vmm", "arch", "words"),
    [
        ("cloud-hypervisor", Arch.X86_64, {"console=ttyS0"}),
        ("cloud-hypervisor", Arch.AARCH64, {"console=ttyAMA0"}),
        ("firecracker", Arch.X86_64, {"console=ttyS0", "reboot=k"}),
        ("firecracker", Arch.AARCH64, {"console=ttyS0"}),
        ("qemu", Arch.X86_64, {"console=ttyS0", "no_timer_check"}),
        ("qemu", Arch.AARCH64, {"console=ttyAMA0"}),
    ],
)
def test_each_vmm_gets_its_own_console(boot: BootFiles, vmm: str, arch: Arch, words: set[str]) -> None:
    cmdline = on(boot, arch).cmdline(vmm).split()
    assert words <= set(cmdline)
    assert sum(word.startswith("console=") for word in cmdline) == 1
    assert any(word.startswith("panic=") for word in cmdline)


@pytest.mark.parametrize("vmm", ["", "QEMU", "crosvm"])
def test_an_unknown_vmm_is_a_usage_error_that_lists_the_known(boot: BootFiles, vmm: str) -> None:
    with pytest.raises(UsageError, match="cloud-hypervisor, firecracker, qemu"):
        boot.cmdline(vmm)


def test_a_record_goes_through_json_and_comes_back_equal(boot: BootFiles) -> None:
    record = json.loads(json.dumps(boot.to_dict()))
    assert BootFiles.from_dict(record) == boot
    assert record["kernel"]["path"] == str(boot.kernel.path)
    assert (record["kernel"]["arch"], record["initrd"]["content_sha256"]) == ("x86_64", "ef" * 32)


def test_a_record_is_read_though_its_files_are_gone(boot: BootFiles) -> None:
    record = boot.to_dict()
    boot.kernel.path.unlink()
    assert BootFiles.from_dict(record) == boot


def test_boot_files_are_values(boot: BootFiles) -> None:
    assert pickle.loads(pickle.dumps(boot)) == copy.deepcopy(boot) == boot
    assert len({boot, copy.deepcopy(boot)}) == 1
    with pytest.raises(AttributeError):
        boot.kernel.path = Path("/other")  # type: ignore[misc]


def without(record: dict[str, Any], part: str, key: str) -> dict[str, Any]:
    return {**record, part: {name: value for name, value in record[part].items() if name != key}}


def with_(record: dict[str, Any], part: str, **changes: object) -> dict[str, Any]:
    return {**record, part: {**record[part], **changes}}


@pytest.mark.parametrize("part", ["kernel", "initrd"])
@pytest.mark.parametrize("key", ["path", "version", "arch", "sha256", "size"])
def test_a_record_without_one_of_its_facts_is_a_usage_error(boot: BootFiles, part: str, key: str) -> None:
    with pytest.raises(UsageError):
        BootFiles.from_dict(without(boot.to_dict(), part, key))


@pytest.mark.parametrize(
    "change",
    [
        {"path": None},
        {"path": 5},
        {"arch": None},
        {"arch": 5},
        {"size": "7"},
        {"version": 5},
        {"sha256": None},
        {"x": 1},
    ],
    ids=str,
)
def test_a_record_with_a_fact_of_another_type_is_a_usage_error(boot: BootFiles, change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        BootFiles.from_dict(with_(boot.to_dict(), "kernel", **change))


@pytest.mark.parametrize(
    "record", [{}, [], None, "x", {"kernel": []}, {"kernel": {}, "initrd": {}}, {"kernel": "x"}], ids=str
)
def test_what_is_no_record_is_a_usage_error(record: Any) -> None:
    with pytest.raises(UsageError):
        BootFiles.from_dict(record)


def test_a_record_of_an_unknown_architecture_is_refused(boot: BootFiles) -> None:
    with pytest.raises(SystemFilesError):
        BootFiles.from_dict(with_(boot.to_dict(), "initrd", arch="mips"))


# copies


def test_copies_are_independent_files_that_keep_their_facts(boot: BootFiles, tmp_path: Path) -> None:
    copied = boot.copy_to(tmp_path / "jail" / "vm-7")
    assert (copied.kernel.path, copied.initrd.path) == (
        tmp_path / "jail" / "vm-7" / "vmlinux",
        tmp_path / "jail" / "vm-7" / "initrd",
    )
    assert copied.kernel._replace(path=boot.kernel.path) == boot.kernel
    for part, original in ((copied.kernel, boot.kernel), (copied.initrd, boot.initrd)):
        assert not part.path.samefile(original.path)
        os.truncate(part.path, 0)
        assert original.path.stat().st_size == original.size


def test_copies_go_below_the_working_directory_as_absolute_paths(
    boot: BootFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert boot.copy_to("jail").kernel.path == tmp_path / "jail" / "vmlinux"


def test_copies_never_overwrite(boot: BootFiles, tmp_path: Path) -> None:
    (tmp_path / "initrd").write_bytes(b"mine")
    with pytest.raises(StoreError, match="initrd"):
        boot.copy_to(tmp_path)
    assert (tmp_path / "initrd").read_bytes() == b"mine"


def test_a_directory_that_may_not_be_written_is_a_store_error(boot: BootFiles) -> None:
    with pytest.raises(StoreError):
        boot.copy_to("/sys/systemfiles")


def test_a_second_copy_that_fails_takes_the_first_away_again(boot: BootFiles, tmp_path: Path) -> None:
    target = tmp_path / "jail"
    target.mkdir()
    (target / "initrd").write_bytes(b"mine")
    with pytest.raises(StoreError):
        boot.copy_to(target)
    assert [path.name for path in target.iterdir()] == ["initrd"]
    assert (target / "initrd").read_bytes() == b"mine"


def test_a_copy_of_changed_bytes_is_refused(boot: BootFiles, tmp_path: Path) -> None:
    boot.kernel.path.chmod(0o644)
    boot.kernel.path.write_bytes(b"X" * len(KERNEL))
    with pytest.raises(DigestMismatch):
        boot.copy_to(tmp_path / "jail")
    assert list((tmp_path / "jail").iterdir()) == []

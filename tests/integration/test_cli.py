"""The command line: help, exit status, errors that say what to do, JSON, and what each command changes or leaves."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from systemfiles import BootFiles, SystemFiles, VersionConflict
from systemfiles.content.layout import Layout
from systemfiles.foundation.errors import LockTimeout
from systemfiles.foundation.paths import Paths
from tests.conftest import ARCHES, CHECKOUT, Provisioned, doit
from tests.integration.support import Completed, Mirror, as_nobody, done_tasks, systemfiles, tree

COMMANDS = (
    *("provision", "path", "ls", "verify", "lease", "pin", "unpin", "pins", "restore", "gc", "du"),
    *("disk", "boot", "lock", "add"),
)


def assert_refused(ran: Completed, *words: str, status: int = 1) -> None:
    """It failed on purpose, on stderr, and its words say so; nobody sees how the program is made."""
    assert ran.returncode == status, ran.stdout + ran.stderr
    for word in words:
        assert word in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr


# ── help and exit status ─────────────────────────────────────────────────────────────────────────────────────────────


def test_help_names_every_command_and_where_things_are_kept() -> None:
    ran = systemfiles("--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    for word in (*COMMANDS, "SYSTEMFILES_DATA_DIR", "/var/lib/systemfiles", "Exit status"):
        assert word in ran.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_each_of_its_options(command: str) -> None:
    ran = systemfiles(command, "--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "--data-dir" in ran.stdout
    options = [line for line in ran.stdout.splitlines() if line.startswith("  -")]
    assert len(options) >= 3
    # argparse puts a help text beside its option or, after a long one, on the next line
    for option in options:
        following = ran.stdout.split(option, 1)[1].splitlines()
        assert "  " in option.strip() or following[1].startswith("        "), option


def test_the_version_is_printed() -> None:
    ran = systemfiles("--version")
    assert (ran.returncode, ran.stdout.split()[0]) == (0, "systemfiles")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("nope",),
        ("path", "--nope"),
        ("ls", "extra"),
        ("add", "initrd", "f", "--version", "x"),
        ("add", "kernel", "f"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_two_and_usage(words: tuple[str, ...]) -> None:
    assert_refused(systemfiles(*words), "usage: systemfiles", "error: ", status=2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("path", "--kernel", "ch-v6.16.9"), "systemfiles provision --kernel ch-v6.16.9"),
        (("path", "--initrd", "v1.0.0"), "systemfiles provision --initrd v1.0.0"),
        (("path",), "systemfiles provision"),
        (("path", "--profile", "nope"), "cloud-hypervisor, debian"),
        (("path", "--arch", "mips"), "x86_64, amd64, aarch64, arm64"),
        (("provision", "--profile", "nope"), "cloud-hypervisor, debian"),
        (("provision", "--arch", "mips"), "x86_64, amd64, aarch64, arm64"),
        (("provision", "--kernel", "nope"), "versions.toml"),
        (("provision", "--initrd", "nope"), "versions.toml"),
        (("provision", "--profile", "debian", "--initrd", "nope"), "versions.toml"),
        (("add", "kernel", "/nonexistent/vmlinux", "--version", "my-1"), "/nonexistent/vmlinux"),
        (("add", "kernel", "/usr", "--version", "my-1"), "/usr"),
        (("ls", "--catalog", "--catalog-file", "/nonexistent.toml"), "/nonexistent.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_says_what_there_is_or_what_to_do_and_creates_nothing(
    words: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    ran = systemfiles(*words, "--data-dir", tmp_path / "data")
    assert_refused(ran, "error: ", says)
    assert ran.stdout == ""
    assert not (tmp_path / "data").exists()


def test_a_faulty_catalog_is_told_with_every_fault_and_its_place(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text('schema = 1\n[kernel.X]\napt = { mips = "linux" }\n[profile.p]\nkernel = "a"\n')
    ran = systemfiles("ls", "--catalog", "--catalog-file", catalog)
    assert_refused(ran, str(catalog), "line 2", "line 3", "line 4", "kernel.X", "profile.p.initrd")


# ── doit's own command line ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("profil=debian", "profile"),
        ("PROFILE=debian", "profile"),
        ("profile=nope", "cloud-hypervisor, debian"),
        ("all=maybe", "all=yes"),
        ("tests=1", "tests=yes"),
        ("arch=mips", "x86_64"),
        ("arch=x86_64,", "x86_64"),
        ("arch=", "x86_64"),
        ("kernel=nope", "debian-cloud"),
        ("kernel=", "a-z"),
        ("data_dir=", "data_dir"),
        ("initrd=nope", "v1.0.0-debian"),
        ("initrd=../../x", "a-z"),
        ("kernel=../../x", "a-z"),
    ],
)
def test_a_variable_or_value_that_does_not_exist_is_an_error_and_nothing_is_done(
    word: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYSTEMFILES_DATA_DIR", str(tmp_path / "data"))
    ran = doit(*([] if word.startswith("profile=") else ["profile=debian"]), word)
    assert ran.returncode != 0
    assert says in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert done_tasks(ran.stdout) == set()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("directory", ["/dev/null/x", "/proc/x"])
def test_a_data_directory_that_cannot_be_is_an_error(directory: str) -> None:
    ran = doit("profile=debian", f"data_dir={directory}")
    assert ran.returncode != 0
    assert directory in ran.stderr or Path(directory).parent.as_posix() in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert_refused(systemfiles("provision", "--profile", "debian", "--data-dir", directory), directory.split("/x")[0])


_CLI = "from systemfiles.cli import main\nsys.exit(main(sys.argv[1:]))\n"


def test_a_data_directory_that_may_not_be_written_is_an_error(staged: Path, public: Path) -> None:
    closed = public / "closed"
    closed.mkdir(mode=0o555)
    ran = as_nobody(_CLI, "provision", "--profile", "debian", "--data-dir", closed / "data", package=staged)
    assert_refused(ran, str(closed / "data"), "cannot be written", "write permission")
    assert list(closed.iterdir()) == []


def test_doit_list_is_a_table_of_contents() -> None:
    ran = doit("list")
    assert ran.returncode == 0
    lines = [line.split(maxsplit=1) for line in ran.stdout.splitlines()]
    names = [name for name, _ in lines]
    assert names[:5] == ["resolve", "kernel", "busybox", "initrd", "manifest"]
    assert {"update", "verify", "setup", "test"} <= set(names)
    assert all(len(about) > 15 for _, about in lines)


@pytest.mark.network
@pytest.mark.parametrize("words", [("clean",), ("clean", "kernel", "initrd"), ("clean", "--clean-all"), ("forget",)])
def test_doit_clean_deletes_no_artifact(words: tuple[str, ...], copied: Path) -> None:
    before = tree(copied)
    ran = doit(*words, "profile=debian", f"arch={','.join(ARCHES)}", f"data_dir={copied}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert tree(copied) == before


@pytest.mark.network
def test_doit_runs_in_parallel(provisioned: Provisioned, mirror: Mirror, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    (data_dir / "system").mkdir(parents=True)
    shutil.copy(provisioned.data_dir / "system" / "versions.lock", data_dir / "system")
    ran = doit("-n", "2", "profile=debian", f"arch={','.join(ARCHES)}", f"data_dir={data_dir}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    sums = [(place / "system" / "SHA256SUMS").read_text() for place in (data_dir, provisioned.data_dir)]
    assert sums[0] == sums[1]
    assert mirror.requests == ["busybox aarch64", "busybox x86_64", "kernel aarch64", "kernel x86_64"]
    shutil.rmtree(data_dir)


# ── path, ls ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.network
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("vmm", ["cloud-hypervisor", "firecracker", "qemu"])
def test_path_gives_the_kernel_command_line_for_a_vmm(arch: str, vmm: str, provisioned: Provisioned) -> None:
    place = ("path", "--profile", "debian", "--arch", arch, "--data-dir", provisioned.data_dir, "--cmdline", vmm)
    files = provisioned.boot_files(arch)
    assert systemfiles(*place).stdout == f"{files.cmdline(vmm)}\n"
    assert json.loads(systemfiles(*place, "--json").stdout) == {**files.to_dict(), "cmdline": files.cmdline(vmm)}


def test_path_names_the_vmms_it_knows_when_asked_for_another() -> None:
    assert_refused(systemfiles("path", "--cmdline", "xen"), "'cloud-hypervisor', 'firecracker', 'qemu'", status=2)
    assert "cloud-hypervisor, firecracker or qemu" in " ".join(systemfiles("path", "--help").stdout.split())


@pytest.mark.parametrize("arch", ARCHES)
def test_path_as_json_is_what_the_api_gives(arch: str, provisioned: Provisioned) -> None:
    ran = systemfiles("path", "--profile", "debian", "--arch", arch, "--data-dir", provisioned.data_dir, "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert BootFiles.from_dict(json.loads(ran.stdout)) == provisioned.boot_files(arch)


@pytest.mark.network
def test_path_of_one_version_is_that_path_and_nothing_else(provisioned: Provisioned) -> None:
    files = provisioned.boot_files("x86_64")
    place = ("--arch", "amd64", "--data-dir", provisioned.data_dir)
    assert systemfiles("path", "--kernel", files.kernel.version, *place).stdout == f"{files.kernel.path}\n"
    assert systemfiles("path", "--initrd", files.initrd.version, *place).stdout == f"{files.initrd.path}\n"


@pytest.mark.network
def test_paths_that_doit_and_provision_print_are_those_that_path_prints(provisioned: Provisioned) -> None:
    place = ("--profile", "debian", "--arch", "x86_64", "--data-dir", provisioned.data_dir)
    printed = systemfiles("path", *place).stdout
    assert systemfiles("provision", *place).stdout.endswith(f"\n\n{printed}")
    assert doit("profile=debian", "arch=x86_64", f"data_dir={provisioned.data_dir}").stdout.endswith(f"\n\n{printed}")


@pytest.mark.network
def test_ls_lists_what_is_on_disk(provisioned: Provisioned) -> None:
    rows = json.loads(systemfiles("ls", "--json", "--data-dir", provisioned.data_dir).stdout)
    parts = [part for arch in ARCHES for part in provisioned.boot_files(arch)]
    assert {row["path"] for row in rows} == {str(part.path) for part in parts}
    assert {row["size"] for row in rows} == {part.size for part in parts}
    heading, *lines = systemfiles("ls", "--data-dir", provisioned.data_dir).stdout.splitlines()
    assert heading.split() == ["KIND", "VERSION", "ARCH", "SIZE", "CREATED", "PATH"]
    assert [line.split()[-1] for line in lines] == [row["path"] for row in rows]


def test_ls_of_nothing_says_so(tmp_path: Path) -> None:
    ran = systemfiles("ls", "--data-dir", tmp_path / "data")
    assert (ran.returncode, ran.stdout) == (0, "nothing is provisioned here\n")
    assert json.loads(systemfiles("ls", "--json", "--data-dir", tmp_path / "data").stdout) == []
    assert not (tmp_path / "data").exists()


def test_ls_of_the_catalog_says_what_there_is_and_which_is_the_default() -> None:
    rows = json.loads(systemfiles("ls", "--catalog", "--json").stdout)
    names = {(row["kind"], row["name"]) for row in rows}
    assert {("profile", "debian"), ("kernel", "ch-v6.16.9"), ("initrd", "v1.0.0")} <= names
    printed = systemfiles("ls", "--catalog").stdout
    (default,) = (line for line in printed.splitlines() if "(default)" in line)
    assert default.split()[:2] == ["profile", "cloud-hypervisor"]


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def forge(path: Path) -> None:
    """Changes one byte; size, inode and modification time stay."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(before.st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0xFF]))
    path.chmod(0o444)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.network
def test_verify_says_that_all_is_well(provisioned: Provisioned) -> None:
    ran = systemfiles("verify", "--data-dir", provisioned.data_dir)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "4 artifacts and the content store are intact\n", "")
    found = json.loads(systemfiles("verify", "--json", "--data-dir", provisioned.data_dir).stdout)
    assert found == {"artifacts": 4, "problems": [], "repaired": []}


@pytest.mark.network
@pytest.mark.parametrize("part", ["kernel", "initrd"])
def test_verify_finds_what_stamps_cannot_and_the_next_run_mends_it(part: str, copied: Path, mirror: Mirror) -> None:
    files = SystemFiles(copied, profile="debian", arch="x86_64").resolve()
    damaged = getattr(files, part)
    forge(damaged.path)
    place = ("--profile", "debian", "--arch", "x86_64", "--data-dir", copied)
    assert systemfiles("path", *place).returncode == 0

    found = systemfiles("verify", "--data-dir", copied)
    assert_refused(found, str(damaged.path), damaged.sha256, "error: ")
    assert "systemfiles verify --repair" in found.stdout
    listed = json.loads(systemfiles("verify", "--json", "--data-dir", copied).stdout)
    assert any(str(damaged.path) in problem for problem in listed["problems"])
    assert_refused(systemfiles("path", *place), str(damaged.path))

    mended = systemfiles("provision", *place)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert {task.partition(":")[0] for task in done_tasks(mended.stdout)} == {part}
    assert systemfiles("verify", "--data-dir", copied).returncode == 0
    assert SystemFiles(copied, profile="debian", arch="x86_64").resolve() == files


@pytest.mark.network
def test_doit_verify_fails_for_what_is_damaged(copied: Path) -> None:
    command = ("verify", "profile=debian", f"data_dir={copied}")
    assert doit(*command).returncode == 0
    kernel = SystemFiles(copied, profile="debian", arch="aarch64").resolve().kernel
    forge(kernel.path)
    ran = doit(*command)
    assert ran.returncode != 0
    assert str(kernel.path) in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr


# ── add ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def vmlinuz(package: Path, target: Path) -> Path:
    """The kernel file of a distribution's package, taken out by other programs than ours."""
    data = subprocess.run(["bsdtar", "-xOf", str(package), "data.tar.*"], check=True, capture_output=True).stdout
    unpacked = subprocess.run(
        ["bsdtar", "-xOf", "-", "./boot/vmlinuz-*"], input=data, check=True, capture_output=True
    ).stdout
    target.write_bytes(unpacked)
    return target


@pytest.mark.network
def test_add_takes_a_vmlinux_in_as_it_is(provisioned: Provisioned, tmp_path: Path) -> None:
    source = provisioned.boot_files("x86_64").kernel
    place = ("--arch", "x86_64", "--data-dir", tmp_path / "data")
    for _ in ("first", "the same again"):
        ran = systemfiles("add", "kernel", source.path, "--version", "my-1", *place, "--json")
        assert ran.returncode == 0, ran.stderr
        added = json.loads(ran.stdout)
        assert (added["version"], added["arch"], added["sha256"]) == ("my-1", "x86_64", source.sha256)
    assert systemfiles("path", "--kernel", "my-1", *place).stdout == f"{added['path']}\n"
    assert source.path.stat().st_ino != Path(added["path"]).stat().st_ino
    assert systemfiles("verify", "--data-dir", tmp_path / "data").returncode == 0


@pytest.mark.network
def test_add_takes_the_vmlinux_out_of_a_bzimage(provisioned: Provisioned, archive: Mirror, tmp_path: Path) -> None:
    bzimage = vmlinuz(archive.package("kernel x86_64"), tmp_path / "bzImage")
    assert bzimage.read_bytes()[0x202:0x206] == b"HdrS"
    ran = systemfiles(
        "add", "kernel", bzimage, "--version", "my-1", "--arch", "x86_64", "--data-dir", tmp_path / "data"
    )
    assert ran.returncode == 0, ran.stderr
    added = SystemFiles(tmp_path / "data", arch="x86_64").kernel_path("my-1")
    assert added.read_bytes() == provisioned.boot_files("x86_64").kernel.path.read_bytes()


@pytest.mark.network
@pytest.mark.parametrize("compressed", [False, True], ids=["Image", "Image.gz"])
def test_add_takes_an_arm64_image_in(compressed: bool, provisioned: Provisioned, tmp_path: Path) -> None:
    image = provisioned.boot_files("aarch64").kernel
    source = image.path
    if compressed:
        source = tmp_path / "Image.gz"
        source.write_bytes(gzip.compress(image.path.read_bytes(), 1))
    ran = systemfiles("add", "kernel", source, "--version", "my-1", "--arch", "arm64", "--data-dir", tmp_path / "data")
    assert ran.returncode == 0, ran.stderr
    added = SystemFiles(tmp_path / "data", arch="aarch64").kernel_path("my-1")
    assert added.read_bytes() == image.path.read_bytes()


@pytest.mark.network
def test_add_refuses_other_content_under_a_version_that_exists(provisioned: Provisioned, tmp_path: Path) -> None:
    source = tmp_path / "vmlinux"
    shutil.copy(provisioned.boot_files("x86_64").kernel.path, source)
    system = SystemFiles(tmp_path / "data", arch="x86_64")
    first = system.add_kernel(source, "my-1")
    forge(source)
    with pytest.raises(VersionConflict) as caught:
        system.add_kernel(source, "my-1")
    assert list(caught.value.changes) == ["sha256"]
    place = ("--arch", "x86_64", "--data-dir", tmp_path / "data")
    assert_refused(systemfiles("add", "kernel", source, "--version", "my-1", *place), "never changed", "hint")
    assert system.kernel_path("my-1") == first.path
    assert system.verify().problems == ()


@pytest.mark.network
def test_add_refuses_what_is_no_kernel_for_the_architecture(provisioned: Provisioned, tmp_path: Path) -> None:
    vmlinux, image = (provisioned.boot_files(arch).kernel.path for arch in ARCHES)
    page, short, empty = tmp_path / "page.html", tmp_path / "short", tmp_path / "empty"
    page.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>" * 100)
    short.write_bytes(vmlinux.read_bytes()[:1_000_000])
    empty.touch()
    for source, arch, found in (
        (page, "x86_64", "HTML page"),
        (page, "aarch64", "HTML page"),
        (short, "x86_64", ""),
        (empty, "x86_64", "empty"),
        (empty, "aarch64", "empty"),
        (image, "x86_64", "arm64"),
        (vmlinux, "aarch64", "x86"),
    ):
        ran = systemfiles("add", "kernel", source, "--version", "my-1", "--arch", arch, "--data-dir", tmp_path / "data")
        assert_refused(ran, "is not a bootable kernel", "found", found)
        assert source.name in ran.stderr, "the error names the file that was given"
    left = {name for name in tree(tmp_path / "data") if not name.startswith("locks/")}
    assert left == set()


@pytest.mark.network
@pytest.mark.parametrize("name", ["ch-v6.16.9", "debian-cloud"])
def test_add_refuses_a_name_of_the_catalog(name: str, provisioned: Provisioned, tmp_path: Path) -> None:
    source = provisioned.boot_files("x86_64").kernel.path
    ran = systemfiles("add", "kernel", source, "--version", name, "--arch", "x86_64", "--data-dir", tmp_path / "data")
    assert_refused(ran, name, "catalog", "--version")
    assert not (tmp_path / "data" / "system").exists()


# ── lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_command_under_the_lock_gets_its_words_and_gives_its_status(tmp_path: Path) -> None:
    ran = systemfiles("lock", "--data-dir", tmp_path, "--", "sh", "-c", 'echo "$0 $*"; exit 7', "a", "--b", "-c")
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, "a --b -c\n", "")


def test_while_a_command_runs_under_the_lock_nobody_else_writes_to_the_content_store(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "systemfiles.cli", "lock", "--data-dir", str(tmp_path), "--", "cat"]
    layout = Layout(Paths(tmp_path), timeout=0.3)
    target = layout.add_bytes(b"mine", "text/plain")
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin
        assert other.stdout
        other.stdin.write(b"it runs\n")
        other.stdin.flush()
        assert other.stdout.readline() == b"it runs\n"
        with pytest.raises(LockTimeout, match=r"held by +process \d+ \(cli.py lock\) since"):
            layout.name("mine", target)
        other.stdin.close()
    layout.name("mine", target)


def test_a_command_that_does_not_exist_is_told_and_the_lock_is_free(tmp_path: Path) -> None:
    assert_refused(systemfiles("lock", "--data-dir", tmp_path, "--", "no-such-command"), "no-such-command", "hint")
    assert systemfiles("lock", "--data-dir", tmp_path, "true").returncode == 0


def test_a_lock_without_a_command_is_refused(tmp_path: Path) -> None:
    assert_refused(systemfiles("lock", "--data-dir", tmp_path), "COMMAND", status=2)

"""`systemfiles disk`: what its words and options put on a guest's disks, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from systemfiles import GuestConfig, Network, SystemFiles, Volume, write_config_disk, write_rootfs_disk
from systemfiles.cli import main
from systemfiles.content.descriptors import IMAGE_CONFIG, canonical, manifest
from systemfiles.content.layout import Layout
from systemfiles.foundation.manifests import IMAGE_MANIFEST
from systemfiles.foundation.paths import Paths
from tests.conftest import CHECKOUT
from tests.integration.support import Completed, completed, systemfiles
from tests.registries import registry
from tests.unit.test_layers import file, tar

SAID = {
    "Entrypoint": ["/entry point"],
    "Cmd": ["it's", "$HOME"],
    "Env": ["PATH=/bin", "A=1"],
    "WorkingDir": "/work",
    "User": "web:staff",
    "StopSignal": "SIGQUIT",
}
SHELL_WORDS = ["", " ", "'", '"', "$(reboot)", "`reboot`", "a\nb", "\\", "--", "-x", "#", "é", "\udcff", "*", "~", "="]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A content store with the image x for two architectures."""
    place = tmp_path_factory.mktemp("store") / "data"
    layout = Layout(Paths(place))
    entries = []
    for machine in ("amd64", "arm64"):
        layer = layout.add_bytes(tar(file("machine", machine.encode())), "application/vnd.oci.image.layer.v1.tar")
        config = canonical({"architecture": machine, "os": "linux", "config": SAID | {"Cmd": [machine]}})
        raw = manifest(layout.add_bytes(config, IMAGE_CONFIG), [layer], {})
        part = layout.add_bytes(raw, IMAGE_MANIFEST)
        entries.append(part.to_json() | {"platform": {"os": "linux", "architecture": machine}})
    index = canonical({"schemaVersion": 2, "manifests": entries})
    layout.name("x", layout.add_bytes(index, "application/vnd.oci.image.index.v1+json"))
    return place


def disk(*words: str | Path) -> Completed:
    return systemfiles("disk", *words)


def made(*words: str | Path) -> str:
    done = disk(*words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refused(done: Completed, *words: str, status: int = 1) -> None:
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def on(path: Path, name: str) -> bytes:
    """The bytes of a file on a disk."""
    return subprocess.run(["debugfs", "-R", f"cat {name}", path], check=True, capture_output=True).stdout


# ── the root and the overlay ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_rootfs_makes_the_disk_of_an_image_and_says_where_and_how_large(
    data_dir: Path, tmp_path: Path, arch: str
) -> None:
    path = tmp_path / "some where"
    said = made("rootfs", "--arch", arch, "x", path, "--data-dir", data_dir)
    assert re.fullmatch(rf"{re.escape(str(path))}  [0-9.]+ KiB\n", said)
    image = SystemFiles(data_dir, arch=arch).image("x")
    write_rootfs_disk(tmp_path / "same", image.layers)
    assert path.read_bytes() == (tmp_path / "same").read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_rootfs_takes_a_format_and_a_size(data_dir: Path, tmp_path: Path) -> None:
    made("--data-dir", data_dir, "rootfs", "--arch=amd64", "--format=erofs", "x", tmp_path / "erofs")
    subprocess.run(["fsck.erofs", tmp_path / "erofs"], check=True, capture_output=True)
    assert "3.0 GiB" in made("rootfs", "--data-dir", data_dir, "--arch=amd64", "x", tmp_path / "ext4", "--size", "3G")
    assert (tmp_path / "ext4").stat().st_size == 3 << 30
    assert (tmp_path / "ext4").stat().st_blocks * 512 < 10 << 20
    refused(disk("rootfs", "--data-dir", data_dir, "--arch=amd64", "x", tmp_path / "y", "--size", "8K"), "would do")
    assert not (tmp_path / "y").exists()


def test_rootfs_pulls_an_image_that_is_named_in_full(data_dir: Path, tmp_path: Path) -> None:
    with registry(tmp_path / "registry") as served:
        there = f"docker://{served.host}/me/app:1"
        source = f"oci:{data_dir}/system/oci-cache:x"
        done = completed(["skopeo", "copy", "--all", "--dest-tls-verify=false", source, there])
        assert done.returncode == 0, done.stderr
        words = ["rootfs", "--data-dir", str(tmp_path / "data"), "--arch=arm64", f"{served.host}/me/app:1"]
        made(*words, tmp_path / "disk")
    made(*words, tmp_path / "again")  # it is here now
    assert on(tmp_path / "again", "/machine") == b"arm64"


def test_overlay_makes_an_empty_disk_once(tmp_path: Path) -> None:
    path = tmp_path / "overlay"
    assert made("overlay", path, "--size", "64M") == f"{path}  64.0 MiB\n"
    assert path.stat().st_size == 64 << 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"written by a guest")
    refused(disk("overlay", path, "--size", "64M"), "is there already", "remove it first")
    assert path.read_bytes() == b"written by a guest"


SIZES = ["", "G", "1.5G", "-1G", "+1G", "1g", "1GB", "0x10", " 1G", "1G ", "1_0M", "\u0661M", "9" * 20, "99999T", "0"]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_is_none_is_refused_and_nothing_is_made(data_dir: Path, tmp_path: Path, size: str) -> None:
    refused(disk("overlay", tmp_path / "disk", f"--size={size}"), "error: ")
    refused(disk("rootfs", "--data-dir", data_dir, "--arch=amd64", "x", tmp_path / "disk", f"--size={size}"), "error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_directory_is_not_made(tmp_path: Path) -> None:
    refused(disk("overlay", tmp_path / "none" / "disk", "--size", "64M"), "is not a directory")
    assert [*tmp_path.iterdir()] == []


def test_an_image_that_is_not_there_is_told_with_what_to_do(tmp_path: Path) -> None:
    for words in (["rootfs", "nginx"], ["config", "--image", "nginx"]):
        done = disk(words[0], "--data-dir", tmp_path / "data", *words[1:], tmp_path / "disk")
        refused(done, "image nginx", "not provisioned", "skopeo copy docker://nginx oci:")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("floppy", "f"),
        ("rootfs",),
        ("rootfs", "x"),
        ("rootfs", "x", "f", "g"),
        ("rootfs", "x", "f", "--format", "fat"),
        ("overlay", "f"),
        ("overlay", "f", "--size"),
        ("overlay", "f", "--size", "1G", "--", "x"),
        ("config",),
        ("config", "f", "g"),
        ("config", "--", "f"),
        ("config", "f", "--nope", "--", "x"),
        ("config", "f", "--init-mode", "upstart"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_two_and_usage(words: tuple[str, ...]) -> None:
    refused(disk(*words), "usage: systemfiles", "error: ", status=2)


@pytest.mark.parametrize("name", ["rootfs", "overlay", "config"])
def test_each_disk_explains_all_of_its_options(name: str) -> None:
    said = made(name, "--help")
    options = re.findall(r"^  -.*(?:\n {24}.*)?", said, re.MULTILINE)
    assert len(options) > 3
    assert all(re.search(r"\S(  +|\n +)\S", option) for option in options)
    assert "--data-dir" in said


# ── config.sh ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_words_behind_the_dashes_are_the_command_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "config"
    assert made("config", path, "--", *SHELL_WORDS).startswith(f"{path}  ")
    assert on(path, "/config.sh") == GuestConfig(cmd=SHELL_WORDS).script()
    write_config_disk(tmp_path / "same", GuestConfig(cmd=SHELL_WORDS))
    assert path.read_bytes() == (tmp_path / "same").read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_option_says_a_part_of_it(tmp_path: Path) -> None:
    words = ["--env", "A=1 '2' $3", "--env=B=", "--env", "C=a=b\n", "--env", "D=\udcff", "--workdir", "/some where"]
    words += ["--user", "web:staff", "--hostname", "guest", "--stop-signal", "QUIT", "--init-mode", "systemd"]
    words += ["--address", "10.0.2.15/24", "--gateway", "10.0.2.2", "--dns", "10.0.2.3", "--dns", "1.1.1.1"]
    words += ["--volume", "vdd:/data", "--volume=vde:/ref:ro", "--volume", "vdf:/both:overlay:vdg"]
    words += ["--entrypoint", '["/bin/sh", "-c"]']
    made("config", *words[:3], tmp_path / "config", *words[3:], "--", "echo", "--env")
    expected = GuestConfig(
        entrypoint=["/bin/sh", "-c"],
        cmd=["echo", "--env"],
        environment={"A": "1 '2' $3", "B": "", "C": "a=b\n", "D": "\udcff"},
        workdir="/some where",
        user="web:staff",
        hostname="guest",
        stop_signal="QUIT",
        init_mode="systemd",
        network=Network("10.0.2.15/24", "10.0.2.2", ["10.0.2.3", "1.1.1.1"]),
        volumes=[Volume("vdd", "/data"), Volume("vde", "/ref", "ro"), Volume("vdf", "/both", "overlay", "vdg")],
    )
    assert on(tmp_path / "config", "/config.sh") == expected.script()


def of_image(data_dir: Path, path: Path, *words: str) -> bytes:
    made("config", path, "--data-dir", data_dir, "--arch", "x86_64", "--image", "x", *words)
    return on(path, "/config.sh")


def test_without_options_it_is_what_the_image_says(data_dir: Path, tmp_path: Path) -> None:
    config = GuestConfig.from_image(SystemFiles(data_dir, arch="x86_64").image("x").config)
    assert config.cmd == ("amd64",)
    assert of_image(data_dir, tmp_path / "disk") == config.script()


def test_options_replace_what_the_image_says_as_docker_run_does(data_dir: Path, tmp_path: Path) -> None:
    image = {"environment": {"PATH": "/bin", "A": "1"}, "workdir": "/work", "user": "web:staff", "stop_signal": "QUIT"}
    entry, path = ["/entry point"], tmp_path / "disk"

    def config(**said: object) -> bytes:
        return GuestConfig(**{**image, **said}).script()  # type: ignore[arg-type]

    assert of_image(data_dir, path, "--", "a", "b") == config(entrypoint=entry, cmd=["a", "b"])
    assert of_image(data_dir, path, "--") == config(entrypoint=entry)
    assert of_image(data_dir, path, "--entrypoint", "/bin/[") == config(entrypoint=["/bin/["])
    assert of_image(data_dir, path, "--entrypoint", "[", "--", "]") == config(entrypoint=["["], cmd=["]"])
    assert of_image(data_dir, path, "--entrypoint", "", "--", "a") == config(cmd=["a"])
    assert of_image(data_dir, path, "--entrypoint", '["a", "é\\n"]') == config(entrypoint=["a", "é\n"])
    variables = {"PATH": "/bin", "A": "2", "B": "3"}
    said = of_image(data_dir, path, "--env", "A=2", "--env", "B=3", "--workdir", "/", "--user", "0")
    assert said == config(entrypoint=entry, cmd=["amd64"], environment=variables, workdir="/", user="0")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "nothing to run"),
        (("--",), "nothing to run"),
        (("--entrypoint", "", "--env", "A=1"), "nothing to run"),
        (("--env", "A", "--", "a"), "'A' is not NAME=VALUE"),
        (("--env", "=A", "--", "a"), "no name of a variable"),
        (("--entrypoint", "[1]"), "no JSON list of words"),
        (("--entrypoint", "[a, b]"), "no JSON list of words"),
        (("--entrypoint", '["a", null]'), "no JSON list of words"),
        (("--entrypoint", "[" * 5000 + "]" * 5000), "no JSON list of words"),
        (("--entrypoint", '["a\\u0000"]'), "NUL"),
        (("--entrypoint", '["\\ud800"]'), "no Unicode"),
        (("--workdir", "a/b", "--", "a"), "workdir"),
        (("--workdir", "/../b", "--", "a"), "workdir"),
        (("--user", "a b", "--", "a"), "user"),
        (("--hostname=-a", "--", "a"), "hostname"),
        (("--hostname=a;reboot", "--", "a"), "hostname"),
        (("--stop-signal", "SIGFOO", "--", "a"), "stop_signal"),
        (("--address", "10.0.2.15", "--", "a"), "how long its prefix is"),
        (("--address", "10.0.2.15/33", "--", "a"), "network.address"),
        (("--address", "10.0.2.15/24", "--gateway", "10.0.3.1", "--", "a"), "network.gateway"),
        (("--address", "10.0.2.15/24", "--dns", "dns.example.com", "--", "a"), "network.dns"),
        (("--gateway", "10.0.2.2", "--", "a"), "go with --address"),
        (("--dns", "10.0.2.2", "--", "a"), "go with --address"),
        (("--volume", "vdd", "--", "a"), "is not DEVICE:PATH"),
        (("--volume", "vdd:/a:overlay:vde:x", "--", "a"), "is not DEVICE:PATH"),
        (("--volume", "vdd:a", "--", "a"), "volume.path"),
        (("--volume", "vdd:/a b", "--", "a"), "volume.path"),
        (("--volume", "vdd:/a:rx", "--", "a"), "volume.mode"),
        (("--volume", "vdd:/a:", "--", "a"), "volume.mode"),
        (("--volume", "vdd:/a:overlay", "--", "a"), "volume.overlay_device"),
        (("--volume", "$(x):/a", "--", "a"), "volume.device"),
        (("--volume", "vdd:/a", "--volume", "vde:/a/", "--", "a"), "same path"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else None,
)
def test_what_no_guest_can_do_is_one_error_and_no_disk(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    refused(disk("config", tmp_path / "disk", *words), "error: ", says)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_is_refused_before_anything_is_pulled(tmp_path: Path) -> None:
    done = disk("config", "--image", "127.0.0.1:9/x", "--env", "A", "--data-dir", tmp_path / "data", tmp_path / "disk")
    refused(done, "not NAME=VALUE")


words = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20)
names = words.filter(lambda name: name and "=" not in name)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(words, min_size=1, max_size=5), st.dictionaries(names, words))
def test_any_words_arrive_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cmd: list[str], variables: dict[str, str]
) -> None:
    path = tmp_path / "disk"
    options = [f"--env={name}={value}" for name, value in variables.items()]
    assert main(["disk", "config", *options, str(path), "--entrypoint", json.dumps(cmd), "--", *cmd]) == 0
    capsys.readouterr()
    assert on(path, "/config.sh") == GuestConfig(entrypoint=cmd, cmd=cmd, environment=variables).script()


# ── what it shows ────────────────────────────────────────────────────────────────────────────────────────────────────

_ON_A_TERMINAL = """
import os, pty, sys
command = [sys.executable, "-m", "systemfiles.cli", "disk", *sys.argv[1:]]
status = pty.spawn(["sh", "-c", 'stty rows 25 cols 80; exec "$@"', "sh", *command])
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_terminal_sees_how_far_a_large_root_is_and_others_do_not(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    layout = Layout(Paths(data_dir))
    large = tar(*(file(f"{number % 100}/{number}") for number in range(30_000)))
    layer = layout.add_bytes(large, "application/vnd.oci.image.layer.v1.tar")
    config = layout.add_bytes(canonical({"architecture": "amd64", "os": "linux"}), IMAGE_CONFIG)
    target = layout.add_bytes(manifest(config, [layer] * 4, {}), IMAGE_MANIFEST)
    layout.name("large", target)
    words = ["rootfs", "--data-dir", str(data_dir), "--arch=amd64", "large", str(tmp_path / "rootfs")]
    seen = completed([sys.executable, "-c", _ON_A_TERMINAL, *words], env={**os.environ, "TERM": "xterm"}, cwd=CHECKOUT)
    assert seen.returncode == 0, seen.stdout
    assert "rootfs: unpacking" in seen.stdout
    assert "%|" in seen.stdout
    assert seen.stdout.rstrip().endswith("MiB")
    made(*words)


def test_a_path_that_is_no_text_is_told_somehow(tmp_path: Path) -> None:
    path = f"{tmp_path}/\udcff"
    assert made("config", path, "--", "a").startswith(f"{tmp_path}/\ufffd  ")
    assert Path(path).exists()

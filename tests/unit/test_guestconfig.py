"""What config.sh says arrives in a guest's shell as it was meant, and what no guest could do is refused by name."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systemfiles.foundation.errors import SourceRefused, UsageError
from systemfiles.recipes.guestconfig import GuestConfig, Network, Volume, signal_number

SHELL = ("busybox", "sh")  # the shell of every initrd
READ_BACK = """
. "$1"
for list in "$ENTRYPOINT" "$CMD" "$ENVIRONMENT"; do
    eval "set -- $list"
    printf '%s\\0' $# "$@"
done
printf '%s\\0' "$WORKDIR" "$RUN_AS" "$INIT_MODE" "$STOP_SIGNAL"
printf '%s\\0' "$GUEST_HOSTNAME" "$GUEST_IP" "$GUEST_CIDR" "$GUEST_GW" "$GUEST_DNS" "$VOLUME_MOUNTS"
"""
VARIABLES = (
    *("WORKDIR", "RUN_AS", "INIT_MODE", "STOP_SIGNAL"),
    *("GUEST_HOSTNAME", "GUEST_IP", "GUEST_CIDR", "GUEST_GW", "GUEST_DNS", "VOLUME_MOUNTS"),
)
RUN = GuestConfig(entrypoint=("/bin/true",))

# every byte but NUL: what is no UTF-8 is a surrogate escape
words = st.binary(max_size=30).map(lambda data: data.replace(b"\0", b"'").decode("utf-8", "surrogateescape"))
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
shell_words = st.text(st.sampled_from("'\"\\$`(){}*?[]~!#&;|<>= \t\n\rab-é€\x81\x88\x7f"), max_size=12)
any_word = st.one_of(words, texts, shell_words)
names = any_word.map(lambda name: name.replace("=", "_")).filter(bool)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guestconfig")


def arrived(config: GuestConfig, work: Path) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """The three lists, and what the other variables are set to, in a shell that has read config.sh."""
    script = work / "config.sh"
    script.write_bytes(config.script())
    done = subprocess.run([*SHELL, "-c", READ_BACK, "sh", script], capture_output=True, check=True, cwd=work)
    assert done.stderr == b""
    told = [value.decode("utf-8", "surrogateescape") for value in done.stdout.split(b"\0")[:-1]]
    lists = []
    for _ in range(3):
        count = int(told.pop(0))
        lists.append(tuple(told[:count]))
        del told[:count]
    return lists, {name: value for name, value in zip(VARIABLES, told, strict=True) if value}


@settings(max_examples=150, deadline=None)
@given(
    st.lists(any_word, min_size=1, max_size=4),
    st.lists(any_word, max_size=4),
    st.dictionaries(names, any_word, max_size=4),
)
def test_any_words_arrive_as_they_are(
    work: Path, entrypoint: list[str], cmd: list[str], environment: dict[str, str]
) -> None:
    lists, others = arrived(GuestConfig(entrypoint=entrypoint, cmd=cmd, environment=environment), work)
    assert lists == [tuple(entrypoint), tuple(cmd), tuple(f"{name}={value}" for name, value in environment.items())]
    assert others == {}


@settings(max_examples=50, deadline=None)
@given(any_word)
def test_any_working_directory_arrives_as_it_is(work: Path, name: str) -> None:
    path = "/" + name.replace("..", "")
    assert arrived(replace(RUN, workdir=path), work)[1] == {"WORKDIR": path}


def test_nothing_in_a_word_is_run(work: Path) -> None:
    bad = [f"$(touch {work}/ran)", f"`touch {work}/ran`", f"'; touch {work}/ran; '", f"\n touch {work}/ran\n", "$HOME"]
    lists, _ = arrived(GuestConfig(entrypoint=["sh"], cmd=bad, environment={"A": bad[2]}), work)
    assert lists == [("sh",), tuple(bad), (f"A={bad[2]}",)]
    assert not (work / "ran").exists()


def test_a_word_of_every_length_the_kernel_takes_arrives(work: Path) -> None:
    long = "'" * ((128 << 10) - 1)
    assert arrived(replace(RUN, cmd=[long]), work)[0][1] == (long,)
    with pytest.raises(UsageError, match="cmd: a word of 131072 bytes"):
        replace(RUN, cmd=[long + "'"])
    with pytest.raises(UsageError, match="together they take more"):
        replace(RUN, cmd=[long] * 9)


def test_every_field_arrives_in_its_variable(work: Path) -> None:
    config = GuestConfig(
        entrypoint=["/sbin/start"],
        workdir="/srv/it's here",
        user="www-data:33",
        hostname="web-1.example",
        network=Network("10.0.2.15/24", gateway="10.0.2.2", dns=["10.0.2.3", "2001:db8::1"]),
        volumes=[Volume("vdd", "/data"), Volume("/dev/vde", "/ref", "ro"), Volume("vdf", "/over", "overlay", "vdg")],
        init_mode="systemd",
        stop_signal="SIGRTMIN+3",
    )
    assert arrived(config, work)[1] == {
        "WORKDIR": "/srv/it's here",
        "RUN_AS": "www-data:33",
        "INIT_MODE": "systemd",
        "STOP_SIGNAL": "37",
        "GUEST_HOSTNAME": "web-1.example",
        "GUEST_IP": "10.0.2.15",
        "GUEST_CIDR": "24",
        "GUEST_GW": "10.0.2.2",
        "GUEST_DNS": "10.0.2.3 2001:db8::1",
        "VOLUME_MOUNTS": "vdd:/data:rw /dev/vde:/ref:ro vdf:/over:overlay:vdg",
    }


def test_what_only_the_kernel_would_refuse_is_refused_here() -> None:
    with pytest.raises(UsageError, match="together they take more"):
        GuestConfig(entrypoint=["x"] * 220_000)
    for user in ("4294967295", "0:4294967295", "99999999999"):
        with pytest.raises(UsageError, match=r"user: .* larger than 4294967294"):
            replace(RUN, user=user)
    assert replace(RUN, user="4294967294:4294967294").user


@pytest.mark.parametrize("path", ["/proc", "/proc/x", "//sys/", "/./dev/shm", "/dev"])
def test_no_volume_goes_where_the_kernels_file_systems_are(path: str) -> None:
    with pytest.raises(UsageError, match=r"volume\.path: .* none may be on or below"):
        Volume("data", path)
    assert Volume("data", "/process/dev")


def test_a_device_is_no_longer_than_a_serial_can_be() -> None:
    assert Volume("d" * 20, "/data")
    with pytest.raises(UsageError, match=r"volume\.device: .* at most 20 characters"):
        Volume("d" * 21, "/data")


def test_a_name_server_of_one_interface_is_refused() -> None:
    with pytest.raises(UsageError, match=r"network\.dns: .* interface"):
        Network("10.0.2.15/24", dns=["fe80::1%eth0"])


@pytest.mark.parametrize("words", [{"Cmd": ["/sbin/init"]}, {"Entrypoint": ["/usr/lib/systemd/systemd"]}])
def test_an_image_that_is_to_run_an_init_system_gets_it_as_pid_1(words: dict[str, list[str]]) -> None:
    assert GuestConfig.from_image({"config": words}).init_mode == "systemd"
    assert GuestConfig.from_image({"config": {"Cmd": ["/sbin/init", "--help"]}}).init_mode is None


def test_config_sh_is_what_it_is_documented_to_be() -> None:
    config = GuestConfig(entrypoint=["/bin/sh", "-c"], cmd=["echo it's"], environment={"A": ""}, workdir="/x")
    quote = "'\\''"
    assert config.script().decode() == (
        f"ENTRYPOINT='{quote}/bin/sh{quote} {quote}-c{quote}'\n"
        f"CMD='{quote}echo it{quote}\\{quote}{quote}s{quote}'\n"
        f"ENVIRONMENT='{quote}A={quote}'\n"
        "WORKDIR='/x'\n"
    )


def test_equal_configs_are_equal_bytes_in_whatever_containers() -> None:
    a = GuestConfig(entrypoint=["a"], cmd=("b",), environment={"X": "1", "Y": "2"})
    b = GuestConfig(entrypoint=("a",), cmd=["b"], environment={"X": "1", "Y": "2"})
    assert a == b
    assert a.script() == b.script()


def test_a_config_does_not_change_with_what_it_was_made_from() -> None:
    cmd, environment = ["a"], {"A": "1"}
    config = GuestConfig(cmd=cmd, environment=environment)
    cmd.append("b")
    environment["B"] = "2"
    assert config == GuestConfig(cmd=["a"], environment={"A": "1"})


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("entrypoint", {"entrypoint": "/bin/sh"}),
    ("entrypoint", {"entrypoint": [b"sh"]}),
    ("cmd", {"cmd": ["a\0b"]}),
    ("cmd", {"cmd": ["\ud800"]}),
    ("cmd", {"cmd": None}),
    ("environment", {"environment": {"": "x"}}),
    ("environment", {"environment": {"A=B": "x"}}),
    ("environment", {"environment": {"A\0": "x"}}),
    ("environment", {"environment": {"A": "x\0"}}),
    ("environment", {"environment": {"A": 1}}),
    ("environment", {"environment": {1: "x"}}),
    ("environment", {"environment": ["A=B"]}),
    ("workdir", {"workdir": "srv"}),
    ("workdir", {"workdir": "/srv/../etc"}),
    ("workdir", {"workdir": "/" + "x" * 4095}),
    ("user", {"user": "a:b:c"}),
    ("user", {"user": ":b"}),
    ("user", {"user": "a b"}),
    ("user", {"user": "root\n"}),
    ("user", {"user": 0}),
    ("hostname", {"hostname": "-a"}),
    ("hostname", {"hostname": "a_b"}),
    ("hostname", {"hostname": "a..b"}),
    ("hostname", {"hostname": "a\n"}),
    ("hostname", {"hostname": "a" * 65}),
    ("network", {"network": "10.0.2.15/24"}),
    ("volumes", {"volumes": "vdd:/data:rw"}),
    ("volumes", {"volumes": [Volume("vdd", "/a"), Volume("vde", "/a/")]}),
    ("init_mode", {"init_mode": "sysv"}),
    ("stop_signal", {"stop_signal": "SIGNAL"}),
    ("stop_signal", {"stop_signal": "0"}),
    ("stop_signal", {"stop_signal": "65"}),
    ("stop_signal", {"stop_signal": 15}),
]


@pytest.mark.parametrize(("field", "values"), WRONG, ids=lambda value: ascii(value)[:60])
def test_what_cannot_be_is_refused_with_the_fields_name(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: "):
        replace(RUN, **values)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("network.address", {"address": "10.0.2.15"}),
        ("network.address", {"address": "10.0.2.256/24"}),
        ("network.address", {"address": "10.0.2.15/33"}),
        ("network.address", {"address": "fd00::1/64"}),
        ("network.address", {"address": "10.0.2.15/24 x"}),
        ("network.address", {"address": 1}),
        ("network.gateway", {"address": "10.0.2.15/24", "gateway": "10.0.3.1"}),
        ("network.gateway", {"address": "10.0.2.15/24", "gateway": "gateway"}),
        ("network.dns", {"address": "10.0.2.15/24", "dns": ["dns.example"]}),
        ("network.dns", {"address": "10.0.2.15/24", "dns": "1.1.1.1"}),
    ],
)
def test_no_network_that_cannot_be_set_up(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: "):
        Network(**values)


def test_a_mask_may_be_given_in_place_of_a_prefix(work: Path) -> None:
    config = replace(RUN, network=Network("10.0.2.15/255.255.255.0"))
    assert arrived(config, work)[1] == {"GUEST_IP": "10.0.2.15", "GUEST_CIDR": "24"}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("volume.device", ("", "/a")),
        ("volume.device", ("vd:d", "/a")),
        ("volume.device", ("../vdd", "/a")),
        ("volume.device", ("vdd\n", "/a")),
        ("volume.path", ("vdd", "a")),
        ("volume.path", ("vdd", "/")),
        ("volume.path", ("vdd", "/a:b")),
        ("volume.path", ("vdd", "/a b")),
        ("volume.path", ("vdd", "/a\n")),
        ("volume.path", ("vdd", "/a/../b")),
        ("volume.path", ("vdd", "/a\0")),
        ("volume.mode", ("vdd", "/a", "wo")),
        ("volume.device", ("config", "/a")),
        ("volume.overlay_device", ("vdd", "/a", "overlay", "rootfs")),
        ("volume.overlay_device", ("vdd", "/a", "overlay")),
        ("volume.overlay_device", ("vdd", "/a", "ro", "vde")),
        ("volume.overlay_device", ("vdd", "/a", "overlay", "v e")),
    ],
)
def test_no_volume_that_cannot_be_mounted(field: str, values: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: "):
        Volume(*values)


@pytest.mark.parametrize(
    ("name", "number"),
    [("TERM", 15), ("SIGTERM", 15), ("15", 15), ("SIGQUIT", 3), ("WINCH", 28), ("RTMIN", 34), ("SIGRTMAX-2", 62)],
)
def test_signals_have_many_names(name: str, number: int) -> None:
    assert signal_number(name) == number


def test_signals_are_numbered_as_the_hosts_are() -> None:
    import signal

    for known in signal.Signals:
        if not known.name.startswith("SIGRT"):
            assert signal_number(known.name) == known.value


def test_a_config_without_anything_to_run_is_not_written() -> None:
    with pytest.raises(UsageError, match="nothing to run"):
        GuestConfig().script()
    assert GuestConfig(init_mode="systemd").script()


# --- images ---


def test_an_image_says_what_to_do() -> None:
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "User": "app:users",
            "Env": ["PATH=/app/bin:/bin", "EMPTY=", "EQUALS=a=b", "PATH=/bin"],
            "Entrypoint": ["/app/bin/serve"],
            "Cmd": ["--port", "80"],
            "WorkingDir": "/app",
            "StopSignal": "SIGQUIT",
            "ExposedPorts": {"80/tcp": {}},
            "Labels": {"a": "b"},
        },
    }
    assert GuestConfig.from_image(document) == GuestConfig(
        entrypoint=("/app/bin/serve",),
        cmd=("--port", "80"),
        environment={"PATH": "/bin", "EMPTY": "", "EQUALS": "a=b"},
        workdir="/app",
        user="app:users",
        stop_signal="SIGQUIT",
    )


@pytest.mark.parametrize(
    "document", [{}, {"config": None}, {"config": {}}, {"config": {"Entrypoint": None, "Env": None, "User": ""}}]
)
def test_an_image_may_say_nothing(document: dict[str, Any]) -> None:
    assert GuestConfig.from_image(document) == GuestConfig()


@pytest.mark.parametrize(("written", "meant"), [("1000:", "1000"), (":staff", "0:staff"), ("a:b", "a:b"), (":", "")])
def test_a_user_or_a_group_may_be_left_out(written: str, meant: str) -> None:
    assert GuestConfig.from_image({"config": {"User": written}}).user == meant


def test_a_relative_working_directory_is_below_the_root() -> None:
    assert GuestConfig.from_image({"config": {"WorkingDir": "app/x"}}).workdir == "/app/x"


@pytest.mark.parametrize(
    "document",
    [
        [],
        None,
        "config",
        {"config": []},
        {"config": "x"},
        {"config": {"Entrypoint": "/bin/sh"}},
        {"config": {"Entrypoint": {"a": "b"}}},
        {"config": {"Cmd": [1]}},
        {"config": {"Cmd": [["a"]]}},
        {"config": {"Cmd": ["a\0"]}},
        {"config": {"Cmd": ["\ud83d"]}},
        {"config": {"Env": {"A": "B"}}},
        {"config": {"Env": ["A"]}},
        {"config": {"Env": ["=A"]}},
        {"config": {"Env": ["A=" + "x" * (1 << 17)]}},
        {"config": {"WorkingDir": ["/"]}},
        {"config": {"WorkingDir": "/../etc"}},
        {"config": {"User": 1000}},
        {"config": {"User": 0}},
        {"config": {"Cmd": False}},
        {"config": {"User": "a\nb"}},
        {"config": {"StopSignal": "KILLALL"}},
        {"config": {"StopSignal": 9}},
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_a_broken_configuration_is_one_refusal(document: Any) -> None:
    with pytest.raises(SourceRefused, match=r"^here was refused: its configuration is broken"):
        GuestConfig.from_image(document, subject="here")


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(["Entrypoint", "Cmd", "Env", "WorkingDir", "User", "StopSignal"])


@given(st.one_of(json, st.dictionaries(st.just("config"), st.dictionaries(KEYS, json))))
def test_no_configuration_has_another_effect(document: Any) -> None:
    try:
        config = GuestConfig.from_image(document)
    except SourceRefused:
        return
    if config.entrypoint or config.cmd:
        assert config.script()

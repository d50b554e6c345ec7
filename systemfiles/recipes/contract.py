"""The guest contract, held against what the probe told: what is expected of each step, and what of a guest's end.

A function looks at the facts of one guest (`probe.facts`) and notes in the findings what is, and what is not, as it
should be. A fact that was not told is something that was not seen.

Source: the head of the init script.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

from systemfiles.recipes import probe
from systemfiles.recipes.accounts import Account, find_account
from systemfiles.recipes.bootreport import ENDING, Findings
from systemfiles.recipes.console import Outcome
from systemfiles.recipes.guestconfig import GuestConfig
from systemfiles.recipes.probe import Probe

Facts = Mapping[str, str]

_MOUNTS = {"/proc": "proc", "/sys": "sysfs", "/dev": "devtmpfs", "/dev/pts": "devpts", "/dev/shm": "tmpfs"}
_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"}
_CLOCK = re.compile(r"(\d{1,9}\.\d{2}) (\d{1,11})")
_TICKS = 100  # of a second: USER_HZ, in which /proc tells of time

_STEP_OF_ERROR = (
    (1, r"cannot mount /proc, /sys and /dev|cannot fill /dev|cannot load module"),
    (2, r"missing disk:.*\b(rootfs|overlay|config)\b"),
    (3, r"cannot mount the (rootfs|overlay) disk|cannot write the overlay disk|cannot lay the overlay disk"),
    (3, r"cannot enter the root"),
    (4, r"cannot mount the config disk|no config\.sh|config\.sh is broken|nothing to run|bad ENVIRONMENT"),
    (5, r"cannot set|cannot give|cannot route|missing network device|bad GUEST_|cannot be called"),
    (5, r"cannot (write|replace|make) /etc"),
    (6, r"missing disk|bad volume|[^(]*\bvolume\b"),
    (7, r"cannot (mount|make) the image's"),
    (9, r"bad INIT_MODE|(entrypoint|cannot run entrypoint) /sbin/init"),
)


def step_of_error(error: str) -> int:
    """The step in which init fails with this line."""
    return next((step for step, pattern in _STEP_OF_ERROR if re.match(pattern, error)), 8)


def init_seconds(facts: Facts) -> float | None:
    """From init's start to the probe's, by the guest's clock."""
    times = _CLOCK.fullmatch(facts.get("clock", ""))
    return float(times[1]) - int(times[2]) / _TICKS if times else None


def check_any(findings: Findings, facts: Facts, modules: Iterable[str], disks: Iterable[str]) -> None:
    """What holds in the guest of any image; `disks` are the serials of those there are."""
    _check_kernel_file_systems(findings, facts, modules)
    seen = set(facts.get("serials", "").split(";"))
    findings.expect(2, "disks by their serials", "all", _all_or_missing(set(disks), seen))
    findings.expect(3, "what is mounted on /", "overlay", _mounts(facts).get("/"))
    findings.expect(8, "the session, which is its own", facts.get("pid"), facts.get("session", "").removesuffix(";"))
    for name, target in _LINKS.items():
        findings.expect(7, f"where /dev/{name} leads", target, facts.get(f"link-{name}", "").removesuffix(";"))
    findings.expect(7, "/dev/stdout", "opened", facts.get("stdout"))


def check_network(findings: Findings, facts: Facts, told: str) -> None:
    """`told` is what the server says."""
    network = probe.NETWORK
    address = facts.get("address", "")
    for device, wanted in (("lo", "127.0.0.1/8"), ("eth0", network.address)):
        found = re.search(rf"\b{device} +inet ([0-9./]+)", address)
        findings.expect(5, f"the address of {device}", wanted, found[1] if found else None)
    route = f"default via {network.gateway} dev eth0"
    findings.expect(5, "routes", route, route if route in facts.get("routes", "") else facts.get("routes"))
    findings.expect(5, "the host's name", probe.HOSTNAME, facts.get("hostname", "").removesuffix(";"))
    findings.expect(4, "the host's name, which config.sh has", probe.HOSTNAME, facts.get("hostname", "")[:-1])
    findings.expect(5, "/etc/hostname", f"{probe.HOSTNAME};", facts.get("etc-hostname"))
    localhost = next((line for line in facts.get("hosts", "").split(";") if "localhost" in line.split()), None)
    findings.expect(5, "a line for localhost in /etc/hosts", localhost or "one", localhost)
    servers = "".join(f"nameserver {server};" for server in network.dns)
    findings.expect(5, "/etc/resolv.conf", servers, facts.get("resolv.conf"))
    findings.expect(5, "what a server on the host answers", told, facts.get("fetched"))


def check_full(findings: Findings, facts: Facts, asked: Probe, config: GuestConfig) -> None:
    """What only the guest with everything can tell; all but its disks."""
    words = _words(facts.get("cmdline"))
    findings.expect(4, "a word that config.sh has", asked.nonce, words[2].decode(errors="replace") if words[2:] else "")
    for volume in probe.VOLUMES:
        was, now = (facts.get(f"{when}-{volume.device}") for when in ("was", "now"))
        as_delivered = f"{probe.AS_DELIVERED};"
        findings.expect(6, f"what is on a volume ({volume.mode})", as_delivered, was)
        changed = as_delivered if volume.mode == "ro" else f"changed by {asked.nonce};"
        findings.expect(6, f"what is on a volume ({volume.mode}) after writing to it", changed, now)
    expected = [b"/bin/sh", b"/bin/probe", *map(_encoded, [*config.entrypoint[1:], *config.cmd])]
    _expect_words(findings, "word", expected, words)
    environment = [_encoded(f"{name}={value}") for name, value in config.environment.items()]
    _expect_words(findings, "variable", sorted(environment), sorted(_words(facts.get("environ"))))
    findings.expect(8, "the working directory", f"{config.workdir};", facts.get("directory"))
    _check_ids(findings, facts, 0, 0, probe.ROOTS_GROUPS)
    findings.expect(8, "processes that ended and were not reaped", "none", facts.get("zombies") or "none")
    for signal in ("INT", "TERM"):
        findings.expect(8, f"{signal} as sent to init", "received", facts.get(f"signal-{signal}"))


def check_user(findings: Findings, facts: Facts, asked: Probe) -> None:
    """What the guest that runs as somebody tells."""
    _check_ids(findings, facts, probe.UID, probe.GID, probe.GROUPS)
    home = f"HOME=/home/{probe.USER}".encode()
    _expect_words(findings, "variable", [home, b"PATH=/bin"], sorted(_words(facts.get("environ"))))
    findings.expect(8, "the working directory", "/;", facts.get("directory"))
    findings.expect(3, "a file that the first boot wrote", f"{asked.nonce};", facts.get("kept"))


def check_image(findings: Findings, facts: Facts, config: GuestConfig) -> None:
    """What an image's own configuration says of its guest."""
    arrived = _words(facts.get("environ"))
    said = [_encoded(f"{name}={value}") for name, value in config.environment.items()]
    account = _account(facts, config.user)
    defaults = [word for word in arrived if word not in said and word.startswith((b"HOME=", b"PATH="))]
    if account and "HOME" not in config.environment:
        home = next((os.fsdecode(word) for word in defaults if word.startswith(b"HOME=")), None)
        findings.expect(8, "the home directory", f"HOME={account.home}", home)
    _expect_words(findings, "variable", sorted([*said, *defaults]), sorted(arrived))
    directory = config.workdir or "/"
    findings.expect(8, "the working directory", directory, facts.get("workdir", facts.get("directory")))
    if account:
        _check_ids(findings, facts, account.uid, account.gid, account.groups)
    findings.expect(6, f"what is mounted on {probe.PLACE}", "ext4", _mounts(facts).get(probe.PLACE))


def check_systemd(findings: Findings, facts: Facts, asked: Probe) -> None:
    """What the guest tells whose PID 1 is the image's."""
    findings.expect(9, "the PID of the image's /sbin/init", "1", facts.get("pid"))
    findings.expect(9, "what is mounted on /", "overlay", _mounts(facts).get("/"))
    word = f"NONCE={asked.nonce}".encode()
    arrived = word in _words(facts.get("environ"))
    findings.expect(9, "a variable of its environment", word.decode(), word.decode() if arrived else None)


def check_ending(findings: Findings, outcome: Outcome, status: int | None) -> None:
    """Whether the guest ended as it should: told the status, which is `status` unless that is None, and was off."""
    findings.expect(ENDING, "the kernel", "no panic", outcome.panic or "no panic")
    findings.expect(ENDING, "the machine", "switched off", outcome.ending)
    told = None if outcome.exit is None else f"systemfiles: exit {outcome.exit}"
    wanted = told or "systemfiles: exit <status>" if status is None else f"systemfiles: exit {status}"
    findings.expect(ENDING, "the last line of init", wanted, told)


def _check_kernel_file_systems(findings: Findings, facts: Facts, modules: Iterable[str]) -> None:
    mounts = _mounts(facts)
    wanted = _MOUNTS | ({"/sys/fs/cgroup": "cgroup2"} if "cgroup2" in facts.get("filesystems", "") else {})
    for directory, kind in wanted.items():
        findings.expect(1, f"what is mounted on {directory}", kind, mounts.get(directory))
    findings.expect(1, "the mode of /dev/shm", "1777;", facts.get("shm"))
    loaded = set(facts.get("modules", "").split(";"))
    findings.expect(1, "modules of /etc/modules", "all", _all_or_missing(set(modules), loaded))


def _check_ids(findings: Findings, facts: Facts, uid: int, gid: int, groups: Iterable[int]) -> None:
    """The real, effective, saved and file system's numbers; `groups` are the supplementary ones."""
    expected = {"Uid": {uid}, "Gid": {gid}, "Groups": groups}
    for name, numbers in expected.items():
        found = re.search(rf"\b{name}:([\s\d]*)", facts.get("ids", ""))
        wanted = " ".join(sorted(map(str, numbers)))
        findings.expect(8, f"its {name.lower()}", wanted, " ".join(sorted({*found[1].split()})) if found else None)


def _account(facts: Facts, user: str) -> Account | None:
    """None where the probe could not read /etc/passwd or /etc/group."""
    if "passwd" not in facts or "group" not in facts:
        return None
    passwd, group = (os.fsdecode(_bytes(facts[name])) for name in ("passwd", "group"))
    return find_account(user, passwd, group)


def _mounts(facts: Facts) -> dict[str, str]:
    """By directory, what is mounted there last."""
    pairs = (line.partition(" ") for line in facts.get("mounts", "").split(";"))
    return {directory: kind for directory, _, kind in pairs}


def _all_or_missing(wanted: set[str], seen: set[str]) -> str:
    return f"all but {', '.join(sorted(wanted - seen))}" if wanted - seen else "all"


def _words(told: str | None) -> list[bytes]:
    """Of a file in /proc that ends each of them with NUL."""
    data = _bytes(told)
    return data.removesuffix(b"\0").split(b"\0") if data else []


def _bytes(told: str | None) -> bytes:
    try:
        return bytes.fromhex(told or "")
    except ValueError:
        return b""


def _expect_words(findings: Findings, what: str, expected: Sequence[bytes], seen: Sequence[bytes]) -> None:
    """The first that differs is enough to tell."""
    for number, (wanted, got) in enumerate(zip_longest(expected, seen)):
        if wanted != got:
            findings.expect(
                8, f"{what} {number}, byte for byte", *(None if part is None else repr(part) for part in (wanted, got))
            )
            return
    findings.expect(8, f"{what}s", len(expected), len(seen))


def _encoded(word: str) -> bytes:
    return word.encode("utf-8", "surrogateescape")

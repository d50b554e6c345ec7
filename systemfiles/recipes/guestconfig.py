"""What a guest should do, and config.sh, which tells it to the init script.

config.sh is a list of assignments, read by the guest's shell (busybox ash). Whatever can hold more than plain digits is
in single quotes, in which a shell changes nothing; a single quote itself is written `'\\''`::

    ENTRYPOINT='<list>'                  these three are always there; a list is made of words between spaces, each
    CMD='<list>'                         quoted once more, so that `eval "set -- $CMD"` gives the words back
    ENVIRONMENT='<list>'                 NAME=VALUE words, each name once
    WORKDIR='/path'                      the others only where they say something
    RUN_AS='user[:group]'                names or numbers, to be looked up in the image
    INIT_MODE='systemd'                  the image's /sbin/init becomes PID 1
    STOP_SIGNAL=15                       by its number; what the entrypoint wants in place of TERM
    GUEST_HOSTNAME='name'
    GUEST_IP='10.0.2.15'                 with GUEST_CIDR=24, the length of its prefix
    GUEST_GW='10.0.2.2'
    GUEST_DNS='10.0.2.3 1.1.1.1'         addresses between spaces
    VOLUME_MOUNTS='vdd:/data:rw vde:/ref:overlay:vdf'
                                         device:path:mode[:overlay device] between spaces; a device by its name,
                                         path or virtio serial; ro, rw, or overlay, whose changes the overlay
                                         device takes

It is UTF-8, foreign bytes as they came (surrogate escapes in Python's text), and never holds NUL.

Sources: the head of the init script; OCI image-spec, config.md.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn, get_args

from systemfiles.foundation.errors import SourceRefused, UsageError

_WORD_MAX = (128 << 10) - 1  # MAX_ARG_STRLEN without the NUL: no program can be given more
_WORDS_MAX = 1 << 20
_POINTER = 8  # bytes; the kernel counts one for each word (fs/exec.c, bprm_stack_limits)
_INITS = ("/sbin/init", "/usr/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd")
_PATH_MAX = 4095
_HOSTNAME = re.compile(
    r"(?=.{1,64}\Z)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
_USER = re.compile(r"[^\s:\0]+(:[^\s:\0]+)?")
_DEVICE = re.compile(r"(/dev/)?[A-Za-z0-9][A-Za-z0-9_.-]{0,19}")  # VIRTIO_BLK_ID_BYTES
_OWN_DISKS = ("rootfs", "overlay", "config")
_OWNER_MAX = (1 << 32) - 2  # the largest number means nobody in particular
_KERNELS = ("proc", "sys", "dev")
_SIGNAL = re.compile(r"(?:SIG)?(?:([A-Z0-9]+?)|RTMIN\+([0-9]{1,2})|RTMAX-([0-9]{1,2}))")
_NAMES = (
    "HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT "
    "CHLD CONT STOP TSTP TTIN TTOU URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS"
)
_SIGNALS = {name: number for number, name in enumerate(_NAMES.split(), 1)} | {"RTMIN": 34, "RTMAX": 64}

VolumeMode = Literal["ro", "rw", "overlay"]
InitMode = Literal["systemd"]


@dataclass(frozen=True, slots=True)
class Network:
    """The address of eth0 with the length of its prefix ("10.0.2.15/24"), the default gateway, and name servers.

    Raises UsageError, naming what is wrong.
    """

    address: str
    gateway: str | None = None
    dns: Sequence[str] = ()

    def __post_init__(self) -> None:
        address, slash, _ = _text(self.address, "network.address").partition("/")
        if not slash:
            _refuse("network.address", f"{self.address!r} does not say how long its prefix is")
        _ip(address, "network.address")
        try:
            interface = ipaddress.IPv4Interface(self.address)
        except ValueError as error:
            _refuse("network.address", str(error))
        if self.gateway is not None and _ip(self.gateway, "network.gateway") not in interface.network:
            _refuse("network.gateway", f"{self.gateway} is not in {interface.network}")
        object.__setattr__(self, "dns", _words(self.dns, "network.dns"))
        for server in self.dns:
            try:
                ipaddress.ip_address(server)
            except ValueError as error:
                _refuse("network.dns", str(error))
            if "%" in server:
                _refuse("network.dns", f"{server!r} names an interface of this host")

    def assignments(self) -> dict[str, str]:
        address, _, _ = self.address.partition("/")
        prefix = ipaddress.IPv4Interface(self.address).network.prefixlen
        said = {"GUEST_IP": quoted(address), "GUEST_CIDR": str(prefix)}
        if self.gateway is not None:
            said["GUEST_GW"] = quoted(self.gateway)
        if self.dns:
            said["GUEST_DNS"] = quoted(" ".join(self.dns))
        return said


@dataclass(frozen=True, slots=True)
class Volume:
    """A disk to be mounted on `path` in the image's root. With the mode "overlay" it is only read, and
    `overlay_device` takes what changes. Raises UsageError, naming what is wrong."""

    device: str
    path: str
    mode: VolumeMode = "rw"
    overlay_device: str | None = None

    def __post_init__(self) -> None:
        for name, device in (("device", self.device), ("overlay_device", self.overlay_device)):
            if device is not None and not _DEVICE.fullmatch(_text(device, f"volume.{name}")):
                _refuse(f"volume.{name}", f"{device!r:.100} is no name of a device, or serial of at most 20 characters")
            if device in _OWN_DISKS:
                _refuse(f"volume.{name}", f"{device!r} is the serial of one of the guest's own disks")
        _absolute(self.path, "volume.path")
        if ":" in self.path or self.path.split() != [self.path] or not self.path.strip("/"):
            _refuse("volume.path", f"{self.path!r} is the root, or has a colon or a space in it")
        if next(part for part in self.path.split("/") if part not in ("", ".")) in _KERNELS:
            _refuse("volume.path", f"{self.path!r} is the kernel's: none may be on or below /proc, /sys and /dev")
        if self.mode not in get_args(VolumeMode):
            _refuse("volume.mode", f"{self.mode!r} is none of {', '.join(get_args(VolumeMode))}")
        if (self.mode == "overlay") != (self.overlay_device is not None):
            _refuse("volume.overlay_device", "it goes with the mode overlay, and that with it")

    def __str__(self) -> str:
        return ":".join(filter(None, (self.device, self.path, self.mode, self.overlay_device)))


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """Everything that the config disk says. The command line is `entrypoint` and then `cmd`.

    `environment` is the entrypoint's, and has PATH and HOME by default. `user` is "user[:group]", each a name or a
    number. `stop_signal` is a name or a number too. Raises UsageError, naming the field that is wrong.
    """

    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    workdir: str = ""
    user: str = ""
    hostname: str = ""
    network: Network | None = None
    volumes: Sequence[Volume] = ()
    init_mode: InitMode | None = None
    stop_signal: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "entrypoint", _words(self.entrypoint, "entrypoint"))
        object.__setattr__(self, "cmd", _words(self.cmd, "cmd"))
        object.__setattr__(self, "environment", _variables(self.environment))
        object.__setattr__(self, "volumes", tuple(self.volumes))
        if self.network is not None and not isinstance(self.network, Network):
            _refuse("network", f"{self.network!r:.100} is no Network")
        if not all(isinstance(volume, Volume) for volume in self.volumes):
            _refuse("volumes", "not each of them is a Volume")
        words = (*self.entrypoint, *self.cmd, *self._assignments())
        if sum(len(_encoded(word)) + 1 + _POINTER for word in words) > _WORDS_MAX:
            _refuse("entrypoint, cmd and environment", f"together they take more than {_WORDS_MAX} bytes")
        for name in ("workdir", "user", "hostname", "stop_signal"):
            _text(getattr(self, name), name)
        if self.workdir:
            _absolute(self.workdir, "workdir")
        if self.user and not _USER.fullmatch(self.user):
            _refuse("user", f"{self.user!r} is no user, nor a user and a group with a colon between them")
        if any(part.isdecimal() and int(part) > _OWNER_MAX for part in self.user.split(":")):
            _refuse("user", f"{self.user!r} has a number that is larger than {_OWNER_MAX}")
        if self.hostname and not _HOSTNAME.fullmatch(self.hostname):
            _refuse("hostname", f"{self.hostname!r} is none")
        if self.init_mode not in (None, *get_args(InitMode)):
            _refuse("init_mode", f"{self.init_mode!r} is none of {', '.join(get_args(InitMode))}")
        if len({volume.path.rstrip("/") for volume in self.volumes}) < len(self.volumes):
            _refuse("volumes", "two of them have the same path")
        if self.stop_signal:
            signal_number(self.stop_signal)

    @classmethod
    def from_image(cls, config: Mapping[str, object], *, subject: str = "the image") -> GuestConfig:
        """What an image's configuration (image-spec, config.md; the whole document) says.

        One whose command line is nothing but the path of an init system is for `init_mode` systemd.
        Raises SourceRefused for one that breaks its format, or that no guest could do.
        """
        try:
            return cls(**_from_image(config))  # type: ignore[arg-type]  # every value is checked there
        except UsageError as error:
            raise SourceRefused(subject, f"its configuration is broken ({error.summary})") from error

    def script(self) -> bytes:
        """config.sh. Raises UsageError when there is nothing to run."""
        if not (self.entrypoint or self.cmd or self.init_mode):
            _refuse("entrypoint and cmd", "both are empty, so there is nothing to run")
        said = {name: quoted(listed(words)) for name, words in self._lists().items()}
        texts = {"WORKDIR": self.workdir, "RUN_AS": self.user, "INIT_MODE": self.init_mode}
        said |= {name: quoted(text) for name, text in texts.items() if text}
        if self.stop_signal:
            said["STOP_SIGNAL"] = str(signal_number(self.stop_signal))
        if self.hostname:
            said["GUEST_HOSTNAME"] = quoted(self.hostname)
        if self.network:
            said |= self.network.assignments()
        if self.volumes:
            said["VOLUME_MOUNTS"] = quoted(" ".join(map(str, self.volumes)))
        return _encoded("".join(f"{name}={value}\n" for name, value in said.items()))

    def _lists(self) -> dict[str, Iterable[str]]:
        return {"ENTRYPOINT": self.entrypoint, "CMD": self.cmd, "ENVIRONMENT": self._assignments()}

    def _assignments(self) -> tuple[str, ...]:
        return tuple(f"{name}={value}" for name, value in self.environment.items())


def quoted(word: str) -> str:
    """`word` for a POSIX shell, whatever is in it."""
    return "'" + word.replace("'", "'\\''") + "'"


def listed(words: Iterable[str]) -> str:
    """`words` as a shell takes them after `set --`."""
    return " ".join(map(quoted, words))


def signal_number(name: str) -> int:
    """The number of a signal on Linux: "15", "TERM", "SIGTERM", "SIGRTMIN+3". Raises UsageError."""
    told = _SIGNAL.fullmatch(_text(name, "stop_signal"))
    if not told:
        number = 0
    elif told[1]:
        number = int(told[1]) if told[1].isdecimal() else _SIGNALS.get(told[1], 0)
    else:
        number = 34 + int(told[2]) if told[2] else 64 - int(told[3])
    if not 0 < number <= 64:
        _refuse("stop_signal", f"{name!r:.100} is no signal")
    return number


def _from_image(document: Mapping[str, object]) -> dict[str, object]:
    said = document.get("config") if isinstance(document, Mapping) else ""
    if said is not None and not isinstance(said, Mapping):
        _refuse("config", "it is no JSON object")
    config = {key: value for key, value in (said or {}).items() if value is not None}
    workdir, user = (_text(config.get(key, ""), key) for key in ("WorkingDir", "User"))
    environment = {}
    for variable in _words(config.get("Env", ()), "Env"):
        name, equals, value = variable.partition("=")
        if not equals:
            _refuse("Env", f"{variable!r:.100} is no NAME=VALUE")
        environment[name] = value
    # ":group" is root with that group, and "user:" the user alone
    who = user.removesuffix(":")
    entrypoint, cmd = (_words(config.get(key, ()), key) for key in ("Entrypoint", "Cmd"))
    return {
        "entrypoint": entrypoint,
        "cmd": cmd,
        "init_mode": "systemd" if len(words := (*entrypoint, *cmd)) == 1 and words[0] in _INITS else None,
        "environment": environment,
        "workdir": f"/{workdir}" if workdir and not workdir.startswith("/") else workdir,
        "user": f"0{who}" if who.startswith(":") else who,
        "stop_signal": _text(config.get("StopSignal", ""), "StopSignal"),
    }


def _words(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        _refuse(name, "it is no list of words")
    return tuple(_text(word, name) for word in value)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        _refuse(name, f"{value!r:.100} is no text")
    if "\0" in value:
        _refuse(name, f"{value!r:.100} has a NUL in it, which no program can be given")
    try:
        size = len(_encoded(value))
    except UnicodeEncodeError:
        _refuse(name, f"{value!r:.100} is no Unicode")
    if size > _WORD_MAX:
        _refuse(name, f"a word of {size} bytes is longer than the {_WORD_MAX} that the kernel passes on")
    return value


def _variables(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping):
        _refuse("environment", "it does not map names to values")
    for name, told in value.items():
        if not _text(name, "environment") or "=" in name:
            _refuse("environment", f"{name!r:.100} is no name of a variable")
        _text(f"{name}={_text(told, 'environment')}", "environment")
    return dict(value)


def _absolute(path: str, name: str) -> None:
    if not _text(path, name).startswith("/") or ".." in path.split("/") or len(_encoded(path)) > _PATH_MAX:
        _refuse(name, f"{path!r:.100} is no absolute path without .., of {_PATH_MAX} bytes at most")


def _ip(text: str, name: str) -> ipaddress.IPv4Address:
    try:
        return ipaddress.IPv4Address(_text(text, name))
    except ValueError as error:
        _refuse(name, str(error))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _refuse(name: str, problem: str) -> NoReturn:
    msg = f"{name}: {problem}"
    raise UsageError(msg)

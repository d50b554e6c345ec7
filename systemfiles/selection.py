"""Which kernels and initrds a command line asks for: doit's variables, checked, and the targets they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import Catalog, Profile
from systemfiles.foundation.errors import UsageError
from systemfiles.provision.provisioner import Provisioner

T = TypeVar("T")

VARIABLES = {
    "profile": "which pair of defaults; without it the catalog's default_profile",
    "kernel": "another kernel than the profile's",
    "initrd": "another initrd than the profile's",
    "arch": "architectures, separated by commas; without it this host's",
    "data_dir": "where everything is kept; without it $SYSTEMFILES_DATA_DIR, else /var/lib/systemfiles",
    "all": "yes: every profile of the catalog",
    "image": "what `doit boot` boots, an image of the content store; without it one that only looks around",
    "accel": "kvm: `doit boot` uses this host's KVM instead of emulating (tcg)",
    "tests": "yes: `doit setup` also installs what the tests need",
    "full": "yes: `doit test` runs the long campaigns whole, for hours, instead of a sample",
}
_SWITCHES = ("all", "tests", "full")


class Target(NamedTuple):
    """A kernel to provide for one architecture, and the initrd to go with it unless only the kernel was asked for."""

    kernel: str
    initrd: str | None
    arch: Arch


def check_variables(variables: Mapping[str, str]) -> None:
    """Refuses names that do not exist and values that cannot be meant. Raises UsageError."""
    unknown = [name for name in variables if name not in VARIABLES]
    if unknown:
        msg = f"there is no variable {', '.join(map(repr, unknown))}"
        raise UsageError(msg, details=VARIABLES.items())
    for name, what in (("data_dir", "directory"), ("image", "image")):
        if variables.get(name) == "":
            msg = f"{name}= names no {what}"
            raise UsageError(msg)
    if variables.get("accel", "tcg") not in ("tcg", "kvm"):
        msg = f"accel={variables['accel']} is neither accel=tcg nor accel=kvm"
        raise UsageError(msg)
    for name in _SWITCHES:
        if variables.get(name, "no") not in ("yes", "no"):
            msg = f"{name}={variables[name]} is neither {name}=yes nor {name}=no"
            raise UsageError(msg)


def select(variables: Mapping[str, str], catalog: Catalog, provisioner: Provisioner) -> tuple[Target, ...]:
    """The targets that the variables ask for, each once.

    Raises UnknownVersion, UnsupportedArch, InvalidName before any work is done.
    """
    every_profile = variables.get("all") == "yes"
    profiles = catalog.profile.values() if every_profile else [catalog.find_profile(variables.get("profile"))]
    arches = [*map(Arch.parse, variables.get("arch", Arch.host().value).split(","))]
    targets = unique(_target(variables, profile, arch, provisioner) for arch in arches for profile in profiles)
    for target in targets:
        provisioner.require_known(*target)
    return targets


def select_all(variables: Mapping[str, str], catalog: Catalog, provisioner: Provisioner) -> tuple[Target, ...]:
    """What a release is made of: as `select`, but where the variables leave it open, everything for all architectures.

    That is each profile's pair, and each other kernel of the catalog. Raises as `select`.
    """
    named = {"profile", "kernel", "initrd"} & variables.keys()
    arches = variables.get("arch", ",".join(map(str, Arch)))
    pairs = select({**variables, "arch": arches, **({} if named else {"all": "yes"})}, catalog, provisioner)
    if named:
        return pairs
    known = {(target.kernel, target.arch) for target in pairs}
    kernels = [(name, arch) for name, entry in catalog.kernel.items() for arch in map(Arch.parse, arches.split(","))]
    others = [
        Target(name, None, arch)
        for name, arch in kernels
        if arch in catalog.kernel[name].arches and (name, arch) not in known
    ]
    return (*pairs, *others)


def _target(variables: Mapping[str, str], profile: Profile, arch: Arch, provisioner: Provisioner) -> Target:
    """What the variables ask for: kernel= alone is that kernel, initrd= alone that initrd and its own kernel."""
    kernel, initrd = variables.get("kernel"), variables.get("initrd")
    alone = "profile" not in variables and "all" not in variables
    if kernel is not None and initrd is None and alone:
        return Target(kernel, None, arch)
    if initrd is not None and kernel is None and alone:
        kernel = provisioner.initrds.kernel_of(initrd, arch)
    return Target(profile.kernel if kernel is None else kernel, profile.initrd if initrd is None else initrd, arch)


def unique(items: Iterable[T]) -> tuple[T, ...]:
    """The items in their order, each once."""
    return tuple(dict.fromkeys(items))

"""The two guest architectures, and what everyone else calls them."""

from __future__ import annotations

import enum
import os

from systemfiles.foundation.errors import UnsupportedArch


class Arch(enum.Enum):
    """A guest architecture under its kernel (`uname -m`) name, the only spelling that is ever stored."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"

    @classmethod
    def parse(cls, name: str) -> Arch:
        """The architecture called `name`: the kernel's or the distributions' spelling, in any case.

        Raises UnsupportedArch.
        """
        try:
            return _SPELLINGS[name.strip().lower()]
        except KeyError:
            raise UnsupportedArch(name, supported=tuple(_SPELLINGS)) from None

    @classmethod
    def host(cls) -> Arch:
        """The architecture this process runs on. Raises UnsupportedArch."""
        return cls.parse(os.uname().machine)

    @property
    def debian(self) -> str:
        """Debian's name; OCI platforms use the same one (image-spec, `platform.architecture`)."""
        return {"x86_64": "amd64", "aarch64": "arm64"}[self.value]

    @property
    def kernel_file(self) -> str:
        """File name of a kernel: an uncompressed ELF on x86_64, a raw `Image` on aarch64."""
        return {"x86_64": "vmlinux", "aarch64": "Image"}[self.value]

    def __str__(self) -> str:
        return self.value


def is_arch(name: str) -> bool:
    """Whether `Arch.parse` knows `name`."""
    return name.strip().lower() in _SPELLINGS


_SPELLINGS = {
    "x86_64": Arch.X86_64,
    "amd64": Arch.X86_64,
    "aarch64": Arch.AARCH64,
    "arm64": Arch.AARCH64,
}

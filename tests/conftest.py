"""What all tests share: an environment without the operator's settings, and files that were really provisioned."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from systemfiles import BootFiles, SystemFiles
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.layout import Layout
from systemfiles.foundation.paths import Paths

CHECKOUT = Path(__file__).parent.parent
ARCHES = ("x86_64", "aarch64")

for variable in ("DATA_DIR", "CATALOG", "MIRRORS", "REGISTRY", "DATABASE_URL", "CREDENTIALS"):
    os.environ.pop(f"SYSTEMFILES_{variable}", None)


@dataclass(frozen=True)
class Provisioned:
    """A data directory that `doit profile=debian arch=x86_64,aarch64` filled. Read it; copy it to change it."""

    data_dir: Path

    def boot_files(self, arch: str) -> BootFiles:
        return SystemFiles(self.data_dir, profile="debian", arch=arch).resolve()

    def busybox(self, arch: str) -> bytes:
        """The static busybox of the content store."""
        layout = Layout(Paths(self.data_dir))
        (target,) = (
            target
            for name, target in layout.names().items()
            if name.startswith("busybox-static-") and name.endswith(arch)
        )
        (layer,) = layout.read_json(target.digest)["layers"]
        with tarfile.open(layout.blob(Descriptor.from_json(layer).digest)) as tar:
            binary = tar.extractfile("bin/busybox")
            assert binary is not None
            return binary.read()


def doit(*words: str, cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    """Runs doit in the checkout as an operator would."""
    return subprocess.run(
        [sys.executable, "-m", "doit", *words], cwd=cwd, check=False, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="session")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Provisioned:
    """One data directory for the whole run; with several workers one provisions and the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    data_dir = base / "provisioned"
    done = doit("profile=debian", f"arch={','.join(ARCHES)}", f"data_dir={data_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    return Provisioned(data_dir)

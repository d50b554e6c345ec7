"""`doit bench`: what the hot paths cost, each beside a well-known program that ran in the same minute.

Prints one table and ends with status 0 whatever the figures are. It provisions the `debian` profile into a temporary
directory first, and removes all it made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from io import FileIO
from pathlib import Path
from statistics import median

import fetches
import guest
import holds
import hosts
from measure import HEAD, Row, alternate, calls, compared, process, row
from trees import make_tree, walk

from systemfiles import SystemFiles
from systemfiles.content.artifacts import MODULES, RECORD
from systemfiles.foundation import cpio
from systemfiles.recipes.initrd import InitrdBuild, build_initrd

CHECKOUT = Path(__file__).parent.parent.parent
PROFILE = "debian"
TOOLS = ("cpio", "find", "gzip", "sh", *fetches.TOOLS, *guest.TOOLS)
HEAVY = ("doit", "elftools", "libarchive", "pydantic", "requests", "tqdm")
QUICK, SLOW = 15, 7  # rounds

BARE = (sys.executable, "-c", "pass")
JSON = (sys.executable, "-c", "import json")
LOADED = "import sys; from systemfiles import SystemFiles; print(*sys.modules, sep='\\n')"
ARCHIVE = "find . | cpio -o -H newc --quiet"
IDLE_DODO = "def task_idle():\n    return {'actions': [], 'uptodate': [True]}\n"


class Bench:
    """One provisioned data directory, and all that is measured with it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.data_dir = work / "data"
        # as an installed package has it: compiled once, whatever this shell says
        self.environ = os.environ | {"PYTHONPYCACHEPREFIX": str(work / "pycache"), "LC_ALL": "C.UTF-8"}
        self.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        words = [sys.executable, "-m", "doit", f"profile={PROFILE}", f"data_dir={self.data_dir}"]
        self.doit = process(words, self.environ, cwd=CHECKOUT)
        self.doit()
        self.system = SystemFiles(self.data_dir, profile=PROFILE)
        self.files = self.system.resolve()

    def rows(self) -> Iterator[Row]:
        """All that is measured, the quickest first."""
        yield from self._imports()
        yield from self._in_process()
        yield from self._paths()
        yield self._idle_doit()
        yield from self._cpio()
        yield from self._initrd()
        yield from fetches.rows(self.work, self.environ)
        yield from hosts.rows(self.work, self.environ, self.files.kernel.path)
        yield from guest.rows(self.work, self.environ)
        yield from holds.rows(self.work)

    def _imports(self) -> Iterator[Row]:
        for what in ("import systemfiles", "from systemfiles import SystemFiles"):
            ours = process([sys.executable, "-c", what], self.environ)
            cost = alternate(ours, process(BARE, self.environ), rounds=QUICK)
            above = cost.difference * 1e3
            yield row(what, cost, "python -c pass", f"≤ 40 ms above it, is {above:.1f}", above <= 40)
        loaded = subprocess.run([sys.executable, "-c", LOADED], env=self.environ, check=True, capture_output=True)
        heavy = sorted({*HEAVY} & {*loaded.stdout.decode().split()})
        found = ", ".join(heavy) or "none"
        yield Row("heavy modules imported by that", found, "", "", f"none of {', '.join(HEAVY)}", not heavy)

    def _in_process(self) -> Iterator[Row]:
        kernel, initrd = (part.version for part in self.files)
        paths = [part.path for part in self.files]
        records = [path.with_name(RECORD) for path in paths]

        def resolve() -> object:
            return self.system.resolve(kernel, initrd)

        def resolve_anew() -> object:
            return SystemFiles(self.data_dir).resolve(kernel, initrd)

        def by_hand() -> object:
            return [json.loads(path.read_bytes()) for path in records], [path.stat() for path in paths]

        two = "json.loads and os.stat of the same two"
        for what, function in (("resolve, a pair", resolve), ("resolve, a pair, with a new SystemFiles", resolve_anew)):
            cost = alternate(calls(function, count=200), calls(by_hand, count=200), rounds=QUICK)
            yield row(what, cost, two, "≤ 200 µs", median(cost.ours) <= 200e-6)
        cost = alternate(calls(self.system.ensure, count=20), calls(resolve, count=20), rounds=QUICK)
        yield compared("ensure, the profile's pair, nothing to do", cost, "resolve, a pair")

    def _paths(self) -> Iterator[Row]:
        kernel, initrd = (part.version for part in self.files)
        for what, words, most in (
            ("systemfiles path --kernel … --initrd …", ["--kernel", kernel, "--initrd", initrd], 2),
            ("systemfiles path --kernel …", ["--kernel", kernel], 2),
            (f"systemfiles path --profile {PROFILE}", ["--profile", PROFILE], None),
        ):
            program = Path(sys.executable).with_name("systemfiles")
            ours = process([program, "path", "--data-dir", self.data_dir, *words], self.environ)
            cost = alternate(ours, process(JSON, self.environ), rounds=QUICK)
            yield compared(what, cost, "python -c 'import json'", most=most)

    def _idle_doit(self) -> Row:
        dodo = self.work / "idle" / "dodo.py"
        dodo.parent.mkdir()
        dodo.write_text(IDLE_DODO)
        idle = process([sys.executable, "-m", "doit"], self.environ, cwd=dodo.parent)
        cost = alternate(self.doit, idle, rounds=QUICK)
        return compared(f"doit profile={PROFILE}, nothing to do", cost, "doit, a dodo.py of one idle task", most=3)

    def _cpio(self) -> Iterator[Row]:
        # a kernel's modules are about as many files as the first tree has; many small ones are harder on us
        for files, most in ((1000, 0.2), (3000, None)):
            tree = self.work / f"tree-{files}"
            make_tree(tree, files=files)
            # into a pipe, as on the way to a compressor: a disk's moods would drown the difference
            theirs = process(["sh", "-c", f"{ARCHIVE} | cat"], self.environ, cwd=tree)
            cost = alternate(calls(partial(_archive, tree)), theirs, rounds=SLOW)
            yield compared(f"cpio of 60 MB in {files} files, into a pipe", cost, "find | cpio -H newc", most=most)

    def _initrd(self) -> Iterator[Row]:
        if self._build_initrd().content_sha256 != self.files.initrd.content_sha256:
            msg = "the initrd that was built here is not the one that was provisioned"
            raise RuntimeError(msg)
        tree, out = self.work / "initrd", self.work / "initrd.gz"
        tree.mkdir()
        # all but the device nodes: making those takes root
        unpack = f"gzip -dc < '{self.files.initrd.path}' | cpio -idm --quiet -f 'dev/*'"
        subprocess.run(["sh", "-c", unpack], cwd=tree, check=True)
        theirs = process(["sh", "-c", f"{ARCHIVE} | gzip -9 > '{out}'"], self.environ, cwd=tree)
        cost = alternate(calls(self._build_initrd), theirs, rounds=SLOW)
        yield compared("the whole initrd, from a warm cache", cost, "find | cpio | gzip -9, unpacked on disk", most=1.2)
        ours_size, size = self.files.initrd.size, out.stat().st_size
        ratio = ours_size / size
        alternative = f"{size} B  find | cpio | gzip -9"
        yield Row("its size", f"{ours_size} B", alternative, f"{ratio:.4f}x", "≤ 1.01x", ratio <= 1.01)

    def _build_initrd(self) -> InitrdBuild:
        """The initrd again, up to the point where the content store would take it in."""
        provisioner, initrd = self.system.provisioner(), self.files.initrd
        (pin, *_) = provisioner.rolling.read().initrd[initrd.version][initrd.arch]
        with contextlib.ExitStack() as stack:
            images = provisioner.images.busybox(pin.busybox, initrd.arch)
            layers = [stack.enter_context(path.open("rb")) for path in images]
            out = stack.enter_context(provisioner.store.layout.new_file())
            modules = self.files.kernel.path.with_name(MODULES) if pin.kernel else None
            return build_initrd(layers, out, init=pin.init, modules=modules, load=pin.load, carry=pin.carry)


def _archive(tree: Path) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0) as reader:
        assert isinstance(reader.stdin, FileIO)
        cpio.write(walk(tree), reader.stdin)


def main() -> int:
    for name in ("SYSTEMFILES_DATA_DIR", "SYSTEMFILES_CATALOG"):
        os.environ.pop(name, None)
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{direct},127.0.0.1" if direct else "127.0.0.1"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        sys.stderr.write(f"error: not installed: {', '.join(missing)} (doit setup tests=yes)\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="systemfiles-bench-") as work:
        sys.stderr.write(
            f"provisioning profile {PROFILE} into a temporary directory, then measuring for some minutes\n"
        )
        bench = Bench(Path(work))
        sys.stdout.write(f"{HEAD}\n")
        for line in bench.rows():
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Hosts that take a release from a registry, beside skopeo, which copies the same bytes from the same registry.

The release is one pair: a distribution's kernel of some 50 MB, and an initrd without modules. skopeo is given an image
of just its files, so that it is one process with one manifest to fetch. Ours are two artifacts, each with an index, and
with signatures and documents where these are asked for; each time it is a new host, whose data directory is empty.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from measure import Row, Seconds, Timed, alternate, compared

sys.path.append(str(Path(__file__).parent.parent.parent))

from systemfiles import SystemFiles
from systemfiles.content.artifacts import Artifact
from systemfiles.content.descriptors import IMAGE_CONFIG, MANIFEST, Descriptor, image_config, manifest
from systemfiles.foundation.digest import Digest
from systemfiles.release.dist import read_dist, write_artifact, write_sums
from systemfiles.release.documents import documents
from systemfiles.release.publishing import publish
from systemfiles.sources.oci import Repository
from tests.registries import registry
from tests.release.conftest import Key, new_key

KERNEL, INITRD = "vmlinux-alone", "v1.0.0-debian"
FLEET = 50
AT_ONCE = FLEET if os.environ.get("SYSTEMFILES_TEST_FULL") else 10
ROUNDS, FEW = 9, 3
_ALTERNATIVE = "skopeo copy, the same files"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_COPY = ("skopeo", "--insecure-policy", "copy", "--quiet", "--preserve-digests", "--src-tls-verify=false")

_SERVICE = """
import sys
from systemfiles import SystemFiles
place, catalog, *pair = sys.argv[1:]
SystemFiles(f"{place}-before", catalog=catalog).ensure(*pair)
print("ready", flush=True)
sys.stdin.readline()
SystemFiles(place, catalog=catalog).ensure(*pair)
print("done", flush=True)
"""

Words = Callable[[Path], Sequence[str | Path]]


def rows(work: Path, environ: Mapping[str, str], kernel: Path) -> Iterator[Row]:
    """What hosts take to have a release of `kernel`; `work` is a directory of the file system that they write to."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        within = Path(name)
        artifacts, key = _release(within, kernel), new_key(within / "keys")
        with registry(within / "registry") as running:
            for _ in publish(artifacts, f"{running.host}/release", [key.private]):
                pass
            pair = tuple(each.version for each in artifacts)
            size = sum(facts.size for each in artifacts for facts in each.files.values()) // 10**6
            open_, careful = _catalog(within, running.host, None), _catalog(within, running.host, key)
            theirs = _at_once(within, partial(_skopeo, _push_files(running.host, artifacts)), environ)
            what = f"a host ensures {size} MB"
            for catalog, trust in ((open_, ""), (careful, ", signed")):
                cost = alternate(_in_service(within, catalog, pair), theirs(1), rounds=ROUNDS)
                yield compared(f"{what}{trust}, in a service", cost, _ALTERNATIVE, most=1)
            sample = "" if AT_ONCE == FLEET else f" (SYSTEMFILES_TEST_FULL=1: {FLEET})"
            alternative = f"{AT_ONCE} of skopeo copy{sample}"
            cost = alternate(_services(within, careful, pair, environ), theirs(AT_ONCE), rounds=FEW)
            yield compared(f"{AT_ONCE} services told at once", cost, alternative, most=1.5)
            ours = _at_once(within, partial(_fetch, careful, pair), environ)
            cost = alternate(ours(1), theirs(1), rounds=ROUNDS)
            yield compared(f"{what}, signed, a process", cost, _ALTERNATIVE, most=1)
            cost = alternate(ours(AT_ONCE), theirs(AT_ONCE), rounds=FEW)
            yield compared(f"{AT_ONCE} such processes at once", cost, alternative, most=1.5)


def _release(within: Path, kernel: Path) -> list[Artifact]:
    """One pair, as `doit release` leaves it; a kernel and the initrd that goes with it."""
    system, dist = SystemFiles(within / "built"), within / "release" / "dist"
    dist.parent.mkdir()
    system.add_kernel(kernel, KERNEL)
    system.ensure(KERNEL, INITRD)
    for artifact in system.artifacts():
        write_artifact(dist, artifact, documents(artifact, builder="urn:example:bench", when=0, source=None))
    write_sums(dist)
    shutil.rmtree(within / "built")
    return sorted(read_dist(dist), key=lambda artifact: artifact.kind, reverse=True)


def _push_files(host: str, artifacts: Sequence[Artifact]) -> str:
    """Pushes the files as the layers of an image; returns its reference."""
    target, layers = Repository(host, "files"), []
    for path in (artifact.directory / name for artifact in artifacts for name in artifact.files):
        data = path.read_bytes()
        layers.append(Descriptor(_LAYER, Digest.of(data), len(data)))
        target.push_blob(layers[-1].digest, len(data), io.BytesIO(data))
    config = image_config(artifacts[0].arch, layers)
    described = Descriptor(IMAGE_CONFIG, Digest.of(config), len(config))
    target.push_blob(described.digest, described.size, io.BytesIO(config))
    target.push_manifest(manifest(described, layers, {}), MANIFEST, "1")
    return f"{host}/files:1"


def _catalog(within: Path, host: str, trusted: Key | None) -> Path:
    path = within / ("open.toml" if trusted is None else "careful.toml")
    text = f'schema = 1\nbuild = false\nregistries = ["{host}/release"]\n'
    path.write_text(text + (f"[trust]\nkeys = {json.dumps([trusted.public])}\n" if trusted else ""))
    return path


def _fetch(catalog: Path, pair: Sequence[str], directory: Path) -> Sequence[str | Path]:
    kernel, initrd = pair
    program = Path(sys.executable).with_name("systemfiles")
    return [program, "fetch", "--data-dir", directory, "--catalog", catalog, "--kernel", kernel, "--initrd", initrd]


def _skopeo(reference: str, directory: Path) -> Sequence[str | Path]:
    return [*_COPY, f"docker://{reference}", f"oci:{directory}/layout:1"]


def _in_service(within: Path, catalog: Path, pair: Sequence[str]) -> Timed:
    """One call in this process, which has done it before, as the service that starts a host's VMs has."""

    def run() -> Seconds:
        with tempfile.TemporaryDirectory(dir=within) as name:
            start = time.perf_counter()
            SystemFiles(name, catalog=catalog).ensure(*pair)
            return time.perf_counter() - start

    return run


def _services(within: Path, catalog: Path, pair: Sequence[str], environ: Mapping[str, str]) -> Timed:
    """Services of so many hosts, which have done it before: from when they are told until the last one has it."""

    def run() -> Seconds:
        with tempfile.TemporaryDirectory(dir=within) as name, contextlib.ExitStack() as stack:
            services = []
            for number in range(AT_ONCE):
                words = [sys.executable, "-c", _SERVICE, str(Path(name, str(number))), str(catalog), *pair]
                service = subprocess.Popen(words, env=environ, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                services.append(stack.enter_context(service))
                assert _out(services[-1]).readline() == "ready\n"
            start = time.perf_counter()
            for service in services:
                _in(service).write("now\n")
                _in(service).flush()
            assert [_out(service).readline() for service in services] == ["done\n"] * AT_ONCE
            return time.perf_counter() - start

    return run


def _in(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdin
    return process.stdin


def _out(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout
    return process.stdout


def _at_once(within: Path, words: Words, environ: Mapping[str, str]) -> Callable[[int], Timed]:
    """So many whole processes, each of which writes to a directory of its own, until the last one has ended.

    The directories are made and removed while no clock runs.
    """

    def run(count: int) -> Seconds:
        with tempfile.TemporaryDirectory(dir=within) as name:
            places = [Path(name, str(number)) for number in range(count)]
            for place in places:
                place.mkdir()
            start = time.perf_counter()
            running = [subprocess.Popen(words(place), env=environ, stdout=subprocess.DEVNULL) for place in places]
            failed = [process.args for process in running if process.wait()]
            took = time.perf_counter() - start
        assert not failed, failed
        return took

    return lambda count: partial(run, count)

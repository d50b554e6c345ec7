"""Fetches and pulls beside curl and skopeo, which get the same from the same servers on this machine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from measure import Row, Seconds, Timed, alternate, compared, process

sys.path.append(str(Path(__file__).parent.parent.parent))

from tests.registries import registry
from tests.transfers import CHECKOUT, command, noise, push_image, web_server

TOOLS = ("curl", "docker-registry", "sha256sum", "skopeo", "sync")
FILE, LARGE = 256_000_000, 500_000_000  # bytes
LAYERS = 10
MOST_MEMORY = 60_000_000
ROUNDS = 7
CURL = 'cd "$2" && curl -sS -o f "$1" && sha256sum f && sync f'

Words = Sequence[str | Path]


def rows(work: Path, environ: Mapping[str, str]) -> Iterator[Row]:
    """What fetching costs in time and memory; `work` is a directory of the file system that is fetched to."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        within = Path(name)
        (within / "www").mkdir()
        with web_server(within / "www") as server, registry(within / "registry") as running:
            yield _download(within, server, environ)
            reference = push_image(running.host, "middling", layers=LAYERS, size=300_000_000 // LAYERS)
            yield _pull(within, reference, environ)
            digest = noise(within / "www" / "large", LARGE)
            yield _memory(within, "one file", partial(command, "fetch", f"{server}large", digest, str(LARGE)), environ)
            reference = push_image(running.host, "large", layers=LAYERS, size=LARGE // LAYERS)
            yield _memory(within, f"{LAYERS} layers", partial(command, "pull", reference), environ)


def _download(within: Path, server: str, environ: Mapping[str, str]) -> Row:
    digest, url = noise(within / "www" / "file", FILE), f"{server}file"
    cost = alternate(
        _each_anew(within, partial(command, "fetch", url, digest, str(FILE)), environ),
        _each_anew(within, lambda directory: ["sh", "-c", CURL, "sh", url, directory], environ),
        rounds=ROUNDS,
    )
    return compared("fetch 256 MB, verified, synced; a process", cost, "curl && sha256sum && sync", most=0.91)


def _pull(within: Path, reference: str, environ: Mapping[str, str]) -> Row:
    def skopeo(directory: Path) -> Words:
        source, target = f"docker://{reference}", f"oci:{directory}/layout:1"
        return ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", source, target]

    cost = alternate(
        _each_anew(within, partial(command, "pull", reference), environ),
        _each_anew(within, skopeo, environ),
        rounds=ROUNDS,
    )
    return compared("pull 300 MB in 10 layers; a process", cost, "skopeo copy docker://… oci:…", most=1)


def _memory(within: Path, what: str, words: Callable[[Path], Words], environ: Mapping[str, str]) -> Row:
    with tempfile.TemporaryDirectory(dir=within) as name:
        ran = subprocess.run(words(Path(name)), env=environ, cwd=CHECKOUT, check=True, capture_output=True)
    above = int(ran.stdout)
    aim = f"≤ {MOST_MEMORY // 10**6} MB above it"
    peak = f"+{above / 1e6:.1f} MB"
    return Row(f"peak memory of 500 MB, {what}", peak, "the same process, idle", "", aim, above <= MOST_MEMORY)


def _each_anew(within: Path, words: Callable[[Path], Words], environ: Mapping[str, str]) -> Timed:
    """A whole process that writes to a directory of its own, which is made and removed while no clock runs."""

    def run() -> Seconds:
        with tempfile.TemporaryDirectory(dir=within) as name:
            return process(words(Path(name)), environ, cwd=CHECKOUT)()

    return run

"""Large transfers, to be measured: who serves them, and one fetch, pull or push as a whole process.

::

    python -m tests.transfers fetch URL DIGEST SIZE DATA_DIR
    python -m tests.transfers pull REFERENCE DATA_DIR
    python -m tests.transfers push HOST REPOSITORY FILE DIGEST
    python -m tests.transfers serve DIRECTORY

The first three print how many bytes of memory they took at their peak, above what they had before they began. Modules
are imported where they are needed, because the time of these processes counts, too.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
_PIECE = 1_000_000


def command(kind: str, *words: str | Path) -> list[str]:
    """A command line of this module; it is to be run in the checkout."""
    return [sys.executable, "-m", "tests.transfers", kind, *map(str, words)]


def noise(path: Path, size: int) -> str:
    """Writes a file of `size` random bytes; returns its digest."""
    import os

    from systemfiles.foundation.digest import Hasher

    hasher = Hasher()
    with path.open("wb") as out:
        for start in range(0, size, _PIECE):
            piece = os.urandom(min(_PIECE, size - start))
            hasher.update(piece)
            out.write(piece)
    return hasher.digest()


def push_image(host: str, repository: str, *, layers: int, size: int) -> str:
    """Pushes an image of so many layers of `size` random bytes each, gzip'd as usual; returns its reference."""
    import gzip
    import io
    import os

    from systemfiles.content.descriptors import IMAGE_CONFIG, MANIFEST, Descriptor, image_config, manifest
    from systemfiles.foundation.arch import Arch
    from systemfiles.foundation.digest import Digest
    from systemfiles.sources.oci import Repository

    target = Repository(host, repository)

    def push(data: bytes, media_type: str) -> Descriptor:
        target.push_blob(Digest.of(data), len(data), io.BytesIO(data))
        return Descriptor(media_type, Digest.of(data), len(data))

    # level 0: there is nothing to be gained with noise
    contents = (gzip.compress(os.urandom(size), compresslevel=0, mtime=0) for _ in range(layers))
    described = [push(data, "application/vnd.oci.image.layer.v1.tar+gzip") for data in contents]
    config = push(image_config(Arch.X86_64, described), IMAGE_CONFIG)
    target.push_manifest(manifest(config, described, {}), MANIFEST, "1")
    return f"{host}/{repository}:1"


@contextlib.contextmanager
def web_server(directory: Path) -> Iterator[str]:
    """Serves the files of `directory` from a process of its own until the block ends; gives the URL of that."""
    with subprocess.Popen(command("serve", directory), cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def _serve(directory: str) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with Path(directory, self.path.strip("/")).open("rb") as stream:
                self.send_response(200)
                self.send_header("Content-Length", str(Path(stream.name).stat().st_size))
                self.end_headers()
                self.connection.sendfile(stream)  # the kernel does the work

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}/\n")
    sys.stdout.flush()
    server.serve_forever()


def _fetching(url: str, digest: str, size: str, data_dir: str) -> Callable[[], object]:
    from systemfiles.foundation.digest import Digest
    from systemfiles.foundation.files import NewFile
    from systemfiles.sources.http import fetch

    def work() -> None:
        with NewFile(Path(data_dir, "tmp")) as out:
            fetch(url, out, subject="it", digest=Digest.parse(digest), size=int(size))
            out.commit(Path(data_dir, "final"))

    return work


def _pulling(reference: str, data_dir: str) -> Callable[[], object]:
    from systemfiles.content.artifacts import Artifacts
    from systemfiles.content.store import Store
    from systemfiles.foundation.arch import Arch
    from systemfiles.foundation.catalog import load_catalog
    from systemfiles.foundation.paths import Paths
    from systemfiles.foundation.progress import silent
    from systemfiles.provision.pull import Puller
    from systemfiles.provision.rolling import Rolling
    from systemfiles.provision.site import Site

    paths, catalog = Paths(Path(data_dir)), load_catalog(environ={})
    puller = Puller(Site(paths, catalog, Store(paths, Artifacts(paths)), Rolling(paths, catalog), silent, None))
    return lambda: puller.pull(reference, Arch.X86_64)


def _pushing(host: str, repository: str, file: str, digest: str) -> Callable[[], object]:
    from systemfiles.foundation.digest import Digest
    from systemfiles.sources.oci import Repository

    target = Repository(host, repository)

    def work() -> None:
        with Path(file).open("rb") as content:
            target.push_blob(Digest.parse(digest), Path(file).stat().st_size, content)

    return work


def _memory(field: str) -> int:
    """Bytes, from a line such as `VmHWM:     40328 kB` of /proc/self/status (proc(5))."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main(kind: str, *words: str) -> None:
    if kind == "serve":
        _serve(*words)
        return
    kinds: dict[str, Callable[..., Callable[[], object]]] = {"fetch": _fetching, "pull": _pulling, "push": _pushing}
    work = kinds[kind](*words)
    idle = _memory("VmRSS")
    work()
    sys.stdout.write(f"{_memory('VmHWM') - idle}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The table of targets: every parser that meets foreign bytes, and what it is given.

A target's `call` takes the bytes and an empty directory. It returns when they were taken, having checked what can be
checked cheaply of what came out, or raises a SystemFilesError. Anything else is a fault, and so is taking long.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz import archives, origins, stores
from tests.fuzz.mutations import mutated, sealed
from tests.fuzz.values import json_texts
from tests.unit import test_cpio as cpios
from tests.unit import test_kernelimage as kernels
from tests.unit import test_kmod as modules
from tests.unit import test_layers as layers


@dataclass(frozen=True)
class Target:
    """`share` is how many examples it gets of the usual number: fewer where each takes long."""

    inputs: st.SearchStrategy[bytes]
    call: Callable[[bytes, Path], object]
    share: float = 1.0


tar_bytes = mutated(archives.TARS, words=archives.TAR_WORDS, block=512).map(sealed)
elf_bytes = mutated([archives.VMLINUX], words=archives.WORDS_FOR_ELF)
note_bytes = mutated(archives.NOTES, words=archives.WORDS_FOR_ELF)
kernel_packages = mutated(archives.KERNEL_TARS, words=archives.TAR_WORDS, block=512).map(sealed)
modinfo_bytes = mutated([archives.MODINFO, modules.EROFS], words=archives.INDEX_WORDS)
streams = [pack(archives.VMLINUX) for pack in kernels.COMPRESSORS.values()]


def in_bzimage(stream: bytes) -> bytes:
    """`stream` as the payload, with the size it should have behind it."""
    return kernels.bzimage(stream, size=None if stream[:2] == b"\x1f\x8b" else len(archives.VMLINUX))


def texts(*values: object) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


SOUND: dict[str, tuple[bytes, ...]] = {
    "catalog": (stores.CATALOG,),
    "mirrors": (b"https://a/=https://b/ c=d",),
    "versions.lock": texts(stores.LOCK),
    "vmlinux": (archives.VMLINUX,),
    "ELF notes": tuple(map(archives.with_notes, archives.NOTES[:3])),
    "bzImage": archives.BZIMAGES,
    "bzImage payload": tuple(map(in_bzimage, streams)),
    "arm64 Image": archives.IMAGES,
    "Image.gz": tuple(map(kernels.gz, archives.IMAGES)),
    "cpio": (cpios.GOLDEN,),
    "tar layer": archives.TARS,
    "zstd layer": tuple(map(layers.zstd, archives.TARS)),
    "deb": archives.DEBS,
    "kernel package": tuple(map(archives.in_deb, archives.KERNEL_TARS)),
    "busybox": (archives.BUSYBOX,),
    "module": (modules.EROFS,),
    "modules.dep": (archives.INDEXES,),
    "modules.tar": (archives.modules_tar(),),
    "artifact.json": texts(*stores.RECORDS),
    "artifact.json on disk": texts(stores.RECORDS[0]),
    "artifact.json in the layout": texts(stores.RECORDS[0]),
    "stamp.json": texts(stores.STAMP),
    "index.json": texts(*stores.INDEXES),
    "manifest": texts(*origins.MANIFESTS),
    "download": origins.DOWNLOADS,
    "WWW-Authenticate": origins.CHALLENGES[:1],
    "token": texts(*origins.TOKENS),
    "reference": origins.REFERENCES,
    "docker config": texts(origins.DOCKER_CONFIGS[0]),
    "netrc": (origins.NETRC,),
    "credentials": (origins.PAIRS,),
}
"""What must be taken: a target that refuses everything would show nothing."""

TARGETS = {
    "catalog": Target(mutated([stores.CATALOG], words=stores.CATALOG_WORDS), stores.take_catalog, 0.2),
    "mirrors": Target(mutated([b"https://a/=https://b/ c=d"]), stores.take_mirrors, 0.1),
    "versions.lock": Target(json_texts([stores.LOCK], words=stores.JSON_WORDS), stores.take_lock, 0.5),
    "vmlinux": Target(elf_bytes, archives.take_kernel(archives.X86)),
    "ELF notes": Target(note_bytes.map(archives.with_notes), archives.take_kernel(archives.X86)),
    "bzImage": Target(mutated(archives.BZIMAGES), archives.take_kernel(archives.X86)),
    "bzImage payload": Target(mutated(streams).map(in_bzimage), archives.take_kernel(archives.X86)),
    "kernel in a bzImage": Target(elf_bytes.map(archives.in_bzimage), archives.take_kernel(archives.X86)),
    "arm64 Image": Target(mutated(archives.IMAGES), archives.take_kernel(archives.ARM)),
    "Image.gz": Target(mutated([kernels.gz(archives.IMAGE)]), archives.take_kernel(archives.ARM)),
    "Image in an Image.gz": Target(mutated(archives.IMAGES).map(kernels.gz), archives.take_kernel(archives.ARM)),
    "cpio": Target(mutated([cpios.GOLDEN], block=4), archives.take_cpio),
    "entries in a cpio": Target(archives.cpio_archives, archives.take_cpio),
    "tar layer": Target(tar_bytes, archives.take_layers),
    "tree in a layer": Target(archives.trees, archives.take_layers),
    "gzip layer": Target(mutated([*map(gzip.compress, archives.TARS)]), archives.take_layers, 0.5),
    "tar in a gzip layer": Target(tar_bytes.map(gzip.compress), archives.take_layers, 0.5),
    "zstd layer": Target(mutated([*map(layers.zstd, archives.TARS)]), archives.take_layers, 0.5),
    "deb": Target(mutated(archives.DEBS, words=archives.DEB_WORDS), archives.take_deb),
    "tar in a deb": Target(tar_bytes.map(archives.in_deb), archives.take_deb),
    "kernel package": Target(kernel_packages.map(archives.in_deb), archives.take_kernel_package),
    "busybox": Target(mutated([archives.BUSYBOX]), archives.take_busybox, 0.5),
    "module": Target(mutated([modules.EROFS, gzip.compress(modules.EROFS)]), archives.take_modinfo),
    "modinfo": Target(modinfo_bytes.map(modules.module), archives.take_modinfo),
    "modules.dep": Target(mutated([archives.INDEXES], words=archives.INDEX_WORDS), archives.take_index),
    "modules.tar": Target(
        mutated([archives.modules_tar()], words=archives.TAR_WORDS, block=512).map(sealed),
        archives.take_modules_tar,
        0.5,
    ),
    "artifact.json": Target(json_texts(stores.RECORDS, words=stores.JSON_WORDS), stores.take_record),
    "artifact.json on disk": Target(json_texts(stores.RECORDS, words=stores.JSON_WORDS), stores.take_artifact, 0.2),
    "stamp.json": Target(json_texts([stores.STAMP], words=stores.JSON_WORDS), stores.take_stamps, 0.3),
    "index.json": Target(json_texts(stores.INDEXES, words=stores.JSON_WORDS), stores.take_layout_index, 0.3),
    "manifest in the layout": Target(
        json_texts(stores.LAYOUT_MANIFESTS, words=stores.JSON_WORDS), stores.take_layout_manifest, 0.2
    ),
    "artifact.json in the layout": Target(
        json_texts(stores.RECORDS, words=stores.JSON_WORDS), stores.take_layout_record, 0.2
    ),
    "manifest": Target(json_texts(origins.MANIFESTS, words=stores.JSON_WORDS), origins.take_manifest, 0.5),
    "download": Target(mutated(origins.DOWNLOADS, words=origins.DOWNLOAD_WORDS), origins.take_download, 0.5),
    "WWW-Authenticate": Target(mutated(origins.CHALLENGES, words=origins.CHALLENGE_WORDS), origins.take_challenge),
    "token": Target(json_texts(origins.TOKENS, words=origins.TOKEN_WORDS), origins.take_token, 0.5),
    "login": Target(mutated(origins.LOGINS, words=origins.CHALLENGE_WORDS), origins.take_login, 0.5),
    "reference": Target(mutated(origins.REFERENCES, words=[b":", b"@", b"/", b"[", b"."]), origins.take_reference, 0.5),
    "docker config": Target(json_texts(origins.DOCKER_CONFIGS, words=origins.CONFIG_WORDS), origins.take_docker_config),
    "netrc": Target(mutated([origins.NETRC], words=origins.NETRC_WORDS), origins.take_netrc, 0.5),
    "credentials": Target(mutated([origins.PAIRS], words=origins.PAIR_WORDS), origins.take_pairs, 0.5),
}

"""Images in the content store and from registries, and what of them is refused."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from systemfiles import (
    GuestConfig,
    Image,
    IntegrityError,
    NotProvisioned,
    SizeMismatch,
    SourceRefused,
    SourceUnavailable,
    StoreError,
    SystemFiles,
    SystemFilesError,
    write_config_disk,
    write_overlay_disk,
    write_rootfs_disk,
)
from systemfiles.content.descriptors import IMAGE_CONFIG, Descriptor, canonical, manifest
from systemfiles.content.layout import Layout
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.manifests import DOCKER_MANIFEST, IMAGE_INDEX, IMAGE_MANIFEST
from systemfiles.foundation.paths import Paths
from tests.conftest import CHECKOUT, Provisioned
from tests.integration.support import systemfiles
from tests.registries import Registry, registry
from tests.unit.test_layers import file, tar

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
AMD64, ARM64 = {"os": "linux", "architecture": "amd64"}, {"os": "linux", "architecture": "arm64", "variant": "v8"}
ATTESTATION = {"os": "unknown", "architecture": "unknown"}
NOWHERE = Descriptor(IMAGE_MANIFEST, Digest.of(b"never written"), 13)

Change = Mapping[str, Any]


class Content:
    """A content store that one can put anything into."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.layout = Layout(Paths(data_dir))
        self.layout.create()

    def layer(self, content: bytes = b"content") -> Descriptor:
        return self.layout.add_bytes(gzip.compress(tar(file("file", content)), mtime=0), LAYER)

    def config(self, architecture: str = "amd64", **config: object) -> Descriptor:
        value = {"architecture": architecture, "os": "linux", "config": config}
        return self.layout.add_bytes(canonical(value), IMAGE_CONFIG)

    def image(self, *layers: Descriptor, config: Descriptor | None = None) -> Descriptor:
        raw = manifest(config or self.config(Cmd=["/file"]), layers or [self.layer()], {})
        return self.layout.add_bytes(raw, IMAGE_MANIFEST)

    def json(self, value: object, media_type: str = IMAGE_MANIFEST) -> Descriptor:
        return self.layout.add_bytes(json.dumps(value).encode(), media_type)

    def index(self, *entries: tuple[Descriptor, Change | None]) -> Descriptor:
        plain = [part.to_json() | ({"platform": platform} if platform else {}) for part, platform in entries]
        return self.json({"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": plain}, IMAGE_INDEX)

    def path(self, part: Descriptor) -> Path:
        return self.layout.blob(part.digest)

    def find(self, name: str, arch: str = "x86_64") -> Image:
        return SystemFiles(self.data_dir, arch=arch).image(name)


@pytest.fixture
def content(tmp_path: Path) -> Content:
    return Content(tmp_path / "data")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ── in the content store ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_image_is_found_by_its_name_with_its_config_and_its_layers_from_the_lowest(content: Content) -> None:
    layers = [content.layer(b"lower"), content.layer(b"upper")]
    target = content.image(*layers)
    content.layout.name("nginx:1.29", target)
    image = content.find("nginx:1.29")
    assert (image.reference, image.digest, image.arch) == ("nginx:1.29", target.digest, Arch.X86_64)
    assert image.config["config"] == {"Cmd": ["/file"]}
    assert image.layers == tuple(content.path(layer) for layer in layers)


def test_an_image_is_found_by_the_digest_of_its_manifest_or_of_an_index_whatever_it_is_called(content: Content) -> None:
    here, there = content.image(), content.image(config=content.config("arm64"))
    index = content.index((here, AMD64), (there, ARM64))
    content.layout.name("x", index)
    assert content.find(here.digest).digest == here.digest
    assert content.find(index.digest).digest == here.digest
    assert content.find(index.digest, "aarch64").digest == there.digest
    assert content.find(f"registry.example.com/x@{index.digest}").digest == here.digest
    raw = manifest(content.config(), [content.layer()], {}).replace(
        b'"mediaType":"%s",' % IMAGE_MANIFEST.encode(), b"", 1
    )
    bare = content.layout.add_bytes(raw, IMAGE_MANIFEST)
    assert content.find(bare.digest).digest == bare.digest


def test_an_index_leads_to_the_platform_past_attestations_and_by_nested_indexes(content: Content) -> None:
    here, there = content.image(), content.image(config=content.config("arm64"))
    attestation = content.json({"schemaVersion": 2, "config": {}, "layers": []})
    nested = content.index((attestation, ATTESTATION), (there, ARM64))
    content.layout.name("x", content.index((attestation, ATTESTATION), (nested, None), (here, AMD64)))
    assert content.find("x").digest == here.digest
    assert content.find("x", "aarch64").digest == there.digest


def test_a_name_that_is_not_there_is_an_error_that_says_how_to_bring_it_in(content: Content) -> None:
    content.layout.name("other", content.image())
    for name in ("nginx", "nginx:1.29", "me/app", "../../x", "", "sha256:abc", "Not A Name", "é\udcff\n"):
        with pytest.raises(NotProvisioned) as refused:
            content.find(name, "aarch64")
        assert "systemfiles lock --data-dir" in str(refused.value)
        assert f"--override-arch arm64 copy docker://{name}".split("'")[0][:40] in str(refused.value).replace("'", "")
    with pytest.raises(NotProvisioned, match="sha256:"):
        content.find(NOWHERE.digest)


def test_the_command_that_the_error_tells_brings_the_image_in(content: Content, tmp_path: Path) -> None:
    content.layout.name("other", content.image())
    with pytest.raises(NotProvisioned) as refused:
        content.find("my/app:1")
    told = next(value for label, value in refused.value.details if label == "provide it")
    assert "copy docker://my/app:1 " in told
    other = f"oci:{content.layout.root}:other"
    told = told.replace("docker://my/app:1", other)
    run(sys.executable, "-m", "systemfiles.cli", *told.split()[1:])
    assert content.find("my/app:1").layers == content.find("other").layers


def umoci(content: Content, *words: str | Path) -> None:
    done = systemfiles("lock", "--data-dir", content.data_dir, "--", "umoci", *words)
    assert done.returncode == 0, done.stderr


def test_what_umoci_writes_is_found(content: Content, tmp_path: Path) -> None:
    name, bundle = f"{content.layout.root}:mine", tmp_path / "bundle"
    umoci(content, "new", "--image", name)
    umoci(content, "unpack", "--rootless", "--image", name, bundle)
    (bundle / "rootfs" / "file").write_text("text")
    umoci(content, "repack", "--image", name, bundle)
    umoci(content, "config", "--image", name, "--architecture=amd64", "--config.entrypoint=/file")
    image = content.find("mine")
    assert image.config["config"]["Entrypoint"] == ["/file"]
    write_rootfs_disk(tmp_path / "disk", image.layers)
    assert run("debugfs", "-R", "cat /file", tmp_path / "disk") == "text"


def test_a_layer_of_umoci_insert_which_has_no_end_is_a_layer(content: Content, tmp_path: Path) -> None:
    name, source = f"{content.layout.root}:mine", tmp_path / "file"
    source.write_text("text")
    umoci(content, "new", "--image", name)
    umoci(content, "insert", "--image", name, source, "/file")
    umoci(content, "config", "--image", name, "--architecture=amd64")
    write_rootfs_disk(tmp_path / "disk", content.find("mine").layers)
    assert run("debugfs", "-R", "cat /file", tmp_path / "disk") == "text"


def test_looking_an_image_up_writes_nothing(content: Content) -> None:
    content.layout.name("x", content.image())
    before = sorted(path for path in content.data_dir.rglob("*"))
    content.find("x")
    with pytest.raises(NotProvisioned):
        content.find("y")
    assert sorted(path for path in content.data_dir.rglob("*")) == before


def test_a_data_directory_that_nothing_is_in_has_no_images_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(NotProvisioned):
        SystemFiles(tmp_path / "data").image("nginx")
    assert not (tmp_path / "data").exists()


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def lacks_a_layer(content: Content) -> Descriptor:
    layer = content.layer()
    content.path(layer).unlink()
    return content.image(layer)


def has_half_a_layer(content: Content) -> Descriptor:
    layer = content.layer()
    data = content.path(layer).read_bytes()
    content.path(layer).unlink()
    content.path(layer).write_bytes(data[:-5])
    return content.image(layer)


def has_a_directory_for_a_layer(content: Content) -> Descriptor:
    layer = content.layer()
    content.path(layer).unlink()
    content.path(layer).mkdir()
    return content.image(layer)


def lacks_its_config(content: Content) -> Descriptor:
    config = content.config()
    content.path(config).unlink()
    return content.image(config=config)


def lacks_its_manifest(content: Content) -> Descriptor:
    target = content.image()
    content.path(target).unlink()
    return target


def has_another_manifest(content: Content) -> Descriptor:
    target = content.image()
    content.path(target).unlink()
    content.path(target).write_bytes(content.path(content.image(content.layer(b"other"))).read_bytes())
    return target


def has_another_config(content: Content) -> Descriptor:
    config = content.config(Cmd=["a"])
    content.path(config).unlink()
    content.path(config).write_bytes(content.path(content.config(Cmd=["b"])).read_bytes())
    return content.image(config=config)


def config_of(raw: bytes) -> Callable[[Content], Descriptor]:
    return lambda content: content.image(config=content.layout.add_bytes(raw, IMAGE_CONFIG))


def manifest_of(**changes: Any) -> Callable[[Content], Descriptor]:
    """An image whose manifest is changed."""

    def build(content: Content) -> Descriptor:
        return content.json(json.loads(content.path(content.image()).read_bytes()) | changes)

    return build


def index_of(*entries: object) -> Callable[[Content], Descriptor]:
    return lambda content: content.json({"schemaVersion": 2, "manifests": entries}, IMAGE_INDEX)


def bytes_of(raw: bytes, media_type: str = IMAGE_MANIFEST) -> Callable[[Content], Descriptor]:
    return lambda content: content.layout.add_bytes(raw, media_type)


def nested(depth: int) -> Callable[[Content], Descriptor]:
    def build(content: Content) -> Descriptor:
        target = content.image()
        for _ in range(depth):
            target = content.index((target, AMD64))
        return target

    return build


def wide(content: Content) -> Descriptor:
    """Many nested indexes, none with the platform."""
    inner = [content.index((content.image(content.layer(b"%d" % number)), ARM64)) for number in range(30)]
    return content.index(*((part, None) for part in inner))


def loop(content: Content) -> Descriptor:
    """An index that says it is within itself: its digest cannot be known, so its bytes are others."""
    target = content.index((Descriptor(IMAGE_INDEX, Digest.of(b"loop"), 4), AMD64))
    blob = content.layout.blob(Digest.of(b"loop"))
    blob.write_bytes(content.path(target).read_bytes())
    return target


def odd(part: str, media_type: str) -> Callable[[Content], Descriptor]:
    def build(content: Content) -> Descriptor:
        layer, config = content.layer().to_json(), content.config().to_json()
        if part == "config":
            config["mediaType"] = media_type
        else:
            layer["mediaType"] = media_type
        return content.json({"schemaVersion": 2, "config": config, "layers": [layer]})

    return build


HUGE = b'{"x": "' + b"x" * (5 << 20) + b'"}'
DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
REFUSED: dict[str, tuple[Callable[[Content], Descriptor], type[SystemFilesError], str]] = {
    "no layer": (lacks_a_layer, IntegrityError, "no file"),
    "half a layer": (has_half_a_layer, SizeMismatch, "remove that file"),
    "a directory": (has_a_directory_for_a_layer, IntegrityError, "no file"),
    "no config": (lacks_its_config, IntegrityError, "no file"),
    "no manifest": (lacks_its_manifest, IntegrityError, "a manifest"),
    "another manifest": (has_another_manifest, IntegrityError, "it was not used"),
    "another config": (has_another_config, IntegrityError, "SizeMismatch|it was not used"),
    "config no JSON": (config_of(b"\xff{"), SourceRefused, "configuration is broken"),
    "config no object": (config_of(b"[]"), SourceRefused, "not a JSON object"),
    "config empty": (config_of(b""), SourceRefused, "not JSON"),
    "config huge": (config_of(HUGE), SourceRefused, "longer than"),
    "config deep": (config_of(DEEP), SourceRefused, "not JSON"),
    "config of another machine": (config_of(b'{"architecture": "s390x"}'), SourceRefused, "linux/s390x"),
    "config of another system": (config_of(b'{"os": "windows\\u001b[2J"}'), SourceRefused, "windows"),
    "manifest no JSON": (bytes_of(b"{"), SourceRefused, "no manifest"),
    "manifest a list": (bytes_of(b"[]"), SourceRefused, "no manifest"),
    "manifest deep": (bytes_of(DEEP), SourceRefused, "no manifest"),
    "manifest huge": (bytes_of(HUGE), StoreError, "longer than"),
    "manifest of schema 1": (manifest_of(schemaVersion=1), SourceRefused, "no manifest"),
    "manifest and index": (manifest_of(manifests=[]), SourceRefused, "no manifest"),
    "manifest says it is an index": (manifest_of(mediaType=IMAGE_INDEX), SourceRefused, "no manifest|says it is"),
    "manifest says another type": (manifest_of(mediaType=DOCKER_MANIFEST), SourceRefused, "says it is"),
    "layers no list": (manifest_of(layers=3), SourceRefused, "manifest is broken"),
    "layers null": (manifest_of(layers=None), SourceRefused, "manifest is broken"),
    "layers of text": (manifest_of(layers=["x"]), SourceRefused, "manifest is broken"),
    "layer without a size": (
        manifest_of(layers=[{"mediaType": LAYER, "digest": NOWHERE.digest}]),
        SourceRefused,
        "broken",
    ),
    "layer outside": (
        manifest_of(layers=[{"mediaType": LAYER, "digest": "sha256:../../../../etc/passwd", "size": 1}]),
        SourceRefused,
        "broken",
    ),
    "layer of petabytes": (
        manifest_of(layers=[{"mediaType": LAYER, "digest": NOWHERE.digest, "size": 1 << 50}]),
        SourceRefused,
        "bytes long",
    ),
    "layer of two sizes": (
        manifest_of(layers=[{"mediaType": LAYER, "digest": NOWHERE.digest, "size": size} for size in (1, 2)]),
        SourceRefused,
        "two sizes",
    ),
    "no config in it": (manifest_of(config=None), SourceRefused, "manifest is broken"),
    "config of another type": (odd("config", "application/vnd.oci.empty.v1+json"), SourceRefused, "no image"),
    "layer of another type": (odd("layer", "application/vnd.in-toto+json"), SourceRefused, "no image"),
    "layer encrypted": (odd("layer", f"{LAYER}+encrypted"), SourceRefused, "no image"),
    "layer of no type": (odd("layer", ""), SourceRefused, "no image"),
    "index of nothing": (index_of(), SourceRefused, "only nothing"),
    "index of no objects": (index_of(1, "x", None, []), SourceRefused, "only nothing"),
    "index of an attestation": (index_of(NOWHERE.to_json() | {"platform": ATTESTATION}), SourceRefused, "only nothing"),
    "index of other platforms": (
        index_of(NOWHERE.to_json() | {"platform": {"os": "linux", "architecture": "riscv64"}}),
        SourceRefused,
        "only linux/riscv64",
    ),
    "index of what is not there": (index_of(NOWHERE.to_json() | {"platform": AMD64}), IntegrityError, "no file"),
    "index of no digest": (index_of({"digest": "x", "platform": AMD64}), SourceRefused, "index is broken"),
    "index of no type": (index_of({"digest": NOWHERE.digest, "platform": AMD64}), SourceRefused, "index is broken"),
    "index too deep": (nested(5), SourceRefused, "nested more than"),
    "indexes too many": (wide, SourceRefused, "more than 16"),
    "index in itself": (loop, IntegrityError, "it was not used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_image_that_is_not_whole_or_is_none_is_one_error_that_says_why(content: Content, name: str) -> None:
    build, kind, words = REFUSED[name]
    content.layout.name("x", build(content))
    with pytest.raises(kind) as refused:
        content.find("x")
    text = str(refused.value)
    assert any(word in text for word in words.split("|")), text
    assert all(line.isprintable() for line in text.splitlines())
    assert "systemfiles lock" in text or not isinstance(refused.value, IntegrityError) or "not used" in text


def test_four_indexes_deep_is_still_found(content: Content) -> None:
    content.layout.name("x", nested(4)(content))
    assert content.find("x").layers


def test_a_kernel_or_an_initrd_in_the_content_store_is_no_image(provisioned: Provisioned) -> None:
    names = Layout(Paths(provisioned.data_dir)).names()
    for name in names:
        if name.startswith(("kernel-", "initrd-")):
            with pytest.raises(SourceRefused, match="no image"):
                SystemFiles(provisioned.data_dir, arch=name.rpartition("-")[2]).image(name)


@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"manifests": 3}', b'{"manifests": [3]}', b"\xff", DEEP])
def test_an_index_json_that_cannot_be_read_is_an_error(content: Content, raw: bytes) -> None:
    (content.layout.root / "index.json").unlink()
    (content.layout.root / "index.json").write_bytes(raw)
    with pytest.raises(StoreError):
        content.find("x")


# ── from a registry ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry with the image x:1 for two platforms, x:2 and x:docker for one."""
    base = tmp_path_factory.mktemp("served")
    source = Content(base / "source")
    for tag, text in (("amd64", b"1"), ("second", b"2")):
        source.layout.name(tag, source.image(source.layer(text)))
    source.layout.name("arm64", source.image(config=source.config("arm64")))
    both = source.index((source.layout.names()["amd64"], AMD64), (source.layout.names()["arm64"], ARM64))
    source.layout.name("both", both)
    with registry(base / "registry") as running:
        for tag, name, more in (
            ("1", "both", ["--all"]),
            ("2", "second", []),
            ("docker", "amd64", ["--format", "v2s2"]),
        ):
            there = f"docker://{running.host}/x:{tag}"
            run("skopeo", "copy", "--dest-tls-verify=false", *more, f"oci:{source.layout.root}:{name}", there)
        yield running


def digest_of(served: Registry, tag: str) -> Digest:
    words = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{served.host}/x:{tag}"]
    return Digest.of(subprocess.run(words, check=True, capture_output=True).stdout)


def manifests_asked(served: Registry) -> int:
    return len(served.requests("GET", "/manifests/"))


def test_a_full_reference_is_pulled_once_and_then_found_here(served: Registry, tmp_path: Path) -> None:
    reference = f"{served.host}/x:1"
    told: list[str] = []
    system = SystemFiles(tmp_path / "data", arch="x86_64")
    image = system.image(reference, progress=lambda subject, done, total: told.append(subject))
    assert told
    assert image.reference == reference
    assert gzip.decompress(image.layers[0].read_bytes()) == tar(file("file", b"1"))
    asked = manifests_asked(served)
    assert system.image(reference) == image
    assert system.image(image.digest).layers == image.layers
    assert manifests_asked(served) == asked
    other = SystemFiles(tmp_path / "data", arch="aarch64").image(reference)
    assert other.config["architecture"] == "arm64"
    assert system.image(reference) == image


def test_a_pinned_reference_gives_exactly_its_digest_and_pins_do_not_displace_each_other(
    served: Registry, tmp_path: Path
) -> None:
    system = SystemFiles(tmp_path / "data", arch="x86_64")
    pins = [f"{served.host}/x@{digest_of(served, tag)}" for tag in ("2", "docker", "1")]
    images = [system.image(pin) for pin in pins]
    for pin, image in zip(pins[:2], images[:2], strict=True):
        assert pin.endswith(image.digest)
    root = system.paths.oci_cache
    run("umoci", "gc", "--layout", root)
    asked = manifests_asked(served)
    assert [system.image(pin) for pin in pins] == images
    assert manifests_asked(served) == asked
    for image in images:
        write_rootfs_disk(tmp_path / "disk", image.layers)


def test_a_tag_and_a_pin_of_the_same_name_are_two_images(served: Registry, tmp_path: Path) -> None:
    system = SystemFiles(tmp_path / "data", arch="x86_64")
    by_tag = system.image(f"{served.host}/x:1")
    pinned = system.image(f"{served.host}/x:1@{digest_of(served, '2')}")
    assert pinned.layers != by_tag.layers
    assert system.image(f"{served.host}/x:1") == by_tag


def test_what_another_tool_collected_or_cut_is_pulled_again(served: Registry, tmp_path: Path) -> None:
    reference = f"{served.host}/x:1"
    system = SystemFiles(tmp_path / "data", arch="x86_64")
    image = system.image(reference)
    image.layers[0].unlink()
    assert system.image(reference) == image
    whole = image.layers[0].read_bytes()
    image.layers[0].unlink()
    image.layers[0].write_bytes(whole[:20])
    assert system.image(reference) == image
    assert image.layers[0].read_bytes() == whole


def test_a_registry_that_does_not_have_it_is_told_with_what_to_do(served: Registry, tmp_path: Path) -> None:
    system = SystemFiles(tmp_path / "data", arch="x86_64")
    for reference in (f"{served.host}/nothing:1", f"{served.host}/x@{NOWHERE.digest}", "127.0.0.1:9/x"):
        with pytest.raises(SourceUnavailable) as refused:
            system.image(reference)
        assert "skopeo copy" in str(refused.value)
        assert "profile" not in str(refused.value)


def test_mirrors_are_asked_first(served: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSTEMFILES_MIRRORS", f"docker.io/library/={served.host}/")
    image = SystemFiles(tmp_path / "data", arch="x86_64").image("docker.io/library/x:2")
    assert gzip.decompress(image.layers[0].read_bytes()) == tar(file("file", b"2"))


_PULL = """
import sys
from systemfiles import SystemFiles
print(SystemFiles(sys.argv[1], arch="x86_64").image(sys.argv[2]).digest)
"""


def test_many_at_once_pull_it_once(served: Registry, tmp_path: Path) -> None:
    layers = len(served.requests("GET", "/blobs/"))
    command = [sys.executable, "-c", _PULL, str(tmp_path / "data"), f"{served.host}/x:2"]
    processes = [subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate()[0] for process in processes}
    assert len(said) == 1
    assert len(served.requests("GET", "/blobs/")) == layers + 2


# ── at hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_three_calls_make_the_disks_of_an_image(
    content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content.layout.name("x", content.image())
    monkeypatch.chdir(tmp_path)
    image = content.find("x")
    write_rootfs_disk("rootfs.img", image.layers)
    write_config_disk("config.img", GuestConfig.from_image(image.config))
    write_overlay_disk("overlay.img", 16 << 20)
    assert run("debugfs", "-R", "cat /file", "rootfs.img") == "content"
    assert "CMD=" in run("debugfs", "-R", "cat /config.sh", "config.img")


def test_a_layer_that_cannot_be_opened_is_an_error_and_paths_and_files_are_the_same(tmp_path: Path) -> None:
    packed = tmp_path / "layer"
    packed.write_bytes(tar(file("a", b"x" * 100_000)))
    told: list[tuple[str, int, int | None]] = []
    write_rootfs_disk(tmp_path / "a", [packed], progress=lambda *said: told.append(said))
    write_rootfs_disk(tmp_path / "b", [io.BytesIO(packed.read_bytes())])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert told[-1] == ("a: writing", 100_000, 100_000)
    size = packed.stat().st_size
    assert ("a: unpacking", size, size) in told
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(StoreError, match="cannot be read"):
            write_rootfs_disk(tmp_path / "c", [packed, path])
    assert not (tmp_path / "c").exists()


def test_the_package_gives_these_names_and_refuses_others() -> None:
    import systemfiles as package

    for name in package.__all__:
        assert getattr(package, name)
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        package.nope  # type: ignore[attr-defined]  # noqa: B018

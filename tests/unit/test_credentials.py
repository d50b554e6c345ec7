"""Whose credentials go to which host: found where people keep them, and told to nobody else, not even in a message."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from systemfiles.foundation.errors import UsageError
from systemfiles.sources import credentials
from systemfiles.sources.credentials import VARIABLE, Credential, credential_for

HOST = "registry.example.com"
SECRET = "correct-horse"
LOGIN = Credential("operator", SECRET)
HUB = "https://index.docker.io/v1/"


def encoded(user: str = "operator", password: str = SECRET) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


class Home:
    """A home directory, and the environment of whoever lives there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environ = {"HOME": str(path)}

    def docker(self, config: object) -> None:
        (self.path / ".docker").mkdir(exist_ok=True)
        raw = config if isinstance(config, bytes) else json.dumps(config).encode()
        (self.path / ".docker" / "config.json").write_bytes(raw)

    def netrc(self, text: str, *, mode: int = 0o600) -> None:
        (self.path / ".netrc").write_text(text)
        (self.path / ".netrc").chmod(mode)

    def find(self, host: str = HOST, *, registry: bool = True) -> Credential | None:
        return credential_for(host, registry=registry, environ=self.environ)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Installs a credential helper, a shell script; returns the file that it writes what it was asked to."""

    def install(name: str, script: str) -> Path:
        programs, asked = tmp_path / "bin", tmp_path / "asked"
        programs.mkdir(exist_ok=True)
        program = programs / f"docker-credential-{name}"
        program.write_text(f'#!/bin/sh\n(echo "$@"; cat) > {asked}\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
        return asked

    return install


# what a credential is


def test_a_password_becomes_a_basic_header_in_utf_8() -> None:
    assert LOGIN.header == f"Basic {encoded()}"
    assert Credential("ü", "p:ä").header == "Basic " + base64.b64encode("ü:p:ä".encode()).decode()


def test_a_token_becomes_a_bearer_header() -> None:
    assert Credential(token="abc").header == "Bearer abc"


def test_a_credential_does_not_print_what_it_holds() -> None:
    assert SECRET not in repr(LOGIN) + str(LOGIN) + repr(Credential(token=SECRET))


def test_nobody_is_known_to_be_anybody(home: Home) -> None:
    assert home.find() is None


# the environment


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (f"{HOST}=basic:operator:{SECRET}", LOGIN),
        (f"{HOST}=bearer:abc", Credential(token="abc")),
        (f"{HOST}=bearer:a:b=c", Credential(token="a:b=c")),
        (f"{HOST}=basic:operator:a:b=c", Credential("operator", "a:b=c")),
        (f"{HOST}=basic:operator", Credential("operator", "")),
        (f"other=basic:a:b  {HOST}=basic:operator:{SECRET}\n", LOGIN),
        (f"{HOST}:5000=basic:a:b", None),
        (f"other.{HOST}=basic:a:b", None),
        ("example.com=basic:a:b", None),
        ("", None),
    ],
)
def test_the_environment_names_credentials_by_host(home: Home, value: str, found: Credential | None) -> None:
    home.environ[VARIABLE] = value
    assert home.find(registry=True) == found
    assert home.find(registry=False) == found


def test_a_port_makes_another_host(home: Home) -> None:
    home.environ[VARIABLE] = "127.0.0.1:5000=basic:a:b 127.0.0.1:5001=basic:c:d"
    assert home.find("127.0.0.1:5001") == Credential("c", "d")
    assert home.find("127.0.0.1") is None


@pytest.mark.parametrize("value", [HOST, f"{HOST}={SECRET}", f"{HOST}=digest:{SECRET}", f"{HOST}=basic:"])
def test_an_entry_that_cannot_be_read_is_refused_without_its_secret(home: Home, value: str) -> None:
    home.environ[VARIABLE] = value
    with pytest.raises(UsageError) as caught:
        home.find("unrelated.example.com")
    assert SECRET not in str(caught.value)
    assert "host=basic:USER:PASSWORD" in str(caught.value)


# docker's config


@pytest.mark.parametrize(
    "key", [HOST, *(f"{scheme}{HOST}{path}" for scheme in ("", "https://", "http://") for path in ("/", "/v1/", "/v2"))]
)
@pytest.mark.parametrize("entry", [{"auth": encoded()}, {"username": "operator", "password": SECRET}])
def test_a_docker_login_is_found(home: Home, key: str, entry: dict[str, str]) -> None:
    home.docker({"auths": {"other.example.com": {"auth": encoded("x", "y")}, key: entry}})
    assert home.find() == LOGIN


@pytest.mark.parametrize(
    "key",
    [
        f"{HOST}:5000",
        f"https://{HOST}:5000/",
        f"https://evil.example/{HOST}",
        f"evil.example/{HOST}/",
        f"https://evil.example@{HOST}",
        f"ftp://{HOST}",
        f"{HOST}.evil.example/v1/",
        f"https://https://{HOST}",
        "",
    ],
)
def test_a_docker_login_elsewhere_is_not_found(home: Home, key: str) -> None:
    home.docker({"auths": {key: {"auth": encoded()}}})
    assert home.find() is None


def test_a_docker_login_with_a_port_is_for_that_port(home: Home) -> None:
    home.docker({"auths": {f"https://{HOST}:5000/v2/": {"auth": encoded()}}})
    assert home.find(f"{HOST}:5000") == LOGIN
    assert home.find(f"{HOST}:5001") is None


def test_a_docker_login_is_for_registries_only(home: Home) -> None:
    home.docker({"auths": {HOST: {"auth": encoded()}}})
    assert home.find(registry=False) is None


@pytest.mark.parametrize("key", [HUB, "index.docker.io", "https://index.docker.io/v2/", "docker.io"])
def test_the_login_of_docker_hub_goes_by_other_names(home: Home, key: str) -> None:
    home.docker({"auths": {key: {"auth": encoded()}}})
    assert home.find("docker.io") == LOGIN
    assert home.find(HOST) is None


def test_docker_config_may_be_elsewhere(home: Home, tmp_path: Path) -> None:
    home.docker({"auths": {HOST: {"auth": encoded("x", "y")}}})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps({"auths": {HOST: {"auth": encoded()}}}))
    home.environ["DOCKER_CONFIG"] = str(tmp_path / "elsewhere")
    assert home.find() == LOGIN


def test_a_password_may_hold_colons(home: Home) -> None:
    home.docker({"auths": {HOST: {"auth": encoded("operator", "a:b:c")}}})
    assert home.find() == Credential("operator", "a:b:c")


def test_an_empty_login_is_none(home: Home) -> None:
    home.docker({"auths": {HOST: {}}})
    assert home.find() is None


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        {"auths": SECRET + HOST},
        {"auths": [HOST]},
        {"auths": {HOST: SECRET}},
        {"auths": {HOST: {"auth": SECRET}}},
        {"auths": {HOST: {"auth": 5}}},
        {"auths": {HOST: {"auth": base64.b64encode(b"\xff\xfe").decode()}}},
        {"auths": {HOST: {}}, "credHelpers": [HOST]},
    ],
)
def test_a_config_that_makes_no_sense_is_passed_over_and_told_without_a_secret(
    home: Home, config: object, caplog: pytest.LogCaptureFixture
) -> None:
    home.docker(config)
    home.netrc(f"machine {HOST} login operator password {SECRET}")
    assert home.find() == LOGIN
    assert "config.json cannot be read" in caplog.text
    assert SECRET not in caplog.text


# credential helpers


def test_a_helper_is_asked_for_its_host(home: Home, helper: Callable[[str, str], Path]) -> None:
    asked = helper("vault", f"""echo '{{"ServerURL": "x", "Username": "operator", "Secret": "{SECRET}"}}'""")
    home.docker({"credHelpers": {HOST: "vault"}, "auths": {HOST: {"auth": encoded("x", "y")}}})
    assert home.find() == LOGIN
    assert asked.read_text() == f"get\n{HOST}"


def test_a_helper_is_asked_by_the_name_that_the_config_has(home: Home, helper: Callable[[str, str], Path]) -> None:
    asked = helper("vault", f"""echo '{{"Username": "operator", "Secret": "{SECRET}"}}'""")
    home.docker({"credHelpers": {f"https://{HOST}/v1/": "vault"}})
    assert home.find() == LOGIN
    assert asked.read_text() == f"get\nhttps://{HOST}/v1/"


def test_a_helper_may_give_a_refresh_token_instead(home: Home, helper: Callable[[str, str], Path]) -> None:
    helper("vault", f"""echo '{{"Username": "<token>", "Secret": "{SECRET}"}}'""")
    home.docker({"credHelpers": {HOST: "vault"}})
    assert home.find() == Credential(refresh=SECRET)


def test_a_login_may_be_a_refresh_token_which_is_no_header(home: Home) -> None:
    home.docker({"auths": {HOST: {"auth": encoded(), "identitytoken": "to-be-renewed"}}})
    found = home.find()
    assert found == Credential(refresh="to-be-renewed")
    assert found.header is None
    assert "to-be-renewed" not in repr(found)


def test_a_helper_is_not_asked_for_other_hosts(home: Home, helper: Callable[[str, str], Path]) -> None:
    asked = helper("vault", "exit 1")
    home.docker({"credHelpers": {HOST: "vault"}})
    assert home.find("other.example.com") is None
    assert not asked.exists()


def test_the_store_is_asked_for_hosts_that_were_logged_in_to(home: Home, helper: Callable[[str, str], Path]) -> None:
    asked = helper("desktop", f"""echo '{{"Username": "operator", "Secret": "{SECRET}"}}'""")
    home.docker({"credsStore": "desktop", "auths": {HUB: {}}})
    assert home.find("docker.io") == LOGIN
    assert asked.read_text() == f"get\n{HUB}"
    asked.unlink()
    assert home.find(HOST) is None
    assert not asked.exists()


@pytest.mark.parametrize(
    "script",
    [
        "echo credentials not found; exit 1",
        "echo",
        f"echo {SECRET}",
        "echo '[]'",
        "echo '{}'",
        """echo '{"Username": "x"}'""",
        "printf '\\377'",
        "exec sleep 60",
    ],
)
def test_a_helper_that_gives_nothing_is_passed_over_and_told_without_a_secret(
    home: Home,
    helper: Callable[[str, str], Path],
    script: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(credentials, "_HELPER_SECONDS", 0.5)
    helper("vault", script)
    home.docker({"credHelpers": {HOST: "vault"}, "auths": {HOST: {"auth": encoded()}}})
    assert home.find() == LOGIN
    assert "docker-credential-vault gave nothing" in caplog.text
    assert SECRET not in caplog.text


def test_a_helper_that_is_not_installed_is_passed_over(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.docker({"credHelpers": {HOST: "not-there"}})
    assert home.find() is None
    assert "docker-credential-not-there" in caplog.text


@pytest.mark.parametrize("name", ["../evil", "/bin/sh", "a b", "a;b", ""])
def test_a_helper_whose_name_is_no_word_is_not_run(home: Home, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    home.docker({"credHelpers": {HOST: name}})
    assert home.find() is None
    assert "gave nothing" not in caplog.text


# netrc


@pytest.mark.parametrize("registry", [True, False])
@pytest.mark.parametrize("host", [HOST, f"{HOST}:8443"])
def test_netrc_names_credentials_by_machine_whatever_the_port(home: Home, host: str, registry: bool) -> None:
    home.netrc(f"machine other login x password y\nmachine {HOST}\n  login operator\n  password {SECRET}\n")
    assert home.find(host, registry=registry) == LOGIN


def test_the_default_of_netrc_goes_to_nobody(home: Home) -> None:
    home.netrc("default login anonymous password me@example.com")
    assert home.find() is None


def test_netrc_may_be_elsewhere(home: Home, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(f"machine {HOST} login operator password {SECRET}")
    home.environ["NETRC"] = str(elsewhere)
    assert home.find() == LOGIN


@pytest.mark.parametrize("text", [f"{SECRET} {HOST}", f"machine {HOST} word {SECRET}"])
def test_a_netrc_that_makes_no_sense_is_passed_over_and_told_without_a_secret(
    home: Home, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    home.netrc(text)
    assert home.find() is None
    assert ".netrc cannot be read" in caplog.text
    assert SECRET not in caplog.text


def test_a_machine_without_a_login_is_nobody(home: Home) -> None:
    home.netrc(f"machine {HOST} password {SECRET}")
    assert home.find() is None


def test_a_netrc_that_is_a_directory_is_passed_over(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    (home.path / ".netrc").mkdir()
    assert home.find() is None
    assert ".netrc cannot be read" in caplog.text


# order


def test_the_environment_comes_before_docker_and_docker_before_netrc(home: Home) -> None:
    home.netrc(f"machine {HOST} login netrc password x")
    assert home.find() == Credential("netrc", "x")
    home.docker({"auths": {HOST: {"auth": encoded("docker", "x")}}})
    assert home.find() == Credential("docker", "x")
    assert home.find(registry=False) == Credential("netrc", "x")
    home.environ[VARIABLE] = f"{HOST}=basic:environment:x"
    assert home.find() == Credential("environment", "x")

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from edged import schema
from edged.errors import ConfigError
from edged.options import Settings, default_device, default_state_dir, entries, sections
from edged.settings import (
    MB,
    Client,
    Limits,
    Model,
    Mqtt,
    State,
    is_loopback,
    load,
    packet_bytes,
    read_password,
    toml_value,
    warnings,
)

#: One wrong value for each setting, as TOML has it.
WRONG: dict[str, Any] = {
    "device": "my device",
    "mqtt.host": "mqtt://broker",
    "mqtt.port": 70000,
    "mqtt.username": "a\nb",
    "mqtt.password_file": "/nowhere/at/all",
    "mqtt.tls": "perhaps",
    "mqtt.ca": "/nowhere/ca",
    "mqtt.cert": "/nowhere/cert",
    "mqtt.key": "/nowhere/key",
    "mqtt.base_topic": "edged/+",
    "mqtt.client_id": "a b",
    "mqtt.protocol": "4",
    "mqtt.keepalive_s": 1,
    "mqtt.session_expiry_s": -1,
    "mqtt.reply_prefixes": ["edged/reply/", "#"],
    "client.username": "a/b",
    "client.password_file": "/nowhere/at/all",
    "client.cert": "/nowhere/cert",
    "client.key": "/nowhere/key",
    "model.name": "a b",
    "model.path": ".",
    "model.provider": "gpu",
    "model.threads": 0,
    "model.max_context": 10,
    "state.dir": ".",
    "state.frames": "maybe",
    "state.frames_mb": 0,
    "state.stop_s": -1,
    "health.interval_s": 0,
    "limits.queue": 0,
    "limits.payload_mb": 1000,
    "limits.frames": 0,
    "limits.max_tokens": 0,
    "limits.journal_mb": 0,
    "limits.memory_mb": 1,
    "limits.results": 0,
    "limits.results_s": 0,
    "stream.interval_ms": -1,
    "stream.max_bytes": 0,
    "vision.first_token_s": 0,
    "vision.cache_mb": -1,
    "cameras.max": -1,
    "cameras.buffer_s": 0,
    "cameras.buffer_mb": 0,
    "cameras.username": "",
    "cameras.password_file": "/nowhere/at/all",
    "cameras.cert": "/nowhere/cert",
    "cameras.key": "/nowhere/key",
    "log.level": "loud",
    "log.format": "xml",
}

#: Two right values for each setting that names no file, as TOML has them.
RIGHT: dict[str, tuple[Any, Any]] = {
    "device": ("door", "gate"),
    "mqtt.host": ("broker.lan", "::1"),
    "mqtt.port": (1, 65535),
    "mqtt.username": ("a", "b c"),
    "mqtt.tls": (True, False),
    "mqtt.base_topic": ("home", "home/cellar"),
    "mqtt.client_id": ("x", "y/z"),
    "mqtt.protocol": ("5", "3.1.1"),
    "mqtt.keepalive_s": (5, 300),
    "mqtt.session_expiry_s": (1, 0xFFFFFFFE),
    "mqtt.reply_prefixes": (["a/", "b/c"], []),
    "client.username": ("desk", "desk-2"),
    "model.name": ("phi", "phi-3.5:latest"),
    "model.path": ("/a/b", "/c"),
    "model.provider": ("cpu", "cuda"),
    "model.threads": (1, 4),
    "model.max_context": (256, 4096),
    "state.dir": ("/a", "/b"),
    "state.frames": ("none", "durable"),
    "state.frames_mb": (64, 0.5),
    "state.stop_s": (0, 1.5),
    "health.interval_s": (0.5, 60),
    "limits.queue": (1, 2),
    "limits.payload_mb": (0.5, 1),
    "limits.frames": (1, 2),
    "limits.max_tokens": (1, 2),
    "limits.journal_mb": (100, 200.5),
    "limits.memory_mb": (100, 200.5),
    "limits.results": (1, 2),
    "limits.results_s": (1, 2.5),
    "stream.interval_ms": (0, 1),
    "stream.max_bytes": (16, 64),
    "vision.first_token_s": (0.5, 3),
    "vision.cache_mb": (0, 1),
    "cameras.max": (1, 2),
    "cameras.buffer_s": (0.5, 1),
    "cameras.buffer_mb": (1, 2),
    "cameras.username": ("a", "b"),
    "log.level": ("debug", "error"),
    "log.format": ("json", "console"),
}


@pytest.fixture(name="read")
def _read(tmp_path: Path) -> Any:
    """Load in an empty environment, with TOML text as the settings file if any is given."""

    def read(
        toml: str | None = None,
        overrides: Mapping[str, str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        config = None
        if toml is not None:
            config = tmp_path / "edged.toml"
            config.write_text(toml)
        return load(config, overrides, environ or {}, default_config=tmp_path / "absent.toml")

    return read


@pytest.fixture(name="mistakes")
def _mistakes(read: Any) -> Any:
    def mistakes(*args: Any, **kwargs: Any) -> list[str]:
        with pytest.raises(ConfigError) as raised:
            read(*args, **kwargs)
        assert raised.value.exit_status == 78
        assert all("\n" not in line for line in raised.value.mistakes)
        return raised.value.mistakes

    return mistakes


@pytest.fixture(name="pair", scope="module")
def _pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    subprocess.run(
        [*command.split(), "-subj", "/CN=edged", "-out", cert, "-keyout", key],
        check=True,
        capture_output=True,
    )
    return cert, key


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_toml(name: str, value: Any) -> str:
    section, _, key = name.rpartition(".")
    line = f"{key} = {toml_value(value)}"
    return f"[{section}]\n{line}\n" if section else f"{line}\n"


def value_of(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def test_the_tables_here_name_every_setting() -> None:
    assert set(WRONG) == set(entries())
    files = {n for n in entries() if n.rpartition(".")[2] in {"password_file", "ca", "cert", "key"}}
    assert set(RIGHT) == set(entries()) - files


def test_the_names_of_the_contract() -> None:
    names = {
        "mqtt": "host port username password_file tls ca cert key base_topic client_id protocol "
        "keepalive_s session_expiry_s reply_prefixes",
        "client": "username password_file cert key",
        "model": "name path provider threads max_context",
        "state": "dir frames stop_s",
        "health": "interval_s",
        "limits": "queue payload_mb frames max_tokens journal_mb memory_mb results results_s",
        "stream": "interval_ms max_bytes",
        "vision": "first_token_s cache_mb",
        "cameras": "max buffer_s buffer_mb username password_file cert key",
    }
    wanted = {f"{section}.{key}" for section, keys in names.items() for key in keys.split()}
    assert wanted | {"device"} <= set(entries())


# Wrong values


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_in_the_file(name: str, mistakes: Any, tmp_path: Path) -> None:
    found = mistakes(as_toml(name, WRONG[name]))
    assert found[0].startswith(f"{name} ({tmp_path}/edged.toml, line ")
    assert "; " in found[0]


@pytest.mark.parametrize("name", [n for n in WRONG if WRONG[n] != ""])
def test_a_wrong_value_in_the_environment(name: str, mistakes: Any) -> None:
    variable = "EDGED_" + name.upper().replace(".", "__")
    found = mistakes(environ={variable: as_text(WRONG[name])})
    assert found[0].startswith(f"{name} (environment variable {variable}): ")
    assert "; " in found[0]


@pytest.mark.parametrize("name", [n for n in WRONG if WRONG[n] != ""])
def test_a_wrong_value_on_the_command_line(name: str, mistakes: Any) -> None:
    found = mistakes(overrides={name: as_text(WRONG[name])})
    assert found[0].startswith(f"{name} (command line): ")
    assert "; " in found[0]


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("mqtt.port = '1883'", "'1883' is not a whole number from 1 to 65535; write port = 1883"),
        ("mqtt.port = true", "true is not a whole number"),
        ("mqtt.port = 1.5", "1.5 is not a whole number"),
        ("mqtt.port = 99999999999999999999999", "is not a whole number"),
        ("mqtt.tls = 1", "1 is not true or false; write tls = false in [mqtt]"),
        ("mqtt.protocol = 5", '5 is not one of "5", "3.1.1"; write protocol = "5" in [mqtt]'),
        ("mqtt.host = 3", "3 is not text"),
        ("mqtt.host = 2020-01-01", "is not text"),
        ("mqtt.reply_prefixes = 'a/'", "'a/' is not a list of texts"),
        ("mqtt.reply_prefixes = [1]", "[1] is not a list of texts"),
        ("mqtt.reply_prefixes = ['']", "0 bytes"),
        ("health.interval_s = nan", "is not a number from 0.1 to 3600"),
        ("health.interval_s = inf", "is not a number from 0.1 to 3600"),
        ("vision.first_token_s = 0", "is not a number above 0 up to 3600"),
        ("device = 'reply'", "kept for reply topics"),
        ("device = ''", "1 to 64"),
        ("mqtt = 3", "this is a group of settings; write host = "),
        ("mqtt.host.name = 'x'", "is not text"),
        ("mqtt.base_topic = 'a//b'", "levels"),
        ("mqtt.base_topic = '/a'", "levels"),
        ("mqtt.base_topic = 'a/b/c/d/e/f/g/h/i'", "levels"),
    ],
)
def test_a_line_of_the_file_that_is_wrong(toml: str, words: str, mistakes: Any) -> None:
    (found,) = mistakes(toml)
    assert "line 1" in found
    assert words in found


@pytest.mark.parametrize(
    "host",
    ["broker..local", "-x", "a b", "", "tcp://x", "x:1883", "u:hunter2@x", "x/y", "b\0c", "ü" * 70],
)
def test_host_names_that_would_end_the_network_thread(host: str, mistakes: Any) -> None:
    (found,) = mistakes(f"mqtt.host = {json.dumps(host)}")
    assert found.startswith("mqtt.host (")
    assert "hunter2" not in found


@pytest.mark.parametrize("host", ["a", "a.b", "10.0.0.1", "fe80::1%eth0", "[::1]", "bü.example"])
def test_host_names_that_are_fine(host: str, read: Any) -> None:
    assert read(f"mqtt.host = {json.dumps(host)}").mqtt.host == host.strip("[]")


def test_every_mistake_of_every_source_is_told_at_once(mistakes: Any) -> None:
    found = mistakes(
        "[mqtt]\nport = 0\n[limits]\nqueue = 'many'\n",
        {"stream.max_bytes": "x"},
        {"EDGED_MQTT__PORT": "1", "EDGED_LOG__LEVEL": "x"},
    )
    assert [line.partition(" ")[0] for line in found] == [
        "mqtt.port",
        "limits.queue",
        "log.level",
        "stream.max_bytes",
    ]


def test_line_numbers_of_every_way_to_write_a_key(mistakes: Any) -> None:
    found = mistakes(
        '# a comment\nmqtt.port = 0\nlog = { level = "x" }\n\n'
        "[ 'limits' ]\n  \"queue\" = 0\n[stream] # why\nmax_bytes=0\n"
    )
    assert [line.partition("line ")[2].partition(")")[0] for line in found] == ["2", "3", "6", "8"]


# Unknown names


@pytest.mark.parametrize(
    ("toml", "name", "near"),
    [
        ("[mqtt]\nhots = 1", "mqtt.hots", "mqtt.host"),
        ("[mqttt]\nhost = 1", "mqttt.host", "mqtt.host"),
        ("usernames = 1", "usernames", "mqtt.username"),
        ("devise = 1", "devise", "device"),
        ("[mqtt]\nkeepalive = 1", "mqtt.keepalive", "mqtt.keepalive_s"),
        ("[limits]\nMax_Tokens = 1", "limits.Max_Tokens", "limits.max_tokens"),
        ("mqtt_port = 1", "mqtt_port", "mqtt.port"),
    ],
)
def test_an_unknown_name_gets_the_nearest(toml: str, name: str, near: str, mistakes: Any) -> None:
    (found,) = mistakes(toml)
    assert found.startswith(f"{name} (")
    assert f"did you mean {near}?" in found


def test_an_unknown_name_that_is_near_to_nothing(mistakes: Any) -> None:
    (found,) = mistakes("zzzzqqq = 1")
    assert "edged schema config" in found


def test_an_unknown_name_cannot_break_the_line(mistakes: Any) -> None:
    assert len(mistakes('"a\\nb" = 1')) == 1


def test_unknown_variables_are_refused_by_name(mistakes: Any) -> None:
    found = mistakes(environ={"EDGED_MQTT_HOST": "x", "EDGED_MQTT__HOSTS": "", "OTHER": "x"})
    assert len(found) == 2
    assert all("did you mean EDGED_MQTT__HOST?" in line for line in found)


def test_a_group_is_no_setting(mistakes: Any) -> None:
    (found,) = mistakes(environ={"EDGED_MQTT": "{}"})
    assert "write EDGED_MQTT__HOST=localhost" in found


# Passwords


@pytest.mark.parametrize("group", ["mqtt", "client", "cameras"])
@pytest.mark.parametrize("source", ["toml", "env", "cli"])
def test_a_password_is_refused_and_not_printed(group: str, source: str, mistakes: Any) -> None:
    given: dict[str, Any] = {
        "toml": {"toml": f"[{group}]\npassword = 'hunter2'"},
        "env": {"environ": {f"EDGED_{group.upper()}__PASSWORD": "hunter2"}},
        "cli": {"overrides": {f"{group}.password": "hunter2"}},
    }
    (found,) = mistakes(**given[source])
    assert "hunter2" not in found
    assert f"use {group}.password_file" in found


@pytest.mark.parametrize("value", ["hunter2", "\0hunter2"])
def test_a_password_in_the_place_of_its_file_is_not_printed(value: str, mistakes: Any) -> None:
    (found,) = mistakes(f"mqtt.username = 'x'\nmqtt.password_file = {json.dumps(value)}")
    assert "hunter2" not in found


@pytest.mark.parametrize(
    ("content", "password"),
    [(b"x\n", "x"), (b"x", "x"), (b"x\r\n", "x"), (b" x \nrest", " x "), ("ü\n".encode(), "ü")],
)
def test_reading_a_password(content: bytes, password: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(content)
    assert read_password(file) == password


@pytest.mark.parametrize("content", [None, b"", b"\nx", b"\xff", b"a\0b", b"x" * 70000])
def test_a_password_file_that_is_none(content: bytes | None, mistakes: Any, tmp_path: Path) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError):
        read_password(file)
    (found,) = mistakes(overrides={"mqtt.username": "x", "mqtt.password_file": str(file)})
    assert found.startswith("mqtt.password_file (command line): ")


def test_a_pipe_as_password_file_does_not_wait(mistakes: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = str(tmp_path / "pipe")
    (found,) = mistakes(overrides={"mqtt.username": "x", "mqtt.password_file": pipe})
    assert "no regular file" in found


# Precedence


@pytest.mark.parametrize("name", RIGHT)
def test_environment_beats_the_file_and_the_command_line_both(name: str, read: Any) -> None:
    low, high = RIGHT[name]
    variable = "EDGED_" + name.upper().replace(".", "__")
    low_toml, high_toml = as_toml(name, low), as_toml(name, high)
    low_text, high_text = as_text(low), as_text(high)
    assert value_of(read(low_toml), name) == low
    assert value_of(read(high_toml), name) == high
    assert value_of(read(low_toml, environ={variable: high_text}), name) == high
    assert value_of(read(high_toml, environ={variable: low_text}), name) == low
    assert value_of(read(high_toml, {name: low_text}, {variable: high_text}), name) == low
    assert value_of(read(high_toml, environ={variable: ""}), name) == high  # as if it were not set


def test_an_empty_value_on_the_command_line_takes_an_optional_one_away(
    read: Any, mistakes: Any
) -> None:
    assert read("mqtt.username = 'x'", {"mqtt.username": ""}).mqtt.username is None
    assert mistakes(overrides={"mqtt.port": ""})


def test_lists_from_text(read: Any) -> None:
    prefixes = {"mqtt.reply_prefixes": "a/, b/c ,"}
    assert read(overrides=prefixes).mqtt.reply_prefixes == ("a/", "b/c")


def test_credentials_stand_between_environment_and_file(
    read: Any, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    for name in ("mqtt-password", "client-password", "cameras-password", "other"):
        (folder / name).write_text("secret")
    for group in ("mqtt", "client", "cameras"):
        (folder / f"{group}-cert").write_bytes(pair[0].read_bytes())
        (folder / f"{group}-key").write_bytes(pair[1].read_bytes())
    (folder / "mqtt-ca").write_bytes(pair[0].read_bytes())
    other = tmp_path / "other"
    other.write_text("x")
    environ = {"CREDENTIALS_DIRECTORY": str(folder)}
    toml = f"mqtt.tls = true\nmqtt.password_file = '{other}'\n"
    toml += "".join(f"{group}.username = 'x'\n" for group in ("mqtt", "client", "cameras"))
    settings = read(toml, environ=environ)
    for group in (settings.mqtt, settings.client, settings.cameras):
        section = type(group).__name__.lower()
        assert group.password_file == folder / f"{section}-password"
        assert group.cert == folder / f"{section}-cert"
        assert group.key == folder / f"{section}-key"
    assert settings.mqtt.ca == folder / "mqtt-ca"
    environ["EDGED_MQTT__PASSWORD_FILE"] = str(other)
    assert read(toml, environ=environ).mqtt.password_file == other


def test_a_bad_credential_is_named(mistakes: Any, tmp_path: Path) -> None:
    (tmp_path / "mqtt-password").touch()
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "EDGED_MQTT__USERNAME": "x"}
    (found,) = mistakes(environ=environ)
    assert found.startswith(f"mqtt.password_file (credential {tmp_path}/mqtt-password): ")


def test_a_credential_that_only_the_unit_gives_is_absent(read: Any, tmp_path: Path) -> None:
    for name in ("mqtt-password", "mqtt-ca", "mqtt-cert", "mqtt-key", "cameras-password"):
        (tmp_path / name).write_bytes(b"\0")
    settings = read("", environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert settings.mqtt == read("").mqtt
    assert settings.cameras.password_file is None


# The file itself


def test_the_default_file_is_read_if_it_is_there(tmp_path: Path) -> None:
    config = tmp_path / "edged.toml"
    assert load(None, {}, {}, default_config=config).limits.queue == 256
    config.write_text("limits.queue = 3")
    assert load(None, {}, {}, default_config=config).limits.queue == 3


def test_which_file_is_read(tmp_path: Path) -> None:
    files = {}
    for number, name in enumerate(("default", "variable", "option")):
        files[name] = tmp_path / name
        files[name].write_text(f"limits.queue = {number + 1}")
    environ = {"EDGED_CONFIG": str(files["variable"])}
    default = files["default"]
    assert load(None, {}, {"EDGED_CONFIG": ""}, default_config=default).limits.queue == 1
    assert load(None, {}, environ, default_config=default).limits.queue == 2
    assert load(files["option"], {}, environ, default_config=default).limits.queue == 3


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    absent = tmp_path / "absent.toml"
    with pytest.raises(ConfigError, match=f"--config {absent}: there is no such file; "):
        load(absent, {}, {})
    with pytest.raises(ConfigError, match=r"EDGED_CONFIG .* there is no such file"):
        load(None, {}, {"EDGED_CONFIG": str(absent)})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); "):
        load(tmp_path, {}, {})


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("mqtt.port = 1\nmqtt.host = broker\n", ", line 2: this is not TOML"),
        ("[mqtt\n", ", line 1: this is not TOML"),
        ("a = '''", "this is not TOML"),
        ("a = 1\na = 2\n", "line 2"),
    ],
)
def test_a_file_that_is_no_toml(text: str, where: str, mistakes: Any) -> None:
    (found,) = mistakes(text)
    assert where in found
    assert "; write name = value" in found


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    config = tmp_path / "edged.toml"
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(config, {}, {})


def test_relative_paths_are_the_files_neighbours(read: Any, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("x")
    toml = "mqtt.username = 'x'\nmqtt.password_file = 'password'\nmodel.path = 'models/phi'"
    settings = read(toml)
    assert settings.mqtt.password_file == tmp_path / "password"
    assert settings.model.path == tmp_path / "models" / "phi"
    assert settings.model.name == "phi"


def test_relative_paths_elsewhere_are_below_the_working_directory(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(overrides={"model.path": "phi"}).model.path == tmp_path / "phi"
    assert read(environ={"EDGED_STATE__DIR": "x"}).state.dir == tmp_path / "x"


def test_a_working_directory_that_is_gone(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert read(overrides={"device": "x"}, environ={"EDGED_LIMITS__QUEUE": "1"}).device == "x"


# Settings that contradict each other


@pytest.mark.parametrize("group", ["mqtt", "client", "cameras"])
def test_certificate_and_key_belong_together(
    group: str, mistakes: Any, read: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = map(str, pair)
    tls = {"mqtt.tls": "true"}
    (found,) = mistakes(overrides={f"{group}.cert": cert, **tls})
    assert found.startswith(f"{group}.cert (command line): a certificate without its key; set ")
    (found,) = mistakes(overrides={f"{group}.key": key, **tls})
    assert found.startswith(f"{group}.key (command line): a key without its certificate; set ")
    both = {f"{group}.cert": cert, f"{group}.key": key}
    (found,) = mistakes(overrides=both)
    assert "needs TLS; set mqtt.tls = true" in found
    assert read(overrides={**both, **tls}).mqtt.tls
    (found,) = mistakes(overrides={f"{group}.cert": cert, f"{group}.key": cert, **tls})
    assert "do not belong together" in found
    other = tmp_path / "other"
    other.write_text("no pem")
    found = mistakes(overrides={f"{group}.cert": str(other), f"{group}.key": key, **tls})
    assert "no PEM file; " in found[0]


def test_an_encrypted_key_does_not_ask_for_its_passphrase(
    mistakes: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    encrypted = tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", pair[1], "-out", encrypted],
        check=True,
        capture_output=True,
    )
    (found,) = mistakes(f"mqtt = {{tls = true, cert = '{pair[0]}', key = '{encrypted}'}}")
    assert "the key is encrypted; " in found


def test_an_authority(mistakes: Any, read: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    (found,) = mistakes(overrides={"mqtt.ca": str(pair[0])})
    assert "no effect without TLS; " in found
    assert read(overrides={"mqtt.ca": str(pair[0]), "mqtt.tls": "true"}).mqtt.ca == pair[0]
    (found,) = mistakes(overrides={"mqtt.ca": str(pair[1]), "mqtt.tls": "true"})
    assert "holds no certificate; " in found


@pytest.mark.parametrize("group", ["mqtt", "client", "cameras"])
def test_a_password_without_a_user(group: str, mistakes: Any, read: Any, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("x")
    password = {f"{group}.password_file": str(file)}
    (found,) = mistakes(overrides=password)
    assert f"set {group}.username too" in found
    assert read(overrides=password | {f"{group}.username": "x"})
    assert read(overrides={f"{group}.username": "x"})


def test_answers_longer_than_the_context(mistakes: Any, read: Any) -> None:
    (found,) = mistakes("model.max_context = 512\nlimits.max_tokens = 512")
    assert found.startswith("limits.max_tokens (")
    assert read("model.max_context = 512").limits.max_tokens == 1024  # the default bends


def test_a_root_that_leaves_no_room_for_the_topics_below(mistakes: Any, read: Any) -> None:
    device = "d" * 64
    assert read(f"device = '{device}'\nmqtt.base_topic = '{'b' * 52}'")
    (found,) = mistakes(f"device = '{device}'\nmqtt.base_topic = '{'b' * 53}'")
    assert "too long for the topics below it; shorten" in found


def test_no_second_mistake_follows_from_a_first_one(mistakes: Any) -> None:
    assert len(mistakes("mqtt.cert = 3")) == 1
    assert len(mistakes("mqtt.key = '/nowhere/key'\nmqtt.cert = 3")) == 2


# The tree


def test_what_follows_from_other_settings() -> None:
    plain = Settings(device="door")
    assert plain.mqtt.port == 1883
    assert plain.mqtt.client_id == "edged-door"
    assert plain.mqtt.reply_prefixes == ("edged/reply/",)
    assert plain.model.name == "none"
    other = Settings(
        mqtt=Mqtt(tls=True, base_topic="home/x"), model=Model(path=Path("/models/Phi 3"))
    )
    assert other.mqtt.port == 8883
    assert other.mqtt.reply_prefixes == ("home/x/reply/",)
    assert other.model.name == "Phi-3"
    given = Settings(
        device="door",
        mqtt=Mqtt(tls=True, port=1, client_id="x", reply_prefixes=()),
        model=Model(name="phi", path=Path("/y")),
    )
    assert given.mqtt.port == 1
    assert given.mqtt.client_id == "x"
    assert given.mqtt.reply_prefixes == ()
    assert given.model.name == "phi"


def test_a_tree_made_in_code_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Settings()
    for name in ("DEVICE", "EDGED_DEVICE", "MQTT__HOST", "EDGED_MQTT__HOST", "MQTT", "EDGED_MQTT"):
        monkeypatch.setenv(name, "elsewhere")
    assert Settings() == plain
    assert load(None, {}, {}, default_config=Path("/absent")).mqtt == plain.mqtt


def test_a_home_that_nobody_has(mistakes: Any) -> None:
    (found,) = mistakes("model.path = '~no-such-user/phi'")
    assert "a home that is not known" in found


def test_a_group_may_be_shared_between_trees() -> None:
    mqtt = Mqtt()
    one, two = Settings(device="one", mqtt=mqtt), Settings(device="two", mqtt=mqtt)
    assert (one.mqtt.client_id, two.mqtt.client_id) == ("edged-one", "edged-two")


def test_the_tree_is_frozen_and_closed() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.device = "x"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.mqtt.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Settings.model_validate({"mqtt": {"hots": "x"}})


def test_every_setting_is_described() -> None:
    for entry in entries().values():
        assert entry.info.description, entry.name
        assert entry.info.description.endswith(".")
    assert all(group.__doc__ for group in sections().values())


@pytest.mark.parametrize(
    ("host", "device"),
    [("pi", "pi"), ("pi.lan", "pi-lan"), ("", None), ("ü", "edged"), ("reply", "reply-device")],
)
def test_the_device_is_the_host_name(host: str, device: str | None) -> None:
    assert default_device(host) == (device or default_device())


def test_a_long_host_name() -> None:
    assert default_device("x" * 200) == "x" * 64


@pytest.mark.parametrize(
    ("environ", "root", "folder"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a:/b", "XDG_STATE_HOME": "/x"}, False, "/var/lib/a"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/home/me"}, False, "/x/edged"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/home/me"}, False, "/home/me/.local/state/edged"),
        ({"HOME": "/home/me"}, False, "/home/me/.local/state/edged"),
        ({"HOME": "/root"}, True, "/var/lib/edged"),
        ({}, False, "/var/lib/edged"),
    ],
)
def test_the_state_folder(
    environ: dict[str, str], root: bool, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0 if root else 1000)
    assert default_state_dir(environ) == Path(folder)
    assert load(None, {}, environ, default_config=Path("/absent")).state.dir == Path(folder)


# Warnings


def test_the_defaults_give_no_warning() -> None:
    assert warnings(Settings()) == []


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("broker.localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("broker", False),
        ("10.0.0.1", False),
        ("fe80::1%lo", False),
        ("localhost.example.com", False),
        ("0.0.0.0", False),
    ],
)
def test_plain_text_without_a_password(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    found = warnings(Settings(mqtt=Mqtt(host=host)))
    assert len(found) == (0 if loopback else 1)
    assert loopback or "plain text and without a password" in found[0]
    assert warnings(Settings(mqtt=Mqtt(host=host, tls=True))) == []


def test_plain_text_with_a_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2")
    file.chmod(0o600)
    (found,) = warnings(Settings(mqtt=Mqtt(host="broker", username="x", password_file=file)))
    assert "the password and all answers can be read" in found
    assert "hunter2" not in found


def test_a_password_file_that_everybody_may_read(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2")
    file.chmod(0o644)
    (found,) = warnings(Settings(client=Client(password_file=file)))
    assert found.startswith("client.password_file: ")
    assert "chmod" in found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(mqtt=Mqtt(protocol="3.1.1")), "cannot announce a packet limit"),
        (Settings(limits=Limits(journal_mb=10)), "limits.journal_mb"),
        (Settings(model=Model(max_context=8192)), "4097"),
    ],
)
def test_other_warnings(settings: Settings, words: str) -> None:
    (found,) = warnings(settings)
    assert words in found
    assert "; " in found


def test_the_announced_packet_size() -> None:
    assert packet_bytes(Settings()) == 10 * MB + 65536
    assert packet_bytes(Settings(limits=Limits(payload_mb=200))) <= 268_435_455  # MQTT's own limit


# What is generated


def test_the_schema_is_a_schema() -> None:
    made = schema.config_schema()
    jsonschema.Draft202012Validator.check_schema(made)
    json.dumps(made)


@pytest.mark.parametrize("name", RIGHT)
def test_the_schema_takes_what_is_right(name: str) -> None:
    validator = jsonschema.Draft202012Validator(schema.config_schema())
    for value in RIGHT[name]:
        validator.validate(tomllib.loads(as_toml(name, value)))


def test_the_schema_refuses_what_is_wrong() -> None:
    validator = jsonschema.Draft202012Validator(schema.config_schema())
    for wrong in ({"mqtt": {"hots": 1}}, {"mqtt": {"port": 0}}, {"log": {"level": "x"}}, {"x": 1}):
        assert not validator.is_valid(wrong)


def test_the_example_file_is_the_defaults(read: Any) -> None:
    text = schema.config_toml()
    assert read(text) == read()
    lines = [
        line[1:] if line[:1] == "#" and line[1:2].isalpha() else line
        for line in text.replace("#e.g. ", "# e.g. ").splitlines()
    ]
    written = tomllib.loads("\n".join(lines))
    assert read("\n".join(lines)) == read()
    assert written["mqtt"]["protocol"] == "5"
    fixed = {e.name for e in entries().values() if e.default is not None}
    assert {f"{s}.{k}" for s, group in written.items() for k in group} == fixed


def test_the_examples_of_the_example_file_are_taken(read: Any) -> None:
    text = schema.config_toml().replace("#e.g. ", "")
    lines = [
        line
        for line in text.splitlines()
        if line.split(" ")[0] not in {"password_file", "ca", "cert", "key"}
    ]
    settings = read("\n".join(lines))
    assert settings.device == "door"
    assert settings.model.path == Path("/var/lib/edged/models/phi-3.5-mini")


def test_the_example_file_names_everything() -> None:
    text = schema.config_toml()
    assert max(map(len, text.splitlines())) <= 100
    for entry in entries().values():
        assert f"{entry.key} = " in text


def test_the_reference_names_everything() -> None:
    text = schema.config_markdown()
    for entry in entries().values():
        assert f"| `{entry.name}` |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


def test_state_is_not_made_by_reading(tmp_path: Path) -> None:
    Settings(state=State(dir=tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_a_client_need_not_read_the_daemons_secrets(tmp_path: Path) -> None:
    config = tmp_path / "edged.toml"
    config.write_text(
        "[mqtt]\nusername = 'edged'\npassword_file = 'absent'\n"
        "[client]\nusername = 'desk'\npassword_file = 'desk'\n"
    )
    (tmp_path / "desk").write_text("secret\n")
    assert load(config, environ={}, as_client=True).client.username == "desk"
    with pytest.raises(ConfigError, match=r"mqtt\.password_file"):
        load(config, environ={})
    (tmp_path / "desk").unlink()
    with pytest.raises(ConfigError, match=r"client\.password_file"):
        load(config, environ={}, as_client=True)

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.models import graph
from edged.models.folder import _ALLOWED, ModelError, fingerprint, inspect

PHI3 = Path(__file__).resolve().parents[2] / "models" / "phi3"
PHI4 = Path(__file__).resolve().parents[2] / "models" / "phi4-mini"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PHI3, tmp_path / "model"))


def change(
    folder: Path, edit: Callable[[dict[str, Any]], None], name: str = "genai_config"
) -> None:
    path = folder / f"{name}.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def test_what_the_small_models_are_is_seen_without_running_anything() -> None:
    phi3, phi4 = inspect(PHI3), inspect(PHI4)
    assert (phi3.family, phi3.type, phi3.context_length) == ("phi3", "phi3", 4096)
    assert (phi4.family, phi4.type, phi4.context_length) == ("phi4-mini", "phi3", 8192)
    config = json.loads((PHI4 / "genai_config.json").read_text())["model"]
    decoder = config["decoder"]
    cache = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"]
    assert phi4.kv_bytes == cache * decoder["head_size"] * 4
    assert list(phi4.eos_ids) == config["eos_token_id"]
    files = ("model.onnx", "model.onnx.data")
    assert phi4.weights_bytes == sum((PHI4 / name).stat().st_size for name in files)
    assert phi4.encoder_bytes == 0


def test_a_long_context_makes_a_phi3_a_phi35(folder: Path) -> None:
    change(folder, lambda c: c["model"].update(context_length=131072))
    assert inspect(folder).family == "phi3.5"


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder") as caught:
        inspect(tmp_path / "nothing")
    assert caught.value.hint == "set model.path"


@pytest.mark.parametrize(
    "name",
    [
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"{name} is missing"):
        inspect(folder)


def _session(options: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda c: c["model"]["decoder"]["session_options"].update(options)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_session({"custom_ops_library": "evil.so"}), "custom_ops_library"),
        (_session({"session.load_model_format": "ORT"}), "session.load_model_format"),
        (_session({"enable_profiling": "/tmp/x"}), "enable_profiling"),
        (_session({"provider_options": [{"qnn": {"backend_path": "evil.so"}}]}), "qnn"),
        (_session({"provider_options": [{"cuda": {"library": "x"}}]}), "library"),
        (_session({"provider_options": {}}), "must be a list"),
        (_session({"intra_op_num_threads": "2"}), "must be int"),
        (_session({"intra_op_num_threads": True}), "must be int"),
        (lambda c: c["model"].update(tokenizer_dir="/etc"), "tokenizer_dir"),
        (lambda c: c["model"].update(draft={}), "draft"),
        (lambda c: c["model"]["decoder"].update(pipeline=[]), "pipeline"),
        (lambda c: c["model"]["decoder"].update(run_options={"a": "b"}), "run_options"),
        (lambda c: c.update(engine={}), "engine"),
        (lambda c: c["search"].update(new=1), "new"),
        (lambda c: c["model"].update(type="llama"), "edged knows phi3"),
        (lambda c: c["model"].update(type=["phi3"]), "must be str"),
        (lambda c: c["model"].update(context_length=0), "context_length"),
        (lambda c: c["model"].update(vocab_size=1 << 40), "vocab_size"),
        (lambda c: c["model"].update(eos_token_id=[99999]), "eos_token_id"),
        (lambda c: c["model"].update(eos_token_id=[]), "eos_token_id"),
        (lambda c: c["model"].pop("decoder"), "no model.decoder"),
        (lambda c: c["model"]["decoder"].pop("head_size"), "head_size"),
        (lambda c: c["model"]["decoder"].update(filename="../model.onnx"), "leads out"),
        (lambda c: c["model"]["decoder"].update(filename="/etc/passwd"), "leads out"),
        (lambda c: c["model"]["decoder"].update(filename=".."), "not a file name"),
        (lambda c: c["model"]["decoder"].update(filename=""), "not a file name"),
        (lambda c: c["model"]["decoder"].update(filename="tokenizer.json"), "not an ONNX graph"),
        (lambda c: c["model"].update(embedding={"filename": "none.onnx"}), "none.onnx is missing"),
        (
            lambda c: c["model"].update(vision={"filename": "model.onnx", "config_filename": "x"}),
            "x is missing",
        ),
    ],
)
def test_what_must_not_stand_in_the_configuration_is_named(
    folder: Path, edit: Callable[[dict[str, Any]], None], says: str
) -> None:
    change(folder, edit)
    with pytest.raises(ModelError, match=says):
        inspect(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"model": 1, "model": 2}', "stands twice"),
        ('{"search": {"top_p": NaN}}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (" " * (1 << 20) + " {}", "more than"),
        ("\ufeff{}", "not JSON"),
    ],
    ids=range(7),
)
def test_a_configuration_that_is_no_json_is_refused(folder: Path, text: str, says: str) -> None:
    (folder / "genai_config.json").write_text(text)
    with pytest.raises(ModelError, match=says):
        inspect(folder)


@pytest.mark.parametrize("name", ["model.onnx.data", "extra.bin"])
def test_a_symbolic_link_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"x")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(ModelError, match=f"{name}: a symbolic link") as caught:
        inspect(folder)
    assert "cp -rL" in str(caught.value.hint)


def test_a_linked_subfolder_is_refused(folder: Path) -> None:
    (folder / "sub").symlink_to("/etc")
    with pytest.raises(ModelError, match="symbolic link"):
        inspect(folder)


def test_a_hard_link_is_refused(folder: Path, tmp_path: Path) -> None:
    os.link(folder / "model.onnx.data", tmp_path / "other")
    with pytest.raises(ModelError, match="2 hard links"):
        inspect(folder)


def test_a_pipe_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ModelError, match="not a plain file"):
        inspect(folder)


def test_the_folder_itself_may_be_reached_by_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert inspect(tmp_path / "current").path == folder


def test_a_manifest_is_held_to(folder: Path) -> None:
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "edged-manifest.json").write_text(json.dumps(sums))
    inspect(folder)
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    with pytest.raises(ModelError, match=r"model\.onnx\.data: its sha256 is"):
        inspect(folder)
    inspect(folder, verify=False)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "missing"])
def test_a_manifest_names_files_of_the_folder_only(folder: Path, name: str) -> None:
    (folder / "edged-manifest.json").write_text(json.dumps({name: "0"}))
    with pytest.raises(ModelError, match=r"leads out|is missing"):
        inspect(folder)


def test_a_tokenizer_of_another_kind_is_refused(folder: Path) -> None:
    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"] = [
            token for token in tokenizer["added_tokens"] if token["content"] != "<|end|>"
        ]

    change(folder, edit, "tokenizer")
    with pytest.raises(ModelError, match=r"lacks <\|end\|>"):
        inspect(folder)


def test_a_fingerprint_tells_models_apart_and_not_copies(folder: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    assert fingerprint(folder) == fingerprint(twin) != fingerprint(PHI4)
    change(twin, lambda c: c["search"].update(top_k=3))
    assert fingerprint(folder) != fingerprint(twin)
    assert len(fingerprint(tmp_path / "nothing")) == 16


# Graphs -------------------------------------------------------------------------------------------


def field(number: int, value: bytes | int) -> bytes:
    """Encode one protobuf field."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def tensor(location: str) -> bytes:
    pair = field(1, b"location") + field(2, location.encode())
    return field(8, b"name") + field(13, field(1, b"offset") + field(2, b"0")) + field(13, pair)


def test_the_files_of_a_graphs_weights_are_found_wherever_they_are_named(tmp_path: Path) -> None:
    inner = field(5, tensor("inner.bin"))
    node = field(5, field(5, tensor("constant.bin")) + field(6, inner))
    node += field(5, field(22, field(1, tensor("sparse.bin")) + field(2, tensor("places.bin"))))
    main = field(1, node) + field(5, tensor("../up.bin")) + field(15, field(1, tensor("s.bin")))
    function = field(7, field(5, field(10, tensor("function.bin"))))
    path = tmp_path / "g.onnx"
    path.write_bytes(field(1, 8) + field(7, main) + field(25, function))
    assert graph.external_files(path) == {
        *("inner.bin", "constant.bin", "../up.bin", "s.bin", "function.bin"),
        *("sparse.bin", "places.bin"),
    }


def test_a_graph_whose_weights_lie_elsewhere_is_refused(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(field(7, field(5, tensor("../../secret"))))
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        inspect(folder)


@pytest.mark.parametrize(("element", "expected"), [(1, 4), (10, 2), (3, 1), (99, None)])
def test_the_size_of_the_cache_is_read_from_the_graph(
    tmp_path: Path, element: int, expected: int | None
) -> None:
    kind = field(2, field(1, field(1, element)))
    inputs = field(11, field(1, b"input_ids") + field(2, field(1, field(1, 7))))
    inputs += field(11, field(1, b"past_key_values.0.key") + kind)
    path = tmp_path / "g.onnx"
    path.write_bytes(field(7, inputs))
    assert graph.kv_cache_bytes(path) == expected


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_graph_or_are_not(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("graph") / "g.onnx"
    path.write_bytes(data)
    for read in (graph.external_files, graph.kv_cache_bytes):
        with contextlib.suppress(graph.NotAGraph):
            read(path)


def test_a_real_graph_cut_anywhere_is_noticed_or_harmless(tmp_path: Path) -> None:
    whole = (PHI3 / "model.onnx").read_bytes()
    path = tmp_path / "g.onnx"
    for cut in range(1, len(whole), 97):
        path.write_bytes(whole[:cut])
        try:
            found = graph.external_files(path)
        except graph.NotAGraph:
            continue
        assert found <= {"model.onnx.data"}


def test_the_list_of_allowed_keys_is_not_changed_by_looking(folder: Path) -> None:
    before = copy.deepcopy(_ALLOWED)
    inspect(folder)
    assert before == _ALLOWED

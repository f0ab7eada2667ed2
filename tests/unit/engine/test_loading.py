from __future__ import annotations

from pathlib import Path

import pytest

from edged.engine.loading import (
    Setup,
    SetupError,
    choose_provider,
    choose_threads,
    cuda_options,
    look,
    overlay,
    versions,
)
from edged.engine.process import environment
from edged.models.folder import ModelFolder


def setup(
    cpu: bool = False, cuda: bool = False, device: bool = False, unfit: str | None = None
) -> Setup:
    return Setup(cpu=cpu, cuda=cuda, importable=cpu or cuda, device=device, unfit=unfit)


@pytest.mark.parametrize(
    ("wanted", "found", "chosen"),
    [
        ("auto", setup(cpu=True), "cpu"),
        ("auto", setup(cpu=True, device=True), "cpu"),
        ("auto", setup(cuda=True), "cpu"),
        ("auto", setup(cuda=True, device=True), "cuda"),
        ("auto", setup(cuda=True, device=True, unfit="has no kernels"), "cpu"),
        ("cpu", setup(cuda=True, device=True), "cpu"),
        ("cuda", setup(cuda=True, device=True), "cuda"),
    ],
)
def test_the_provider_is_what_is_wanted_and_there(wanted: str, found: Setup, chosen: str) -> None:
    assert choose_provider(wanted, found) == chosen  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "found", "says", "hint"),
    [
        ("auto", setup(), "is not installed", r"edged\[cpu\]"),
        ("cpu", setup(cpu=True, cuda=True), "both installed", "pip uninstall"),
        ("cuda", setup(cpu=True, device=True), "is not installed", r"edged\[cuda\]"),
        ("cuda", setup(cuda=True), "no CUDA device", "model.provider"),
        ("cuda", setup(cuda=True, device=True, unfit="has no kernels"), "no kernels", "Jetson"),
    ],
)
def test_what_cannot_run_is_said_with_its_remedy(
    wanted: str, found: Setup, says: str, hint: str
) -> None:
    with pytest.raises(SetupError, match=says) as caught:
        choose_provider(wanted, found)  # type: ignore[arg-type]
    assert caught.value.hint is not None
    with pytest.raises(AssertionError, match=hint):
        raise AssertionError(caught.value.hint)


@pytest.mark.parametrize(("name", "device"), [("nvidia0", True), ("nvmap", True), ("sda", False)])
def test_a_cuda_device_is_seen_by_its_files(tmp_path: Path, name: str, device: bool) -> None:
    (tmp_path / name).touch()
    assert look(tmp_path).device is device


def test_this_installation_is_seen() -> None:
    pytest.importorskip("onnxruntime_genai")
    found = look()
    assert found.importable
    assert found.cpu or found.cuda
    assert "onnxruntime-genai" in versions() or "onnxruntime-genai-cuda" in versions()


def test_the_number_of_threads_is_always_said() -> None:
    assert choose_threads(3) == 3
    assert choose_threads(None) >= 1
    assert overlay(3) == {"model": {"decoder": {"session_options": {"intra_op_num_threads": 3}}}}


def test_graph_capture_is_off_whatever_the_folder_says() -> None:
    options = [{"cuda": {"enable_cuda_graph": "1", "gpu_mem_limit": "5"}}]
    folder = ModelFolder(
        path=Path("/m"),
        type="phi3",
        family="phi3",
        context_length=4096,
        vocab_size=10,
        eos_ids=(1,),
        kv_bytes=1,
        weights_bytes=1,
        encoder_bytes=0,
        hidden_size=8,
        providers=("cuda",),
        config={"model": {"decoder": {"session_options": {"provider_options": options}}}},
    )
    assert cuda_options(folder) == {"enable_cuda_graph": "0", "gpu_mem_limit": "5"}


def test_an_engine_process_inherits_no_secrets_and_no_telemetry() -> None:
    outer = {
        "PATH": "/bin",
        "EDGED_MQTT__PASSWORD": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "CREDENTIALS_DIRECTORY": "/run/credentials",
        "NOTIFY_SOCKET": "/run/notify",
        "ORT_DISABLE_TELEMETRY": "0",
        "LD_LIBRARY_PATH": "/cuda",
    }
    inner = environment(outer)
    assert inner["ORT_DISABLE_TELEMETRY"] == "1"
    assert inner["PATH"] == "/bin"
    assert inner["LD_LIBRARY_PATH"] == "/cuda"
    assert "secret" not in inner.values()
    assert not {"CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET"} & inner.keys()

"""Fixtures for more than one folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import structlog

from tests.kit.mosquitto import PROGRAM, Authority, Mosquitto, free_port

#: Tests that kill, flood, and look at the clock: one at a time, so that none disturbs another.
_ALONE = ("faults", "integration", "e2e", "bench")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for two workers: a file's tests share its box."""
    for item in items:
        folder, *_ = item.path.relative_to(Path(__file__).parent).parts
        item.add_marker(pytest.mark.xdist_group("alone" if folder in _ALONE else str(item.path)))


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    """A mosquitto for one test, without persistence or limits of its own."""
    if PROGRAM is None:
        pytest.skip("mosquitto is not installed")
    directory = tmp_path / "mosquitto"
    directory.mkdir()
    with Mosquitto(directory, config="max_queued_messages 0") as mosquitto:
        yield mosquitto


@pytest.fixture
def unused_tcp_port() -> int:
    """A port on which nobody listens."""
    return free_port()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority for all tests."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def events() -> Iterator[list[dict[str, Any]]]:
    """What is logged, as dictionaries."""
    with structlog.testing.capture_logs() as captured:
        yield cast("list[dict[str, Any]]", captured)


@pytest.fixture(scope="session")
def stock_vision_folder() -> Path:
    """A small vision model as published; it is the tree's own: never write into it."""
    from tests.kit.vision import STOCK  # noqa: PLC0415  (numpy and onnx, for those who need them)

    return STOCK


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision model, fused; shared by all tests, so that none may write into it."""
    from tests.kit.vision import fused_folder  # noqa: PLC0415  (as above)

    return fused_folder(tmp_path_factory.mktemp("fused"))

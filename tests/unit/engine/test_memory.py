from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.engine import box
from edged.engine.memory import Need, TooLittleMemory, plan
from edged.errors import EdgedError

#: Phi-3.5-mini INT4 on the CPU: 2.7 GB of weights, 32 layers of 32 heads of 96, float32.
MINI = Need(
    weights_bytes=2_722_861_056,
    encoder_bytes=0,
    kv_bytes=2 * 32 * 32 * 96 * 4,
    feature_bytes=0,
    context_length=131_072,
)


def test_a_large_box_has_the_default_context() -> None:
    made = plan(MINI, available_mb=16_000)
    assert made.context == 4096
    assert made.limit == pytest.approx(11_200)
    assert made.sessions == pytest.approx(3221.2, abs=0.1)
    assert made.total == pytest.approx(6875, abs=1)


def test_a_smaller_box_has_the_largest_context_that_fits() -> None:
    made = plan(MINI, available_mb=7_500)  # a Raspberry Pi with 8 GB
    assert made.context == 1792
    assert made.total <= made.limit
    bigger = plan(MINI, available_mb=1e6, context=made.context + 256)
    assert bigger.total > made.limit


def test_a_box_that_is_too_small_is_told_both_numbers() -> None:
    with pytest.raises(TooLittleMemory, match=r"needs 3855 MB .* 256 tokens, 2800 MB may be used"):
        plan(MINI, available_mb=4_000)


def test_a_context_that_is_asked_for_is_not_made_smaller() -> None:
    assert plan(MINI, available_mb=1e5, context=5000).context == 5000
    with pytest.raises(TooLittleMemory, match=r"5000 tokens, 5600 MB"):
        plan(MINI, available_mb=8_000, context=5000)


def test_a_context_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(EdgedError, match=r"200000.*131072"):
        plan(MINI, available_mb=1e9, context=200_000)


def test_a_limit_that_is_set_counts_instead_of_what_is_there() -> None:
    assert plan(MINI, available_mb=100, limit_mb=7_000).context == 4096


def test_every_part_is_in_the_sum() -> None:
    need = Need(
        weights_bytes=8_000_000,
        encoder_bytes=4_000_000,
        kv_bytes=1000,
        feature_bytes=500,
        context_length=512,
        sessions=2,
        encoding_bytes=1_500_000,
        cache_bytes=7_000_000,
    )
    table = plan(need, available_mb=1000).as_dict()
    assert table == {
        "weights": 10.0,
        "encoder": 6.5,
        "feature_buffer": 0.3,
        "sessions": 1.0,
        "frame_cache": 7.0,
        "base": 250.0,
        "total": 274.8,
        "limit": 700.0,
    }


@settings(deadline=None)
@given(
    st.integers(1, 10**10),
    st.integers(1, 10**6),
    st.integers(1, 200_000),
    st.floats(0, 1e6),
)
def test_a_plan_fits_or_is_refused(
    weights: int, kv: int, context_length: int, available: float
) -> None:
    need = Need(
        weights_bytes=weights,
        encoder_bytes=0,
        kv_bytes=kv,
        feature_bytes=0,
        context_length=context_length,
    )
    try:
        made = plan(need, available_mb=available)
    except TooLittleMemory:
        return
    assert made.total <= made.limit
    assert 1 <= made.context <= min(4096, context_length)
    assert made.context % 256 == 0 or made.context == context_length < 256


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 8000000 kB\nMemFree: 100 kB\nMemAvailable:    5000000 kB\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 5120.0),
        ("0::/a/b\n", {"fs/cgroup/a/b/memory.max": "2000000000\n"}, 2000.0),
        ("0::/a/b\n", {"fs/cgroup/a/memory.max": "1000000000"}, 1000.0),
        ("0::/a/b\n", {"fs/cgroup/a/b/memory.max": "max\n"}, 5120.0),
        ("0::/a\n", {"fs/cgroup/a/memory.high": "900000000"}, 900.0),
        ("5:memory:/a\n", {"fs/cgroup/memory/a/memory.limit_in_bytes": "800000000"}, 800.0),
        ("5:memory:/x\n", {"fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}, 5120.0),
        ("0::/../outside\n", {"fs/cgroup/memory.max": "700000000"}, 700.0),
    ],
)
def test_memory_is_what_is_available_within_the_control_group(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: float
) -> None:
    proc = _write(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": cgroup})
    sys = _write(tmp_path / "sys", files)
    assert box.memory_mb(proc=proc, sys=sys) == pytest.approx(expected)


def test_this_box_has_memory_and_cores() -> None:
    assert box.memory_mb() > 0
    assert box.cores() >= 1


TOPOLOGY = "devices/system/cpu/cpu{}/topology/thread_siblings_list"


@pytest.mark.parametrize(
    ("allowed", "files", "expected"),
    [
        ([0, 1, 2, 3], {TOPOLOGY.format(n): str(n) for n in range(4)}, 4),
        ([0, 1, 2, 3], {TOPOLOGY.format(n): f"{n % 2},{n % 2 + 2}" for n in range(4)}, 2),
        ([2, 3], {TOPOLOGY.format(n): str(n) for n in range(4)}, 2),
        ([0, 1], {}, 2),
        ([0, 1, 2, 3], {"fs/cgroup/cpu.max": "150000 100000"}, 1),
        ([0, 1, 2, 3], {"fs/cgroup/cpu.max": "max 100000"}, 4),
        ([0, 1], {"fs/cgroup/cpu.max": "10000 100000"}, 1),
    ],
)
def test_cores_are_the_physical_ones_that_we_may_use(
    tmp_path: Path, allowed: list[int], files: dict[str, str], expected: int
) -> None:
    proc = _write(tmp_path / "proc", {"self/cgroup": "0::/\n"})
    sys = _write(tmp_path / "sys", files)
    assert box.cores(allowed, proc=proc, sys=sys) == expected

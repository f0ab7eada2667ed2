from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edged.engine.vision.plan import ANSWER_RESERVE, Candidate, Conditions, Speed, check, plan
from edged.engine.vision.transform import grid_of
from edged.errors import Code, JobFailed
from edged.models.geometry import Geometry
from edged.ports import FramePlan, PlannedFrame

PHI = Geometry(
    crop=336,
    tokens_a_side=12,
    max_crops=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
ONE = 313  # tokens of a frame at one crop
FOUR = 757  # at two by two
TEXT = 40
FAST = Speed(prefill=1e9, encode_s=1e-9, decode_s=0.0)


def text_tokens(indexes: tuple[int, ...]) -> int:
    """A fixed text, and a newline after each frame."""
    assert list(indexes) == sorted(set(indexes))
    return TEXT + len(indexes)


def frame(index: int, size: tuple[int, int] = (640, 480), **more: Any) -> Candidate:
    more.setdefault("digest", hashlib.sha256(str(index).encode()).digest())
    return Candidate(index=index, width=size[0], height=size[1], **more)


def frames(count: int, size: tuple[int, int] = (640, 480)) -> list[Candidate]:
    return [frame(n, size) for n in range(count)]


def conditions(**more: Any) -> Conditions:
    for name, value in (
        ("geometry", PHI),
        ("context", 4096),
        ("text_tokens", text_tokens),
        ("speed", FAST),
    ):
        more.setdefault(name, value)
    return Conditions(**more)


def crops(made: FramePlan) -> list[int]:
    return [f.crops for f in made.used]


def used(made: FramePlan) -> list[int]:
    return [f.index for f in made.used]


def total(made: FramePlan) -> int:
    return text_tokens(tuple(used(made))) + sum(f.tokens for f in made.used)


def live(made: FramePlan, candidates: Sequence[Candidate]) -> tuple[tuple[bytes, int], ...]:
    return tuple((candidates[f.index].digest, f.crops) for f in made.used)


# Crops ------------------------------------------------------------------------------------------


def test_low_is_one_crop_a_frame() -> None:
    made = plan(frames(4), conditions(detail="low"))

    assert crops(made) == [1] * 4
    assert total(made) == TEXT + 4 * (ONE + 1)


def test_high_of_one_frame_is_all_crops() -> None:
    made = plan(frames(1, (1000, 1000)), conditions(detail="high"))

    assert made.used == (PlannedFrame(0, 16, 2509),)


def test_high_of_several_frames_is_four_each() -> None:
    assert crops(plan(frames(3), conditions(detail="high"))) == [4, 4, 4]


def test_the_models_own_limit_holds() -> None:
    small = dataclasses.replace(PHI, max_crops=2)

    assert crops(plan(frames(1, (999, 500)), conditions(geometry=small, detail="high"))) == [1]
    assert crops(plan(frames(1, (1000, 500)), conditions(geometry=small, detail="high"))) == [2]


def test_the_encoders_memory_limits_crops() -> None:
    assert crops(plan(frames(2), conditions(detail="high", max_crops_now=3))) == [1, 1]
    assert crops(plan(frames(2), conditions(detail="high", max_crops_now=0))) == [1, 1]


def test_fewer_crops_come_before_fewer_frames() -> None:
    made = plan(frames(6), conditions(detail="high"))

    assert crops(made) == [1] * 6  # 4 crops each would be 4542 tokens
    assert not made.dropped


def test_auto_is_one_crop_until_the_speed_is_known() -> None:
    for speed in (Speed(), Speed(prefill=100.0), Speed(encode_s=0.1)):
        assert crops(plan(frames(1), conditions(speed=speed))) == [1]


def test_auto_takes_as_many_crops_as_are_in_time() -> None:
    speed = Speed(prefill=100.0, encode_s=0.5, decode_s=0.1)
    cost_of_four = (TEXT + 1 + FOUR) / 100 + 5 * 0.5 + 0.1

    given = conditions(speed=speed, first_token_s=cost_of_four + 0.001)
    assert crops(plan(frames(1), given)) == [4]
    given = conditions(speed=speed, first_token_s=cost_of_four - 0.001)
    assert crops(plan(frames(1), given)) == [1]


def test_auto_leaves_half_of_the_time_to_the_deadline() -> None:
    speed = Speed(prefill=100.0, encode_s=0.5)

    assert crops(plan(frames(1), conditions(speed=speed, left_s=22.0))) == [4]
    assert crops(plan(frames(1), conditions(speed=speed, left_s=20.0))) == [1]
    assert crops(plan(frames(1), conditions(speed=speed, left_s=-5.0))) == [1]


def test_what_is_encoded_already_costs_no_time() -> None:
    speed = Speed(prefill=1e9, encode_s=100.0)
    (only,) = frames(1)

    assert crops(plan([only], conditions(speed=speed))) == [1]
    encoded = {(only.digest, 4)}
    assert crops(plan([only], conditions(speed=speed, encoded=encoded))) == [4]


def test_live_text_costs_no_time() -> None:
    given = conditions(speed=Speed(prefill=10.0, encode_s=0.0), first_token_s=FOUR / 10)

    assert crops(plan(frames(1), given)) == [1]
    given = dataclasses.replace(given, text_cached=TEXT + 1)
    assert crops(plan(frames(1), given)) == [4]


@given(
    count=st.integers(1, 12),
    prefill=st.floats(1, 10_000),
    encode_s=st.floats(0, 20),
    first_token_s=st.floats(0.1, 300),
)
def test_auto_keeps_to_its_target(
    count: int, prefill: float, encode_s: float, first_token_s: float
) -> None:
    speed = Speed(prefill=prefill, encode_s=encode_s, decode_s=0.1)
    made = plan(frames(count), conditions(speed=speed, first_token_s=first_token_s))

    took = total(made) / prefill + sum(n + 1 for n in crops(made)) * encode_s + 0.1 * count
    assert took <= first_token_s * 1.0001 or set(crops(made)) == {1}


# What does not fit ------------------------------------------------------------------------------


def pictured(greys: Sequence[int]) -> list[Candidate]:
    def thumb(grey: int) -> NDArray[np.uint8]:
        return np.full((16, 16), grey, np.uint8)

    return [frame(n, thumb=lambda g=g: thumb(g)) for n, g in enumerate(greys)]


def test_without_room_for_all_frames_are_left_out_evenly() -> None:
    room = TEXT + 5 * (ONE + 1)
    made = plan(frames(9), conditions(context=room + ANSWER_RESERVE))

    assert used(made) == [0, 2, 4, 6, 8]
    assert {d.index: d.reason for d in made.dropped} == dict.fromkeys(
        (1, 3, 5, 7), "no room in the context: 5 frames fit"
    )


def test_frames_that_hardly_differ_go_first() -> None:
    room = TEXT + 4 * (ONE + 1)
    greys = [0, 50, 51, 100, 100, 150]
    made = plan(pictured(greys), conditions(context=room + ANSWER_RESERVE))

    assert used(made) == [0, 1, 3, 5]
    assert [d.index for d in made.dropped] == [2, 4]
    assert made.dropped[1].reason.endswith("hardly different from frame 3")


def test_no_more_near_duplicates_go_than_must() -> None:
    room = TEXT + 5 * (ONE + 1)
    made = plan(pictured([0, 50, 51, 100, 100, 150]), conditions(context=room + ANSWER_RESERVE))

    assert used(made) == [0, 1, 2, 3, 5]  # the two that are quite alike


def test_slow_change_is_seen_as_a_change() -> None:
    room = TEXT + 3 * (ONE + 1)
    made = plan(pictured(range(0, 24, 3)), conditions(context=room + ANSWER_RESERVE))

    assert used(made)[0] == 0
    assert used(made)[-1] == 7
    assert len(made.used) == 3


def test_no_picture_is_made_if_all_fit() -> None:
    def never() -> NDArray[np.uint8]:
        raise AssertionError

    assert len(plan([frame(n, thumb=never) for n in range(5)], conditions()).used) == 5


def test_of_a_last_pair_the_newer_stays() -> None:
    made = plan(frames(3), conditions(context=TEXT + 1 + ONE + ANSWER_RESERVE))

    assert used(made) == [2]
    assert made.dropped[0].reason == "no room in the context: 1 frame fits"


def test_the_reserve_is_given_up_for_the_last_frame() -> None:
    smallest = TEXT + 1 + ONE

    assert used(plan(frames(2), conditions(context=smallest + 1))) == [1]
    with pytest.raises(JobFailed) as failed:
        plan(frames(2), conditions(context=smallest))
    assert failed.value.code is Code.TOO_LONG
    assert f"{smallest} tokens, the context has {smallest}" in failed.value.message


def test_what_the_client_asks_for_is_part_of_the_sum() -> None:
    smallest = TEXT + 1 + ONE

    assert used(plan(frames(1), conditions(context=smallest + 500, max_tokens=500))) == [0]
    with pytest.raises(JobFailed, match=r"max_tokens 501 are 855 tokens, the context has 854"):
        plan(frames(1), conditions(context=smallest + 500, max_tokens=501))


sizes = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
seconds = st.none() | st.integers(0, 60)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Candidate], Conditions]:
    shapes = draw(st.lists(st.tuples(sizes, st.integers(0, 255)), min_size=1, max_size=20))
    grey = [np.full((16, 16), g, np.uint8) for _, g in shapes]
    candidates = [frame(n, size, thumb=lambda n=n: grey[n]) for n, (size, _) in enumerate(shapes)]
    row = candidates[draw(st.integers(0, len(candidates))) :]
    held = draw(st.lists(st.sampled_from([1, 1, 2, 3, 4]), max_size=len(row)))
    made = conditions(
        context=draw(st.integers(1, 9000)),
        detail=draw(st.sampled_from(["low", "auto", "high"])),
        max_tokens=draw(st.none() | st.integers(1, 2000)),
        window_min=draw(st.none() | st.integers(1, 6)),
        max_crops_now=draw(st.none() | st.integers(0, 17)),
        left_s=draw(seconds),
        speed=Speed(
            prefill=draw(st.none() | st.integers(0, 1000)),
            encode_s=draw(seconds),
            decode_s=draw(seconds),
        ),
        live=tuple((c.digest, n) for c, n in zip(row, held, strict=False)),
    )
    return candidates, made


@given(situations())
def test_a_plan_is_exact_fits_and_names_every_frame(
    situation: tuple[list[Candidate], Conditions],
) -> None:
    candidates, now = situation
    made: FramePlan | None
    code: Code | None = None
    try:
        made = plan(candidates, now)
    except JobFailed as failed:
        made, code = None, failed.code
    if made is None:
        assert code is Code.TOO_LONG
        assert TEXT + 1 + ONE + (now.max_tokens or 1) > now.context
        return

    assert made.used
    assert used(made) == sorted(used(made))
    assert sorted(used(made) + [d.index for d in made.dropped]) == list(range(len(candidates)))
    assert all(d.reason for d in made.dropped)
    assert total(made) + (now.max_tokens or 1) <= now.context
    for planned in made.used:
        candidate = candidates[planned.index]
        cells = grid_of(candidate.width, candidate.height, planned.crops, PHI)
        assert cells is not None
        assert PHI.tokens(*cells) == planned.tokens
    assert used(made)[-1] == len(candidates) - 1
    if now.window_min is None and len(made.used) > 1:
        assert used(made)[0] == 0
    assert plan(candidates, now, made) is made
    assert plan(candidates, now) == made


@given(st.integers(1, 20), st.integers(400, 6000), st.integers(0, 2000), st.booleans())
def test_more_room_never_shows_fewer_frames(
    count: int, context: int, more: int, alike: bool
) -> None:
    candidates = pictured([7 if alike else 13 * n for n in range(count)])

    less = plan(candidates, conditions(context=context, detail="high"))
    roomy = plan(candidates, conditions(context=context + more, detail="high"))

    assert len(roomy.used) >= len(less.used)


# A live session ---------------------------------------------------------------------------------


def test_another_question_for_the_same_frames_keeps_their_crops() -> None:
    candidates = frames(3)
    before = plan(candidates, conditions())
    assert crops(before) == [4, 4, 4]

    given = conditions(live=live(before, candidates), speed=Speed(), left_s=1.0)

    assert plan(candidates, given) == before


def test_more_frames_after_the_same_ones_keep_those() -> None:
    candidates = frames(4)
    before = plan(candidates[:2], conditions())

    given = conditions(live=live(before, candidates), speed=Speed())

    assert crops(plan(candidates, given)) == [4, 4, 1, 1]


def test_fewer_of_the_same_frames_keep_those() -> None:
    candidates = frames(4)
    given = conditions(live=live(plan(candidates, conditions()), candidates), speed=Speed())

    assert crops(plan(candidates[:2], given)) == [4, 4]


def test_if_the_new_frames_do_not_fit_behind_them_all_is_decided_anew() -> None:
    candidates = frames(8)
    before = plan(candidates[:4], conditions())
    assert crops(before) == [4] * 4

    made = plan(candidates, conditions(live=live(before, candidates)))

    assert crops(made) == [1] * 8


def test_other_frames_are_decided_anew() -> None:
    candidates = frames(3)
    before = ((candidates[1].digest, 1), (candidates[2].digest, 1))

    assert crops(plan(candidates, conditions(live=before))) == [4, 4, 4]


def test_another_detail_is_decided_anew() -> None:
    candidates = frames(3)
    sharp = live(plan(candidates, conditions()), candidates)

    assert crops(plan(candidates, conditions(detail="low", live=sharp))) == [1] * 3
    coarse = live(plan(candidates, conditions(detail="low")), candidates)
    assert crops(plan(candidates, conditions(detail="high", live=coarse))) == [4] * 3


# A window ---------------------------------------------------------------------------------------


def window(**more: Any) -> Conditions:
    return conditions(**{"window_min": 4, "context": 4096} | more)


def test_a_window_begins_with_its_newest() -> None:
    made = plan(frames(7), window())

    assert used(made) == [3, 4, 5, 6]
    assert {d.reason for d in made.dropped} == {
        "the window has moved on: it begins anew with the newest 4"
    }


def test_a_window_grows_by_what_is_new() -> None:
    candidates = frames(9)
    before = ((candidates[3].digest, 1), (candidates[4].digest, 1))

    made = plan(candidates, window(live=before))

    assert used(made) == [3, 4, 5, 6, 7, 8]
    assert crops(made) == [1] * 6
    assert {d.reason for d in made.dropped} == {"the window has moved on"}


def test_a_window_whose_first_frame_has_left_begins_anew() -> None:
    before = ((b"left", 1), (frame(0).digest, 1))

    assert used(plan(frames(6), window(live=before))) == [2, 3, 4, 5]


def test_a_window_that_begins_leaves_room_to_grow() -> None:
    assert crops(plan(frames(4), window())) == [1] * 4  # four crops would leave room for one more
    assert crops(plan(frames(4), window(context=2 * 4 * (FOUR + 1) + TEXT + 200))) == [4] * 4
    assert crops(plan(frames(4), window(detail="high"))) == [4] * 4


def test_new_frames_of_a_window_are_looked_at_no_closer_than_the_live_ones() -> None:
    candidates = frames(5)
    before = tuple((c.digest, 1) for c in candidates[:4])

    assert crops(plan(candidates, window(live=before, context=50_000))) == [1] * 5


def test_a_window_in_another_detail_begins_anew() -> None:
    candidates = frames(5)
    coarse = tuple((c.digest, 1) for c in candidates[:4])
    sharp = tuple((c.digest, 4) for c in candidates[:4])

    assert used(plan(candidates, window(detail="high", live=coarse))) == [1, 2, 3, 4]
    assert used(plan(candidates, window(detail="low", live=sharp))) == [1, 2, 3, 4]
    assert used(plan(candidates, window(detail="low", live=coarse))) == [0, 1, 2, 3, 4]
    assert crops(plan(candidates, window(detail="high", live=sharp))) == [4] * 5
    assert crops(plan(candidates, window(detail="auto", live=sharp))) == [4] * 5


def test_a_window_that_cannot_be_looked_at_closer_stays() -> None:
    candidates = frames(8)
    coarse = tuple((c.digest, 1) for c in candidates[:7])

    assert crops(plan(candidates, window(detail="high", live=coarse))) == [1] * 8


@given(
    least=st.integers(1, 6),
    extra=st.integers(1, 12),
    context=st.integers(1000, 8192),
    detail=st.sampled_from(["low", "auto"]),
    fast=st.booleans(),
    size=st.sampled_from([(640, 480), (480, 640), (1920, 1080), (100, 100)]),
)
def test_a_hundred_ticks_of_a_camera(
    least: int, extra: int, context: int, detail: str, fast: bool, size: tuple[int, int]
) -> None:
    most = least + extra
    room = context - ANSWER_RESERVE - TEXT
    assume(room >= least * (ONE + 1))
    buffer: list[bytes] = []
    held: tuple[tuple[bytes, int], ...] = ()
    begun, costs = [], []
    for tick in range(100):
        buffer.append(hashlib.sha256(b"%d" % tick).digest())
        if len(buffer) < least:
            continue
        candidates = [frame(n, size, digest=d) for n, d in enumerate(buffer[-most:])]
        made = plan(
            candidates,
            window(
                window_min=least,
                context=context,
                detail=detail,
                live=held,
                speed=FAST if fast else Speed(),
            ),
        )
        now = live(made, candidates)
        shared = 0
        while shared < min(len(now), len(held)) and now[shared] == held[shared]:
            shared += 1
        cost = len(now) - shared
        if shared == 0:
            begun.append(tick)
            assert cost == least
        else:
            assert cost == 1  # and nothing of what was live is lost
            assert shared == len(held)
        costs.append(cost)
        held = now
        assert total(made) <= context - ANSWER_RESERVE
        assert len(made.used) >= least

    # it begins anew only when it must: after growing by as much as the context or the window let it
    grows = min(extra, room // (ONE + 1) - least)
    if detail == "low" or not fast:
        assert {b - a for a, b in itertools.pairwise(begun)} <= {grows + 1}
    if grows >= least:
        assert all(b - a > least for a, b in itertools.pairwise(begun))
        assert sum(costs) <= 2 * len(costs) + least


# A kept plan ------------------------------------------------------------------------------------


def test_a_kept_plan_is_used_as_it_is() -> None:
    kept = plan(frames(3), conditions(detail="low"))

    assert plan(frames(3), conditions(detail="high"), kept) is kept


def test_a_plan_for_something_else_is_made_anew() -> None:
    candidates = frames(3)
    kept = plan(candidates, conditions())
    assert check(kept, candidates, conditions())

    other = dataclasses.replace(PHI, tokens_a_side=10)
    wrong = [
        (kept, frames(4), conditions()),
        (kept, frames(2), conditions()),
        (kept, frames(3, (480, 640)), conditions(geometry=other)),
        (kept, frames(3, (100, 3000)), conditions()),
        (kept, candidates, conditions(context=total(kept))),
        (kept, candidates, conditions(context=total(kept) + 9, max_tokens=10)),
        (kept, candidates, conditions(geometry=dataclasses.replace(PHI, max_crops=3))),
        (FramePlan(()), [], conditions()),
        (FramePlan(kept.used[::-1]), candidates, conditions()),
        (FramePlan((*kept.used[:2], PlannedFrame(7, 1, ONE))), candidates, conditions()),
        (FramePlan((*kept.used[:2], PlannedFrame(2, 4, ONE))), candidates, conditions()),
    ]
    for bad, offered, situation in wrong:
        assert not check(bad, offered, situation)
    assert check(kept, candidates, conditions(context=total(kept) + 1))
    assert len(plan(frames(4), conditions(), kept).used) == 4

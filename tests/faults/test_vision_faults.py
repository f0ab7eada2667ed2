"""F1, F16, F17, F25, F26, F28, F30 to F32 with frames: what is lost, refused, bounded, survived."""

from __future__ import annotations

import asyncio
import io
import itertools
import random
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults.test_flood import rss_mb
from tests.kit.chaos import ChaosProxy
from tests.kit.daemon import Daemon
from tests.kit.frames import digests, marked
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Body, Name, Observer, Seen

pytestmark = pytest.mark.broker

#: Seconds between heartbeats here, and how late one may be: a fifth of the default of 10.
BEAT, LATE = 1.0, 2.0


@pytest.fixture
def observer(broker: Mosquitto) -> Iterator[Observer]:
    with Observer(broker.port) as observer:
        yield observer


def stored(daemon: Daemon) -> list[str]:
    """Return the files of frames in the state directory."""
    return sorted(path.name for path in (daemon.state_dir / "frames").glob("*"))


def first_event(observer: Observer, name: Name) -> Seen | None:
    """Return the first event of a job, if there is one."""
    return next(iter(observer.events(name)), None)


def on_time(observer: Observer, after: int) -> None:
    """Assert that no heartbeat since a message was missing or late."""
    beats = [each.body for each in observer.on("health") if each.number > after]
    assert [b["seq"] - a["seq"] for a, b in itertools.pairwise(beats)] == [1] * (len(beats) - 1)
    periods = [b["ts"] - a["ts"] for a, b in itertools.pairwise(beats)]
    assert periods
    assert max(periods) <= BEAT + LATE, periods


# F1 ---------------------------------------------------------------------------------------------

JOBS = 10
#: As in test_crash_points: what is hit -> the label and at which of its calls. The frame store's
#: own labels are among them: a file is written, its folder synced, a file is removed.
POINTS = {
    "while requests come in": (
        ("on_receive", 5),
        ("after_frames_write", 3),
        ("after_frames_sync", 2),
        ("in_accept_txn", 2),
        ("after_accept_commit", 4),
        ("after_ack", 6),
    ),
    "while jobs run and end": (
        ("after_attempt_mark", 3),
        ("after_infer", 4),
        ("in_result_txn", 4),
        ("after_result_commit", 4),
        ("after_frames_unlink", 3),
        ("on_puback", 30),
    ),
}


def look_ten(observer: Observer, prefix: str) -> dict[Name, str]:
    """Ask about two frames each, and ask some of it twice; return what the answers must be."""
    right: dict[Name, str] = {}
    for number in (*range(JOBS), 0, 4):
        client = "desk" if number % 2 else None
        frames = [marked(f"{prefix} {number} {which}", 20_000) for which in "ab"]
        name = observer.look("!frames", frames, id=f"{prefix}-{number}", client=client, wait=False)
        right[name] = digests(frames)
    return right


@pytest.mark.parametrize("where", POINTS)
def test_no_frame_is_lost_swapped_or_left_behind_after_kills(
    where: str, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    first, *others = (("--crash-at", f"{label}:{number}") for label, number in POINTS[where])
    with Daemon(tmp_path, broker.port, options=first) as daemon:
        daemon.wait_ready()
        daemon.options = ()
        right = look_ten(observer, "first")
        assert daemon.wait_exit() == -9
        for options in others:
            daemon.start(*options)
            right |= look_ten(observer, options[1].partition(":")[0])
            assert daemon.wait_exit() == -9
        daemon.start()
        observer.check(crashed=True)
        for name, text in right.items():
            assert {each.body.get("text") for each in observer.finals(name)} == {text}, name
        assert stored(daemon) == []
        assert daemon.log("frames.swept", since=0), "no kill left a file without a job"
        assert daemon.stop() == 0
        assert daemon.faults() == []


# F14 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["durable", "none"])
def test_lost_frames_cost_their_job_only_and_are_told(
    keep: str, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port, settings={"state": {"frames": keep}}) as daemon:
        daemon.wait_ready()
        observer.event(observer.ask("!tokens 1000 50", id="block"), "started")
        frames = [[marked(f"{n} {which}") for which in "ab"] for n in range(4)]
        names = [observer.look("!frames", each) for each in frames]
        text = observer.ask("!say whole")
        for name in (*names, text):
            observer.event(name, "accepted")
        daemon.kill()
        observer.cancel(Name(None, "block"))
        whys = ["were in memory only and a restart has lost them"] * 4
        if keep == "durable":
            files = [daemon.state_dir / "frames" / name for name in stored(daemon)]
            files[0].unlink()
            content = bytearray(files[1].read_bytes())
            content[-1] ^= 1
            files[1].write_bytes(content)
            files[2].write_bytes(files[3].read_bytes())
            whys = ["gone from the disk", "frame 1 is not what was written", "is another job's"]
        daemon.start()
        for name, why in zip(names, whys, strict=False):
            final = observer.final(name)
            assert final["code"] == "dead"
            assert why in final["message"]
        if keep == "durable":
            assert observer.final(names[3])["text"] == digests(frames[3])
        assert observer.final(text)["text"] == "whole"
        observer.check(crashed=True)
        assert stored(daemon) == []
        assert daemon.stop() == 0
        assert daemon.faults() == []


# F16 --------------------------------------------------------------------------------------------

#: Requests of nearly limits.payload_mb (8) with one frame, and the room for frames, MB: for six.
FLOOD, FRAME_BYTES, ROOM_MB = 15, 5_900_000, 40
#: MB that the daemon may grow by, whatever comes: four packets of the largest size that are not
#: acknowledged yet (40), their frames on the way to the journal (24), one more that arrives and is
#: copied (20), one as text and values (16), a frame on its way to the engine (6), and what the
#: allocator keeps. The frames of waiting jobs are on disk; without it they are here as well.
GROWTH_MB = {"durable": 165.0, "none": 165.0 + ROOM_MB}


@pytest.mark.parametrize("keep", GROWTH_MB)
def test_a_flood_of_frames_is_bounded_refused_and_does_not_disturb_the_heartbeat(
    keep: str, tmp_path: Path, broker: Mosquitto
) -> None:
    filters = ["edged/box/response/#", "edged/box/refused", "edged/box/health"]
    settings = {"health": {"interval_s": BEAT}, "state": {"frames": keep, "frames_mb": ROOM_MB}}
    with (
        Observer(broker.port, only=True, filters=filters) as observer,
        Daemon(tmp_path, broker.port, settings=settings) as daemon,
    ):
        daemon.wait_ready()
        runs = observer.ask("!tokens 1000 50")
        observer.event(runs, "started")
        before = rss_mb(daemon.pid, "VmRSS")
        begun = observer.last
        frames = [marked(n, FRAME_BYTES) for n in range(FLOOD)]
        for number, frame in enumerate(frames):
            observer.look("!frames", [frame], id=f"n{number}", wait=False)

        def count() -> int:
            refused = len(observer.events(kind="refused"))  # some could not be read: without id
            return refused + len(observer.events(kind="accepted")) - 1

        observer.wait(lambda: count() >= FLOOD, "an answer to each request", timeout_s=60)
        # Some of them came too fast to be read; the rest of the room is taken one by one.
        for number in range(FLOOD):
            name = observer.look("!frames", [frames[number]], id=f"again-{number}")
            if observer.wait(partial(first_event, observer, name)).type == "refused":
                break
        full = "disk_full" if keep == "durable" else "memory"
        refused = [each.body for each in observer.events(kind="refused")]
        assert refused[-1]["code"] == full
        assert {each["code"] for each in refused} <= {full, "queue_full"}
        assert all(each["retryable"] and each["retry_after_s"] > 0 for each in refused)
        taken = [each.body for each in observer.events(kind="accepted") if each.name != runs]
        assert len(taken) == ROOM_MB * 1e6 // FRAME_BYTES
        assert {each["durable"] for each in taken} == {keep == "durable"}
        assert len(stored(daemon)) == (len(taken) if keep == "durable" else 0)
        observer.cancel(runs)
        for each in taken:
            number = int(re.sub(r"\D", "", each["id"]))
            assert observer.final(Name(None, each["id"]))["text"] == digests([frames[number]])
        assert stored(daemon) == []
        # The room that they had is there again.
        name = observer.look("!frames", [frames[0]])
        assert observer.final(name)["text"] == digests([frames[0]])
        observer.wait(lambda: len([e for e in observer.on("health") if e.number > begun]) >= 3)
        grown = rss_mb(daemon.pid, "VmHWM") - before
        print(f"{keep}: grew by {grown:.0f} MB, {len(refused)} refused")  # noqa: T201
        assert grown < GROWTH_MB[keep]
        on_time(observer, begun)
        assert daemon.faults() == []


# F17 --------------------------------------------------------------------------------------------


async def test_a_large_vision_request_over_a_slow_link_is_answered(
    tmp_path: Path, broker: Mosquitto
) -> None:
    settings = {"mqtt": {"keepalive_s": 5}, "health": {"interval_s": BEAT}}
    frame = marked("slow", FRAME_BYTES)
    filters = ["edged/box/response/#", "edged/box/refused", "edged/box/health", "edged/box/status"]
    async with (
        ChaosProxy(broker.port) as proxy,
        Observer(broker.port, only=True, filters=filters) as observer,
        Daemon(tmp_path, proxy.port, settings=settings) as daemon,
    ):
        await asyncio.to_thread(daemon.wait_ready)
        proxy.rate = {"down": 524_288, "up": 524_288}  # bytes a second
        begun, began = observer.last, time.monotonic()
        name = await asyncio.to_thread(observer.look, "!frames", [frame])
        final = await asyncio.to_thread(observer.final, name, 60)
        assert final["text"] == digests([frame])
        assert time.monotonic() - began > 2 * 1.5 * 5  # else the link was not slow
        on_time(observer, begun)
        beat = observer.on("health")[-1].body
        assert beat["mqtt"]["reconnects"] == 0
        states = [e.body["state"] for e in observer.on("status") if e.number > begun]
        assert set(states) <= {"ready"}
        assert proxy.accepted == 2  # the connections for jobs and cameras, once each
        assert daemon.faults() == []


# F25 --------------------------------------------------------------------------------------------


def picture(width: int = 400, height: int = 300) -> Image.Image:
    """Return a picture with edges, colours and noise."""
    draw = np.random.default_rng(width * height)
    rows, columns = np.mgrid[0:height, 0:width]
    levels = np.stack([columns % 256, rows % 256, (rows // 32 + columns // 32) % 2 * 255], 2)
    noise = draw.integers(0, 20, levels.shape)
    return Image.fromarray(np.clip(levels + noise, 0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return a picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """Return a PNG that says this size, whatever its rows are."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def sized(jpeg: bytes, width: int, height: int) -> bytes:
    """Return a JPEG that says another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def deep(image: Image.Image) -> bytes:
    """Return the picture as a PNG of 16 bits."""
    levels = np.asarray(image).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return png(image.width, image.height, rows, depth=16, colour=2 if levels.ndim == 3 else 0)


def cut() -> dict[str, bytes]:
    """Return frames of which the end is missing."""
    found = {}
    for kind in ("JPEG", "PNG"):
        whole = saved(picture(), kind)
        for percent in range(5, 100, 5):
            found[f"{percent} % of a {kind}"] = whole[: len(whole) * percent // 100]
        for missing in range(1, 5):
            found[f"a {kind} without its last {missing}"] = whole[:-missing]
        found[f"the first 3 of a {kind}"] = whole[:3]
    found["a JPEG that ends at once"] = saved(picture(), "JPEG")[:200] + b"\xff\xd9"
    return found


def foreign() -> dict[str, bytes]:
    """Return what is neither JPEG nor PNG, or only says that it is."""
    image = picture()
    kinds = ("GIF", "WEBP", "BMP", "TIFF", "EPS", "PPM", "ICO", "PDF")
    found = {kind: saved(image, kind) for kind in kinds}
    return found | {
        "text": b"a picture of a cat\n" * 50,
        "HTML": b"<!doctype html><html><body>404 Not Found</body></html>",
        "JSON": b'{"image": "?"}',
        "noise": np.random.default_rng(0).bytes(5000),
        "zeros": bytes(5000),
        "one byte": b"\xff",
        "the beginning of a JPEG before text": b"\xff\xd8\xff\xe0" + b"text " * 500,
        "the beginning of a PNG before text": b"\x89PNG\r\n\x1a\n" + b"text " * 500,
        "an EPS in a JPEG's clothes": b"\xff\xd8\xff" + saved(image, "EPS"),
    }


def hostile() -> dict[str, bytes]:
    """Return small files that would be large pictures, or that lie about their size."""
    jpeg = saved(picture(), "JPEG")
    return {
        "a PNG of 60000 x 60000 in 68 bytes": png(60_000, 60_000, b""),
        "a PNG of 13000 x 13000": png(13_000, 13_000, bytes(1_000_000), colour=0),
        "a PNG of one row of 2^31 - 1": png(2**31 - 1, 1, b""),
        "a PNG of no size": png(0, 0, b""),
        "a JPEG of 65535 x 65535": sized(jpeg, 65_535, 65_535),
        "a JPEG of 0 x 0": sized(jpeg, 0, 0),
        "a PNG with too few rows": png(400, 300, bytes(1000)),
    }


def damaged() -> dict[str, bytes]:
    """Return frames whose damage cannot always be seen: a JPEG's data have no checksum."""
    draw = random.Random(7)
    found = {}
    for kind in ("JPEG", "PNG"):
        whole = saved(picture(120, 90), kind)
        for number in range(20):
            flipped = bytearray(whole)
            flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            found[f"{kind} with flipped bit {number}"] = bytes(flipped)
    jpeg = saved(picture(), "JPEG")
    found["JPEG cut and closed"] = jpeg[: len(jpeg) // 2] + b"\xff\xd9"
    return found


def unusual() -> dict[str, bytes]:
    """Return good frames of kinds that a decoder may stumble over."""
    image = picture()
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "CMYK": saved(image.convert("CMYK"), "JPEG"),
        "progressive": saved(image, "JPEG", progressive=True),
        "grey JPEG": saved(image.convert("L"), "JPEG"),
        "16 bits": deep(image),
        "16 bits of grey": deep(image.convert("L")),
        "palette": saved(image.convert("P", palette=Image.Palette.ADAPTIVE)),
        "one bit": saved(image.convert("1")),
        "grey with alpha": saved(clear.convert("LA")),
        "alpha": saved(clear),
        "1 x 4000": saved(picture(1, 4000)),
        "4000 x 1": saved(picture(4000, 1)),
        "1 x 1": saved(picture(1, 1)),
        "turned": saved(image, "JPEG", exif=turned),
        "bytes after the end": saved(image, "JPEG") + b"\0" * 1000,
        "25 million pixels": saved(Image.new("L", (5000, 5000), 90)),
        "100 MB of rows after the last": png(10, 10, bytes(100_000_000)),
    }


#: MB that the engine may have grown by after all of it, which is what the allocator keeps; and
#: meanwhile: the largest frame, of 25 million pixels, and one of the hostile ones would be more.
GROWN_MB, MOST_MB = 80.0, 150.0


@pytest.fixture
def eyes(tmp_path: Path, broker: Mosquitto, vision_folder: Path) -> Callable[..., Daemon]:
    """Return what makes a daemon with the small vision model."""

    def make(*options: str, **settings: Any) -> Daemon:
        model = {"path": str(vision_folder), "max_context": 2048}
        tree = {**settings, "model": model | settings.get("model", {})}
        return Daemon(tmp_path, broker.port, engine="real", settings=tree, options=options)

    return make


@pytest.mark.engine
def test_bad_frames_are_named_and_the_engine_lives(
    eyes: Callable[..., Daemon], observer: Observer
) -> None:
    with eyes() as daemon:
        daemon.wait_ready()
        engine = daemon.engine_pid
        good = saved(picture(320, 240))
        first = observer.final(observer.look("What is this?", [good], max_tokens=4))
        before = rss_mb(engine, "VmRSS")

        def all_of(zoo: dict[str, bytes]) -> dict[str, Name]:
            return {
                what: observer.look("What?", [frame], max_tokens=1, stream=False, wait=False)
                for what, frame in zoo.items()
            }

        bad = all_of(cut() | foreign() | hostile())
        flipped = all_of(damaged())
        fine = all_of(unusual())
        for what, name in bad.items():
            final = observer.final(name)
            assert (final["type"], final.get("code")) == ("error", "bad_frame"), what
            assert re.match(r"frame 0: .{10,200}$", final["message"]), what
            assert not final["retryable"], what
        for what, name in flipped.items():
            final = observer.final(name)
            assert final["type"] == "result" or final["code"] == "bad_frame", what
            assert final["type"] == "error" or what.startswith("JPEG"), what
        for what, name in fine.items():
            assert observer.final(name)["type"] == "result", what
        # One in a row of good ones: its place is told, and nothing was decoded or encoded before.
        broken = saved(picture(), "JPEG")[:-2]
        name = observer.look("What?", [good, saved(picture()), broken, good], max_tokens=1)
        final = observer.final(name)
        assert (final["code"], final["message"][:8]) == ("bad_frame", "frame 2:")
        assert not observer.events(name, "progress")
        # Nothing of it is left: the same question has the same answer.
        last = observer.final(observer.look("What is this?", [good], max_tokens=4))
        assert last["text"] == first["text"]
        observer.check()
        assert daemon.engine_pids == [engine]
        beat = observer.wait_on("health", after=observer.last).body
        assert beat["engine"]["restarts"] == 0
        assert beat["totals"]["failed"] >= len(bad) + 1
        assert beat["totals"]["dead"] == 0
        grown, most = rss_mb(engine, "VmRSS") - before, rss_mb(engine, "VmHWM") - before
        print(f"the engine grew by {grown:.0f} MB, by {most:.0f} meanwhile")  # noqa: T201
        assert grown < GROWN_MB
        assert most < MOST_MB


@pytest.mark.engine
def test_the_pixels_of_unusual_frames_are_the_right_ones(
    eyes: Callable[..., Daemon], observer: Observer
) -> None:
    """The small model's words mean nothing, but they follow from every pixel."""
    image = picture(160, 120)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise
    solid = image.convert("RGBA")
    tinted = image.copy()
    tinted.putpixel((80, 60), (255, 255, 255))
    same = {
        "as it is": saved(image),
        "alpha": saved(solid),
        "16 bits": deep(image),
        "turned": saved(image.transpose(Image.Transpose.ROTATE_90), exif=turned),
        "bytes after the end": saved(image) + b"more",
    }
    other = {
        "upside down": saved(image.transpose(Image.Transpose.ROTATE_180)),
        "not turned": saved(image.transpose(Image.Transpose.ROTATE_90)),
        "with a bright spot": saved(tinted),
    }
    with eyes(vision={"cache_mb": 0}) as daemon:
        daemon.wait_ready()

        def said(frame: bytes) -> str:
            name = observer.look("What is this?", [frame], max_tokens=12, detail="low")
            return str(observer.final(name)["text"])

        texts = {what: said(frame) for what, frame in same.items()}
        assert len(set(texts.values())) == 1, texts
        others = {what: said(frame) for what, frame in other.items()}
        assert not set(others.values()) & set(texts.values()), (texts, others)
        lying = saved(image, "JPEG", exif=turned)
        with Image.open(io.BytesIO(lying)) as opened:
            upright = opened.transpose(Image.Transpose.ROTATE_270)
        assert said(lying) == said(saved(upright))


# F26, F28 ---------------------------------------------------------------------------------------


def test_too_many_and_empty_frames_are_refused_while_the_engine_works_on(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port, settings={"limits": {"frames": 4}}) as daemon:
        daemon.wait_ready()
        runs = observer.ask("!tokens 1000 20")
        observer.event(runs, "started")
        asked = time.monotonic()
        name = observer.look("!frames", [marked(n) for n in range(5)])
        refusal = observer.refusal(name)
        assert refusal.at - asked < 1.0
        assert refusal.body["code"] == "invalid"
        assert re.search(r"\b5\b.*limits.frames.*\b4\b", refusal.body["message"])
        name = observer.look("!frames", [marked(1), b"", marked(2)])
        refusal = observer.refusal(name)
        assert refusal.body["code"] == "invalid"
        assert "frames.1.image" in refusal.body["message"]
        observer.cancel(runs)
        observer.check()
        assert stored(daemon) == []
        beat = observer.wait_on("health", after=observer.last).body
        assert (beat["totals"]["accepted"], beat["totals"]["refused"]) == (1, 2)


@pytest.mark.engine
def test_frames_of_any_sizes_go_together_and_what_does_not_fit_is_told(
    eyes: Callable[..., Daemon], observer: Observer
) -> None:
    sizes = [(320, 240), (1, 4000), (900, 100), (16, 16)]
    frames = [saved(picture(*size)) for size in sizes]
    with eyes(model={"max_context": 1400}, limits={"max_tokens": 1300}) as daemon:
        daemon.wait_ready()
        final = observer.final(observer.look("What?", frames, max_tokens=4, detail="low"))
        # A frame of one crop has 313 tokens, so the text and four of them do fit.
        assert [each["index"] for each in final["frames"]["used"]] == [0, 1, 2, 3]
        assert {(each["tokens"], each["crops"]) for each in final["frames"]["used"]} == {(313, 1)}
        assert final["usage"]["image_tokens"] == 4 * 313
        # With six it is too much: which ones were left out, and why, is told.
        more = [*frames, saved(picture(30, 20)), saved(picture(50, 70))]
        final = observer.final(observer.look("What?", more, max_tokens=4))
        used = [each["index"] for each in final["frames"]["used"]]
        dropped = {each["index"]: each["reason"] for each in final["frames"]["dropped"]}
        assert len(used) == 4
        assert {0, 5} <= set(used)
        assert sorted([*used, *dropped]) == [*range(6)]
        assert all("no room in the context" in reason for reason in dropped.values())
        # Where leaving frames out does not help, both numbers are told, before any work.
        name = observer.look("word " * 1200, frames, max_tokens=4)
        final = observer.final(name)
        assert final["code"] == "too_long"
        needed, context = (int(n) for n in re.findall(r"\d{4}", final["message"]))
        assert context == 1400 < needed
        name = observer.look("What?", frames[:1], max_tokens=1200)
        final = observer.final(name)
        assert final["code"] == "too_long"
        assert {"1200", "1400"} <= set(re.findall(r"\d{4}", final["message"]))
        assert not observer.events(name, "progress")
        observer.check()
        assert daemon.log("engine.died") == []


# F30 --------------------------------------------------------------------------------------------


def is_in(stage: str, beat: Body) -> bool:
    """Return whether a heartbeat tells of a job in this stage."""
    return bool(beat.get("job", {}).get("stage") == stage)


def test_a_cancelled_vision_job_gives_the_engine_up_within_a_step(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port, settings={"health": {"interval_s": 0.2}}) as daemon:
        daemon.wait_ready()
        for script, stage, step_s in (
            ("!decode 100 300", "decode_images", 0.3),
            ("!encode 100 300", "encode", 0.3),
            ("!prefill 100 300", "prefill", 0.3),
            ("!tokens 1000 50", "token", 0.05),
        ):
            name = observer.look(script, [marked(1), marked(2)])
            observer.wait_on("health", partial(is_in, stage))
            after = observer.look("!frames", [marked(stage)])
            observer.event(after, "accepted")
            observer.cancel(name)
            assert observer.final(name)["code"] == "cancelled", stage
            freed = observer.event(after, "started").at - observer.finals(name)[0].at
            assert freed < step_s + 0.5, stage
            assert observer.final(after)["text"] == digests([marked(stage)])
            assert len(observer.finals(name)) == 1
        # One that waits: its frames go with it.
        runs = observer.ask("!tokens 1000 50")
        observer.event(runs, "started")
        waits = observer.look("!frames", [marked("waits")])
        observer.event(waits, "accepted")
        assert len(stored(daemon)) == 1
        observer.cancel(waits)
        assert observer.final(waits)["code"] == "cancelled"
        assert stored(daemon) == []
        observer.cancel(runs)
        observer.check()
        assert daemon.log("engine.died") == []


@pytest.mark.engine
def test_a_cancelled_job_of_the_real_model_leaves_a_sound_engine(
    eyes: Callable[..., Daemon], observer: Observer
) -> None:
    large = [saved(Image.new("L", (5000, 5000 + n), n)) for n in range(8)]  # half a second each
    many = [saved(picture(64 + n, 48)) for n in range(10)]
    with eyes(model={"max_context": 4096}, health={"interval_s": 0.2}) as daemon:
        daemon.wait_ready()
        engine = daemon.engine_pid

        def seen() -> str:
            return str(observer.final(observer.look("What?", many, max_tokens=6))["text"])

        before = seen()
        decoding = observer.look("What is new?", large)
        assert observer.event(decoding, "progress").body["stage"] == "decode_images"
        observer.cancel(decoding)
        assert observer.final(decoding)["code"] == "cancelled"
        assert seen() == before
        # Those frames' features are kept: what begins first now, and all there is, is the prefill.
        filling = observer.look("What?", many, system="Look closely.", max_tokens=900)
        assert observer.event(filling, "progress").body["stage"] == "prefill"
        observer.cancel(filling)
        assert observer.final(filling)["code"] == "cancelled"
        assert seen() == before
        observer.check()
        assert daemon.engine_pids == [engine]
        assert stored(daemon) == []


# F31, F32 ---------------------------------------------------------------------------------------


def test_an_engine_that_grows_is_replaced_between_jobs_and_counted(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port, options=("--recycle-mb", "120")) as daemon:
        daemon.wait_ready()
        first = daemon.engine_pid
        frames = [[marked(n)] for n in range(9)]
        names = [observer.look("!leak 50 !frames", each) for each in frames]
        for name, each in zip(names, frames, strict=True):
            final = observer.final(name)
            assert (final["text"], final["attempt"]) == (digests(each), 1)
        observer.check()
        beat = observer.wait_on(
            "health", lambda body: body["engine"]["restarts"] == 3, after=observer.last
        ).body
        assert beat["engine"]["last_reason"].startswith("recycled: ")
        assert beat["totals"]["completed"] == 9
        observer.wait_on("health", lambda body: body["state"] == "ready", after=observer.last)
        assert len(daemon.log("engine.recycled")) == 3
        assert daemon.log("engine.died") == daemon.log("job.engine_died") == []
        assert daemon.engine_pids != [first]


def test_a_job_that_gets_no_memory_is_tried_three_times_and_the_next_is_served(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port, options=("--backoff", "0.1")) as daemon:
        daemon.wait_ready()
        bad = observer.look("!oom", [marked(1)])
        good = observer.look("!frames", [marked(2)])
        final = observer.final(bad)
        assert final["code"] == "dead"
        assert "oom" in final["message"]
        attempts = [each.body["attempt"] for each in observer.events(bad, "started")]
        assert attempts == [1, 2, 3]
        assert observer.final(good)["text"] == digests([marked(2)])
        observer.check()
        beat = observer.wait_on("health", after=observer.last).body
        assert beat["engine"]["restarts"] == 3
        assert beat["engine"]["last_reason"].startswith("oom")
        assert beat["totals"]["dead"] == 1
        assert stored(daemon) == []

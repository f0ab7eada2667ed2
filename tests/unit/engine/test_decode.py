from __future__ import annotations

import io
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from edged.engine.vision import decode as module
from edged.engine.vision.decode import MAX_PIXELS, MAX_SIDE, BadFrame, decode, probe

ROOT = Path(__file__).resolve().parents[3]
Pixels = NDArray[np.uint8]


def colours(width: int = 48, height: int = 32) -> Pixels:
    """Four quarters, so that JPEG and every turn keep them apart: red, green / blue, grey."""
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2, width // 2
    pixels[:top, :left] = (200, 30, 20)
    pixels[:top, left:] = (20, 180, 40)
    pixels[top:, :left] = (30, 40, 190)
    pixels[top:, left:] = (120, 120, 120)
    return pixels


def encoded(image: Image.Image | Pixels, kind: str = "JPEG", **options: Any) -> bytes:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0} | options
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    size: tuple[int, int], depth: int, colour: int, rows: bytes, *extra: bytes, interlace: int = 0
) -> bytes:
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *extra, data, chunk(b"IEND")])


def exif(orientation: int, order: str = "<") -> bytes:
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return mark + struct.pack(f"{order}HIH", 42, 8, 1) + entry + b"\0\0\0\0"


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def near(pixels: Pixels, expected: Pixels, most: int = 12) -> bool:
    return pixels.shape == expected.shape and bool(
        (np.abs(pixels.astype(int) - expected.astype(int)) <= most).all()
    )


# Kinds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_gives_its_colours(progressive: bool) -> None:
    data = encoded(colours(), progressive=progressive)

    picture = decode(data)

    assert probe(data) == (picture.width, picture.height) == (48, 32)
    assert near(picture.pixels, colours())
    assert picture.pixels.dtype == np.uint8


def test_a_grey_jpeg_gives_three_equal_channels() -> None:
    grey = np.full((8, 8), 77, np.uint8)

    assert near(decode(encoded(grey)).pixels, np.full((8, 8, 3), 77, np.uint8), 1)


@pytest.mark.parametrize("adobe", [True, False])
def test_a_cmyk_jpeg_gives_its_colours(adobe: bool) -> None:
    cmyk = Image.fromarray(colours()).convert("CMYK")
    data = encoded(cmyk)
    at = data.index(b"\xff\xee")
    if not adobe:  # the values are taken as inverted all the same: nobody writes others
        data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]

    assert near(decode(data).pixels, np.asarray(cmyk.convert("RGB")))


def test_a_png_gives_exactly_its_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (31, 17, 3), np.uint8)

    assert (decode(encoded(noise, "PNG")).pixels == noise).all()


def test_a_palette_gives_its_colours() -> None:
    few = Image.fromarray(colours()).quantize(4)

    assert near(decode(encoded(few, "PNG")).pixels, np.asarray(few.convert("RGB")), 0)


def test_one_bit_is_black_and_white() -> None:
    bits = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 2 * 255).convert("1")

    pixels = decode(encoded(bits, "PNG")).pixels

    assert pixels[0, :2].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_sixteen_bit_grey_becomes_eight_bits() -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)

    pixels = decode(encoded(Image.fromarray(levels), "PNG")).pixels

    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_sixteen_bit_colour_becomes_eight_bits() -> None:
    row = b"\0" + struct.pack(">6H", 0, 0x1234, 0xFFFF, 0x8000, 0x80FF, 0x00FF)

    pixels = decode(png((2, 1), 16, 2, row)).pixels

    assert pixels.tolist() == [[[0, 0x12, 255], [0x80, 0x80, 0]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    channels = {"RGBA": 4, "LA": 2}[mode]
    values = np.zeros((1, 3, channels), np.uint8)
    values[0, :, -1] = (0, 128, 255)

    pixels = decode(encoded(Image.fromarray(values, mode), "PNG")).pixels

    assert pixels[0, :, 0].tolist() == [255, 127, 0]


def test_sixteen_bits_with_alpha_become_white_where_transparent() -> None:
    row = b"\0" + struct.pack(">4H", 0x1111, 0, 0x2222, 0xFFFF)

    assert decode(png((2, 1), 16, 4, row)).pixels[0, :, 0].tolist() == [255, 0x22]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "clear"),
    [
        (8, 0, b"\0\x07\x09", struct.pack(">H", 7)),
        (16, 0, b"\0" + struct.pack(">HH", 7, 0x0909), struct.pack(">H", 7)),
        (8, 2, b"\0\x07\x07\x07\x09\x09\x09", struct.pack(">3H", 7, 7, 7)),
        (16, 2, b"\0" + struct.pack(">6H", *[0x0707] * 3, *[0x0909] * 3), b"\7" * 6),
        (8, 3, b"\0\0\1", b"\0\xff"),
    ],
)
def test_a_transparent_colour_becomes_white(
    depth: int, colour: int, row: bytes, clear: bytes
) -> None:
    extra = [chunk(b"tRNS", clear)]
    if colour == 3:
        extra.insert(0, chunk(b"PLTE", b"\7\7\7\x09\x09\x09"))

    pixels = decode(png((2, 1), depth, colour, row, *extra)).pixels

    assert pixels.tolist() == [[[255] * 3, [9] * 3]]


def test_an_interlaced_png_gives_its_pixels() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)]
    rows = b"".join(
        b"\0" + line.tobytes()
        for x, y, dx, dy in [*passes, (0, 1, 1, 2)]
        for line in grey[y::dy, x::dx]
    )

    assert (decode(png((8, 8), 8, 0, rows, interlace=1)).pixels[..., 0] == grey).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_orientation_is_applied(orientation: int, order: str, kind: str) -> None:
    upright = colours()
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    data = encoded(np.ascontiguousarray(undo), kind)
    tiff = exif(orientation, order)
    if kind == "JPEG":
        data = with_segment(data, 0xE1, b"Exif\0\0" + tiff)
    else:
        data = data[:33] + chunk(b"eXIf", tiff) + data[33:]

    picture = decode(data)

    assert probe(data) == (picture.width, picture.height) == (48, 32)
    assert near(picture.pixels, upright)


@pytest.mark.parametrize(
    "tiff",
    [b"", b"II", exif(0), exif(9), exif(6)[:-10], b"XX" + exif(6)[2:], b"II*\0\xff\xff\xff\x7f"],
)
def test_a_broken_orientation_is_none(tiff: bytes) -> None:
    data = with_segment(encoded(colours()), 0xE1, b"Exif\0\0" + tiff)

    assert probe(data) == (48, 32)
    assert near(decode(data).pixels, colours())


def test_of_several_pictures_the_first_is_taken() -> None:
    one, two = Image.fromarray(colours()), Image.new("RGB", (48, 32), "white")

    options: dict[str, Any] = {"quality": 95, "subsampling": 0, "append_images": [two]}
    mpo = encoded(one, "MPO", save_all=True, **options)
    assert mpo.count(b"\xff\xd8\xff") == 2
    assert near(decode(mpo).pixels, colours())
    apng = encoded(one, "PNG", save_all=True, append_images=[two])
    assert b"acTL" in apng
    assert (decode(apng).pixels == colours()).all()


def test_bytes_after_the_end_are_left_alone() -> None:
    for kind in ("JPEG", "PNG"):
        data = encoded(colours(), kind)
        assert (decode(data + b"\0" * 100).pixels == decode(data).pixels).all()


def test_a_thumb_is_a_small_grey_picture() -> None:
    thumb = decode(encoded(colours(), "PNG")).thumb()

    assert thumb.shape == (16, 16)
    assert thumb[12, 12] == 120


# A fraction of the size -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "least", "decoded"),
    [
        ((640, 480), (321, 1), (640, 480)),
        ((640, 480), (320, 240), (640, 480)),
        ((640, 480), (160, 120), (320, 240)),
        ((640, 480), (160, 121), (640, 480)),
        ((640, 480), (80, 60), (160, 120)),
        ((640, 480), (40, 30), (80, 60)),
        ((640, 480), (1, 1), (80, 60)),
        ((644, 480), (1, 1), (161, 120)),
        ((641, 480), (1, 1), (641, 480)),
    ],
)
def test_a_large_jpeg_is_decoded_at_twice_what_is_needed(
    size: tuple[int, int], least: tuple[int, int], decoded: tuple[int, int]
) -> None:
    data = encoded(colours(*size))

    picture = decode(data, least)

    assert picture.image.size == decoded
    assert (picture.width, picture.height) == size
    assert decode(encoded(colours(*size), "PNG"), least).image.size == size


def test_what_is_needed_is_meant_upright() -> None:
    data = with_segment(encoded(colours(640, 320)), 0xE1, b"Exif\0\0" + exif(6))

    assert decode(data, (80, 160)).image.size == (160, 320)
    assert decode(data, (160, 80)).image.size == (320, 640)


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (b"\xff\xd8", "truncated"),
        (b"\x89PNG", "truncated"),
        (b"\xff\xd8\xff\xd9", "without picture data"),
        (b"GIF89a" + b"\0" * 50, "GIF"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
        (b"BM" + b"\0" * 50, "BMP"),
        (b"II*\0" + b"\0" * 50, "TIFF"),
        (b"\0\0\0\x1cftypavif", "AVIF"),
    ],
)
def test_what_is_no_jpeg_or_png_is_refused(data: bytes, reason: str) -> None:
    for look in (probe, decode):
        with pytest.raises(BadFrame, match=reason):
            look(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_frame_is_refused_before_it_is_decoded(kind: str) -> None:
    data = encoded(colours(), kind)

    for cut in [*range(1, len(data), len(data) // 40), *range(len(data) - 4, len(data))]:
        with pytest.raises(BadFrame, match=r"truncated|not an image"):
            probe(data[:cut])


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("rows", [0, 1, 20, 39])
def test_png_data_that_end_too_early_are_refused(rows: int, interlace: int) -> None:
    data = bytes(rows * (1 + 3 * 40))

    with pytest.raises(BadFrame, match="truncated"):
        decode(png((40, 40), 8, 2, data, interlace=interlace))


def test_png_data_that_stop_in_the_middle_are_refused() -> None:
    noise = b"\0" + np.random.default_rng(0).bytes(40)
    whole = png((40, 40), 8, 0, 40 * noise)
    at = whole.index(b"IDAT") + 4
    packed = whole[at : -4 - 12]

    for end in (0, 2, len(packed) // 2, len(packed) - 6):
        with pytest.raises(BadFrame, match="truncated"):
            decode(whole[: at - 8] + chunk(b"IDAT", packed[:end]) + chunk(b"IEND"))


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (2, 0), (4, 0), (16, 4), (8, 6), (16, 6)])
@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 3), (3, 9), (17, 16)])
def test_rows_are_counted_exactly(
    size: tuple[int, int], depth: int, colour: int, interlace: int
) -> None:
    bits = depth * {0: 1, 4: 2, 6: 4}[colour]
    cells = [
        ((x, y), pass_of(x, y) if interlace else 0) for y in range(size[1]) for x in range(size[0])
    ]
    count = 0
    for number in {of for _, of in cells}:
        for row in {y for (_, y), of in cells if of == number}:
            columns = sum(1 for (_, y), of in cells if of == number and y == row)
            count += 1 + -(-columns * bits // 8)

    assert decode(png(size, depth, colour, bytes(count), interlace=interlace)).image.size == size
    with pytest.raises(BadFrame, match="truncated"):
        decode(png(size, depth, colour, bytes(count - 1), interlace=interlace))


def pass_of(x: int, y: int) -> int:
    """Which of Adam7's passes a pixel belongs to, as the specification's figure shows it."""
    return int(
        "1646264677777777565656567777777736463646777777775656565677777777"[8 * (y % 8) + x % 8]
    )


def test_a_wrong_checksum_is_refused() -> None:
    data = bytearray(encoded(colours(), "PNG"))
    data[data.index(b"IDAT") + 10] ^= 1

    with pytest.raises(BadFrame, match="checksum"):
        probe(bytes(data))


@pytest.mark.parametrize(
    "size", [(0, 5), (5, 0), (MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (8000, 1 + MAX_PIXELS // 8000)]
)
def test_a_bad_size_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    jpeg = bytearray(encoded(colours()))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", size[1], size[0])

    for data in (bytes(jpeg), png(size, 1, 0, b"")):
        with pytest.raises(BadFrame, match=r"no pixels|too many pixels"):
            probe(data)


def test_the_largest_size_is_not_refused() -> None:
    assert probe(png((8000, MAX_PIXELS // 8000), 1, 0, b"")) == (8000, 5000)


def test_kinds_of_jpeg_that_nobody_writes_are_refused() -> None:
    data = encoded(colours())
    at = data.index(b"\xff\xc0")

    for marker in (0xC3, 0xC9, 0xCA):
        with pytest.raises(BadFrame, match="arithmetic"):
            probe(data[: at + 1] + bytes([marker]) + data[at + 2 :])
    with pytest.raises(BadFrame, match="12 bits"):
        probe(data[: at + 4] + b"\x0c" + data[at + 5 :])


def test_too_many_scans_are_refused() -> None:
    data = encoded(colours(), progressive=True)
    scan = data[data.rindex(b"\xff\xc4") : -2]

    near(decode(data[:-2] + 50 * scan + data[-2:]).pixels, colours(), 255)
    with pytest.raises(BadFrame, match="too long to decode"):
        decode(data[:-2] + 100 * scan + data[-2:])


def test_the_scans_of_a_large_picture_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(colours(), progressive=True)
    scans = data.count(b"\xff\xda")

    monkeypatch.setattr(module, "_MAX_SCANNED_PIXELS", scans * 48 * 32)
    decode(data)
    monkeypatch.setattr(module, "_MAX_SCANNED_PIXELS", scans * 48 * 32 - 1)
    with pytest.raises(BadFrame, match="too long to decode"):
        decode(data)


def test_a_flood_of_segments_or_chunks_is_refused() -> None:
    jpeg, small = encoded(colours()), encoded(colours(), "PNG")

    with pytest.raises(BadFrame, match="segments"):
        probe(jpeg[:2] + b"\xff\xfe\0\2" * 30_000 + jpeg[2:])
    with pytest.raises(BadFrame, match="chunk"):
        probe(small[:33] + chunk(b"tEXt") * 30_000 + small[33:])


def test_fill_bytes_cost_no_time() -> None:
    with pytest.raises(BadFrame, match="truncated"):
        probe(b"\xff\xd8" + b"\xff" * 4_000_000)


def test_text_and_profiles_are_never_opened() -> None:
    bomb = zlib.compress(bytes(100_000_000))
    data = encoded(colours(), "PNG")
    parts = [
        chunk(b"zTXt", b"k\0\0" + bomb),
        chunk(b"iTXt", b"k\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"k\0\0" + bomb),
        b"\0\0\0\5tEXthello\0\0\0\0",  # with a wrong checksum: nobody looks
    ]

    assert (decode(data[:33] + b"".join(parts) + data[33:]).pixels == colours()).all()


def test_two_sizes_are_refused() -> None:
    data = encoded(colours())
    at = data.index(b"\xff\xc0")
    header = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")]

    with pytest.raises(BadFrame, match="two sizes"):
        probe(data[:at] + header + data[at:])


def test_no_memory_is_not_the_frames_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode(encoded(colours()))


# Damage -----------------------------------------------------------------------------------------


@given(st.binary(max_size=400), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]))
def test_any_bytes_give_a_picture_or_a_refusal(data: bytes, start: bytes) -> None:
    try:
        size = probe(start + data)
        picture = decode(start + data)
    except BadFrame:
        return
    assert size == (picture.width, picture.height)


#: In a process of its own, where a decoder's death would be seen.
DAMAGE = """
    import io, random, struct, sys, zlib
    import numpy as np
    from PIL import Image
    from edged.engine.vision.decode import BadFrame, decode, probe

    chance = random.Random(27)
    y, x = np.mgrid[0:70, 0:90]
    colour = np.stack([x * 2, y * 3, (x * y) % 256], -1).astype(np.uint8)
    picture = Image.fromarray(colour)
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray((colour[..., 0].astype(np.uint16) * 257))
    alpha = Image.fromarray(np.dstack([colour, colour[..., 0]]), "RGBA")

    def made(image, kind, **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    whole = [
        made(picture, "JPEG"),
        made(picture, "JPEG", exif=exif, progressive=True),
        made(picture, "JPEG", subsampling=0, restart_marker_blocks=2),
        made(picture.convert("L"), "JPEG"),
        made(picture.convert("CMYK"), "JPEG"),
        made(picture, "PNG", exif=exif),
        made(picture.quantize(16), "PNG", transparency=3),
        made(alpha, "PNG"),
        made(alpha.convert("LA"), "PNG"),
        made(grey16, "PNG"),
        made(picture.convert("1"), "PNG"),
    ]

    def resealed(data):
        # correct checksums, so that the damage is met behind them
        out, at = [data[:8]], 8
        while at + 12 <= len(data):
            length = int.from_bytes(data[at : at + 4], "big")
            if at + 12 + length > len(data):
                break
            body = data[at + 4 : at + 8 + length]
            out.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
            at += 12 + length
        return b"".join(out) + data[at:]

    def damaged(data):
        data = bytearray(data)
        way = chance.randrange(5)
        if way == 0:
            for _ in range(chance.choice([1, 1, 2, 10, 100])):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif way == 1:
            del data[chance.randrange(len(data)) :]
        elif way == 2:
            at = chance.randrange(len(data))
            del data[at : at + chance.randrange(1, 60)]
        elif way == 3:
            at = chance.randrange(len(data))
            data[at:at] = chance.randbytes(chance.randrange(1, 60))
        else:
            other = chance.choice(whole)
            data[chance.randrange(len(data)) :] = other[chance.randrange(len(other)) :]
        data = bytes(data)
        return resealed(data) if data[:4] == b"\\x89PNG" and chance.random() < 0.7 else data

    seen = [0, 0]
    for n in range(1000):
        data = damaged(whole[n % len(whole)])
        try:
            size = probe(data)
            got = decode(data, chance.choice([None, (4, 4)]))
        except BadFrame as bad:
            assert bad.reason and len(bad.reason) < 120
            seen[0] += 1
        else:
            assert size == (got.width, got.height) and got.pixels.shape[2] == 3
            seen[1] += 1
    print(*seen)
"""


def test_a_thousand_damaged_frames_are_survived() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(DAMAGE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    refused, decoded = map(int, done.stdout.split())
    assert refused + decoded == 1000
    assert min(refused, decoded) > 100  # both ways were really tried


def test_only_two_decoders_are_ever_loaded() -> None:
    whole = [encoded(colours(), kind) for kind in ("JPEG", "PNG")]
    one, two = Image.fromarray(colours()), Image.new("RGB", (48, 32), "white")
    mpo = encoded(one, "MPO", save_all=True, append_images=[two])
    code = f"""
    import sys
    from edged.engine.vision.decode import BadFrame, decode
    for data in {[*whole, mpo, with_segment(whole[0], 0xE1, b"Exif" + bytes(2) + exif(6))]!r}:
        decode(data).thumb()
    for data in (b"GIF89a", b"%!PS", b"II*" + bytes(1)):
        try:
            decode(data)
        except BadFrame:
            pass
    print(*sorted(m for m in sys.modules if m.startswith("PIL.") and m.endswith("Plugin")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout.split() == ["PIL.JpegImagePlugin", "PIL.PngImagePlugin"]

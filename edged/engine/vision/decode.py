"""From a frame's bytes to its pixels, whatever the bytes are.

A frame comes from outside and is often broken: cut by a bad link, or made to hurt. So the container
is read here first, in Python: its kind, its size before anything is allocated, whether its end is
there. Only the parts that make pixels are then handed to one of two decoders of Pillow, JPEG or
PNG, by name; comments, thumbnails, further pictures, animations, profiles and compressed texts are
never looked at, and no other decoder can be reached. Of what they hold, the Exif orientation is
the one thing used.

A flipped bit or a gap inside a JPEG's picture data cannot be seen: it has no checksums. It gives a
picture with a flaw.

Memory at the peak: `PEAK_BYTES_A_PIXEL` for each pixel of the frame at most, beside its bytes
twice.

Formats: JPEG, ITU-T T.81 (annex B for the markers); PNG, W3C "Portable Network Graphics (PNG)
Specification, third edition" (5 for the chunks); orientation, CIPA DC-008 "Exif" (4.6.5).
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin

from edged.errors import EdgedError

#: Pixels of a frame, and of one of its sides. A picture of this size is 160 MB while it is decoded.
MAX_PIXELS = 40_000_000
MAX_SIDE = 20_000
#: Bytes, seen at worst: a progressive CMYK JPEG, its coefficients and two pictures at once.
PEAK_BYTES_A_PIXEL = 14

#: A progressive JPEG is gone through once for each of its scans, however little a scan holds:
#: encoders write about ten.
_MAX_SCANS = 100
_MAX_SCANNED_PIXELS = 600_000_000
#: Segments or chunks; a big PNG of a careless encoder has a few thousand.
_MAX_PARTS = 20_000
#: Decoded at a fraction of its size, a JPEG still has so many times the pixels a side it needs.
_OVERSAMPLE = 2
#: Rows that are converted at once.
_BAND = 64

_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
#: Samples a pixel, by a PNG's colour type.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
#: Bytes that are unpacked at once.
_PIECE = 65536

_WHITE = (255, 255, 255)
_JPEG_START = b"\xff\xd8\xff"
_PNG_START = b"\x89PNG\r\n\x1a\n"
#: A marker that is neither a stuffed byte, nor a restart, nor fill. Without a repetition, so that
#: no input makes the search slow.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_EOI, _SOI, _SOS, _DHT, _DQT, _DRI, _TEM = 0xD9, 0xD8, 0xDA, 0xC4, 0xDB, 0xDD, 0x01
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
#: Baseline, extended and progressive.
_SOF_DECODED = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE = 0xC2
_SOF_OTHER = frozenset(range(0xC3, 0xD0)) - {_DHT, 0xC8, 0xCC}
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: From this orientation on, rows and columns are exchanged.
_LYING = 5


class BadFrame(EdgedError):
    """A frame that cannot be looked at; `reason` is for people, without the frame's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded frame, upright."""

    #: Mode RGB. Smaller than width x height (both by the same 2, 4 or 8) if less was asked for.
    image: Image.Image = field(repr=False)
    #: Pixels of the frame as it was sent, upright.
    width: int
    height: int

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Return the pixels of `image`: [rows, columns, 3], red, green, blue; a copy."""
        return np.asarray(self.image, np.uint8)

    def thumb(self, side: int = 16) -> NDArray[np.uint8]:
        """Return the picture squeezed to side x side greys: [side, side], to compare frames by."""
        small = self.image.resize((side, side), Image.Resampling.BOX)
        return np.asarray(small.convert("L"), np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What the container says. Sizes are before turning."""

    width: int
    height: int
    orientation: int
    #: What Pillow is to decode, and how it is opened.
    stream: bytes = field(repr=False)
    open: Callable[[io.BytesIO], ImageFile.ImageFile]
    #: Whether it can be decoded at a fraction of its size.
    scales: bool = False
    #: Whether its samples have 16 bits.
    deep: bool = False
    #: A PNG's compressed rows, and how many bytes they must be.
    packed: Sequence[memoryview] = field(default=(), repr=False)
    unpacked: int = 0

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height after turning."""
        if self.orientation >= _LYING:
            return self.height, self.width
        return self.width, self.height


def probe(data: bytes) -> tuple[int, int]:
    """Return a frame's width and height, upright, without decoding it.

    Raises:
        BadFrame: as `decode`, as far as it can be told without decoding: a frame that is no JPEG or
            PNG, is too large or has no end is refused here.
    """
    return _read(data).upright


def decode(data: bytes, least: tuple[int, int] | None = None) -> Picture:
    """Decode a frame.

    JPEG (baseline and progressive; grey, colour or CMYK, Adobe's inverted kind too) and PNG (every
    kind; what is transparent becomes white, 16 bits become 8, of an animation the still picture is
    taken). The Exif orientation is applied. Bytes after the end are left alone, cameras write them.

    Args:
        data: the frame's bytes.
        least: width and height, upright, that are needed. A JPEG of 4 (8, 16) times that much is
            decoded at a half (a quarter, an eighth) of its size if its sides divide so: less
            memory, less time, and from the twofold size that is left nearly the same pixels come.

    Raises:
        BadFrame: it cannot be decoded.
        MemoryError: there is no room for its pixels.
    """
    frame = _read(data)
    width, height = frame.upright
    if least is not None and frame.orientation >= _LYING:
        least = least[1], least[0]
    try:
        image = _decode(frame, least)
    except (MemoryError, BadFrame):
        raise
    except Exception as error:  # a decoder fails in many ways: all are the frame's fault
        raise BadFrame(_reason(error)) from error
    return Picture(image, width, height)


def _read(data: bytes) -> _Frame:
    if data.startswith(_JPEG_START):
        frame = _read_jpeg(data)
    elif data.startswith(_PNG_START):
        frame = _read_png(data)
    elif not data:
        raise BadFrame("it is empty")
    elif _JPEG_START.startswith(data[:3]) or _PNG_START.startswith(data[:8]):
        raise BadFrame("it is truncated: nothing but a beginning")
    else:
        raise BadFrame(f"{_guess(data)}: JPEG and PNG can be used")
    return frame


def _guess(data: bytes) -> str:
    for kind, at, mark in (
        ("a GIF", 0, b"GIF8"),
        ("a WebP", 8, b"WEBP"),
        ("a BMP", 0, b"BM"),
        ("a TIFF", 0, b"II*\0"),
        ("a TIFF", 0, b"MM\0*"),
        ("an AVIF or HEIC", 4, b"ftyp"),
        ("a PDF", 0, b"%PDF"),
        ("a PostScript", 0, b"%!PS"),
        ("an SVG", 0, b"<svg"),
    ):
        if data[at : at + len(mark)] == mark:
            return f"it is {kind} file"
    return "it is not an image"


def _check_size(width: int, height: int) -> None:
    if width == 0 or height == 0:
        raise BadFrame("it is damaged: it says it has no pixels")
    if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS:
        raise BadFrame(
            f"{width} x {height} is too many pixels: {MAX_PIXELS // 1_000_000} million and "
            f"{MAX_SIDE} a side at most"
        )


# JPEG -------------------------------------------------------------------------------------------


def _read_jpeg(data: bytes) -> _Frame:
    """Walk through the markers, to the end, and keep what makes pixels."""
    view = memoryview(data)
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    size: tuple[int, int] | None = None
    progressive = False
    orientation, scans, parts, at = 1, 0, 0, 2
    while True:
        found = _MARKER.search(data, at)
        if found is None:
            raise BadFrame("it is truncated: the JPEG has no end")
        marker = found[1][0]
        if scans:  # what lies before the marker is picture data
            kept.append(view[at : found.start()])
        at = found.end()
        parts += 1
        if parts > _MAX_PARTS:
            raise BadFrame("it is damaged: more JPEG segments than a picture has")
        if marker == _EOI:
            break
        if marker == _TEM:
            continue
        if marker == _SOI:
            raise BadFrame("it is damaged: a second JPEG begins before the first has ended")
        if at + 2 > len(data):
            raise BadFrame("it is truncated: the JPEG has no end")
        end = at + int.from_bytes(data[at : at + 2], "big")
        if end < at + 2:
            raise BadFrame("it is damaged: a JPEG segment has no length")
        if end > len(data):
            raise BadFrame("it is truncated: the JPEG ends inside a segment")
        body = data[at + 2 : end]
        if marker in _SOF_DECODED:
            if size is not None:
                raise BadFrame("it is damaged: a JPEG with two sizes")
            size = _jpeg_size(body)
            progressive = marker == _PROGRESSIVE
        elif marker in _SOF_OTHER:
            raise BadFrame("a lossless, hierarchical or arithmetic JPEG cannot be used")
        elif marker == _SOS:
            if size is None:
                raise BadFrame("it is damaged: a JPEG without a size")
            scans += 1
            pixels = size[0] * size[1]
            if scans > _MAX_SCANS or (progressive and scans * pixels > _MAX_SCANNED_PIXELS):
                raise BadFrame(f"a JPEG of {scans} scans or more would take too long to decode")
        elif marker == _APP1 and body.startswith(_EXIF):
            orientation = _orientation(body[len(_EXIF) :])
        if (
            marker in (*_SOF_DECODED, _SOS, _DHT, _DQT, _DRI)
            or (marker == _APP0 and body.startswith(b"JFIF\0"))
            or (marker == _APP14 and body.startswith(b"Adobe"))
        ):
            kept.append(view[at - 2 : end])
        at = end
    if size is None or not scans:
        raise BadFrame("it is damaged: a JPEG without picture data")
    kept.append(b"\xff\xd9")
    return _Frame(
        width=size[0],
        height=size[1],
        orientation=orientation,
        stream=b"".join(kept),
        open=JpegImagePlugin.JpegImageFile,
        scales=True,
    )


def _jpeg_size(body: bytes) -> tuple[int, int]:
    if len(body) < 6:
        raise BadFrame("it is damaged: a JPEG without a size")
    precision, height, width, components = struct.unpack(">BHHB", body[:6])
    _check_size(width, height)
    if precision != 8:
        raise BadFrame(f"a JPEG of {precision} bits cannot be used: 8 can")
    if components not in (1, 3, 4) or len(body) < 6 + 3 * components:
        raise BadFrame(f"it is damaged: a JPEG of {components} channels")
    return width, height


def _orientation(tiff: bytes) -> int:
    """Return the orientation, 1 to 8, that the first directory of a TIFF structure has; else 1."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(min(count, 1000)):
            tag, kind, values, value = struct.unpack_from(
                f"{order}HHIH", tiff, start + 2 + 12 * entry
            )
            if tag == _ORIENTATION:
                return value if (kind, values) == (3, 1) and value in _TURNS else 1
    except struct.error:  # cut: a picture without its orientation is still one
        pass
    return 1


# PNG --------------------------------------------------------------------------------------------


def _read_png(data: bytes) -> _Frame:
    """Walk through the chunks, to the end, and keep what makes pixels."""
    view = memoryview(data)
    header = b""
    kept: list[memoryview] = []
    pixels: list[memoryview] = []
    orientation, parts, at = 1, 0, len(_PNG_START)
    while True:
        if at + 12 > len(data):
            raise BadFrame("it is truncated: the PNG has no end")
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        parts += 1
        if not kind.isalpha() or length >= 1 << 31 or parts > _MAX_PARTS:
            raise BadFrame("it is damaged: what should be a PNG chunk is none")
        if end > len(data):
            raise BadFrame("it is truncated: the PNG ends inside a chunk")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"):
            body = view[at + 8 : end - 4]
            if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(data[end - 4 : end], "big"):
                raise BadFrame(f"it is damaged: the PNG's {kind.decode()} has a wrong checksum")
            if (kind == b"IHDR") is not (parts == 1):
                raise BadFrame("it is damaged: a PNG begins with one header")
            if kind == b"IEND":
                break
            if kind == b"IHDR":
                header = bytes(body)
                _check_png(header)
            elif kind == b"IDAT":
                pixels.append(body)
            elif kind == b"eXIf":
                orientation = _orientation(bytes(body))
            elif not pixels:  # a palette after the pixels comes too late to count
                kept.append(view[at:end])
        elif parts == 1:
            raise BadFrame("it is damaged: a PNG begins with one header")
        at = end
    if not pixels:
        raise BadFrame("it is damaged: a PNG without picture data")
    width, height, depth = struct.unpack_from(">IIB", header)
    return _Frame(
        width=width,
        height=height,
        orientation=orientation,
        stream=b"".join(
            [
                _PNG_START,
                *_chunk(b"IHDR", [header]),
                *kept,
                *_chunk(b"IDAT", pixels),
                *_chunk(b"IEND", []),
            ]
        ),
        open=PngImagePlugin.PngImageFile,
        deep=depth == 16,
        packed=pixels,
        unpacked=_rows_size(header),
    )


def _check_png(header: bytes) -> None:
    if len(header) != 13:
        raise BadFrame("it is damaged: the PNG's header is too short or too long")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(
        ">IIBBBBB", header
    )
    _check_size(width, height)
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    if depth not in depths.get(colour, ()) or compression or filtering or interlace > 1:
        raise BadFrame("it is damaged: the PNG's header tells of no known kind")


def _rows_size(header: bytes) -> int:
    """Return how many bytes the rows are, unpacked, each with its filter byte."""
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", header)
    bits = depth * _CHANNELS[colour]
    total = 0
    for x, y, step_x, step_y in _ADAM7 if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0:
            total += max(0, rows) * (1 + -(-columns * bits // 8))
    return total


def _check_rows(frame: _Frame) -> None:
    """Unpack a PNG's rows into nothing: Pillow makes do with too few of them."""
    unpack = zlib.decompressobj()
    left = frame.unpacked
    for part in frame.packed:
        for at in range(0, len(part), _PIECE):
            piece: bytes | memoryview = part[at : at + _PIECE]
            while piece and left > 0 and not unpack.eof:
                left -= len(unpack.decompress(piece, 16 * _PIECE))
                piece = unpack.unconsumed_tail
    if left > 0:
        left -= len(unpack.flush())
    if left > 0:
        raise BadFrame("it is truncated: its picture data ends too early")


def _chunk(kind: bytes, parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    crc = zlib.crc32(kind)
    for part in parts:
        crc = zlib.crc32(part, crc)
    length = sum(map(len, parts))
    return [struct.pack(">I4s", length, kind), *parts, struct.pack(">I", crc)]


# Pixels -----------------------------------------------------------------------------------------


def _decode(frame: _Frame, least: tuple[int, int] | None) -> Image.Image:
    image = _pixels(frame, least)
    turn = _TURNS.get(frame.orientation)
    return image if turn is None else image.transpose(turn)


def _pixels(frame: _Frame, least: tuple[int, int] | None) -> Image.Image:
    opened = frame.open(io.BytesIO(frame.stream))
    if opened.size != (frame.width, frame.height):  # the memory was counted for another size
        raise BadFrame("it is damaged: it has two sizes")
    if frame.scales and least is not None:
        factor = _fraction(frame, least)
        if factor > 1:
            opened.draft(None, (frame.width // factor, frame.height // factor))
    if frame.packed:
        _check_rows(frame)
    opened.load()
    if opened.mode == "RGB" and not _transparent(opened):
        return opened
    return _to_rgb(opened, frame)


def _fraction(frame: _Frame, least: tuple[int, int]) -> int:
    """Return by how much a JPEG may be shrunk while it is decoded.

    Only by what divides its sides: else the last row or column would stand for less than the
    others, and the picture be a little stretched.
    """
    for factor in (8, 4, 2):
        if (
            frame.width % factor == 0
            and frame.height % factor == 0
            and frame.width // factor >= _OVERSAMPLE * least[0]
            and frame.height // factor >= _OVERSAMPLE * least[1]
        ):
            return factor
    return 1


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info


def _to_rgb(image: Image.Image, frame: _Frame) -> Image.Image:
    """Convert to RGB, on white, some rows at a time: that needs no third picture in memory."""
    width, height = image.size
    canvas = Image.new("RGB", (width, height), _WHITE)
    see_through = image.info.get("transparency")
    if frame.deep and isinstance(see_through, tuple):
        see_through = tuple(value >> 8 for value in see_through)  # as the pixels were
    for top in range(0, height, _BAND):
        band = image.crop((0, top, width, min(top + _BAND, height)))
        mask: Image.Image | None = None
        if band.mode.startswith("I"):
            band, mask = _grey16(band, see_through)
        elif _transparent(image):
            if see_through is not None:
                band.info["transparency"] = see_through
            band = band.convert("RGBA")
            mask = band.getchannel("A")
        canvas.paste(band.convert("RGB"), (0, top), mask)
    return canvas


def _grey16(band: Image.Image, see_through: object) -> tuple[Image.Image, Image.Image | None]:
    """Return 16 bit greys in 8 bits, rounded, and where they are to be seen."""
    deep = np.asarray(band).astype(np.uint32)
    # 257 * 255 = 65535: black stays black, white white
    shallow = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if not isinstance(see_through, int):
        return shallow, None
    return shallow, Image.fromarray(np.where(deep == see_through, 0, 255).astype(np.uint8))


def _reason(error: Exception) -> str:
    """Say what a decoder's complaint means."""
    if "truncated" in str(error):
        return "it is truncated: its picture data ends too early"
    return "it is damaged: its picture data cannot be decoded"

"""Pictures as a camera would take them: a scene that moves, with noise as a sensor has it."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFilter

SIZE = (640, 480)
#: How much of a picture is noise: enough that a JPEG of it is as large as a camera's.
_NOISE = 0.06


def picture(n: int, *, scene: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """Return the n-th picture of a scene; another one for each n and each scene."""
    width, height = size
    draw = random.Random(scene)
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    pen = ImageDraw.Draw(image)
    for _ in range(12):  # what stands still
        left, top = draw.randrange(width), draw.randrange(height)
        colour = draw.randrange(256), draw.randrange(256), draw.randrange(256)
        right, bottom = draw.randrange(20, width // 3), draw.randrange(20, height // 3)
        pen.rectangle((left, top, left + right, top + bottom), fill=colour)
    at = (40 + 53 * n) % width  # what moves
    pen.ellipse((at, height // 3, at + height // 6, height // 2), fill=(220, 40, 30))
    image = image.filter(ImageFilter.GaussianBlur(1))
    grain = Image.effect_noise((width, height), 64).convert("RGB")
    return Image.blend(image, grain, _NOISE)


def encoded(
    n: int, kind: Literal["PNG", "JPEG"] = "PNG", *, scene: int = 0, size: tuple[int, int] = SIZE
) -> bytes:
    """Return the n-th picture of a scene as a camera sends it."""
    out = io.BytesIO()
    picture(n, scene=scene, size=size).save(out, kind, quality=85)
    return out.getvalue()


def written(folder: Path, count: int, *, scene: int = 0) -> list[Path]:
    """Write the first pictures of a scene as PNG; return where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{scene}-{n}.png" for n in range(count)]
    for n, path in enumerate(paths):
        path.write_bytes(encoded(n, scene=scene))
    return paths

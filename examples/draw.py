"""Draws the pictures of this folder: ``python examples/draw.py``. Plain Pillow and its own font, which mini never saw."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
WHITE = (255, 255, 255)


def sign(text: str, ground: tuple[int, int, int], ink: tuple[int, int, int], size: int = 19) -> Image.Image:
    """One line of text in the middle of a plate with a little air around it."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    wide = max(4, -(-round(right - left + 10) // 28)) * 28
    plate = Image.new("RGB", (wide, 28), ground)
    at = ((wide - (right - left)) / 2 - left, (28 - (bottom - top)) / 2 - top)
    ImageDraw.Draw(plate).text(at, text, ink, font)
    return plate


def shapes() -> Image.Image:
    """Three shapes on paper: a red circle at the left, a blue square in the middle, a green triangle at the right."""
    paper = Image.new("RGB", (168, 112), WHITE)
    draw = ImageDraw.Draw(paper)
    draw.ellipse((10, 36, 50, 76), (220, 40, 40))
    draw.rectangle((66, 38, 102, 74), (40, 80, 220))
    draw.polygon(((138, 34), (118, 76), (158, 76)), (40, 160, 60))
    return paper


def main() -> None:
    sign("Station 42", (20, 90, 60), WHITE).save(HERE / "sign.png")
    shapes().save(HERE / "shapes.png")


if __name__ == "__main__":
    main()

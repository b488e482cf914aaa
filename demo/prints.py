"""Printed, written and painted textures: covers, labels, pages, pictures. numpy and OpenCV only.

As in textures.py: sRGB uint8 [H, W, 3], row 0 at the top, each a pure function of its arguments.
"""

import cv2
import numpy as np
from textures import as_uint8, fractal_noise, mix, seeded, sprig

_FONT = cv2.FONT_HERSHEY_TRIPLEX
_SCRIPT = cv2.FONT_HERSHEY_SCRIPT_COMPLEX


def _text(image, text, center, height, colour, font=_FONT, thickness=1):
    """Write `text` centred at `center` (x, y), letters `height` pixels high."""
    scale = height / cv2.getTextSize("H", font, 1.0, 1)[0][1]
    (width, tall), _ = cv2.getTextSize(text, font, scale, thickness)
    origin = (int(center[0] - width / 2), int(center[1] + tall / 2))
    cv2.putText(image, text, origin, font, scale, colour, thickness, cv2.LINE_AA)


def book_cover(title, author, ground, ink, motif, height=640, width=448):
    """Front of a book: frame, title, author and a motif (sun, waves, leaf or grid)."""
    rng = seeded(f"book {title}")
    tone = 0.92 + 0.14 * fractal_noise(rng, height, width, (6, 4), 6, 0.7)
    image = as_uint8(np.asarray(ground, np.float32) * tone[..., None])
    cv2.rectangle(image, (24, 24), (width - 24, height - 24), ink, 4)
    cv2.rectangle(image, (34, 34), (width - 34, height - 34), ink, 1)
    words = title.split()
    for i, word in enumerate(words):
        _text(image, word, (width / 2, 96 + 58 * i), 36, ink, thickness=2)
    _text(image, author, (width / 2, height - 66), 20, ink)
    center = (width // 2, int(height * 0.62))
    if motif == "sun":
        cv2.circle(image, center, 54, (232, 170, 60), -1, cv2.LINE_AA)
        for k in range(24):
            a = k * np.pi / 12
            p, q = (
                tuple(int(c + r * f) for c, f in zip(center, (np.cos(a), np.sin(a)), strict=True))
                for r in (66, 104)
            )
            cv2.line(image, p, q, (232, 170, 60), 4, cv2.LINE_AA)
    elif motif == "waves":
        for k in range(8):
            x = np.arange(60, width - 60)
            y = center[1] - 80 + 24 * k + 12 * np.sin(x / 22 + k)
            cv2.polylines(
                image, [np.stack([x, y], -1).astype(np.int32)], False, ink, 5, cv2.LINE_AA
            )
    elif motif == "leaf":
        for lean in (-0.6, 0.0, 0.6):
            sprig(image, center[0], center[1], lean, 88, ink)
    else:
        for k in range(-3, 4):
            for m in range(-3, 4):
                p = (center[0] + 34 * k, center[1] + 34 * m)
                colour = (214, 92, 60) if (k + m) % 3 == 0 else ink
                cv2.rectangle(image, (p[0] - 12, p[1] - 12), (p[0] + 12, p[1] + 12), colour, -1)
    return image


def book_spine(title, ground, ink, height=96, width=640):
    """Back of a book, lying on its side: reads along the width."""
    rng = seeded(f"spine {title}")
    tone = 0.90 + 0.16 * fractal_noise(rng, height, width, (2, 8), 5, 0.7)
    image = as_uint8(np.asarray(ground, np.float32) * tone[..., None])
    for x in (36, 52, width - 56, width - 40):
        cv2.line(image, (x, 0), (x, height), ink, 4)
    _text(image, title, (width / 2, height / 2), 34, ink, thickness=2)
    return image


def page_edges():
    rng = seeded("page edges")
    lines = fractal_noise(rng, 128, 512, (64, 2), 2, 0.6)
    return as_uint8(mix((186, 172, 144), (244, 236, 216), lines))


def notebook_page(side, height=768, width=560):
    """A ruled page: writing on the left one, a sketch of the pot plant and a list on the right one."""
    rng = seeded(f"notebook {side}")
    tone = 0.97 + 0.03 * fractal_noise(rng, height, width, (4, 4), 5)
    image = as_uint8(np.float32((232, 226, 208)) * tone[..., None])
    for y in range(70, height - 20, 34):
        cv2.line(image, (0, y), (width, y), (176, 196, 214), 2)
    cv2.line(image, (58, 0), (58, height), (220, 140, 140), 2)
    ink = (34, 42, 96)
    if side == "left":
        lines = ["Thursday", "Light from the left", "after nine. Walk half", "way round the desk,", "high and low, and", "take two dozen", "photographs of it.",
                 "The glaze is hard,", "the wire is harder.", "Tea first.", "", "Water the plant!", "Ask for the lemons", "and a new bulb."]  # fmt: skip
        for i, line in enumerate(lines):
            scale = 34 / 30 if i == 0 else 1.0
            cv2.putText(image, line, (72, 62 + 34 * i), _SCRIPT, scale, ink, 2, cv2.LINE_AA)
        return image
    pot = np.array([[210, 430], [350, 430], [328, 540], [232, 540]], np.int32)
    cv2.fillPoly(image, [pot], (216, 160, 128), cv2.LINE_AA)
    cv2.polylines(image, [pot], True, (70, 50, 40), 4, cv2.LINE_AA)
    for lean in (-0.9, -0.45, 0.0, 0.45, 0.9):
        sprig(image, 280 + lean * 60, 330, lean, 100, (70, 118, 74))
    for i, word in enumerate(["pot", "24 views", "6 kept"]):
        cv2.putText(image, word, (96, 614 + 46 * i), _SCRIPT, 1.2, ink, 2, cv2.LINE_AA)
    cv2.arrowedLine(image, (178, 600), (244, 552), ink, 3, cv2.LINE_AA, tipLength=0.25)
    return image


def tea_label(height=512, width=1024):
    """Goes round the tea tin: two fronts and two sides."""
    rng = seeded("tea label")
    tone = 0.95 + 0.08 * fractal_noise(rng, height, width, (4, 8), 5)
    image = as_uint8(np.float32((30, 92, 92)) * tone[..., None])
    gold, cream = (222, 180, 96), (244, 234, 206)
    for left in (0, width // 2):
        middle = left + width // 4
        cv2.ellipse(image, (middle, 250), (190, 170), 0, 0, 360, cream, -1, cv2.LINE_AA)
        cv2.ellipse(image, (middle, 250), (176, 156), 0, 0, 360, (160, 60, 40), 5, cv2.LINE_AA)
        _text(image, "GARDEN", (middle, 200), 44, (40, 60, 50), thickness=2)
        _text(image, "TEA", (middle, 280), 66, (160, 60, 40), thickness=3)
        _text(image, "first flush 100 g", (middle, 345), 20, (40, 60, 50))
        for x in range(left + 16, left + width // 2, 32):
            cv2.circle(image, (x, 30), 10, gold, -1, cv2.LINE_AA)
            cv2.circle(image, (x, height - 30), 10, gold, -1, cv2.LINE_AA)
    for y in (54, height - 58):
        cv2.line(image, (0, y), (width, y), gold, 5)
    return image


def mug_glaze(height=512, width=1024):
    """Cream with painted bands and a ring of dots and leaves."""
    rng = seeded("mug")
    tone = 0.96 + 0.06 * fractal_noise(rng, height, width, (3, 6), 4)
    image = as_uint8(np.float32((236, 226, 206)) * tone[..., None])
    for y, thick, colour in (
        (70, 22, (40, 78, 120)),
        (110, 8, (206, 112, 60)),
        (400, 8, (206, 112, 60)),
        (440, 30, (40, 78, 120)),
    ):
        x = np.arange(width)
        wobble = (
            y + 2.5 * np.sin(x * 2 * np.pi * 5 / width) + 1.5 * np.sin(x * 2 * np.pi * 13 / width)
        )
        cv2.polylines(
            image, [np.stack([x, wobble], -1).astype(np.int32)], False, colour, thick, cv2.LINE_AA
        )
    for k in range(12):
        x = int((k + 0.5) * width / 12)
        sprig(image, x, 250 + rng.uniform(-5, 5), rng.uniform(-0.15, 0.15), 88, (58, 110, 84))
        cv2.circle(image, (x + width // 24, 250), 13, (198, 66, 50), -1, cv2.LINE_AA)
    return image


def landscape_print(height=640, width=900):
    """A silk-screen of hills, sun and birds, for the wall."""
    rng = seeded("landscape")
    yy = np.linspace(0, 1, height, dtype=np.float32)[:, None].repeat(width, 1)
    image = as_uint8(mix((246, 214, 160), (232, 140, 96), yy))
    cv2.circle(image, (640, 210), 84, (250, 240, 206), -1, cv2.LINE_AA)
    colours = [(196, 128, 112), (140, 104, 118), (84, 88, 116), (44, 66, 92), (26, 44, 58)]
    for layer, colour in enumerate(colours):
        line = fractal_noise(rng, 1, width, (1, 3 + layer), 6, 0.5)[0]
        y = height * (0.38 + 0.12 * layer) - (line - 0.5) * 190
        hills = np.concatenate(
            [np.stack([np.arange(width), y], -1), [[width, height], [0, height]]]
        )
        cv2.fillPoly(image, [hills.astype(np.int32)], colour, cv2.LINE_AA)
    for x, y in ((250, 120), (310, 150), (200, 165), (380, 105)):
        cv2.ellipse(image, (x - 12, y), (13, 8), 0, 180, 350, (40, 40, 50), 3, cv2.LINE_AA)
        cv2.ellipse(image, (x + 12, y), (13, 8), 0, 190, 360, (40, 40, 50), 3, cv2.LINE_AA)
    return image


def botanical_print(height=900, width=640):
    """A herbarium sheet with three sprigs and captions."""
    rng = seeded("botanical")
    tone = 0.94 + 0.06 * fractal_noise(rng, height, width, (4, 3), 6)
    image = as_uint8(np.float32((240, 230, 204)) * tone[..., None])
    for x, lean, colour in (
        (170, -0.2, (70, 110, 66)),
        (330, 0.1, (120, 64, 58)),
        (490, 0.25, (62, 96, 110)),
    ):
        for step in range(3):
            sprig(image, x + lean * 60 * step, 620 - 170 * step, lean, 120 - 12 * step, colour)
    for i, word in enumerate(["Fig. 1", "Fig. 2", "Fig. 3"]):
        _text(image, word, (170 + 160 * i, 786), 18, (70, 60, 50))
    _text(image, "FOLIA HORTI", (width / 2, 842), 30, (70, 60, 50), thickness=2)
    cv2.rectangle(image, (26, 26), (width - 26, height - 26), (130, 110, 80), 2)
    return image

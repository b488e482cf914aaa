"""Round the desk: floor, walls, window with a curtain, shelf of books, and the garden outside. Metres, z up."""

import numpy as np
import plants
import prints
import textures
from parts import BRASS, WHITE, Material, Part
from shapes import box, box_faces, grid, join, quad, tube

FLOOR = -0.74
WALL = 0.62  # inner face of the window wall
LEFT, RIGHT = -1.9, 1.9
SILL, LINTEL = 0.14, 1.30  # the window opening, bottom and top
OPEN_LEFT, OPEN_RIGHT = -0.62, 0.86


def shell() -> list[Part]:
    """Floor, the window wall round its opening, two side walls, skirting."""
    floor = quad((LEFT, WALL, FLOOR), (RIGHT, WALL, FLOOR), (LEFT, -2.6, FLOOR))
    top = 2.3
    back = [
        quad((LEFT, WALL, top), (OPEN_LEFT, WALL, top), (LEFT, WALL, FLOOR)),
        quad((OPEN_RIGHT, WALL, top), (RIGHT, WALL, top), (OPEN_RIGHT, WALL, FLOOR)),
        quad((OPEN_LEFT, WALL, SILL), (OPEN_RIGHT, WALL, SILL), (OPEN_LEFT, WALL, FLOOR)),
        quad((OPEN_LEFT, WALL, top), (OPEN_RIGHT, WALL, top), (OPEN_LEFT, WALL, LINTEL)),
    ]
    left = quad((LEFT, -2.6, top), (LEFT, WALL, top), (LEFT, -2.6, FLOOR), u=(0, 1.3), v=(0, 1.2))
    right = quad((RIGHT, WALL, top), (RIGHT, -2.6, top), (RIGHT, WALL, FLOOR))
    skirting = [
        box((LEFT, WALL - 0.018, FLOOR), (RIGHT, WALL, FLOOR + 0.11)),
        box((LEFT, -2.6, FLOOR), (LEFT + 0.018, WALL, FLOOR + 0.11)),
        box((RIGHT - 0.018, -2.6, FLOOR), (RIGHT, WALL, FLOOR + 0.11)),
    ]
    carpet = quad(
        (-1.0, 0.2, FLOOR + 0.006), (1.0, 0.2, FLOOR + 0.006), (-1.0, -1.3, FLOOR + 0.006)
    )
    planks = textures.wood("floor", 1600, 1600, 14, (172, 128, 88), (120, 80, 50), 3)
    return [
        Part("floor", floor, Material(texture=planks, finish="glazed", roughness=0.45)),
        Part(
            "window wall", join(*back), Material(texture=textures.plaster("sage", (186, 196, 172)))
        ),
        Part("left wall", left, Material(texture=textures.wallpaper())),
        Part("right wall", right, Material(texture=textures.plaster("cream", (222, 212, 190)))),
        Part("skirting", join(*skirting), WHITE),
        Part("carpet", carpet, Material(texture=textures.rug())),
    ]


def window() -> list[Part]:
    """Frame with one post and one bar, reveal, sill board with tiles, catch, curtain on a rod."""
    out = WALL + 0.16
    reveal = [
        quad((OPEN_LEFT, WALL, LINTEL), (OPEN_LEFT, out, LINTEL), (OPEN_LEFT, WALL, SILL)),
        quad((OPEN_RIGHT, out, LINTEL), (OPEN_RIGHT, WALL, LINTEL), (OPEN_RIGHT, out, SILL)),
        quad((OPEN_LEFT, WALL, LINTEL), (OPEN_RIGHT, WALL, LINTEL), (OPEN_LEFT, out, LINTEL)),
    ]
    f, y0, y1 = 0.045, out - 0.05, out
    middle = (OPEN_LEFT + OPEN_RIGHT) / 2
    bars = [
        box((OPEN_LEFT, y0, SILL), (OPEN_LEFT + f, y1, LINTEL)),
        box((OPEN_RIGHT - f, y0, SILL), (OPEN_RIGHT, y1, LINTEL)),
        box((OPEN_LEFT, y0, SILL), (OPEN_RIGHT, y1, SILL + f)),
        box((OPEN_LEFT, y0, LINTEL - f), (OPEN_RIGHT, y1, LINTEL)),
        box((middle - 0.022, y0, SILL), (middle + 0.022, y1, LINTEL)),
        box((OPEN_LEFT, y0 + 0.01, 0.66), (OPEN_RIGHT, y1 - 0.01, 0.69)),
    ]
    casing = [
        box((OPEN_LEFT - 0.07, WALL - 0.02, SILL - 0.02), (OPEN_LEFT, WALL, LINTEL + 0.07)),
        box((OPEN_RIGHT, WALL - 0.02, SILL - 0.02), (OPEN_RIGHT + 0.07, WALL, LINTEL + 0.07)),
        box((OPEN_LEFT, WALL - 0.02, LINTEL), (OPEN_RIGHT, WALL, LINTEL + 0.07)),
        box((OPEN_LEFT - 0.10, WALL - 0.045, SILL - 0.05), (OPEN_RIGHT + 0.10, WALL, SILL - 0.02)),
    ]
    board = box_faces((OPEN_LEFT, WALL - 0.045, SILL - 0.03), (OPEN_RIGHT, out, SILL))
    catch = box((middle - 0.008, y0 - 0.03, 0.52), (middle + 0.008, y0, 0.58))
    sill_tiles = Material(texture=textures.tiles(256, 1536, 2), finish="glazed", roughness=0.18)
    return [
        Part("window reveal", join(*reveal), WHITE),
        Part("window frame", join(*bars, *casing), WHITE),
        Part("sill front", join(board["front"], board["left"], board["right"]), WHITE),
        Part("sill", board["top"], sill_tiles),
        Part("catch", catch, BRASS),
        *curtain(-0.95, -0.42),
        *curtain(0.84, 1.12),
        Part("rod", tube(np.array([(-1.1, 0.53, 1.45), (1.25, 0.53, 1.45)]), 0.011, 16), BRASS),
    ]


def curtain(x0, x1) -> list[Part]:
    """Printed linen in deep folds, from the rod to below the desk."""
    u = np.linspace(0, 1, 160)
    z = np.linspace(1.45, -0.42, 60)
    folds = max(4, round((x1 - x0) / 0.075))
    depth = 0.026 * (0.7 + 0.3 * np.sin(5 * u))
    sway = 0.012 * np.sin(z[:, None] * 3 + 5 * u[None])
    y = (
        0.53
        + depth * np.sin(2 * np.pi * folds * u)[None] * (0.75 + 0.25 * (1.45 - z[:, None]))
        + sway
    )
    x = x0 + (x1 - x0) * u + 0.010 * np.sin(4 * np.pi * folds * u + 1)
    points = np.stack([np.broadcast_to(x, y.shape), y, np.broadcast_to(z[:, None], y.shape)], -1)
    width = (x1 - x0) / 0.75  # the cloth is wider than the space it hangs in; one texture is 0.75 m
    cloth = Material(texture=textures.linen_print(), finish="thin", roughness=0.8)
    return [Part(f"curtain {x0}", grid(points, u=(0, width * 1.3), v=(0, 2.4)), cloth)]


def picture(name, image, corner, right, width, height) -> list[Part]:
    """A framed print on a wall. corner: top left; right: unit vector along its top edge, seen from the room."""
    corner, right = np.asarray(corner, float), np.asarray(right, float)
    out = np.cross(right, (0, 0, 1.0))
    down = np.array((0, 0, -1.0))
    at = lambda a, b, c=0.0: corner + a * right + b * down + c * out  # noqa: E731 - three names for one frame
    rim = 0.028
    bars = []
    for a0, b0, a1, b1 in (
        (-rim, -rim, width + rim, 0),
        (-rim, height, width + rim, height + rim),
        (-rim, 0, 0, height),
        (width, 0, width + rim, height),
    ):
        ends = np.stack([at(a0, b0, 0.0), at(a1, b1, 0.03)])
        bars.append(box(ends.min(0), ends.max(0)))
    wood = Material(
        texture=textures.wood(f"frame {name}", 64, 512, 1, (150, 104, 62), (92, 58, 30), 0)
    )
    sheet = quad(at(0, 0, 0.012), at(width, 0, 0.012), at(0, height, 0.012))
    return [
        Part(f"{name} frame", join(*bars), wood),
        Part(f"{name} print", sheet, Material(texture=image)),
    ]


def shelf() -> list[Part]:
    """Two boards with books, on the right wall."""
    rng = np.random.default_rng(11)
    wood = Material(texture=textures.wood("shelf", 256, 1024, 1, (196, 150, 100), (140, 94, 56), 0))
    parts, boards = [], []
    titles = [
        "NORTH",
        "BREAD",
        "STARS",
        "RIVERS",
        "GLASS",
        "BIRDS",
        "MOSS",
        "PAPER",
        "LIGHT",
        "CLAY",
        "WIND",
        "IRON",
    ]
    for z in (0.22, 0.60):
        boards.append(box((RIGHT - 0.20, -0.75, z - 0.022), (RIGHT, 0.50, z)))
        y = 0.46
        while y > -0.68:
            thick, tall, deep = (
                rng.uniform(0.022, 0.052),
                rng.uniform(0.19, 0.28),
                rng.uniform(0.13, 0.17),
            )
            if rng.random() < 0.08:
                y -= 0.09
                continue
            ground = np.float32([(150, 52, 44), (40, 72, 104), (58, 98, 72), (206, 178, 120), (90, 60, 84), (222, 214, 196), (60, 60, 64)])[rng.integers(7)]  # fmt: skip
            ground = tuple(int(c) for c in ground * rng.uniform(0.85, 1.1))
            ink = (240, 226, 190) if sum(ground) < 420 else (60, 44, 40)
            title = titles[rng.integers(len(titles))]
            upright = np.ascontiguousarray(
                np.rot90(prints.book_spine(title, ground, ink, 96, 480), -1)
            )
            spine = Material(texture=upright, finish="glazed", roughness=0.4)
            x = RIGHT - deep
            parts.append(
                Part(
                    f"shelf book {y:.3f} {z}",
                    quad((x, y, z), (x, y, z + tall), (x, y - thick, z)),
                    spine,
                )
            )
            plain = Material(tuple((np.float32(ground) / 255) ** 2.2))
            sides = box_faces((x, y - thick, z), (RIGHT - 0.01, y, z + tall))
            parts.append(
                Part(
                    f"shelf sides {y:.3f} {z}",
                    join(sides["front"], sides["back"], sides["top"]),
                    plain,
                )
            )
            y -= thick + 0.002
    return [Part("shelf", join(*boards), wood), *parts]


def garden() -> list[Part]:
    """Lawn with a path, hedge, fence, a tree, flowers and two shrubs: the far part of the scene."""
    lawn = textures.foliage("lawn", (176, 200, 104), (104, 138, 60), 6000, 7)
    rng = np.random.default_rng(5)
    x = np.linspace(-9, 9, 160)
    z = np.linspace(0.75, plants.GROUND, 40)
    bumps = textures.fractal_noise(rng, 40, 160, (5, 20), 3, 0.7)
    hedge = np.stack(
        [
            np.broadcast_to(x, (40, 160)),
            7.2 - 0.9 * bumps,
            np.broadcast_to(z[:, None], (40, 160)) + 0.25 * bumps,
        ],
        -1,
    )
    planks = []
    for k in range(80):
        left = -10 + 0.26 * k
        planks.append(box((left, 8.6, FLOOR), (left + 0.235, 8.63, 1.35 + 0.03 * np.sin(9 * k))))
    path = quad((0.4, 7.0, FLOOR - 0.295), (1.3, 7.0, FLOOR - 0.295), (-0.6, 0.8, FLOOR - 0.295))
    parts = [
        Part(
            "lawn",
            quad(
                (-9, 9, plants.GROUND),
                (9, 9, plants.GROUND),
                (-9, 0.8, plants.GROUND),
                u=(0, 3),
                v=(0, 1.5),
            ),
            Material(texture=lawn),
        ),
        Part(
            "path",
            path,
            Material(
                texture=textures.wood("path", 512, 512, 12, (196, 188, 170), (140, 132, 118), 6)
            ),
        ),
        Part(
            "hedge",
            grid(hedge, u=(0, 5)),
            Material(
                texture=textures.foliage(
                    "hedge", (186, 212, 110), (52, 84, 38), 5000, 11, 512, 1024
                )
            ),
        ),
        Part(
            "fence",
            join(*planks),
            Material(
                texture=textures.wood("fence", 512, 128, 1, (206, 214, 212), (150, 164, 168), 0)
            ),
        ),
        *plants.tree((-1.7, 4.6), 1.9, 900, rng, "tree", (150, 178, 72), (58, 98, 36)),
        *plants.tree((2.3, 5.6), 1.5, 700, rng, "plum", (176, 92, 84), (92, 40, 50)),
        *plants.shrub((0.35, 2.6), 0.42, 420, rng, "shrub", (166, 190, 96), (64, 110, 50)),
        *plants.shrub((1.9, 3.2), 0.55, 480, rng, "lavender", (150, 128, 190), (92, 110, 84)),
        *plants.shrub((-0.75, 3.3), 0.40, 380, rng, "roses", (226, 132, 120), (76, 112, 56)),
    ]
    return parts


def room_things() -> list[Part]:
    """Everything that is not on the desk."""
    herbs = plants.plant(
        "herb",
        (0.30, 0.68, SILL),
        0.045,
        9,
        0.11,
        0.026,
        0.07,
        8,
        textures.leaf("herb", (150, 190, 90), (66, 118, 56)),
    )
    pictures = [
        *picture("landscape", prints.landscape_print(), (LEFT, -0.75, 0.98), (0, 1, 0), 0.66, 0.47),
        *picture("botanical", prints.botanical_print(), (LEFT, 0.08, 1.02), (0, 1, 0), 0.36, 0.51),
        *picture("tides", prints.book_cover("TIDES", "M. Okafor", (36, 62, 104), (228, 222, 204), "waves"), (1.28, WALL, 0.86), (1, 0, 0), 0.30, 0.43),
    ]  # fmt: skip
    return [*shell(), *window(), *pictures, *shelf(), *garden(), *herbs]

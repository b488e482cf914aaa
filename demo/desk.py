"""The desk and what is for reading and writing on it. The desk top is z = 0, its middle the origin; the window is towards +y."""

import crockery
import numpy as np
import plants
import prints
import textures
from parts import BLACK, BRASS, Material, Part
from shapes import ball, box, box_faces, curve, grid, join, lathe, ring, rotation, tube

PAPER_EDGES = Material(texture=prints.page_edges())


def desk() -> list[Part]:
    """Top of five boards, an apron with two drawers, four turned legs."""
    wood = Material(
        texture=textures.wood("desk", 1024, 1536, 5), finish="glazed", roughness=0.6, specular=0.25
    )
    side = Material(
        texture=textures.wood("desk side", 256, 1024, 1, (168, 120, 76), (104, 64, 34), 0)
    )
    top = box_faces((-0.85, -0.42, -0.035), (0.85, 0.42, 0.0))
    drawers = [box((x - 0.33, -0.385, -0.145), (x + 0.33, -0.375, -0.045)) for x in (-0.38, 0.38)]
    knobs = [ball(0.016, rows=12, segments=16).moved((x, -0.398, -0.095)) for x in (-0.38, 0.38)]
    leg = lathe(
        curve(
            [
                (0.03, -0.03),
                (0.03, -0.16),
                (0.018, -0.19),
                (0.026, -0.24),
                (0.022, -0.5),
                (0.014, -0.73),
            ],
            40,
        ),
        24,
    )
    legs = [leg.moved((x, y, 0)) for x in (-0.78, 0.78) for y in (-0.35, 0.35)]
    return [
        Part("desk top", top["top"], wood),
        Part(
            "desk edge", join(*(top[k] for k in ("left", "right", "front", "back", "bottom"))), side
        ),
        Part("desk apron", join(box((-0.79, -0.376, -0.155), (0.79, 0.38, -0.035)), *legs), side),
        Part("drawers", join(*drawers), side),
        Part("knobs", join(*knobs), BRASS),
    ]


def cloth() -> list[Part]:
    """A checked cloth that lies on the desk with soft folds and hangs over its front edge."""
    s = np.linspace(0, 0.62, 120)  # arc length from the back hem
    x = np.linspace(-0.24, 0.24, 90)
    flat = 0.40  # this much lies on the desk
    lip = 0.012
    past = np.clip(s - flat, 0, None)
    bend = np.clip(past / lip, 0, np.pi / 2)
    y = -0.025 - np.minimum(s, flat) - lip * np.sin(bend)
    z = 0.003 - lip * (1 - np.cos(bend)) - np.clip(past - lip * np.pi / 2, 0, None)
    hang = np.clip((past - 0.02) / 0.15, 0, 1)[:, None]
    wave = 0.010 * np.sin(x[None] * 38 + 0.6) + 0.006 * np.sin(x[None] * 71 + 2.0)
    fold = 0.0022 * (1 + np.sin(x[None] * 23 + s[:, None] * 17)) * np.clip(1 - hang * 4, 0, 1)
    points = np.stack(
        [
            np.broadcast_to(x, (120, 90)) * (1 - 0.05 * hang),
            np.broadcast_to(y[:, None], (120, 90)) - hang * (0.012 + wave),
            np.broadcast_to(z[:, None], (120, 90)) + fold,
        ],
        -1,
    )
    mesh = grid(points, v=(0.0, 1.0)).moved((0.30, 0.0, 0.0))
    return [Part("cloth", mesh, Material(texture=textures.gingham(1280, 1000, 14)))]


def books() -> list[Part]:
    """A pile of four; each has a cover, a spine and edges of paper."""
    volumes = [
        (
            "THE SLOW GARDEN",
            "A. Lindqvist",
            (40, 84, 66),
            (236, 214, 160),
            "leaf",
            0.036,
            14,
            (0.0, 0.0),
        ),
        (
            "TIDES AND SALT",
            "M. Okafor",
            (36, 62, 104),
            (228, 222, 204),
            "waves",
            0.028,
            22,
            (0.008, 0.004),
        ),
        (
            "A ROOM IN THE SUN",
            "J. Almeida",
            (166, 58, 44),
            (246, 226, 184),
            "sun",
            0.032,
            6,
            (-0.006, 0.006),
        ),
        (
            "SMALL PATTERNS",
            "R. Tanaka",
            (222, 206, 170),
            (60, 64, 92),
            "grid",
            0.022,
            27,
            (0.004, -0.004),
        ),
    ]
    parts = []
    z = 0.0
    for k, (title, author, ground, ink, motif, thick, yaw, shift) in enumerate(volumes):
        w, d = 0.118 - 0.006 * k, 0.165 - 0.009 * k
        board = 0.0028
        cover = Material(
            texture=prints.book_cover(title, author, ground, ink, motif),
            finish="glazed",
            roughness=0.38,
        )
        spine = Material(
            texture=prints.book_spine(title, ground, ink), finish="glazed", roughness=0.38
        )
        plain = Material(tuple((np.float32(ground) / 255) ** 2.2), finish="glazed", roughness=0.38)
        boards = [box((-w, -d, z0), (w, d, z0 + board)) for z0 in (0.0, thick - board)]
        pages = box((-w + 0.004, -d + 0.005, board), (w - 0.006, d - 0.005, thick - board))
        faces = box_faces((-w - 0.0004, -d, 0), (w, d, thick + 0.0004))
        volume = [
            Part(f"book {k} boards", join(*boards), plain),
            Part(f"book {k} cover", faces["top"], cover),
            # Turned by 90 degrees below: the spine faces the room.
            Part(f"book {k} spine", faces["left"], spine),
            Part(f"book {k} pages", pages, PAPER_EDGES),
        ]
        place = (-0.47 + shift[0], 0.10 + shift[1], z)
        parts += [Part(p.name, p.mesh.moved(place, yaw + 90), p.material) for p in volume]
        z += thick + 0.0005
    pear_profile = curve(
        [
            (0.001, 0.098),
            (0.012, 0.095),
            (0.020, 0.075),
            (0.034, 0.042),
            (0.030, 0.012),
            (0.004, 0.002),
        ],
        40,
    )
    green = Material(
        texture=textures.citrus("pear", (190, 188, 76), (146, 140, 44)),
        finish="glazed",
        roughness=0.35,
    )
    parts.append(Part("pear", lathe(pear_profile, 48).moved((-0.43, 0.08, z), 0, 6, 5), green))
    stalk = tube(curve([(0, 0, 0.095), (0.002, 0, 0.107), (0.008, 0, 0.117)], 8), 0.0018, 8)
    parts.append(
        Part("pear stalk", stalk.moved((-0.43, 0.08, z), 0, 6, 5), Material((0.10, 0.055, 0.025)))
    )
    return parts


def notebook() -> list[Part]:
    """Open at a page of writing and a sketch, with a pencil across."""
    parts = []
    edge = np.array((0.0, 0.092, 0.0))
    for side, sign in (("left", -1), ("right", 1)):
        s = np.linspace(0, 1, 24)
        height = 0.004 + 0.010 * np.sin(np.pi * np.clip(s * 0.9, 0, 1)) * (1 - s) ** 0.4
        x = sign * s * 0.135
        order = slice(None, None, sign)  # u runs from the left edge of each page
        row = np.stack([x, np.zeros_like(x), height], -1)[order]
        page = grid(np.stack([row + edge, row - edge]))
        parts.append(Part(f"page {side}", page, Material(texture=prints.notebook_page(side))))
    parts.append(
        Part(
            "notebook cover",
            box((-0.138, -0.095, 0.0), (0.138, 0.095, 0.003)),
            Material((0.10, 0.02, 0.02)),
        )
    )
    parts = [Part(p.name, p.mesh.moved((-0.20, -0.225, 0.0), -9), p.material) for p in parts]
    return parts + pencil("pencil", (-0.41, -0.15, 0.004), (0.62, 0.09, 0.03), yaw=5, pitch=90)


def pencil(name, place, colour, yaw=0.0, pitch=0.0, length=0.165) -> list[Part]:
    """Six sides, sharpened; stands upright unless it is pitched."""
    body = lathe([(0.0037, length * 0.86), (0.0037, 0.0)], 6)
    tip = lathe([(0.0008, length), (0.0037, length * 0.86)], 24)
    lead = lathe([(0.0, length * 1.004), (0.0013, length * 0.978)], 12)
    parts = [
        Part(name, body, Material(colour, finish="glazed")),
        Part(f"{name} wood", tip, Material((0.66, 0.44, 0.25))),
        Part(f"{name} lead", lead, Material((0.05, 0.05, 0.06))),
    ]
    return [Part(p.name, p.mesh.moved(place, yaw, pitch), p.material) for p in parts]


def pencil_tin() -> list[Part]:
    """A ribbed tin with pencils and a ruler."""
    z = np.linspace(0.10, 0.0, 60)
    outside = np.stack([0.036 + 0.0008 * np.cos(z * 2 * np.pi / 0.011), z], -1)
    tin = Material((0.75, 0.74, 0.72), finish="metal", roughness=0.22)
    place = np.array((-0.205, 0.215, 0.0))
    parts = [Part("tin", join(lathe(outside, 64), ring(0.036, 0.100, 0.0016)).moved(place), tin)]
    parts.append(
        Part(
            "tin bottom",
            lathe([(0.0, 0.003), (0.0355, 0.003)], 32).moved(place),
            Material((0.08, 0.08, 0.08)),
        )
    )
    leans = [(12, 0, (0.75, 0.12, 0.08)), (-13, 8, (0.08, 0.22, 0.46)), (9, -14, (0.70, 0.46, 0.05)), (-7, -11, (0.09, 0.30, 0.16)), (3, 15, (0.03, 0.03, 0.04))]  # fmt: skip
    for k, (pitch, roll, colour) in enumerate(leans):
        lean = rotation("y", roll) @ rotation("x", pitch) @ (0, 0, 0.04)
        foot = place - (lean[0], lean[1], -0.004)
        for part in pencil(f"tin pencil {k}", (0, 0, 0), colour, length=0.160 + 0.006 * k):
            parts.append(Part(part.name, part.mesh.moved(foot, 0, pitch, roll), part.material))
    return parts


def lamp() -> list[Part]:
    """A reading lamp: round foot, two thin double arms, a conical shade with a warm bulb."""
    foot = lathe([(0.0, 0.026), (0.070, 0.024), (0.080, 0.016), (0.082, 0.0)], 64).moved(
        (-0.66, 0.25, 0.0)
    )
    elbow = np.array((-0.72, 0.20, 0.34))
    head = np.array((-0.38, 0.06, 0.43))
    bars = []
    for start, stop in ((np.array((-0.66, 0.25, 0.02)), elbow), (elbow, head)):
        along = (stop - start) / np.linalg.norm(stop - start)
        aside = np.cross(along, (0.38, 0.92, 0.0))
        aside = 0.011 * aside / np.linalg.norm(aside)
        bars += [tube(np.stack([start + s * aside, stop + s * aside]), 0.0038, 12) for s in (-1, 1)]
    joints = [ball(0.017, rows=16, segments=24).moved(p) for p in (elbow, head)]
    shade = lathe(
        curve(
            [(0.020, 0.055), (0.028, 0.050), (0.050, 0.020), (0.078, -0.030), (0.088, -0.050)], 32
        ),
        64,
    )
    rim = join(ring(0.088, -0.050, 0.0022), lathe([(0.0, 0.058), (0.020, 0.055)], 32))
    tilt = dict(translation=head + np.array((0.035, -0.02, -0.020)), pitch=14, roll=-16)
    bulb = ball(0.024, rows=20, segments=28).moved((0, 0, -0.012)).moved(**tilt)
    red = Material((0.52, 0.055, 0.035), finish="glazed", roughness=0.2)
    return [
        Part("lamp foot", foot, BLACK),
        Part("lamp arms", join(*bars), BRASS),
        Part("lamp joints", join(*joints), BLACK),
        Part("lamp shade", shade.moved(**tilt), red),
        Part("lamp rim", rim.moved(**tilt), BRASS),
        Part("lamp bulb", bulb, Material((46.0, 29.0, 14.0), finish="glow")),
    ]


def desk_things() -> list[Part]:
    """Everything on the desk and the desk."""
    fig = plants.plant("plant", (0.54, 0.20, 0.0), 0.072, 11, 0.30, 0.050, 0.20, 3, textures.leaf())
    return [
        *desk(),
        *cloth(),
        *crockery.fruit_basket(),
        *crockery.mug(),
        *crockery.teapot(),
        *books(),
        *notebook(),
        *pencil_tin(),
        *crockery.tea_tin(),
        *lamp(),
        *fig,
    ]

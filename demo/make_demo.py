"""Make the demo scene: photographs by path tracing, then cameras and points by structure from motion.

Reads nothing. Writes OUT/images/IMG_0001.jpg ... and OUT/sparse/0/{cameras,images,points3D,...}.bin.

Not part of the product's runtime: the photographs are in the repository. To make them again (demo/README.md has the versions):

    python demo/make_demo.py --out demo/study                           # everything
    python demo/make_demo.py --out /tmp/draft --spp 16 --scale 0.5 --views 1,12,24 --skip-sfm   # a look at a change
"""

import argparse
import tempfile
import time
from pathlib import Path

import cv2
import desk
import numpy as np
import room
import textures
from parts import Material
from shapes import Mesh, rotation

WIDTH, HEIGHT = 640, 427
FOCAL = 560.0  # pixels: a 32 mm lens on a full-frame camera
NUM_VIEWS = 24
SWEEP_DEGREES = 100.0
TARGET = np.array((0.02, 0.06, 0.10))  # metres, above the middle of the desk
SUN = np.array((0.42, 0.74, 0.52))  # direction to the sun: high in the window, from the right
EXPOSURE = 0.78
JPEG_QUALITY = 90


# cameras ---------------------------------------------------------------------------------------------------------


def intrinsics(scale: float = 1.0) -> np.ndarray:
    """Pinhole with the principal point in the middle. [3, 3] pixels"""
    return np.array(
        [[FOCAL * scale, 0, WIDTH * scale / 2], [0, FOCAL * scale, HEIGHT * scale / 2], [0, 0, 1]]
    )


def camera_path(num_views: int = NUM_VIEWS) -> np.ndarray:
    """A walk half round the desk, camera in hand: high and low, nearer and farther, never quite level.

    Returns world -> camera, OpenCV axes. [num_views, 4, 4]
    """
    rng = np.random.default_rng(24)
    viewmats = []
    for k in range(num_views):
        t = k / (num_views - 1)
        azimuth = np.radians(SWEEP_DEGREES * (t - 0.5) + rng.uniform(-1.0, 1.0))
        radius = 1.30 + 0.10 * np.sin(2 * np.pi * 1.5 * t + 0.4) + rng.uniform(-0.03, 0.03)
        height = 0.50 + 0.17 * np.sin(2 * np.pi * 2.5 * t + 2.2) + rng.uniform(-0.02, 0.02)
        center = np.array((radius * np.sin(azimuth), -radius * np.cos(azimuth), height))
        target = TARGET + rng.uniform(-0.03, 0.03, 3)
        viewmats.append(look_at(center, target, rng.uniform(-2.0, 2.0)))
    return np.stack(viewmats)


def look_at(center, target, roll_degrees=0.0) -> np.ndarray:
    """World -> camera, OpenCV axes (x right, y down, z forward). [4, 4]"""
    forward = (target - center) / np.linalg.norm(target - center)
    right = np.cross(forward, (0, 0, 1.0))
    right /= np.linalg.norm(right)
    turn = rotation("z", roll_degrees) @ np.stack([right, np.cross(forward, right), forward])
    viewmat = np.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = turn, -turn @ center
    return viewmat


# rendering -------------------------------------------------------------------------------------------------------


def write_mesh(path: Path, mesh: Mesh) -> None:
    """Binary PLY in the layout that Mitsuba reads."""
    columns = ("x", "y", "z", "nx", "ny", "nz", "u", "v")
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(mesh.vertices)}"]
    header += [f"property float {c}" for c in columns]
    header += [
        f"element face {len(mesh.faces)}",
        "property list uchar int vertex_indices",
        "end_header\n",
    ]
    faces = np.empty(len(mesh.faces), dtype=[("n", "u1"), ("index", "<i4", 3)])
    faces["n"], faces["index"] = 3, mesh.faces
    table = np.concatenate([mesh.vertices, mesh.normals, mesh.uvs], 1).astype("<f4")
    path.write_bytes("\n".join(header).encode() + table.tobytes() + faces.tobytes())


def bsdf(mi, material: Material) -> dict:
    """Mitsuba's description of a material."""
    if material.finish == "glow":
        return {"type": "diffuse"}
    if material.texture is not None:
        colour = {
            "type": "bitmap",
            "bitmap": mi.Bitmap(np.ascontiguousarray(material.texture)),
            "wrap_mode": "mirror",
        }
    else:
        colour = {"type": "rgb", "value": list(map(float, material.colour))}
    if material.finish == "glazed":
        inner = {
            "type": "principled",
            "base_color": colour,
            "roughness": material.roughness,
            "specular": material.specular,
        }
    elif material.finish == "metal":
        inner = {
            "type": "principled",
            "base_color": colour,
            "roughness": material.roughness,
            "metallic": 1.0,
        }
    elif material.finish == "thin":
        return {"type": "principledthin", "base_color": colour, "roughness": material.roughness, "diff_trans": 0.7, "spec_trans": 0.0, "eta": 1.3}  # fmt: skip
    else:
        inner = {"type": "diffuse", "reflectance": colour}
    return {"type": "twosided", "bsdf": inner}


def build_scene(mi, folder: Path):
    """The Mitsuba scene: every part, and one environment with sky, room light and sun."""
    sky = textures.sky(512, 1024, SUN, sun_radiance=5200.0)
    turn = mi.ScalarTransform4f().rotate([1, 0, 0], 90)
    scene = {
        "type": "scene",
        "integrator": {
            "type": "aov",
            "aovs": "albedo:albedo,normal:sh_normal",
            "path": {"type": "path", "max_depth": 7, "rr_depth": 4},
        },
        "sky": {"type": "envmap", "bitmap": mi.Bitmap(sky), "to_world": turn},
    }
    for index, part in enumerate([*desk.desk_things(), *room.room_things()]):
        path = folder / f"{index:03d}.ply"
        write_mesh(path, part.mesh)
        shape = {
            "type": "ply",
            "filename": str(path),
            "flip_tex_coords": False,
            "bsdf": bsdf(mi, part.material),
        }
        if part.material.finish == "glow":
            shape["emitter"] = {
                "type": "area",
                "radiance": {"type": "rgb", "value": list(part.material.colour)},
            }
        scene[f"part{index:03d}"] = shape
    return mi.load_dict(scene)


def sensor(mi, viewmat: np.ndarray, scale: float) -> dict:
    """Mitsuba's camera for a world -> camera matrix (Mitsuba's own camera looks along +z with x to the left)."""
    width, height = round(WIDTH * scale), round(HEIGHT * scale)
    to_world = np.linalg.inv(viewmat) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    return {
        "type": "perspective",
        "fov_axis": "x",
        "fov": float(2 * np.degrees(np.arctan(WIDTH / 2 / FOCAL))),
        "near_clip": 0.05,
        "far_clip": 100.0,
        "to_world": mi.ScalarTransform4f(to_world),
        "film": {
            "type": "hdrfilm",
            "width": width,
            "height": height,
            "rfilter": {"type": "box"},
            "pixel_format": "rgb",
        },
        "sampler": {"type": "independent"},
    }


def develop(linear: np.ndarray, rng) -> np.ndarray:
    """Exposure, a film curve (the ACES fit of Narkowicz 2015), sRGB, and a little sensor noise. uint8 [H, W, 3]"""
    x = linear * EXPOSURE
    x = np.clip(x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14), 0, 1)
    srgb = np.where(x <= 0.0031308, 12.92 * x, 1.055 * np.maximum(x, 1e-8) ** (1 / 2.4) - 0.055)
    noise = rng.normal(0, 0.006, srgb.shape)
    return np.clip(np.round((srgb + noise) * 255), 0, 255).astype(np.uint8)


def render_photos(image_dir: Path, spp: int, scale: float, views: list[int]) -> None:
    """Render the chosen views (numbers from 1) and write them as JPEG."""
    import mitsuba as mi
    import pyoidn

    mi.set_variant("llvm_ad_rgb")
    image_dir.mkdir(parents=True, exist_ok=True)
    viewmats = camera_path()
    with tempfile.TemporaryDirectory() as folder:
        scene = build_scene(mi, Path(folder))
        for view in views:
            start = time.perf_counter()
            camera = mi.load_dict(sensor(mi, viewmats[view - 1], scale))
            layers = np.array(mi.render(scene, sensor=camera, spp=spp, seed=view), np.float32)
            rgb, albedo, normal = (np.ascontiguousarray(layers[..., k : k + 3]) for k in (0, 3, 6))
            clean = pyoidn.denoise(rgb, albedo=np.clip(albedo, 0, 1), normal=normal, hdr=True)
            photo = develop(clean, np.random.default_rng(view))
            path = image_dir / f"IMG_{view:04d}.jpg"
            cv2.imwrite(str(path), photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            print(
                f"{path} {time.perf_counter() - start:.1f} s {path.stat().st_size / 1000:.0f} kB",
                flush=True,
            )


# structure from motion -------------------------------------------------------------------------------------------


def run_sfm(scene_dir: Path) -> None:
    """Cameras and points from the JPEG files alone, as a user would: SIFT, exhaustive matching, incremental mapping."""
    import pycolmap

    pycolmap.set_random_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "database.db"
        extraction = pycolmap.FeatureExtractionOptions(num_threads=1, use_gpu=False)
        pycolmap.extract_features(
            database,
            scene_dir / "images",
            camera_mode=pycolmap.CameraMode.SINGLE,
            reader_options=pycolmap.ImageReaderOptions(camera_model="PINHOLE"),
            extraction_options=extraction,
        )
        matching = pycolmap.FeatureMatchingOptions(num_threads=1, use_gpu=False)
        pycolmap.match_exhaustive(database, matching_options=matching)
        options = pycolmap.IncrementalPipelineOptions(
            num_threads=1, random_seed=0, multiple_models=False
        )
        models = pycolmap.incremental_mapping(
            database, scene_dir / "images", Path(folder), options=options
        )
        model = max(models.values(), key=lambda m: m.num_reg_images())
        sparse = scene_dir / "sparse" / "0"
        sparse.mkdir(parents=True, exist_ok=True)
        model.write(str(sparse))


def camera_errors(model) -> dict[str, np.ndarray]:
    """Cameras of a pycolmap reconstruction against the true ones, after the best similarity transform of the centres.

    Returns rotation_degrees [V] and center_percent [V], of the rig's radius, in name order.
    """
    truth = camera_path()
    images = sorted(model.images.values(), key=lambda image: image.name)
    true = np.stack([truth[int(image.name[4:8]) - 1] for image in images])
    found = np.stack([image.cam_from_world().matrix() for image in images])
    true_centers, centers = (
        -np.einsum("nij,ni->nj", m[:, :3, :3], m[:, :3, 3]) for m in (true, found)
    )
    scale, turn, shift = similarity(centers, true_centers)
    radius = np.linalg.norm(true_centers - true_centers.mean(0), axis=1).max()
    error = np.linalg.norm(scale * centers @ turn.T + shift - true_centers, axis=1)
    between = found[:, :3, :3] @ turn.T @ true[:, :3, :3].transpose(0, 2, 1)
    cosine = (np.trace(between, axis1=1, axis2=2) - 1) / 2
    return {
        "rotation_degrees": np.degrees(np.arccos(np.clip(cosine, -1, 1))),
        "center_percent": 100 * error / radius,
    }


def compare_with_truth(scene_dir: Path) -> str:
    """The figures of demo/README.md."""
    import pycolmap

    model = pycolmap.Reconstruction(str(scene_dir / "sparse" / "0"))
    errors = camera_errors(model)
    camera = next(iter(model.cameras.values()))
    lines = [
        f"views: {model.num_reg_images()} of {NUM_VIEWS}; points: {model.num_points3D()}",
        f"reprojection error: {model.compute_mean_reprojection_error():.3f} px",
        f"camera: {camera.model.name} {np.round(camera.params, 2).tolist()}, true focal length {FOCAL}",
    ]
    lines += [f"{name}: mean {e.mean():.3f}, max {e.max():.3f}" for name, e in errors.items()]
    return "\n".join(lines)


def similarity(source: np.ndarray, target: np.ndarray):
    """Scale, rotation and shift that take source [P, 3] closest to target [P, 3] (Umeyama 1991)."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a)
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    turn = u @ sign @ vt
    scale = (s * np.diag(sign)).sum() / (a**2).sum()
    return scale, turn, target.mean(0) - scale * turn @ source.mean(0)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "study")
    parser.add_argument("--spp", type=int, default=24, help="paths per pixel")
    parser.add_argument("--scale", type=float, default=1.0, help="of the image size, for drafts")
    parser.add_argument("--views", default="", help="numbers from 1, with commas; default: all")
    parser.add_argument("--skip-render", action="store_true")
    parser.add_argument("--skip-sfm", action="store_true")
    args = parser.parse_args(argv)
    views = [int(v) for v in args.views.split(",") if v] or list(range(1, NUM_VIEWS + 1))
    if not args.skip_render:
        render_photos(args.out / "images", args.spp, args.scale, views)
    if not args.skip_sfm:
        run_sfm(args.out)
        print(compare_with_truth(args.out))


if __name__ == "__main__":
    main()

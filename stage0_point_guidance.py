"""Stage 0: a coloured point cloud from the kept photos, and its pictures at every novel camera: point guidance and coverage.

Reads   SCENE (-s) a COLMAP scene (images/, sparse/0), a transforms.json, or a folder of photos; of the photos, the kept ones alone
Writes  OUT/stage0/ split.json, novel_cameras.json, points.ply, surface.npz (the points with their patches of surface), scene.glb,
        cameras.png (kept and novel cameras over the points, from above), scene/ (where SCENE had no cameras, or had to be undistorted, resized or turned), poses.json (where it had no cameras)
        guidance/<name>.png, coverage/<name>.png for every novel camera; depth/<name>.npz (depth, confidence) for every kept view

Example
    python stage0_point_guidance.py -s data/fern -m out/fern --keep-count 3 --eval
    python stage0_point_guidance.py -s photos/ -m out/mine               # no cameras: they are found from the photos
    python stage0_point_guidance.py -s data/hall -m out/hall --provider points --points-path hall.laz
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from s2d.cameras import Cameras
from s2d.config import no_effect, run_script
from s2d.depth_io import depth_path, write_depth
from s2d.files import atomic_write_json
from s2d.guidance.cloud import Reconstruction
from s2d.guidance.mvs import reconstruct
from s2d.guidance.points import load_points
from s2d.guidance.providers.filters import FilterSettings
from s2d.guidance.providers.load import PROVIDER_NAMES, load_provider
from s2d.guidance.providers.placement import reconstruct_with
from s2d.guidance.providers.unposed import place_by_model
from s2d.guidance.render import render_cloud
from s2d.guidance.scene_glb import write_scene_glb
from s2d.images import image_writer, write_image
from s2d.log import logger, progress
from s2d.model_folder import copy_results, render_name
from s2d.novel import NovelMode, draw_top_view, make_novel_cameras
from s2d.ply_io import write_points_ply
from s2d.poses.photos import Photo, find_photos, is_photo_folder, photo_root
from s2d.poses.place import Placement, place_photos, write_photo_scene
from s2d.scene import Scene, prepare_scene
from s2d.split import Split, make_split, read_split_file
from s2d.stage_io import Stage, open_stage
from s2d.transforms_io import find_transforms, read_transforms


@dataclass(frozen=True)
class Config:
    """Stage 0: a coloured point cloud from the kept photos, drawn at every novel camera."""

    source: Annotated[Path, arg(aliases=["-s", "--image-dir"])] = no_effect()
    """The scene: a COLMAP folder (images/, sparse/0), a folder with transforms.json, or a folder of photos without cameras."""
    model_dir: Annotated[Path | None, arg(aliases=["-m"])] = no_effect(None)
    """Output folder OUT, made if missing. Without it, the folder OUTPUT_DIR_model beside --output-dir."""
    keep_every: int | None = None
    """Keep every n-th photo as input."""
    keep_indices: tuple[int, ...] | None = None
    """Keep these photos: positions in name order, from 0, separated by commas."""
    keep_count: int | None = None
    """Keep so many photos, evenly spaced. With no --keep-… option: all of at most 12, else 6; of photos without cameras all."""
    eval: bool = False
    """Hold every 8th photo out as a test view (--test-every); keep views out of the rest."""
    test_every: int = 8
    """Distance between test views with --eval."""
    split_file: Path | None = no_effect(None)
    """JSON file with train_ids and test_ids, positions in name order or view names: keep and score those, instead of the flags above."""
    novel: NovelMode = "auto"
    """Where pseudo views will be made: the scene's other cameras (given), or generated ones: where they show most anew (coverage), or on a
    plain path. auto: given where there are any, else two thirds interpolate and one third orbit."""
    num_novel: int = 24
    """How many novel cameras to generate, where they are generated; coverage may do with fewer."""
    all_images: bool = False
    """Photos without cameras: find the cameras with the photos that are held out, too. The results are marked: they know the test views."""
    provider: Literal[
        "auto",
        "mvs",
        "points",
        "pi3",
        "pi3x",
        "vggt",
        "mapanything",
        "depth-anything-3",
        "monocular",
    ] = "auto"
    """Where the cloud comes from: multi-view stereo (mvs), a file (--points-path), or a visual geometry model (docs/providers.md). auto: pi3
    with --weight-path, points with --points-path, else mvs."""
    weight_path: Path | None = no_effect(None)
    """Weights of the model: a file (pi3, pi3x, vggt) or a folder. Without it: the hub's cache, or a download."""
    min_confidence: float = 0.1
    """Pixels that the model believes less are dropped, in [0, 1]; the best 30 % of a photo stay."""
    points_path: Path | None = no_effect(None)
    """A point cloud or mesh in the cameras' world frame, for --provider points: .ply, .las, .laz, .glb, .obj."""
    max_side: int = 640
    """Photos with a longer side are scaled down to this, for all stages, pixels. 0 keeps them as they are."""
    output_dir: Path | None = no_effect(None)
    """Also copy the guidance pictures here."""
    scene_path: Path | None = no_effect(None)
    """Also copy scene.glb here."""
    seed: int = 0
    """Seed of the stereo and of generated cameras."""
    device: str = no_effect("auto")
    """Where a visual geometry model runs (auto, cpu, cuda, cuda:N); all else runs on the CPU."""
    overwrite: bool = no_effect(False)
    """Rebuild a finished stage 0."""


def main(cfg: Config) -> Path:
    """Run stage 0; returns OUT/stage0."""
    cfg = completed(cfg)
    check_config(cfg)
    with open_stage(cfg.model_dir, "stage0", cfg, scene_inputs(cfg), cfg.overwrite) as stage:
        if not stage.up_to_date:
            with stage.timer("scene"):
                scene, split = read_scene(cfg, stage)
                kept = scene.subset(split.kept)
            with stage.timer(cfg.provider):
                found = make_cloud(cfg, kept)
            logger.info("stage0: %d points from %d photos", len(found.cloud), len(kept))
            given = scene.cameras.select(split.novel)
            novel = make_novel_cameras(
                cfg.novel,
                kept.cameras,
                given,
                num=cfg.num_novel,
                cloud=found.cloud,
                seed=cfg.seed,
            )
            with stage.timer("draw"):
                coverage = draw_guidance(found, novel, stage.dir)
            write_outputs(stage, scene, split, found, kept, novel)
            stage.info |= {"num_points": len(found.cloud), "mean_coverage": round(coverage, 4)}
    copy_results(stage.dir / "guidance", cfg.output_dir)
    copy_results(stage.dir / "scene.glb", cfg.scene_path)
    return cfg.model_dir / "stage0"


def completed(cfg: Config) -> Config:
    """The settings with "auto" decided and an output folder."""
    if cfg.model_dir is None and cfg.output_dir is None:
        raise ValueError("There is no output folder. Add -m OUT.")
    model_dir = cfg.model_dir or cfg.output_dir.with_name(f"{cfg.output_dir.name}_model")
    provider = cfg.provider
    if provider == "auto":
        provider = "pi3" if cfg.weight_path else "points" if cfg.points_path else "mvs"
    return replace(cfg, model_dir=model_dir, provider=provider)


def make_cloud(cfg: Config, kept: Scene) -> Reconstruction:
    """The cloud and the kept views' depth, from where --provider says."""
    if cfg.provider == "mvs":
        return reconstruct(kept, cfg.seed)
    if cfg.provider == "points":
        return load_points(cfg.points_path, kept, cfg.seed)
    model = load_provider(cfg.provider, cfg.weight_path, cfg.device)
    return reconstruct_with(model, kept, FilterSettings(min_confidence=cfg.min_confidence))


def place(
    cfg: Config, kept: Sequence[Photo], held_out: Sequence[Photo], scratch: Path
) -> Placement:
    """Cameras by structure from motion; where that finds none, by the provider, if it is one that can."""
    try:
        return place_photos(kept, held_out, scratch, cfg.seed)
    except ValueError as error:
        if cfg.provider not in PROVIDER_NAMES or cfg.provider == "monocular":
            raise
        logger.warning("stage0: %s Taking the cameras of --provider %s.", error, cfg.provider)
        model = load_provider(cfg.provider, cfg.weight_path, cfg.device)
        return place_by_model(model, kept, cfg.provider)


def check_config(cfg: Config) -> None:
    if cfg.weight_path is not None and cfg.provider not in PROVIDER_NAMES:
        raise ValueError(
            f"--weight-path is given, but the provider is {cfg.provider}. Add --provider pi3 (or another model)."
        )
    chosen = ("keep_every", "keep_indices", "keep_count", "eval")
    if cfg.split_file is not None and (given := [name for name in chosen if getattr(cfg, name)]):
        raise ValueError(
            f"--split-file says which views are kept and scored; --{given[0].replace('_', '-')} says it too. Leave one of them out."
        )
    if cfg.provider == "points" and cfg.points_path is None:
        raise ValueError(
            "--provider points needs a file: add --points-path CLOUD.ply (or .las, .laz, .glb, .obj)."
        )
    if cfg.provider == "mvs" and cfg.points_path is not None:
        raise ValueError("--points-path is given, but the provider is mvs. Add --provider points.")
    without_cameras = is_photo_folder(cfg.source)
    if cfg.all_images and not without_cameras:
        raise ValueError(
            f"--all-images is for photos without cameras, but {cfg.source} has cameras. Leave it out."
        )
    if cfg.provider == "points" and without_cameras:
        raise ValueError(
            f"--provider points needs cameras in the frame of {cfg.points_path}, but {cfg.source} has none. "
            "Pass a COLMAP scene or a transforms.json, or use --provider mvs."
        )


def scene_inputs(cfg: Config) -> dict[str, object]:
    """What the result depends on: cameras and photos (all of them: stage0/scene has the test photos too, for the evaluation)."""
    inputs = source_inputs(cfg)
    files = {"weights": cfg.weight_path, "points": cfg.points_path, "split": cfg.split_file}
    return inputs | {key: path for key, path in files.items() if path is not None}


def source_inputs(cfg: Config) -> dict[str, object]:
    if is_photo_folder(cfg.source):
        return {"photos": [photo.path for photo in find_photos(cfg.source)]}
    transforms = None if (cfg.source / "sparse").is_dir() else find_transforms(cfg.source)
    if transforms is not None:
        return {"cameras": transforms, "photos": list(read_transforms(transforms).image_paths)}
    if (cfg.source / "sparse").is_dir() and (cfg.source / "images").is_dir():
        return {"cameras": cfg.source / "sparse", "photos": cfg.source / "images"}
    return {"scene": cfg.source}


def read_scene(cfg: Config, stage: Stage) -> tuple[Scene, Split]:
    """The scene with cameras, and which of its views are kept."""
    if not is_photo_folder(cfg.source):
        scene = prepare_scene(cfg.source, stage.dir / "scene", cfg.max_side)
        split = choose_views(cfg, scene.names)
    else:
        scene, split = find_cameras(cfg, stage)
    logger.info(
        "stage0: %s: %d views, %d kept, %d novel, %d test",
        scene.name,
        len(scene),
        len(split.kept),
        len(split.novel),
        len(split.test),
    )
    return scene, split


def find_cameras(cfg: Config, stage: Stage) -> tuple[Scene, Split]:
    """Make a scene of photos without cameras, in stage0/scene. Photos that cannot be placed are in neither scene nor split."""
    photos = find_photos(cfg.source)
    names = [photo.name for photo in photos]
    wanted = choose_views(cfg, names, keep_all=True)
    # Where a held-out photo stands is known from its pixels, so pseudo views are not made there unless that is asked for.
    given = cfg.novel == "given" or cfg.all_images
    needed = {*wanted.test, *(wanted.novel if given else ())}
    kept = [photo for photo in photos if cfg.all_images or photo.name in wanted.kept]
    held_out = [photo for photo in photos if photo not in kept and photo.name in needed]
    placement = place(cfg, kept, held_out, stage.scratch)
    atomic_write_json(stage.dir / "poses.json", placement.record)
    scene = write_photo_scene(
        placement,
        photo_root(cfg.source),
        cfg.source.resolve().name,
        stage.dir / "scene",
        stage.scratch,
        cfg.max_side,
    )
    view_of = {Path(name).with_suffix("").as_posix(): name for name in scene.names}

    def views(wanted_names: Sequence[str]) -> tuple[str, ...]:
        stems = (Path(name).with_suffix("").as_posix() for name in wanted_names)
        return tuple(view_of[stem] for stem in stems if stem in view_of)

    split = Split(
        wanted.protocol,
        kept=views(wanted.kept),
        novel=views(wanted.novel) if given else (),
        test=views(wanted.test),
    )
    if len(split.kept) < 2:
        raise ValueError(
            f"{len(split.kept)} of the {len(wanted.kept)} kept photos could be placed. Expected at least 2. "
            "Keep others (--keep-…), or add photos between them."
        )
    stage.info |= {
        "poses": placement.record,
        "leaks_test_photos": cfg.all_images and bool(split.test),
    }
    if stage.info["leaks_test_photos"]:
        logger.warning(
            "stage0: --all-images: the cameras know the test photos, so the scores do too"
        )
    return scene, split


def choose_views(cfg: Config, names: Sequence[str], keep_all: bool = False) -> Split:
    """The split of views; `keep_all`: without a --keep-… option all that are not test views are kept."""
    if cfg.split_file is not None:
        return read_split_file(cfg.split_file, names)
    count = cfg.keep_count
    if keep_all and cfg.keep_every is None and cfg.keep_indices is None and count is None:
        count = len(names)
    return make_split(names, cfg.keep_every, cfg.keep_indices, count, cfg.eval, cfg.test_every)


def draw_guidance(found: Reconstruction, novel: Cameras, stage_dir: Path) -> float:
    """Write guidance and coverage at every novel camera; returns the mean coverage."""
    total = 0.0
    with image_writer() as write, progress(len(novel), "draw") as bar:
        for row, camera in enumerate(novel):
            picture = render_cloud(found.cloud, camera)
            name = render_name(camera.names[0])
            write(stage_dir / "guidance" / name, picture.rgb)
            write(stage_dir / "coverage" / name, picture.coverage.float())
            total += float(picture.coverage.float().mean())
            bar.update(row + 1, coverage=total / (row + 1))
    return total / max(len(novel), 1)


def write_outputs(
    stage: Stage, scene: Scene, split: Split, found: Reconstruction, kept: Scene, novel: Cameras
) -> None:
    """Write everything but the pictures."""
    split.save(stage.dir / "split.json")
    novel.to_json(stage.dir / "novel_cameras.json")
    write_points_ply(
        stage.dir / "points.ply", found.cloud.points, found.cloud.rgbs, found.cloud.confidence
    )
    found.cloud.save(stage.dir / "surface.npz")
    write_scene_glb(stage.dir / "scene.glb", found.cloud, kept.cameras, novel)
    write_image(stage.dir / "cameras.png", draw_top_view(found.cloud, kept.cameras, novel))

    def write(name: str) -> None:
        depth_map = found.depth_maps[name]
        write_depth(depth_path(stage.dir, name), depth_map.depth, depth_map.confidence)

    with ThreadPoolExecutor() as threads:  # zlib works outside Python's lock
        list(threads.map(write, found.depth_maps))


if __name__ == "__main__":
    run_script(main, Config, "stage0_point_guidance")

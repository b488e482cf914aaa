"""Points behind what has no points: found by hand in a small scene, by a loop over pixels in float64, and after turning and scaling the world; then left out in stage 2."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import run

from s2d.cameras import Cameras
from s2d.fixer import guidance_check
from s2d.fixer import novel_views as views_of_stage2
from s2d.geometry import invert_rigid, look_at, quat_to_rotation, rigid
from s2d.guidance.hidden import AGREES, IN_FRONT, MAX_ANGLE, OTHER_COLOUR, Witness, hidden_points
from s2d.guidance.render import Guidance
from s2d.images import read_image
from s2d.pairs import trials as making
from s2d.pairs.trials import TrialJob, TrialSettings, make_trial
from s2d.stage_io import require_stage

WIDTH, HEIGHT, FOCAL, WALL = 40, 30, 40.0, 4.0
RED, BLUE, GREEN = (torch.tensor(colour) for colour in ((0.8, 0.1, 0.1), (0.1, 0.1, 0.8), (0.1, 0.8, 0.1)))  # fmt: skip


def camera_at(x: float, name: str = "a.png") -> Cameras:
    """On z = 0, looking along z."""
    viewmat = torch.eye(4)
    viewmat[0, 3] = -x
    K = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1.0]])
    return Cameras(viewmat[None], K[None], ((WIDTH, HEIGHT),), (name,))


def picture(colour: torch.Tensor) -> torch.Tensor:
    return colour.expand(HEIGHT, WIDTH, 3).clone()


def wall(colour: torch.Tensor = RED) -> Guidance:
    """A wall at z = `WALL` that fills the picture but for one row."""
    coverage = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    coverage[-1] = False
    return Guidance(picture(colour) * coverage[..., None], coverage, WALL * coverage.float())


def witness(x: float, colour: torch.Tensor, depth: float = 0.0) -> Witness:
    return Witness(camera_at(x), picture(colour), torch.full((HEIGHT, WIDTH), depth))


def hidden(rendered: torch.Tensor, witnesses: list[Witness]) -> torch.Tensor:
    return hidden_points(picture(rendered), wall(), camera_at(0.0), witnesses)


# ----------------------------------------------------------------------------------------------------------- by hand


def test_what_the_photo_and_the_render_show_is_before_the_point():
    found = hidden(BLUE, [witness(0.0, BLUE)])
    assert found[:-1].all() and not found[-1].any()  # where there is no point, nothing is left out


def test_the_photo_alone_is_no_proof_and_neither_is_the_render():
    assert not hidden(RED, [witness(0.0, BLUE)]).any()
    assert not hidden(GREEN, [witness(0.0, BLUE)]).any()
    assert not hidden(BLUE, [witness(0.0, RED)]).any()
    assert not hidden(BLUE, []).any()


def test_how_far_colours_may_be_off():
    for share, expected in ((0.99, False), (1.01, True)):
        other = RED + share * OTHER_COLOUR * torch.tensor([-1.0, 1, 1])
        assert bool(hidden(other, [witness(0.0, other)])[:-1].all()) is expected
    for share, expected in ((1.01, False), (0.99, True)):
        assert (
            bool(hidden(torch.lerp(BLUE, RED, share * AGREES), [witness(0.0, BLUE)])[:-1].all())
            is expected
        )


def test_a_known_surface_before_the_point_is_what_its_photo_shows():
    for nearer, expected in ((1.5 * IN_FRONT, False), (0.5 * IN_FRONT, True), (-1.0, True)):
        found = hidden(BLUE, [witness(0.0, BLUE, depth=WALL * (1 - nearer))])
        assert bool(found[:-1].all()) is expected


def test_the_photo_from_the_nearest_direction_decides_whatever_the_order():
    near_red, far_blue = witness(0.2, RED), witness(-0.5, BLUE)
    near_blue, far_red = witness(0.2, BLUE), witness(-0.5, RED)
    for pair, expected in (((near_red, far_blue), False), ((near_blue, far_red), True)):
        for witnesses in (list(pair), list(reversed(pair))):
            columns = slice(6, -6)  # in both pictures
            assert (hidden(BLUE, witnesses)[:-1, columns] == expected).all()


def test_a_photo_from_far_aside_says_nothing():
    column = WIDTH // 2
    for degrees, expected in ((21, False), (19, True)):
        aside = WALL * math.tan(math.radians(degrees))
        there = Witness(camera_at(aside), picture(BLUE), torch.zeros(HEIGHT, WIDTH))
        found = hidden(BLUE, [there])
        assert bool(found[HEIGHT // 2, column - 1 : column + 1].all()) is expected


def test_a_photo_says_nothing_of_what_is_not_in_it():
    shift = 10  # columns: one at `WALL` is 0.1 wide
    found = hidden(BLUE, [witness(shift * WALL / FOCAL, BLUE)])
    assert found[:-1, shift + 1 :].all() and not found[:, : shift - 1].any()
    behind = camera_at(0.0)
    behind = Cameras(behind.viewmats @ torch.diag(torch.tensor([-1.0, 1, -1, 1])), behind.Ks, behind.sizes, behind.names)  # fmt: skip
    assert not hidden(BLUE, [Witness(behind, picture(BLUE), torch.zeros(HEIGHT, WIDTH))]).any()


# ------------------------------------------------------------------------------------------- a loop, and other worlds


def random_case(seed: int):
    """Rough colours and depths, cameras around them."""
    generator = torch.Generator().manual_seed(seed)

    def blocks(*shape: int) -> torch.Tensor:
        small = torch.rand(*shape, HEIGHT // 5, WIDTH // 5, generator=generator)
        return small.repeat_interleave(5, -2).repeat_interleave(5, -1)

    def colours() -> torch.Tensor:
        return (blocks(3) > 0.5).float().permute(1, 2, 0) * 0.6 + 0.1

    novel = camera_at(0.0)
    coverage = blocks() > 0.2
    guidance = Guidance(colours() * coverage[..., None], coverage, (3 + blocks()) * coverage)
    witnesses = []
    for number in range(3):
        centre = torch.rand(3, generator=generator) * 2 - 1
        viewmat = look_at(centre, torch.tensor([0.0, 0, 3.5]), torch.tensor([0.0, -1, 0]))
        seen_by = Cameras(viewmat[None], novel.Ks, novel.sizes, (f"{number}.png",))
        depth = torch.where(blocks() > 0.5, 2.5 + 2 * blocks(), torch.zeros(()))
        witnesses.append(Witness(seen_by, colours(), depth))
    # Half of it shows what the first photo does, so that there is something to find.
    rendered = torch.where(blocks()[..., None] > 0.5, witnesses[0].photo, colours())
    return rendered, guidance, novel, witnesses


def loop_over_pixels(rendered, guidance, camera, witnesses) -> np.ndarray:
    """The definition in float64, one pixel at a time."""
    found = np.zeros((HEIGHT, WIDTH), bool)
    K, V = camera.Ks[0].double().numpy(), camera.viewmats[0].double().numpy()
    eye = -V[:3, :3].T @ V[:3, 3]
    for row in range(HEIGHT):
        for column in range(WIDTH):
            if not guidance.coverage[row, column]:
                continue
            z = float(guidance.depth[row, column])
            ray = np.linalg.inv(K) @ [column + 0.5, row + 0.5, 1]
            point = V[:3, :3].T @ (ray * z - V[:3, 3])
            best, verdict = MAX_ANGLE, False
            for seen_by, photo, depth in witnesses:
                k, v = seen_by.Ks[0].double().numpy(), seen_by.viewmats[0].double().numpy()
                there = v[:3, :3] @ point + v[:3, 3]
                if there[2] <= 0:
                    continue
                x, y = (k @ (there / there[2]))[:2]
                if not (0 <= x < WIDTH and 0 <= y < HEIGHT):
                    continue
                surface = float(depth[int(y), int(x)])
                if 0 < surface < (1 - IN_FRONT) * there[2]:
                    continue
                other = -v[:3, :3].T @ v[:3, 3]
                a, b = point - eye, point - other
                angle = math.atan2(np.linalg.norm(np.cross(a, b)), a @ b)
                if angle < best:
                    best = angle
                    colour = photo[int(y), int(x)].double().numpy()
                    off = np.abs(colour - guidance.rgb[row, column].double().numpy()).mean()
                    near = np.abs(colour - rendered[row, column].double().numpy()).mean()
                    verdict = off > OTHER_COLOUR and near < AGREES * off
            found[row, column] = verdict
    return found


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_loop_over_pixels_in_float64(seed):
    case = random_case(seed)
    found, expected = hidden_points(*case).numpy(), loop_over_pixels(*case)
    assert 0.02 < expected.mean() < 0.9
    assert (found != expected).mean() < 0.002  # a point on the edge of two pixels of a photo


def test_the_choice_of_the_worlds_axes_and_unit_changes_nothing():
    rendered, guidance, novel, witnesses = random_case(3)
    turn = quat_to_rotation(torch.tensor([0.3, -0.5, 0.7, 0.2], dtype=torch.float64))
    moved = rigid(turn, torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64))
    scale = 7.0

    def elsewhere(camera: Cameras) -> Cameras:
        viewmat = camera.viewmats[0].double().clone()
        viewmat[:3, 3] *= scale
        viewmat = viewmat @ invert_rigid(moved)
        return Cameras(viewmat[None].float(), camera.Ks, camera.sizes, camera.names)

    other = [Witness(elsewhere(one.camera), one.photo, scale * one.depth) for one in witnesses]
    larger = guidance._replace(depth=scale * guidance.depth)
    found = hidden_points(rendered, guidance, novel, witnesses)
    again = hidden_points(rendered, larger, elsewhere(novel), other)
    assert found.any() and (found != again).float().mean() < 0.002


def test_pictures_of_unlike_sizes_are_refused():
    with pytest.raises(ValueError, match=r"guidance\.rgb"):
        hidden_points(picture(RED)[:-1], wall(), camera_at(0.0), [])


# ----------------------------------------------------------------------------------------------------------- in stage 2


@pytest.fixture(scope="module")
def rendered(tiny_scene, tmp_path_factory) -> Path:
    """OUT after stages 0 and 1. Do not change it."""
    out = tmp_path_factory.mktemp("hidden") / "out"
    run("stage0", tiny_scene, out)
    run("stage1", tiny_scene, out, "--sample_iteration", "20")
    return out


@pytest.fixture
def out(rendered, tmp_path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "out"))


def left_half(rendered, guidance, camera, witnesses):
    """Found hidden."""
    assert len(witnesses) >= 2 and guidance.rgb.shape == rendered.shape
    found = guidance.coverage.clone()
    found[:, found.shape[1] // 2 :] = False
    return found


def test_stage_2_shows_the_fixer_nothing_of_them(out, tiny_scene, monkeypatch):
    run("stage2", tiny_scene, out, "--trial-views", "0", "--no-check-guidance")
    whole = {path.name: read_image(path) for path in (out / "stage2/mask").iterdir()}
    for name, mask in whole.items():
        assert torch.equal(mask, read_image(out / "stage0/coverage" / name))
    assert "hidden_share" not in require_stage(out, "stage2").info
    monkeypatch.setattr(guidance_check, "hidden_points", left_half)
    run("stage2", tiny_scene, out, "--trial-views", "0", "--overwrite")
    assert 0.2 < require_stage(out, "stage2").info["hidden_share"] < 0.8
    for name, mask in whole.items():
        middle = mask.shape[1] // 2
        checked = read_image(out / "stage2/mask" / name)
        assert torch.equal(checked[:, middle:], mask[:, middle:])
        assert mask[:, :middle].any() and not checked[:, :middle].any()
        shown, before = (
            read_image(out / folder / name) for folder in ("stage2/fixed", "stage1/renders")
        )
        assert torch.equal(shown[:, : middle - 8], before[:, : middle - 8])
        assert not torch.equal(shown[:, middle:], before[:, middle:])


def test_an_interrupted_stage_2_looks_nothing_over_again(out, tiny_scene, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(guidance_check, "hidden_points", left_half)
        patch.setattr(views_of_stage2, "read_view", stop)
        with pytest.raises(KeyboardInterrupt):
            run("stage2", tiny_scene, out, "--trial-views", "0")
    monkeypatch.setattr(guidance_check, "hidden_points", pytest.fail)
    run("stage2", tiny_scene, out, "--trial-views", "0")
    assert 0.2 < require_stage(out, "stage2").info["hidden_share"] < 0.8
    for path in (out / "stage2/mask").iterdir():
        mask = read_image(path)
        assert not mask[:, : mask.shape[1] // 2].any() and mask.any()


def test_guidance_of_ones_own_is_taken_as_it_is(out, tiny_scene, monkeypatch):
    monkeypatch.setattr(guidance_check, "hidden_points", pytest.fail)
    own = shutil.copytree(out / "stage0/guidance", out.parent / "own/guidance")
    run("stage2", tiny_scene, out, "--trial-views", "0", "--point_guidance_dir", str(own))
    assert any((out / "stage2/fixed").iterdir())


def test_trials_are_shown_what_stage_2_will_show(tiny_scene, tmp_path, monkeypatch):
    job = TrialJob(tiny_scene, ("view_1.png", "view_3.png", "view_6.png"), "view_3.png")
    for check in (False, True):
        monkeypatch.setattr(making, "hidden_points", left_half if check else pytest.fail)
        settings = TrialSettings(num_steps=10, check_guidance=check)
        make_trial(job, settings, tmp_path / str(check), lambda _: None)
    (guidance, coverage), (whole, all_of_it) = (
        [read_image(tmp_path / f"{check}/view_3.png/{name}.png") for name in ("guidance", "coverage")]
        for check in (True, False)
    )  # fmt: skip
    middle = coverage.shape[1] // 2
    assert all_of_it[:, :middle].any() and not coverage[:, :middle].any()
    assert not guidance[:, :middle].any() and torch.equal(guidance[:, middle:], whole[:, middle:])

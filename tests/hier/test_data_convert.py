"""DTU, Replica and posed scenes become chunks that are read back as what they were."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from s2d.geometry import invert_rigid, look_at
from s2d.hier.data.chunks import ChunkFolder
from s2d.hier.data.convert import (
    dtu_recordings,
    posed_recording,
    replica_recordings,
    write_chunks,
    write_index,
)
from s2d.hier.data.posed import load_posed
from s2d.hier.data.samplers import ArbitrarySampler
from s2d.images import write_image

ROOT = Path(__file__).resolve().parents[2]


def read(root, split="test"):
    return ChunkFolder(root, split, ArbitrarySampler())


def poses(num):
    centers = torch.randn(num, 3, generator=torch.Generator().manual_seed(0)).double() + 5
    return look_at(centers, torch.zeros_like(centers), torch.tensor([0.0, 0, 1]).double())


def test_dtu_has_its_units_and_its_split(tmp_path):
    picture = torch.rand(8, 10, 3, generator=torch.Generator().manual_seed(0))
    viewmats = poses(49)
    viewmats[:, :3, 3] *= 100  # millimetres
    (tmp_path / "dtu/Cameras/train").mkdir(parents=True)
    for view in range(49):
        rows = "\n".join(" ".join(map(str, row.tolist())) for row in viewmats[view])
        text = f"extrinsic\n{rows}\n\nintrinsic\n2.0 0 1.3\n0 2.1 0.9\n0 0 1\n\n425.0 2.5\n"
        (tmp_path / f"dtu/Cameras/train/{view:08d}_cam.txt").write_text(text)
        for scan in (1, 2):
            name = f"rect_{view + 1:03d}_3_r5000.png"
            write_image(tmp_path / f"dtu/Rectified/scan{scan}_train" / name, picture * scan / 2)
    assert write_chunks(dtu_recordings(tmp_path / "dtu", "test"), tmp_path / "out/test") == 1
    folder = read(tmp_path / "out")
    assert folder.keys == ("scan1_train",), "scan 2 is one to train on"
    capture = folder.find("scan1_train")
    assert len(capture) == 49
    assert torch.allclose(capture.viewmats[:, :3, 3].double(), viewmats[:, :3, 3] / 200, atol=1e-4)
    _, K = capture.picture(0, (10, 8))
    assert K[0].tolist() == pytest.approx(
        [8.0, 0, 5.2]
    )  # a quarter of the photos' size in the files
    assert capture.near[0] == pytest.approx(2.125) and capture.far[0] == pytest.approx(4.525)
    with pytest.raises(FileNotFoundError, match="No test scans"):
        next(dtu_recordings(tmp_path, "test"))
    (tmp_path / "dtu/Cameras/train/00000000_cam.txt").write_text("extrinsic 1 2")
    with pytest.raises(ValueError, match=r"00000000_cam\.txt: expected"):
        next(dtu_recordings(tmp_path / "dtu", "test"))


def test_replica_is_turned_round_and_half_a_pixel_over(tmp_path):
    folder = tmp_path / "replica/office_0/Sequence_2"
    c2w = invert_rigid(poses(3))
    for frame in range(3):
        write_image(folder / f"rgb/rgb_{frame}.png", torch.rand(480, 640, 3))
    np.savetxt(folder / "traj_w_c.txt", c2w.reshape(3, 16).numpy())
    write_chunks(replica_recordings(tmp_path / "replica"), tmp_path / "out/test")
    capture = read(tmp_path / "out").find("office_0-Sequence_2")
    assert torch.allclose(capture.viewmats.double(), poses(3), atol=1e-5)
    _, K = capture.picture(0, (640, 480))
    assert torch.equal(K, torch.tensor([[320.0, 0, 320], [0, 320, 240], [0, 0, 1]]))
    assert capture.near[0] == 0.5 and capture.far[0] == 15


def test_a_posed_scene_comes_back_with_its_ranges(tiny_scene, tmp_path):
    (capture,) = load_posed([tiny_scene], tmp_path / "cache")
    write_chunks([posed_recording(capture)], tmp_path / "out/train")
    back = read(tmp_path / "out", "train").find(capture.key)
    assert torch.allclose(back.viewmats, capture.viewmats)
    assert torch.equal(back.near, capture.near) and torch.equal(back.far, capture.far)
    for row in (0, 2, 5):  # of three sizes
        one, other = capture.picture(row, (24, 24)), back.picture(row, (24, 24))
        assert torch.equal(one[0], other[0])
        assert torch.allclose(one[1], other[1], atol=1e-4)


def test_an_interrupted_conversion_goes_on(tiny_scene, tmp_path):
    (capture,) = load_posed([tiny_scene], tmp_path / "cache")
    recording = posed_recording(capture)

    def recordings(stop=None):
        for number in range(4):
            if number == stop:
                raise KeyboardInterrupt
            yield recording._replace(key=f"scene{number}")

    folder = tmp_path / "train"
    with pytest.raises(KeyboardInterrupt):
        write_chunks(recordings(stop=2), folder, chunk_bytes=1)
    first = (folder / "000000.torch").read_bytes()
    assert write_chunks(recordings(), folder, chunk_bytes=1) == 2
    assert (folder / "000000.torch").read_bytes() == first
    index = json.loads((folder / "index.json").read_text())
    assert index == {f"scene{k}": f"{k:06d}.torch" for k in range(4)}
    (folder / "index.json").unlink()
    assert write_index(folder) == 4
    assert json.loads((folder / "index.json").read_text()) == index
    with pytest.raises(FileNotFoundError, match="No chunks"):
        write_index(tmp_path / "nothing")


def test_the_command_converts(tiny_scene, tmp_path):
    command = [sys.executable, "tools/convert_hier_data.py", "scenes"]
    command += ["-i", str(tiny_scene), "-o", str(tmp_path / "out"), "--split", "test"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path / "out").find("tiny")) == 8
    command[4] = str(tmp_path / "nowhere")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and "No such scene" in done.stderr

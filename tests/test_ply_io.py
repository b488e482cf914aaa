"""PLY: tensors → bytes → tensors, hand-made files, foreign property orders, broken files."""

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from s2d.ply_io import (
    read_gaussians_ply,
    read_points_ply,
    write_gaussians_ply,
    write_points_ply,
)


def gaussians(num, degree, generator):
    shapes = {
        "means": (num, 3),
        "log_scales": (num, 3),
        "quats": (num, 4),
        "opacity_logits": (num,),
        "sh0": (num, 1, 3),
        "shN": (num, (degree + 1) ** 2 - 1, 3),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("num", [0, 1, 17])
def test_gaussians_round_trip_bit_for_bit(tmp_path, degree, num, generator):
    values = gaussians(num, degree, generator)
    read = read_gaussians_ply(write_gaussians_ply(tmp_path / "a" / "point_cloud.ply", **values))
    assert read.keys() == values.keys()
    for name in values:
        assert torch.equal(read[name], values[name]), name


def test_opacities_of_exactly_0_and_1_are_read_as_numbers(tmp_path, generator):
    """Programs that store opacity in 8 bits write the logits of 0/255 and 255/255."""
    values = gaussians(3, 0, generator)
    values["opacity_logits"] = torch.tensor([torch.inf, -torch.inf, 0.5])
    path = write_gaussians_ply(tmp_path / "a.ply", **values)
    opacities = read_gaussians_ply(path)["opacity_logits"].sigmoid()
    assert torch.allclose(opacities, torch.tensor([1.0, 0.0, 0.6225]), atol=1e-4)
    assert read_gaussians_ply(path)["opacity_logits"].isfinite().all()


def test_property_order_and_channel_major_rest_on_disk(tmp_path, generator):
    """Byte by byte as 3DGS viewers expect: names in this order, f_rest all R, then all G, then all B."""
    values = gaussians(2, 1, generator)
    path = write_gaussians_ply(tmp_path / "a.ply", **values)
    content = path.read_bytes()
    header, body = content.split(b"end_header\n", 1)
    lines = header.decode().splitlines()
    assert lines[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 2"]
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    names += [f"f_rest_{i}" for i in range(9)] + ["opacity", "scale_0", "scale_1", "scale_2"]
    names += ["rot_0", "rot_1", "rot_2", "rot_3"]
    assert lines[3:] == [f"property float {name}" for name in names]
    row = np.frombuffer(body, "<f4").reshape(2, len(names))[1]
    v = {name: value[1].numpy() for name, value in values.items()}
    expected = [*v["means"], 0, 0, 0, *v["sh0"][0]]
    expected += [*v["shN"][:, 0], *v["shN"][:, 1], *v["shN"][:, 2]]
    expected += [v["opacity_logits"], *v["log_scales"], *v["quats"]]
    assert row.tolist() == [np.float32(value) for value in expected]


def test_reads_properties_in_any_order_and_as_doubles(tmp_path, generator):
    values = gaussians(5, 2, generator)
    vertices = PlyData.read(write_gaussians_ply(tmp_path / "a.ply", **values))["vertex"].data
    turned = np.empty(5, dtype=[(name, "f8") for name in reversed(vertices.dtype.names)])
    for name in vertices.dtype.names:
        turned[name] = vertices[name]
    PlyData([PlyElement.describe(turned, "vertex")], text=False).write(tmp_path / "b.ply")
    read = read_gaussians_ply(tmp_path / "b.ply")
    for name in values:
        assert torch.equal(read[name], values[name]), name


def test_points_round_trip(tmp_path, generator):
    points, confidence = (
        torch.randn(50, 3, generator=generator),
        torch.rand(50, generator=generator),
    )
    rgbs = torch.randint(0, 256, (50, 3), generator=generator) / 255
    cloud = read_points_ply(write_points_ply(tmp_path / "a.ply", points, rgbs, confidence))
    assert torch.equal(cloud.points, points)
    assert torch.equal(cloud.confidence, confidence)
    assert torch.allclose(cloud.rgbs, rgbs, atol=1e-7)
    assert read_points_ply(write_points_ply(tmp_path / "b.ply", points, rgbs)).confidence is None
    empty = read_points_ply(write_points_ply(tmp_path / "c.ply", points[:0], rgbs[:0]))
    assert empty.points.shape == empty.rgbs.shape == (0, 3)


HAND = "ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"


@pytest.mark.parametrize(
    ("properties", "rows", "expected"),
    [
        (
            "property uchar red\nproperty uchar green\nproperty uchar blue\n",
            "1 2 3 255 0 51\n4 5 6 0 0 0\n",
            [1, 0, 0.2],
        ),
        (
            "property float r\nproperty float g\nproperty float b\n",
            "1 2 3 0.5 1 0.25\n4 5 6 0 0 0\n",
            [0.5, 1, 0.25],
        ),
        (
            "property ushort red\nproperty ushort green\nproperty ushort blue\n",
            "1 2 3 65535 0 13107\n4 5 6 0 0 0\n",
            [1, 0, 0.2],
        ),
        ("", "1 2 3\n4 5 6\n", [0.5, 0.5, 0.5]),
    ],
)
def test_hand_made_clouds(tmp_path, properties, rows, expected):
    (tmp_path / "a.ply").write_text(HAND + properties + "end_header\n" + rows)
    cloud = read_points_ply(tmp_path / "a.ply")
    assert cloud.points.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert cloud.rgbs[0].tolist() == pytest.approx(expected)


def test_broken_files(tmp_path, generator):
    path = write_gaussians_ply(tmp_path / "good.ply", **gaussians(10, 1, generator))
    content = path.read_bytes()
    cut, text = tmp_path / "cut.ply", tmp_path / "text.ply"
    cut.write_bytes(content[: len(content) // 2])
    text.write_text("not a ply")
    for bad in (cut, text):
        with pytest.raises(ValueError, match=rf"{bad.name} is not a PLY file or is cut off"):
            read_gaussians_ply(bad)
    with pytest.raises(FileNotFoundError, match="No such PLY file"):
        read_gaussians_ply(tmp_path / "none.ply")
    cloud = write_points_ply(tmp_path / "cloud.ply", torch.zeros(3, 3), torch.zeros(3, 3))
    with pytest.raises(
        ValueError, match=r"holds no Gaussians: 11 of 14 properties are missing \(first: opacity\)"
    ):
        read_gaussians_ply(cloud)
    nan = write_points_ply(
        tmp_path / "nan.ply", torch.tensor([[0, 0, 0], [0, torch.nan, 0]]), torch.zeros(2, 3)
    )
    with pytest.raises(ValueError, match=r"1 of 2 points are not finite \(first: 1\)"):
        read_points_ply(nan)


def test_wrong_number_of_coefficients(tmp_path, generator):
    values = gaussians(4, 1, generator)
    values["shN"] = values["shN"][:, :2]
    with pytest.raises(
        ValueError, match=r"shN has 6 higher SH coefficients. Expected 0, 9, 24 or 45"
    ):
        write_gaussians_ply(tmp_path / "a.ply", **values)
    values = gaussians(4, 1, generator)
    values["quats"] = values["quats"][:3]
    with pytest.raises(
        ValueError, match=r"quats must be \[N, 4\] with N=4 \(from means\), got \[3, 4\]"
    ):
        write_gaussians_ply(tmp_path / "a.ply", **values)
    assert not (tmp_path / "a.ply").exists()

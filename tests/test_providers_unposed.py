"""Cameras of a photo folder from a model: upright or turned by EXIF, they describe the stored pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from provider_scene import FakePi3, Truth

from s2d.alignment import align_cameras
from s2d.geometry import up_axis
from s2d.guidance.providers.pi3 import Pi3Provider
from s2d.guidance.providers.unposed import place_by_model
from s2d.poses.photos import find_photos
from s2d.poses.place import write_photo_scene

CPU = torch.device("cpu")
STORED = {
    1: 0,
    3: 2,
    6: 1,
    8: -1,
}  # quarter turns, anticlockwise, from the upright picture to the stored one


@pytest.mark.parametrize("orientations", [(1, 1, 1), (6, 3, 8)])
def test_photos_without_cameras_become_a_scene(orientations, tmp_path):
    truth = Truth()
    folder = tmp_path / "photos"
    folder.mkdir()
    for row, (photo, orientation) in enumerate(zip(truth.photos, orientations, strict=True)):
        pixels = torch.rot90(photo, STORED[orientation], (0, 1)).mul(255).round().byte().numpy()
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(pixels))
        image.save(folder / f"p{row}.jpg", quality=98, subsampling=0, exif=exif)
    photos = find_photos(folder)
    provider = Pi3Provider(FakePi3(truth), CPU, max_pixels=9000)
    placement = place_by_model(provider, photos, "pi3")
    assert placement.left_out == {} and placement.record["placed"] == ["p0.jpg", "p1.jpg", "p2.jpg"]
    for photo, lens in zip(photos, placement.model.lenses, strict=True):
        assert (lens.width, lens.height) == photo.info.stored_size
    scene = write_photo_scene(placement, folder, "room", tmp_path / "scene", tmp_path, 0)
    assert scene.cameras.sizes == truth.cameras.sizes  # upright again
    found = align_cameras(scene.cameras, truth.cameras)
    assert float(found.rotation_errors.max()) < 1e-3  # degrees; measured 4e-6
    assert float(found.center_errors.max()) < 1e-2  # %; measured 1.2e-5
    assert torch.allclose(scene.cameras.Ks, truth.cameras.Ks, atol=1e-3)  # measured 8e-6
    for view, photo in zip(scene.names, truth.photos, strict=True):
        assert float((scene.image(view) - photo).abs().mean()) < 0.01
    # Level: -y is up, as it is for the true cameras.
    up = found.sim3.rotation.T @ torch.tensor([0.0, 0.0, 1.0]).double()
    assert float(up[1]) < -0.99
    assert float(up_axis(scene.cameras.viewmats)[1]) < -0.9


def test_no_depth_is_an_error(tmp_path):
    class Blind:
        def predict(self, photos, cameras=None):
            geometry = Pi3Provider(FakePi3(Truth()), CPU, max_pixels=9000).predict(photos)
            nothing = tuple(torch.zeros_like(depth) for depth in geometry.depths)
            return type(geometry)(
                geometry.cameras, nothing, geometry.points, geometry.confidence, geometry.rgbs
            )

    truth = Truth()
    for row, photo in enumerate(truth.photos):
        Image.fromarray(photo.mul(255).byte().numpy()).save(tmp_path / f"p{row}.png")
    with pytest.raises(ValueError, match="no depth in any of the 3 photos"):
        place_by_model(Blind(), find_photos(tmp_path), "pi3")

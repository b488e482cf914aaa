"""Packages and weights: tiny random networks behind the real import paths load and run; what is missing is explained."""

import sys

import pytest
import torch
from provider_packages import forget_packages, write_packages
from safetensors.torch import save_file

from s2d.cameras import Cameras
from s2d.guidance.providers import monocular
from s2d.guidance.providers.filters import FilterSettings
from s2d.guidance.providers.interface import read_weights
from s2d.guidance.providers.load import PROVIDER_NAMES, load_provider
from s2d.guidance.providers.placement import cloud_in_scene

PACKAGES = ["pi3", "pi3x", "vggt", "mapanything", "depth-anything-3"]
PHOTOS = [torch.rand(30, 40, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2)]


def two_cameras() -> Cameras:
    viewmats = torch.eye(4).repeat(2, 1, 1)
    viewmats[1, 0, 3] = -1
    K = torch.tensor([[40.0, 0, 20], [0, 40, 15], [0, 0, 1]])
    return Cameras(viewmats, K.repeat(2, 1, 1), [(40, 30)] * 2, ["a.png", "b.png"])


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The stand-ins, found as a user would have them: Pi3 by S2D_PI3_ROOT, the others installed."""
    forget_packages(monkeypatch)
    monkeypatch.setenv("S2D_PI3_ROOT", str(write_packages(tmp_path / "pi3root")))
    monkeypatch.syspath_prepend(str(write_packages(tmp_path / "site")))
    yield tmp_path
    forget_packages(monkeypatch)


def make_weights(name: str, folder):
    """Weights of a stand-in as the hub has them: a file for Pi3 and VGGT, a folder for the others."""
    torch.manual_seed(1)
    if name == "pi3":
        from pi3.models.pi3 import Pi3 as Model
    elif name == "pi3x":
        from pi3.models.pi3x import Pi3X as Model
    elif name == "vggt":
        from vggt.models.vggt import VGGT as Model
    elif name == "mapanything":
        from mapanything.models import MapAnything as Model
    else:
        from depth_anything_3.api import DepthAnything3 as Model
    model = Model()
    if name in ("mapanything", "depth-anything-3"):
        model.save_pretrained(folder / name)
        return folder / name, model
    path = folder / f"{name}.safetensors"
    save_file(model.state_dict(), path)
    return path, model


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tiny_network_loads_and_runs(name, packages):
    path, model = make_weights(name, packages)
    provider = load_provider(name, path)
    for key, value in model.state_dict().items():
        assert torch.equal(provider.model.state_dict()[key], value)
    assert not provider.model.training
    for cameras in (None, two_cameras()):
        geometry = provider.predict(PHOTOS, cameras)
        for depth, points, confidence in zip(
            geometry.depths, geometry.points, geometry.confidence, strict=True
        ):
            assert depth.dtype == torch.float32
            assert bool(points.isfinite().all())
            assert 0 <= float(confidence.min()) <= float(confidence.max()) <= 1
            assert not depth.requires_grad and not depth.is_inference()
    cloud = cloud_in_scene(geometry, two_cameras(), None, FilterSettings())
    assert len(cloud) > 100


def test_weights_of_every_usual_kind_are_read(packages):
    _, model = make_weights("vggt", packages)
    for name, content in (("a.pt", model.state_dict()), ("b.pth", {"model": model.state_dict()})):
        torch.save(content, packages / name)
        assert read_weights(packages / name).keys() == model.state_dict().keys()
    provider = load_provider("vggt", packages / "b.pth")
    assert torch.equal(provider.model.head.weight, model.head.weight)


def test_a_file_with_code_in_it_is_not_run(packages):
    torch.save({"model": print}, packages / "bad.pt")
    with pytest.raises(ValueError, match=r"--provider vggt: no usable weights.*holds code"):
        load_provider("vggt", packages / "bad.pt")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_explained(name, monkeypatch, tmp_path):
    forget_packages(monkeypatch)
    for top in ("pi3", "vggt", "mapanything", "depth_anything_3"):
        monkeypatch.setitem(sys.modules, top, None)
    monkeypatch.setenv("S2D_PI3_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=rf"--provider {name} needs a package.*Clone https://github"
    ):
        load_provider(name, tmp_path / "weights.safetensors")


@pytest.mark.parametrize("name", [*PACKAGES, "monocular"])
def test_missing_weights_are_explained(name, packages):
    with pytest.raises(
        ValueError, match=r"no usable weights in .*gone.*https://huggingface.co/.*--weight-path"
    ):
        load_provider(name, packages / "gone")


def test_weights_of_the_other_pi3_are_explained(packages):
    path, _ = make_weights("vggt", packages)
    with pytest.raises(
        ValueError, match=r"no usable weights.*Weights of Pi3X need --provider pi3x"
    ):
        load_provider("pi3", path)


def test_depth_anything_weights_without_cameras_are_explained(packages):
    path, _ = make_weights("depth-anything-3", packages)
    provider = load_provider("depth-anything-3", path)
    provider.model.cameras = False
    with pytest.raises(ValueError, match=r"depth without cameras\. Use DA3-SMALL"):
        provider.predict(PHOTOS)


def test_sky_of_depth_anything_has_no_confidence(packages):
    path, _ = make_weights("depth-anything-3", packages)
    confidence = load_provider("depth-anything-3", path).predict(PHOTOS).confidence[0]
    half = confidence.shape[0] // 2
    assert float(confidence[:half].max()) == 0
    assert float(confidence[half:].min()) > 0


def test_names_and_devices():
    assert set(PROVIDER_NAMES) == {*PACKAGES, "monocular"}
    with pytest.raises(ValueError, match=r"Unknown provider 'dust3r'\. Expected one of pi3, pi3x"):
        load_provider("dust3r")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda cannot be used"):
            load_provider("vggt", device="cuda")


# -- transformers ---------------------------------------------------------------------------------------------------------


def save_tiny_depth_anything(folder, kind: str = "relative", normalize: bool = True):
    """The real Depth Anything of transformers, small, with random weights."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
    from transformers import DPTImageProcessorPil as Processor

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
        head_in_index=-1,
        depth_estimation_type=kind,
    )
    torch.manual_seed(0)
    model = DepthAnythingForDepthEstimation(config).eval()
    model.save_pretrained(folder)
    Processor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], do_normalize=normalize
    ).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "freedom"), [("relative", "scale and shift"), ("metric", "scale")]
)
def test_a_tiny_depth_anything_of_transformers_loads_and_runs(kind, freedom, tmp_path):
    model = save_tiny_depth_anything(tmp_path, kind)
    provider = load_provider("monocular", tmp_path)
    assert (provider.mean, provider.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    provider.kind = type(provider.kind)(provider.kind.inverse, provider.kind.freedom, 56, 14)
    geometry = provider.predict(PHOTOS, two_cameras())
    assert geometry.freedom == freedom
    assert geometry.depths[0].shape == geometry.rgbs[0].shape[:2] == (42, 56)
    # The network saw the normalised photo, and its answer is depth or the inverse of depth.
    image = geometry.rgbs[0].permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (provider.mean, provider.std))
    with torch.no_grad():
        answer = model(((image - mean) / std)[None]).predicted_depth[0]
    depth = 1 / answer if kind == "relative" else answer
    good = geometry.depths[0] > 0
    assert bool(good.any())
    assert torch.allclose(geometry.depths[0][good], depth[good], rtol=1e-4)
    assert "torchvision" not in sys.modules


def test_processors_that_do_not_normalise(tmp_path):
    save_tiny_depth_anything(tmp_path, normalize=False)
    provider = load_provider("monocular", tmp_path)
    assert (provider.mean, provider.std) == ((0.0,) * 3, (1.0,) * 3)


def test_a_family_of_unknown_output_is_refused(tmp_path, monkeypatch):
    save_tiny_depth_anything(tmp_path)
    monkeypatch.delitem(monocular.KINDS, "depth_anything")
    with pytest.raises(ValueError, match="is a depth_anything model, whose output is not known"):
        load_provider("monocular", tmp_path)

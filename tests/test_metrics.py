"""PSNR and SSIM against hand numbers and a naive window loop, LPIPS against its published example and a naive network."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from s2d.images import read_image
from s2d.metrics import BACKBONES, LPIPS_MIN_SIDE, Lpips, LpipsUnavailable, load_lpips, psnr, ssim

META = torch.device("meta")
DATA = os.environ.get("S2D_DATA")
WEIGHTS = os.environ.get("S2D_WEIGHTS")


def random_pair(height=24, width=31, seed=0, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(height, width, 3, generator=generator)
    image = (target + noise * torch.randn(height, width, 3, generator=generator)).clamp(0, 1)
    return image, target


def test_psnr_by_hand():
    target = torch.zeros(4, 5, 3)
    assert psnr(target + 0.1, target) == pytest.approx(20.0, abs=1e-5)  # mse 0.01
    half = target.clone()
    half[:2] = 0.1  # half the pixels: mse 0.005
    assert psnr(half, target) == pytest.approx(10 * math.log10(200), abs=1e-5)
    assert psnr(target, target) == 100.0


def test_psnr_counts_masked_pixels_only():
    target = torch.zeros(4, 5, 3)
    image = target.clone()
    image[0] = 0.5
    image[1:] = 0.1
    mask = torch.zeros(4, 5)
    mask[1:] = 1
    assert psnr(image, target, mask) == pytest.approx(20.0, abs=1e-5)
    assert psnr(image, target, 1 - mask) == pytest.approx(-20 * math.log10(0.5), abs=1e-5)
    assert math.isnan(psnr(image, target, torch.zeros(4, 5)))


def naive_ssim(image, target):
    """Every window by itself, zeros outside the picture, population variance under the window's weights."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    row = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(row, row) / row.sum() ** 2
    height, width, _ = image.shape
    padded = [F.pad(x.double().permute(2, 0, 1), (5, 5, 5, 5)) for x in (image, target)]
    total = 0.0
    for y in range(height):
        for x in range(width):
            a, b = (p[:, y : y + 11, x : x + 11] for p in padded)
            for channel in range(3):
                mean_a, mean_b = (window * a[channel]).sum(), (window * b[channel]).sum()
                var_a = (window * (a[channel] - mean_a) ** 2).sum()
                var_b = (window * (b[channel] - mean_b) ** 2).sum()
                covariance = (window * (a[channel] - mean_a) * (b[channel] - mean_b)).sum()
                c1, c2 = 0.01**2, 0.03**2
                total += float(
                    (2 * mean_a * mean_b + c1)
                    * (2 * covariance + c2)
                    / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    return total / (height * width * 3)


def test_ssim_equals_a_naive_window_loop():
    image, target = random_pair(13, 17)
    assert ssim(image, target) == pytest.approx(
        naive_ssim(image, target), abs=1e-12
    )  # measured 1e-15


def test_ssim_of_known_cases():
    image, target = random_pair()
    assert ssim(target, target) == pytest.approx(1.0, abs=1e-12)
    assert ssim(image, target) == pytest.approx(ssim(target, image), abs=1e-12)
    flat = torch.full((30, 30, 3), 0.5)
    # Flat pictures have no structure: only the luminance term is left, the same at every pixel far from the border.
    wide = torch.full((400, 400, 3), 0.5)
    luminance = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert ssim(wide, wide + 0.1) == pytest.approx(
        luminance, abs=2e-3
    )  # the zero border: measured 7e-4
    assert ssim(flat, flat + 0.4) < ssim(flat, flat + 0.1)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"psnr: target must be \[H, W, 3\] with H=4"):
        psnr(torch.zeros(4, 5, 3), torch.zeros(5, 4, 3))
    with pytest.raises(ValueError, match=r"ssim: image must be \[H, W, 3\]"):
        ssim(torch.zeros(3, 4, 5), torch.zeros(3, 4, 5))


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="one of \\['alex', 'vgg'\\], got 'squeeze'"):
        load_lpips("squeeze")


@pytest.mark.skipif(not (DATA and WEIGHTS), reason="S2D_DATA and S2D_WEIGHTS name no folders")
def test_lpips_scores_its_published_example():
    folder = Path(DATA) / "lpips_example"
    reference, p0, p1 = (read_image(folder / f"ex_{name}.png") for name in ("ref", "p0", "p1"))
    lpips = load_lpips("alex")
    # The published figures have three digits; a second implementation gave the fourth.
    assert lpips(p0, reference) == pytest.approx(0.7219, abs=5e-5)
    assert lpips(p1, reference) == pytest.approx(0.1376, abs=5e-5)
    assert lpips(reference, reference) == 0.0


@pytest.mark.skipif(not WEIGHTS, reason="S2D_WEIGHTS names no folder")
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_the_network_written_layer_by_layer(net):
    """Torchvision's own layer list as torch.nn modules, fed with the same weights, tapped at the ReLUs that the paper names."""
    lpips = load_lpips(net)
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    if net == "alex":
        layers = [
            conv(3, 64, 11, 4, 2),
            relu(),
            pool(3, 2),
            conv(64, 192, 5, 1, 2),
            relu(),
            pool(3, 2),
        ]
        layers += [
            conv(192, 384, 3, 1, 1),
            relu(),
            conv(384, 256, 3, 1, 1),
            relu(),
            conv(256, 256, 3, 1, 1),
            relu(),
        ]
        taps = (1, 4, 7, 9, 11)
    else:
        layers, channels = [], 3
        for width in (
            64,
            64,
            "pool",
            128,
            128,
            "pool",
            256,
            256,
            256,
            "pool",
            512,
            512,
            512,
            "pool",
            512,
            512,
            512,
        ):
            if width == "pool":
                layers.append(pool(2, 2))
            else:
                layers += [conv(channels, width, 3, 1, 1), relu()]
                channels = width
        taps = (3, 8, 15, 22, 29)
    network = torch.nn.Sequential(*layers)
    network.load_state_dict(
        {key.removeprefix("features."): value for key, value in lpips.weights.items()}
    )
    image, target = random_pair(70, 90)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    total, features = 0.0, [((x - mean) / std).permute(2, 0, 1)[None] for x in (image, target)]
    with torch.no_grad():
        for index, layer in enumerate(network):
            features = [layer(x) for x in features]
            if index in taps:
                a, b = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-10) for x in features)
                total += float(F.conv2d((a - b) ** 2, lpips.heads[taps.index(index)]).mean())
    # The scaling layer's constants on [-1, 1] are ImageNet's mean and deviation on [0, 1]. Measured difference: 1e-7.
    assert lpips(image, target) == pytest.approx(total, rel=1e-5)


def random_lpips(net="alex"):
    generator = torch.Generator().manual_seed(1)
    weights, channels, widths = {}, 3, iter((64, 192, 384, 256, 256))
    for layer, kernel in zip(
        [x for x in BACKBONES[net].layers if isinstance(x, tuple)], (11, 5, 3, 3, 3), strict=True
    ):
        width = next(widths)
        weights[f"{layer[0]}.weight"] = (
            torch.randn(width, channels, kernel, kernel, generator=generator)
            / (channels * kernel**2) ** 0.5
        )
        weights[f"{layer[0]}.bias"] = torch.zeros(width)
        channels = width
    heads = [torch.rand(1, width, 1, 1, generator=generator) for width in (64, 192, 384, 256, 256)]
    return Lpips(net, weights, heads)


def test_lpips_grows_with_the_distortion_and_forgets_old_truths():
    lpips = random_lpips()
    slight, target = random_pair(64, 64, noise=0.02)
    strong, _ = random_pair(64, 64, noise=0.2)
    assert 0 < lpips(slight, target) < lpips(strong, target)
    other_target = random_pair(64, 64, seed=5)[1]
    assert lpips(slight, other_target) == random_lpips()(
        slight, other_target
    )  # no stale truth features


def test_lpips_on_another_device_has_all_there_but_the_pictures(monkeypatch):
    """The meta device says where tensors are: what is computed of them has no value, and is refused where devices meet."""
    there = random_lpips().to(META)
    precise = []

    def convolve(x, *rest):
        precise.append(not torch.backends.cudnn.allow_tf32)
        return convolved(x, *rest)

    convolved = F.conv2d
    monkeypatch.setattr(F, "conv2d", convolve)
    image, target = random_pair(64, 64)
    assert {tap.device for tap in there._features(image)} == {META}
    assert precise == [True] * 5 and torch.backends.cudnn.allow_tf32
    here = random_lpips()
    assert here.to(torch.device("cpu"))(image, target) == here(image, target)


def test_the_smallest_picture_is_as_large_as_it_must_be():
    lpips = random_lpips()
    image, target = random_pair(LPIPS_MIN_SIDE, LPIPS_MIN_SIDE)
    assert lpips(image, target) > 0
    with pytest.raises(RuntimeError):  # torch's own: the evaluation does not ask for it
        lpips(image[1:], target[1:])


def test_missing_weights_are_one_clear_message(monkeypatch, tmp_path):
    monkeypatch.delenv("S2D_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        LpipsUnavailable,
        match=r"^LPIPS: not available: no vgg16 weights here\. Put vgg16-397923af\.pth",
    ):
        load_lpips("vgg", download=False)

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(
        LpipsUnavailable, match=r"^LPIPS: not available: could not download .*no route to host"
    ):
        load_lpips("alex")


@pytest.mark.skipif(not WEIGHTS, reason="S2D_WEIGHTS names no folder")
def test_torch_hubs_cache_is_used(monkeypatch, tmp_path):
    weights = load_lpips("alex").weights
    (tmp_path / "checkpoints").mkdir()
    torch.save(dict(weights), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    monkeypatch.delenv("S2D_WEIGHTS")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = load_lpips("alex", download=False)
    assert all(torch.equal(cached.weights[key], value) for key, value in weights.items())


def test_weights_of_another_network_are_refused(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "alexnet_features.safetensors")
    monkeypatch.setenv("S2D_WEIGHTS", str(tmp_path))
    with pytest.raises(LpipsUnavailable, match=r"have no features\.0\.weight"):
        load_lpips("alex")

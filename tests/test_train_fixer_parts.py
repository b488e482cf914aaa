"""Losses, average, schedule and exported weights, each against an independent computation."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_fixer import (
    UNET_SUFFIXES,
    VAE_SUFFIXES,
    adapt,
    paths,
    randomise,
    save_base,
    tiny_unet,
    tiny_vae,
)
from tiny_pairs import TINY, save_tiny
from torch import nn

from s2d import metrics
from s2d.fixer.features import TransformerFeatures
from s2d.fixer.network.compact import load_compact
from s2d.fixer.network.difix import load_difix
from s2d.fixer.training.losses import FixerLoss, LossWeights, ssim, structural_loss
from s2d.fixer.training.perceptual import (
    TappedBackbone,
    dino_distance,
    gram_distance,
    lpips_distance,
)
from s2d.fixer.training.schedule import rate_factor
from s2d.fixer.training.trainable import make_trainee
from s2d.metrics import BACKBONES, Lpips
from s2d.runs.ema import Ema

NETS = ("alex", "vgg")


def random_lpips(net, generator):
    """LPIPS with random weights in the real layout."""
    channels = {"alex": (3, 64, 192, 384, 256, 256), "vgg": (3, 64, 128, 256, 512, 512)}[net]
    kernels = {"alex": (11, 5, 3, 3, 3), "vgg": (3,) * 13}[net]
    weights, heads = {}, [torch.rand(1, c, 1, 1, generator=generator) for c in channels[1:]]
    last, tap, convs = 3, 1, 0
    for layer in BACKBONES[net].layers:
        if layer == "tap":
            tap += 1
        elif layer != "pool":
            key, size = layer[0], kernels[convs]
            convs += 1
            shape = (channels[tap], last, size, size)
            deviation = (2 / (last * size**2)) ** 0.5
            weights[f"{key}.weight"] = torch.randn(shape, generator=generator) * deviation
            weights[f"{key}.bias"] = torch.randn(channels[tap], generator=generator) * 0.1
            last = channels[tap]
    return Lpips(net, weights, heads)


def images(generator, count=2, size=(40, 48)):
    """[B, 3, H, W] in [-1, 1] as the trainer has them, on 8-bit values."""
    return (torch.rand(count, 3, *size, generator=generator) * 255).round() / 127.5 - 1


def hwc(image):
    return image.permute(1, 2, 0) / 2 + 0.5


# --- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_lpips_of_a_batch_is_the_mean_of_the_metric(net, generator):
    lpips = random_lpips(net, generator)
    a, b = images(generator), images(generator)
    backbone = TappedBackbone(lpips)
    got = float(lpips_distance(backbone(a), backbone(b), backbone.heads))
    expected = sum(lpips(hwc(x), hwc(y)) for x, y in zip(a, b, strict=True)) / 2
    assert got == pytest.approx(expected, rel=1e-5)  # measured 1e-7
    assert not list(backbone.parameters())


def test_lpips_has_a_finite_gradient_where_nothing_is_active(generator):
    """Dead channels everywhere: the root of their sum of squares has no slope."""
    lpips = random_lpips("alex", generator)
    for key in lpips.weights:
        if key.endswith("bias"):
            lpips.weights[key] -= 100
    backbone = TappedBackbone(lpips)
    x = images(generator).requires_grad_()
    lpips_distance(backbone(x), backbone(images(generator)), backbone.heads).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_ssim_of_a_batch_is_the_mean_of_the_metric_with_its_slope_and_the_kernel_agrees(generator):
    a, b = images(generator), images(generator)
    got = float(ssim((a + 1) / 2, (b + 1) / 2))
    expected = sum(metrics.ssim(hwc(x), hwc(y)) for x, y in zip(a, b, strict=True)) / 2
    assert got == pytest.approx(expected, abs=1e-6)  # measured 2e-8
    a, b = (a + 1) / 2, (b + 1) / 2
    a.requires_grad_()
    (plain,) = torch.autograd.grad(1 - ssim(a, b), a)
    (fused,) = torch.autograd.grad(structural_loss(a, b), a)
    assert structural_loss(a, b).item() == pytest.approx(1 - expected, abs=1e-6)
    assert (fused - plain).norm() < 1e-5 * plain.norm()  # measured 4e-7
    x, y = (torch.rand(1, 1, 12, 13, generator=generator, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ssim(x, y), x)


def test_gram_by_hand_and_each_sample_by_itself():
    # One channel, one row of two pixels: Gram matrices 1² + 2² = 5 and 0, over C·h·w = 2.
    tap, zero = torch.tensor([[[[1.0, 2.0]]]]), torch.zeros(1, 1, 1, 2)
    assert float(gram_distance([tap] * 5, [zero] * 5)) == pytest.approx(
        25 / 2 * (1 / 2.6 + 1 / 4.8 + 1 / 3.7 + 1 / 5.6 + 10 / 1.5)
    )
    both, swapped = torch.cat([tap, 3 * tap]), torch.cat([3 * tap, tap])
    assert float(gram_distance([both] * 5, [swapped] * 5)) > 100, "not the batch's common matrix"


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_dino_is_zero_for_equal_images_and_pulls_towards_them(dino_folder, generator):
    features = TransformerFeatures.from_folder(dino_folder)
    target = images(generator)
    assert float(dino_distance(features, target, target)) == pytest.approx(0, abs=1e-6)
    x = images(generator).requires_grad_()
    before = dino_distance(features, x, target)
    before.backward()
    with torch.no_grad():
        moved = x - 0.1 * x.grad / x.grad.abs().mean()
        assert float(dino_distance(features, moved, target)) < float(before)


def test_the_loss_is_the_weighted_sum_and_leaves_out_what_weighs_nothing(
    monkeypatch, generator, dino_folder
):
    lpips = random_lpips("vgg", generator)
    monkeypatch.setattr("s2d.fixer.training.losses.load_lpips", lambda net: lpips)
    weights = LossWeights(l2=2, lpips=3, ssim=5, gram=7, dino=11, gram_start_step=4)
    loss = FixerLoss(weights, "vgg", dino_folder)
    a, b = images(generator), images(generator)
    terms = loss(a, b, step=3)
    assert list(terms) == ["loss", "l2", "ssim", "lpips", "dino"], "the Gram term has not begun"
    terms = loss(a, b, step=4)
    assert float(terms["l2"]) == pytest.approx(float((a - b).square().mean()))
    total = sum(getattr(weights, name) * float(terms[name]) for name in terms if name != "loss")
    assert float(terms["loss"]) == pytest.approx(total, rel=1e-6)
    alone = FixerLoss(replace(weights, lpips=0, gram=0, dino=0), "vgg", None)
    assert alone.backbone is None
    assert list(alone(a, b, 10)) == ["loss", "l2", "ssim"]
    half = FixerLoss(replace(weights, dino=0), "vgg", None, "bf16")(a, b, 4)
    # bf16 has 8 bits: measured 2e-3; what needs no network stays exact.
    assert float(half["lpips"]) == pytest.approx(float(terms["lpips"]), rel=0.02)
    assert float(half["ssim"]) == float(terms["ssim"])


def test_a_missing_network_says_which_flag_does_without(monkeypatch, tmp_path):
    def missing(net):
        raise metrics.LpipsUnavailable("LPIPS: not available: no weights here.")

    monkeypatch.setattr("s2d.fixer.training.losses.load_lpips", missing)
    with pytest.raises(ValueError, match=r"not available.*--lambda-lpips 0"):
        FixerLoss(LossWeights())
    with pytest.raises(ValueError, match="--dino-folder"):
        FixerLoss(LossWeights(lpips=0, dino=1))
    with pytest.raises(FileNotFoundError, match="dinov2-small"):
        FixerLoss(LossWeights(lpips=0, dino=1), dino_folder=tmp_path)
    with pytest.raises(ValueError, match="--lpips-net vgg"):
        FixerLoss(LossWeights(gram=1), "alex")


# --- average and schedule ----------------------------------------------------------------------------------------------


def test_the_average_is_the_closed_form_and_is_lent_out_only():
    value = nn.Parameter(torch.zeros(1))
    ema = Ema({"w": value}, decay=0.25)
    # Decays: 2/11, 3/12, then 0.25 for good (n = 2 gives exactly 0.25).
    with torch.no_grad():
        for step in (1.0, 2.0, 4.0):
            value.fill_(step)
            ema.update()
    first = 1.0 * (1 - 2 / 11)
    second = 0.25 * first + 0.75 * 2
    expected = 0.25 * second + 0.75 * 4
    with ema.applied():
        assert value.item() == pytest.approx(expected)
    assert value.item() == 4.0
    restored = Ema({"w": nn.Parameter(torch.zeros(1))}, decay=0.25)
    restored.load_state_dict(ema.state_dict())
    with restored.applied():
        assert restored.parameters["w"].item() == pytest.approx(expected)


def test_learning_rates_by_hand():
    constant = [rate_factor(step, "constant", 3, 10) for step in range(6)]
    assert constant == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = [rate_factor(step, "cosine", 2, 10) for step in (0, 1, 2, 4, 6, 10)]
    quarter = 0.5 + 0.5 * math.cos(math.pi / 4)
    assert cosine == pytest.approx([1 / 3, 2 / 3, 1, quarter, 0.5, 0])


# --- what is trained, and its file -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd_turbo(tmp_path_factory):
    return save_base(
        tmp_path_factory.mktemp("base") / "m", tiny_unet(), tiny_vae(skips=False), difix=False
    )


@pytest.fixture(scope="module")
def difix_ref(tmp_path_factory):
    vae = tiny_vae(skips=True)
    adapt(vae, paths(vae, VAE_SUFFIXES, "decoder"), "vae_skip", 3, seed=1)
    return save_base(tmp_path_factory.mktemp("difix") / "m", tiny_unet(), vae, difix=True)


def output(model, generator_seed=3):
    generator = torch.Generator().manual_seed(generator_seed)
    rendered, guidance, reference = (images(generator, 1, (32, 48)) for _ in range(3))
    mask = (torch.rand(1, 1, 32, 48, generator=generator) < 0.5).float()
    with torch.no_grad():
        return model.eval()(rendered, guidance, mask, reference[:, None])


@pytest.mark.parametrize("base", ["sd_turbo", "difix_ref"])
def test_adapters_are_all_that_trains_and_their_file_loads_in_stage_2(base, request, tmp_path):
    folder = str(request.getfixturevalue(base))
    trainee = make_trainee(folder, None, {"guidance_share": 0.3}, rank_unet=2, rank_vae=4)
    untrained = output(load_difix(folder))
    names = trainee.parameters().keys()
    stock_unet, stock_vae = tiny_unet(), tiny_vae(skips=True)
    adapted = {f"unet.{name}" for name in paths(stock_unet, UNET_SUFFIXES)}
    adapted |= {f"vae.{name}" for name in paths(stock_vae, VAE_SUFFIXES, "decoder")}
    expected = {
        f"{name}.lora_{side}.{'vae_skip' if name.startswith('vae') else 'default'}.weight"
        for name in adapted
        for side in "AB"
    }
    expected |= {"unet.conv_in.weight", "unet.conv_in.bias"}
    expected |= {f"vae.decoder.skip_conv_{n}.base_layer.weight" for n in (1, 2, 3, 4)}
    assert names == expected
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in trainee.parameters().values():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.02)
    path = trainee.save(tmp_path / f"model{trainee.suffix}")
    assert path.suffix == ".pkl"
    content = torch.load(path, weights_only=True)
    assert content["rank_unet"] == 2
    assert content["rank_vae"] == (3 if base == "difix_ref" else 4), (
        "a base's adapter is gone on with"
    )
    assert all("lora" in key or "conv_in" in key for key in content["state_dict_unet"])
    assert all("lora" in key or "skip" in key for key in content["state_dict_vae"])
    loaded = load_difix(folder, path)
    assert loaded.config.mixing.guidance_share == 0.3
    trained = output(trainee.model)
    # Adapters added into the weights sum in another order: measured 1e-6.
    assert torch.allclose(output(loaded), trained, atol=2e-5)
    assert not torch.allclose(trained, untrained, atol=1e-2)
    # Going on from it starts where it stopped.
    again = make_trainee(folder, path, {}, 2, 4)
    assert torch.allclose(output(again.model), trained, atol=2e-5)
    assert again.parameters().keys() == names
    assert not again.whole_unet


def test_going_on_from_a_whole_unet_keeps_it_in_the_file(difix_ref, tmp_path):
    """A Difix checkpoint replaces the base's UNet: adapters alone would lose that."""
    path = tmp_path / "difix.pkl"
    torch.save(
        {"state_dict_unet": randomise(tiny_unet(), 9).state_dict(), "state_dict_vae": {}}, path
    )
    trainee = make_trainee(str(difix_ref), path, {}, 2, 4)
    expected = output(trainee.model)
    assert not torch.allclose(expected, output(load_difix(str(difix_ref))), atol=1e-2)
    saved = trainee.save(tmp_path / "mine.pkl")
    assert torch.allclose(output(load_difix(str(difix_ref), saved)), expected, atol=2e-5)


def test_a_learned_mixing_is_trained_and_saved(sd_turbo, tmp_path):
    trainee = make_trainee(str(sd_turbo), None, {"kind": "learned"}, 2, 4)
    assert any(name.startswith("mixing.") for name in trainee.parameters())
    randomise(trainee.model.mixing, 3)
    path = trainee.save(tmp_path / "model.pkl")
    assert torch.allclose(output(load_difix(str(sd_turbo), path)), output(trainee.model), atol=2e-5)


def test_a_compact_model_is_trained_as_a_whole(tmp_path):
    trainee = make_trainee(None, save_tiny(tmp_path / "init.safetensors"), {}, 8, 4)
    assert trainee.model.config.unet.keys() == TINY.unet.keys()
    assert len(trainee.parameters()) == len(list(trainee.model.parameters()))
    randomise(trainee.model, 0)
    path = trainee.save(tmp_path / f"model{trainee.suffix}")
    # Half precision in the file: measured 2e-3.
    assert torch.allclose(output(load_compact(path)), output(trainee.model), atol=0.02)

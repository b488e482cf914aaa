"""The fixer's network against stock diffusers modules, closed forms and invariances."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_fixer import UNET_CONFIG, randomise, stock_output, tiny_unet, tiny_vae

from s2d.fixer.features import TransformerFeatures
from s2d.fixer.mixing import LearnedMixing, make_mixing, positions
from s2d.fixer.model_config import COMPACT, SD_SCHEDULER, FixerConfig, MixingConfig
from s2d.fixer.network.model import build_model
from s2d.fixer.network.vae import SkipAutoencoder
from s2d.fixer.network.views import MultiViewUNet

TINY = replace(
    COMPACT,
    unet={**UNET_CONFIG, "in_channels": 4, "out_channels": 4},
    vae={
        "block_out_channels": (8, 8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    },
    difference=False,
    patch=1,
    mixing=MixingConfig(),
)
SEES_DIFFERENCE = replace(
    TINY, vae={**TINY.vae, "in_channels": 7, "out_channels": 4}, difference=True
)


@pytest.fixture
def multi_view():
    """Our UNet with the weights of a stock one."""
    network = MultiViewUNet(**UNET_CONFIG).eval()
    network.load_state_dict(tiny_unet().state_dict())
    return network


@torch.no_grad()
def test_one_view_is_the_stock_unet(multi_view, generator):
    latents = torch.randn(2, 4, 12, 8, generator=generator)
    prompt = torch.randn(5, 12, generator=generator)
    stock = tiny_unet()(latents, 199, prompt.expand(2, -1, -1)).sample
    assert torch.equal(multi_view.predict(latents[:, None], 199, prompt)[:, 0], stock)


@torch.no_grad()
def test_views_see_each_other_and_samples_do_not(multi_view, generator):
    latents = torch.randn(2, 3, 4, 8, 8, generator=generator)
    prompt = torch.randn(5, 12, generator=generator)
    before = multi_view.predict(latents, 199, prompt)
    changed = latents.clone()
    changed[0, 2] += 1.0
    after = multi_view.predict(changed, 199, prompt)
    assert not torch.allclose(after[0, 0], before[0, 0], atol=1e-4)
    # Batches of other sizes may sum in another order: measured 0.
    assert torch.allclose(after[1], before[1], atol=1e-6)


@torch.no_grad()
def test_the_order_of_references_is_no_matter(multi_view, generator):
    latents = torch.randn(1, 3, 4, 8, 8, generator=generator)
    prompt = torch.randn(5, 12, generator=generator)
    one = multi_view.predict(latents, 199, prompt)[:, 0]
    other = multi_view.predict(latents[:, [0, 2, 1]], 199, prompt)[:, 0]
    assert torch.allclose(one, other, atol=2e-6)  # measured 5e-7: another order of summation


def test_checkpointed_gradients_of_several_views_are_the_plain_ones(multi_view, generator):
    latents = torch.randn(1, 2, 4, 8, 8, generator=generator)
    prompt = torch.randn(5, 12, generator=generator)

    def gradient():
        multi_view.zero_grad()
        multi_view.predict(latents, 199, prompt)[:, 0].square().sum().backward()
        return multi_view.conv_in.weight.grad.clone()

    multi_view.train()
    plain = gradient()
    multi_view.enable_gradient_checkpointing()
    assert torch.allclose(gradient(), plain, rtol=1e-5)  # measured: equal


@torch.no_grad()
def test_the_vae_without_skips_is_the_stock_one(generator):
    stock = tiny_vae(skips=False)
    ours = SkipAutoencoder(**{k: v for k, v in stock.config.items() if not k.startswith("_")})
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert missing == [f"decoder.skip_conv_{number}.weight" for number in (1, 2, 3, 4)]
    assert not unexpected
    images = torch.rand(1, 3, 32, 24, generator=generator) * 2 - 1
    latents = stock.encode(images).latent_dist.mode()
    assert torch.equal(ours.encode(images).latent_dist.mode(), latents)
    assert torch.equal(ours.decode(latents).sample, stock.decode(latents).sample)
    scaled, skips = ours.encode_with_skips(images)
    assert torch.equal(scaled, latents * 0.18215)
    assert [skip.shape[1:] for skip in skips] == [(8, 32, 24), (8, 16, 12), (8, 8, 6), (16, 4, 3)]


def test_full_size_skips_have_the_shapes_of_the_published_checkpoints():
    with torch.device("meta"):
        vae = SkipAutoencoder(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    shapes = {k: tuple(v.shape) for k, v in vae.state_dict().items() if "skip" in k}
    assert shapes == {
        "decoder.skip_conv_1.weight": (512, 512, 1, 1),
        "decoder.skip_conv_2.weight": (512, 256, 1, 1),
        "decoder.skip_conv_3.weight": (512, 128, 1, 1),
        "decoder.skip_conv_4.weight": (256, 128, 1, 1),
    }
    # What Stable Diffusion's VAE and the four convolutions count together.
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863 + 491_520


def test_skips_start_at_their_constant_and_gamma_scales_them(generator):
    vae = SkipAutoencoder(gamma=0.0, **TINY.vae)
    assert torch.equal(vae.decoder.skip_conv_1.weight, torch.full((16, 8, 1, 1), 1e-5))
    randomise(vae, 0)
    images = torch.rand(1, 3, 16, 16, generator=generator)
    latents, skips = vae.encode_with_skips(images)
    without = vae.decode_with_skips(latents, skips)
    assert torch.equal(without, vae.decode(latents / 0.18215).sample)
    vae.decoder.gamma = 1.0
    assert not torch.allclose(vae.decode_with_skips(latents, skips), without, atol=1e-3)


def tiny_model(seed=0, **changes):
    config = replace(TINY, **{"residual": False, **changes})
    model = build_model(config)
    return randomise(model, seed)


@torch.no_grad()
def test_one_step_is_the_closed_form_on_any_number_of_views(generator):
    """Hooks around stock modules, a hand-written step and skips give the same image."""
    model = tiny_model(vae={**TINY.vae, "block_out_channels": (8, 8, 16, 16)} | four_blocks())
    unet = UNet2DConditionModel(**UNET_CONFIG).eval()
    unet.load_state_dict(model.unet.state_dict())
    vae = tiny_vae(skips=True)
    vae.load_state_dict(model.vae.state_dict())
    for views in (1, 2, 3):
        images = torch.rand(views, 3, 32, 48, generator=generator) * 2 - 1
        references = model.encode_photos(images[1:])[None] if views > 1 else None
        expected = stock_output(unet, vae, model.prompt, images)
        got = model.repair(images[:1], references)
        assert torch.allclose(got, expected, atol=2e-5), (got - expected).abs().max()  # 3e-6
        assert model.signal == pytest.approx(0.869045, abs=1e-6)
        assert model.noise == pytest.approx(0.494734, abs=1e-6)


def four_blocks():
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }


def test_a_model_that_paints_corrections_starts_as_the_mix(generator):
    model = build_model(TINY).eval()
    rendered, guidance = torch.rand(2, 2, 3, 16, 24, generator=generator) * 2 - 1
    mask = (torch.rand(2, 1, 16, 24, generator=generator) > 0.5).float()
    references = torch.rand(2, 1, 3, 16, 24, generator=generator) * 2 - 1
    expected = rendered * (1 - 0.5 * mask) + guidance * (0.5 * mask)
    output = model(rendered, guidance, mask, references)
    assert torch.allclose(output, expected, atol=1e-6)
    output.square().sum().backward()
    assert model.vae.decoder.conv_out.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_share_of_the_difference_is_painted_where_points_project(generator):
    """With a decoder that paints the constants r and d the output is the mix + r + d·c·(P - A)."""
    model = build_model(SEES_DIFFERENCE).eval()
    rendered, guidance = torch.rand(2, 2, 3, 16, 24, generator=generator) * 2 - 1
    mask = (torch.rand(2, 1, 16, 24, generator=generator) > 0.5).float()
    model.vae.decoder.conv_out.bias.copy_(torch.tensor([0.1, 0.2, -0.3, 0.25]))
    share = (0.5 + 0.25) * mask  # of the fixed mix, and painted
    painted = torch.tensor([0.1, 0.2, -0.3])[:, None, None]
    expected = rendered * (1 - share) + guidance * share + painted
    assert torch.allclose(model(rendered, guidance, mask), expected, atol=1e-6)


@torch.no_grad()
def test_what_does_not_project_is_not_seen(generator):
    """Guidance under an empty coverage mask may hold anything; coverage itself is seen even where guidance equals the render."""
    model = randomise(build_model(SEES_DIFFERENCE), 0)
    rendered, guidance, photo = torch.rand(3, 1, 3, 16, 24, generator=generator) * 2 - 1
    empty, full = torch.zeros(1, 1, 16, 24), torch.ones(1, 1, 16, 24)
    first = model(rendered, guidance, empty, photo[:, None])
    assert torch.equal(model(rendered, -guidance, empty, photo[:, None]), first)
    assert not torch.allclose(model(rendered, rendered, full, photo[:, None]), first, atol=1e-3)
    assert not torch.equal(model(rendered, guidance, empty, -photo[:, None]), first)


@torch.no_grad()
def test_patches_are_a_network_on_the_images_four_phases(generator):
    """Two networks with the same weights: one takes the image in patches, the other its four phases as channels."""
    phases = {**TINY.vae, "in_channels": 28, "out_channels": 16}
    model = randomise(build_model(replace(SEES_DIFFERENCE, vae=phases, patch=2)), 0)
    assert model.multiple == 2 * build_model(TINY).multiple
    shown = torch.rand(1, 7, 32, 48, generator=generator)
    split = torch.stack([shown[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 2).flatten(1, 2)
    latents, skips = model.vae.encode_with_skips(split)
    painted = model.vae.decode_with_skips(model.denoise(latents[:, None]), skips).unflatten(
        1, (4, 4)
    )
    whole = torch.empty(1, 4, 32, 48)
    for phase in range(4):
        whole[..., phase // 2 :: 2, phase % 2 :: 2] = painted[:, :, phase]
    expected = shown[:, :3] + whole[:, :3] + whole[:, 3:] * shown[:, 3:6]
    assert torch.allclose(model.repair(shown), expected, atol=1e-6)


def test_a_description_whose_channels_do_not_fit_is_refused():
    with pytest.raises(
        ValueError, match="7 channels in and 4 out with difference=True and patch=1, got 3"
    ):
        replace(TINY, difference=True)
    with pytest.raises(ValueError, match="difference needs residual"):
        replace(SEES_DIFFERENCE, residual=False)


@torch.no_grad()
def test_fixed_mixing_in_both_modes_is_the_formula(generator):
    rendered, guidance = torch.rand(2, 1, 3, 8, 8, generator=generator) * 2 - 1
    mask = (torch.rand(1, 1, 8, 8, generator=generator) > 0.5).float()
    masked = make_mixing(MixingConfig(guidance_share=0.3))(rendered, guidance, mask)
    assert torch.allclose(masked, rendered * (1 - 0.3 * mask) + guidance * (0.3 * mask), atol=1e-6)
    everywhere = make_mixing(MixingConfig(guidance_share=0.3, mode="global"))
    expected = rendered * 0.7 + guidance * 0.3
    assert torch.allclose(everywhere(rendered, guidance, mask), expected, atol=1e-6)


def learned(generator, **settings):
    config = MixingConfig(kind="learned", width=16, heads=2, stride=4, **settings)
    rendered, guidance = torch.rand(2, 2, 3, 16, 24, generator=generator) * 2 - 1
    mask = torch.ones(2, 1, 16, 24)
    mask[..., :8] = 0
    return make_mixing(config), rendered, guidance, mask


@torch.no_grad()
def test_learned_mixing_starts_as_the_fixed_mix(generator):
    mixing, rendered, guidance, mask = learned(generator, guidance_share=0.3)
    expected = rendered * (1 - 0.3 * mask) + guidance * (0.3 * mask)
    assert torch.allclose(mixing(rendered, guidance, mask), expected, atol=1e-6)


def test_learned_mixing_looks_at_guidance_far_away_and_all_of_it_learns(generator):
    mixing, rendered, guidance, mask = learned(generator)
    randomise(mixing, 3)
    before = mixing(rendered, guidance, mask)
    guidance = guidance.clone()
    guidance[:, :, :4, -4:] = 1.0
    after = mixing(rendered, guidance, mask)
    assert not torch.equal(after[..., -4:, :4], before[..., -4:, :4])
    after.square().sum().backward()
    for name, parameter in mixing.named_parameters():
        # The bias of the keys adds the same to every score of a query, which the softmax does not see.
        assert name == "to_k.bias" or parameter.grad.abs().sum() > 0, name


def test_frozen_vision_features_plug_in_and_stay_out_of_the_state(generator):
    from transformers import Dinov2Config, Dinov2Model

    backbone = Dinov2Model(
        Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    )
    features = TransformerFeatures(backbone)
    config = MixingConfig(kind="learned", width=16, heads=2, stride=4)
    mixing = LearnedMixing(config, features)
    images = torch.rand(1, 3, 32, 40, generator=generator) * 2 - 1
    assert features(images).shape == (1, 8, 2, 3)
    # A patch is told from its neighbours, in reading order.
    marked = images.clone()
    marked[..., 16:, 28:] = 1.0
    change = (features(marked) - features(images)).norm(dim=1)[0]
    assert change.argmax() == 5
    mixing(images, images, torch.ones(1, 1, 32, 40)).sum().backward()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not any(key.startswith("features") for key in mixing.state_dict())
    assert next(backbone.parameters()).dtype == torch.float32
    mixing.to(torch.bfloat16)
    assert next(backbone.parameters()).dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError, match=r"dinov2-small\), or use features: conv"):
        make_mixing(replace(config, features="nowhere"))


def test_positions_tell_all_tokens_apart():
    codes = positions(6, 9, 16)
    distances = torch.cdist(codes, codes) + 10 * torch.eye(54)
    assert codes.shape == (54, 16) and distances.min() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_image(dtype, generator):
    images = torch.rand(3, 1, 3, 16, 16, generator=generator) * 2 - 1
    mask, references = torch.ones(1, 1, 16, 16), images[2][None]
    model = tiny_model()
    expected = model(images[0], images[1], mask, references)
    inputs = [x.to(dtype) for x in (images[0], images[1], mask, references)]
    got = model.to(dtype)(*inputs)
    assert got.dtype == dtype
    error = ((got.float() - expected).norm() / expected.norm()).item()
    assert error < 0.05  # measured: 0.01 in bfloat16, 0.001 in float16


def test_the_compact_model_is_small_enough_to_ship():
    with torch.device("meta"):
        unet, vae = MultiViewUNet(**COMPACT.unet), SkipAutoencoder(1.0, None, **COMPACT.vae)
    assert sum(p.numel() for net in (unet, vae) for p in net.parameters()) * 2 < 20e6


def test_a_description_survives_json_and_bad_ones_are_refused():
    text = COMPACT.to_json()
    again = FixerConfig.from_json(text, "file")
    assert again.to_json() == text and again.mixing == COMPACT.mixing
    for broken, message in (
        ("{", "file: the fixer's description is not readable"),
        ("[]", "file: the fixer's description is not readable"),
        (
            json.dumps({**json.loads(text), "format": 9}),
            "has format 9; this version reads format 1",
        ),
        (json.dumps({**json.loads(text), "width": 9}), "does not fit .*width"),
        (json.dumps({"format": 1, "mixing": {}}), "does not fit .*Known keys: unet, vae"),
    ):
        with pytest.raises(ValueError, match=message):
            FixerConfig.from_json(broken, "file")


def test_other_predictions_than_the_noise_are_refused():
    config = replace(TINY, scheduler={**SD_SCHEDULER, "prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match="predicts v_prediction; the one-step fixer needs epsilon"):
        build_model(config)
    with pytest.raises(ValueError, match="'a photo' needs its embedding"):
        build_model(replace(TINY, prompt="a photo"))


def test_stock_classes_are_untouched(generator):
    """Another UNet in the same process keeps its own attention."""
    before = tiny_unet()
    names = {type(processor).__name__ for processor in before.attn_processors.values()}
    assert names == {"AttnProcessor2_0"}
    assert AutoencoderKL.__init__ is not SkipAutoencoder.__init__

"""Tiny diffusion models in the peers' layouts on disk, made with stock diffusers, peft and transformers only, and what they compute.

Nothing of `s2d` is used here: names, shapes and the order of operations are written down a second time, from the description
of the formats, so that the loaders are compared with something that cannot share their mistakes.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

PROMPT = "remove degradation"
VAE_WIDTHS = (8, 8, 16, 16)
UNET_CONFIG = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 12,
    "use_linear_projection": True,
}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VAE_SUFFIXES = [
    "conv1",
    "conv2",
    "conv_in",
    "conv_shortcut",
    "conv",
    "conv_out",
    "skip_conv_1",
    "skip_conv_2",
    "skip_conv_3",
    "skip_conv_4",
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
]
UNET_SUFFIXES = [
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "conv",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv_out",
    "proj_in",
    "proj_out",
    "ff.net.2",
    "ff.net.0.proj",
]


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Weights that matter: fresh networks have zeros (LoRA's B) and ones that hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 25
        parameter.data = noise / fan_in**0.5
    return module.eval()


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**UNET_CONFIG), seed)


def tiny_vae(skips: bool, seed: int = 1) -> AutoencoderKL:
    """A stock VAE; with `skips` its decoder also holds the four convolutions that Difix adds."""
    vae = AutoencoderKL(
        block_out_channels=VAE_WIDTHS,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    if skips:
        # The decoder's up blocks take 16, 16, 16, 8 channels; the encoder's down blocks, last first, 16, 8, 8, 8.
        for number, (inputs, outputs) in enumerate(((16, 16), (8, 16), (8, 16), (8, 8)), 1):
            setattr(vae.decoder, f"skip_conv_{number}", nn.Conv2d(inputs, outputs, 1, bias=False))
    return randomise(vae, seed)


def paths(network: nn.Module, suffixes: list[str], part: str = "") -> list[str]:
    return [
        name
        for name, _ in network.named_modules()
        if part in name and any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)
    ]


def adapt(network: nn.Module, targets: list[str], name: str, rank: int, seed: int) -> None:
    """A trained adapter, as peft names it."""
    network.add_adapter(LoraConfig(r=rank, target_modules=targets), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in network.named_parameters():
        if f".{name}." in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def save_text_encoder(folder: Path) -> None:
    letters = sorted(set(PROMPT.replace(" ", "")))
    tokens = ["!", *letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1]}
    special["pad_token"] = "!"
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    config = {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
        )
    )
    randomise(encoder, 2).save_pretrained(folder / "text_encoder")


def expected_prompt(folder: Path) -> torch.Tensor:
    """The embedding from token numbers put together by hand: start, letters, end, padding with token 0. [77, 12]"""
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    numbers = [vocabulary["<|startoftext|>"]]
    for word in PROMPT.split():
        numbers += [vocabulary[letter] for letter in word[:-1]] + [vocabulary[f"{word[-1]}</w>"]]
    numbers += [vocabulary["<|endoftext|>"]]
    numbers += [0] * (77 - len(numbers))
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        return encoder(torch.tensor([numbers])).last_hidden_state[0]


def save_base(folder: Path, unet: nn.Module, vae: nn.Module, difix: bool) -> Path:
    """A folder as stabilityai/sd-turbo, or as nvidia/difix_ref: class names of its own, skips and adapter not merged."""
    unet.save_pretrained(folder / "unet")
    DDPMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    save_text_encoder(folder)
    (folder / "vae").mkdir()
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    if difix:
        config |= {"gamma": 1.0, "ignore_skip": False, "lora_rank": 4}
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    tensors = {key: tensor.contiguous() for key, tensor in vae.state_dict().items()}
    save_file(tensors, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def stock_output(
    unet: nn.Module,
    vae: nn.Module,
    prompt: torch.Tensor,
    images: torch.Tensor,  # [V, 3, H, W] in [-1, 1]: one sample, the image to fix and its references
) -> torch.Tensor:
    """What the saved networks compute, with hooks around stock modules. [1, 3, H, W]"""
    views = len(images)
    stored: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda _, inputs: stored.append(inputs[0]))
        for block in vae.encoder.down_blocks
    ]
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            handles += [
                module.register_forward_pre_hook(
                    lambda _, inputs: (inputs[0].reshape(1, -1, inputs[0].shape[-1]),)
                ),
                module.register_forward_hook(
                    lambda _, inputs, output: output.reshape(views, -1, output.shape[-1])
                ),
            ]
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode() * 0.18215
        noise = unet(latents, 199, prompt.expand(views, -1, -1)).sample[:1]
        # 0.755238 is alpha_bar[199] of Stable Diffusion's schedule.
        clean = (latents[:1] - (1 - 0.755238) ** 0.5 * noise) / 0.755238**0.5

        def add_skip(number):
            def hook(_, inputs):
                skip = getattr(vae.decoder, f"skip_conv_{number}")(stored[4 - number][:1])
                return (inputs[0] + skip, *inputs[1:])

            return hook

        if hasattr(vae.decoder, "skip_conv_1"):
            handles += [
                block.register_forward_pre_hook(add_skip(number))
                for number, block in enumerate(vae.decoder.up_blocks, 1)
            ]
        image = vae.decode(clean / 0.18215).sample
    for handle in handles:
        handle.remove()
    return image

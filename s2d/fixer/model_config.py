"""What a fixer network is built from: one description for both sizes, stored with the compact model's weights.

The numbers of the diffusion base (`difix`) come from its folder's config files; `COMPACT` below is our own small network.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from s2d.checks import check_range
from s2d.fixer.analytic import MixMode

FORMAT = 1

# Difix and S2D run the network at this one step of the noise schedule: alpha_bar = 0.755, a lightly noised image, which is
# what a render with artifacts resembles most.
TIMESTEP = 199


@dataclass(frozen=True)
class MixingConfig:
    """How render and guidance become the one image that the network sees; see `mixing`."""

    kind: Literal["fixed", "learned"] = "fixed"
    guidance_share: float = 0.5
    """g: the share of the guidance where points project; `learned` starts from it."""
    mode: MixMode = "mask"
    """fixed: mix where points project, or everywhere with holes black."""
    feather: float = 0.0
    """fixed: softness of the mask's edge in pixels."""
    match_gain: bool = False
    """fixed: match the guidance's brightness to the render's."""
    width: int = 64
    """learned: size of a token."""
    heads: int = 4
    """learned: heads of the cross-attention."""
    stride: int = 8
    """learned: pixels per token along each axis."""
    features: str = "conv"
    """learned: `conv` (trained along), or the folder of a transformers vision model such as DINOv2 (frozen)."""

    def __post_init__(self) -> None:
        """Refuse what no mixing can be made of: these values also come from files."""
        for name, known in (("kind", ("fixed", "learned")), ("mode", get_args(MixMode))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"MixingConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        for name, kinds in (
            *((name, (int, float)) for name in ("guidance_share", "feather")),
            *((name, int) for name in ("width", "heads", "stride")),
        ):
            if not isinstance(getattr(self, name), kinds):
                raise ValueError(
                    f"MixingConfig: {name} must be a number, got {getattr(self, name)!r}."
                )
        check_range("guidance_share", self.guidance_share, low=0.0, high=1.0)
        check_range("feather", self.feather, low=0.0)
        for name in ("heads", "stride"):
            check_range(name, getattr(self, name), low=1)
        if self.width < 4 or self.width % 4 or self.width % self.heads:
            raise ValueError(
                f"MixingConfig: width must be a multiple of 4 and of heads={self.heads}, got {self.width}."
            )


@dataclass(frozen=True)
class FixerConfig:
    """One fixer network."""

    unet: dict[str, Any]
    """Arguments of diffusers' UNet2DConditionModel."""
    vae: dict[str, Any]
    """Arguments of diffusers' AutoencoderKL."""
    scheduler: dict[str, Any]
    """Arguments of diffusers' DDPMScheduler; only its noise schedule is used."""
    timestep: int = TIMESTEP
    skip_gamma: float = 1.0
    """Factor on the encoder's activations that the decoder adds."""
    skip_init: float | None = 1e-5
    """Constant that untrained skip convolutions hold; None draws them at random, for training from scratch."""
    residual: bool = False
    """The decoder paints a correction to the mixed image instead of the image; it starts at zero."""
    difference: bool = False
    """The encoder also sees how far the guidance differs from the render, and where there is any (7 channels instead of 3); the
    decoder also paints how much of that difference to add (4 channels instead of 3). Needs `residual`."""
    patch: int = 1
    """Squares of so many pixels a side enter the encoder as one pixel with more channels, and leave the decoder as such: a small
    network then spends nothing on layers at full resolution."""
    prompt: str | None = "remove degradation"
    """Text condition; None is a zero embedding, which needs no text encoder."""
    mixing: MixingConfig = field(default_factory=MixingConfig)

    def __post_init__(self) -> None:
        """Refuse what does not fit together: these values also come from files."""
        if self.difference and not self.residual:
            raise ValueError("FixerConfig: difference needs residual.")
        check_range("patch", self.patch, low=1)
        wanted = tuple(n * self.patch**2 for n in ((7, 4) if self.difference else (3, 3)))
        found = tuple(self.vae.get(name, 3) for name in ("in_channels", "out_channels"))
        if found != wanted:
            raise ValueError(
                f"FixerConfig: the VAE must have {wanted[0]} channels in and {wanted[1]} out with difference={self.difference} and "
                f"patch={self.patch}, got {found[0]} and {found[1]}."
            )

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, source: str) -> "FixerConfig":
        """Read what `to_json` wrote; `source` names the file in errors.

        Raises:
            ValueError: Not JSON, another format number, or keys that are missing or unknown.
        """
        try:
            values = json.loads(text)
            number = values.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{source}: the fixer's description is not readable ({type(error).__name__}: {error}). "
                "Download or train the weights again."
            ) from error
        if number != FORMAT:
            raise ValueError(
                f"{source}: the fixer's description has format {number}; this version reads format {FORMAT}. "
                "Update S2D, or use the weights that came with it."
            )
        try:
            return cls(**{**values, "mixing": MixingConfig(**values["mixing"])})
        except (TypeError, KeyError, ValueError) as error:
            known = ", ".join(entry.name for entry in fields(cls))
            raise ValueError(
                f"{source}: the fixer's description does not fit ({error}). Known keys: {known}."
            ) from error


# The noise schedule of Stable Diffusion, which the compact model shares.
SD_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}

# Our own network. Widths: 8.4 M parameters are 17 MB in half precision. At full resolution a layer costs what memory traffic costs:
# in patches of 2×2 pixels there is none, which halves the time. Only the first UNet block attends at 1/8 of the image's size, where
# details of the reference still stand apart: each layer there costs as much as all coarser ones together.
COMPACT = FixerConfig(
    unet={
        "in_channels": 16,
        "out_channels": 16,
        "block_out_channels": (64, 128, 128),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4, 4),  # diffusers' name for the number of heads
        "cross_attention_dim": 8,
        "use_linear_projection": True,
    },
    vae={
        "in_channels": 28,
        "out_channels": 16,
        "block_out_channels": (48, 64, 96),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "scaling_factor": 1.0,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "mid_block_add_attention": False,
    },
    scheduler=SD_SCHEDULER,
    skip_init=None,
    residual=True,
    difference=True,
    patch=2,
    prompt=None,
    mixing=MixingConfig(guidance_share=0.3),
)

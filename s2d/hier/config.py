"""What the network is built from: one description for all sizes, stored with the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from s2d.checks import check_range

NUM_LEVELS = 3
# Pixels of the picture per Gaussian along each axis, coarsest level first.
STRIDES = (4, 2, 1)


@dataclass(frozen=True)
class HierConfig:
    """Sizes of the network. `HierConfig.named` has those that are used."""

    widths: tuple[int, int, int]
    """Channels of each level, coarsest first."""
    stem_stride: int
    """1: convolutions at full resolution. 2: none there; the finest level packs 2 x 2 pixels into channels."""
    attention_blocks: int
    """Blocks of the cross-view transformer."""
    attention_stride: int
    """Pixels per cell of the grid that the transformer runs on: 4, the coarsest level's, or a multiple."""
    num_hypotheses: int
    """Depths that the plane sweep tries, uniform in inverse depth."""
    sweep_widths: tuple[int, ...]
    """Channels of the U-Net over the cost volume, one entry per resolution."""
    refine_widths: tuple[tuple[int, ...], ...]
    """Channels of each level's refinement U-Net, one entry per resolution."""
    joint_attention: bool
    """Self-attention over all views' tokens at the bottom of these U-Nets."""
    photometric: bool
    """Compare fixed descriptors of image patches beside the learned features: depth is roughly right before anything is learned."""
    sh_degree: int
    dino: bool
    """Add a frozen DINOv2 ViT-B/14 to the image pyramid."""
    gaussian_levels: tuple[int, ...] = (0, 1, 2)
    """Levels that leave Gaussians; the others refine depth only. (2,) is a one-level prediction by the same network."""

    def __post_init__(self) -> None:
        """Refuse what no network can be made of: these values also come from files."""
        if len(self.widths) != NUM_LEVELS or len(self.refine_widths) != NUM_LEVELS:
            raise ValueError(
                f"HierConfig: widths and refine_widths must have {NUM_LEVELS} entries, one per level, "
                f"got {len(self.widths)} and {len(self.refine_widths)}."
            )
        if self.stem_stride not in (1, 2):
            raise ValueError(f"HierConfig: stem_stride must be 1 or 2, got {self.stem_stride}.")
        levels = self.gaussian_levels
        known = sorted(set(levels) & set(range(NUM_LEVELS)))
        if list(levels) != known or NUM_LEVELS - 1 not in known:
            raise ValueError(
                f"HierConfig: gaussian_levels must be ascending levels of 0 to {NUM_LEVELS - 1} that end with the finest, got {levels}."
            )
        check_range("sh_degree", self.sh_degree, low=0, high=3)
        check_range("num_hypotheses", self.num_hypotheses, low=2)
        check_range("attention_blocks", self.attention_blocks, low=0)

    @property
    def work_strides(self) -> tuple[int, ...]:
        """Pixels per cell of the grid that each level's convolutions run on."""
        return tuple(max(stride, self.stem_stride) for stride in STRIDES)

    @property
    def multiple(self) -> int:
        """Sides of pictures are padded to a multiple of this."""
        sweep = STRIDES[0] * 2 ** (len(self.sweep_widths) - 1)
        refine = (
            stride * 2 ** (len(widths) - 1)
            for stride, widths in zip(self.work_strides, self.refine_widths, strict=True)
        )
        windows = self.attention_stride * 2  # the transformer cuts its grid into 2 x 2 windows
        return max(sweep, windows, *refine)  # all are powers of two

    @staticmethod
    def named(name: str) -> HierConfig:
        """Return one of the sizes that have a name: compact, paper, tiny.

        Raises:
            ValueError: Another name.
        """
        if name not in _NAMED:
            raise ValueError(f"HierConfig: expected one of {', '.join(_NAMED)}, got {name!r}.")
        return _NAMED[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> HierConfig:
        """Invert `to_dict`.

        Raises:
            ValueError: Names that are not the fields here.
        """
        known = {field.name for field in fields(HierConfig)}
        if not set(values) <= known or not known - {"gaussian_levels"} <= set(values):
            raise ValueError(
                f"HierConfig: expected the fields {', '.join(sorted(known))}, got {', '.join(sorted(values))}. "
                "The weights come from another version."
            )
        return HierConfig(**{name: _as_tuple(value) for name, value in values.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(entry) for entry in value) if isinstance(value, (list, tuple)) else value


_NAMED = {
    "compact": HierConfig(
        widths=(64, 32, 24),
        stem_stride=2,
        attention_blocks=2,
        attention_stride=8,
        num_hypotheses=32,
        sweep_widths=(64, 64, 64),
        refine_widths=((48, 64, 64), (32, 48), (32, 32)),
        joint_attention=False,
        photometric=True,
        sh_degree=1,
        dino=False,
    ),
    # Widths, hypotheses and blocks as published; degree 3 instead of 4, which no viewer reads.
    "paper": HierConfig(
        widths=(128, 64, 32),
        stem_stride=1,
        attention_blocks=6,
        attention_stride=4,
        num_hypotheses=128,
        sweep_widths=(128, 128, 128),
        refine_widths=((128,) * 5, (64,) * 5, (32,) * 5),
        joint_attention=True,
        photometric=False,
        sh_degree=3,
        dino=True,
    ),
    "tiny": HierConfig(
        widths=(16, 12, 8),
        stem_stride=2,
        attention_blocks=1,
        attention_stride=8,
        num_hypotheses=16,
        sweep_widths=(16, 16),
        refine_widths=((16, 16), (12, 12), (8, 8)),
        joint_attention=True,
        photometric=True,
        sh_degree=1,
        dino=False,
    ),
}

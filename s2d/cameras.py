"""`Cameras`: pinhole cameras with names, the one form in which every part of S2D passes them on.

Notation: C cameras; `viewmats` [C, 4, 4] world to camera, OpenCV axes; `Ks` [C, 3, 3] in pixels, pixel centres at +0.5.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2d.files import atomic_write_text
from s2d.geometry import invert_rigid, rotation_angle

FORMAT = 1  # of cameras in JSON


@dataclass(frozen=True, eq=False)
class Cameras:
    """C pinhole cameras. `cameras[i]`, `cameras[2:5]`, `cameras[[0, 3]]` and iteration give Cameras again.

    Raises:
        ValueError: shapes or counts disagree, a rotation is not one, a focal length is not positive, a name occurs twice.
    """

    viewmats: Tensor  # [C, 4, 4] float32
    Ks: Tensor  # [C, 3, 3] float32
    sizes: tuple[tuple[int, int], ...]  # (width, height) per camera
    names: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "viewmats", torch.as_tensor(self.viewmats, dtype=torch.float32))
        object.__setattr__(self, "Ks", torch.as_tensor(self.Ks, dtype=torch.float32))
        object.__setattr__(self, "sizes", tuple((int(w), int(h)) for w, h in self.sizes))
        object.__setattr__(self, "names", tuple(self.names))
        self._validate()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator["Cameras"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Cameras":
        if isinstance(index, Tensor):
            index = (
                torch.nonzero(index)[:, 0].tolist() if index.dtype == torch.bool else index.tolist()
            )
        chosen = range(len(self))[index] if isinstance(index, int | slice) else index
        if isinstance(chosen, int):
            chosen = [chosen]
        rows = [
            range(len(self))[i] for i in chosen
        ]  # negative indices count from the end; outside: IndexError
        at = torch.tensor(rows, dtype=torch.long, device=self.viewmats.device)
        # Rows of valid cameras are valid, unless one is there twice: a training step has no time to look at all else again.
        picked = object.__new__(Cameras)
        object.__setattr__(picked, "viewmats", self.viewmats[at])
        object.__setattr__(picked, "Ks", self.Ks[at])
        object.__setattr__(picked, "sizes", tuple(self.sizes[i] for i in rows))
        object.__setattr__(picked, "names", tuple(self.names[i] for i in rows))
        picked._check_names()
        return picked

    @property
    def width(self) -> int:
        """The common width in pixels; ValueError where the cameras differ."""
        return self._common_size()[0]

    @property
    def height(self) -> int:
        """The common height in pixels; ValueError where the cameras differ."""
        return self._common_size()[1]

    @property
    def centers(self) -> Tensor:
        """Camera centres, world. [C, 3]"""
        return invert_rigid(self.viewmats)[:, :3, 3]

    @property
    def extent(self) -> float:
        """Radius of the rig: the largest distance of a camera from the mean centre, world units; 0 for one camera."""
        if len(self) == 0:
            return 0.0
        centers = self.centers
        return float((centers - centers.mean(0)).norm(dim=-1).max())

    def to(self, device: torch.device | str) -> "Cameras":
        return Cameras(self.viewmats.to(device), self.Ks.to(device), self.sizes, self.names)

    def select(self, names: Sequence[str]) -> "Cameras":
        """Pick cameras by name, in the given order. ValueError for a name that is not there."""
        row_of = {name: row for row, name in enumerate(self.names)}
        missing = [name for name in names if name not in row_of]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(names)} camera names are not among the {len(self)} cameras (first: {missing[0]})."
            )
        return self[[row_of[name] for name in names]]

    @staticmethod
    def cat(parts: Sequence["Cameras"]) -> "Cameras":
        """Join several sets of cameras; names must stay unique."""
        if not parts:
            raise ValueError("Cameras.cat: expected at least one set of cameras, got none.")
        return Cameras(
            viewmats=torch.cat([part.viewmats for part in parts]),
            Ks=torch.cat([part.Ks for part in parts]),
            sizes=sum((part.sizes for part in parts), ()),
            names=sum((part.names for part in parts), ()),
        )

    def scaled(self, scale: float | tuple[int, int]) -> "Cameras":
        """Change the resolution: the same cameras with smaller or larger pixels.

        Args:
            scale: A factor (sizes are rounded to whole pixels), or one new (width, height) for all cameras. Either way K is scaled by
                exactly new size / old size in each direction, so the field of view does not change.
        """
        if isinstance(scale, tuple):
            sizes = tuple(scale for _ in self.sizes)
        else:
            sizes = tuple(
                (max(1, round(w * scale)), max(1, round(h * scale))) for w, h in self.sizes
            )
        factors = [
            [new[0] / old[0], new[1] / old[1], 1.0]
            for new, old in zip(sizes, self.sizes, strict=True)
        ]
        factor = torch.tensor(factors, dtype=torch.float64, device=self.Ks.device).reshape(-1, 3, 1)
        return Cameras(self.viewmats, (self.Ks.double() * factor).float(), sizes, self.names)

    def renamed(self, names: Sequence[str]) -> "Cameras":
        """Give the same cameras other names."""
        return Cameras(self.viewmats, self.Ks, self.sizes, tuple(names))

    def pose_distances(self, other: "Cameras") -> Tensor:
        """Measure how unlike two camera poses are: distance of the centres / rig extent + angle in radians, 1 : 1.

        The extent is that of `other`'s cameras (of both sets together where that is 0), so the measure does not depend on the scene's
        unit; it compares, it is no metre. [len(self), len(other)]
        """
        extent = other.extent
        if extent == 0.0:
            centers = torch.cat([self.centers, other.centers])
            extent = float((centers - centers.mean(0)).norm(dim=-1).max()) or 1.0
        translation = torch.cdist(self.centers.double(), other.centers.double()) / extent
        rotations, other_rotations = (
            self.viewmats[:, :3, :3].double(),
            other.viewmats[:, :3, :3].double(),
        )
        return translation + rotation_angle(rotations[:, None], other_rotations[None])

    def nearest(self, other: "Cameras") -> list[int]:
        """Find for every camera the most alike camera of `other` (see `pose_distances`): indices into `other`."""
        if len(other) == 0:
            raise ValueError("Cameras.nearest: there is no camera to choose from.")
        return self.pose_distances(other).argmin(1).tolist()

    def to_json(self, path: Path | None = None) -> str:
        """Write the cameras as JSON (docs/data_formats.md); returns the text, and writes it atomically to `path` if there is one."""
        entries = [
            {"name": name, "width": size[0], "height": size[1], "K": K, "viewmat": viewmat}
            for name, size, K, viewmat in zip(
                self.names, self.sizes, self.Ks.tolist(), self.viewmats.tolist(), strict=True
            )
        ]
        body = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
        text = (
            f'{{"format": {FORMAT}, "axes": "opencv, world to camera", "cameras": [\n{body}\n]}}\n'
        )
        if path is not None:
            atomic_write_text(path, text)
        return text

    @staticmethod
    def from_json(source: Path | str) -> "Cameras":
        """Read what `to_json` wrote, from a file (Path) or a text (str).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, another format number, or missing keys.
        """
        where = str(source) if isinstance(source, Path) else "cameras JSON"
        if isinstance(source, Path) and not source.is_file():
            raise FileNotFoundError(f"No camera file: {source}.")
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not valid JSON: {error}.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else None
            raise ValueError(
                f"{where} has format {found}. Expected {FORMAT}. Make it again with this version of S2D."
            )
        try:
            entries = content["cameras"]
            return Cameras(
                viewmats=torch.tensor([entry["viewmat"] for entry in entries]).reshape(-1, 4, 4),
                Ks=torch.tensor([entry["K"] for entry in entries]).reshape(-1, 3, 3),
                sizes=tuple((entry["width"], entry["height"]) for entry in entries),
                names=tuple(entry["name"] for entry in entries),
            )
        except KeyError as error:
            raise ValueError(
                f"{where}: a camera has no {error}. Expected name, width, height, K, viewmat."
            ) from error

    def _common_size(self) -> tuple[int, int]:
        distinct = sorted(set(self.sizes))
        if len(distinct) != 1:
            raise ValueError(
                f"The {len(self)} cameras have {len(distinct)} different sizes"
                + (f" ({distinct[0]} … {distinct[-1]})" if distinct else "")
                + ", so they have no common width and height. Take them one by one."
            )
        return distinct[0]

    def _validate(self) -> None:
        count = len(self.names)
        if (
            self.viewmats.shape != (count, 4, 4)
            or self.Ks.shape != (count, 3, 3)
            or len(self.sizes) != count
        ):
            raise ValueError(
                f"Cameras: expected viewmats [{count}, 4, 4], Ks [{count}, 3, 3] and {count} sizes for {count} names, got "
                f"{list(self.viewmats.shape)}, {list(self.Ks.shape)} and {len(self.sizes)}."
            )
        self._check_names()
        if count == 0:
            return
        viewmats, Ks = self.viewmats.detach().double().cpu(), self.Ks.detach().double().cpu()
        finite = torch.isfinite(viewmats).all((1, 2)) & torch.isfinite(Ks).all((1, 2))
        self._require(finite, "has a viewmat or K with non-finite numbers")
        rotations = viewmats[:, :3, :3]
        error = (rotations @ rotations.mT - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
        self._require(
            # float32 storage leaves 1e-7, hand-written or estimated cameras a little more; a scaled or sheared matrix far more
            (error < 1e-3) & (torch.linalg.det(rotations) > 0),
            "has no rotation in viewmat[:3, :3] (must be orthonormal with determinant +1)",
        )
        bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
        self._require(
            (viewmats[:, 3] == bottom).all(1), "must have 0 0 0 1 as the last row of viewmat"
        )
        self._require((Ks[:, 0, 0] > 0) & (Ks[:, 1, 1] > 0), "must have focal lengths > 0")
        self._require((Ks[:, 2] == bottom[1:]).all(1), "must have 0 0 1 as the last row of K")
        self._require(
            torch.tensor([w > 0 and h > 0 for w, h in self.sizes]), "must have width and height > 0"
        )

    def _check_names(self) -> None:
        if len(set(self.names)) != len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(
                f"Cameras: the name {twice!r} occurs more than once. Names must be unique."
            )

    def _require(self, good: Tensor, problem: str) -> None:
        if not bool(good.all()):
            bad = torch.nonzero(~good)[:, 0].tolist()
            raise ValueError(
                f"Cameras: {self.names[bad[0]]} {problem} ({len(bad)} of {len(self)} cameras)."
            )

"""The whole check: read every photo, compare every two, judge."""

from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from s2d.capture.pairs import Pair, compare
from s2d.capture.photos import Capture, Photo, read_photo
from s2d.capture.rules import (
    FEW_PHOTOS,
    LEVELS,
    MANY_PHOTOS,
    Finding,
    judge,
    same_stems,
    unreadable_formats,
)
from s2d.log import progress

MAX_PHOTOS = 200  # every two are compared
MAX_FEATURES, MIN_FEATURES = 2000, 500
PAIRS_WITH_ALL_FEATURES = 1000  # more photos are compared by fewer features each


@dataclass(frozen=True)
class CaptureReport:
    """All that the check found out."""

    root: Path
    names: tuple[str, ...]
    photos: tuple[Photo, ...]  # those that could be read
    pairs: tuple[Pair, ...]  # those that have something in common; rows of `photos`
    findings: tuple[Finding, ...]  # the worst first

    @property
    def good(self) -> bool:
        return not any(finding.level != "note" for finding in self.findings)

    def of(self, name: str) -> list[Finding]:
        """What concerns one photo, the worst first."""
        return [finding for finding in self.findings if name in finding.photos]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; pairs and photos by name."""
        names = [photo.name for photo in self.photos]
        return {
            "folder": str(self.root),
            "good": self.good,
            "findings": [asdict(finding) for finding in self.findings],
            "photos": [
                {
                    "name": photo.name,
                    "size": list(photo.size),
                    "camera": photo.camera or None,
                    "focal_35mm": photo.focal_35mm or None,
                    "blur": round(photo.blur, 3),
                    "features": len(photo.xys),
                }
                for photo in self.photos
            ],
            "pairs": [
                {
                    "photos": [names[pair.a], names[pair.b]],
                    "matches": pair.num_matches,
                    "shift": round(pair.shift, 5),
                    "angle": round(pair.angle, 3),
                    "rotation_share": round(pair.rotation_share, 3),
                    "plane_share": round(pair.plane_share, 3),
                    "stops": None
                    if np.isnan(pair.stops).any()
                    else [round(float(v), 3) for v in pair.stops],
                }
                for pair in self.pairs
            ],
        }


def check_capture(capture: Capture) -> CaptureReport:
    """Read every photo, compare every two, and judge.

    Raises:
        ValueError: More photos than can be compared.
    """
    names = capture.names
    if len(names) > MAX_PHOTOS:
        raise ValueError(
            f"{capture.root} has {len(names)} photos; up to {MAX_PHOTOS} can be checked, and S2D is made for {FEW_PHOTOS} to {MANY_PHOTOS}. "
            "Copy the ones to use into a folder of their own."
        )
    num_pairs = max(1, len(names) * (len(names) - 1) // 2)
    share = min(1.0, (PAIRS_WITH_ALL_FEATURES / num_pairs) ** 0.5)
    max_features = max(MIN_FEATURES, round(MAX_FEATURES * share))
    photos: list[Photo] = []
    findings = unreadable_formats(capture) + same_stems(names)
    with progress(len(names), "photos") as bar:
        for done, name in enumerate(names, start=1):
            try:
                photos.append(read_photo(capture.root / name, name, max_features))
            except (ValueError, OSError) as error:
                findings.append(Finding("unreadable", "problem", (name,), str(error)))
            bar.update(done)
    pairs = []
    with progress(len(photos) * (len(photos) - 1) // 2, "pairs") as bar:
        for done, (a, b) in enumerate(combinations(range(len(photos)), 2), start=1):
            pair = compare(a, b, photos)
            if pair is not None:
                pairs.append(pair)
            bar.update(done)
    findings += judge(photos, pairs)
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return CaptureReport(capture.root, tuple(names), tuple(photos), tuple(pairs), tuple(findings))

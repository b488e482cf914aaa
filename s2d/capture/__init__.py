"""Will these photos do? A check of a capture before anything is trained on it: blur, exposure, overlap, parallax, duplicates.

    report = check_capture(find_photos(folder))

`photos.py` reads each photo once, `pairs.py` compares every two, `rules.py` turns the numbers into verdicts and advice. What
each rule finds and misses on real and on damaged photos: docs/capture.md.
"""

from s2d.capture.photos import Capture, find_photos
from s2d.capture.report import CaptureReport, check_capture
from s2d.capture.rules import Finding

__all__ = ["Capture", "CaptureReport", "Finding", "check_capture", "find_photos"]

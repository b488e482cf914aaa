"""The report: self-contained, complete, and small enough, on pictures and numbers made here."""

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
import torch

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.report import (
    COLUMN_TITLES,
    ReportContent,
    StageRecord,
    TrialsRecord,
    ViewRecord,
    choose_views,
    write_report,
)
from s2d.report.charts import Series, line_chart, seconds_text, short_number
from s2d.report.support import support_overlay
from s2d.sh import rgb_to_sh0
from s2d.stage_io import Manifest
from s2d.strategies.support import LEVELS

NETS = ("lpips_vgg", "lpips_alex")
ADDRESS_ATTRIBUTES = {"src", "href", "data", "poster", "srcset", "action", "xlink:href"}


class PageReader(HTMLParser):
    """Collects what the checks ask for: tags with attributes, and the text of the page without script and style."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert tag in self.open, f"</{tag}> closes nothing"
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text += data

    def all(self, tag, **wanted):
        return [
            a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())
        ]


def metrics(psnr: float) -> dict[str, float]:
    return {
        "psnr": psnr,
        "ssim": psnr / 40,
        "lpips_vgg": 1 - psnr / 40,
        "lpips_alex": 0.9 - psnr / 40,
    }


@pytest.fixture
def make_content(tmp_path):
    def make(
        num_views: int = 5, size: tuple[int, int] = (40, 30), noise: bool = False
    ) -> ReportContent:
        rng = np.random.default_rng(0)

        def picture(name: str):
            path = tmp_path / f"{name}.png"
            value = (
                rng.integers(0, 256, (size[1], size[0], 3))
                if noise
                else np.full((size[1], size[0], 3), rng.integers(0, 256, 3))
            )
            cv2.imwrite(str(path), value.astype(np.uint8))
            return path

        views = []
        for i in range(num_views):
            columns = {column: picture(f"view{i}_{column}") for column in COLUMN_TITLES}
            scores = {
                "stage1": metrics(15.0 + i),
                "fixed": metrics(15.5 + i),
                "stage3": metrics(16.25 + i - (i == 2) * 3),
            }
            views.append(ViewRecord(f"dir/view{i}.png", ("test", "novel"), columns, None, scores))
        mean = {**metrics(17.0), "num_views": num_views}
        names = [view.name for view in views]
        stage = {
            "test": mean,
            "novel": mean,
            "num_gaussians": 12345,
            "seconds": 83.2,
            "peak_rss_mb": 1412.0,
        }
        results = {
            "scene": "fern & <friends>", "protocol": "s2d", "kept": ["a.png", "b.png"], "novel": names, "test": names,
            "stages": {"stage1": stage, "stage2": {**stage, "num_gaussians": None}, "stage3": {**stage, "test": {**metrics(19.0), "num_views": num_views}}},
            "guidance": {"test": {"coverage": 0.75, "psnr_covered": 20.5, "num_views": num_views}, "novel": None},
            "total_seconds": 312.0, "device": "cpu", "version": "0.1.0",
        }  # fmt: skip
        history = {
            "step": [1, 100, 200],
            "loss": [0.3, 0.2, 0.1],
            "num_gaussians": [100, 150, 200],
            "seconds": [0.1, 5, 9],
        }
        stages = [
            StageRecord("stage0", "Stage 0", 30.0, {"points": 20.0}, 900.0, {}, "provider: mvs\n"),
            StageRecord(
                "stage1", "Stage 1", 60.0, {"optimise": 50.0}, 1100.0, history, "num_steps: 200\n"
            ),
        ]
        return ReportContent(
            results, {"a.png": picture("a"), "b.png": picture("b")}, views, stages, {"torch": "2.13.0"}, ("A note.",), "point_cloud/x.ply"
        )  # fmt: skip

    return make


@pytest.fixture
def read(tmp_path):
    def write_and_read(content: ReportContent, **options) -> PageReader:
        path = write_report(tmp_path / "report.html", content, **options)
        return PageReader(path.read_text("utf-8"))

    return write_and_read


def test_the_page_needs_nothing_from_outside(make_content, read, tmp_path):
    page = read(make_content())
    addresses = [
        value
        for _, attributes in page.tags
        for key, value in attributes.items()
        if key in ADDRESS_ATTRIBUTES
    ]
    assert len(addresses) == 5 * 6 + 2  # six pictures of five views, two kept photos
    assert all(value.startswith("data:image/webp;base64,") for value in addresses)
    assert not page.all("link")
    assert not re.search(
        r"https?://|@import|url\(|import\(|fetch\(", (tmp_path / "report.html").read_text("utf-8")
    )


def test_every_view_column_and_number_is_there(make_content, read):
    content = make_content()
    page = read(content)
    sections = page.all("section")
    assert {s["data-name"] for s in sections} == {view.name for view in content.views}
    for view in content.views:
        for column, title in COLUMN_TITLES.items():
            assert len(page.all("img", alt=f"{view.name}: {title}")) == 1
            if column in view.metrics:
                assert f"{view.metrics[column]['psnr']:.2f} dB" in page.text
                assert (
                    f"{view.metrics[column]['lpips_vgg']:.3f} / {view.metrics[column]['lpips_alex']:.3f}"
                    in page.text
                )
    for text in (
        "fern & <friends>",
        "17.00",
        "19.00",
        "+2.00",
        "12,345",
        "1 min 23 s",
        "1.4 GB",
        "75.0%",
        "20.50 dB",
        "5 min 12 s",
    ):
        assert text in page.text, text
    for text in (
        "A note.",
        "num_steps: 200",
        "2.13.0",
        "point_cloud/x.ply",
        "Loss",
        "Number of Gaussians",
        "Peak memory",
    ):
        assert text in page.text, text


def test_views_are_sorted_worst_first_and_the_loss_is_marked(make_content, read):
    page = read(make_content())
    finals = [float(s["data-final"]) for s in page.all("section")]
    assert finals == sorted(finals) and len(finals) == 5
    assert "-1.75 dB" in page.text  # view2 lost
    assert sum(s["data-hero"] == "1" for s in page.all("section")) == 1


def test_pictures_survive_the_embedding(make_content, read):
    content = make_content()
    page = read(content)
    view = content.views[3]
    for column, title in COLUMN_TITLES.items():
        uri = page.all("img", alt=f"{view.name}: {title}")[0]["src"]
        shown = cv2.imdecode(
            np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8), cv2.IMREAD_COLOR
        )
        assert (
            np.abs(shown.astype(int) - cv2.imread(str(view.images[column])).astype(int)).max() <= 4
        )  # flat colour: WebP errs by 2


def test_guidance_holes_are_transparent(make_content, read, tmp_path):
    content = make_content(1)
    mask = np.zeros((30, 40), np.uint8)
    mask[:, 20:] = 255
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    view = content.views[0]
    page = read(
        ReportContent(
            content.results,
            content.kept,
            [ViewRecord(view.name, view.roles, view.images, tmp_path / "mask.png")],
            content.stages,
        )
    )
    uri = page.all("img", alt=f"{view.name}: Guidance")[0]["src"]
    shown = cv2.imdecode(
        np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8), cv2.IMREAD_UNCHANGED
    )
    assert (shown[..., 3] == mask).all()


def test_a_large_run_is_cut_down_and_says_so(make_content, read, tmp_path):
    content = make_content(24, (96, 64), noise=True)
    page = read(content, max_mb=0.4)
    shown = page.all("section")
    assert 2 < len(shown) < 24
    assert (tmp_path / "report.html").stat().st_size < 0.5e6
    assert f"{len(shown)} of 24 views are shown" in page.text
    worst = min(content.views, key=lambda view: view.psnr("stage3"))
    assert worst.name in {s["data-name"] for s in shown}
    for view in content.views:  # the chart still has every view
        assert f"{view.name} · Final" in page.text


def test_choose_views_keeps_the_worst_and_spreads_the_rest(make_content):
    views = make_content(20).views
    chosen = choose_views(views, 6)
    assert len(chosen) == 6
    assert {"dir/view0.png", "dir/view1.png", "dir/view2.png"} <= {view.name for view in chosen}
    assert chosen[-1].name == "dir/view19.png"
    assert [view.name for view in chosen] == [view.name for view in views if view in chosen]


def test_a_run_that_stopped_after_stage_1(make_content, read):
    content = make_content(3)
    results = {
        **content.results,
        "stages": {"stage1": content.results["stages"]["stage1"], "stage2": None, "stage3": None},
        "guidance": None,
    }
    views = [
        ViewRecord(v.name, v.roles, {c: p for c, p in v.images.items() if c in ("truth", "stage1")}, None, {"stage1": v.metrics["stage1"]})
        for v in content.views
    ]  # fmt: skip
    page = read(ReportContent(results, content.kept, views, content.stages))
    assert page.text.count("(not run)") == 2
    assert page.text.count("no final") == 3
    assert len(page.all("section")) == 3


def test_a_scene_without_photos_to_score_still_has_a_page(make_content, read):
    content = make_content(3)
    stage = {**content.results["stages"]["stage1"], "test": None, "novel": None}
    results = {
        **content.results,
        "stages": {"stage1": stage, "stage2": stage, "stage3": stage},
        "guidance": None,
        "test": [],
    }
    views = [
        ViewRecord(v.name, ("novel",), {c: p for c, p in v.images.items() if c != "truth"})
        for v in content.views
    ]
    page = read(ReportContent(results, content.kept, views, content.stages))
    assert len(page.all("section")) == 3
    assert "12,345" in page.text


def test_support_and_the_top_view_are_shown_where_there_are_any(make_content, read):
    content = make_content(3)
    page = read(replace(content, top_view=content.kept["a.png"]))
    assert "Support, what holds the final picture up" in page.text
    assert "made up" in page.text and "Where the views stand" in page.text
    assert page.all("img", alt="cameras from above")[0]["src"].startswith("data:image/webp;base64,")
    assert page.all("img", **{"data-column": "support"})
    for view in content.views:
        del view.images["support"]
    page = read(content)
    assert "Support" not in page.text and "from above" not in page.text
    assert "--columns: 5" in page.all("div", **{"class": "row"})[0]["style"]


def test_support_lies_over_the_render_in_grey():
    """One large opaque Gaussian of known colour: 0.65 of the level's colour and 0.35 of the render's luma."""
    viewmat, K = torch.eye(4)[None], torch.tensor([[[20.0, 0, 8], [0, 20, 8], [0, 0, 1]]])
    camera = Cameras(viewmat, K, ((16, 16),), ("a",))
    gaussians = Gaussians(
        torch.tensor([[0.0, 0.0, 4.0]]),
        torch.full((1, 3), 2.0),
        torch.tensor([[1.0, 0, 0, 0]]),
        torch.tensor([12.0]),
        rgb_to_sh0(torch.tensor([[[0.9, 0.5, 0.1]]])),
        torch.zeros(1, 0, 3),
    )
    for value, (_, colour) in enumerate(LEVELS):
        image = support_overlay(gaussians, torch.tensor([float(value)]), camera)
        luma = 0.299 * 0.9 + 0.587 * 0.5 + 0.114 * 0.1
        expected = 0.99 * (
            0.65 * torch.tensor(colour) + 0.35 * luma
        )  # the rasteriser's largest opacity
        torch.testing.assert_close(image[8, 8], expected, atol=0.01, rtol=0)


def test_trials_are_shown_with_the_decision(make_content, read, tmp_path):
    """What stage 2 wrote down, through the file: before and after of each trial, and why."""
    content = make_content(2)
    assert "Trials" not in read(content).text
    stage2 = tmp_path / "stage2"
    (stage2 / "trials/dir").mkdir(parents=True)
    for picture in ("truth", "render", "fixed", "calibrated"):
        shutil.copy(content.kept["a.png"], stage2 / f"trials/dir/a_{picture}.png")
    trial = {"view": "dir/a<1>.JPG", "name": "dir/a"}
    trial["psnr"] = {"render": 18.2, "fixed": 17.9, "calibrated": 19.4}
    record = {"decision": "fixer on 1 trial: 18.20 → 19.40 dB", "adaptation": None}
    record |= {"failed": {"b.JPG": "why"}, "trials": [trial]}
    (stage2 / "trials.json").write_text(json.dumps(record))
    trials = TrialsRecord.of_manifest(Manifest(stage2, {}))
    page = read(replace(content, trials=trials))
    assert "Fixer on 1 trial: 18.20 → 19.40 dB." in page.text
    assert "No trial of b.JPG" in page.text and "dir/a<1>.JPG" in page.text
    for text in ("18.20 dB", "17.90 dB -0.30 dB", "19.40 dB +1.20 dB"):
        assert text in page.text
    shown = page.all("img", alt="dir/a<1>.JPG: Used")
    assert len(shown) == 1 and shown[0]["src"].startswith("data:image/webp;base64,")
    assert len(page.all("section")) == 2 + 1
    assert TrialsRecord.of_manifest(Manifest(tmp_path, {})) is None


def test_a_broken_picture_is_an_error_that_names_it(make_content, tmp_path):
    content = make_content(1)
    content.views[0].images["fixed"].write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"view0_fixed\.png is not an image"):
        write_report(tmp_path / "report.html", content)
    assert not (tmp_path / "report.html").exists()


def test_line_chart_maps_values_to_the_axes():
    svg = line_chart("t", [Series("s", "s-stage1", [0, 50, 100], [0, 5, 10])], "step")
    points = [
        tuple(map(float, p.split(",")))
        for p in re.search(r'points="([^"]+)"', svg).group(1).split()
    ]
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.1)
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.1)
    assert points[0][1] > points[2][1]  # larger is higher, and SVG's y points down


def test_line_chart_leaves_out_what_is_not_a_number():
    svg = line_chart(
        "t", [Series("s", "c", [1, 2, 3, 4], [0.5, float("nan"), -1.0, 0.1])], "step", log_y=True
    )
    assert len(re.search(r'points="([^"]+)"', svg).group(1).split()) == 2
    assert "nothing was recorded" in line_chart("t", [Series("s", "c", [], [])], "step")
    assert "<polyline" in line_chart("t", [Series("s", "c", [7], [0.25])], "step", log_y=True)


@pytest.mark.parametrize(("seconds", "text"), [(0.42, "0.4 s"), (59.6, "1 min 00 s"), (12, "12 s"), (185, "3 min 05 s"), (3720, "1 h 02 min")])  # fmt: skip
def test_seconds_text(seconds, text):
    assert seconds_text(seconds) == text


def test_short_number():
    assert [short_number(v) for v in (1500, 0.05, 120000, 2e6, 0)] == [
        "1,500",
        "0.05",
        "120k",
        "2M",
        "0",
    ]

"""Training on a GPU without one: no step makes the host wait, the memory plan holds, messages. tests/meta_gpu.py is the GPU."""

import importlib
import re
from dataclasses import replace
from types import SimpleNamespace

import meta_gpu
import pytest
import torch
from meta_gpu import META, HostWaits, no_waiting

from s2d import memory_plan, training
from s2d.cameras import Cameras
from s2d.device import DeviceUnusable, NotEnoughMemory, to_cpu
from s2d.gaussians import Gaussians
from s2d.geometry import look_at
from s2d.layers.foundation import Foundation
from s2d.layers.loop import LayerLoop
from s2d.layers.options import LayerFlags, plan_layers
from s2d.layers.task import LayerTask
from s2d.memory_plan import TrainingMemory
from s2d.optim import LearningRates
from s2d.pairs import fit as fitting
from s2d.refinement import Refinement, RefinementRates
from s2d.renders import render_batches
from s2d.sampling import ViewSampler
from s2d.saved_runs import load_run, save_run
from s2d.scene import load_scene
from s2d.strategies.active import ActiveStrategies
from s2d.strategies.settings import Strategy
from s2d.training import optimise_view, refine_cameras, start_run
from s2d.views import View, views_on

WIDTH, HEIGHT = 40, 30
NAMES = ("a", "b")


@pytest.fixture
def gpu():
    with meta_gpu.meta_gpu() as driver:
        yield driver


def rig(width=WIDTH, height=HEIGHT):
    centers = torch.tensor([[-0.5, -4.0, 0.4], [0.5, -4.0, 0.4]])
    viewmats = look_at(centers, torch.zeros(2, 3), torch.tensor([0.0, 0.0, 1.0]))
    K = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]])
    return Cameras(viewmats, K.expand(2, 3, 3).clone(), ((width, height),) * 2, NAMES)


def gaussians(num=50, degree=2):
    shapes = {"means": (3,), "log_scales": (3,), "quats": (4,), "opacity_logits": ()}
    shapes |= {"sh0": (1, 3), "shN": ((degree + 1) ** 2 - 1, 3)}
    return Gaussians(**{name: torch.zeros(num, *s, device=META) for name, s in shapes.items()})


def source(is_kept, name, size=(WIDTH, HEIGHT)):
    weight = None if is_kept else torch.ones(size[1], size[0], 1)
    return View(rig(*size).select([name]), torch.rand(size[1], size[0], 3), weight)


def on_meta(refinement):
    """What `Refinement(cameras.to(device), …)` makes, which reads the intrinsics first."""
    groups = []
    for name, rate, params in refinement._table():
        params[:] = [p.detach().to(META).requires_grad_(rate > 0) for p in params]
        if rate > 0:
            groups.append({"name": name, "params": params})
    refinement.base = refinement.base.to(META)
    refinement._optimizer = torch.optim.Adam(groups, lr=0.0) if groups else None
    return refinement


class Known:
    """`Evidence` of depths that need no files."""

    def __init__(self):
        self.kept = SimpleNamespace(cameras=rig().to(META))
        picture = torch.ones(HEIGHT, WIDTH, device=META)
        self.depths = {name: (picture, picture) for name in NAMES}
        self.points = torch.zeros(4, 3, device=META)

    def __contains__(self, name):
        return name in NAMES


ALL_REFINED = RefinementRates(1e-3, 1e-3, 1e-3)
EVERYTHING = Strategy(
    dropout=0.2, opacity_decay=0.999, binocular_weight=0.3, binocular_from=0.0, depth_weight=0.1, normal_weight=0.1,
    smooth_weight=0.1, max_scale=0.2, max_elongation=5, scale_weight=0.01, smoothing=True, average_last=1.0, support=True,
)  # fmt: skip
CASES = {
    "plain": (None, None),
    "refined": (None, ALL_REFINED),
    "frozen cameras": (None, RefinementRates()),
    "strategies": (EVERYTHING, ALL_REFINED),
    "dropout": (Strategy(dropout=0.2), None),
    "pearson": (Strategy(depth_weight=0.1, depth_loss="pearson", support=True), None),
    "mcmc": (Strategy(grow="mcmc", scale_weight=0.01), None),
}


def run_of(strategy=None, rates=None, num=50):
    run = start_run(gaussians(num), LearningRates(), 3.0, ViewSampler(NAMES, seed=0), 0)
    if rates is not None:
        run.refinement = Refinement(rig(), 3.0, rates)
        on_meta(run.refinement)
    if strategy is not None:
        run.strategies = ActiveStrategies(strategy, Known(), run.gaussians, 3.0, 100, 0)
    return run


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_step_makes_nobody_wait(gpu, case, resident):
    run, views = run_of(*CASES[case]), views_on(source, META, resident)
    for is_kept, name in ((True, "a"), (True, "b"), (False, "a")):
        views(is_kept, name)  # read and moved on their first use
    if run.strategies is not None:
        run.strategies._variances = torch.zeros(50, device=META)  # of a round, every 100 steps
    if case != "plain":
        run.stand_before(gaussians(9))  # drawn in each view on its first use
        run.backgrounds = dict.fromkeys(NAMES, torch.zeros(HEIGHT, WIDTH, 3, device=META))
    run.step = 7  # a tenth step samples the support
    with no_waiting():
        for is_kept, name in ((True, "a"), (True, "b"), (False, "a")):
            view = views(is_kept, name)
            options = {"ssim_weight": 0.2, "sh_degree": 2, "opacity_weight": 0.01 * is_kept}
            optimise_view(run, view.camera, view.target, gradient_weight=view.weight, **options)
            refine_cameras(run, 0.5)
    assert run.step == 10 and len(run.unread) == 3
    order = [launch.kernel for launch in gpu.launches]
    assert order.count("project_update") + order.count("adam_rows") // 6 == 3
    assert "adam_rows" not in order or case in ("strategies", "mcmc"), "slower than it could be"


def test_a_layers_step_makes_nobody_wait(gpu):
    flags = LayerFlags(layers=(2,), layer_depth_weight=0.5, layer_iters=(1000,))
    (layer,) = plan_layers(flags, 100)
    picture = torch.ones(HEIGHT, WIDTH)
    task = LayerTask(
        flags,
        source,
        rig(),
        None,
        3.0,
        novel=NAMES,
        depth=lambda _: (picture, picture),
        device=META,
    )
    run = run_of()
    run.step = 300  # depth has set in, and this is no round
    loop = LayerLoop(task, layer, run, Foundation.of(run.gaussians, 20, "opacity"), 0)
    loop.flat = torch.zeros(50, 8, 1, dtype=torch.bool, device=META)
    run.sampler.draw = lambda: (True, "a")
    loop.views(True, "a")
    loop._depth_loss("a", 1.0)
    with no_waiting():
        for _ in range(3):
            loop.step(False)
    assert {"rasterize_backward_depth"} <= {launch.kernel for launch in gpu.launches}


WAITS = {
    "number": lambda t: float(t.sum()),
    "truth": lambda t: bool(torch.isfinite(t).all()),
    "rows": lambda t: (t > 0).nonzero(),
    "mask": lambda t: t[t > 0],
    "copy there": lambda t: torch.ones(3).to(t.device),
    "copy into": lambda t: t.copy_(torch.ones(4, 4)),
    "copy back": lambda t: t.cpu(),
    "made there": lambda t: torch.tensor([1.0, 2.0], device=t.device),
    "made like": lambda t: t.new_tensor([1.0, 2.0]),
    "inverse": torch.linalg.inv,
    "equal": lambda t: torch.equal(t, t),
    "two devices": lambda t: t + torch.ones(4, 4),
}


@pytest.mark.parametrize("wait", WAITS)
def test_waiting_is_noticed(gpu, wait):
    with no_waiting(), pytest.raises((HostWaits, RuntimeError, NotImplementedError)):
        WAITS[wait](torch.ones(4, 4, device=META))


def test_a_trials_fit_is_where_it_shall_be(gpu, tiny_scene, monkeypatch):
    """Stereo is made on the CPU; what asks for values, which tensors on the meta device do not have, is left out."""
    views = load_scene(tiny_scene).subset(["view_1.png", "view_3.png", "view_6.png"])
    monkeypatch.setattr(fitting, "stand_backdrop", lambda *_: None)
    monkeypatch.setattr(fitting, "use_strategies", lambda *_, **__: None)
    monkeypatch.setattr(training, "read_losses", lambda _: None)
    settings = fitting.FitSettings(3, max_init_points=200, max_gaussians=300, sh_degree=1)
    moved = []

    def start(points, rgbs, degree):
        assert points.device == rgbs.device == META
        return gaussians(len(points), degree)

    def step(run, camera, target, **options):
        moved.extend((camera.viewmats.device, target.device))
        return optimise_view(run, camera, target, **options)

    monkeypatch.setattr(fitting, "gaussians_from_points", start)
    monkeypatch.setattr(fitting, "optimise_view", step)
    with meta_gpu.LiveBytes():  # it knows how many instances there are
        fitted = fitting.fit(views, settings, 0, (2,), device=META)
    for model in (fitted.gaussians, *fitted.early):
        assert {tensor.device for tensor in model.tensors().values()} == {META}
    assert fitted.cloud.points.device.type == "cpu"
    assert moved == [META] * 6  # camera and photo of three steps
    assert [launch.kernel for launch in gpu.launches].count("project_update") == 3


def test_views_are_moved_once_and_pictures_held_where_they_shall_be(gpu):
    read = []

    def reading(is_kept, name):
        read.append(name)
        return source(is_kept, name)

    assert views_on(reading, torch.device("cpu"), True) is reading
    for resident in (True, False):
        views = views_on(reading, META, resident)
        first, again = views(False, "a"), views(False, "a")
        assert first.camera is again.camera and first.camera.viewmats.device == META
        assert first.target.device == first.weight.device == META
        assert (first.target is again.target) is resident
        assert views(True, "a").weight is None
    assert read == ["a"] * 4


def test_a_photo_that_is_not_finite_is_named_when_it_is_read(gpu):
    def broken(is_kept, name):
        return source(is_kept, name)._replace(target=torch.full((HEIGHT, WIDTH, 3), torch.nan))

    with pytest.raises(ValueError, match=r"target has 3600 non-finite .* \(view b\)\. Check that"):
        views_on(broken, META, True)(True, "b")


def test_a_run_that_was_saved_goes_on_on_another_device(gpu, tmp_path):
    shapes = {name: torch.zeros_like(t, device="cpu") for name, t in gaussians().tensors().items()}
    first = start_run(Gaussians(**shapes), LearningRates(), 3.0, ViewSampler(NAMES, seed=0), 0)
    first.strategies = ActiveStrategies(EVERYTHING, Known(), first.gaussians, 3.0, 100, 0)
    first.strategies.average.add(first.gaussians)
    for group in first.optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    first.optimizer.step()
    save_run(first, tmp_path / "run.pth")
    run = load_run(tmp_path / "run.pth", LearningRates(), ViewSampler(NAMES, seed=0), device=META)
    run.strategies = ActiveStrategies(EVERYTHING, Known(), run.gaussians, 3.0, 100, 0)
    run.strategies.load_state_dict(run.strategy_state)
    run.strategies._variances = torch.zeros(50, device=META)
    run.step = 9
    view = views_on(source, META, True)(True, "a")
    with no_waiting():
        optimise_view(run, view.camera, view.target, ssim_weight=0.2, sh_degree=2)


def test_novel_views_are_drawn_some_at_a_time_on_a_gpu_alone(gpu):
    sizes = [(40, 30)] * 10 + [(20, 30)] * 2
    viewmats, Ks = (torch.eye(n).expand(12, n, n).clone() for n in (4, 3))
    cameras = Cameras(viewmats, Ks, sizes, [f"{k:02d}" for k in range(12)])
    on_cpu = Gaussians(**{name: torch.zeros(t.shape) for name, t in gaussians().tensors().items()})
    for model, lengths in ((gaussians(), [8, 2, 2]), (on_cpu, [1] * 12)):
        batches = list(render_batches(model, cameras))
        assert [len(batch) for batch in batches] == lengths
        assert sum((batch.names for batch in batches), ()) == cameras.names


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("by_autograd", [False, True])
@pytest.mark.parametrize(("num", "size"), [(200_000, (1920, 1080)), (1_000_000, (640, 480))])
def test_the_plan_is_what_a_step_takes(gpu, monkeypatch, num, size, by_autograd):
    """Of the tensors that torch is asked for; INSTANCES per Gaussian is what the plan assumes."""
    monkeypatch.setattr(meta_gpu, "NUM_INSTANCES", memory_plan.INSTANCES * num)
    live = meta_gpu.LiveBytes()
    with live:
        run = run_of(Strategy(scale_weight=0.01) if by_autograd else None, num=num)
        camera = rig(*size)[0].to(META)
        target = torch.zeros(size[1], size[0], 3, device=META)
        for _ in range(2):
            optimise_view(run, camera, target, ssim_weight=0.2, sh_degree=2)
    plan = TrainingMemory(num, 2, [size], by_autograd=by_autograd)
    planned = num * plan.gaussian_bytes + plan.step_bytes + plan.photo_bytes
    print(f"peak {live.peak / planned:.3f} of the plan")
    assert 0.5 * planned < live.peak <= planned


GIB = 2**30
BIG = TrainingMemory(1_000_000, 2, [(640, 480)] * 30, [(640, 480)] * 300)


@pytest.fixture
def memory(monkeypatch):
    """Sets what is free of 8 GiB, in GiB."""

    def set_free(free):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int((free - 1) * GIB), 8 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * GIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * GIB)

    return set_free


def test_photos_stay_on_the_gpu_where_they_fit(memory, caplog):
    caplog.set_level("INFO", "s2d")
    device = torch.device("cuda", 0)
    training, photos = (
        memory_plan.MARGIN * count / GIB
        for count in (1_000_000 * BIG.gaussian_bytes + BIG.step_bytes, BIG.photo_bytes)
    )
    for free, resident in ((training + photos + 0.01, True), (training + photos - 0.01, False)):
        memory(free)
        assert BIG.fit(device, "auto") is resident
        assert BIG.fit(device, "cpu") is False
    assert "up to 1,000,000 Gaussians" in caplog.text and "330 photos (on the GPU)" in caplog.text
    memory(training - 0.01)
    with pytest.raises(
        NotEnoughMemory, match=r"would take .* --max-gaussians (\d+) or --device"
    ) as raised:
        BIG.fit(device, "auto")
    fitting = int(re.search(r"--max-gaussians (\d+)", str(raised.value)).group(1))
    assert 900_000 < fitting < 1_000_000
    assert replace(BIG, max_gaussians=fitting).fit(device, "auto") is False
    memory(1.01)
    with pytest.raises(NotEnoughMemory, match="pass smaller photos or --device cpu"):
        replace(BIG, kept_sizes=[(8000, 8000)]).fit(device, "auto")


def test_on_the_cpu_nothing_is_planned(caplog):
    caplog.set_level("INFO", "s2d")
    assert BIG.fit(torch.device("cpu"), "auto") is False
    assert not caplog.records


# ------------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("stage", ["stage1_3dgs_init", "stage3_3dgs_mixed_opt"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_was_asked_for_by_name_is_no_cpu(stage, tmp_path, caplog):
    script = importlib.import_module(stage)
    for asked, error, words in (
        ("cuda", DeviceUnusable, "--device cuda cannot be used.*--device auto takes it by itself"),
        ("tpu", ValueError, "expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("auto", FileNotFoundError, "stage0"),  # goes on
    ):
        cfg = script.Config(source=tmp_path, model_dir=tmp_path, device=asked)
        with pytest.raises(error, match=words):
            script.main(cfg)


def test_to_cpu_keeps_what_holds_the_tensors():
    tensor = torch.ones(2)
    values = {"a": [tensor, 1, None], 0: (tensor, {"b": "text"})}
    copied = to_cpu(values)
    assert copied["a"][0] is tensor and copied["a"][1:] == [1, None]
    assert copied[0][0] is tensor and copied[0][1] == {"b": "text"}

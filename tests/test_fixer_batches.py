"""Several views through a network at once: the same pictures, as many as memory holds, torch.compile; without a GPU, tests/meta_gpu.py and fakes stand for one."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import meta_gpu
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from meta_gpu import META
from test_fixer_network import SEES_DIFFERENCE, TINY
from tiny_fixer import randomise
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu_fixer
from s2d.fixer import choice, novel_views
from s2d.fixer.choice import FixerChoice, choose_fixer, default_precision
from s2d.fixer.compiling import Compilable
from s2d.fixer.diffusion import DiffusionFixer
from s2d.fixer.interface import Fixer, FixResult, NovelView
from s2d.fixer.judge import Verdict
from s2d.fixer.memory import MOST_VIEWS, out_of_memory, view_bytes, views_that_fit
from s2d.fixer.model_config import COMPACT, FixerConfig
from s2d.fixer.network.model import FixerModel, build_model
from s2d.fixer.network.vae import SkipAutoencoder
from s2d.fixer.network.views import MultiViewUNet
from s2d.fixer.novel_views import RESULTS, Plan, ViewFiles, batches, fix_views
from s2d.fixer.processes import Processes
from s2d.images import read_image, write_image

GPU = torch.device("cuda", 0)
# Of values in [0, 1], between views in one pass and each by itself; measured 9e-7 at most.
SAME = 5e-6
PAINTS = replace(TINY, residual=False)  # the whole image, as difix does


def views_of(count, height=21, width=34, num_references=1, seed=0):
    """Views of one size, with references of which neighbours share some."""
    generator = torch.Generator().manual_seed(seed)
    photos = [torch.rand(30, 40, 3, generator=generator) for _ in range(count + num_references)]
    found = []
    for number in range(count):
        rendered, guidance = torch.rand(2, height, width, 3, generator=generator)
        mask = (torch.rand(height, width, 1, generator=generator) > 0.5).float()
        references = photos[number // 2 : number // 2 + num_references]
        found.append(NovelView(rendered, guidance, mask, tuple(references)))
    return found


def fixer_of(config=PAINTS, **settings):
    return DiffusionFixer(randomise(build_model(config), 0), **settings)


def farthest(results, others):
    """The largest difference of any pixel."""
    return max(
        float((getattr(one, part) - getattr(other, part)).abs().max())
        for one, other in zip(results, others, strict=True)
        for part in RESULTS
    )


# --------------------------------------------------------------------------------------------------------- the same pictures


@pytest.mark.parametrize("settings", [{}, {"tile_size": 64}, {"network_size": 64}])
@pytest.mark.parametrize("config", [TINY, SEES_DIFFERENCE, PAINTS])
def test_views_together_are_what_they_are_alone(config, settings):
    fixer = fixer_of(config, **settings)
    views = views_of(3, 40, 90, num_references=2)
    together = fixer.fix_together(views)
    alone = [fixer.fix(*view) for view in views]
    assert farthest(together, alone) < SAME
    for result in together:
        assert all(getattr(result, part).shape[:2] == (40, 90) for part in RESULTS)
    assert farthest(together[:1], alone[1:2]) > 0.1, "views must differ for this to say anything"


def test_views_without_guidance_are_left_as_they_are_among_others():
    fixer = fixer_of(SEES_DIFFERENCE)
    views = views_of(3)
    views[1] = views[1]._replace(coverage_mask=torch.zeros(21, 34, 1))
    together = fixer.fix_together(views)
    assert torch.equal(together[1].fixed, views[1].rendered)
    assert bool((together[1].confidence == 1).all())
    assert farthest(together, [fixer.fix(*view) for view in views]) < SAME
    assert not torch.equal(together[2].fixed, views[2].rendered)


def test_a_photo_that_views_share_is_encoded_once(monkeypatch):
    fixer, encoded = fixer_of(), []
    encode = fixer.model.encode_photos
    monkeypatch.setattr(fixer.model, "encode_photos", lambda p: (encoded.append(1), encode(p))[1])
    fixer.fix_together(views_of(4, num_references=2))  # photos 0 and 1, 0 and 1, 1 and 2, 1 and 2
    assert len(encoded) == 3


def test_views_that_do_not_go_together_are_refused():
    views = views_of(2)
    with pytest.raises(ValueError, match=r"fix_together: rendered must be \[H, W, 3\] with H=21"):
        fixer_of().fix_together([views[0], *views_of(1, 22)])
    assert views[0].goes_with(views[1])
    assert not views[0].goes_with(views_of(1, 22)[0])
    assert not views[0].goes_with(views_of(1, num_references=2)[0])


@pytest.mark.parametrize("config", [PAINTS, SEES_DIFFERENCE])
@pytest.mark.parametrize("settings", [{}, {"tile_size": 64, "precision": "bf16"}, {"network_size": 64}])  # fmt: skip
def test_all_of_a_pass_is_on_the_device(config, settings):
    """A tensor of the CPU among those of a GPU is an error, on the meta device as well."""
    with meta_gpu.meta_gpu():
        fixer = DiffusionFixer(build_model(config), META, **settings)
        pairs = fixer._run(views_of(3, 40, 90, num_references=2))
    assert [image.shape for pair in pairs for image in pair] == [(40, 90, 3)] * 6
    assert all(image.device == META and image.dtype == torch.float32 for p in pairs for image in p)


# --------------------------------------------------------------------------------------------------------------- memory


class NoSoftmax(TorchDispatchMode):
    """Attention that is written out instead of left to `scaled_dot_product_attention` needs a softmax."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "softmax" not in str(function), function
        return function(*args, **(kwargs or {}))


def sized(network):
    """A network of its real size on the meta device."""
    config = COMPACT
    if network != "compact":
        config = FixerConfig(gpu_fixer.UNET, gpu_fixer.VAE, gpu_fixer.SCHEDULER)
    with META:
        unet = MultiViewUNet(**config.unet)
        vae = SkipAutoencoder(config.skip_gamma, config.skip_init, **config.vae)
    prompt = torch.zeros(77, config.unet["cross_attention_dim"])
    model = FixerModel(config, unet, vae, prompt)
    return model.to(META, torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.parametrize("network", gpu_fixer.NETWORKS)
def test_what_a_view_takes_and_all_attention_is_torchs_own(network, monkeypatch):
    """Counted with attention that keeps no matrix of all pairs, which is what `scaled_dot_product_attention` has on a GPU."""
    attended = []

    def attention(query, key, value, **_):
        attended.append(query.shape)
        return torch.empty_like(query)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    model = sized(network)
    height, width = 384, 512
    peaks = {}
    for count in (1, 3):
        shown = torch.zeros(count, 7 if model.config.difference else 3, height, width)
        live = meta_gpu.LiveBytes()
        with torch.no_grad():
            photo = torch.zeros(count, 3, height, width).to(META, torch.bfloat16)
            latents = model.encode_photos(photo)[:, None]
            attended.clear()
            with live, NoSoftmax():
                model.repair(shown.to(META, torch.bfloat16), latents)
        peaks[count] = live.peak
    layers = [name for name, layer in model.named_modules() if isinstance(layer, Attention)]
    assert len(attended) == len(layers) > 3
    taken = (peaks[3] - peaks[1]) / 2  # weights, which the first pass counts too, cancel out
    planned = view_bytes(model, height * width, torch.bfloat16)
    assert 0.8 * planned < taken <= planned  # measured: 0.93 and 0.92


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free, of which torch's allocator holds some."""

    def set_free(count):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (count - 300, 10**12))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1300)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)

    return set_free


def test_half_of_the_free_memory_decides_how_many_views(free):
    model = build_model(TINY)
    one = view_bytes(model, 64 * 96, torch.float32)
    assert one == 8 * 8 * 64 * 96 * 4  # 8 numbers, 8 channels
    assert view_bytes(model, 64 * 96, torch.bfloat16) == one // 2
    for count, expected in ((0, 1), (1.9, 1), (2, 1), (6, 3), (7.9, 3), (100, MOST_VIEWS)):
        free(int(count * one) + (count > 0))
        assert views_that_fit(model, 64 * 96, torch.float32, GPU) == expected
    assert views_that_fit(model, 1, torch.float32, torch.device("cpu")) == 1


def test_a_view_counts_with_the_pixels_of_its_tiles(free):
    fixer = fixer_of(tile_size=64)
    one = view_bytes(fixer.model, 64 * 64, torch.float32)
    assert fixer.views_at_once(200, 300) == 1, "on a CPU"
    for settings, size, expected in (
        ({"tile_size": 64}, (200, 300), 4),
        ({"tile_size": 64}, (200, 32), 8),
        ({"network_size": 64}, (200, 300), 4),
        ({"network_size": 128}, (10, 10), 1),
    ):
        fixer = fixer_of(**settings)
        fixer.device = GPU
        free(8 * one)
        assert fixer.views_at_once(*size) == expected
        free(0)
        assert fixer.views_at_once(*size) == expected, "it must not change from view to view"


def short_of_memory(fixer, most, monkeypatch):
    """Let the network run out of memory with more than `most` views. Returns the sizes of all tries."""
    tries, repair = [], fixer.model.repair

    def limited(shown, latents):
        tries.append(len(shown))
        if len(shown) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return repair(shown, latents)

    monkeypatch.setattr(fixer, "_repair", Compilable(limited, compiled=False))
    return tries


def test_too_little_memory_halves_the_batch(monkeypatch, caplog):
    caplog.set_level("INFO", "s2d")
    fixer, views = fixer_of(), views_of(7)
    expected = [fixer.fix(*view) for view in views]
    tries = short_of_memory(fixer, 2, monkeypatch)
    assert farthest(fixer.fix_together(views), expected) < SAME
    assert tries == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert fixer.views_at_once(21, 34) == 1, "it is remembered"
    assert "too little memory for 7 views at once: 3 from here on" in caplog.text
    tries.clear()
    fixer.fix_together(views[:2])
    assert tries == [2]
    short_of_memory(fixer, 0, monkeypatch)
    with pytest.raises(ValueError, match=r"Not enough memory on cpu for a view of 34x21.*bf16"):
        fixer.fix_together(views)


def test_another_error_is_no_lack_of_memory(monkeypatch):
    fixer, tries = fixer_of(), []

    def fail(shown, latents):
        tries.append(len(shown))
        raise RuntimeError("size of tensor a (2) must match")

    monkeypatch.setattr(fixer, "_repair", Compilable(fail, compiled=False))
    with pytest.raises(RuntimeError, match="size of tensor"):
        fixer.fix_together(views_of(4))
    assert tries == [4]
    for words in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "not enough memory: you"):
        assert out_of_memory(RuntimeError(words))


# -------------------------------------------------------------------------------------------------------------- compiling


def compiled_fixer(monkeypatch, at_once, compile):
    """A fixer whose network is compiled by `compile`, and that takes so many views at once."""
    monkeypatch.setattr(torch, "compile", compile)
    fixer = fixer_of(compiled=True)
    fixer._at_once[21, 34] = at_once
    return fixer


def test_a_graph_is_made_for_one_number_of_views(monkeypatch):
    made, shapes = [], []

    def compile(function, dynamic):
        made.append(dynamic)
        return lambda *tensors: (shapes.append(tensors[0].shape), function(*tensors))[1]

    fixer, views = compiled_fixer(monkeypatch, 3, compile), views_of(5)
    results = fixer.fix_together(views[:3]) + fixer.fix_together(views[3:])
    assert made == [False] and set(shapes) == {(3, 3, 24, 40)} and len(shapes) == 2
    assert farthest(results, [fixer_of().fix(*view) for view in views]) < SAME


def test_torchs_own_compiler_takes_the_network(monkeypatch):
    """Traced as for a GPU, in one graph without breaks; run without inductor, which takes minutes."""
    compile = torch.compile
    fixer = compiled_fixer(
        monkeypatch, 2, lambda f, **flags: compile(f, backend="eager", fullgraph=True, **flags)
    )
    views = views_of(2)
    results = fixer.fix_together(views)
    assert fixer._repair.compiled, "it fell back"
    assert farthest(results, [fixer_of().fix(*view) for view in views]) < SAME


def test_without_a_compiler_one_warning_and_the_same_pictures(monkeypatch, caplog):
    def compile(function, dynamic):
        def fail(*_):
            raise RuntimeError("Cannot find a working triton installation.\nMore about that.")

        return fail

    fixer, views = compiled_fixer(monkeypatch, 4, compile), views_of(3)
    expected = [fixer_of().fix(*view) for view in views]
    for _ in range(2):
        assert farthest(fixer.fix_together(views), expected) < SAME
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage() == (
        "--compile: torch.compile does not work here (Cannot find a working triton installation.). Going on without it."
    )


def test_a_graph_that_runs_out_of_memory_is_still_one(monkeypatch):
    shapes = []

    def compile(function, dynamic):
        def limited(*tensors):
            shapes.append(len(tensors[0]))
            if len(tensors[0]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return function(*tensors)

        return limited

    fixer = compiled_fixer(monkeypatch, 8, compile)
    assert len(fixer.fix_together(views_of(1))) == 1
    assert shapes == [8, 4] and fixer._repair.compiled
    assert len(fixer.fix_together(views_of(6))) == 6
    assert shapes == [8, 4, 6, 3, 3]


def test_compiling_is_for_gpus_and_for_many_views(monkeypatch, caplog, tmp_path):
    made = []
    monkeypatch.setattr(choice, "load_compact_fixer", lambda *_, **flags: made.append(flags))
    weights = tmp_path / "w.safetensors"
    weights.touch()
    chosen = choose_fixer("compact", {"weights": weights, "compile": True})
    assert "compile" not in chosen.with_precision("fp32", "cpu").inputs(), "no other pictures"
    chosen.load("cpu")
    assert not caplog.records
    chosen.load("cpu", few=False)
    assert "--compile: no effect on cpu, only on a GPU" in caplog.text
    monkeypatch.setattr(choice, "usable_device", lambda *_: GPU)
    monkeypatch.setattr(choice, "default_precision", lambda _: "bf16")
    chosen.load("cuda")
    chosen.load("cuda", few=False)
    assert [flags["compiled"] for flags in made] == [False, False, False, True]
    with pytest.raises(ValueError, match="--compile: no effect with the analytic fixer"):
        choose_fixer("analytic", {"compile": True})


# -------------------------------------------------------------------------------------------------------------- precision


@contextmanager
def no_device(_):
    yield


def test_a_gpu_that_computes_in_bf16_does(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", no_device)
    asked = []
    for supported, expected in ((True, "bf16"), (False, "fp32")):

        def is_supported(including_emulation=True, supported=supported):
            asked.append(including_emulation)
            return supported

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
        assert default_precision(GPU) == expected
    assert asked == [False, False], "emulated, it is slower than fp32"
    assert default_precision(torch.device("cpu")) == "fp32"


def test_the_precision_is_known_work_s_else_the_devices(monkeypatch):
    monkeypatch.setattr(choice, "default_precision", lambda _: "bf16")
    compact = FixerChoice("compact", "", {"precision": None})
    assert compact.with_precision(None, "cpu").settings["precision"] == "bf16"
    assert compact.with_precision("nonsense", "cpu").settings["precision"] == "bf16"
    assert compact.with_precision("fp32", "no device").settings["precision"] == "fp32"
    given = FixerChoice("compact", "", {"precision": "fp16"})
    assert given.with_precision("fp32", "no device") is given
    analytic = FixerChoice("analytic", "", {})
    assert analytic.with_precision(None, "no device") is analytic


# ------------------------------------------------------------------------------------------------------- the loop of stage 2


class Brightens(Fixer):
    """Takes three views at once and does what can be seen."""

    def __init__(self):
        self.batches = []

    def fix(self, rendered, guidance, coverage_mask, reference):
        return FixResult((rendered + 0.2).clamp(max=1), coverage_mask, coverage_mask)

    def views_at_once(self, height, width):
        return 3

    def fix_together(self, views):
        self.batches.append(len(views))
        return super().fix_together(views)


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Eight views on disk, the plan to fix them, and the fixer that is used."""
    photo = write_image(tmp_path / "photo.png", torch.zeros(8, 8, 3))
    views = {}
    for number in range(8):
        size = (10, 12) if number < 5 else (12, 10)
        name = f"{number}.png"
        paths = [
            write_image(tmp_path / folder / name, torch.full((*size, 3), value))
            for folder, value in (("renders", number / 20), ("guidance", 0.5))
        ]
        views[name] = ViewFiles(*paths, None, (photo,) * (2 if number == 7 else 1))
    for part in RESULTS:
        (tmp_path / "out" / part).mkdir(parents=True)
    fixer = Brightens()
    monkeypatch.setattr(novel_views, "usable_fixer", lambda *_: fixer)
    return Plan(Verdict(None), views, 0, tmp_path / "out"), fixer


def written(plan, part="fixed"):
    return sorted(path.name for path in (plan.folder / part).iterdir() if path.is_file())


def test_neighbours_of_one_size_and_number_of_references_go_together(planned):
    plan, fixer = planned
    found = [list(batch) for batch in batches(plan.views.items(), fixer)]
    assert found == [[f"{n}.png" for n in row] for row in ((0, 1, 2), (3, 4), (5, 6), (7,))]
    fixer.views_at_once = lambda *_: 1
    assert [len(batch) for batch in batches(plan.views.items(), fixer)] == [1] * 8


def test_a_view_is_fixed_before_the_next_is_read_where_one_goes_at_a_time(planned):
    plan, fixer = planned
    fixer.views_at_once = lambda *_: 1
    plan.views["1.png"].rendered.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png"):
        fix_views(plan, Processes(), "cpu")
    assert all(written(plan, part) == ["0.png"] for part in RESULTS)


def test_the_loop_writes_what_the_fixer_makes(planned):
    plan, fixer = planned
    fix_views(plan, Processes(), "cpu")
    assert fixer.batches == [3, 2, 2, 1]
    for number in range(8):
        fixed = read_image(plan.folder / "fixed" / f"{number}.png")
        assert (
            float((fixed - (number / 20 + 0.2)).abs().max()) <= 0.501 / 255 * 2
        )  # read and written in 8 bits
        assert all((plan.folder / part / f"{number}.png").is_file() for part in RESULTS)


def test_a_view_that_cannot_be_written_loses_no_other(planned):
    plan, fixer = planned
    (plan.folder / "mask/1.png").mkdir()  # nothing can be written there
    with pytest.raises(OSError):
        fix_views(plan, Processes(), "cpu")
    others = {"0.png", "2.png"}  # of the batch in work; it may be noticed one batch later
    assert others <= set(written(plan)) and others <= set(written(plan, "mask"))
    assert others <= set(written(plan, "confidence"))
    assert fixer.batches[0] == 3


def test_an_interruption_costs_the_batch_in_work(planned):
    plan, fixer = planned
    together = fixer.fix_together

    def stopped(views):
        if len(fixer.batches) == 1:
            raise KeyboardInterrupt
        return together(views)

    fixer.fix_together = stopped
    with pytest.raises(KeyboardInterrupt):
        fix_views(plan, Processes(), "cpu")
    todo = novel_views.unfinished_views(plan.views, plan.folder)
    assert written(plan) == ["0.png", "1.png", "2.png"] and len(todo) == 5


def test_a_refused_fixer_takes_a_view_at_a_time():
    off = SimpleNamespace(is_used=False)
    assert novel_views.CalibratedFixer(None, off).views_at_once(10, 10) == 1
    used = SimpleNamespace(is_used=True)
    assert novel_views.CalibratedFixer(Brightens(), used).views_at_once(10, 10) == 3

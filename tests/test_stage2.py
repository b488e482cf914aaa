"""Stage 2 with networks: which fixer it takes, what it refuses, resuming view by view, several processes; tiny models on random pictures."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plane_scene import write_plane_scene
from test_fixer_network import TINY
from tiny_fixer import randomise, save_base, tiny_unet, tiny_vae

import stage0_point_guidance
import stage2_artifact_fix
from s2d.config import parse_config, run_script
from s2d.fixer import choice, novel_views
from s2d.fixer.choice import DEFAULTS, choose_fixer, usable_device
from s2d.fixer.diffusion import DiffusionFixer, load_compact_fixer, to_network
from s2d.fixer.network.compact import METADATA_KEY, save_compact
from s2d.fixer.network.model import build_model
from s2d.fixer.processes import Processes
from s2d.images import read_image, write_image
from s2d.stage_io import require_stage

ROOT = Path(__file__).resolve().parent.parent
NAMES = [f"{number}.png" for number in range(9)]
KEPT = (0, 4, 8)
NOVEL = [name for row, name in enumerate(NAMES) if row not in KEPT]


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A tiny compact model with random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return save_compact(randomise(build_model(TINY), 0), path, torch.float32)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny diffusion base."""
    folder = tmp_path_factory.mktemp("base")
    return save_base(folder, tiny_unet(), tiny_vae(skips=True), difix=True)


@pytest.fixture
def released(tmp_path) -> Path:
    """The folders of the released commands, with random pictures: no scene, no stage 0, no stage 1."""
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        write_image(tmp_path / "images" / name, torch.rand(30, 44, 3, generator=generator))
    for name in NOVEL:
        for folder in ("renders", "guidance"):
            write_image(tmp_path / folder / name, torch.rand(24, 40, 3, generator=generator))
        mask = torch.rand(24, 40, 1, generator=generator) > 0.3
        write_image(tmp_path / "coverage" / name, mask.float())
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/image_names.txt").write_text("\n".join(NAMES) + "\n")
    (tmp_path / "meta/train_indices.txt").write_text("\n".join(map(str, KEPT)) + "\n")
    return tmp_path


def command(folder, out, *flags):
    return [
        "-m", str(folder / out),
        "--stage1_meta_dir", str(folder / "meta"), "--input_image_dir", str(folder / "images"),
        "--stage1_novel_render_dir", str(folder / "renders"),
        "--point_guidance_dir", str(folder / "guidance"),
        *map(str, flags),
    ]  # fmt: skip


def run(folder, *flags, out="out"):
    argv = command(folder, out, *flags)
    return stage2_artifact_fix.main(
        parse_config(stage2_artifact_fix.Config, "stage2_artifact_fix", argv)
    )


def pictures(stage_dir):
    """Bytes by name; hidden files too, since none may be left."""
    found = [path for path in stage_dir.rglob("*") if path.is_file()]
    return {
        path.relative_to(stage_dir).as_posix(): path.read_bytes()
        for path in found
        if path.suffix not in (".json", ".yaml")
    }


def refusal(folder, *flags):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(folder, *flags)
    assert not (folder / "out/stage2").exists() and not (folder / "out/stage2.partial").exists()
    text = str(caught.value)
    assert "\n" not in text and text[-1] in ".?"
    return text


# ------------------------------------------------------------------------------------------------------------ the choice


def test_the_weights_choose_the_fixer(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "SHIPPED_WEIGHTS", tmp_path / "none.safetensors")
    assert choose_fixer(None, {}).name == "analytic"
    assert choose_fixer(None, {"guidance_share": 0.0, "match_gain": True}).settings == {
        "guidance_share": 0.0,
        "mode": "mask",
        "feather": 1.5,
        "match_gain": True,
    }
    assert choose_fixer(None, {"weights": weights}).settings == {
        **DEFAULTS["compact"],
        "weights": weights,
    }
    # The released command names the base and the checkpoint, and no fixer.
    chosen = choose_fixer(None, {"base_model_path": "a/b", "stage2_checkpoint": weights})
    assert chosen.name == "difix" and chosen.settings["base_model_path"] == "a/b"
    with pytest.raises(FileNotFoundError, match=r"no compact weights: no file .*Give --weights"):
        choose_fixer("compact", {})
    monkeypatch.setattr(choice, "SHIPPED_WEIGHTS", weights)
    assert choose_fixer(None, {}).name == "compact"
    assert choose_fixer(None, {}).settings["weights"] == weights
    assert choose_fixer("analytic", {"feather": 0.0}).name == "analytic"
    assert choose_fixer(None, {"stage2_checkpoint": weights}).name == "difix"


@pytest.mark.skipif(not choice.SHIPPED_WEIGHTS.is_file(), reason="this checkout has no weights")
def test_the_shipped_weights_repair_what_the_guidance_contradicts_and_little_else():
    """A photo of the demo with a grey floater in it, and the same photo as guidance with holes."""
    assert choice.SHIPPED_WEIGHTS.stat().st_size < 20e6
    fixer = choose_fixer("compact", {}).load()
    photos = sorted((ROOT / "demo/study/images").iterdir())
    photo, reference = (read_image(path)[80:336, 120:504] for path in photos[:2])
    holes = torch.zeros(256, 384, 1)
    holes[:, ::48] = holes[::32] = 1.0
    guidance = photo * (1 - holes)
    rendered = photo.clone()
    rendered[60:120, 100:180] = 0.6 * rendered[60:120, 100:180] + 0.4 * 0.5
    result = fixer.fix(rendered, guidance, 1 - holes, reference)
    error_before, error_after = (
        (image - photo).abs().mean(-1) for image in (rendered, result.fixed)
    )
    floater = (slice(64, 116), slice(104, 176))
    assert error_after[floater].mean() < 0.8 * error_before[floater].mean()  # measured 0.71
    untouched = error_after[140:].square().mean().sqrt()
    assert untouched < 0.02  # measured 0.005


def test_the_shipped_file_lies_in_the_package():
    assert choice.SHIPPED_WEIGHTS == ROOT / "s2d/fixer/weights/compact.safetensors"
    documented = (ROOT / "docs/fixer.md").read_text()
    assert "`s2d/fixer/weights/compact.safetensors`" in documented


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("analytic", {"tile_size": 512}, "--tile-size: no effect with the analytic fixer"),
        ("compact", {"guidance_share": 0.0}, "--guidance-share: no effect .*--fixer analytic"),
        ("compact", {"network_size": 512}, "--network-size: no effect .*--fixer difix"),
        ("difix", {"weights": "x", "match_gain": True}, "--weights and --match-gain: no effect"),
        (None, {"precision": "bf16"}, r"analytic fixer \(the default.*--fixer compact or difix"),
        (None, {"weights": "x", "base_model_path": "y"}, "Give one kind"),
        ("analytic", {"guidance_share": 1.5}, r"guidance_share must be in \[0.0, 1.0\], got 1.5"),
        ("analytic", {"feather": -1.0}, "feather must be >= 0"),
        ("difix", {"tile_size": 8}, "tile_size must be >= 64"),
        ("difix", {"num_references": 0}, "num_references must be >= 1"),
        ("compact", {"weights": Path("nowhere")}, "--weights: no file nowhere. Give one that"),
        ("difix", {"stage2_checkpoint": Path("no")}, "--stage2-checkpoint: no file no"),
    ],
)
def test_flags_without_effect_and_bad_values_are_refused(name, flags, words, monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "SHIPPED_WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        choose_fixer(name, flags)


def test_devices():
    assert usable_device("cpu") == torch.device("cpu")
    for name in ("gpu", "meta:x", "cuda:63"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used.*--device cpu"):
            usable_device(name)


# ------------------------------------------------------------------------------------------------------------ what it makes


def test_the_pictures_are_the_fixers(released, weights):
    out = run(released, "--weights", weights, "--num-references", 2)
    fixer = load_compact_fixer(weights)
    for name in NOVEL:
        row = int(name[0])
        nearest = sorted(KEPT, key=lambda kept, row=row: abs(kept - row))[:2]
        coverage = (read_image(released / "coverage" / name)[..., :1] > 0.5).float()
        images = [read_image(released / folder / name) for folder in ("renders", "guidance")]
        photos = [read_image(released / "images" / NAMES[kept]) for kept in nearest]
        expected = fixer.fix(*images, coverage, photos)
        for part in ("fixed", "mask", "confidence"):
            got = read_image(out / part / name)[..., : getattr(expected, part).shape[-1]]
            # 8 bits: half a step.
            assert (got - getattr(expected, part)).abs().max() <= 0.501 / 255, (part, name)
    manifest = require_stage(released / "out", "stage2")
    assert manifest.info == {"num_views": len(NOVEL), "fixer": "compact"}
    one = run(released, "--weights", weights, out="one")
    assert pictures(one) != pictures(out)


def test_several_references_are_the_models_views():
    model = randomise(build_model(TINY), 0)
    generator = torch.Generator().manual_seed(0)
    rendered, guidance, *photos = torch.rand(5, 32, 48, 3, generator=generator)
    mask = (torch.rand(32, 48, 1, generator=generator) > 0.5).float()
    network = [to_network(image) for image in (rendered, guidance, *photos)]
    with torch.no_grad():
        expected = model(*network[:2], mask.permute(2, 0, 1)[None], torch.stack(network[2:], 1))
    expected = (expected[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    fixer = DiffusionFixer(model)
    assert torch.allclose(fixer.fix(rendered, guidance, mask, photos).fixed, expected, atol=1e-5)
    assert torch.equal(
        fixer.fix(rendered, guidance, mask, photos[:1]).fixed,
        fixer.fix(rendered, guidance, mask, photos[0]).fixed,
    )
    with pytest.raises(ValueError, match="there is no reference photo"):
        fixer.fix(rendered, guidance, mask, [])


def test_references_are_the_nearest_cameras(tmp_path):
    """The cameras of this scene stand in a row, without rotation: near is near in that row."""
    scene, out = write_plane_scene(tmp_path / "scene"), tmp_path / "out"
    argv = ["-s", str(scene), "-m", str(out), "--keep-indices", "0,2,5"]
    stage0_point_guidance.main(
        parse_config(stage0_point_guidance.Config, "stage0_point_guidance", argv)
    )
    cfg = stage2_artifact_fix.Config(model_dir=out)
    names = ["view_1.png", "view_3.png", "view_4.png"]
    stage0 = stage2_artifact_fix.Stage0.of(cfg, out)
    found = stage2_artifact_fix.nearest_references(cfg, out, stage0, names, 2)
    assert [[path.name for path in found[name]] for name in names] == [
        ["view_0.png", "view_2.png"],
        ["view_2.png", "view_5.png"],
        ["view_5.png", "view_2.png"],
    ]
    found = stage2_artifact_fix.nearest_references(cfg, out, stage0, names, 9)
    assert len(found["view_1.png"]) == 3


def test_new_weights_are_other_inputs(released, weights, monkeypatch):
    copy = released / "weights.safetensors"
    copy.write_bytes(weights.read_bytes())
    run(released, "--weights", copy)
    with monkeypatch.context() as patch:
        patch.setattr(
            DiffusionFixer, "fix_together", pytest.fail
        )  # up to date: nothing is computed
        run(released, "--weights", copy)
        run(released, "--fixer", "compact", "--weights", copy, "--precision", "fp32")
    before = pictures(released / "out/stage2")
    save_compact(randomise(build_model(TINY), 1), copy, torch.float32)
    with pytest.raises(ValueError, match=r"the content of weights changed.*--overwrite"):
        run(released, "--weights", copy)
    with pytest.raises(ValueError, match="precision: fp32, now bf16"):
        run(released, "--weights", copy, "--precision", "bf16")
    assert pictures(released / "out/stage2") == before
    run(released, "--weights", copy, "--overwrite")
    assert pictures(released / "out/stage2") != before


def test_another_device_makes_nothing_stale(released, weights, monkeypatch):
    """The precision is an input; the device, which decides it where no flag does, is none."""
    flags = ["--weights", weights]

    def precision():
        return require_stage(released / "out", "stage2").data["inputs"]["precision"]["value"]

    def write_one(write, folder, results):
        write_results(write, folder, results)
        raise KeyboardInterrupt

    write_results = novel_views.write_results
    monkeypatch.setattr(choice, "default_precision", lambda _: "bf16")  # as on a GPU
    with monkeypatch.context() as patch:
        patch.setattr(novel_views, "write_results", write_one)
        with pytest.raises(KeyboardInterrupt):
            run(released, *flags)
    monkeypatch.setattr(choice, "default_precision", lambda _: "fp32")  # and from here on not
    run(released, *flags)
    assert precision() == "bf16", "what was begun goes on"
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionFixer, "fix_together", pytest.fail)
        for more in ((), ("--precision", "bf16"), ("--compile",)):
            run(released, *flags, *more)  # up to date
    with pytest.raises(ValueError, match="precision: bf16, now fp32"):
        run(released, *flags, "--precision", "fp32")
    run(released, *flags, "--overwrite")
    assert precision() == "fp32", "what is made anew has the default"
    with pytest.raises(ValueError, match="precision: fp32, now bf16"):
        run(released, *flags, "--precision", "bf16")


def test_shipped_weights_are_the_default(released, weights, monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "SHIPPED_WEIGHTS", tmp_path / "none.safetensors")
    run(released)
    assert require_stage(released / "out", "stage2").info["fixer"] == "analytic"
    monkeypatch.setattr(choice, "SHIPPED_WEIGHTS", weights)
    with pytest.raises(ValueError, match="fixer: analytic, now compact"):
        run(released)
    run(released, "--overwrite")
    assert require_stage(released / "out", "stage2").info["fixer"] == "compact"
    assert pictures(released / "out/stage2") == pictures(
        run(released, "--weights", weights, out="named")
    )


def test_the_released_command_with_a_base_and_a_checkpoint(released, base):
    checkpoint = released / "model_final.pkl"
    torch.save({"state_dict_unet": tiny_unet(seed=5).state_dict()}, checkpoint)
    flags = ["--base-model-path", base, "--network-size", 64]
    plain = pictures(run(released, *flags, out="plain"))
    trained = pictures(run(released, *flags, "--stage2-checkpoint", checkpoint))
    assert plain.keys() == trained.keys() and plain != trained
    torch.save({"state_dict_unet": tiny_unet(seed=6).state_dict()}, checkpoint)
    with pytest.raises(ValueError, match="the content of stage2_checkpoint changed"):
        run(released, *flags, "--stage2-checkpoint", checkpoint)
    config = base / "scheduler/scheduler_config.json"
    before = config.read_text()
    config.write_text(before + " ")
    try:
        with pytest.raises(ValueError, match="the content of base_model_path changed"):
            run(released, *flags, out="plain")
    finally:
        config.write_text(before)


# ------------------------------------------------------------------------------------------------- interrupted, and shared

KILLED = """
import os, signal, sys, time
from pathlib import Path
import stage2_artifact_fix as script
from s2d.fixer.diffusion import DiffusionFixer
fix, calls = DiffusionFixer.fix_together, []
def fix_two_and_die(self, views):
    assert len(views) == 1
    if len(calls) == 2:
        while not all(len(list((scratch / part).glob("*.png"))) == 2 for part in script.RESULTS):
            time.sleep(0.01)  # until they are written
        (scratch / "fixed" / ".5.png.1.tmp").touch()  # as of a picture that was being written
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return fix(self, views)
DiffusionFixer.fix_together = fix_two_and_die
scratch = Path(sys.argv[sys.argv.index("-m") + 1]) / "stage2.partial/scratch"
script.run_script(script.main, script.Config, "stage2_artifact_fix")
"""


def start(arguments, **environment):
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_killed_run_goes_on_with_the_next_view(released, weights, monkeypatch):
    flags = ["--weights", str(weights)]
    expected = pictures(run(released, *flags, out="whole"))
    killed = start(["-c", KILLED, *command(released, "out", *flags)])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    scratch = released / "out/stage2.partial/scratch"
    first = {path: path.stat().st_mtime_ns for path in (scratch / "confidence").glob("*.png")}
    assert len(first) == 2
    fix, calls = DiffusionFixer.fix_together, []
    monkeypatch.setattr(DiffusionFixer, "fix_together", lambda *a: (calls.append(1), fix(*a))[1])
    out = run(released, *flags)
    assert len(calls) == len(NOVEL) - 2
    assert pictures(out) == expected
    for path, time in first.items():
        assert (out / "confidence" / path.name).stat().st_mtime_ns == time


def test_two_processes_make_the_same_files(released, weights):
    """As `accelerate launch` starts them; --multi_gpu is its name for several processes on one machine."""
    expected = pictures(run(released, "--weights", weights, out="alone"))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "stage2_artifact_fix.py"]
    done = start([*launch, *command(released, "out", "--weights", weights, "--device", "cpu")])
    assert done.returncode == 0, done.stderr
    assert pictures(released / "out/stage2") == expected
    assert done.stderr.count("stage2: done") == 1, "the first one speaks for all"


def test_shares_are_even_and_complete():
    jobs = list(range(11))
    for count in (1, 2, 3, 11, 20):
        shares = [Processes(rank, count).share_of(jobs) for rank in range(count)]
        assert [job for share in shares for job in share] == jobs
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


NO_DIFFUSERS = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers", "peft", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import stage2_artifact_fix as script
arguments = sys.argv[1:]
for flags in (["--fixer", "analytic"], ["--weights", arguments.pop(), "--overwrite"]):
    script.run_script(script.main, script.Config, "stage2_artifact_fix", [*arguments, *flags])
"""


def test_the_analytic_fixer_needs_no_diffusers_and_a_network_says_so(released, weights):
    done = start(["-c", NO_DIFFUSERS, *command(released, "out", weights)])
    assert done.returncode == 2, done.stderr
    assert require_stage(released / "out", "stage2").info["fixer"] == "analytic"
    text = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "No module named 'diffusers'" in text
    assert "pip install -r requirements.txt" in text and "--fixer analytic" in text
    assert not (released / "out/stage2.partial").exists()


# ------------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_missing_base_model(released, tmp_path):
    text = refusal(released, "--fixer", "difix", "--base-model-path", tmp_path / "nowhere")
    assert "hf download nvidia/difix_ref" in text and "--fixer analytic" in text


def safetensors(description=None, **tensors) -> bytes:
    from safetensors.torch import save

    model = randomise(build_model(TINY), 0)
    metadata = {METADATA_KEY: json.dumps(description or json.loads(TINY.to_json()))}
    return save({**model.state_dict(), **tensors}, metadata)


def described(**changes) -> bytes:
    return safetensors({**json.loads(TINY.to_json()), **changes})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: b"", "cannot be read as safetensors"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\n", "Was the download complete"),
        (lambda: safetensors()[:5000], "cannot be read as safetensors"),
        (lambda: described(unet={"foo": 1}), "no network can be built from its description"),
        (lambda: described(vae={}), "do not fit its description"),
        (lambda: described(unet=3), "no network can be built"),
        (lambda: described(mixing={"guidance_share": "much"}), "guidance_share must be a number"),
        (lambda: described(mixing={"mode": "some"}), "mode must be one of mask, global, got 'some'"),
        (lambda: described(format=9), "has format 9"),
        (lambda: safetensors(**{"unet.conv_in.bias": torch.full((8,), torch.nan)}), "not finite"),
        (lambda: safetensors(foo=torch.zeros(1)), "do not fit its description"),
    ],
)  # fmt: skip
def test_malformed_compact_weights(released, content, words):
    path = released / "bad.safetensors"
    path.write_bytes(content())
    text = refusal(released, "--weights", path)
    assert str(path) in text and words in text


UNET = {"state_dict_unet": {"conv_in.bias": torch.zeros(8)}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Was the download complete"),
        (b"version https://git-lfs.github.com/spec/v1\n", "of another kind, damaged"),
        ({}, "there are no weights in it"),
        ({"state_dict_unet": {}, "state_dict_vae": {}}, "there are no weights in it"),
        ([1], "must hold a dict"),
        ({"state_dict_unet": torch.zeros(3)}, "state_dict_unet must be a dict of tensors"),
        ({"state_dict_unet": {"foo": torch.zeros(3)}}, "none of its 1 tensors belongs"),
        ({"state_dict_unet": {5: torch.zeros(3)}}, "got the name 5 of type int"),
        ({"state_dict_unet": {"a": torch.zeros(2, 2).to_sparse()}}, "one that is torch.sparse_coo"),
        ({"state_dict_unet": {"conv_in.bias": torch.zeros(9)}}, "does not fit. Expected [8]"),
        ({"state_dict_unet": {"conv_in.bias": torch.full((8,), torch.inf)}}, "not finite"),
        (
            {"state_dict_unet": {"conv_in.lora_A.a.weight": torch.tensor(1.0)}},
            "got one of shape [], which is no adapter",
        ),
        ({**UNET, "lora_alpha": "x"}, "lora_alpha must be a number above 0, got 'x'"),
        ({**UNET, "mixing": {"kind": "new"}}, "kind must be one of fixed, learned, got 'new'"),
        ({**UNET, "mixing": {}, "state_dict_mixing": 5}, "state_dict_mixing must be a dict"),
        ({**UNET, "code": ROOT}, "holds more than tensors"),
    ],
)
def test_malformed_checkpoints(released, base, content, words):
    path = released / "bad.pkl"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    text = refusal(released, "--base-model-path", base, "--stage2-checkpoint", path)
    assert str(path) in text and words in text


def test_too_little_memory_says_which_flags_need_less(released, weights, monkeypatch):
    def allocate(*_):
        return torch.empty(1 << 60)

    monkeypatch.setattr("s2d.fixer.network.model.FixerModel.repair", allocate)
    text = refusal(released, "--weights", weights)
    assert "Not enough memory on cpu for a view of 40x24" in text
    assert "--precision bf16" in text and "--tile-size" not in text, "40 pixels are one tile"
    fixer = load_compact_fixer(weights)
    image = torch.zeros(8, 400, 3)
    with pytest.raises(ValueError, match="--tile-size 192 and --precision bf16"):
        fixer.fix(image, image, image[..., :1], image)
    monkeypatch.setattr("s2d.fixer.network.compact.build_model", allocate)
    text = refusal(released, "--weights", weights)
    assert "Not enough memory to load the fixer" in text and "--fixer analytic" in text
    # Another error of torch's is a defect, not a lack of memory.
    monkeypatch.undo()
    monkeypatch.setattr(
        "s2d.fixer.network.model.FixerModel.repair", lambda *_: torch.zeros(2) + torch.zeros(3)
    )
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(released, "--weights", weights)


def test_pictures_of_one_view_have_one_size(released):
    write_image(released / "guidance/1.png", torch.zeros(24, 41, 3))
    text = refusal(released, "--fixer", "analytic")
    assert "guidance/1.png is 41x24, but" in text and "renders/1.png is 40x24" in text


def test_a_render_of_no_view(released):
    for folder in ("renders", "guidance"):
        write_image(released / folder / "other.png", torch.zeros(24, 40, 3))
    text = refusal(released, "--fixer", "analytic")
    assert "1 of 7 renders are of no view in" in text and "other.png" in text


def test_one_message_on_the_command_line(released, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("s2d"), "handlers", [])
    argv = command(released, "out", "--fixer", "analytic", "--precision", "bf16")
    with pytest.raises(SystemExit) as caught:
        run_script(
            stage2_artifact_fix.main, stage2_artifact_fix.Config, "stage2_artifact_fix", argv
        )
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "error: --precision: no effect" in lines[0]

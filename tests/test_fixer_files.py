"""The fixer's weights in the peers' layouts: saved by stock diffusers and peft, loaded by ours, same images; and damaged files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_fixer import (
    PROMPT,
    UNET_SUFFIXES,
    VAE_SUFFIXES,
    adapt,
    expected_prompt,
    paths,
    randomise,
    save_base,
    stock_output,
    tiny_unet,
    tiny_vae,
)

from s2d.fixer.model_config import COMPACT
from s2d.fixer.network.checkpoint import read_checkpoint
from s2d.fixer.network.compact import load_compact, save_compact
from s2d.fixer.network.difix import load_difix
from s2d.fixer.network.folder import embed_prompt, read_weights
from s2d.fixer.network.lora import (
    UNET_RANK,
    UNET_TARGETS,
    VAE_ADAPTER,
    VAE_RANK,
    VAE_TARGETS,
    add_lora,
    lora_layers,
    target_modules,
)
from s2d.fixer.network.model import build_model
from s2d.fixer.network.state import take_apart

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.fixture(scope="module")
def sd_turbo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd_turbo")
    return save_base(folder, tiny_unet(), tiny_vae(skips=False), difix=False)


def difix_vae(seed=1):
    vae = tiny_vae(skips=True, seed=seed)
    adapt(vae, paths(vae, VAE_SUFFIXES, "decoder"), "vae_skip", 4, seed=seed)
    return vae


@pytest.fixture(scope="module")
def difix_ref(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("difix"), tiny_unet(), difix_vae(), difix=True)


@torch.no_grad()
def repaired(model, images):
    return model.repair(images[:1], model.encode_photos(images[1:])[None])


def assert_same(model, unet, vae, folder, images):
    """Float32 sums in two orders: measured up to 4e-6 on images of size 1."""
    expected = stock_output(unet, vae, expected_prompt(folder), images)
    got = repaired(model, images)
    assert torch.allclose(got, expected, atol=3e-5), (got - expected).abs().max()


def only(state, *words):
    return {key: tensor for key, tensor in state.items() if any(word in key for word in words)}


# ------------------------------------------------------------------------------------------------------ Hugging Face folders


def test_the_prompt_is_embedded_as_the_text_encoder_was_trained(sd_turbo):
    got = embed_prompt(sd_turbo, PROMPT)
    assert got.shape == (77, 12)
    assert torch.allclose(got, expected_prompt(sd_turbo), atol=1e-6)


def test_sd_turbo_loads_and_its_skips_start_without_effect(sd_turbo, images, caplog):
    model = load_difix(str(sd_turbo))
    assert "decoder.skip_conv_4.weight start without effect" in caplog.text
    assert torch.equal(model.vae.decoder.skip_conv_2.weight, torch.full((16, 8, 1, 1), 1e-5))
    expected = stock_output(tiny_unet(), tiny_vae(skips=False), model.prompt, images)
    assert torch.allclose(repaired(model, images), expected, atol=1e-3)  # 1e-4: skips of 1e-5


def test_difix_ref_loads_with_its_unmerged_adapter(difix_ref, images):
    stored = load_file(difix_ref / VAE_FILE)
    assert "decoder.skip_conv_1.base_layer.weight" in stored
    assert "decoder.up_blocks.0.resnets.0.conv1.lora_A.vae_skip.weight" in stored
    assert_same(load_difix(str(difix_ref)), tiny_unet(), difix_vae(), difix_ref, images)


def test_adapters_kept_for_training_compute_the_same_and_keep_their_names(difix_ref, images):
    model = load_difix(str(difix_ref), keep_adapters=True)
    assert_same(model, tiny_unet(), difix_vae(), difix_ref, images)
    stored = load_file(difix_ref / VAE_FILE)
    assert model.vae.state_dict().keys() == stored.keys()
    assert all(torch.equal(model.vae.state_dict()[key], stored[key]) for key in stored)
    trained = {name for name, p in model.vae.named_parameters() if p.requires_grad}
    assert trained == {key for key in stored if "lora" in key}


def test_shards_bins_and_half_precision_are_read(difix_ref, tmp_path, images):
    folder = shutil.copytree(difix_ref, tmp_path / "model")
    tensors = load_file(folder / UNET_FILE)
    (folder / UNET_FILE).unlink()
    shards = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / "unet" / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / f"{UNET_FILE}.index.json").write_text(json.dumps(index))
    stored = load_file(folder / VAE_FILE)
    (folder / VAE_FILE).unlink()
    torch.save(stored, folder / "vae/diffusion_pytorch_model.bin")
    assert_same(load_difix(str(folder)), tiny_unet(), difix_vae(), folder, images)

    halved = {key: tensor.half() for key, tensor in tensors.items()}
    for name in (*shards, "diffusion_pytorch_model.safetensors.index.json"):
        (folder / "unet" / name).unlink()
    save_file(halved, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    model = load_difix(str(folder))
    assert model.unet.conv_in.weight.dtype == torch.float32
    assert torch.equal(model.unet.conv_in.weight, tensors["conv_in.weight"].half().float())


def test_attention_names_of_old_diffusers_are_understood(sd_turbo, tmp_path, images):
    folder = shutil.copytree(sd_turbo, tmp_path / "model")
    tensors = load_file(folder / VAE_FILE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key):
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        return key

    renamed = {rename(key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / VAE_FILE)
    model, same = load_difix(str(folder)), load_difix(str(sd_turbo))
    assert torch.equal(repaired(model, images), repaired(same, images))


# ------------------------------------------------------------------------------------------------------------ .pkl, 3 forms


def saved(path, **content):
    torch.save(content, path)
    return path


def test_difix_checkpoint_whole_unet_and_vae_adapter(difix_ref, tmp_path, images, caplog):
    """Form 1; its adapter has the name of the base's, and takes its place."""
    caplog.set_level("INFO")
    unet, vae = tiny_unet(seed=7), difix_vae(seed=8)
    state = only(vae.state_dict(), "lora", "skip")
    # Outside the saved keys the networks of base and checkpoint are the same.
    full = vae.state_dict() | {
        key: tensor for key, tensor in difix_vae().state_dict().items() if key not in state
    }
    vae.load_state_dict(full)
    path = saved(
        tmp_path / "model_75001.pkl",
        vae_lora_target_modules=paths(tiny_vae(skips=True), VAE_SUFFIXES, "decoder"),
        rank_vae=4,
        state_dict_unet=unet.state_dict(),
        state_dict_vae=state,
        optimizer={"state": {}, "param_groups": []},
    )
    assert_same(load_difix(str(difix_ref), path), unet, vae, difix_ref, images)
    assert "adapter vae_skip replaces the base’s (rank 4, " in caplog.text
    assert "ignored: optimizer" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def turbo_networks():
    """A UNet with an adapter and a `conv_in` of its own, and a VAE with skips and adapter, on sd-turbo's weights."""
    unet, vae = tiny_unet(), tiny_vae(skips=True, seed=1)
    plain = tiny_vae(skips=False)
    vae.load_state_dict(plain.state_dict(), strict=False)
    adapt(unet, paths(unet, UNET_SUFFIXES), "default", 8, seed=3)
    adapt(vae, paths(vae, VAE_SUFFIXES, "decoder"), "vae_skip", 4, seed=4)
    randomise(unet.conv_in, 5)
    return unet, vae


def turbo_content(unet, vae):
    return {
        "unet_lora_target_modules": UNET_SUFFIXES,
        "vae_lora_target_modules": paths(tiny_vae(skips=True), VAE_SUFFIXES, "decoder"),
        "rank_unet": 8,
        "rank_vae": 4,
        "state_dict_unet": only(unet.state_dict(), "lora", "conv_in"),
        "state_dict_vae": only(vae.state_dict(), "lora", "skip"),
    }


@pytest.mark.parametrize("keep_adapters", [False, True])
@pytest.mark.parametrize("metadata", [True, False])
def test_turbo_checkpoint_adapters_of_both(
    sd_turbo, tmp_path, images, caplog, metadata, keep_adapters
):
    """Forms 2 and 3: with ranks and targets written down, and without them and with keys of unknown meaning."""
    caplog.set_level("INFO")
    unet, vae = turbo_networks()
    content = turbo_content(unet, vae)
    if not metadata:
        content = only(content, "state_dict") | {"global_step": 75001, "mixer": {}}
    path = saved(tmp_path / "S2D_pretrained_lora_75001.pkl", **content)
    model = load_difix(str(sd_turbo), path, keep_adapters)
    assert_same(model, unet, vae, sd_turbo, images)
    assert "adapter default added (rank 8, " in caplog.text
    assert ("ignored: global_step, mixer" in caplog.text) == (not metadata)
    assert len(lora_layers(model.unet)) == keep_adapters * len(paths(tiny_unet(), UNET_SUFFIXES))


def test_a_second_adapter_beside_the_bases_adds_to_it(difix_ref, tmp_path, images):
    """Ranks that differ between modules, keys without an adapter's name (peft's own export), an alpha of its own."""
    vae = difix_vae()
    targets = paths(tiny_vae(skips=True), ["conv1", "skip_conv_3"], "decoder")
    generator = torch.Generator().manual_seed(9)
    adapter, expected = {}, {}
    for rank, module in enumerate(targets, 1):
        shape = vae.get_submodule(module).base_layer.weight.shape
        a = torch.randn(rank, *shape[1:], generator=generator) * 0.1
        b = torch.randn(shape[0], rank, 1, 1, generator=generator) * 0.1
        adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        expected[module] = 3.0 / rank * torch.einsum("or,rikl->oikl", b[..., 0, 0], a)
    path = saved(tmp_path / "a.pkl", state_dict_vae=adapter, lora_alpha=3.0)
    for module, change in expected.items():
        vae.get_submodule(module).base_layer.weight.data += change
    for keep_adapters in (False, True):
        model = load_difix(str(difix_ref), path, keep_adapters)
        assert_same(model, tiny_unet(), vae, difix_ref, images)


def test_differences_between_checkpoint_and_network_are_said(sd_turbo, tmp_path, caplog):
    unet, vae = turbo_networks()
    content = turbo_content(unet, vae) | {"rank_vae": 16}
    content["unet_lora_target_modules"] = [*UNET_SUFFIXES, "no_such_layer"]
    content["state_dict_vae"]["decoder.extra.weight"] = torch.zeros(1)
    path = saved(tmp_path / "a.pkl", **content)
    load_difix(str(sd_turbo), path)
    assert "rank_vae says 16, the tensors have {4}: using theirs" in caplog.text
    assert "1 of 14 targets of the unet's adapter have no tensors" in caplog.text
    assert "1 unexpected tensors are ignored (first: decoder.extra.weight)" in caplog.text


def test_our_own_training_adapters_are_what_the_checkpoints_hold(difix_ref, sd_turbo):
    model = load_difix(str(sd_turbo))
    add_lora(
        model.vae, VAE_ADAPTER, dict.fromkeys(target_modules(model.vae, VAE_TARGETS, "decoder"), 4)
    )
    add_lora(
        model.unet, "default", dict.fromkeys(target_modules(model.unet, UNET_TARGETS), UNET_RANK)
    )
    unet, vae = turbo_networks()
    assert VAE_RANK == 4
    assert model.vae.state_dict().keys() == vae.state_dict().keys()
    assert model.unet.state_dict().keys() == unet.state_dict().keys()


def test_learned_mixing_travels_with_the_checkpoint(sd_turbo, tmp_path, images):
    unet, vae = turbo_networks()
    settings = {"kind": "learned", "width": 16, "heads": 2, "stride": 4}
    from s2d.fixer.mixing import make_mixing
    from s2d.fixer.model_config import MixingConfig

    mixing = randomise(make_mixing(MixingConfig(**settings)), 0)
    content = turbo_content(unet, vae)
    content |= {"mixing": settings, "state_dict_mixing": mixing.state_dict()}
    model = load_difix(str(sd_turbo), saved(tmp_path / "a.pkl", **content))
    mask = torch.ones(1, 1, 32, 48)
    assert torch.equal(
        model.mixing(images[:1], images[1:], mask), mixing(images[:1], images[1:], mask)
    )
    content["state_dict_mixing"].pop("lift.bias")
    with pytest.raises(ValueError, match=r"state_dict_mixing does not fit .*lift.bias"):
        load_difix(str(sd_turbo), saved(tmp_path / "b.pkl", **content))
    content["mixing"] = {"depth": 3}
    with pytest.raises(ValueError, match=r"description of the mixing does not fit .*depth"):
        load_difix(str(sd_turbo), saved(tmp_path / "c.pkl", **content))


# --------------------------------------------------------------------------------------------------------- the compact file


@torch.no_grad()
def test_the_compact_file_holds_everything(tmp_path, images):
    def repaired(model):
        """The first image as the render, the second as guidance with some holes; a mirrored one as reference."""
        rendered, guidance = images[:1], images[1:]
        photo = images[:1].flip(-1)
        coverage = (guidance[:, :1] > 0).float()
        return model(rendered, guidance, coverage, photo[:, None])

    model = randomise(build_model(COMPACT), 0)
    path = save_compact(model, tmp_path / "compact.safetensors")
    assert path.stat().st_size < 20e6
    again = load_compact(path).eval()
    assert again.config.to_json() == COMPACT.to_json()
    error = (repaired(again) - repaired(model)).norm() / images[:1].norm()
    assert 0 < error < 0.02  # measured: 2e-3, float16 on disk
    exact = load_compact(save_compact(model, tmp_path / "b.safetensors", torch.float32)).eval()
    assert torch.equal(repaired(exact), repaired(model))


# ------------------------------------------------------------------------------------------------------------ what is wrong


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_damaged_checkpoints_give_one_clear_message(sd_turbo, tmp_path, capsys):
    unet, vae = turbo_networks()
    good = turbo_content(unet, vae)
    module = "decoder.conv_in"
    a, b = (good["state_dict_vae"][f"{module}.lora_{side}.vae_skip.weight"] for side in "AB")

    def vae_with(**changes):
        return {
            "state_dict_vae": good["state_dict_vae"]
            | {k.replace("__", "."): v for k, v in changes.items()}
        }

    def key(side):
        return f"{module}.lora_{side}.vae_skip.weight".replace(".", "__")

    cases = {
        "a list": ([1], "must hold a dict with state_dict_unet or state_dict_vae, got list"),
        "nothing known": (
            {"step": 3, "model": {}},
            "no weights in it. Expected .* got step, model",
        ),
        "nothing": ({}, "no weights in it"),
        "code": ({"state_dict_vae": Code()}, "cannot be read as a checkpoint of plain tensors"),
        "no tensors": (
            {"state_dict_vae": [1]},
            "state_dict_vae must be a dict of tensors, got list",
        ),
        "not a tensor": (vae_with(x="y"), "x must be a tensor, got str"),
        "nan": (vae_with(**{key("A"): a * float("nan")}), "has values that are not finite"),
        "another rank": (
            vae_with(**{key("A"): a[:2]}),
            r"lora_B \[16, 4, 1, 1\] · lora_A \[2, 4, 3, 3\] does not fit. Expected \[16, 4, 3, 3\]",
        ),
        "another size": (vae_with(**{key("B"): b[:8]}), "Was it trained on another base model"),
        "another unet": (
            {"state_dict_unet": {"conv_in.weight": torch.zeros(320, 4, 3, 3)}},
            r"conv_in.weight does not fit. Expected \[8, 4, 3, 3\], got \[320, 4, 3, 3\]",
        ),
        "no match": (
            {"state_dict_unet": {"transformer.weight": torch.zeros(3)}},
            "none of its 1 tensors belongs to this network .first: transformer.weight",
        ),
        "no module": (
            {"state_dict_unet": {"x.lora_A.default.weight": a, "x.lora_B.default.weight": b}},
            "none of its 1 tensors belongs to this network .first: x .adapter default",
        ),
        "half a pair": (
            {"state_dict_vae": {f"{module}.lora_A.vae_skip.weight": a}},
            "1 modules have only one of lora_A and lora_B in adapter vae_skip",
        ),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.pkl"
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as error:
            load_difix(str(sd_turbo), path)
        assert str(path) in str(error.value), name
    assert "must not run" not in capsys.readouterr().out


def test_files_that_are_no_checkpoints(tmp_path):
    good = tmp_path / "good.pkl"
    torch.save({"state_dict_vae": {"a": torch.zeros(1000)}}, good)
    assert read_checkpoint(good).vae.weights.keys() == {"a"}
    data = good.read_bytes()
    for name, content in {
        "short": data[: len(data) // 2],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
    }.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.pkl cannot be read as a checkpoint"):
            read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"Train one with train_artifact_fixer.py"):
        read_checkpoint(tmp_path / "none.pkl")


def test_damaged_folders_give_one_clear_message(difix_ref, tmp_path, caplog):
    def broken(name):
        return shutil.copytree(difix_ref, tmp_path / name)

    with pytest.raises(
        FileNotFoundError, match=r"neither a folder nor in the Hugging Face cache.*--fixer compact"
    ):
        load_difix("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="hf download nvidia/difix_ref"):
        load_difix(str(tmp_path / "nowhere"))
    with pytest.raises(
        FileNotFoundError, match=r"Not a model folder: .*unet/config.json is missing"
    ):
        load_difix(str(tmp_path))
    folder = broken("pointer")
    (folder / VAE_FILE).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"cannot be read as weights .*Git LFS pointer"):
        load_difix(str(folder))
    folder = broken("no_weights")
    (folder / UNET_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"No weights in .*unet"):
        load_difix(str(folder))
    folder = broken("not_json")
    (folder / "vae/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"vae/config.json is not JSON"):
        load_difix(str(folder))
    folder = broken("no_text")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(FileNotFoundError, match="No text encoder"):
        load_difix(str(folder))
    folder = broken("incomplete")
    tensors = load_file(folder / UNET_FILE)
    tensors.pop("conv_out.bias")
    save_file(tensors, folder / UNET_FILE)
    with pytest.raises(
        ValueError, match=r"1 of \d+ tensors of the network are missing .first: conv_out.bias"
    ):
        load_difix(str(folder))
    folder = broken("strange")
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "new_setting": 1}))
    load_difix(str(folder))
    assert "settings without effect: new_setting" in caplog.text


def test_damaged_compact_files_give_one_clear_message(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"or use --fixer analytic"):
        load_compact(path)
    path.write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_compact(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no fixer: its metadata has no s2d_fixer"):
        load_compact(path)
    save_file({"a": torch.zeros(1)}, path, {"s2d_fixer": COMPACT.to_json()})
    with pytest.raises(ValueError, match="its tensors do not fit its description"):
        load_compact(path)


def test_a_state_comes_apart_and_names_its_source(difix_ref):
    state = read_weights(difix_ref / "vae")
    assert set(state.adapters) == {"vae_skip"}
    assert set(state.adapters["vae_skip"].ranks().values()) == {4}
    assert not any("base_layer" in key or "lora" in key for key in state.weights)
    assert take_apart({}, "nothing").adapters == {}

"""Weights come back as they were; strangers are refused; of a released layout what has public names is found."""

import pytest
import torch

from s2d.hier.config import HierConfig
from s2d.hier.dino import WIDTH, ContextBlock, DinoContext
from s2d.hier.model import HierModel
from s2d.hier.weights import _vit_tensors, load_info, load_model, load_released, save_model


def tiny(seed=0):
    torch.manual_seed(seed)
    return HierModel(HierConfig.named("tiny"))


def test_a_saved_model_comes_back_with_what_is_known_about_it(tmp_path):
    model = tiny()
    path = save_model(tmp_path / "w.safetensors", model, {"steps": 7, "psnr": [20.5, 21.0]})
    loaded = load_model(path)
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert load_info(path) == {"steps": 7, "psnr": [20.5, 21.0]}


def test_what_is_no_model_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_hier_init"):
        load_model(tmp_path / "none.safetensors")
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_model(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no model of hierarchical Gaussians"):
        load_model(path)
    broken = tiny()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    save_model(path, broken, {})
    with pytest.raises(ValueError, match="not finite"):
        load_model(path)


def test_of_a_released_layout_the_transformer_is_found_and_the_rest_is_named(tmp_path):
    source, target = tiny(1), tiny(2)
    names = [name for name in source.state_dict() if name.startswith("transformer.")]
    checkpoint = {f"encoder.backbone.{name}": source.state_dict()[name] for name in names}
    checkpoint["encoder.predictor.to_disparity.0.weight"] = torch.zeros(3)
    torch.save({"state_dict": checkpoint, "global_step": 300_000}, tmp_path / "x.ckpt")
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    match = load_released(target, tmp_path / "x.ckpt")
    assert set(match.loaded) == set(names)
    assert match.unused == ("encoder.predictor.to_disparity.0.weight",)
    for name, tensor in target.state_dict().items():
        expected = source.state_dict()[name] if name in names else before[name]
        assert torch.equal(tensor, expected), name
    assert f"transformer: {len(names)} of {len(names)} tensors" in match.report()
    assert "1 tensors of the checkpoint unused" in match.report()


def test_a_checkpoint_that_fits_nowhere_is_refused(tmp_path):
    torch.save({"state_dict": {"encoder.x": torch.zeros(3)}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="none of its 1 tensors"):
        load_released(tiny(), tmp_path / "x.ckpt")


def test_dino_v2s_own_names_are_those_of_transformers():
    width = WIDTH
    given = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1370, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(12):
        for name, shape in {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "ls1.gamma": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (4 * width, width),
            "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width),
            "mlp.fc2.bias": (width,),
            "ls2.gamma": (width,),
        }.items():
            given[f"blocks.{block}.{name}"] = shape
    with torch.device("meta"):
        context = DinoContext()
        assert context(torch.rand(4, 3, 64, 128), 2).shape == (4, 64, 8, 16)
        wanted = context.vit.state_dict()
        tensors = {f"encoder.dino.{name}": torch.empty(shape) for name, shape in given.items()}
    found = _vit_tensors(tensors)
    assert found.keys() == wanted.keys()
    for name, (_, tensor) in found.items():
        assert tensor.shape == wanted[name].shape, name


def test_views_look_at_each_other_in_any_order(generator):
    torch.manual_seed(0)
    block = ContextBlock()
    tokens = torch.randn(1, 3, 4, WIDTH, generator=generator)
    with torch.no_grad():
        straight, turned = block(tokens), block(tokens[:, [2, 0, 1]])
        alone = block(torch.cat([tokens[:, :1], 0 * tokens[:, 1:]], 1))
    assert torch.allclose(straight[:, [2, 0, 1]], turned, atol=1e-5)
    assert (straight[:, 0] - alone[:, 0]).abs().max() > 1e-3

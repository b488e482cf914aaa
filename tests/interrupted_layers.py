"""Layered trainings that are stopped and go on."""

import pytest
import torch

from s2d.layers import training as training_module


def train_until(train, step, first_ends, monkeypatch):
    """Run `train` until Ctrl-C: after the checkpoint of a step, or, where that is the first layer's last one, between two layers."""
    real_save, real_torch_save = training_module.save_run, training_module.atomic_torch_save

    def save_and_stop(run, path):
        real_save(run, path)
        if run.step == step:
            raise KeyboardInterrupt

    def finish_and_stop(path, state):
        real_torch_save(path, state)
        if step == first_ends:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_module, "save_run", save_and_stop)
        patch.setattr(training_module, "atomic_torch_save", finish_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train()


def assert_same_bits(layers, expected):
    """Two layers equal two others, opacities of each level included."""
    for ours, theirs in zip(layers.parts, expected.parts, strict=True):
        for name, tensor in theirs.tensors().items():
            assert torch.equal(getattr(ours, name), tensor), name
    assert torch.equal(layers.opacities[1], expected.opacities[1])

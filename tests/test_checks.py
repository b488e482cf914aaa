"""The words of shape, value and range errors, and that nothing good is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from s2d.checks import check_finite, check_range, check_shape


def rasterize(means, quats):
    dims = check_shape("means", means, ("N", 3))
    return check_shape("quats", quats, ("N", 4), dims)


def message(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def test_a_wrong_axis_says_what_the_name_stands_for():
    text = message(rasterize, torch.zeros(1204, 3), torch.zeros(1204, 3))
    assert text == "rasterize: quats must be [N, 4] with N=1204 (from means), got [1204, 3]."


def test_equal_names_must_have_equal_sizes_across_calls():
    text = message(rasterize, torch.zeros(1204, 3), torch.zeros(7, 4))
    assert text == "rasterize: quats must be [N, 4] with N=1204 (from means), got [7, 4]."


def test_equal_names_must_have_equal_sizes_within_one_tensor():
    check_shape("covars", torch.zeros(5, 5), ("D", "D"))
    assert message(check_shape, "covars", torch.zeros(5, 4), ("D", "D")).endswith(
        "covars must be [D, D], got [5, 4]."
    )


def test_good_shapes_pass_and_return_their_sizes():
    assert rasterize(torch.zeros(0, 3), torch.zeros(0, 4)) == {"N": (0, "means")}
    assert check_shape("Ks", np.zeros((2, 3, 3)), (..., 3, 3)) == {}
    assert check_shape("mask", torch.zeros(4, 6), (None, "W")) == {"W": (6, "mask")}
    assert check_shape("scalar", torch.tensor(1.0), ()) == {}


@pytest.mark.parametrize("shape", [(3,), (2, 3, 3, 1), (3, 2), ()])
def test_leading_axes_stand_for_leading_axes_only(shape):
    text = message(check_shape, "K", torch.zeros(shape), (..., 3, 3))
    assert text.endswith(f"K must be [..., 3, 3], got {list(shape)}.")


def test_what_is_not_an_array_is_named():
    assert "means must be an array [N, 3], got list." in message(rasterize, [1, 2, 3], None)


def test_a_dataclass_is_named_not_its_post_init():
    @dataclasses.dataclass
    class Cameras:
        Ks: torch.Tensor

        def __post_init__(self):
            check_shape("Ks", self.Ks, ("C", 3, 3))

    assert message(Cameras, torch.zeros(2, 3)) == "Cameras: Ks must be [C, 3, 3], got [2, 3]."


def test_non_finite_values_are_counted_and_the_first_is_named():
    log_scales = torch.zeros(1204, 3)
    log_scales[88, 2] = float("nan")
    log_scales[90] = torch.tensor([float("inf"), float("-inf"), 0.0])

    def optimise():
        check_finite("log_scales", log_scales, "Gaussian", "after step 4100", "Lower --lr-means.")

    assert message(optimise) == (
        "optimise: log_scales has 3 non-finite values of 3612 (first at Gaussian 88) after step 4100. Lower --lr-means."
    )


def test_finite_values_pass():
    check_finite("empty", torch.zeros(0, 3))
    check_finite("large", np.array([3e38, -3e38], dtype=np.float32))
    check_finite("count", torch.tensor([1, 2]))


def test_a_single_non_finite_number():
    assert message(check_finite, "loss", torch.tensor(float("nan"))).endswith(
        "loss has 1 non-finite value of 1."
    )


@pytest.mark.parametrize(
    ("value", "limits", "words"),
    [
        (25, {"low": 2, "high": 20}, "must be in [2, 20], got 25."),
        (-1, {"low": 0}, "must be >= 0, got -1."),
        (0.0, {"above": 0}, "must be > 0, got 0.0."),
        (1.0, {"low": 0, "below": 1}, "must be in [0, 1), got 1.0."),
        (float("nan"), {"low": 0, "high": 1}, "must be in [0, 1], got nan."),
        (
            torch.tensor([0.5, 1.5, float("nan")]),
            {"low": 0, "high": 1},
            "must be in [0, 1], got 1.5 at index 1 (2 of 3 values).",
        ),
    ],
)
def test_range_words(value, limits, words):
    text = message(check_range, "alpha", value, **limits, hint="Lower it.")
    assert text.endswith(f"alpha {words} Lower it.")


def test_range_ends_belong_to_it():
    check_range("alpha", 0, 0, 1)
    check_range("alpha", torch.tensor([0.0, 1.0]), 0, 1)
    check_range("nothing", torch.zeros(0), above=3)

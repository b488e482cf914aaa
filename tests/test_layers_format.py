"""Folders of levels: bits that come back, prefixes that can be read, damage that is refused by name, and a second reader."""

import hashlib
import json
import math
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians, concatenate
from s2d.geometry import look_at
from s2d.layers.convert import extract, merge, pack
from s2d.layers.levels import check_levels, gaussians_of_level, write_levels
from s2d.layers.manifest import load_levels
from s2d.layers.quantise import Ranges, join_quats, pack_quats
from s2d.layers.records import Encoding, decode_opacities, decode_rows, encode_rows
from s2d.layers.rows import level_opacities, visible_rows
from s2d.rasterize import rasterize

SIZES = (70, 300, 900)
ENCODINGS = [
    Encoding(),
    Encoding(codec="zstd"),
    Encoding("float16", "uint8", "zstd"),
    Encoding("quantised", "uint8", "none"),
    Encoding("quantised", "uint8", "zstd"),
    Encoding("quantised", "float32", "zstd"),
]


def name_of(encoding):
    return f"{encoding.rows}-{encoding.opacity}-{encoding.codec}"


def random_rows(num, seed, degree=2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return Gaussians(
        means=normal(num, 3) * 3 + torch.tensor([1.0, -2.0, 5.0]),
        log_scales=normal(num, 3) - 3,
        quats=normal(num, 4),
        opacity_logits=normal(num) * 3,
        sh0=normal(num, 1, 3),
        shN=normal(num, (degree + 1) ** 2 - 1, 3) * 0.2,
    )


def same_bits(a, b):
    return all(
        torch.equal(x.contiguous().view(torch.int32), y.contiguous().view(torch.int32))
        for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True)
    )


def three_levels(folder, encoding=None, degree=2):
    parts = [random_rows(num, seed, degree) for seed, num in enumerate(SIZES)]
    opacities = [None, torch.randn(70) * 3, torch.randn(370) * 3]
    written = write_levels(
        folder, parts, opacities, [0.25, 0.5, 1.0], encoding, [None, {"psnr": 20.5}, None]
    )
    return parts, opacities, written


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_float32_comes_back_bit_for_bit(tmp_path, codec, degree):
    parts, opacities, written = three_levels(tmp_path, Encoding(codec=codec), degree)
    parts[1].means[3] = torch.tensor([float("nan"), -0.0, float("inf")])
    written = write_levels(tmp_path, parts, opacities, [0.25, 0.5, 1.0], Encoding(codec=codec))
    levels = load_levels(tmp_path)
    assert levels == written
    for k in range(3):
        shown = gaussians_of_level(levels, k)
        expected = concatenate(parts[: k + 1])
        expected.opacity_logits = level_opacities(
            [part.opacity_logits for part in parts[: k + 1]], opacities[: k + 1]
        )
        assert same_bits(shown, expected)


def test_a_level_may_add_nothing(tmp_path):
    """As with --layer-points 0 and a budget that is used up."""
    parts = [random_rows(30, 0), random_rows(0, 1)]
    for encoding in ENCODINGS:
        write_levels(tmp_path, parts, [None, torch.zeros(30)], [0.5, 1.0], encoding)
        shown = gaussians_of_level(tmp_path, 1)
        assert shown.num == 30 and float(shown.opacity_logits.abs().max()) < 0.01


def test_showing_a_level_takes_its_own_opacities(tmp_path):
    parts, opacities, _ = three_levels(tmp_path)
    shown = gaussians_of_level(tmp_path, 2).opacity_logits
    assert torch.equal(shown[:370], opacities[2]) and torch.equal(
        shown[370:], parts[2].opacity_logits
    )
    levels = load_levels(tmp_path)
    assert levels.needed_files(2) == ("rows_0.bin", "rows_1.bin", "opacity_2.bin", "rows_2.bin")
    assert levels.needed_files(1) == ("rows_0.bin", "opacity_1.bin", "rows_1.bin")
    assert levels.new_files(2) == ("opacity_2.bin", "rows_2.bin")
    assert levels.num_bytes(1) == sum(levels.files[name].bytes for name in levels.needed_files(1))


def test_a_level_without_a_list_keeps_the_opacities_below(tmp_path):
    parts = [random_rows(num, seed) for seed, num in enumerate(SIZES)]
    write_levels(tmp_path, parts, [None, torch.zeros(70), None], [0.25, 0.5, 1.0])
    levels = load_levels(tmp_path)
    assert levels.needed_files(2) == ("rows_0.bin", "opacity_1.bin", "rows_1.bin", "rows_2.bin")
    shown = gaussians_of_level(levels, 2).opacity_logits
    assert not shown[:70].any()
    assert torch.equal(shown[70:370], parts[1].opacity_logits)


# Largest errors: log scales half of 1/255 of a range of 6.9 (0.0135); float16 of 11 bits; 10-bit quaternion components; the rest by its formula.
@pytest.mark.parametrize("encoding", ENCODINGS[2:], ids=name_of)
def test_small_encodings_lose_what_they_say(tmp_path, encoding):
    parts, _, _ = three_levels(tmp_path, encoding)
    exact, found = concatenate(parts), gaussians_of_level(tmp_path, 2)
    sizes = exact.log_scales
    if encoding.rows == "quantised":
        sizes = sizes.clamp(min=float(np.quantile(sizes.numpy(), 1e-3)))
    assert float((found.log_scales - sizes).abs().max()) < (
        0.5 * float(sizes.max() - sizes.min()) / 255 + 1e-4
        if encoding.rows == "quantised"
        else 0.004
    )
    unit = torch.nn.functional.normalize(exact.quats, dim=1)
    cosine = (torch.nn.functional.normalize(found.quats, dim=1) * unit).sum(1).abs()
    assert float(cosine.min()) > 1 - 3e-6  # measured 1 - 9e-7 with 10 bits
    # Relative to the distance from the middle: measured 3.3e-5 quantised (float32 otherwise).
    distance = (exact.means - exact.means.median(0).values).norm(dim=1) + 1
    assert float(((found.means - exact.means).norm(dim=1) / distance).max()) < 2e-4
    assert float((found.sh0 - exact.sh0).abs().max()) < 0.002
    error = (found.shN - exact.shN).abs()
    root = (exact.shN.abs() / exact.shN.abs().max()).sqrt()
    # The step of q -> q^2 is (2 root + 1/127) / 127; half of it either way.
    bound = (root + 1 / 127) / 127 * float(exact.shN.abs().max()) + 1e-3 * (
        encoding.rows == "float16"
    )
    assert bool((error <= bound).all())
    if encoding.opacity == "uint8":
        given = torch.sigmoid(parts[0].opacity_logits)
        found = torch.sigmoid(gaussians_of_level(tmp_path, 0).opacity_logits)
        assert float((found - given).abs().max()) <= 0.5 / 255 + 1e-6


def test_quaternions_of_any_norm_and_sign():
    generator = torch.Generator().manual_seed(1)
    quats = torch.randn(2000, 4, generator=generator, dtype=torch.float64).numpy() * 7
    quats[:8] = np.concatenate([np.eye(4), -np.eye(4)])
    back = join_quats(pack_quats(quats))
    unit = quats / np.linalg.norm(quats, axis=1, keepdims=True)
    assert np.abs(np.abs((back * unit).sum(1)) - 1).max() < 3e-6  # measured 1.4e-6
    assert np.abs(np.linalg.norm(back, axis=1) - 1).max() < 1e-9


@pytest.mark.parametrize("encoding", ENCODINGS, ids=name_of)
def test_any_prefix_can_be_read(encoding, monkeypatch):
    """Cut off at every byte: whole chunks are there, the rest is not, and nothing is an error."""
    monkeypatch.setattr("s2d.layers.records.CHUNK_BYTES", 800)
    rows = random_rows(24, 0)
    if encoding.rows == "quantised":
        encoding = replace(encoding, ranges=Ranges.of(rows))
    data = encode_rows(rows, encoding)
    whole = decode_rows(data, encoding, 2, "x")
    numbers = []
    for end in range(len(data) + 1):
        part = decode_rows(data[:end], encoding, 2, "x", partial=True)
        numbers.append(part.num)
        assert torch.equal(part.means, whole.means[: part.num])
        assert torch.equal(part.opacity_logits, whole.opacity_logits[: part.num])
    assert numbers == sorted(numbers) and numbers[0] == 0 and numbers[-1] == 24
    assert len(set(numbers)) > 2
    with pytest.raises(ValueError, match="x is cut off: chunk"):
        decode_rows(data[:-1], encoding, 2, "x")


def test_truncated_downloads_still_show_a_lower_level(tmp_path):
    parts, _, _ = three_levels(tmp_path)
    for name in ("rows_2.bin", "opacity_2.bin"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert gaussians_of_level(tmp_path, 1).num == 370
    with pytest.raises(ValueError, match=r"rows_2\.bin|opacity_2\.bin"):
        gaussians_of_level(tmp_path, 2)
    (tmp_path / "rows_1.bin").unlink()
    assert same_bits(gaussians_of_level(tmp_path, 0), parts[0])
    with pytest.raises(FileNotFoundError, match=r"rows_1\.bin is missing"):
        gaussians_of_level(tmp_path, 1)


@pytest.mark.parametrize("encoding", [ENCODINGS[0], ENCODINGS[4]], ids=name_of)
def test_a_flipped_byte_is_refused_by_name(tmp_path, encoding):
    three_levels(tmp_path, encoding)
    files = sorted(path for path in tmp_path.iterdir())
    assert len(files) == 6
    generator = np.random.default_rng(0)
    for path in files:
        data = path.read_bytes()
        for position in [0, len(data) - 2, *generator.integers(0, len(data), 6)]:
            flipped = bytearray(data)
            flipped[position] ^= 1 << int(generator.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
                check_levels(load_levels(tmp_path))
        path.write_bytes(data)
    check_levels(load_levels(tmp_path))


def test_a_flipped_byte_in_a_stream_is_refused_before_the_file_is_whole():
    data = bytearray(encode_rows(random_rows(2000, 0), Encoding()))
    data[1000] ^= 4
    with pytest.raises(ValueError, match=r"enh is damaged: chunk 0 \(bytes 0 to 65\d\d\d\)"):
        decode_rows(bytes(data[: len(data) // 2]), Encoding(), 2, "enh", partial=True)


def sealed(content):
    """A manifest with a right hash, whatever it says."""
    body = json.dumps(content).encode()[:-1] + b", "
    return body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"}}'.encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "has version 2. Expected 1"),
        (lambda c: c["levels"][1].update(start=60), "level 1 does not follow"),
        (lambda c: c["levels"][1].update(rows_file="../../etc/passwd"), "contradicts itself"),
        (
            lambda c: (
                c["levels"][1].update(rows_file="../x"),
                c["files"].update({"../x": c["files"].pop("rows_1.bin")}),
            ),
            "'../x' is not a file name",
        ),
        (
            lambda c: c["files"].update(more={"bytes": 1, "sha256": ""}),
            "name other files: {'more'}",
        ),
        (lambda c: c["encoding"].update(codec="gzip"), "'gzip' is none of none, zstd"),
        (lambda c: c.update(sh_degree=7), "SH degree"),
        (lambda c: c.pop("files"), "contradicts itself"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, change, message):
    three_levels(tmp_path)
    content = json.loads((tmp_path / "levels.json").read_text())
    content.pop("sha256")
    (tmp_path / "levels.json").write_bytes(sealed(content))
    assert len(load_levels(tmp_path)) == 3  # the seal itself is right
    change(content)
    (tmp_path / "levels.json").write_bytes(sealed(content))
    with pytest.raises(ValueError, match=message):
        load_levels(tmp_path)


def test_another_number_of_records_is_refused(tmp_path):
    """Hashes that fit, but rows that do not: a manifest of other files."""
    three_levels(tmp_path)
    content = json.loads((tmp_path / "levels.json").read_text())
    content.pop("sha256")
    for level, by in ((1, -1), (2, -1)):
        content["levels"][level]["stop"] += by
    content["levels"][2]["start"] -= 1
    (tmp_path / "levels.json").write_bytes(sealed(content))
    with pytest.raises(ValueError, match=r"rows_1\.bin has 300 records. Expected 299"):
        gaussians_of_level(tmp_path, 1)


# -------------------------------------------------------------------------------------------------- PLYs, and smaller files


def test_merge_undoes_extract_byte_for_byte(tmp_path):
    three_levels(tmp_path / "layers")
    plys = merge(load_levels(tmp_path / "layers"), tmp_path / "plys")
    assert [path.name for path in plys] == ["level_0.ply", "level_1.ply", "level_2.ply"]
    levels = extract(plys, tmp_path / "again")
    assert [level.rescale for level in levels.levels] == [0.25, 0.5, 1.0]
    for name in ("rows_0.bin", "rows_1.bin", "rows_2.bin", "opacity_1.bin", "opacity_2.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "layers" / name).read_bytes()
    for path in merge(levels, tmp_path / "plys2"):
        assert path.read_bytes() == (tmp_path / "plys" / path.name).read_bytes()


def test_extract_refuses_a_foundation_that_moved(tmp_path):
    """As a library does that splits parents in place: rows of the level below are not where they were."""
    base = random_rows(50, 0)
    base.save_ply(tmp_path / "a.ply")
    moved = concatenate([base, random_rows(10, 1)])
    moved.means[7] += 0.1
    moved.save_ply(tmp_path / "b.ply")
    with pytest.raises(ValueError, match=r"b\.ply: 1 of 50 Gaussians .* other means .*first: 7"):
        extract([tmp_path / "a.ply", tmp_path / "b.ply"], tmp_path / "layers")
    with pytest.raises(ValueError, match="from coarse to fine"):
        extract([tmp_path / "b.ply", tmp_path / "a.ply"], tmp_path / "layers")


def test_pack_sorts_rows_and_their_opacities_together(tmp_path):
    _, _, source = three_levels(tmp_path / "layers")
    packed = pack(source, tmp_path / "packed", Encoding())
    # Every row is found again by its place, with its opacity at every level.
    for k in (1, 2):
        before = gaussians_of_level(source, k)
        after = gaussians_of_level(packed, k)
        order = [torch.argsort(g.means[:, 0]) for g in (before, after)]
        assert torch.equal(before.means[order[0]], after.means[order[1]])
        assert torch.equal(before.opacity_logits[order[0]], after.opacity_logits[order[1]])
    own = packed.rows(2, packed.read("rows_2.bin")).opacity_logits
    assert bool((own[:-1] >= own[1:]).all())
    assert packed.levels[1].metrics == {"psnr": 20.5}
    with pytest.raises(ValueError, match="Give another folder"):
        pack(source, tmp_path / "layers", Encoding())


def test_packing_saves_bytes(tmp_path):
    _, _, source = three_levels(tmp_path / "layers")
    small = pack(source, tmp_path / "small", Encoding("quantised", "uint8", "zstd"))
    assert small.num_bytes(2) < 0.32 * source.num_bytes(
        2
    )  # measured 0.29: 44 of 152 bytes, random numbers don't compress


def test_what_is_left_out_as_invisible_changes_no_bit(tmp_path):
    three_levels(tmp_path)
    center = torch.tensor([[1.0, -14.0, 5.0]])
    viewmat = look_at(center, torch.tensor([[1.0, -2.0, 5.0]]), torch.tensor([0.0, 0.0, 1.0]))
    K = torch.tensor([[[40.0, 0, 24], [0, 40, 18], [0, 0, 1]]])
    camera = Cameras(viewmat, K, ((48, 36),), ("a",))
    levels = load_levels(tmp_path)
    for k in range(3):
        everything = gaussians_of_level(levels, k)
        visible = gaussians_of_level(levels, k, visible_only=True)
        assert visible.num == levels.levels[k].visible < everything.num
        assert torch.equal(rasterize(visible, camera).rgb, rasterize(everything, camera).rgb)
    # The threshold is not a wide one: what is just above it does draw.
    bright = gaussians_of_level(levels, 2)
    bright.opacity_logits[:] = math.log(0.0045 / (1 - 0.0045))
    assert visible_rows(bright).num == bright.num and rasterize(bright, camera).rgb.any()


# ------------------------------------------------------------------------------ a second reader, written from the documentation


def test_a_reader_written_from_the_documentation_agrees(tmp_path):
    """Quantised rows, no codec: chunk headers by hand, one record by struct, the formulas of docs/data_formats.md."""
    three_levels(tmp_path, Encoding("quantised", "uint8", "none"), degree=1)
    content = json.loads((tmp_path / "levels.json").read_text())
    ranges = content["encoding"]["ranges"]
    data = (tmp_path / "rows_1.bin").read_bytes()
    count, size, checksum = struct.unpack_from("<III", data, 0)
    assert (count, size) == (300, len(data) - 12) and zlib.crc32(data[12:]) == checksum
    ours = decode_rows(data, load_levels(tmp_path).encoding, 1, "x")
    record = struct.Struct("<3H3BIB3e9b")
    assert record.size * count == size
    for row in (0, 17, 299):
        values = record.unpack_from(data, 12 + row * record.size)
        for axis in range(3):
            low, high = ranges["means_low"][axis], ranges["means_high"][axis]
            c = low + (high - low) * values[axis] / 65535
            x = ranges["means_middle"][axis] + math.copysign(
                ranges["means_unit"] * (math.exp(abs(c)) - 1), c
            )
            assert x == pytest.approx(float(ours.means[row, axis]), abs=1e-5)
            span = ranges["log_scales_high"] - ranges["log_scales_low"]
            log_scale = ranges["log_scales_low"] + span * values[3 + axis] / 255
            assert log_scale == pytest.approx(float(ours.log_scales[row, axis]), abs=1e-5)
            assert values[8 + axis] == pytest.approx(float(ours.sh0[row, 0, axis]), abs=1e-6)
        word, left_out = values[6], values[6] >> 30
        three = [(2 * ((word >> s) & 1023) / 1023 - 1) / math.sqrt(2) for s in (20, 10, 0)]
        quat = [
            *three[:left_out],
            math.sqrt(max(0, 1 - sum(v * v for v in three))),
            *three[left_out:],
        ]
        assert quat == pytest.approx(ours.quats[row].tolist(), abs=1e-6)
        opacity = min(max(values[7] / 255, 0.001), 254.5 / 255)
        assert opacity == pytest.approx(float(ours.opacity_logits[row].sigmoid()), abs=1e-6)
        for j in range(9):
            q = values[11 + j]
            rest = math.copysign((q / 127) ** 2 * ranges["shN_max"], q)
            assert rest == pytest.approx(float(ours.shN[row, j // 3, j % 3]), abs=1e-6)
    lists = decode_opacities(
        (tmp_path / "opacity_1.bin").read_bytes(), Encoding(opacity="uint8"), "y"
    )
    assert len(lists) == 70

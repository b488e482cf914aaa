"""Gaussians and opacity lists as bytes that can be cut off anywhere: chunks of records. Layout: docs/data_formats.md, "Layers".

Notation: a *record* is one Gaussian (or one opacity) in a fixed number of bytes; a *chunk* is a header (number of records, bytes of the
payload, CRC-32 of the payload) and a payload that can be read alone. Every prefix of a file holds some whole chunks, and so some whole records.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import zstandard
from torch import Tensor

from s2d.gaussians import Gaussians
from s2d.layers.quantise import (
    Ranges,
    from_bytes,
    join_opacities,
    join_quats,
    pack_opacities,
    pack_quats,
    to_bytes,
)

RowFormat = Literal["float32", "float16", "quantised"]
OpacityFormat = Literal["float32", "uint8"]
Codec = Literal["none", "zstd"]

HEADER = struct.Struct("<III")  # records, bytes of the payload, CRC-32 of the payload
# Small enough that a slow link brings one in a fraction of a second, large enough that zstd finds what repeats.
CHUNK_BYTES = 1 << 16
ZSTD_LEVEL = 19  # packing happens once; reading is equally fast at every level


@dataclass(frozen=True)
class Encoding:
    """How rows and opacities are stored."""

    rows: RowFormat = "float32"
    opacity: OpacityFormat = "float32"
    codec: Codec = "none"
    ranges: Ranges | None = None
    """Of "quantised" rows."""

    def row_type(self, sh_degree: int) -> np.dtype:
        """The record of one Gaussian, little-endian and without padding."""
        num_rest = 3 * ((sh_degree + 1) ** 2 - 1)
        # Centres stay float32 in "float16": half a pixel would be lost in any scene that is larger than what it shows best.
        means, scales, quats, sh0, rest = {
            "float32": ("<f4", "<f4", ("<f4", (4,)), "<f4", "<f4"),
            "float16": ("<f4", "<f2", ("<f2", (4,)), "<f2", "<f2"),
            "quantised": ("<u2", "u1", ("<u4", (1,)), "<f2", "i1"),
        }[self.rows]
        fields = [
            ("means", means, (3,)),
            ("log_scales", scales, (3,)),
            ("quats", *quats),
            ("opacity", self.opacity_type, (1,)),
            ("sh0", sh0, (3,)),
            ("shN", rest, (num_rest,)),
        ]
        return np.dtype(fields if num_rest else fields[:-1])

    @property
    def opacity_type(self) -> str:
        return "<f4" if self.opacity == "float32" else "u1"


def encode_rows(gaussians: Gaussians, encoding: Encoding) -> bytes:
    """Write Gaussians as records in chunks; float32 comes back bit for bit."""
    values = {
        name: (tensor[:, None] if tensor.ndim == 1 else tensor.flatten(1)).detach().cpu().numpy()
        for name, tensor in gaussians.tensors().items()
    }
    records = np.zeros(gaussians.num, encoding.row_type(gaussians.sh_degree))
    if encoding.rows == "quantised":
        assert encoding.ranges is not None
        values = to_bytes(values, encoding.ranges)
        values["quats"] = pack_quats(values["quats"])
    values["opacity"] = _stored_opacities(values.pop("opacity_logits"), encoding)
    for name in records.dtype.names:
        records[name] = values[name]
    return _write_chunks(records, encoding.codec)


def decode_rows(
    data: bytes, encoding: Encoding, sh_degree: int, where: str, partial: bool = False
) -> Gaussians:
    """Read what `encode_rows` wrote, or a part of it from the start.

    Args:
        data: The bytes of a file, or with `partial` its first ones: what is not a whole chunk yet is left out.
        encoding, sh_degree: As written.
        where: Name of the file for messages.

    Raises:
        ValueError: A chunk is damaged, or the file is cut off and not `partial`; names the file and the chunk.
    """
    records = _read_chunks(data, encoding.row_type(sh_degree), encoding.codec, where, partial)
    num = len(records)
    values = {name: records[name] for name in records.dtype.names}
    opacity_logits = _logits(values.pop("opacity"), encoding)
    values.setdefault("shN", np.zeros((num, 0), np.float32))
    if encoding.rows == "quantised":
        assert encoding.ranges is not None
        values["quats"] = join_quats(values["quats"])
        values = from_bytes(values, encoding.ranges)
    tensors = {
        name: torch.from_numpy(np.array(column, np.float32)) for name, column in values.items()
    }
    return Gaussians(
        means=tensors["means"],
        log_scales=tensors["log_scales"],
        quats=tensors["quats"],
        opacity_logits=opacity_logits,
        sh0=tensors["sh0"][:, None, :],
        shN=tensors["shN"].reshape(num, (sh_degree + 1) ** 2 - 1, 3),
    )


def encode_opacities(
    opacity_logits: Tensor,  # [N]
    encoding: Encoding,
) -> bytes:
    """Write an opacity list as records in chunks; float32 comes back bit for bit."""
    stored = _stored_opacities(opacity_logits.detach().cpu().numpy()[:, None], encoding)
    return _write_chunks(np.ascontiguousarray(stored[:, 0], encoding.opacity_type), encoding.codec)


def decode_opacities(data: bytes, encoding: Encoding, where: str, partial: bool = False) -> Tensor:
    """Read what `encode_opacities` wrote, or a part from the start; as `decode_rows`. [N] logits"""
    stored = _read_chunks(data, np.dtype(encoding.opacity_type), encoding.codec, where, partial)
    return _logits(stored[:, None], encoding)


def as_stored(
    opacity_logits: Tensor,  # [N]
    encoding: Encoding,
) -> Tensor:
    """What opacities come back as. [N] logits"""
    return _logits(_stored_opacities(opacity_logits.cpu().numpy()[:, None], encoding), encoding)


def _stored_opacities(logits: np.ndarray, encoding: Encoding) -> np.ndarray:
    return logits if encoding.opacity == "float32" else pack_opacities(logits)


def _logits(stored: np.ndarray, encoding: Encoding) -> Tensor:
    logits = stored if encoding.opacity == "float32" else join_opacities(stored)
    return torch.from_numpy(np.array(logits[:, 0], np.float32))


# ---------------------------------------------------------------------------------------------------------------- chunks


def _write_chunks(records: np.ndarray, codec: Codec) -> bytes:
    count = max(1, CHUNK_BYTES // records.dtype.itemsize)
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    parts = []
    for start in range(0, len(records), count):
        chunk = records[start : start + count]
        payload = chunk.tobytes()
        if codec == "zstd":
            # Byte by byte of all records: signs and exponents of neighbours are alike, and zstd finds that.
            planes = np.frombuffer(payload, np.uint8).reshape(len(chunk), -1).T
            payload = compressor.compress(planes.tobytes())
        parts += [HEADER.pack(len(chunk), len(payload), zlib.crc32(payload)), payload]
    return b"".join(parts)


def _read_chunks(
    data: bytes, dtype: np.dtype, codec: Codec, where: str, partial: bool
) -> np.ndarray:
    parts = [
        _read_payload(payload, count, dtype, codec, f"{where}: chunk {number}")
        for number, (count, payload) in enumerate(_split_chunks(data, where, partial))
    ]
    return np.frombuffer(b"".join(parts), dtype)


def _split_chunks(data: bytes, where: str, partial: bool) -> Iterator[tuple[int, bytes]]:
    """Number of records and checked payload of every whole chunk."""
    position, number = 0, 0
    while position < len(data):
        end = position + HEADER.size
        if end <= len(data):
            count, size, checksum = HEADER.unpack_from(data, position)
            end += size
        if end > len(data):
            if partial:
                return
            raise ValueError(
                f"{where} is cut off: chunk {number} ends at byte {end}, the file at {len(data)}. Fetch or pack it again."
            )
        payload = data[end - size : end]
        if zlib.crc32(payload) != checksum:
            raise ValueError(
                f"{where} is damaged: chunk {number} (bytes {position} to {end}) has another checksum than it was written with. "
                "Fetch or pack it again."
            )
        yield count, payload
        position, number = end, number + 1


def _read_payload(payload: bytes, count: int, dtype: np.dtype, codec: Codec, where: str) -> bytes:
    """The records of a chunk, one after the other."""
    size = count * dtype.itemsize
    if codec == "zstd":
        try:
            # The frame itself says how much memory it wants: believe it only where it agrees with the header.
            if zstandard.get_frame_parameters(payload).content_size == size:
                payload = zstandard.ZstdDecompressor().decompress(payload)
        except zstandard.ZstdError as error:
            raise ValueError(
                f"{where} is not zstd ({error}). Fetch or pack the file again."
            ) from error
    if len(payload) != size:
        raise ValueError(
            f"{where} has not the {size} bytes of its {count} records. Fetch or pack the file again, or check the encoding in levels.json."
        )
    if codec == "zstd":
        payload = np.frombuffer(payload, np.uint8).reshape(dtype.itemsize, count).T.tobytes()
    return payload

// Levels of detail as they arrive: levels.json, chunks of records, and what of them can be shown. The format is docs/data_formats.md,
// "Layers"; the rules of what is shown are those of s2d/layers/stream.py. No dependency but a zstd decoder that is handed in, and no DOM.

const HEADER_BYTES = 12;
const OPACITY_OF_0 = 0.001;
const OPACITY_OF_255 = 254.5 / 255;
const PIECES_PER_SECOND = 2; // updates while a file arrives

export class DamagedError extends Error {}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

export function crc32(bytes) {
  let crc = 0xffffffff;
  for (let i = 0; i < bytes.length; i++) crc = CRC_TABLE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

export async function sha256(bytes) {
  // Browsers hash on 127.0.0.1 and over https only; elsewhere the checksums of the chunks have to do.
  if (!globalThis.crypto?.subtle) return null;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export async function readManifest(bytes) {
  const text = new TextDecoder("latin1").decode(bytes);
  const at = text.lastIndexOf('"sha256"');
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    throw new DamagedError("levels.json is damaged: it is not JSON.");
  }
  if (manifest.version !== 1) throw new DamagedError(`levels.json has version ${manifest.version}. Expected 1.`);
  const digest = await sha256(bytes.subarray(0, at));
  if (digest !== null && digest !== manifest.sha256)
    throw new DamagedError("levels.json is damaged: its SHA-256 is not the one that it ends with.");
  return manifest;
}

function halfToFloat(half) {
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  const sign = half & 0x8000 ? -1 : 1;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const logit = (p) => Math.log(p / (1 - p));
const sigmoid = (x) => 1 / (1 + Math.exp(-x));

const SIZES = { f4: 4, f2: 2, u4: 4, u2: 2, u1: 1, i1: 1 };
const READ = {
  f4: (view, at) => view.getFloat32(at, true),
  f2: (view, at) => halfToFloat(view.getUint16(at, true)),
  u4: (view, at) => view.getUint32(at, true),
  u2: (view, at) => view.getUint16(at, true),
  u1: (view, at) => view.getUint8(at),
  i1: (view, at) => view.getInt8(at),
};

/** Fields of a record: name, type, count, place. */
export function recordLayout(encoding, degree) {
  const rest = 3 * ((degree + 1) ** 2 - 1);
  const types = {
    float32: ["f4", "f4", ["f4", 4], "f4", "f4"],
    float16: ["f4", "f2", ["f2", 4], "f2", "f2"],
    quantised: ["u2", "u1", ["u4", 1], "f2", "i1"],
  }[encoding.rows];
  const fields = {};
  let at = 0;
  const add = (name, type, count) => {
    fields[name] = { read: READ[type], size: SIZES[type], count, at };
    at += SIZES[type] * count;
  };
  add("means", types[0], 3);
  add("log_scales", types[1], 3);
  add("quats", ...types[2]);
  add("opacity", encoding.opacity === "float32" ? "f4" : "u1", 1);
  add("sh0", types[3], 3);
  if (rest) add("shN", types[4], rest);
  return { fields, bytes: at, rest };
}

/** Whole, checked chunks of a file that arrives piece by piece. */
class Chunks {
  constructor(name, recordBytes, codec, unzstd) {
    Object.assign(this, { name, recordBytes, codec, unzstd, pending: new Uint8Array(0), number: 0 });
  }

  *push(piece) {
    const joined = new Uint8Array(this.pending.length + piece.length);
    joined.set(this.pending);
    joined.set(piece, this.pending.length);
    let at = 0;
    while (joined.length - at >= HEADER_BYTES) {
      const header = new DataView(joined.buffer, at, HEADER_BYTES);
      const [count, size, checksum] = [0, 4, 8].map((place) => header.getUint32(place, true));
      if (joined.length - at - HEADER_BYTES < size) break;
      const payload = joined.subarray(at + HEADER_BYTES, at + HEADER_BYTES + size);
      const where = `${this.name}: chunk ${this.number}`;
      if (crc32(payload) !== checksum) throw new DamagedError(`${where} has another checksum than it was written with.`);
      yield { count, records: this.records(payload, count, where) };
      this.number += 1;
      at += HEADER_BYTES + size;
    }
    this.pending = joined.slice(at);
  }

  records(payload, count, where) {
    const size = count * this.recordBytes;
    if (this.codec === "none") {
      if (payload.length !== size) throw new DamagedError(`${where} has not the bytes of its ${count} records.`);
      return payload;
    }
    const planes = this.unzstd(payload);
    if (planes.length !== size) throw new DamagedError(`${where} has not the bytes of its ${count} records.`);
    const records = new Uint8Array(size);
    for (let place = 0; place < this.recordBytes; place++)
      for (let row = 0; row < count; row++) records[row * this.recordBytes + place] = planes[place * count + row];
    return records;
  }
}

/** What has arrived of a folder of levels. */
export class Layers {
  constructor(manifest, unzstd) {
    this.manifest = manifest;
    this.layout = recordLayout(manifest.encoding, manifest.sh_degree);
    this.columns = 14 + this.layout.rest; // of a PLY row: x y z, f_dc, f_rest, opacity, scales, rotation
    this.opacityColumn = 6 + this.layout.rest;
    const opacityBytes = manifest.encoding.opacity === "float32" ? 4 : 1;
    const chunks = (name, bytes) => new Chunks(name, bytes, manifest.encoding.codec, unzstd);
    this.levels = manifest.levels.map((level) => ({
      ...level,
      rows: new Float32Array((level.stop - level.start) * this.columns),
      numRows: 0,
      own: new Float32Array(level.stop - level.start),
      rowChunks: chunks(level.rows_file, this.layout.bytes),
      below: level.opacity_file === null ? null : new Float32Array(level.start),
      numBelow: 0,
      belowChunks: level.opacity_file === null ? null : chunks(level.opacity_file, opacityBytes),
    }));
  }

  files(k) {
    const level = this.levels[k];
    return [level.opacity_file, level.rows_file].filter((name) => name !== null);
  }

  push(k, name, piece) {
    const level = this.levels[k];
    if (name === level.rows_file)
      for (const { count, records } of level.rowChunks.push(piece)) this.readRows(level, count, records);
    else
      for (const { count, records } of level.belowChunks.push(piece)) this.readOpacities(level, count, records);
  }

  opacity(view, at) {
    if (this.manifest.encoding.opacity === "float32") return view.getFloat32(at, true);
    return logit(Math.min(Math.max(view.getUint8(at) / 255, OPACITY_OF_0), OPACITY_OF_255));
  }

  readOpacities(level, count, records) {
    const view = new DataView(records.buffer, records.byteOffset, records.byteLength);
    const size = records.length / count;
    for (let row = 0; row < count; row++) level.below[level.numBelow++] = this.opacity(view, row * size);
  }

  readRows(level, count, records) {
    const view = new DataView(records.buffer, records.byteOffset, records.byteLength);
    const { fields, bytes, rest } = this.layout;
    const { ranges } = this.manifest.encoding;
    const K = rest / 3;
    for (let row = 0; row < count; row++) {
      const base = row * bytes;
      const out = level.numRows * this.columns;
      const value = (name, i) => fields[name].read(view, base + fields[name].at + i * fields[name].size);
      for (let i = 0; i < 3; i++) {
        level.rows[out + i] = ranges ? uncurve(value("means", i), ranges, i) : value("means", i);
        level.rows[out + 3 + i] = value("sh0", i);
        const size = value("log_scales", i);
        const span = ranges ? ranges.log_scales_high - ranges.log_scales_low : 0;
        level.rows[out + this.opacityColumn + 1 + i] = ranges ? ranges.log_scales_low + (span * size) / 255 : size;
      }
      for (let i = 0; i < rest; i++) {
        // Coefficient by coefficient in a record, channel by channel in a PLY.
        let coefficient = value("shN", i);
        if (ranges) coefficient = Math.sign(coefficient) * (coefficient / 127) ** 2 * ranges.shN_max;
        level.rows[out + 6 + (i % 3) * K + Math.floor(i / 3)] = coefficient;
      }
      const quat = ranges ? unpackQuat(value("quats", 0)) : [0, 1, 2, 3].map((i) => value("quats", i));
      level.rows.set(quat, out + this.opacityColumn + 4);
      level.own[level.numRows] = this.opacity(view, base + fields.opacity.at);
      level.numRows += 1;
    }
  }

  /**
   * Finest complete level (-1: none), share of the next one's rows, number of rows and their opacities, and the share of the full resolution at
   * which that is to be drawn (s2d/layers/show.py): the next level's own from half of its rows on.
   */
  shown() {
    let opacities = new Float32Array(0);
    let [complete, share, numRows] = [-1, 0, 0];
    let rescale = this.levels[0].rescale;
    for (const level of this.levels) {
      if (level.below !== null && level.numBelow < level.start) break;
      const wanted = level.stop - level.start;
      const part = level.numRows === wanted ? 1 : level.numRows / wanted;
      if (part === 0) break;
      const next = new Float32Array(level.start + level.numRows);
      next.set(opacities);
      if (level.below !== null)
        // As the finer rows come, those below move to the opacities that they have beside them.
        for (let i = 0; i < level.start; i++)
          next[i] =
            part === 1 ? level.below[i] : logit((1 - part) * sigmoid(opacities[i]) + part * sigmoid(level.below[i]));
      next.set(level.own.subarray(0, level.numRows), level.start);
      opacities = next;
      numRows += level.numRows;
      rescale += Math.min(1, 2 * part) * (level.rescale - rescale);
      if (part < 1) {
        share = part;
        break;
      }
      complete = level.id;
    }
    return { complete, share, numRows, opacities, rescale };
  }

  /** What is shown as the bytes of a 3DGS PLY. */
  toPly({ numRows, opacities }) {
    const numbered = (name, count) => Array.from({ length: count }, (_, i) => `${name}_${i}`);
    const names = ["x", "y", "z", ...numbered("f_dc", 3), ...numbered("f_rest", this.layout.rest)];
    names.push("opacity", ...numbered("scale", 3), ...numbered("rot", 4));
    const lines = ["ply", "format binary_little_endian 1.0", `element vertex ${numRows}`];
    const head = new TextEncoder().encode(
      [...lines, ...names.map((name) => `property float ${name}`), "end_header", ""].join("\n"),
    );
    const body = new Float32Array(numRows * this.columns);
    let row = 0;
    for (const level of this.levels) {
      const count = Math.min(level.numRows, numRows - row);
      body.set(level.rows.subarray(0, count * this.columns), row * this.columns);
      row += count;
    }
    for (let i = 0; i < numRows; i++) body[i * this.columns + this.opacityColumn] = opacities[i];
    const bytes = new Uint8Array(head.length + body.byteLength);
    bytes.set(head);
    bytes.set(new Uint8Array(body.buffer), head.length);
    return bytes;
  }
}

function uncurve(q, ranges, axis) {
  const c = ranges.means_low[axis] + ((ranges.means_high[axis] - ranges.means_low[axis]) * q) / 65535;
  return ranges.means_middle[axis] + Math.sign(c) * ranges.means_unit * Math.expm1(Math.abs(c));
}

function unpackQuat(word) {
  const leftOut = word >>> 30;
  const rest = [20, 10, 0].map((place) => ((((word >>> place) & 1023) / 1023) * 2 - 1) / Math.SQRT2);
  rest.splice(leftOut, 0, Math.sqrt(Math.max(0, 1 - rest.reduce((sum, v) => sum + v * v, 0))));
  return rest;
}

/**
 * Fetch levels coarse to fine; yields { layers, bytes, bitsPerSecond, done } whenever there is more to show. How far it goes is decided by
 * the bandwidth alone: a level is begun if it will be there `budget` seconds after the start; level 0 always.
 */
export async function* stream(url, unzstd, { maxLevel = Infinity, budget = Infinity } = {}) {
  const start = performance.now();
  const manifest = await readManifest(new Uint8Array(await (await get(`${url}levels.json`)).arrayBuffer()));
  const layers = new Layers(manifest, unzstd);
  const link = { bytes: 0, seconds: 0 };
  let [bytes, updated] = [0, performance.now()];
  const state = (done) => ({ layers, bytes, bitsPerSecond: link.seconds ? (8 * link.bytes) / link.seconds : 0, done });
  const last = Math.min(manifest.levels.length - 1, maxLevel);
  for (let k = 0; k <= last; k++) {
    const missing = layers.files(k).reduce((sum, name) => sum + manifest.files[name].bytes, 0);
    const left = budget - (performance.now() - start) / 1000;
    if (k > 0 && link.seconds && missing > (left * link.bytes) / link.seconds) break;
    for (const name of layers.files(k)) {
      const { sha256: digest, bytes: size } = manifest.files[name];
      const content = new Uint8Array(size);
      let at = 0;
      for await (const piece of pieces(`${url}${name}?sha256=${digest}`, size, digest, link)) {
        content.set(piece, at);
        at += piece.length;
        bytes += piece.length;
        layers.push(k, name, piece);
        if (performance.now() - updated > 1000 / PIECES_PER_SECOND) {
          yield state(false);
          updated = performance.now();
        }
      }
      const found = await sha256(content);
      if (found !== null && found !== digest) throw new DamagedError(`${name} is damaged: its SHA-256 is not the one in levels.json.`);
    }
    yield state(k === last);
    updated = performance.now();
  }
  yield state(true);
}

async function get(url, headers = {}) {
  const answer = await fetch(url, { headers });
  if (!answer.ok) throw new Error(`${url}: the server says ${answer.status} ${answer.statusText}`);
  return answer;
}

/** The bytes of a file; goes on where a connection broke, a few times. */
async function* pieces(url, size, digest, link) {
  let at = 0;
  for (let failures = 0; at < size; ) {
    try {
      const headers = at ? { Range: `bytes=${at}-`, "If-Range": `"${digest}"` } : {};
      let before = performance.now();
      const answer = await get(url, headers);
      if (at && answer.status !== 206) throw new DamagedError(`${url} has changed on the server. Load the page again.`);
      const reader = answer.body.getReader();
      for (let next = await reader.read(); !next.done; next = await reader.read()) {
        const piece = next.value.subarray(0, size - at);
        const seconds = (performance.now() - before) / 1000;
        before = performance.now();
        // Each second that passes counts half of what came before.
        link.bytes = link.bytes * 0.5 ** seconds + piece.length;
        link.seconds = link.seconds * 0.5 ** seconds + seconds;
        at += piece.length;
        failures = 0;
        yield piece;
      }
      if (at < size) throw new Error(`${url} broke off at byte ${at}`);
    } catch (error) {
      failures += 1;
      if (error instanceof DamagedError || failures >= 5) throw error;
      await new Promise((resolve) => setTimeout(resolve, 200 * 2 ** (failures - 1)));
    }
  }
}

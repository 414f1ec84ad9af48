// The run: unpacked once, then read by every part of the page. `frame` counts the shown steps.

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent.trim()), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const run = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  run.numFrames = run.frames.step.length;
  run.reserved.cells = planes(run, bytes, 4 + length, 0);
  run.paged.cells = planes(run, bytes, 4 + length, 1);
  return run;
}

// Each plane is uint8 [frames, cells], stored as differences between two frames.
const PLANES = ["live", "held", "cached", "holders", "low", "middle", "high"];

function planes(run, bytes, start, side) {
  const size = run.numFrames * run.numCells, found = {};
  PLANES.forEach((name, index) => {
    const at = start + (side * PLANES.length + index) * size;
    const plane = found[name] = bytes.subarray(at, at + size);
    for (let i = run.numCells; i < size; i++) plane[i] ^= plane[i - run.numCells];
  });
  return found;
}

// A cell of one side: counts of `scale` parts, the sequences that hold it, and its request.
function cellAt(run, side, frame, index) {
  const at = frame * run.numCells + index, planes = run[side].cells;
  const owner = planes.low[at] | planes.middle[at] << 8 | planes.high[at] << 16;
  return {
    live: planes.live[at], held: planes.held[at], cached: planes.cached[at], holders: planes.holders[at],
    owner: owner === 0 ? null : owner === 0xffffff ? -1 : owner - 1, // -1: of no request
  };
}

const counted = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;
const whole = number => Math.round(number).toLocaleString("en-US");

function percent(part, all) {
  const share = all ? 100 * part / all : 0;
  if (share > 99 && share < 100) return `${Math.min(99.9, share).toFixed(1)}%`;
  return share > 0 && share < .5 ? "<1%" : `${Math.round(share)}%`;
}

function bytes(number) {
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (number < 1000 || unit === "TiB") return `${number < 10 && unit !== "B" ? number.toFixed(1) : whole(number)} ${unit}`;
    number /= 1024;
  }
}

function seconds(number) {
  if (number < 1) return `${whole(number * 1000)} ms`;
  return number < 120 ? `${number.toFixed(1)} s` : `${(number / 60).toFixed(1)} min`;
}

// The seconds at a step, between those of the shown steps.
function timeAt(run, step) {
  const { step: steps, t } = run.frames;
  const next = steps.findIndex(each => each >= step);
  if (next <= 0) return next ? t[t.length - 1] : t[0];
  const share = (step - steps[next - 1]) / (steps[next] - steps[next - 1]);
  return t[next - 1] + share * (t[next] - t[next - 1]);
}

function frameAt(run, step) {
  const found = run.frames.step.findIndex(each => each >= step);
  return found < 0 ? run.numFrames - 1 : found;
}

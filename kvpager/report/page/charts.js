// Charts over the steps: the shares of the memory, and the traffic between memories.

// The width follows the page, so that words keep their size.
const CHART = { width: 1100, height: 250, left: 54, right: 12, top: 12, bottom: 24 };

class Chart {
  // A chart with an axis of steps. Arrow keys on it move the step, a click goes there.
  constructor(run, root, { height = CHART.height, label, sentence, go }) {
    Object.assign(this, { run, sentence, height });
    this.svg = drawn("svg", { viewBox: `0 0 ${CHART.width} ${height}`, tabindex: 0, role: "application", "aria-roledescription": "chart", "aria-label": label });
    root.append(this.svg);
    const last = Math.max(1, run.frames.step[run.numFrames - 1]);
    this.x = step => CHART.left + step / last * (CHART.width - CHART.left - CHART.right);
    this.step = x => (x - CHART.left) / (CHART.width - CHART.left - CHART.right) * last;
    this.now = drawn("line", { class: "now", y1: CHART.top - 6, y2: height - CHART.bottom });
    const frameUnder = event => frameAt(run, this.step((event.clientX - this.svg.getBoundingClientRect().left) * CHART.width / this.svg.getBoundingClientRect().width));
    this.svg.addEventListener("pointermove", event => this.tell(frameUnder(event), event.clientY));
    this.svg.addEventListener("pointerleave", hideTip);
    this.svg.addEventListener("blur", hideTip);
    this.svg.addEventListener("click", event => go(frameUnder(event)));
    this.svg.addEventListener("focus", () => { if (this.svg.matches(":focus-visible")) say(this.tell(this.frame)); });
    this.svg.addEventListener("keydown", event => {
      const moves = { ArrowRight: 1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -run.numFrames, End: run.numFrames };
      if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      go(this.frame + moves[event.key]);
      say(this.tell(this.frame));
    });
  }

  axis(ticks) {
    const { run, svg, height } = this;
    for (const [y, text] of ticks) {
      svg.append(drawn("line", { class: "grid", x1: CHART.left, x2: CHART.width - CHART.right, y1: y, y2: y }),
        drawn("text", { x: CHART.left - 8, y: y + 4, "text-anchor": "end" }, text));
    }
    for (const step of roundSteps(run.frames.step[run.numFrames - 1])) {
      svg.append(drawn("text", { x: this.x(step), y: height - 4, "text-anchor": step ? "middle" : "start" }, `${step ? "" : "step "}${whole(step)}`));
    }
  }

  finish() { this.svg.append(this.now); }

  tell(frame, y = null) {
    const box = this.svg.getBoundingClientRect(), words = this.sentence(frame);
    const left = box.left + this.x(this.run.frames.step[frame]) / CHART.width * box.width;
    const top = y === null ? box.top : y - 8;
    showTip(words, { left, top, bottom: top + 24, width: 0 });
    return words;
  }

  show(frame) {
    this.frame = frame;
    const x = this.x(this.run.frames.step[frame]);
    this.now.setAttribute("x1", x);
    this.now.setAttribute("x2", x);
  }
}

// At most about six round numbers from 0, the last not too close to the right edge.
function roundSteps(last) {
  const rough = Math.max(1, last / Math.min(6, Math.floor(CHART.width / 90))), power = 10 ** Math.floor(Math.log10(rough));
  const stride = [1, 2, 5, 10].find(each => each * power >= rough) * power;
  return Array.from({ length: Math.floor(last * .98 / stride) + 1 }, (_, i) => i * stride);
}

function svgPatterns(svg) {
  const hatch = drawn("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  hatch.append(drawn("rect", { width: 6, height: 6, fill: "var(--card)" }), drawn("rect", { width: 2, height: 6, fill: "var(--waste)" }));
  const dots = drawn("pattern", { id: "dots", width: 6, height: 6, patternUnits: "userSpaceOnUse" });
  dots.append(drawn("rect", { width: 6, height: 6, fill: "var(--card)" }), drawn("circle", { cx: 3, cy: 3, r: 1.2, fill: "var(--cached)" }));
  const defs = drawn("defs");
  defs.append(hatch, dots);
  svg.append(defs);
}

// -------------------------------------------------------------------- shares of the memory

const AREAS = [
  ["live", "var(--good)", "tokens", "Slots of held blocks with a token."],
  ["open", "url(#hatch)", "taken, empty", "Slots of held blocks without a token, at the ends of sequences."],
  ["cached", "url(#dots)", "cached", "Blocks that no sequence holds, kept for prompts with the same prefix. They are evicted when their room is needed."],
  ["free", "var(--free)", "free", "Blocks that hold nothing."],
];

function occupancyChart(run, root, go) {
  root.replaceChildren();
  const { frames, blockSize, numBlocks } = run, slots = numBlocks * blockSize;
  const host = Math.max(...frames.host), below = host ? 46 : 0;
  const floor = CHART.height - CHART.bottom;
  const chart = new Chart(run, root, {
    height: CHART.height + below, go, label: "Shares of the memory over the steps. Arrow keys move the step.",
    sentence: frame => occupancySentence(run, frame),
  });
  const y = share => floor - share * (floor - CHART.top);
  svgPatterns(chart.svg);
  chart.axis([0, .25, .5, .75, 1].map(share => [y(share), percent(share, 1)]));
  let lower = frames.step.map(() => 0);
  for (const [name, fill] of AREAS) {
    const upper = lower.map((value, frame) => value + figuresOf(run, "paged", frame)[name] / slots);
    const path = points(chart, upper, y) + points(chart, lower, y, true);
    chart.svg.append(drawn("path", { class: "outline", d: `M${path}Z`, fill }));
    lower = upper;
  }
  const other = frames.step.map((_, frame) => figuresOf(run, "reserved", frame));
  chart.svg.append(
    drawn("path", { class: "line dashed", d: `M${points(chart, other.map(f => f.live / slots), y)}` }));
  if (host) swappedStrip(chart, run, host);
  chart.finish();
  showChartLegend(Boolean(host));
  return chart;
}

function points(chart, values, y, back = false) {
  const all = values.map((value, frame) => `${chart.x(chart.run.frames.step[frame]).toFixed(1)} ${y(value).toFixed(1)}`);
  return (back ? `L${all.reverse().join("L")}` : all.join("L"));
}

// Swapped blocks are outside this memory: they have a strip of their own below it.
function swappedStrip(chart, run, host) {
  const floor = chart.height - CHART.bottom, y = value => floor - value / host * 34;
  chart.svg.append(
    drawn("line", { class: "grid", x1: CHART.left, x2: CHART.width - CHART.right, y1: floor, y2: floor }),
    drawn("text", { x: CHART.left - 8, y: floor - 12, "text-anchor": "end" }, "swapped"),
    drawn("path", { d: `M${points(chart, run.frames.host, y)}${points(chart, run.frames.host.map(() => 0), y, true)}Z`, fill: "var(--c4)" }));
}

function occupancySentence(run, frame) {
  const f = figuresOf(run, "paged", frame), all = run.numBlocks * run.blockSize, other = figuresOf(run, "reserved", frame);
  const host = run.frames.host[frame] ? ` ${counted(run.frames.host[frame], "block")} are swapped out.` : "";
  return `Step ${whole(run.frames.step[frame])}: ${percent(f.live, all)} of the memory holds tokens, ${percent(f.open, all)} is taken and empty, ${percent(f.cached, all)} cached, ${percent(f.free, all)} free; reserved, ${percent(other.live, all)} would hold tokens.${host}`;
}

function showChartLegend(swapped) {
  const swatch = (...parts) => { const svg = drawn("svg", { viewBox: "0 0 22 22", "aria-hidden": "true" }); svg.append(...parts); return svg; };
  const items = AREAS.map(([, fill, name, meaning]) => element("li", { tip: meaning }, swatch(drawn("rect", { width: 22, height: 22, fill })), name));
  items.push(element("li", { tip: "The tokens that the same memory would hold with one region per request." },
    swatch(drawn("line", { class: "line dashed", x1: 0, x2: 22, y1: 11, y2: 11 })), "tokens if reserved"));
  if (swapped) items.push(element("li", { tip: "Blocks of preempted requests, in host memory until their requests continue." },
    swatch(drawn("rect", { width: 22, height: 22, fill: "var(--c4)" })), "swapped to host memory"));
  document.getElementById("occupancy-legend").replaceChildren(...items);
}

// -------------------------------------------------------------------- traffic

// Bars above the line come to the device, bars below leave it; each adds up the steps since the last.
function trafficCharts(run, root, go) {
  const charts = [];
  root.replaceChildren();
  for (const { name, inwards, outwards, unit, blocks } of run.traffic) {
    const form = unit === "bytes" ? bytes : number => counted(number, "block");
    const came = steps(inwards), left = steps(outwards), most = Math.max(1, ...came, ...left);
    const middle = 66, y = value => middle - value / most * 44;
    const chart = new Chart(run, root, {
      height: 140, go, label: `Traffic with ${name} over the steps. Arrow keys move the step.`,
      sentence: frame => `Step ${whole(run.frames.step[frame])}, ${name}: ${form(inwards[frame])} came to the device so far, ${form(outwards[frame])} left it${blocks && blocks[frame] !== null ? `, ${counted(blocks[frame], "block")} are there` : ""}.`,
    });
    chart.axis([[middle, "0"]]);
    const width = Math.max(1, (CHART.width - CHART.left - CHART.right) / run.numFrames);
    for (let frame = 0; frame < run.numFrames; frame++) {
      const x = chart.x(run.frames.step[frame]) - width;
      if (came[frame]) chart.svg.append(drawn("rect", { x, y: y(came[frame]), width, height: middle - y(came[frame]), fill: "var(--c0)" }));
      if (left[frame]) chart.svg.append(drawn("rect", { x, y: middle, width, height: y(-left[frame]) - middle, fill: "var(--c1)" }));
    }
    const end = run.numFrames - 1;
    chart.svg.append(drawn("text", { class: "strong", x: CHART.left, y: 12 }, `${name}: ${form(inwards[end])} to the device ↑, ${form(outwards[end])} from it ↓`));
    chart.finish();
    charts.push(chart);
  }
  document.getElementById("tiers-note").textContent = charts.length
    ? "Bars above a line came to the device, bars below it left the device."
    : "Nothing was swapped, and the run had no tiers: all blocks stayed on the device.";
  root.hidden = !charts.length;
  return charts;
}

const steps = totals => totals.map((value, index) => Math.max(0, value - (index ? totals[index - 1] : 0)));

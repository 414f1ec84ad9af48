// Put the parts together: one step and one request are chosen, and each part shows them.

const PLAY_SECONDS = 20; // of the whole run, whatever its number of steps

class Report {
  constructor(run) {
    Object.assign(this, { run, frame: run.busiest, playing: null });
    const pick = request => this.pick(request);
    this.measure();
    this.sides = ["reserved", "paged"].map(side => {
      const root = document.getElementById(side);
      return { side, root, map: new MemoryMap(run, side, root, pick), bar: new Bar(run, side, root.querySelector(".bar")) };
    });
    this.drawCharts();
    this.tree = new PrefixTree(run, document.getElementById("tree"), pick);
    this.life = new Life(run, document.getElementById("life"), pick);
    this.slider = document.getElementById("step");
    this.slider.max = run.numFrames - 1;
    this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
    this.button = document.getElementById("play");
    this.button.addEventListener("click", () => this.playing === null ? this.play() : this.pause());
    showHeadline(run, run.busiest);
    showLegend(run);
    showNumbers(run);
    document.getElementById("time-note").textContent =
      `${counted(run.numSteps, "step")} in ${seconds(run.frames.t[run.numFrames - 1])}, ${run.numFrames < run.numSteps ? `of which this page shows ${whole(run.numFrames)}` : "all of them shown"}. Click on the chart to go to a step.`;
    this.go(this.frame);
  }

  measure() {
    const root = document.getElementById("occupancy"), style = getComputedStyle(root);
    CHART.width = Math.max(280, Math.round(root.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight)));
  }

  drawCharts() {
    const { run } = this, go = frame => this.go(frame);
    this.charts = [occupancyChart(run, document.getElementById("occupancy"), go), ...trafficCharts(run, document.getElementById("tiers"), go)];
  }

  go(frame) {
    this.frame = Math.max(0, Math.min(frame, this.run.numFrames - 1));
    const { run, frame: now } = this, step = run.frames.step[now];
    for (const { side, root, map, bar } of this.sides) {
      showVerdict(run, side, now, root);
      bar.show(now);
      map.show(now);
      showBelow(run, side, now, root, request => this.pick(request));
      map.canvas.setAttribute("aria-label", mapLabel(run, side, now));
    }
    for (const part of [...this.charts, this.tree, this.life]) part.show(now);
    const words = `step ${whole(step)} of ${whole(run.numSteps - 1)}, ${seconds(run.frames.t[now])}`.replace(/ (?=\S+$)/, "\u00a0");
    this.slider.value = now;
    this.slider.setAttribute("aria-valuetext", words);
    document.getElementById("step-label").textContent = words;
  }

  pick(request) {
    for (const { map } of this.sides) {
      map.selected = map.selected === request ? null : request;
      map.show(this.frame);
    }
    if (request !== null) this.life.pick(request);
  }

  play() {
    if (this.frame === this.run.numFrames - 1) this.go(0);
    const first = this.frame, started = performance.now();
    const rate = Math.min(12, Math.max(2, this.run.numFrames / PLAY_SECONDS)) / 1000;
    const tick = now => {
      this.playing = requestAnimationFrame(tick);
      const frame = Math.min(first + Math.floor((now - started) * rate), this.run.numFrames - 1);
      if (frame !== this.frame) this.go(frame);
      if (frame === this.run.numFrames - 1) this.pause();
    };
    this.playing = requestAnimationFrame(tick);
    this.button.textContent = "⏸";
    this.button.setAttribute("aria-label", "Pause");
  }

  pause() {
    cancelAnimationFrame(this.playing);
    this.playing = null;
    this.button.textContent = "▶";
    this.button.setAttribute("aria-label", "Play");
  }

  restyle() {
    readTheme();
    showLegend(this.run);
    this.measure();
    this.drawCharts();
    this.life.redraw();
    this.sides.forEach(({ map }) => map.resize());
    this.tree.shown = null;
    this.go(this.frame);
  }
}

function mapLabel(run, side, frame) {
  const f = figuresOf(run, side, frame), all = run.numBlocks * run.blockSize;
  return `${side === "reserved" ? "Reserved" : "Paged"} memory: ${percent(f.live, all)} holds tokens, ${percent(f.open, all)} is taken and empty, ${percent(f.cached, all)} cached, ${percent(f.free, all)} free. Arrow keys move between blocks, Enter marks a request.`;
}

function showNumbers(run) {
  const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "measure"), element("th", { scope: "col", class: "number" }, "reserved"), element("th", { scope: "col", class: "number" }, "paged"), element("th", { scope: "col" }, "meaning")));
  const rows = run.numbers.map(([name, reserved, paged, meaning]) => element("tr", {},
    element("th", { scope: "row" }, name), element("td", { class: "number" }, reserved), element("td", { class: "number" }, paged), element("td", {}, meaning)));
  document.getElementById("numbers").replaceChildren(head, element("tbody", {}, ...rows));
  document.getElementById("footer").textContent =
    `Written by kvpager ${run.version}. ${run.complete ? "" : "The recording ends early: the run stopped or still runs. "}This file loads nothing and sends nothing.`;
}

async function start() {
  if (!("DecompressionStream" in window)) throw new Error("this browser cannot unpack the run: use a newer one");
  readTheme();
  const report = new Report(await unpack());
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => report.restyle()); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => report.restyle());
  document.documentElement.dataset.ready = "yes";
}

start().catch(error => { document.getElementById("headline").textContent = `This report cannot be shown: ${error.message}`; });

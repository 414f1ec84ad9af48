// One request's life: a lane for each state, over the steps from its arrival to its end.

const LANES = [
  ["queued", "queued", "url(#life-dots)", "waited in the queue"],
  ["fetching", "fetched", "var(--c5)", "waited for blocks from a tier"],
  ["prefill", "prefill", "var(--c0)", "computed a part of its prompt"],
  ["decode", "decode", "var(--good)", "generated tokens, one in each step"],
  ["dropped", "preempted", "url(#life-hatch)", "was preempted: its blocks were released, to be computed again"],
  ["swapped", "swapped", "var(--c4)", "was preempted: its blocks waited in host memory"],
];
const ENDS = { finished: "finished", cancelled: "was cancelled", expired: "expired", failed: "failed" };

class Life {
  constructor(run, root, pick) {
    Object.assign(this, { run, root, frame: 0 });
    this.select = document.getElementById("request");
    this.byNumber = new Map(run.lives.map(life => [life.request, life]));
    this.select.append(...run.lives.map(({ request, note }) => element("option", { value: request }, `${request}${note ? `, ${note}` : ""}`)));
    this.select.addEventListener("change", () => pick(Number(this.select.value)));
    this.select.parentElement.hidden = !run.lives.length;
    if (run.lives.length) this.pick(run.lives[run.life].request);
    else root.replaceChildren("This recording has no requests: only sequences.");
  }

  pick(request) {
    const life = this.byNumber.get(request);
    if (!life) return request !== null && this.note(`The page keeps ${whole(this.run.lives.length)} lives; that of request ${request} is not among them.`);
    this.select.value = request;
    this.draw(life);
    this.show(this.frame);
  }

  redraw() { if (this.life) { this.draw(this.life); this.show(this.frame); } }

  note(words) { document.getElementById("life-note").textContent = words; }

  draw(life) {
    const { run } = this, end = Math.max(life.last, life.first + 1), width = CHART.width;
    const lanes = LANES.filter(([kind]) => life.segments.some(segment => segment[0] === kind));
    const height = 30 * lanes.length + 46;
    const x = step => 92 + (step - life.first) / (end - life.first) * (width - 92 - 24);
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `The life of request ${life.request}` });
    svg.append(lifePatterns());
    lanes.forEach(([kind, name, fill, doing], index) => {
      const y = 8 + 30 * index;
      svg.append(drawn("text", { class: "strong", x: 80, y: y + 15, "text-anchor": "end" }, name), drawn("line", { class: "grid", x1: 92, x2: width - 24, y1: y + 24, y2: y + 24 }));
      for (const [of, from, to, begin, count, chunks] of life.segments) {
        if (of !== kind) continue;
        const words = segmentWords(run, life, doing, { kind, from, to, begin, count, chunks });
        svg.append(drawn("rect", { class: "outline", x: x(from), y, width: Math.max(3, x(to) - x(from)), height: 20, rx: 3, fill, role: "img", "aria-label": words, tip: words }));
      }
    });
    this.ends(svg, life, x, height);
    this.root.replaceChildren(svg);
    Object.assign(this, { life, x });
    this.now = drawn("line", { class: "now", y1: 0, y2: height - 24 });
    svg.append(this.now);
    this.note(`${counted(life.prompt, "prompt token")}${life.cached ? `, ${whole(life.cached)} of them found in the cache` : ""}; ${seconds(timeAt(run, life.last) - timeAt(run, life.first))} from arrival to ${life.end ? "its end" : "the end of the recording"}.`);
  }

  ends(svg, life, x, height) {
    const floor = height - 22;
    const words = life.end ? `Request ${life.request} ${ENDS[life.end]} at step ${whole(life.last)}.` : `Request ${life.request} had not ended when the recording did.`;
    svg.append(
      drawn("text", { x: 92, y: height - 4 }, `step ${whole(life.first)}`),
      drawn("line", { class: life.end ? "line" : "line dashed", x1: x(life.last), x2: x(life.last), y1: 2, y2: floor }),
      drawn("text", { class: "strong", x: width(x, life), y: height - 4, "text-anchor": "end", role: "img", "aria-label": words, tip: words }, life.end ? `${life.end} ${whole(life.last)}` : "still runs"));
  }

  show(frame) {
    this.frame = frame;
    if (!this.life) return;
    const step = this.run.frames.step[frame], inside = step >= this.life.first && step <= this.life.last;
    this.now.setAttribute("visibility", inside ? "visible" : "hidden");
    if (inside) for (const end of ["x1", "x2"]) this.now.setAttribute(end, this.x(step));
  }
}

const width = (x, life) => Math.max(x(life.last), Math.min(300, CHART.width - 24));

function segmentWords(run, life, doing, { kind, from, to, begin, count, chunks }) {
  const when = to > from + 1 ? `from step ${whole(from)} to ${whole(to)}` : `in step ${whole(from)}`;
  const lasted = seconds(Math.max(0, timeAt(run, to) - timeAt(run, from)));
  const what = kind === "prefill" && count ? `computed ${chunks > 1 ? `${whole(chunks)} chunks of its prompt, ` : "a chunk of its prompt, "}tokens ${whole(begin)} to ${whole(begin + count)},` : doing;
  return `Request ${life.request} ${what} ${when}: ${lasted}.`;
}

function lifePatterns() {
  const defs = drawn("defs");
  const hatch = drawn("pattern", { id: "life-hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  hatch.append(drawn("rect", { width: 6, height: 6, fill: "var(--card)" }), drawn("rect", { width: 2.5, height: 6, fill: "var(--waste)" }));
  const dots = drawn("pattern", { id: "life-dots", width: 6, height: 6, patternUnits: "userSpaceOnUse" });
  dots.append(drawn("rect", { width: 6, height: 6, fill: "var(--free)" }), drawn("circle", { cx: 3, cy: 3, r: 1.3, fill: "var(--soft)" }));
  defs.append(hatch, dots);
  return defs;
}

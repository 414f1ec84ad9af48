// The comparison: what each side makes of the same memory at one step.

function figuresOf(run, side, frame) {
  const { frames, reserved, blockSize, numBlocks } = run;
  if (side === "reserved") {
    const running = reserved.running[frame], live = reserved.tokens[frame];
    const taken = running * reserved.regionBlocks * blockSize, slots = numBlocks * blockSize;
    return { running, swapped: 0, waiting: reserved.waiting[frame] + frames.queued[frame], live, open: taken - live, cached: 0, free: slots - taken, taken };
  }
  const taken = frames.held[frame] * blockSize, live = frames.tokens[frame];
  return {
    running: frames.running[frame], swapped: frames.swapped[frame], waiting: frames.queued[frame], live, open: taken - live, cached: frames.cached[frame] * blockSize,
    free: frames.free[frame] * blockSize, taken,
  };
}

function showVerdict(run, side, frame, root) {
  const f = figuresOf(run, side, frame);
  const more = [`${counted(f.running, run.noun)} run${f.running === 1 ? "s" : ""}`];
  if (f.swapped) more.push(`${whole(f.swapped)} ${f.swapped > 1 ? "are" : "is"} swapped out`);
  more.push(f.waiting ? `${whole(f.waiting)} wait${f.waiting > 1 ? "" : "s"}` : "none waits");
  root.querySelector(".verdict").replaceChildren(
    element("b", {}, f.taken ? percent(f.live, f.taken) : "–"),
    element("span", {}, f.taken ? "of the memory it has taken holds tokens" : "nothing is taken",
      element("em", side === "reserved" && f.waiting ? { class: "bad" } : {}, more.join(", "))));
}

function frameNotes(run, frame) {
  const host = run.frames.host[frame], saved = run.frames.saved[frame], notes = [];
  if (saved) notes.push(`sharing saves ${whole(saved)}`);
  if (host) notes.push(`${whole(host)} in host memory`);
  return notes.map(each => `; ${each}`).join("");
}

const SHARES = {
  live: ["holds tokens", "Slots that hold a token."],
  open: ["taken, empty", "Slots that are taken and hold no token. No other request can use them now."],
  cached: ["cached", "Slots of finished prompts, kept while there is room. A prompt with the same prefix reuses them."],
  free: ["free", "Slots that any request may take."],
};

class Bar {
  constructor(run, side, root) {
    Object.assign(this, { run, root, parts: {}, side });
    for (const [name, [, meaning]] of Object.entries(SHARES)) {
      const part = this.parts[name] = element("span", { class: name, role: "listitem", tip: () => `${this.words[name]}. ${meaning}` }, element("span"));
      root.append(part);
    }
  }

  show(frame) {
    const f = figuresOf(this.run, this.side, frame), all = f.taken + f.cached + f.free;
    this.words = {};
    for (const [name, part] of Object.entries(this.parts)) {
      const share = all ? f[name] / all : 0;
      const words = this.words[name] = `${percent(f[name], all)} ${SHARES[name][0]}`;
      part.style.flex = `${share} 0 0px`;
      part.hidden = f[name] <= 0;
      part.setAttribute("aria-label", words);
      const room = share * this.root.clientWidth;
      part.firstChild.textContent = [words, percent(f[name], all)].find(each => each.length * 6.8 + 16 < room) ?? "";
    }
  }
}

function showBelow(run, side, frame, root, pick) {
  const below = root.querySelector(".below"), { reserved, noun } = run;
  if (side === "paged") {
    const { held, cached } = run.frames;
    return below.replaceChildren(`${counted(held[frame], "block")} held, ${whole(cached[frame])} cached, ${whole(run.frames.free[frame])} free${frameNotes(run, frame)}.`);
  }
  if (!reserved.regions) return below.replaceChildren(`Not one region of ${whole(reserved.maxTokens)} tokens fits into this memory.`);
  if (!reserved.waiting[frame]) return below.replaceChildren(`${whole(reserved.running[frame])} of ${counted(reserved.regions, "region")} taken.`);
  const names = reserved.waitingIds[frame], more = reserved.waiting[frame] - names.length, queued = run.frames.queued[frame];
  below.replaceChildren("Waiting for a region: ", ...names.map(each => chip(each, pick)), more > 0 ? ` and ${whole(more)} more.` : ".", queued ? ` ${whole(queued)} more wait${queued > 1 ? "" : "s"} on both sides.` : "");
}

function chip(request, pick) {
  return element("button", {
    type: "button", class: "chip", style: { "border-left-color": colourOf(request) },
    tip: `Request ${request}: press to mark its blocks and to see its life.`, on: { click: () => pick(request) },
  }, `${request}`);
}

// -------------------------------------------------------------------- the legend of the maps

const LOOKS = [
  ["live", "tokens of a request", "Filled: slots with tokens; each request has a colour and, if there is room, its number."],
  ["open", "taken, still empty", "Lines: slots that are taken and hold no token yet."],
  ["shared", "shared", "Dark: a block that is stored once and that several sequences read."],
  ["cached", "cached", "Dots: a block of a finished prompt, kept for a prompt with the same prefix."],
  ["free", "free", "Plain: a block that any request may take."],
];

function showLegend(run) {
  document.getElementById("legend").replaceChildren(...LOOKS.map(([look, name, meaning]) => {
    const ratio = Math.max(1, devicePixelRatio), canvas = element("canvas", { width: 22 * ratio, height: 22 * ratio, "aria-hidden": "true" });
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.fillStyle = { live: theme.requests[0], open: pattern(context, "hatch", theme.requests[0]), shared: theme.shared, cached: pattern(context, "dots", theme.cached), free: theme.free }[look];
    context.fillRect(0, 0, 22, 22);
    if (look === "shared") {
      context.font = "600 11px system-ui, sans-serif";
      context.fillStyle = theme.card;
      context.fillText("×3", 4.5, 15);
    }
    return element("li", { tip: meaning }, canvas, name);
  }), ...(run.cellBlocks > 1 ? [element("li", { tip: "The pool has too many blocks to draw each. A cell stands for several blocks, and its fill is their sum." }, `1 cell = ${whole(run.cellBlocks)} blocks`)] : []));
}

function showHeadline(run, frame) {
  const paged = figuresOf(run, "paged", frame), reserved = figuresOf(run, "reserved", frame), { noun } = run;
  document.getElementById("run-name").textContent = [
    `kvpager ${run.version}`, { engine: "engine", patch: "patched model", simulate: "simulation", manager: "block manager" }[run.source], run.model, run.mode === "paged" ? null : `mode ${run.mode}`,
  ].filter(Boolean).join(" · ");
  const most = `At its busiest, paging runs ${counted(paged.running, noun)} at once.`;
  const other = !run.reserved.regions ? " One reserved region would not fit into this memory."
    : reserved.running < paged.running
    ? ` Reserving has room for ${whole(reserved.running)}.`
    : " So does reserving, and keeps more memory empty.";
  document.getElementById("headline").textContent = most + (paged.running ? other : "");
  document.getElementById("lead").textContent =
    `Both have the same memory: ${counted(run.numBlocks, "block")} of ${counted(run.blockSize, "token")}${run.blockBytes ? ` (${bytes(run.numBlocks * run.blockBytes)})` : ""}${run.grew ? ", the pool at its largest" : ""}. ` +
    `Reserving sets aside the maximum length, ${whole(run.reserved.maxTokens)} tokens, for every ${noun}. Paging hands out blocks as tokens arrive, and stores shared prefixes once.`;
  document.getElementById("compare-note").textContent =
    `Move the slider below, or press play. A ${noun} with a region on the left has as many tokens as on the right.` +
    (run.reserved.isLongest ? ` The run has no maximum length: a region is as long as its longest ${noun}.` : "");
}

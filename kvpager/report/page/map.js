// A map of the memory: one cell for each block, or for several when there are many.

const MAP_HEIGHT = 330; // about, so that both maps fit on a screen

class MemoryMap {
  constructor(run, side, root, pick) {
    Object.assign(this, { run, side, root, frame: 0, selected: null, at: 0 });
    this.canvas = root.querySelector("canvas");
    const over = event => this.point(this.cellUnder(event), event);
    this.canvas.addEventListener("pointermove", over);
    this.canvas.addEventListener("pointerleave", () => { hideTip(); this.paintCursor(false); });
    this.canvas.addEventListener("click", event => pick(this.ownerOf(this.cellUnder(event))));
    this.canvas.addEventListener("focus", () => this.focusCell(this.at));
    this.canvas.addEventListener("blur", () => { hideTip(); this.paintCursor(false); });
    this.canvas.addEventListener("keydown", event => this.press(event, pick));
    this.resize();
  }

  resize() {
    const width = this.canvas.parentElement.clientWidth - 2 * 18;
    const { numCells } = this.run;
    let columns = Math.ceil(Math.sqrt(numCells * Math.max(.9, width / MAP_HEIGHT)));
    const regionCells = this.run.reserved.regionCells;
    if (regionCells > 1 && regionCells <= columns * 1.5) columns = Math.max(1, Math.round(columns / regionCells)) * regionCells;
    columns = Math.max(1, Math.min(columns, Math.floor(width / 7), numCells));
    this.columns = columns;
    this.rows = Math.ceil(numCells / columns);
    this.size = Math.min(width / columns, 34);
    this.ratio = Math.max(1, devicePixelRatio);
    this.gap = this.size > 12 ? 2 : this.size > 5 ? 1 : .5;
    this.canvas.width = Math.round(width * this.ratio);
    this.canvas.height = Math.round(this.rows * this.size * this.ratio);
    this.canvas.style.height = `${this.rows * this.size}px`;
    this.canvas.style.width = `${width}px`;
    this.show(this.frame);
  }

  show(frame) {
    this.frame = frame;
    const context = this.context = this.canvas.getContext("2d");
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const present = this.run.frames.cells[frame];
    for (let index = 0; index < Math.min(this.run.numCells, present); index++) this.paint(index);
    if (this.cursor) this.paintCursor(true);
  }

  box(index) {
    const column = index % this.columns, row = Math.floor(index / this.columns);
    const edge = at => Math.round(at * this.size * this.ratio) / this.ratio; // on a pixel, so that no seam shows
    const x = edge(column), y = edge(row);
    return [x, y, edge(column + 1) - x - (this.goesOn(index) ? 0 : this.gap), edge(row + 1) - y - this.gap];
  }

  // The cells of a region touch: it is one piece.
  goesOn(index) {
    if (this.side === "paged" || (index + 1) % this.columns === 0 || index + 1 >= this.run.numCells) return false;
    const { owner } = cellAt(this.run, this.side, this.frame, index);
    return owner !== null && owner === cellAt(this.run, this.side, this.frame, index + 1).owner;
  }

  paint(index) {
    const cell = cellAt(this.run, this.side, this.frame, index), { context } = this;
    const [x, y, width, height] = this.box(index), { scale } = this.run;
    const shared = cell.holders > 1;
    const colour = shared ? theme.shared : cell.owner === null ? theme.soft : colourOf(cell.owner);
    context.globalAlpha = this.selected === null || cell.owner === this.selected ? 1 : .28;
    context.fillStyle = theme.free;
    context.fillRect(x, y, width, height);
    const live = width * cell.live / scale, held = width * cell.held / scale, cached = width * cell.cached / scale;
    if (held > live) this.fill(pattern(context, "hatch", colour), x + live, y, held - live, height);
    if (live) this.fill(colour, x, y, live, height);
    if (cached) this.fill(pattern(context, "dots", theme.cached), x + held, y, cached, height);
    if (shared) this.mark(cell, x, y, width, height);
    else if (cell.held && cell.owner >= 0 && this.size >= 21 && this.startsHere(index, cell)) this.label(cell, x, y, live, height);
    context.globalAlpha = 1;
  }

  fill(style, x, y, width, height) {
    this.context.fillStyle = style;
    this.context.fillRect(x, y, width, height);
  }

  // A shared cell has a ring, and says how many hold it if there is room.
  mark(cell, x, y, width, height) {
    const { context } = this;
    if (this.size >= 18) return this.write(`×${cell.holders}`, x + width / 2, y + height / 2, width - 2, theme.card);
    if (this.size < 6) return;
    const inset = this.size > 11 ? 3 : 2;
    context.strokeStyle = theme.card;
    context.lineWidth = 1.2;
    context.strokeRect(x + inset, y + inset, width - 2 * inset, height - 2 * inset);
  }

  // One label for each region; on the paged side each block has one.
  startsHere(index, cell) {
    if (this.side === "paged" || index % this.columns === 0) return true;
    return cellAt(this.run, this.side, this.frame, index - 1).owner !== cell.owner;
  }

  label(cell, x, y, live, height) {
    if (live >= this.size * .55) this.write(String(cell.owner), x + live / 2, y + height / 2, live - 2, inkOn(colourOf(cell.owner)));
  }

  write(text, x, y, room, colour) {
    const { context } = this;
    context.font = `600 ${Math.min(12, this.size * .46)}px system-ui, sans-serif`;
    if (context.measureText(text).width > room) return;
    context.fillStyle = colour;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(text, x, y + .5);
  }

  paintCursor(on) {
    if (!on && !this.cursor) return;
    this.cursor = on;
    if (!on) return this.show(this.frame);
    const [x, y, width, height] = this.box(this.at);
    this.context.strokeStyle = theme.ink;
    this.context.lineWidth = 2;
    this.context.strokeRect(x + 1, y + 1, width - 2, height - 2);
  }

  // ------------------------------------------------------------------ pointing at a cell

  cellUnder(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / this.size), row = Math.floor((event.clientY - box.top) / this.size);
    const index = row * this.columns + column;
    return column >= 0 && column < this.columns && index < this.run.frames.cells[this.frame] ? index : -1;
  }

  ownerOf(index) {
    if (index < 0) return null;
    const { owner, holders } = cellAt(this.run, this.side, this.frame, index);
    return owner >= 0 && holders <= 1 ? owner : null;
  }

  point(index) {
    if (index < 0) { hideTip(); return this.paintCursor(false); }
    this.moveTo(index);
    const frame = this.canvas.getBoundingClientRect(), [x, y, width, height] = this.box(index);
    const sentence = this.sentence(index);
    showTip(sentence, { left: frame.left + x, top: frame.top + y, bottom: frame.top + y + height, width });
    return sentence;
  }

  moveTo(index) {
    this.at = index;
    if (this.cursor) this.show(this.frame);
    this.paintCursor(true);
  }

  focusCell(index) { say(this.point(index)); }

  press(event, pick) {
    const last = Math.min(this.run.numCells, this.run.frames.cells[this.frame]) - 1;
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns, Home: -this.at, End: last - this.at };
    if (event.key === "Enter") return pick(this.ownerOf(this.at));
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const next = this.at + moves[event.key];
    if (next >= 0 && next <= last) this.focusCell(next);
  }

  sentence(index) { return sentenceOf(this.run, this.side, index, cellAt(this.run, this.side, this.frame, index)); }
}

function sentenceOf(run, side, index, cell) {
  const { cellBlocks, blockSize, scale } = run;
  const first = run.firstBlock + index * cellBlocks, last = Math.min(first + cellBlocks, run.firstBlock + run.numBlocks) - 1;
  if (cellBlocks > 1) return manySentence(run, side, first, last, cell);
  const tokens = Math.round(cell.live * blockSize / scale), empty = blockSize - tokens, slots = counted(blockSize, "slot");
  if (side === "reserved") {
    const region = Math.floor(index / run.reserved.regionBlocks);
    if (region >= run.reserved.regions) return `Block ${whole(first)} is left over: the rest of the memory is too small for another region.`;
    if (!cell.held) return `Block ${whole(first)} is in region ${region}, which is free.`;
    const use = empty === 0 ? "is full" : tokens === 0 ? "is empty, and no other request may use it" : `holds ${counted(tokens, "token")} in ${slots}`;
    return `Block ${whole(first)} is in region ${region}, reserved for request ${cell.owner}: it ${use}.`;
  }
  if (cell.holders > 1) return `Block ${whole(first)} is stored once and shared by ${counted(cell.holders, "sequence")}.`;
  if (cell.held) {
    const who = cell.owner === -1 ? "no request: its contents are on their way in" : `request ${cell.owner}`;
    return `Block ${whole(first)} belongs to ${who}; ${empty === 0 ? `all its ${slots} hold tokens` : `${tokens} of its ${slots} hold tokens, ${empty} ${empty === 1 ? "waits" : "wait"} for the next`}.`;
  }
  if (cell.cached) return `Block ${whole(first)} is cached: no request holds it, and a prompt with the same prefix may reuse it.`;
  return `Block ${whole(first)} is free: any request may take it.`;
}

function manySentence(run, side, first, last, cell) {
  const { scale } = run, parts = [`${percent(cell.live, scale)} hold tokens`];
  if (cell.held > cell.live) parts.push(`${percent(cell.held - cell.live, scale)} taken and empty`);
  if (cell.cached) parts.push(`${percent(cell.cached, scale)} cached`);
  const free = scale - cell.held - cell.cached;
  if (free > 0) parts.push(`${percent(free, scale)} free`);
  const whose = cell.owner === null || cell.owner < 0 ? "" : `; the largest share belongs to request ${cell.owner}`;
  const shared = cell.holders > 1 ? `; at least half of them are shared, by up to ${counted(cell.holders, "sequence")}` : whose;
  return `Blocks ${whole(first)} to ${whole(last)}: of their slots, ${parts.join(", ")}${shared}.`;
}

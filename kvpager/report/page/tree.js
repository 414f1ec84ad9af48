// The prefix tree at a step: runs of blocks, and the sequences that share each.

const TREE_SQUARES = 24;

class PrefixTree {
  constructor(run, root, pick) { Object.assign(this, { run, root, pick, shown: null }); }

  show(frame) {
    const nodes = this.run.frames.tree[frame], words = JSON.stringify(nodes);
    const saved = this.run.frames.saved[frame];
    document.getElementById("tree-note").textContent = saved
      ? `At this step, sharing saves ${counted(saved, "block")}: without it, ${this.run.noun}s would hold ${percent(saved, this.run.frames.held[frame])} more.`
      : "At this step, no two sequences share a block.";
    this.root.hidden = !nodes.length;
    if (words === this.shown) return;
    this.shown = words;
    const children = new Map();
    nodes.forEach((node, index) => children.set(node.parent, [...(children.get(node.parent) ?? []), index]));
    this.root.replaceChildren(this.list(nodes, children, -1));
  }

  list(nodes, children, parent) {
    return element("ul", {}, ...(children.get(parent) ?? []).map(index => {
      const below = children.has(index) ? [this.list(nodes, children, index)] : [];
      return element("li", {}, this.node(nodes[index]), ...below);
    }));
  }

  node({ blocks, holders, requests, parent }) {
    const squares = Array.from({ length: Math.min(blocks, TREE_SQUARES) }, () => element("i"));
    const more = blocks > TREE_SQUARES ? [element("u", {}, `+${whole(blocks - TREE_SQUARES)}`)] : [];
    const place = parent < 0 ? "The first" : "After the blocks above, the next";
    const others = holders - requests.length, saves = blocks * (holders - 1);
    return element("div", {
      class: "node",
      tip: `${place} ${counted(blocks, "block")} of ${counted(holders, "sequence")} are the same: stored once, they save ${counted(saves, "block")}.`,
    },
    element("span", { class: "run", "aria-hidden": "true" }, ...squares, ...more),
    element("b", {}, `${counted(blocks, "block")} shared by ${whole(holders)}`),
    element("span", { class: "who" }, `saves ${whole(saves)}`),
    element("span", {}, ...requests.map(each => chip(each, this.pick)), element("span", { class: "who" }, others > 0 ? ` and ${whole(others)} more` : "")));
  }
}

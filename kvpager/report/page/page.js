// Small helpers for elements. Text becomes text nodes only: nothing in a recording is markup.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "tip") explain(made, value);
    else if (key === "on") for (const [event, call] of Object.entries(value)) made.addEventListener(event, call);
    else if (key === "style") for (const [property, set] of Object.entries(value)) made.style.setProperty(property, set);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

function drawn(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "tip") explain(made, value);
    else made.setAttribute(key, value);
  }
  if (text !== null) made.append(text);
  return made;
}

// -------------------------------------------------------------------- one sentence for each element

const tip = document.getElementById("tip"), said = document.getElementById("said");

function explain(target, sentence) {
  if (!target.hasAttribute("tabindex") && !/^(BUTTON|SELECT|INPUT)$/.test(target.tagName)) target.setAttribute("tabindex", "0");
  const words = () => typeof sentence === "function" ? sentence() : sentence;
  const show = () => { target.setAttribute("aria-describedby", "tip"); showTip(words(), target.getBoundingClientRect()); };
  target.addEventListener("pointerenter", show);
  target.addEventListener("focus", show);
  target.addEventListener("pointerleave", hideTip);
  target.addEventListener("blur", hideTip);
}

function showTip(words, box) {
  tip.textContent = words;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const above = box.top - height - 8;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), innerWidth - width - 8);
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(above > 8 ? above : box.bottom + 8)}px)`;
}

function hideTip() { tip.hidden = true; }

addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });
addEventListener("scroll", hideTip, { passive: true });

function say(words) { said.textContent = words; }

// -------------------------------------------------------------------- colours and patterns

const NUM_COLOURS = 8;
let theme = {};

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["paper", "card", "ink", "soft", "line", "free", "shared", "cached", "accent", "waste", "good"];
  theme = Object.fromEntries(names.map(name => [name, style.getPropertyValue(`--${name}`).trim()]));
  theme.requests = Array.from({ length: NUM_COLOURS }, (_, i) => style.getPropertyValue(`--c${i}`).trim());
  theme.patterns = new Map();
}

const colourOf = owner => owner < 0 ? theme.soft : theme.requests[owner % NUM_COLOURS];

// Black or white, whichever is easier to read on a colour such as "#2f74d0".
function inkOn(colour) {
  const [r, g, b] = [1, 3, 5].map(at => (parseInt(colour.slice(at, at + 2), 16) / 255) ** 2.2);
  return .2126 * r + .7152 * g + .0722 * b > .3 ? "#14171a" : "#ffffff";
}

// A tile that repeats: diagonal lines for room that is taken and empty, dots for cached blocks.
function pattern(context, kind, colour) {
  const key = kind + colour;
  if (!theme.patterns.has(key)) {
    const ratio = Math.max(1, Math.round(devicePixelRatio)), size = 6 * ratio;
    const tile = Object.assign(document.createElement("canvas"), { width: size, height: size });
    const draw = tile.getContext("2d");
    draw.fillStyle = theme.card;
    draw.fillRect(0, 0, size, size);
    draw.strokeStyle = draw.fillStyle = colour;
    draw.globalAlpha = kind === "hatch" ? .8 : 1;
    if (kind === "hatch") {
      draw.lineWidth = 1.1 * ratio;
      for (const shift of [-size, 0, size]) { draw.moveTo(shift - 1, size + 1); draw.lineTo(shift + size + 1, -1); }
      draw.stroke();
    } else {
      draw.arc(size / 2, size / 2, 1.15 * ratio, 0, 7);
      draw.fill();
    }
    theme.patterns.set(key, context.createPattern(tile, "repeat"));
  }
  return theme.patterns.get(key);
}

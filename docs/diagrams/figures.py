"""One function for each diagram."""

from __future__ import annotations

from collections.abc import Callable

from svg import AMBER, BLUE, GREEN, GREY, MUTED, RED, Canvas


def paging() -> Canvas:
    """Three requests in reserved regions and in blocks."""
    canvas = Canvas(780, 330, "Contiguous reservations compared with paged blocks")
    canvas.text(24, 32, "One contiguous region per request", bold=True)
    rows = [("A", 9, BLUE), ("B", 4, GREEN), ("C", 14, AMBER)]
    for number, (name, used, colour) in enumerate(rows):
        y = 48 + number * 38
        canvas.text(24, y + 19, name, bold=True)
        canvas.box(48, y, 16 * 20, 28, fill=GREY, dashed=True)
        canvas.box(48, y, used * 20, 28, f"{used} tokens", fill=colour)
    canvas.text(48, 178, "Grey is reserved for the longest answer and never used.", colour=MUTED)
    canvas.text(420, 32, "Blocks of 4 tokens, one pool", bold=True)
    owners = "AACBCCA C".ljust(16)
    colours = {name: colour for name, _, colour in rows}
    for number, owner in enumerate(owners):
        x, y = 420 + number % 8 * 42, 48 + number // 8 * 38
        canvas.box(x, y, 40, 28, str(number), fill=colours.get(owner, "#ffffff"), size=11)
    canvas.text(420, 140, "White blocks are free for the next request.", colour=MUTED)
    canvas.text(24, 222, "Block tables", bold=True)
    for number, (name, _, colour) in enumerate(rows):
        x = 24 + number * 250
        canvas.text(x, 262, name, bold=True)
        blocks = [str(block) for block, owner in enumerate(owners) if owner == name]
        for place, block in enumerate(blocks):
            canvas.box(x + 20 + place * 40, 242, 40, 28, block, fill=colour, size=11)
    canvas.text(
        24,
        306,
        "A table maps a sequence's tokens to blocks anywhere in the pool. "
        "At most 3 slots per sequence stay empty.",
        colour=MUTED,
    )
    return canvas


def fork() -> Canvas:
    """Draw a fork that shares every block, and copies one before it writes into it."""
    canvas = Canvas(780, 300, "Fork and copy-on-write")
    tables = [("parent", 60, ["7", "2", "5"]), ("child", 200, ["7", "2", "9"])]
    canvas.text(24, 30, "Block tables", bold=True)
    canvas.text(330, 30, "Pool", bold=True)
    for name, y, blocks in tables:
        canvas.text(24, y + 20, name, bold=True)
        for place, block in enumerate(blocks):
            canvas.box(84 + place * 44, y, 44, 30, block, fill=BLUE if place < 2 else GREEN)
    pool = [
        (7, 48, ["The", "with", "state", "ment"], BLUE, "block 7, 2 references"),
        (2, 108, ["opens", "a", "file", "and"], BLUE, "block 2, 2 references"),
        (5, 168, ["reads", "it"], GREEN, "block 5, parent"),
        (9, 228, ["reads", "lines"], GREEN, "block 9, child: a copy of 5"),
    ]
    for _, y, words, colour, note in pool:
        canvas.cells(330, y, words, fill=colour, slots=4)
        canvas.text(520, y + 18, note, colour=MUTED)
    canvas.arrow((220, 75), (326, 61))
    canvas.arrow((220, 75), (326, 121))
    canvas.arrow((220, 75), (326, 181))
    canvas.arrow((220, 215), (326, 61))
    canvas.arrow((220, 215), (326, 121))
    canvas.arrow((220, 215), (326, 241))
    canvas.arrow((420, 196), (420, 226), dashed=True)
    canvas.text(
        24, 284, "fork() moves no bytes. append() copies block 5 before the child writes into it."
        , colour=MUTED,
    )  # fmt: skip
    return canvas


def prefixes() -> Canvas:
    """Draw the radix tree of one namespace."""
    canvas = Canvas(780, 270, "The prefix index")
    canvas.text(24, 30, "namespace 'acme'", bold=True)
    canvas.text(560, 30, "namespace 'umbrella'", bold=True)
    canvas.box(24, 96, 190, 44, "system prompt\nblocks 0-30", fill=BLUE)
    leaves = [
        (48, "question 1\nblocks 31-33", GREEN),
        (108, "question 2\nblocks 34-36", GREEN),
        (168, "question 3\nblocks 37-40", GREEN),
    ]
    for y, text, colour in leaves:
        canvas.box(290, y, 150, 44, text, fill=colour)
        canvas.arrow((214, 118), (286, y + 22))
    canvas.box(560, 96, 190, 44, "the same system prompt\nblocks 41-71", fill=AMBER)
    canvas.text(
        24, 244, "A new prompt of 'acme' reuses the longest beginning with equal tokens. "
        "It never reads another tree.", colour=MUTED,
    )  # fmt: skip
    return canvas


def planes() -> Canvas:
    """Draw the control plane, which decides, and the data plane, which obeys."""
    canvas = Canvas(780, 300, "Control plane and data plane")
    canvas.box(24, 52, 300, 200, fill="#f8fafc")
    canvas.text(40, 40, "Control plane: NumPy, no torch", bold=True)
    canvas.box(44, 72, 260, 44, "Scheduler\nwhat the next step computes", fill=BLUE)
    canvas.box(44, 132, 260, 44, "BlockManager\nwhich block holds which tokens", fill=BLUE)
    canvas.box(44, 192, 260, 44, "prefix index, eviction, swap, quotas", fill=BLUE)
    canvas.box(456, 52, 300, 200, fill="#f8fafc")
    canvas.text(472, 40, "Data plane: torch and kernels", bold=True)
    canvas.box(476, 72, 260, 44, "BlockStorage\none tensor per tier", fill=GREEN)
    canvas.box(476, 132, 260, 44, "append_kv, paged_attention\nread and write blocks", fill=GREEN)
    canvas.box(476, 192, 260, 44, "copy_blocks, gather_kv", fill=GREEN)
    canvas.arrow((324, 110), (452, 110))
    canvas.text(388, 100, "plans", anchor="middle", bold=True)
    canvas.text(388, 132, "slots, copies,", anchor="middle", size=12, colour=MUTED)
    canvas.text(388, 148, "block tables:", anchor="middle", size=12, colour=MUTED)
    canvas.text(388, 164, "plain arrays", anchor="middle", size=12, colour=MUTED)
    canvas.text(
        24, 282, "A plan is data, so another process or framework can carry it out.", colour=MUTED
    )
    return canvas


def tiers() -> Canvas:
    """Draw the tiers and the moves between them."""
    canvas = Canvas(780, 290, "Tiers")
    canvas.box(24, 40, 330, 60, "device pool: memory=\nheld, cached and free blocks", fill=BLUE)
    host = "host pool: host_memory=\nswapped, and with tiers= cached blocks"
    canvas.box(24, 180, 330, 60, host, fill=GREEN)
    canvas.box(470, 180, 286, 60, "stores: host, disk, remote\ntiers=...", fill=GREEN)
    canvas.arrow((120, 100), (120, 176))
    canvas.text(112, 136, "swap out,", anchor="end", colour=MUTED)
    canvas.text(112, 154, "save", anchor="end", colour=MUTED)
    canvas.arrow((260, 176), (260, 104))
    canvas.text(268, 136, "swap in,", colour=MUTED)
    canvas.text(268, 154, "fetch", colour=MUTED)
    canvas.arrow((354, 70), (466, 70))
    canvas.text(410, 62, "evict", anchor="middle", colour=MUTED)
    canvas.arrow((354, 90), (466, 190))
    canvas.text(424, 140, "save, fetch", colour=MUTED)
    canvas.arrow((354, 222), (466, 222))
    canvas.text(410, 240, "save, fetch", anchor="middle", colour=MUTED)
    canvas.box(470, 40, 286, 60, "gone: computed again\nwhen a prompt needs it", fill=RED)
    canvas.text(
        24, 272, "A sequence's block is in exactly one tier. A store has a copy of a cached block.",
        colour=MUTED,
    )  # fmt: skip
    return canvas


def life() -> Canvas:
    """Draw the states of a device block."""
    canvas = Canvas(780, 280, "A block's life")
    canvas.box(24, 40, 130, 44, "never used", fill=GREY)
    canvas.box(24, 180, 130, 44, "free", fill="#ffffff")
    canvas.box(290, 110, 150, 44, "held\nby 1 table", fill=BLUE)
    canvas.box(580, 40, 170, 44, "held\nby n tables", fill=BLUE)
    canvas.box(580, 180, 170, 44, "cached only\nin the prefix index", fill=AMBER)
    canvas.arrow((154, 62), (220, 62), (286, 120))
    canvas.text(180, 52, "take", colour=MUTED)
    canvas.arrow((154, 195), (220, 195), (300, 158))
    canvas.text(168, 186, "take", colour=MUTED)
    canvas.arrow((340, 154), (240, 215), (158, 215))
    canvas.text(206, 242, "last release, not in the index", colour=MUTED)
    canvas.arrow((440, 120), (576, 62))
    canvas.text(420, 62, "fork, prefix match", colour=MUTED)
    canvas.arrow((600, 84), (600, 108), (444, 132))
    canvas.text(612, 108, "release, copy-on-write", colour=MUTED)
    canvas.arrow((425, 154), (576, 202))
    canvas.text(440, 200, "last release,", colour=MUTED)
    canvas.text(440, 216, "in the index", colour=MUTED)
    canvas.arrow((665, 180), (665, 142), (444, 142))
    canvas.text(676, 160, "prefix match", colour=MUTED)
    canvas.arrow((665, 224), (665, 258), (89, 258), (89, 228))
    canvas.text(430, 252, "evict", colour=MUTED)
    return canvas


def step() -> Canvas:
    """One packed step: prompts and decoding rows along one axis."""
    canvas = Canvas(780, 250, "A packed step")
    canvas.text(24, 30, "One forward pass, 9 tokens, no padding", bold=True)
    parts = [
        (["a"], BLUE, "row 0 decodes"),
        (["b"], GREEN, "row 1 decodes"),
        (["c0", "c1", "c2", "c3", "c4", "c5", "c6"], AMBER, "row 2: a chunk of its prompt"),
    ]
    x = 24
    for words, colour, _ in parts:
        for word in words:
            canvas.box(x, 48, 56, 34, word, fill=colour)
            x += 56
    canvas.text(24, 112, "num_scheduled = [1, 1, 7]")
    canvas.text(24, 132, "token_ids, slot_mapping: one entry per token")
    canvas.text(24, 166, "block_tables", bold=True)
    tables = [["4", "9", "1"], ["6", "-1", "-1"], ["2", "3", "-1"]]
    for number, (table, (_, colour, note)) in enumerate(zip(tables, parts, strict=True)):
        at = 130 + number * 215
        for place, block in enumerate(table):
            fill = colour if block != "-1" else "#ffffff"
            canvas.box(at + place * 40, 148, 40, 28, block, fill=fill, size=11)
        canvas.text(at, 196, note, size=12, colour=MUTED)
    canvas.text(
        24, 230, "Each row's query reads that row's blocks in place. needs_logits says which rows "
        "choose a token.", colour=MUTED,
    )  # fmt: skip
    return canvas


FIGURES: dict[str, Callable[[], Canvas]] = {
    "paging": paging,
    "fork": fork,
    "prefixes": prefixes,
    "planes": planes,
    "tiers": tiers,
    "life": life,
    "step": step,
}

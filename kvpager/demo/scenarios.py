"""Four workloads. Their texts are the help pages of Python, such as `help("import")`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

from kvpager.demo.settings import Settings
from kvpager.errors import BadInput

LONG_PROMPT_TOKENS = 1000
PROMPTS = (
    'The "with" statement is used to',
    "A list display yields a new list object, the contents being specified by either",
    'The "for" statement',
    "An assignment statement evaluates the expression list (remember that this can be a single "
    "expression or a comma-separated list, the latter yielding a tuple) and",
)
QUESTIONS = (
    'The "try" statement specifies',
    'The "import" statement',
    "A class definition defines",
    'The "return" statement may only',
)
ENDINGS = ("\n\nThe following example", "\n\nChanged in version 3.")

Row = list[int]
Tokenize = Callable[[str], Row]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Calls of `generate`, one after the other; each is a batch of rows of token ids.

    With `keep_caches` the caches of all calls are alive at the end, otherwise the last one's.
    """

    key: str
    title: str
    note: str
    calls: tuple[tuple[Row, ...], ...]
    prefix_cache: bool = False
    keep_caches: bool = False
    num_beams: int = 1
    num_returned: int = 1

    @property
    def rows_alive(self) -> int:
        """Return the number of rows in the final caches. O(calls)."""
        calls = self.calls if self.keep_caches else self.calls[-1:]
        return sum(map(len, calls)) * self.num_beams


def build(settings: Settings, tokenize: Tokenize, max_positions: int | None) -> list[Scenario]:
    """Build the four scenarios. O(text). Raises `BadInput` for prompts that are too long."""
    room = _room(settings, max_positions)
    return [
        _batch(settings, tokenize, room),
        _shared_system_prompt(tokenize, room),
        _beams(tokenize, room),
        _second_call(tokenize, room),
    ]


def _room(settings: Settings, max_positions: int | None) -> int:
    """Return the maximum prompt tokens beside the new tokens."""
    if max_positions is None:
        return 1 << 30
    room = max_positions - settings.max_new_tokens
    if room < 256:
        raise BadInput(
            f"max_new_tokens={settings.max_new_tokens}: the model has {max_positions} positions, "
            f"and prompts need 256. Pass at most {max_positions - 256}."
        )
    return room


def _batch(settings: Settings, tokenize: Tokenize, room: int) -> Scenario:
    texts = settings.prompt or PROMPTS
    rows = tuple(map(tokenize, texts))
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise BadInput(f"prompt={text!r}: tokenizes to nothing.")
        if len(row) > room:
            raise BadInput(
                f"prompt={text[:20]!r}...: {len(row)} tokens, the model has room for {room}."
            )
    lengths = ", ".join(str(len(row)) for row in rows)
    tokens = "token" if lengths == "1" else "tokens"
    padding = ", left-padded to one length" if len({len(row) for row in rows}) > 1 else ""
    title = f"Batch of {len(rows)} prompts" if len(rows) > 1 else "One prompt"
    return Scenario("a", title, f"{lengths} {tokens}{padding}; greedy", (rows,))


def _shared_system_prompt(tokenize: Tokenize, room: int) -> Scenario:
    questions = [tokenize("\n\n" + question) for question in QUESTIONS]
    longest = max(map(len, questions))
    system = tokenize(help_text("compound", "with"))[: min(LONG_PROMPT_TOKENS // 2, room - longest)]
    return Scenario(
        "b",
        "One system prompt",
        f"{len(questions)} questions behind {len(system)} tokens, one call each, all caches kept; "
        "kvpager with prefix_cache=True",
        tuple((system + question,) for question in questions),
        prefix_cache=True,
        keep_caches=True,
    )


def _beams(tokenize: Tokenize, room: int) -> Scenario:
    prompt = tokenize(help_text("import", "execmodel"))[: min(LONG_PROMPT_TOKENS, room)]
    return Scenario(
        "c",
        "4 beams",
        f"3 returned; {len(prompt)} prompt tokens; what several beams hold counts as needed once",
        ((prompt,),),
        num_beams=4,
        num_returned=3,
    )


def _second_call(tokenize: Tokenize, room: int) -> Scenario:
    endings = [tokenize(ending) for ending in ENDINGS]
    longest = max(map(len, endings))
    prefix = tokenize(help_text("strings", "types"))[: min(LONG_PROMPT_TOKENS, room - longest)]
    return Scenario(
        "d",
        "Shared beginning",
        f"2 calls with {len(prefix)} tokens in common, the first cache dropped before the second; "
        "kvpager with prefix_cache=True",
        tuple((prefix + ending,) for ending in endings),
        prefix_cache=True,
    )


def help_text(*names: str) -> str:
    """Return the named help pages as one text, long enough for any tokenizer."""
    pages = [topics[name] for name in names if name in topics]
    return "\n\n".join(pages or [page for _, page in sorted(topics.items())[:20]])

"""Incremental decoding: turns tokens into text as they arrive.

A character may consist of several tokens, and a token of several bytes.
"""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, and a token at least one.
_MAX_TOKENS = 4
_MAX_HELD = 4 * _MAX_TOKENS


class Detokenizer:
    """Turns tokens into pieces of text, each as soon as later tokens cannot change it.

    The text of a token depends on the tokens before it; a leading space, for example. So each piece
    is the difference of two decodings, as in vLLM and TGI:

        ids     ... [ context ][ held ]
        piece       decode(context + held) - decode(context)

    Tokens are held while the text ends with an incomplete character.

    Args:
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._context: list[int] = []
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """Return the text that `token` completes, or "". O(1) amortised."""
        if token in self._special:
            return ""
        self._held.append(token)
        piece = self._text(self._held)
        if piece and not piece.endswith(_REPLACEMENT):
            return self._release(len(self._held), piece)
        if len(self._held) < _MAX_HELD:
            return ""
        # The held bytes are not valid UTF-8. Only the last tokens may still become a character.
        for number in range(len(self._held) - _MAX_TOKENS, 0, -1):
            beginning = self._text(self._held[:number])
            if piece.startswith(beginning):
                return self._release(number, beginning)
        return self._release(len(self._held), piece)

    def end(self) -> str:
        """Return the text of held tokens: replacement characters. O(1)."""
        return self._release(len(self._held), self._text(self._held)) if self._held else ""

    def _release(self, number: int, piece: str) -> str:
        if piece:  # otherwise keep the context: a later space may depend on it
            self._context = self._held[:number]
        self._held = self._held[number:]
        return piece

    def _text(self, ids: list[int]) -> str:
        """Return the text that `ids` add after the context."""
        before, after = self._decode(self._context), self._decode(self._context + ids)
        # Some tokenizers replace a whole run of bytes if its last bytes are invalid.
        return after[len(before) :] if after.startswith(before) else self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids)


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of `ids`, without special tokens. O(tokens)."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def text_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer of `tokenizer`, which may be a processor or None. O(1).

    Raises: `TypeError` for an object that cannot decode.
    """
    if tokenizer is None:
        return None
    for found in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        if hasattr(found, "decode") and hasattr(found, "all_special_ids"):
            return found
    raise TypeError(
        f"tokenizer: expected a tokenizer of transformers, got {type(tokenizer).__name__}. "
        "Load it with AutoTokenizer.from_pretrained."
    )

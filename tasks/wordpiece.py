"""Text to the word pieces of BERT's uncased vocabulary (Devlin et al. 2019; Wu et al. 2016, arXiv:1609.08144, section 4.1)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
LONGEST_WORD = 100  # characters; what is longer is unknown, as in BERT's own tokenizer
CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0xF900, 0xFAFF))


def read_vocabulary(path: Path) -> dict[str, int]:
    """Piece to number, from a file of one piece a line."""
    return {piece: number for number, piece in enumerate(path.read_text("utf-8").split("\n")) if piece}


def encode(text: str, vocabulary: Mapping[str, int], tokens: int) -> list[int]:
    """The numbers of the text's pieces between FIRST and LAST, cut and padded to `tokens`."""
    numbers: list[int] = []
    for word in _words(text):
        numbers += [vocabulary[piece] for piece in _pieces(word, vocabulary)]
        if len(numbers) >= tokens - 2:
            break
    numbers = [vocabulary[FIRST], *numbers[: tokens - 2], vocabulary[LAST]]
    return numbers + [vocabulary[PAD]] * (tokens - len(numbers))


def _words(text: str) -> Iterator[str]:
    """Lower case without accents, parted at spaces, punctuation and Chinese characters."""
    word = ""
    for character in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(character)
        if kind == "Mn":
            continue
        apart = _is_punctuation(character, kind) or _is_chinese(character)
        if not apart and not character.isspace():
            word += "" if kind.startswith("C") or character == "\ufffd" else character
            continue
        if word:
            yield word
        word = ""
        if apart:
            yield character
    if word:
        yield word


def _pieces(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    """The longest piece that the rest of the word begins with, again and again."""
    if len(word) > LONGEST_WORD:
        return [UNKNOWN]
    pieces: list[str] = []
    start = 0
    while start < len(word):
        mark = "##" if start else ""
        for end in range(len(word), start, -1):
            if mark + word[start:end] in vocabulary:
                break
        else:
            return [UNKNOWN]
        pieces.append(mark + word[start:end])
        start = end
    return pieces


def _is_punctuation(character: str, kind: str) -> bool:
    """BERT's idea of it: Unicode's, and all of ASCII that is neither a letter, a digit nor a space."""
    return kind.startswith("P") or ("!" <= character <= "~" and not character.isalnum())


def _is_chinese(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in CHINESE)

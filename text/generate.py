"""Generator of text by a language model with adapters: token by token, with the keys and values of those before it."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..base.refusal import Refusal
from .base import Base
from .model import TextModel
from .task import TextTask

UNFINISHED = "\ufffd"  # of a character whose last bytes have not come
COLUMNS = 80
SEEDS = 1 << 63  # that torch takes


@dataclass(frozen=True)
class Decoding:
    """Choice of the next token.

    Attributes:
      tokens: largest number of tokens, at least 1.
      temperature: divides the logits, at least 0; with 0 the likeliest token is chosen.
      seed: equal seeds give equal texts.
    """

    tokens: int = 64
    temperature: float = 0.8
    seed: int = 0

    def check(self) -> None:
        """Refuse a value out of its range."""
        if self.tokens < 1:
            raise Refusal("--tokens", self.tokens, "must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise Refusal("--temperature", self.temperature, "must be at least 0")
        if not 0 <= self.seed < SEEDS:
            raise Refusal("--seed", self.seed, f"must be a whole number from 0 to {SEEDS - 1}")


def continuation(model: nn.Module, task: object, text: str, sampling: Decoding) -> Iterator[str]:
    """Return the pieces of a text's continuation as they come, which ends where the model ends a text.

    Args:
      model: released model of the task, in evaluation mode.
      task: of texts.
      text: beginning, not empty; it is not in the pieces.
      sampling: choice of tokens.

    Raises:
      Refusal: the task is of another kind, or the text has no token.
    """
    if not isinstance(task, TextTask) or not isinstance(model, TextModel):
        remedy = "is not a language model; name a run with task=text"
        raise Refusal("RUN", type(task).__name__, remedy)
    if task.classes:
        remedy = "classifies texts and writes none; use fedveil predict, or train without task.label"
        raise Refusal("task.labels", list(task.form.labels), remedy)
    sampling.check()
    tokens = task.base.tokenizer.encode(text).ids
    if not tokens:
        raise Refusal("TEXT", text, "has no token; write the beginning of a text")
    return _pieces(_tokens(model, torch.tensor([tokens]), sampling), tokens, task.base)


def _tokens(model: TextModel, tokens: Tensor, sampling: Decoding) -> Iterator[int]:
    """Yield the tokens after those of a text, shape (1, tokens), up to the end token, which is left out."""
    generator = torch.Generator().manual_seed(sampling.seed)
    weight = model.words.get_parameter("weight").float()
    options: dict[str, Any] = {}
    for _ in range(sampling.tokens):
        with torch.no_grad():
            states = model.decoder(input_ids=tokens, use_cache=True, **options)
            logits = states.last_hidden_state[0, -1].float() @ weight.t()
        options = {"past_key_values": states.past_key_values}
        chosen = int(_choice(logits, sampling.temperature, generator))
        if chosen == model.end:
            return
        yield chosen
        tokens = torch.tensor([[chosen]])


def _choice(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return the next token, from logits of shape (words,)."""
    if not temperature:
        return logits.argmax()
    # The largest logit is 0 first, so that no temperature makes it infinite.
    probabilities = ((logits - logits.max()).double() / temperature).softmax(0)
    return torch.multinomial(probabilities, 1, generator=generator)


def _pieces(tokens: Iterable[int], start: Sequence[int], base: Base) -> Iterator[str]:
    """Yield the text of tokens in whole characters.

    Args:
      tokens: of the continuation.
      start: tokens before it; their text is left out.
      base: has the tokenizer, whose text of a token may depend on those before it.
    """
    numbers, decode = [*start], base.tokenizer.decode
    written = decode(numbers)
    for token in tokens:
        numbers.append(token)
        text = decode(numbers)
        if not text.endswith(UNFINISHED):
            yield text[len(written) :]
            written = text
    yield decode(numbers)[len(written) :]


def plain(text: str) -> str:
    """Return a text without control characters, some of which steer a terminal, but ends of lines; a tab is a space."""
    return "".join(
        each for each in text.replace("\t", " ") if each == "\n" or unicodedata.category(each)[0] != "C"
    )


def lines_of(pieces: Iterable[str], columns: int = COLUMNS) -> Iterator[str]:
    """Yield the words of a text as soon as each has ended, with the spaces and ends of lines before them.

    Args:
      pieces: of the text.
      columns: longest line; only a word that is longer exceeds it.
    """
    column, space, word = 0, "", ""
    for character in chain(chain.from_iterable(map(plain, pieces)), "\n"):
        if not character.isspace():
            word += character
            continue
        if word and column and column + len(space) + len(word) > columns:
            column, space = 0, "\n"
        column += len((space + word).lstrip("\n"))
        yield space + word
        space, word = character, ""
        if character == "\n":
            yield character
            column, space = 0, ""

"""Text from a model: prompts in, streamed completions out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from tinyllama_jax.config import SamplingConfig
from tinyllama_jax.inference import decoding, sampling
from tinyllama_jax.model.llama import Llama, Params
from tinyllama_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """How one prompt went on.

    Attributes:
      tokens: the ids drawn, without the EOS that ended them; where a stop string ended the text,
        up to the token that completed it.
      text: their text, cut before the stop string; "" without a tokenizer.
      finish: "eos", "stop" (a stop string) or "length" (max_new_tokens).
    """

    tokens: list[int]
    text: str
    finish: str


@dataclasses.dataclass(frozen=True)
class Update:
    """News of one row: text that is now certain, and in its last update the whole completion."""

    row: int
    text: str
    completion: Completion | None = None


@dataclasses.dataclass(frozen=True)
class Engine:
    """A model ready to continue texts.

    Attributes:
      model, params: the model.
      tokenizer: None: prompts must be ids, completions have no text.
      start_id: the id before a text; None: the model was trained without one.
      eos_ids: ids that end a text.
    """

    model: Llama
    params: Params
    tokenizer: Tokenizer | None = None
    start_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids that a prompt stands for: a text with the start id before it, or ids themselves.

        Raises:
          ValueError: a text, but no tokenizer.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError(
                "the model came without a tokenizer, so text has no meaning to it; put its "
                "SentencePiece tokenizer.model beside its config.json, or give prompts as ids"
            )
        start = [] if self.start_id is None else [self.start_id]
        return start + self.tokenizer.encode(prompt)

    def fitted(self, settings: SamplingConfig) -> SamplingConfig:
        """The settings, with as many new tokens as the context holds after their prompt at most."""
        room = self.model.config.max_seq_len - len(self.encode(settings.prompt))
        return dataclasses.replace(
            settings, max_new_tokens=min(settings.max_new_tokens, max(1, room))
        )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: SamplingConfig,
        *,
        stop: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continues all prompts and returns their completions in order; see `stream`."""
        done: dict[int, Completion] = {}
        for update in self.stream(prompts, settings, stop=stop, seeds=seeds):
            if update.completion is not None:
                done[update.row] = update.completion
        return [done[row] for row in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        settings: SamplingConfig,
        *,
        stop: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
    ) -> Iterator[Update]:
        """Continues prompts of any lengths in one batch, telling of each row as it goes.

        Args:
          prompts: texts, or ids as they stand (nothing is put before them).
          settings: how tokens are drawn, and how many at most; its `prompt` is not read.
          stop: strings that end a text; they are not part of it, wherever tokens split them.
          seeds: one per row, on which alone its random draws hang; None: `settings.seed + row`.

        Yields:
          An `Update` for each token of each row that has not ended.

        Raises:
          ValueError: no or an empty prompt, settings out of range, ids that the model does not
            know, or a prompt that with `max_new_tokens` does not fit the model's context.
        """
        sampling.check(settings)
        ids = [self.encode(prompt) for prompt in prompts]
        self._check(ids, settings, stop)
        if seeds is None:
            seeds = range(settings.seed, settings.seed + len(ids))
        assert len(seeds) == len(ids), (len(seeds), len(ids))
        return self._stream(ids, settings, tuple(stop), seeds)

    def _stream(
        self,
        prompts: list[list[int]],
        settings: SamplingConfig,
        stop: tuple[str, ...],
        seeds: Sequence[int],
    ) -> Iterator[Update]:
        rows = {row: _Row(self, prompt, stop) for row, prompt in enumerate(prompts)}
        steps = decoding.draw(self.model, self.params, prompts, settings, seeds)
        for number, tokens in enumerate(steps, start=1):
            last = number == settings.max_new_tokens
            for row, state in list(rows.items()):
                text, completion = state.add(int(tokens[row]), last)
                yield Update(row, text, completion)
                if completion is not None:
                    del rows[row]
            if not rows:
                return

    def _check(self, prompts: list[list[int]], settings: SamplingConfig, stop: Sequence[str]):
        if not prompts or not all(prompts):
            raise ValueError("a prompt is empty: the model continues at least one token")
        if "" in stop:
            raise ValueError("a stop string is empty: it would end every text at once")
        if stop and self.tokenizer is None:
            raise ValueError("stop strings need text, and the model came without a tokenizer")
        vocab_size, context = self.model.config.vocab_size, self.model.config.max_seq_len
        foreign = [i for prompt in prompts for i in prompt if not 0 <= i < vocab_size]
        if foreign:
            raise ValueError(
                f"id {foreign[0]} of a prompt is outside the model's vocabulary of {vocab_size}: "
                f"the tokenizer is another model's"
            )
        longest = max(map(len, prompts))
        if longest + settings.max_new_tokens > context:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens = {settings.max_new_tokens} do "
                f"not fit the context of {context} tokens that the model was trained on; "
                + (
                    f"set max_new_tokens to {context - longest} or less"
                    if longest < context
                    else "shorten the prompt"
                )
            )


class _Row:
    """One text under way: decodes its tokens, and watches for its end."""

    def __init__(self, engine: Engine, prompt: list[int], stop: tuple[str, ...]):
        self._eos_ids = engine.eos_ids
        self._stop = stop
        self._tokens: list[int] = []
        self._told = ""  # text already given out
        self._held = ""  # text that may turn out to begin a stop string
        self._decoder = None
        if engine.tokenizer is not None:
            self._pieces = engine.tokenizer.vocab_size
            self._decoder = engine.tokenizer.stream_decoder()
            # The prompt goes first: whether a piece's leading space is text depends on it.
            for token in prompt:
                self._decode(token)

    def add(self, token: int, last: bool) -> tuple[str, Completion | None]:
        """Takes the next token; returns the text it makes certain, and the completion at the end.

        Args:
          token: the id drawn.
          last: no more tokens are drawn after it.
        """
        if token in self._eos_ids:
            return self._end("eos")
        self._tokens.append(token)
        self._held += self._decode(token)
        found = _first(self._held, self._stop)
        if found >= 0:
            self._held = self._held[:found]
            return self._tell(len(self._held)), self._completion("stop")
        if last:
            return self._end("length")
        return self._tell(len(self._held) - _open_stop(self._held, self._stop)), None

    def _decode(self, token: int) -> str:
        """What a token adds to the text; nothing where the model has more ids than the tokenizer
        has pieces, as after padding a vocabulary or adding tokens to it."""
        if self._decoder is None or token >= self._pieces:
            return ""
        return self._decoder.add(token)

    def _end(self, finish: str) -> tuple[str, Completion]:
        if self._decoder is not None:
            self._held += self._decoder.finish()
        found = _first(self._held, self._stop)
        if found >= 0:
            self._held, finish = self._held[:found], "stop"
        return self._tell(len(self._held)), self._completion(finish)

    def _tell(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._told += text
        return text

    def _completion(self, finish: str) -> Completion:
        return Completion(self._tokens, self._told, finish)


def _first(text: str, stop: tuple[str, ...]) -> int:
    """Where the earliest stop string begins; -1: nowhere."""
    return min((at for at in map(text.find, stop) if at >= 0), default=-1)


def _open_stop(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of the text that a stop string could begin with."""
    lengths = range(min(len(text), max(map(len, stop), default=1) - 1), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stop)), 0)

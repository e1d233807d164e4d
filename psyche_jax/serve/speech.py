"""From tokens to text as they come: whole characters, stop strings, log-probs, the output filter."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from psyche_jax.data.chat import decoded_text
from psyche_jax.serve.batcher import Piece
from psyche_jax.serve.crisis.outputs import OutputFilter

Finish = Literal["stop", "length", "content_filter"]
_BROKEN = "\ufffd"  # what bytes that are no whole character decode to


@dataclass(frozen=True)
class TokenLogProb:
    """One token of a response, and the likeliest ones in its place."""

    token: int
    log_prob: float
    best: list[tuple[int, float]]


@dataclass(frozen=True)
class Delta:
    """What may be shown next; `finish` if that was the end."""

    text: str = ""
    log_probs: list[TokenLogProb] = field(default_factory=list)
    finish: Finish | None = None


class Speech:
    """One response. `finish` is None until it has ended; `tokens` counts those that were drawn.

    `opened` is what the chat template has written of it. It is shown first, and holds no stop string.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        output: OutputFilter | None,
        keep_log_probs: bool = False,
        opened: str = "",
    ) -> None:
        self.finish: Finish | None = None
        self.tokens = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._output = output
        self._keep = keep_log_probs
        self._opened = opened
        self._ids: list[int] = []
        self._text = ""  # all of it, as far as it is whole characters and no stop string
        self._given = 0  # characters of it that the filter was given
        self._log_probs: list[tuple[int, TokenLogProb]] = []  # with the place in the text where each token begins

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self.finish is not None

    def feed(self, piece: Piece) -> Delta:
        """Add what was decoded; returns what may be shown of it."""
        if self.ended:
            return Delta()
        self.tokens += len(piece.tokens)
        if self._keep:
            for index, token in enumerate(piece.tokens):
                start = len(self._decode([*self._ids, *piece.tokens[:index]]).rstrip(_BROKEN))
                self._log_probs.append((start, TokenLogProb(token, piece.log_probs[index], piece.best[index])))
        self._ids += piece.tokens
        text = self._decode(self._ids)
        if piece.finish is None:
            text = text.rstrip(_BROKEN)  # more bytes may follow
        self._text = text
        end, self.finish = self._end(piece.finish)
        shown, opened, self._opened = self._shown(end), self._opened, ""
        return replace(shown, text=opened + shown.text)

    def _end(self, finish: Finish | None) -> tuple[int, Finish | None]:
        """How much of the text is certain, and whether it ends there."""
        found = [place for stop in self._stop if (place := self._text.find(stop, self._earliest(stop))) >= 0]
        if found:
            return min(found), "stop"
        if finish is not None:
            return len(self._text), finish
        held = max((self._overlap(stop) for stop in self._stop), default=0)
        return len(self._text) - held, None

    def _earliest(self, stop: str) -> int:
        return max(self._given - len(stop), 0)

    def _overlap(self, stop: str) -> int:
        """Length of the longest beginning of `stop` with which the text ends."""
        return next((size for size in range(len(stop) - 1, 0, -1) if self._text.endswith(stop[:size])), 0)

    def _shown(self, end: int) -> Delta:
        piece, self._given = self._text[self._given : end], max(end, self._given)
        if self._output is None:
            return Delta(piece, self._released(self._given), self.finish)
        withheld = self._output.withheld
        shown = self._output.feed(piece)
        if self.ended:
            shown += self._output.finish()
        checked = self._given - self._output.held_back
        if self._output.withheld > withheld:
            self._log_probs = [entry for entry in self._log_probs if entry[0] >= checked]
        if self._output.stopped:
            self.finish = "content_filter"
        return Delta(shown, self._released(checked), self.finish)

    def _released(self, place: int) -> list[TokenLogProb]:
        """Log-probs of the tokens that begin before `place`; all that are left never come out after a stop string."""
        released = [entry for start, entry in self._log_probs if start < place]
        self._log_probs = [entry for entry in self._log_probs if entry[0] >= place]
        return released

    def _decode(self, ids: Sequence[int]) -> str:
        return decoded_text(self._tokenizer, ids)

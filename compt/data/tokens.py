"""Captions to token ids with open_clip's tokenizer. The most recent captions are remembered."""

from __future__ import annotations

from functools import cache, lru_cache
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]


class Tokenizer(Protocol):
    """The part of open_clip's `SimpleTokenizer` that is used."""

    sot_token_id: int
    eot_token_id: int

    def encode(self, text: str) -> list[int]:
        """Ids without start and end."""
        ...


class CaptionTokens:
    """Token ids of captions, cut to `context_length`. The end token stays, since text towers pool there."""

    def __init__(self, context_length: int, tokenizer: Tokenizer | None = None, remembered: int = 1 << 17) -> None:
        self.context_length = context_length
        self._tokenizer = tokenizer or clip_tokenizer()
        self.ids = lru_cache(maxsize=remembered)(self._encode)

    def _encode(self, text: str) -> Ids:
        """Start, at most context_length - 2 tokens, end: int64 [length], read-only."""
        inner = self._tokenizer.encode(text)[: self.context_length - 2]
        ids = np.array([self._tokenizer.sot_token_id, *inner, self._tokenizer.eot_token_id], dtype=np.int64)
        ids.setflags(write=False)
        return ids

    def length(self, text: str) -> int:
        """Number of tokens of a whole caption, start and end included."""
        return len(self._tokenizer.encode(text)) + 2


@cache
def clip_tokenizer() -> Any:
    """open_clip's `SimpleTokenizer`, the byte-pair tokenizer of OpenAI's CLIP, made faster: it gives the same ids.

    Reading its table takes 0.15 s.
    """
    from open_clip.tokenizer import SimpleTokenizer

    class FastTokenizer(SimpleTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self._word = lru_cache(maxsize=1 << 16)(self._encode_word)

        def encode(self, text: str) -> list[int]:
            """Ids without start and end."""
            # What open_clip repairs in a text first takes most of the time, and plain ASCII has nothing to repair.
            plain = text.isascii() and text.isprintable() and "&" not in text
            cleaned = text.lower() if plain else self.clean_fn(text)
            return [each for word in self.pat.findall(cleaned) for each in self._word(word)]

        def _encode_word(self, word: str) -> list[int]:
            """The ids that open_clip's `bpe` finds in the square of a word's length: captions may have long words."""
            if self.cache.get(word) == word:  # a special token
                return [self.encoder[word]]
            pieces = [self.byte_encoder[byte] for byte in word.encode()]
            pieces[-1] += "</w>"
            ranks: dict[tuple[str, str], int] = self.bpe_ranks
            before, after = [*range(-1, len(pieces) - 1)], [*range(1, len(pieces) + 1)]

            def rank(at: int) -> int | None:
                """The rank of the merge of a piece with the next one."""
                if at < 0 or after[at] >= len(pieces):
                    return None
                return ranks.get((pieces[at], pieces[after[at]]))

            merges = [(found, at) for at in range(len(pieces)) if (found := rank(at)) is not None]
            heapify(merges)
            while merges:
                lowest, made = merges[0][0], list[int]()
                # All places of a merge come first, from left to right. Then come the merges of what they made.
                while merges and merges[0][0] == lowest:
                    at = heappop(merges)[1]
                    if rank(at) != lowest:  # another merge took one of the two
                        continue
                    gone = after[at]
                    pieces[at], pieces[gone], after[at] = pieces[at] + pieces[gone], "", after[gone]
                    if after[at] < len(pieces):
                        before[after[at]] = at
                    made += [before[at], at]
                for at in dict.fromkeys(made):
                    if (found := rank(at)) is not None:
                        heappush(merges, (found, at))
            return [self.encoder[piece] for piece in pieces if piece]

    return FastTokenizer()


def pad(rows: list[Ids], captions: int) -> Tensor:
    """int64 [len(rows) / captions, captions, T]: T is the length of the longest row; zeros follow each row's end."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    longest = int(lengths.max()) if len(rows) else 0
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    if rows:
        tokens[np.arange(longest) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(tokens).view(-1, captions, longest)

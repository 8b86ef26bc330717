"""The tokenizer of captions against open_clip's own."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from compt.data.tokens import clip_tokenizer

STOCK = SimpleTokenizer()
ASCII = st.characters(min_codepoint=32, max_codepoint=126)
PIECES = ("'s", "&amp;", "&#39;", " ", "  ", "\t", "\n", "<start_of_text>", "<", ">", "_", "9", "É", "œ", "\x9c", "the")


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text(ASCII), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_ids_are_those_of_open_clip(text: str) -> None:
    assert clip_tokenizer().encode(text) == STOCK.encode(text)


WORDS = [word.removesuffix("</w>") for word in STOCK.encoder]


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(st.sampled_from("abéœ"), min_size=1, max_size=300),
        st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), max_size=300),
        st.text(st.sampled_from("!.-=*_"), max_size=100),
        st.lists(st.sampled_from(WORDS), max_size=6).map("".join),
    )
)
def test_ids_of_long_words_are_those_of_open_clip(text: str) -> None:
    assert clip_tokenizer().encode(text) == STOCK.encode(text)


def test_a_word_of_any_length_takes_a_time_in_proportion() -> None:
    """open_clip's own merges take more than a minute for this word."""
    word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=40_000))
    start = time.monotonic()
    ids = clip_tokenizer().encode(word)
    assert time.monotonic() - start < 20
    assert clip_tokenizer().decode(ids).strip() == word
    assert clip_tokenizer().encode(word[:2000]) == STOCK.encode(word[:2000])


@pytest.mark.parametrize(
    "text", ["A DOG's life", "a&amp;amp;b", "&lt;start_of_text&gt;", "x\r\ny", "\x1b[1m bold", "“quoted”", "KＫ ﬁ", " "]
)
def test_ids_of_texts_that_open_clip_repairs(text: str) -> None:
    assert clip_tokenizer().encode(text) == STOCK.encode(text)
    assert torch.equal(clip_tokenizer()(text, context_length=9), STOCK(text, context_length=9))

"""The tokenizer of captions against open_clip's own."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "text", ["A DOG's life", "a&amp;amp;b", "&lt;start_of_text&gt;", "x\r\ny", "\x1b[1m bold", "“quoted”", "KＫ ﬁ", " "]
)
def test_ids_of_texts_that_open_clip_repairs(text: str) -> None:
    assert clip_tokenizer().encode(text) == STOCK.encode(text)
    assert torch.equal(clip_tokenizer()(text, context_length=9), STOCK(text, context_length=9))

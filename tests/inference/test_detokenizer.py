"""Text is returned as soon as it is certain, in complete characters, and ends exactly at stop strings."""

import itertools

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llm_trainer.inference.detokenizer import Detokenizer

ALPHABET = "ab\néß€語🙂👩‍👩‍👧"


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def complete_text(text: str, stops: list[str]) -> str:
    """By definition: the text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@hypothesis_settings(max_examples=400)
@given(
    text=st.text(ALPHABET, max_size=30),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 120), max_size=20),
)
def test_concatenated_pieces_are_the_text_before_the_first_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    detokenizer = Detokenizer(stops)
    returned = (
        "".join(detokenizer.push(piece) for piece in pieces_of(text.encode(), cuts)) + detokenizer.finish()
    )
    assert returned == complete_text(text, stops)
    assert detokenizer.stopped == (complete_text(text, stops) != text)


@hypothesis_settings(max_examples=200)
@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=12))
def test_invalid_bytes_are_streamed_as_they_are_decoded(data: bytes, cuts: list[int]) -> None:
    detokenizer = Detokenizer()
    assert "".join(
        detokenizer.push(piece) for piece in pieces_of(data, cuts)
    ) + detokenizer.finish() == data.decode("utf-8", errors="replace")


def test_half_a_character_is_held_back() -> None:
    detokenizer = Detokenizer()
    smile = "🙂".encode()
    assert [detokenizer.push(smile[:3]), detokenizer.push(smile[3:])] == ["", "🙂"]


def test_a_possible_stop_string_is_held_back_and_then_released() -> None:
    detokenizer = Detokenizer(["\n\nUser:"])
    assert detokenizer.push(b"hello\n") == "hello"
    assert detokenizer.push(b"\nUs") == ""
    assert detokenizer.push(b"ing") == "\n\nUsing"
    assert detokenizer.push(b"\n\nUser") == ""
    assert detokenizer.finish() == "\n\nUser"


def test_nothing_follows_a_stop_string() -> None:
    detokenizer = Detokenizer(["stop"])
    assert detokenizer.push(b"go st") == "go "
    assert detokenizer.push(b"op and on") == ""
    assert detokenizer.stopped
    assert detokenizer.push(b"more") == ""
    assert detokenizer.finish() == ""


def test_text_is_returned_as_soon_as_it_is_certain() -> None:
    detokenizer = Detokenizer(["xyz"])
    assert [detokenizer.push(piece) for piece in (b"ax", b"y", b"x", b"b")] == ["a", "", "xy", "xb"]

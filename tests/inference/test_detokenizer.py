import itertools

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llm_trainer.inference.detokenizer import TextStream

ALPHABET = "ab\néß€語🙂👩‍👩‍👧"


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


def whole(text: str, stops: list[str]) -> str:
    """By definition: up to the beginning of the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@hypothesis_settings(max_examples=400)
@given(
    text=st.text(ALPHABET, max_size=30),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 120), max_size=20),
)
def test_streamed_pieces_joined_are_the_text_cut_at_the_first_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    stream = TextStream(stops)
    given_out = "".join(stream.push(piece) for piece in pieces_of(text.encode(), cuts)) + stream.finish()
    assert given_out == whole(text, stops)
    assert stream.stopped == (whole(text, stops) != text)


@hypothesis_settings(max_examples=200)
@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=12))
def test_invalid_bytes_stream_as_they_decode(data: bytes, cuts: list[int]) -> None:
    stream = TextStream()
    assert "".join(stream.push(piece) for piece in pieces_of(data, cuts)) + stream.finish() == data.decode(
        "utf-8", errors="replace"
    )


def test_half_a_character_is_held_back() -> None:
    stream = TextStream()
    smile = "🙂".encode()
    assert [stream.push(smile[:3]), stream.push(smile[3:])] == ["", "🙂"]


def test_what_may_become_a_stop_string_is_held_back_and_then_released() -> None:
    stream = TextStream(["\n\nUser:"])
    assert stream.push(b"hello\n") == "hello"
    assert stream.push(b"\nUs") == ""
    assert stream.push(b"ing") == "\n\nUsing"
    assert stream.push(b"\n\nUser") == ""
    assert stream.finish() == "\n\nUser"


def test_nothing_follows_a_stop_string() -> None:
    stream = TextStream(["stop"])
    assert stream.push(b"go st") == "go "
    assert stream.push(b"op and on") == ""
    assert stream.stopped
    assert stream.push(b"more") == ""
    assert stream.finish() == ""


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    stream = TextStream(["xyz"])
    assert [stream.push(piece) for piece in (b"ax", b"y", b"x", b"b")] == ["a", "", "xy", "xb"]

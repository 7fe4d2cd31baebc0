"""Texts as sets of hashed word 5-grams ("shingles"), all of them at once in numpy.

Near-duplicates are found, and repetition is measured, by which runs of words texts share. Python would make a
string for each run; here the bytes of many documents lie end to end in one array, a word's hash is the value
of a polynomial in its bytes, and a run's hash is a mix of its words'. That is several times as fast, and
depends on neither the process nor the machine (Python's own `hash` differs from one process to the next).

What a word is: letters, digits and underscores, lower-cased; everything else separates. In scripts that do
not put spaces between words (Chinese, Japanese, Korean, Thai, Lao, Khmer, Burmese), and for emoji, each
character is a word. A text of fewer words than a run has is one run; a text without any word, of nothing but
punctuation, is one run of its bytes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Hashes: TypeAlias = NDArray[np.uint64]

BLOCK_BYTES = 2**18  # hashed at once: the arrays beside it, 8 bytes a byte, stay in the processor's cache
_BASE = 0x9E3779B97F4A7C15  # of the polynomial; odd, so it has an inverse modulo 2^64
_WORD_BYTES = bytes(  # lower-cased; what separates words becomes 0
    byte if byte >= 0x80 or chr(byte) == "_" else ord(chr(byte).lower()) if chr(byte).isalnum() else 0
    for byte in range(256)
)


def murmur_mix(values: Hashes) -> Hashes:
    """Spread each number over all 64 bits (the finalizer of MurmurHash3, a bijection)."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


def shingle_hashes(texts: Sequence[str], words: int) -> tuple[Hashes, NDArray[np.int64]]:
    """The hashes of all runs of so many words in each text, repeats included, end to end, and where each
    text's begin (n + 1 offsets).

    The texts together should be of about BLOCK_BYTES or less; a longer text goes through `StreamingShingler`.
    """
    encoded = [text.lower().encode("utf-8") for text in texts]
    begins = np.zeros(len(texts), np.int64)
    np.cumsum(np.fromiter((len(one) + 1 for one in encoded[:-1]), np.int64), out=begins[1:])
    hashed, starts = word_hashes(b" ".join(encoded))
    bounds = np.append(np.searchsorted(starts, begins), starts.size)  # of each text's words
    in_text = np.diff(bounds)
    offsets = np.append(0, np.cumsum(np.maximum(in_text - words + 1, 1)))
    found, is_long = np.zeros(int(offsets[-1]), np.uint64), np.ones(int(offsets[-1]), np.bool_)
    for index in np.flatnonzero(in_text < words):
        found[offsets[index]] = _one_run(hashed[bounds[index] : bounds[index + 1]], encoded[index])
        is_long[offsets[index]] = False
    if hashed.size >= words:
        is_whole = np.ones(hashed.size - words + 1, np.bool_)
        across = (
            bounds[1:-1, None] - np.arange(1, words)
        ).ravel()  # runs that begin here go over the end of a text
        is_whole[across[(across >= 0) & (across < is_whole.size)]] = False
        found[is_long] = _mixed(hashed, words)[is_whole]
    return found, offsets


def word_hashes(lowered: bytes) -> tuple[Hashes, NDArray[np.int64]]:
    """The hash of each word in lower-cased utf-8, and where each begins; equal words have equal hashes
    wherever they stand.
    """
    raw = np.frombuffer(lowered.translate(_WORD_BYTES), np.uint8)
    alone = np.zeros(0, np.int64)
    if not lowered.isascii():
        raw, alone = _beyond_ascii(lowered, raw)
    is_word = raw != 0
    is_first = is_word.copy()
    is_first[1:] &= ~is_word[:-1]
    is_first[alone] = is_word[alone]
    first = np.flatnonzero(is_first)
    if not first.size:
        return np.zeros(0, np.uint64), first
    powers, inverses = _powers(max(BLOCK_BYTES, 1 << (raw.size - 1).bit_length()))
    return murmur_mix(
        np.add.reduceat(np.multiply(raw, powers[: raw.size], dtype=np.uint64), first) * inverses[first]
    ), first


class StreamingShingler:
    """The shingles of one document that comes in pieces, in blocks of bounded size: as if it had come whole.

    Only a word of more than BLOCK_BYTES without a blank may be cut where the whole would not.
    """

    def __init__(self, words: int) -> None:
        self._words = words
        self._begun = ""  # the last word, which the next piece may go on with
        self._carried = np.zeros(0, np.uint64)  # the last words - 1 words, which begin no whole run yet
        self._seen = 0
        self._signs = hashlib.blake2b(digest_size=8)

    def add(self, text: str) -> Iterator[Hashes]:
        """The hashes of the runs that this piece completes."""
        joined = self._begun + text
        end = max(joined.rfind(" "), joined.rfind("\n"))
        if end < 0 and len(joined) <= BLOCK_BYTES:
            self._begun = joined
        else:
            end = end if len(joined) - end <= BLOCK_BYTES else len(joined)
            self._begun = joined[end:]
            yield from self._take(joined[:end])

    def end(self) -> Iterator[Hashes]:
        """The hashes of the runs that the document's end completes."""
        yield from self._take(self._begun)
        if not self._seen:
            yield np.array([int.from_bytes(self._signs.digest(), "little")], np.uint64)
        elif self._seen < self._words:
            yield _mixed(self._carried, self._carried.size)

    def _take(self, text: str) -> Iterator[Hashes]:
        for block in _blocks(text.lower().encode("utf-8")):
            if not self._seen:
                self._signs.update(block)
            hashed, _ = word_hashes(block)
            self._seen += hashed.size
            joined = np.concatenate([self._carried, hashed])
            if joined.size >= self._words:
                yield _mixed(joined, self._words)
            self._carried = joined[max(0, joined.size - self._words + 1) :]


def _one_run(hashed: Hashes, lowered: bytes) -> np.uint64:
    """The only run of a text with few words; without any, of its bytes."""
    if hashed.size:
        return np.uint64(_mixed(hashed, hashed.size)[0])
    return np.uint64(int.from_bytes(hashlib.blake2b(lowered, digest_size=8).digest(), "little"))


def _mixed(hashed: Hashes, words: int) -> Hashes:
    """One hash for each run of so many neighbours."""
    size = hashed.size - words + 1
    total = np.full(size, words, np.uint64)
    for place in range(words):
        total += hashed[place : place + size] * np.uint64((_BASE ** (place + 2)) % 2**64)
    return murmur_mix(total)


def _beyond_ascii(lowered: bytes, raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`raw` with signs beyond ASCII set to 0 as well, and where a word may begin though there is no separator
    before it.
    """
    given = np.frombuffer(lowered, np.uint8)
    leads = np.flatnonzero(given >= 0xC2)  # the first byte of each character
    lead, follows = given[leads], given[leads + 1]
    signs = (lead == 0xE2) & (follows <= 0x81) | (lead == 0xE3) & (
        follows == 0x80
    )  # U+2000-207F and U+3000-303F
    two = leads[(lead == 0xC2) | signs]  # U+0080-00BF: signs and the no-break space
    raw = raw.copy()
    raw[two], raw[two + 1], raw[leads[signs] + 2] = 0, 0, 0
    wide = (lead >= 0xE3) & (lead <= 0xED) | (lead == 0xE0) & (follows >= 0xB8) & (
        follows <= 0xBB
    )  # east Asia; Thai and Lao
    wide |= (lead == 0xE1) & ((follows == 0x9E) | (follows == 0x9F) | (follows <= 0x82))  # Khmer; Burmese
    pictures = leads[lead >= 0xF0]  # four bytes: emoji, rare ideographs
    alone = np.concatenate([leads[wide], leads[wide] + 3, pictures, pictures + 4])
    return raw, alone[alone < given.size]


@functools.lru_cache(maxsize=2)
def _powers(size: int) -> tuple[Hashes, Hashes]:
    """The base's powers modulo 2^64, and their inverses."""

    def table(base: int) -> Hashes:
        factors = np.full(size, base % 2**64, np.uint64)
        factors[0] = 1
        return np.multiply.accumulate(factors)

    return table(_BASE), table(pow(_BASE, -1, 2**64))


def _blocks(raw: bytes) -> Iterator[bytes]:
    """Cut at spaces and line ends, near every BLOCK_BYTES."""
    begin = 0
    while len(raw) - begin > BLOCK_BYTES:
        end = max(raw.rfind(b" ", begin, begin + BLOCK_BYTES), raw.rfind(b"\n", begin, begin + BLOCK_BYTES))
        if end <= begin:
            end = begin + BLOCK_BYTES
            while raw[end] & 0xC0 == 0x80:
                end -= 1
        yield raw[begin:end]
        begin = end
    yield raw[begin:]

"""Texts as sets of hashed word n-grams ("shingles"), computed for many documents at once in numpy.

Near-duplicates are found, and repetition is measured, by the word n-grams that texts have in common. Python
would create a string for each n-gram. Here the bytes of many documents are concatenated in one array, a
word's hash is the value of a polynomial in its bytes, and an n-gram's hash is a mix of its words' hashes.
That is several times as fast, and depends on neither the process nor the machine (Python's own `hash` differs
from one process to the next).

A word consists of letters, digits and underscores, lower-cased; everything else separates words. In scripts
without spaces between words (Chinese, Japanese, Korean, Thai, Lao, Khmer, Burmese), and for emoji, each
character is a word. A text with fewer words than an n-gram has is one n-gram; a text without any word, of
only punctuation, is one n-gram of its bytes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llm_trainer.data.hashing import GOLDEN_GAMMA

Hashes: TypeAlias = NDArray[np.uint64]

BLOCK_BYTES = 2**18
"""Bytes hashed at once: the arrays for it, 8 bytes per byte, fit into the processor's cache."""
_BASE = GOLDEN_GAMMA  # of the polynomial; it is odd, so it has an inverse modulo 2^64
_WORD_BYTES = bytes(  # lower-cased; separators become 0
    byte if byte >= 0x80 or chr(byte) == "_" else ord(chr(byte).lower()) if chr(byte).isalnum() else 0
    for byte in range(256)
)


def murmur_mix(values: Hashes) -> Hashes:
    """Mix the bits of each number (the finalizer of MurmurHash3, a bijection of 64-bit integers)."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


def shingle_hashes(texts: Sequence[str], words: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash all word n-grams of each text, repeated ones included.

    Args:
        texts: Texts of about BLOCK_BYTES or less together; a longer one is for `StreamingShingler`.
        words: Words per n-gram.

    Returns:
        The hashes of all texts, concatenated, and the start of each text's hashes (n + 1 offsets).
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
        found[offsets[index]] = _short_text_hash(hashed[bounds[index] : bounds[index + 1]], encoded[index])
        is_long[offsets[index]] = False
    if hashed.size >= words:
        is_within_text = np.ones(hashed.size - words + 1, np.bool_)
        # Starts of n-grams that would extend beyond the end of a text.
        across = (bounds[1:-1, None] - np.arange(1, words)).ravel()
        is_within_text[across[(across >= 0) & (across < is_within_text.size)]] = False
        found[is_long] = _ngram_hashes(hashed, words)[is_within_text]
    return found, offsets


def word_hashes(lowered: bytes) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash each word; equal words have equal hashes at any position.

    Args:
        lowered: Lower-cased text in utf-8.

    Returns:
        The hash and the first byte of each word.
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
    """Hashes the word n-grams of one document that comes in chunks, in blocks of bounded size.

    The hashes are those of the complete text, except that a word of more than BLOCK_BYTES may be divided.

    Args:
        words: Words per n-gram.
    """

    def __init__(self, words: int) -> None:
        self._words = words
        self._last_word = ""  # the next chunk may continue it
        self._carried = np.zeros(0, np.uint64)  # the last words - 1 words, whose n-grams are incomplete
        self._seen = 0
        self._bytes_hash = hashlib.blake2b(digest_size=8)

    def add(self, text: str) -> Iterator[Hashes]:
        """Yield the hashes of the n-grams that this chunk completes."""
        text_so_far = self._last_word + text
        end = max(text_so_far.rfind(" "), text_so_far.rfind("\n"))
        if end < 0 and len(text_so_far) <= BLOCK_BYTES:
            self._last_word = text_so_far
        else:
            end = end if len(text_so_far) - end <= BLOCK_BYTES else len(text_so_far)
            self._last_word = text_so_far[end:]
            yield from self._hash(text_so_far[:end])

    def end(self) -> Iterator[Hashes]:
        """Yield the hashes of the n-grams that the end of the document completes."""
        yield from self._hash(self._last_word)
        if not self._seen:
            yield np.array([int.from_bytes(self._bytes_hash.digest(), "little")], np.uint64)
        elif self._seen < self._words:
            yield _ngram_hashes(self._carried, self._carried.size)

    def _hash(self, text: str) -> Iterator[Hashes]:
        for block in _blocks(text.lower().encode("utf-8")):
            if not self._seen:
                self._bytes_hash.update(block)
            hashed, _ = word_hashes(block)
            self._seen += hashed.size
            text_so_far = np.concatenate([self._carried, hashed])
            if text_so_far.size >= self._words:
                yield _ngram_hashes(text_so_far, self._words)
            self._carried = text_so_far[max(0, text_so_far.size - self._words + 1) :]


def _short_text_hash(hashed: Hashes, lowered: bytes) -> np.uint64:
    """The only n-gram of a text with few words; without any word, the hash of its bytes."""
    if hashed.size:
        return np.uint64(_ngram_hashes(hashed, hashed.size)[0])
    return np.uint64(int.from_bytes(hashlib.blake2b(lowered, digest_size=8).digest(), "little"))


def _ngram_hashes(hashed: Hashes, words: int) -> Hashes:
    """One hash for each n-gram of so many neighbouring words."""
    size = hashed.size - words + 1
    total = np.full(size, words, np.uint64)
    for index in range(words):
        total += hashed[index : index + size] * np.uint64((_BASE ** (index + 2)) % 2**64)
    return murmur_mix(total)


def _beyond_ascii(lowered: bytes, raw: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """`raw` with symbols beyond ASCII set to 0 too, and positions where a word begins without a separator."""
    given = np.frombuffer(lowered, np.uint8)
    leads = np.flatnonzero(given >= 0xC2)  # the first byte of each character
    lead, follows = given[leads], given[leads + 1]
    # U+2000-207F and U+3000-303F.
    symbols = (lead == 0xE2) & (follows <= 0x81) | (lead == 0xE3) & (follows == 0x80)
    two = leads[(lead == 0xC2) | symbols]  # U+0080-00BF: symbols and the no-break space
    raw = raw.copy()
    raw[two], raw[two + 1], raw[leads[symbols] + 2] = 0, 0, 0
    # East Asia; Thai and Lao.
    wide = (lead >= 0xE3) & (lead <= 0xED) | (lead == 0xE0) & (follows >= 0xB8) & (follows <= 0xBB)
    wide |= (lead == 0xE1) & ((follows == 0x9E) | (follows == 0x9F) | (follows <= 0x82))  # Khmer; Burmese
    pictures = leads[lead >= 0xF0]  # four bytes: emoji, rare ideographs
    alone = np.concatenate([leads[wide], leads[wide] + 3, pictures, pictures + 4])
    return raw, alone[alone < given.size]


@functools.lru_cache(maxsize=2)
def _powers(size: int) -> tuple[Hashes, Hashes]:
    """The powers of the base modulo 2^64, and their inverses."""

    def table(base: int) -> Hashes:
        factors = np.full(size, base % 2**64, np.uint64)
        factors[0] = 1
        return np.multiply.accumulate(factors)

    return table(_BASE), table(pow(_BASE, -1, 2**64))


def _blocks(raw: bytes) -> Iterator[bytes]:
    """Divide at spaces and line ends, near every BLOCK_BYTES."""
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

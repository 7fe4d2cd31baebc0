"""Text to ids and back: one class for every tokenizer, one file form for all of them.

Each tokenizer, a table of characters included, is a model of the `tokenizers` library and is kept as one `tokenizer.json`, so that
`transformers.AutoTokenizer` opens what we save and we open what the hub holds. Training, evaluation and serving use the same `encode`.

Names of special tokens in a text are text: a corpus or a prompt that says "<|endoftext|>" gets no end of text
from it, and comes back as it was. Who wants them parsed says `allow_special=True`.

Two shortcuts make bulk encoding fast; tests hold each to the library's answer. Characters go through a numpy
table, and where text is cut into words first, as byte-level BPE and WordPiece do, words that were seen before
are looked up (`fast_encoding.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import tokenizers

from llm_trainer.data.tokenization import tiktoken_import as tiktoken_encodings
from llm_trainer.data.tokenization import tokenizer_json as vocabularies
from llm_trainer.data.tokenization import vocab_training as vocabulary_training
from llm_trainer.data.tokenization.fast.bulk_encoder import FastEncoder, fast_encoder
from llm_trainer.errors import DataError, UsageError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

Kind: TypeAlias = Literal["bpe", "wordpiece", "char"]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_ROLES = ("eos_token", "bos_token", "pad_token", "unk_token")
_USUAL_ENDS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "[EOS]",
)  # of a bare tokenizer.json, which names no roles
_END_ROLES = {"eos_token": vocabularies.END_OF_TEXT, "bos_token": vocabularies.END_OF_TEXT}
_RANKS_SUFFIXES = (".tiktoken", ".bpe", ".model")
_HUB_FILES = [TOKENIZER_FILE, CONFIG_FILE, "special_tokens_map.json", "config.json"]


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special tokens' roles.

    `eos_id`, `bos_id` and `pad_id` are None where the tokenizer has no such token; `vocab_size` is the largest id plus one.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        roles: dict[str, str],
        saved_config: dict[str, Json] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._roles = {role: token for role, token in roles.items() if backend.token_to_id(token) is not None}
        self._saved_config = saved_config or {}
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError("the tokenizer has an empty vocabulary; train it on some text")
        self._tokens = vocabulary
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = self._id_of("eos_token")
        self.bos_id = self._id_of("bos_token")
        self.pad_id = self._id_of("pad_token")
        self.is_byte_level = '"ByteLevel"' in json.dumps(
            [self._parts["pre_tokenizer"], self._parts["decoder"]]
        )
        self.is_character_level = self._model_type == "WordLevel" and all(
            len(token) == 1 for token in self._plain_tokens
        )

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """Open a folder, a `tokenizer.json`, a file of tiktoken ranks, or a tokenizer on the Hugging Face hub
        by its name.

        Raises DataError where there is none, it is damaged, or the hub cannot be reached.
        """
        path = Path(source)
        if path.is_dir():
            return cls._from_files(path / TOKENIZER_FILE, path)
        if path.is_file():
            if path.suffix in _RANKS_SUFFIXES:
                return cls(tiktoken_encodings.encoding_from_file(path), _END_ROLES)
            return cls._from_files(path, path.parent)
        if path.suffix or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
            raise DataError(
                f"no tokenizer at {source}: give a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub"
            )
        return cls.load(vocabularies.download_from_hub(str(source), _HUB_FILES))

    @classmethod
    def _from_files(cls, file: Path, folder: Path) -> Tokenizer:
        if not file.is_file():
            raise DataError(
                f"{folder} holds no {TOKENIZER_FILE}; prepare the data again, or give the folder that holds the tokenizer"
            )
        backend = vocabularies.read_tokenizer_json(file)
        config = _read_object(folder / CONFIG_FILE)
        return cls(
            backend,
            _roles_from({**_read_object(folder / "special_tokens_map.json"), **config}, backend),
            config,
        )

    @classmethod
    def train(
        cls, kind: Kind, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
    ) -> Tokenizer:
        """A tokenizer of at most `vocab_size` ids learned from `texts`, which are read once.

        "bpe": byte-level BPE (`<|endoftext|>`, special tokens, 256 bytes, merges), from which every text
        comes back. "wordpiece": BERT's, with case; from it come back words, not white space, and `[UNK]` for
        words with characters that were not among the frequent ones or of more than 100. "char": one id a
        character, whatever `vocab_size`; the only special tokens are those given. Raises UsageError for a
        vocabulary that is too small, DataError where there is no text.
        """
        if kind == "char":
            return cls.from_characters(texts).with_special_tokens(special_tokens)
        train = (
            vocabulary_training.train_byte_level_bpe
            if kind == "bpe"
            else vocabulary_training.train_word_piece
        )
        backend = train(texts, vocab_size, special_tokens)
        return cls(
            backend, {**_END_ROLES, "unk_token": vocabularies.UNKNOWN} if kind == "wordpiece" else _END_ROLES
        )

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE without special tokens but the end of text."""
        return cls.train("bpe", texts, vocab_size)

    @classmethod
    def from_characters(cls, texts: Iterable[str]) -> Tokenizer:
        """One id a character, in the order of code points (as nanoGPT numbers them); no special tokens."""
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return cls.from_alphabet(sorted(alphabet))

    @classmethod
    def from_alphabet(cls, characters: Sequence[str]) -> Tokenizer:
        """One id a character: `characters[i]` is id i."""
        return cls(vocabularies.character_table(characters), {})

    @classmethod
    def tiktoken(cls, name: str, ranks: Path | None = None) -> Tokenizer:
        """One of tiktoken's encodings by name (gpt2, cl100k_base, o200k_base, …): downloaded by tiktoken, or
        from a local file of ranks.

        Raises UsageError for an unknown name, DataError without a network and for a file that is no
        vocabulary.
        """
        by_name, from_file = tiktoken_encodings.encoding_by_name, tiktoken_encodings.encoding_from_file
        return cls(by_name(name) if ranks is None else from_file(ranks, name), _END_ROLES)

    def with_special_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """The same tokenizer with these tokens too, numbered on from its vocabulary's end; those that it has
        keep their ids.
        """
        return self._with(tokens, special=True)

    def with_words(self, words: Sequence[str]) -> Tokenizer:
        """The same tokenizer with an id for each of these words, by which they are encoded wherever they
        stand in a text, also inside longer ones; a word that begins with a space is found with its space.
        Raises UsageError for one that is not byte-level BPE.
        """
        if not self.is_byte_level:
            raise UsageError(
                f"words can be added to a byte-level BPE tokenizer, not to one of the kind {self.kind}"
            )
        return self._with(words, special=False)

    def _with(self, tokens: Sequence[str], *, special: bool) -> Tokenizer:
        missing = [token for token in dict.fromkeys(tokens) if self.token_to_id(token) is None]
        if not missing:
            return self
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        backend.add_tokens(
            [tokenizers.AddedToken(token, special=special, normalized=False) for token in missing]
        )
        roles = self._roles or {role: vocabularies.END_OF_TEXT for role in _END_ROLES}
        return Tokenizer(backend, roles, self._saved_config)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`, with nothing added. `allow_special` parses names of special tokens.

        Raises DataError for characters that a character tokenizer lacks, naming them, and for lone
        surrogates.
        """
        if allow_special:
            _check_text(text)
            ids: list[int] = self._parsing_backend.encode(text, add_special_tokens=False).ids
            return ids
        plain: list[int] = self.encode_to_array(text).tolist()
        return plain

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; the same as `encode` of each."""
        return [ids.tolist() for ids in self.encode_to_arrays(texts)]

    def encode_to_array(self, text: str) -> np.ndarray:
        """Ids of `text` as int64 `(tokens,)`."""
        return self.encode_to_arrays([text])[0]

    def encode_to_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as int64 `(tokens,)`: the form that bulk work uses. Raises as `encode` does."""
        if self.is_character_level:
            return [self._encode_characters(text) for text in texts]
        for text in texts:
            _check_text(text)
        arrays: list[np.ndarray | None] = (
            [None] * len(texts) if self._fast is None else self._fast.encode(texts)
        )
        left = [index for index, ids in enumerate(arrays) if ids is None]
        for index, encoding in zip(
            left,
            self._backend.encode_batch_fast([texts[i] for i in left], add_special_tokens=False),
            strict=True,
        ):
            arrays[index] = np.array(encoding.ids, dtype=np.int64)
        return [ids for ids in arrays if ids is not None]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not utf-8 become U+FFFD. Raises DataError for an id outside the
        vocabulary.
        """
        wanted = [int(i) for i in ids]
        for i in wanted:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"id {i} is outside the tokenizer's vocabulary of {self.vocab_size}")
        text: str = self._backend.decode(wanted, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this id adds to the text: exact for byte-level and character tokenizers; none for
        special tokens.

        Raises DataError for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise DataError(f"id {token_id} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return self._bytes_by_id[token_id]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, such as "<|endoftext|>"; None where there is no
        such token.
        """
        return self._tokens.get(token)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over what decides ids and text: the parts of tokenizer.json in one canonical form, and
        which token ends a text.
        """
        parts: dict[str, Json] = {
            name: self._parts.get(name)
            for name in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")
        }
        canonical = json.dumps(
            [_without_nulls(parts), self.eos_id], sort_keys=True, ensure_ascii=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, so that `AutoTokenizer.from_pretrained(folder)`
        gives equal ids.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        config: dict[str, Json] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            **self._saved_config,
            **dict(self._roles),
        }
        (path / TOKENIZER_FILE).write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        (path / CONFIG_FILE).write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def to_json(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def _id_of(self, role: str) -> int | None:
        return self._tokens.get(self._roles[role]) if role in self._roles else None

    def _encode_characters(self, text: str) -> np.ndarray:
        points = np.frombuffer(_check_text(text).encode("utf-32-le"), dtype=np.uint32)
        table = self._id_by_character
        ids = table[np.minimum(points, len(table) - 1)]
        if len(ids) and ids.min() < 0:
            missing = sorted(set(text) - self._plain_tokens)
            raise DataError(
                f"the character tokenizer has no id for {', '.join(map(_describe, missing[:10]))}{' …' if len(missing) > 10 else ''}; "
                "leave them out, or prepare the data with text that holds them (or with --tokenizer_type bpe, which takes any text)"
            )
        return ids

    @cached_property
    def _id_by_character(self) -> np.ndarray:
        """int64 `(largest code point + 2,)`; -1 where there is no id, and always in the last place, where
        larger points land.
        """
        table = np.full(max(map(ord, self._plain_tokens)) + 2, -1, dtype=np.int64)
        for character in self._plain_tokens:
            table[ord(character)] = self._tokens[character]
        return table

    @property
    def kind(self) -> str:
        """What it is in a word: bpe, char, wordpiece, or the model's type in the tokenizers library, in small
        letters.
        """
        return "char" if self.is_character_level else self._model_type.lower()

    @property
    def _model_type(self) -> str:
        return str(self._parts["model"].get("type"))

    @cached_property
    def _plain_tokens(self) -> set[str]:
        """The vocabulary without added tokens."""
        return self._tokens.keys() - {
            token.content for token in self._backend.get_added_tokens_decoder().values()
        }

    @cached_property
    def _parts(self) -> dict[str, dict[str, Json]]:
        parts: dict[str, dict[str, Json]] = json.loads(self._backend.to_str())
        return parts

    @cached_property
    def _fast(self) -> FastEncoder | None:
        return fast_encoder(self._backend)

    @cached_property
    def _parsing_backend(self) -> tokenizers.Tokenizer:
        parsing = tokenizers.Tokenizer.from_str(self._backend.to_str())
        parsing.encode_special_tokens = False
        return parsing

    @cached_property
    def _bytes_by_id(self) -> list[bytes]:
        special = {
            token.content for token in self._backend.get_added_tokens_decoder().values() if token.special
        }
        plain = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        table = [b""] * self.vocab_size
        to_bytes = vocabularies.bytes_of_token(self.is_byte_level, json.dumps(self._parts["decoder"]))
        for token, token_id in self._tokens.items():
            if token not in special:
                table[token_id] = token.encode("utf-8") if token in plain else to_bytes(token)
        return table


def _check_text(text: str) -> str:
    """The text itself; raises DataError where it cannot be written as utf-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text is not valid Unicode at character {error.start} ({text[error.start]!a}, a lone surrogate); give utf-8 text"
            ) from None
    return text


def _describe(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


def _without_nulls(value: Json) -> Json:
    """The same without null members, so that a library that adds optional fields does not change the hash."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _read_object(file: Path) -> dict[str, Json]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} is not JSON ({error}); restore it, or remove it to use {TOKENIZER_FILE} alone"
        ) from None
    return found if isinstance(found, dict) else {}


def _roles_from(config: dict[str, Json], backend: tokenizers.Tokenizer) -> dict[str, str]:
    roles: dict[str, str] = {}
    for role in _ROLES:
        said = config.get(role)
        token = said.get("content") if isinstance(said, dict) else said
        if isinstance(token, str):
            roles[role] = token
    if "eos_token" not in roles:
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        found = [token for token in _USUAL_ENDS if token in special]
        if found:
            roles["eos_token"] = found[0]
    return roles

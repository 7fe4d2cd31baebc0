"""Encodes text to ids and decodes it: one class and one file format for every tokenizer.

Each tokenizer, a character tokenizer included, is a model of the `tokenizers` library and is saved as one
`tokenizer.json`. `transformers.AutoTokenizer` opens what this class saves, and it opens what is on the hub.
Training, evaluation and serving use the same `encode`.

The names of special tokens in a text are ordinary text: a corpus or a prompt that contains "<|endoftext|>"
gets no end-of-text token from it, and is decoded to what it was. `allow_special=True` parses them.

Some tokenizers begin every text with a token (Llama 2 and 3, Gemma): the post-processor of their
tokenizer.json adds it, and their models expect it. Prompts, documents and evaluated texts get these
`prefix_ids` once, through `begins`. Tokens that a post-processor adds at the end are left out: documents are
ended by the end-of-text token anyway, and a prompt is to be continued.

Two shortcuts make bulk encoding fast, and tests compare both with the library. Character tokenizers look ids
up in a numpy table. Byte-level BPE and WordPiece, which split text into words first, look up words that have
been encoded before (`fast/`); the environment variable LLM_TRAINER_FAST_TOKENIZER=0 switches this off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import tokenizers

from llm_trainer.config.environment import use_fast_tokenizer
from llm_trainer.data.tokenization import (
    chat_templates,
    slow_files,
    tiktoken_import,
    tokenizer_json,
    vocab_training,
)
from llm_trainer.data.tokenization.fast.bulk_encoder import BulkEncoder, build_bulk_encoder
from llm_trainer.errors import DataError, UsageError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

TokenizerKind: TypeAlias = Literal["bpe", "wordpiece", "char"]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_ROLES = ("eos_token", "bos_token", "pad_token", "unk_token")
# Names of the end-of-text token to look for in a tokenizer.json without a tokenizer_config.json.
_COMMON_EOS_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
_EOS_ROLES = {"eos_token": tokenizer_json.END_OF_TEXT, "bos_token": tokenizer_json.END_OF_TEXT}
_RANKS_SUFFIXES = (".tiktoken", ".bpe", ".model")
_HUB_FILES = [
    TOKENIZER_FILE,
    CONFIG_FILE,
    "special_tokens_map.json",
    "config.json",
    *slow_files.FILES,
    *chat_templates.PATTERNS,
]


class Tokenizer:
    """A `tokenizers.Tokenizer` with the roles of its special tokens.

    Attributes:
        vocab_size: The largest id plus one.
        eos_id: Id of the end-of-text token, or None.
        bos_id: Id of the beginning-of-text token, or None.
        pad_id: Id of the padding token, or None.
        prefix_ids: Ids that begin every text, such as that of the beginning-of-text token; empty for most
            tokenizers.
        chat_templates: File name → text of its chat templates. They are saved again and never executed.
        is_byte_level: The vocabulary is made of bytes, so every text can be encoded.
        is_character_level: Each id is one character.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        roles: dict[str, str],
        saved_config: dict[str, Json] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """Wrap a tokenizer of the library; `load`, `train` and `tiktoken` are the usual ways.

        Args:
            backend: The tokenizer.
            roles: Role (eos_token, bos_token, …) → special token.
            saved_config: The contents of its tokenizer_config.json, which `save` writes again.
            chat_templates: File name → text of its chat templates, which `save` writes again.

        Raises:
            DataError: The vocabulary is empty.
        """
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._roles = {role: token for role, token in roles.items() if backend.token_to_id(token) is not None}
        self._saved_config = saved_config or {}
        self.chat_templates = dict(chat_templates or {})
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError("the tokenizer has an empty vocabulary; train it on some text")
        self._tokens = vocabulary
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = self._id_of("eos_token")
        self.bos_id = self._id_of("bos_token")
        self.pad_id = self._id_of("pad_token")
        self.prefix_ids = tokenizer_json.prefix_ids(backend)
        self.is_byte_level = '"ByteLevel"' in json.dumps(
            [self._parts["pre_tokenizer"], self._parts["decoder"]]
        )
        self.is_character_level = self._model_type == "WordLevel" and all(
            len(token) == 1 for token in self._plain_tokens
        )

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """Load a tokenizer.

        Args:
            source: A folder, a `tokenizer.json`, a tiktoken vocabulary file, or a name on the Hugging Face
                hub.

        Raises:
            DataError: There is no such tokenizer, it is damaged, or the hub cannot be reached.
        """
        path = Path(source)
        if path.is_dir():
            return cls._from_files(path / TOKENIZER_FILE, path)
        if path.is_file():
            if path.suffix in _RANKS_SUFFIXES:
                return cls(tiktoken_import.load_encoding_file(path), _EOS_ROLES)
            return cls._from_files(path, path.parent)
        if path.suffix or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
            raise DataError(
                f"no tokenizer at {source}: give a tokenizer.json, a folder that has one,"
                " or a name on the Hugging Face hub"
            )
        return cls.load(tokenizer_json.download_from_hub(str(source), _HUB_FILES))

    @classmethod
    def _from_files(cls, file: Path, folder: Path) -> Tokenizer:
        config = _read_object(folder / CONFIG_FILE)
        names = {**_read_object(folder / "special_tokens_map.json"), **config}
        if file.is_file():
            backend = tokenizer_json.read_tokenizer_json(file)
        else:
            backend, defaults = slow_files.build_tokenizer(folder, names)
            names = {**defaults, **names}
        return cls(
            backend,
            _roles_from(names, backend),
            config,
            chat_templates.read_chat_templates(folder),
        )

    @classmethod
    def train(
        cls, kind: TokenizerKind, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
    ) -> Tokenizer:
        """Train a tokenizer.

        * "bpe": byte-level BPE (`<|endoftext|>`, special tokens, 256 bytes, merges). Decoding restores every
          text.
        * "wordpiece": BERT's, with case. Decoding restores words but not whitespace; words of more than 100
          characters or with characters that are not among the frequent ones become `[UNK]`.
        * "char": one id per character, whatever `vocab_size` is, and no special tokens except those given.

        Args:
            kind: One of these.
            texts: The training text, read once.
            vocab_size: Largest number of ids.
            special_tokens: Names that get an id of their own, besides the end of text.

        Raises:
            DataError: There is no text.
            UsageError: The vocabulary is too small.
        """
        if kind == "char":
            return cls.from_characters(texts).with_special_tokens(special_tokens)
        train = vocab_training.train_byte_level_bpe if kind == "bpe" else vocab_training.train_wordpiece
        backend = train(texts, vocab_size, special_tokens)
        return cls(
            backend,
            {**_EOS_ROLES, "unk_token": tokenizer_json.UNKNOWN} if kind == "wordpiece" else _EOS_ROLES,
        )

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE without special tokens except the end of text; raises as `train`."""
        return cls.train("bpe", texts, vocab_size)

    @classmethod
    def from_characters(cls, texts: Iterable[str]) -> Tokenizer:
        """Make a character tokenizer of all characters in `texts`, sorted by code point as in nanoGPT."""
        alphabet: set[str] = set()
        for text in texts:
            alphabet.update(text)
        return cls.from_alphabet(sorted(alphabet))

    @classmethod
    def from_alphabet(cls, characters: Sequence[str]) -> Tokenizer:
        """Make a character tokenizer in which `characters[i]` is id i."""
        return cls(tokenizer_json.character_tokenizer(characters), {})

    @classmethod
    def tiktoken(cls, name: str, ranks: Path | None = None) -> Tokenizer:
        """Load one of tiktoken's encodings.

        Args:
            name: gpt2, cl100k_base, o200k_base, …
            ranks: A local vocabulary file; by default tiktoken downloads it.

        Raises:
            DataError: The download failed, or the file is not a vocabulary.
            UsageError: The name is unknown.
        """
        by_name, from_file = tiktoken_import.load_encoding, tiktoken_import.load_encoding_file
        return cls(by_name(name) if ranks is None else from_file(ranks, name), _EOS_ROLES)

    def with_special_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """The same tokenizer with more special tokens; their ids follow the vocabulary, known ones stay."""
        return self._with(tokens, special=True)

    def with_added_tokens(self, words: Sequence[str]) -> Tokenizer:
        """The same tokenizer with an id for each of these words.

        A word gets its id wherever it occurs in a text, also inside a longer word. A word that begins with a
        space is found with its space.

        Raises:
            UsageError: The tokenizer is not byte-level BPE.
        """
        if not self.is_byte_level:
            raise UsageError(
                f"words can be added only to a byte-level BPE tokenizer, and this one is of type {self.kind};"
                " train one with tokenizer_type bpe"
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
        roles = self._roles or {role: tokenizer_json.END_OF_TEXT for role in _EOS_ROLES}
        return Tokenizer(backend, roles, self._saved_config, self.chat_templates)

    def with_chat_templates(self, templates: Mapping[str, str]) -> Tokenizer:
        """The same tokenizer with these chat templates, file name → text."""
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        return Tokenizer(backend, self._roles, self._saved_config, templates)

    def encode(self, text: str, *, allow_special: bool = False, begins: bool = False) -> list[int]:
        """Encode a text, without adding any special tokens except those of `begins`.

        Args:
            text: The text.
            allow_special: Names of special tokens in the text become these tokens.
            begins: Begin with `prefix_ids`, once: where the text itself begins with their names, these are
                replaced by the tokens.

        Raises:
            DataError: A character tokenizer lacks a character, or the text has a lone surrogate.
        """
        if allow_special:
            _check_text(text)
            rest = self.without_prefix(text) if begins else text
            ids: list[int] = self._parsing_backend.encode(rest, add_special_tokens=False).ids
            return [*self.prefix_ids, *ids] if begins else ids
        plain: list[int] = self.encode_to_arrays([text], [begins])[0].tolist()
        return plain

    def without_prefix(self, text: str) -> str:
        """The text without the names of `prefix_ids` that it begins with."""
        return text.removeprefix(self._prefix_text) if self.prefix_ids else text

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts; the ids equal those of `encode`, which also documents the errors."""
        return [ids.tolist() for ids in self.encode_to_arrays(texts)]

    def encode_to_array(self, text: str) -> np.ndarray:
        """Encode a text to int64 `(tokens,)`; raises as `encode`."""
        return self.encode_to_arrays([text])[0]

    def encode_to_arrays(
        self, texts: Sequence[str], begins: Sequence[bool] | None = None
    ) -> list[np.ndarray]:
        """Encode several texts to int64 `(tokens,)` each, the fastest way for bulk; raises as `encode`.

        Args:
            texts: The texts.
            begins: For each text, whether it begins with `prefix_ids`; none does by default.
        """
        if begins is None or not self.prefix_ids:
            return self._encode_plain(texts)
        rests = [
            self.without_prefix(text) if is_begin else text
            for text, is_begin in zip(texts, begins, strict=True)
        ]
        prefix = np.array(self.prefix_ids, dtype=np.int64)
        return [
            np.concatenate([prefix, ids]) if is_begin else ids
            for ids, is_begin in zip(self._encode_plain(rests), begins, strict=True)
        ]

    def _encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.is_character_level:
            return [self._encode_characters(text) for text in texts]
        for text in texts:
            _check_text(text)
        arrays: list[np.ndarray | None] = (
            [None] * len(texts) if self._bulk_encoder is None else self._bulk_encoder.encode(texts)
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
        """Decode ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: The ids.
            skip_special_tokens: Leave out special tokens.

        Raises:
            DataError: An id is outside the vocabulary.
        """
        wanted = [int(i) for i in ids]
        for i in wanted:
            if not 0 <= i < self.vocab_size:
                raise DataError(f"id {i} is outside the tokenizer's vocabulary of {self.vocab_size}")
        text: str = self._backend.decode(wanted, skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that an id adds to a text.

        They are exact for byte-level and character tokenizers, and empty for special tokens.

        Raises:
            DataError: The id is outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise DataError(f"id {token_id} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return self._bytes_by_id[token_id]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, such as "<|endoftext|>"; None if there is none."""
        return self._tokens.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The name of an id in the vocabulary; None if there is none."""
        name: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return name

    @property
    def plain_vocab_size(self) -> int:
        """The largest id plus one without added tokens, which a model's embedding may lack."""
        return max((self._tokens[token] for token in self._plain_tokens), default=-1) + 1

    @cached_property
    def hash(self) -> str:
        """sha256 in hex over everything that decides ids and text.

        It covers the parts of tokenizer.json in a canonical format, the id that ends a text, and the ids that
        begin it where there are any.
        """
        parts: dict[str, Json] = {
            name: self._parts.get(name)
            for name in ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")
        }
        canonical = json.dumps(
            [_without_nulls(parts), self.eos_id, *([list(self.prefix_ids)] if self.prefix_ids else [])],
            sort_keys=True,
            ensure_ascii=True,
            separators=(",", ":"),
        )
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and the chat templates into a folder.

        `transformers.AutoTokenizer.from_pretrained(folder)` then gives the same ids.
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
        chat_templates.write_chat_templates(path, self.chat_templates)

    @property
    def has_chat_template(self) -> bool:
        """Whether it brings a chat template, in a file of its own or in its tokenizer_config.json."""
        return bool(self.chat_templates or self._saved_config.get("chat_template"))

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
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
                f"the character tokenizer has no id for {', '.join(map(_describe, missing[:10]))}"
                f"{' …' if len(missing) > 10 else ''}; remove them from the text, or prepare the data with"
                " text that contains them (or with --tokenizer_type bpe, which can encode any text)"
            )
        return ids

    @cached_property
    def _prefix_text(self) -> str:
        """The names of `prefix_ids` in a row."""
        return "".join(str(self._backend.id_to_token(token)) for token in self.prefix_ids)

    @cached_property
    def _id_by_character(self) -> np.ndarray:
        """Id of each code point, int64 `(largest code point + 2,)`.

        It is -1 for characters without an id, and in the last entry, which all larger code points use.
        """
        table = np.full(max(map(ord, self._plain_tokens)) + 2, -1, dtype=np.int64)
        for character in self._plain_tokens:
            table[ord(character)] = self._tokens[character]
        return table

    @property
    def kind(self) -> str:
        """The type: bpe, char, wordpiece, or the model's type in the tokenizers library, in lower case."""
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
    def _bulk_encoder(self) -> BulkEncoder | None:
        return build_bulk_encoder(self._backend) if use_fast_tokenizer() else None

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
        to_bytes = tokenizer_json.token_bytes_converter(
            self.is_byte_level, json.dumps(self._parts["decoder"])
        )
        for token, token_id in self._tokens.items():
            if token not in special:
                table[token_id] = token.encode("utf-8") if token in plain else to_bytes(token)
        return table


def _check_text(text: str) -> str:
    """The text itself; raises DataError if it cannot be written as UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text is not valid Unicode at character {error.start}"
                f" ({text[error.start]!a}, a lone surrogate); give UTF-8 text"
            ) from None
    return text


def _describe(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


def _without_nulls(value: Json) -> Json:
    """The same without null members: optional fields of new library versions do not change the hash."""
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
        entry = config.get(role)
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str):
            roles[role] = token
    if "eos_token" not in roles:
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        found = [token for token in _COMMON_EOS_TOKENS if token in special]
        if found:
            roles["eos_token"] = found[0]
    return roles

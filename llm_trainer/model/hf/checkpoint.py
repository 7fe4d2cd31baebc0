"""Models on disk and on the hub, in Hugging Face's own form: config.json and model.safetensors, sharded when
large.

`transformers` opens what is saved here, and what it saved is loaded here; neither way needs transformers itself. Weights come from
safetensors only: a pickle can run code, so a folder that holds nothing else is refused, and code that a config.json points to is never
looked at. Loading is strict: each tensor is found, used and of the right shape, or the error names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_trainer.config.schema.model import ModelConfig
from llm_trainer.errors import CheckpointError
from llm_trainer.model.adapters.nf4 import dequantized
from llm_trainer.model.hf.config import OWN_SECTION, config_from_huggingface, config_to_huggingface, family_of
from llm_trainer.model.hf.weight_map import IGNORED_ENDINGS, Entry, entries
from llm_trainer.model.module_names import unwrapped
from llm_trainer.model.transformer import Transformer

__all__ = [
    "config_from_huggingface",
    "config_to_huggingface",
    "empty_model",
    "load_pretrained",
    "load_weights",
    "read_config",
    "save_pretrained",
]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MODEL_FILES = ("*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model")
MAX_SHARD_BYTES = 5_000_000_000
SHORT_NAMES = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "distilgpt2": "distilbert/distilgpt2",
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WAY_OUT_OF_PICKLE = (
    "a pickle can run any code when it is opened. Take a revision with model.safetensors, or convert it once where you trust it: "
    "transformers' AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes safetensors"
)


def save_pretrained(
    model: nn.Module,
    folder: Path | str,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the weights, in the type that they have, into `folder`, which is made if need be.

    A compiled or parallel wrapper is taken off first. The ids of the special tokens go into config.json,
    where transformers looks for the one that ends a text. With a saved tokenizer beside it the folder is
    complete.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    layout = weight_layout(model, max_shard_bytes=max_shard_bytes)
    parameters = named_weights(model)
    for name, text in description_files(model, layout, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id).items():
        (place / name).write_text(text, encoding="utf-8")
    for name in layout.files:
        write_weights(place / name, layout.files[name], parameters)


@dataclass(frozen=True)
class WeightLayout:
    """Which tensors lie in which file of a model folder; `part_of` says whose part each file is, where
    several write one folder.
    """

    files: Mapping[str, Sequence[Entry]]
    part_of: Mapping[str, int]
    total_bytes: int


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights as the model holds them, a tied matrix once, without the wrappers of compilation; what is
    in four bits as that.
    """
    return {name: parameter.detach() for name, parameter in unwrapped(model).named_parameters()}


def weight_layout(
    model: nn.Module,
    *,
    parts: int = 1,
    writers: Mapping[str, Sequence[int]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> WeightLayout:
    """Files for the model's weights, in `parts` of about equal size, none above `max_shard_bytes` unless a
    tensor alone is.

    `writers`: by parameter, which parts may have it (the same for those that lie in one tensor of a file); none: any.
    """
    parameters = named_weights(model)
    table = entries(parameters, family_of(unwrapped(model).config) or OWN_SECTION)
    shards = [
        (part, shard)
        for part, of_part in _by_part(table, parameters, parts, writers)
        for shard in _into_shards(of_part, parameters, max_shard_bytes)
    ]
    names = (
        [WEIGHTS_NAME]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    files = {name: shard for name, (_, shard) in zip(names, shards, strict=True)}
    part_of = {name: part for name, (part, _) in zip(names, shards, strict=True)}
    return WeightLayout(files, part_of, sum(tensor.nbytes for tensor in parameters.values()))


def description_files(
    model: nn.Module,
    layout: WeightLayout,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> dict[str, str]:
    """Name → text of what a model folder holds beside its weights: config.json, and an index where there are
    several files.
    """
    plain = unwrapped(model)
    content = config_to_huggingface(plain.config)
    content |= {"dtype": str(plain.wte.weight.dtype).removeprefix("torch.")}
    content |= {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    texts = {"config.json": json.dumps(content, indent=2) + "\n"}
    if len(layout.files) > 1:
        weight_map = {entry.theirs: name for name, shard in layout.files.items() for entry in shard}
        texts[INDEX_NAME] = (
            json.dumps({"metadata": {"total_size": layout.total_bytes}, "weight_map": weight_map}, indent=2)
            + "\n"
        )
    return texts


def write_weights(path: Path, shard: Sequence[Entry], parameters: Mapping[str, Tensor]) -> None:
    """One file of a layout; `parameters` hold at least what it wants, whole. What is in four bits is written
    as floats, and is made such one tensor at a time: the device need not hold them all.
    """

    def joined(entry: Entry) -> Tensor:
        return entry.join({name: dequantized(parameters[name]) for name in entry.ours}).cpu()

    save_file({entry.theirs: joined(entry) for entry in shard}, path, metadata={"format": "pt"})


def _by_part(
    table: Sequence[Entry],
    parameters: Mapping[str, Tensor],
    parts: int,
    writers: Mapping[str, Sequence[int]] | None,
) -> Iterator[tuple[int, list[Entry]]]:
    """Each part and its tensors; a part comes once for each group of parts that share tensors among them."""
    if writers is None:
        yield from enumerate(_in_parts(table, parameters, parts))
        return
    groups: dict[tuple[int, ...], list[Entry]] = {}
    for entry in table:
        groups.setdefault(tuple(writers[entry.ours[0]]), []).append(entry)
    for group, shared in groups.items():
        yield from zip(group, _in_parts(shared, parameters, len(group)), strict=True)


def _in_parts(table: Sequence[Entry], parameters: Mapping[str, Tensor], parts: int) -> list[list[Entry]]:
    """Consecutive tensors in `parts` groups of about equal size; some may be empty."""
    sizes = [sum(parameters[name].nbytes for name in entry.ours) for entry in table]
    groups: list[list[Entry]] = [[] for _ in range(parts)]
    before, total = 0, max(1, sum(sizes))
    for entry, size in zip(table, sizes, strict=True):
        groups[min(parts - 1, (before + size // 2) * parts // total)].append(entry)
        before += size
    return groups


def _into_shards(table: Sequence[Entry], parameters: Mapping[str, Tensor], limit: int) -> list[list[Entry]]:
    """Consecutive tensors of at most `limit` bytes a file; a larger tensor gets a file of its own."""
    shards: list[list[Entry]] = []
    filled = 0
    for entry in table:
        size = sum(parameters[name].nbytes for name in entry.ours)
        if not shards or (shards[-1] and filled + size > limit):
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def load_pretrained(
    source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """A model from a folder (or the model.safetensors in it) or by its name on the hub, in evaluation mode.

    dtype: type of the weights; none: fp32, which training wants whatever the file holds. Raises
    CheckpointError where the folder is missing, damaged, of an unknown kind, or its tensors are not exactly
    those that its config.json calls for.
    """
    folder = _folder_of(source)
    config = read_config(folder)
    with torch.device("meta"):
        _tensors_for(
            Transformer(config), folder
        )  # a config.json that promises too much must not have its memory allocated
    model = empty_model(config, device, dtype or torch.float32)
    load_weights(model, folder)
    return model.eval()


def read_config(folder: Path) -> ModelConfig:
    """The configuration in a folder's config.json."""
    return config_from_huggingface(_read_json(folder / "config.json"))


def empty_model(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """A model whose weights are allocated and not yet filled.

    (`Module.to_empty` does the same, and imports sympy for it: half a second of a program's start.)
    """
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device=device, dtype=dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, device=device, dtype=dtype))
    model.tie_weights()
    if model.rotary is not None:
        model.rotary.reset()
    return model


@torch.no_grad()
def load_weights(
    model: nn.Module, folder: Path | str, fill: Callable[[nn.Parameter, Tensor], object] = nn.Parameter.copy_
) -> None:
    """Fill a model from a folder's safetensors, one tensor at a time, keeping the model's device and type.

    `fill` puts a whole tensor into a parameter; another one may keep a part of it.

    Raises CheckpointError naming what is missing, unexpected or misshapen, before anything is changed.
    """
    plain, place = unwrapped(model), Path(folder)
    parameters = dict(plain.named_parameters())
    table = _tensors_for(plain, place)
    with _reading(place):
        for file in sorted({stored.file for stored, _ in table}):
            with safe_open(file, framework="pt") as tensors:
                for stored, entry in table:
                    if stored.file == file:
                        for name, tensor in entry.split(tensors.get_tensor(stored.name)).items():
                            fill(parameters[name], tensor)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    file: Path
    shape: tuple[int, ...]


def _tensors_for(model: Transformer, folder: Path) -> list[tuple[Stored, Entry]]:
    """What the folder holds for each of the model's parameters; raises CheckpointError where it is not
    exactly that.
    """
    family = str(_read_json(folder / "config.json").get("model_type"))
    table = {entry.theirs: entry for entry in entries((name for name, _ in model.named_parameters()), family)}
    with _reading(folder):
        found = {_their_name(stored.name, table): stored for stored in _tensors_in(folder)}
        if model.config.tie_word_embeddings and found.keys() - table.keys() == {"lm_head.weight"}:
            _check_tied_head(folder, found)
            del found["lm_head.weight"]
    missing = sorted(table.keys() - found.keys())
    unexpected = sorted(found[name].name for name in found.keys() - table.keys())
    if missing or unexpected:
        problems = [
            f"{word}: {_some(names)}"
            for word, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise CheckpointError(
            f"the tensors in {folder} are not those of its config.json; {'; '.join(problems)}"
        )
    shape_of = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, entry in table.items():
        shape, wanted = found[name].shape, entry.shape(shape_of)
        if shape != wanted:
            raise CheckpointError(
                f"{found[name].name} in {folder} has shape {shape}, where its config.json calls for {wanted}"
            )
    return [(found[name], entry) for name, entry in table.items()]


def _their_name(stored: str, table: Mapping[str, Entry]) -> str:
    """GPT-2's first files, and models saved without their head, leave out the `transformer.` or `model.` in
    front.
    """
    return next(
        (name for name in (stored, f"transformer.{stored}", f"model.{stored}") if name in table), stored
    )


def _tensors_in(folder: Path) -> Iterator[Stored]:
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if not name.endswith(IGNORED_ENDINGS):
                    yield Stored(name, file, tuple(tensors.get_slice(name).get_shape()))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds weights as a pickle only ({', '.join(pickles)}), which is not opened: {_WAY_OUT_OF_PICKLE}"
            )
        raise CheckpointError(
            f"{folder} has no {WEIGHTS_NAME} and no {INDEX_NAME}; it is not a model folder, or its weights are missing"
        )
    weight_map = _read_json(folder / INDEX_NAME).get("weight_map")
    values = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not values or any(not isinstance(name, str) or not name or Path(name).name != name for name in values):
        raise CheckpointError(
            f"{folder / INDEX_NAME} does not name the files of this folder that hold the weights"
        )
    names = sorted(set(values))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {_some(missing)}, which {INDEX_NAME} names; copy the whole folder"
        )
    return [folder / name for name in names]


def _check_tied_head(folder: Path, found: Mapping[str, Stored]) -> None:
    """A head saved beside the embedding that it is tied to must be that embedding."""
    embedding = next(
        stored for name, stored in found.items() if name.endswith(("wte.weight", "embed_tokens.weight"))
    )
    if not torch.equal(_read_tensor(found["lm_head.weight"]), _read_tensor(embedding)):
        raise CheckpointError(
            f"{folder} says tie_word_embeddings but its lm_head.weight differs from {embedding.name}; set it to false in config.json"
        )


def _read_tensor(stored: Stored) -> Tensor:
    with safe_open(stored.file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(stored.name)
        return tensor


def _some(names: list[str]) -> str:
    """At most five of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn a damaged safetensors file into an error that says what to do."""
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"the weights in {folder} are damaged ({error}); take another checkpoint, or fetch the file again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; a model folder holds config.json and {WEIGHTS_NAME}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _folder_of(source: str | Path) -> Path:
    """The folder that `source` means, fetched from the hub where it is a name there."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".safetensors":
        return path.parent
    if path.is_file():
        raise CheckpointError(
            f"{path} is not a model folder, and it is not opened as weights: {_WAY_OUT_OF_PICKLE}"
        )
    name = SHORT_NAMES.get(str(source), str(source))
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CheckpointError(
            f"{name} does not exist; give a model folder, or a name on the Hugging Face hub (gpt2, or owner/name)"
        )
    return fetch_from_hub(name)


def fetch_from_hub(name: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """The local snapshot of these `files` of a hub repository (configuration, safetensors, tokenizer);
    nothing else is downloaded.

    huggingface_hub shows progress, resumes, checks hashes and keeps the files for the next time.
    """
    from huggingface_hub import snapshot_download  # slow to import
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # HTTPError is its client's, whose name changed

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except (OSError, HTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name!r} is no folder here, and it could not be fetched from the Hugging Face hub: {reason} "
            "Check the name and the connection (private models: HF_TOKEN), or download the model elsewhere and give its folder"
        ) from error

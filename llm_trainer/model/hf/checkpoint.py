"""Models on disk and on the hub, in Hugging Face's own format: config.json and model.safetensors, sharded
when large.

`transformers` opens what is saved here, and what it saved is loaded here; neither direction needs
transformers. Weights are read from safetensors only. A pickle can run code, so a folder that has nothing else
is refused, and code that a config.json points to is never looked at. Loading is strict: each tensor is found,
used and of the right shape, or the error names it.
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
from llm_trainer.model.adapters.nf4 import dequantize
from llm_trainer.model.base import TransformerBase
from llm_trainer.model.hf.config import OWN_SECTION, config_from_huggingface, config_to_huggingface, hf_family
from llm_trainer.model.hf.generation_config import GENERATION_FILE, GenerationDefaults
from llm_trainer.model.hf.weight_map import IGNORED_ENDINGS, TensorMapping, tensor_mappings
from llm_trainer.model.module_names import unwrap_model
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
MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model")
MAX_SHARD_BYTES = 5_000_000_000
SHORT_NAMES = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "distilgpt2": "distilbert/distilgpt2",
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_INSTEAD_OF_PICKLE = (
    "a pickle can run any code when it is opened. Take a revision with model.safetensors, or convert it once "
    "where you trust it: transformers' AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes "
    "safetensors"
)


def save_pretrained(
    model: nn.Module,
    folder: Path | str,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    generation: GenerationDefaults | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the weights, in the type that they have, into a folder.

    The ids of the special tokens go into config.json, where transformers looks for the one that ends a text.
    Together with a saved tokenizer the folder is complete.

    Args:
        model: A transformer; a compiled or parallel wrapper is taken off first.
        folder: Where to write; it is created if it does not exist.
        bos_id: Id of the token that begins a text.
        eos_id: Id of the token that ends a text.
        pad_id: Id of the padding token.
        generation: What the base model says about generation, which is written again.
        max_shard_bytes: Largest size of one weight file, in bytes.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    layout = weight_layout(model, max_shard_bytes=max_shard_bytes)
    parameters = named_weights(model)
    texts = metadata_files(model, layout, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, generation=generation)
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")
    for name in layout.files:
        write_weights(target / name, layout.files[name], parameters)


@dataclass(frozen=True)
class WeightLayout:
    """Which tensors are in which file of a model folder.

    `writer_of` gives the number of the writer of each file, where several ranks write one folder.
    """

    files: Mapping[str, Sequence[TensorMapping]]
    writer_of: Mapping[str, int]
    total_bytes: int


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights as the model has them: a tied matrix once, quantized matrices as quantized tensors."""
    return {name: parameter.detach() for name, parameter in unwrap_model(model).named_parameters()}


def weight_layout(
    model: nn.Module,
    *,
    num_writers: int = 1,
    writers: Mapping[str, Sequence[int]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> WeightLayout:
    """Distribute the model's weights over files.

    Args:
        model: A transformer, wrapped or not.
        num_writers: How many ranks write; each gets about the same number of bytes.
        writers: Parameter → the writers that may have it, the same for parameters of one tensor of a file.
            None: any.
        max_shard_bytes: Largest size of a file, in bytes, unless a single tensor is larger.

    Returns:
        The files and their writers.
    """
    parameters = named_weights(model)
    table = tensor_mappings(parameters, hf_family(unwrap_model(model).config) or OWN_SECTION)
    shards = [
        (writer, shard)
        for writer, mappings in _by_writer(table, parameters, num_writers, writers)
        for shard in _into_shards(mappings, parameters, max_shard_bytes)
    ]
    names = (
        [WEIGHTS_NAME]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    files = {name: shard for name, (_, shard) in zip(names, shards, strict=True)}
    writer_of = {name: writer for name, (writer, _) in zip(names, shards, strict=True)}
    return WeightLayout(files, writer_of, sum(tensor.nbytes for tensor in parameters.values()))


def metadata_files(
    model: nn.Module,
    layout: WeightLayout,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    generation: GenerationDefaults | None = None,
) -> dict[str, str]:
    """The files of a model folder other than its weights: config.json, generation_config.json where the base
    model had one, and an index where there are several shards.

    Args:
        model: A transformer, wrapped or not.
        layout: The files of its weights.
        bos_id: Id of the token that begins a text.
        eos_id: Id of the token that ends a text.
        pad_id: Id of the padding token.
        generation: What the base model says about generation.

    Returns:
        File name → text.
    """
    plain = unwrap_model(model)
    content = config_to_huggingface(plain.config)
    content |= {"dtype": str(plain.wte.weight.dtype).removeprefix("torch.")}
    carried = generation or GenerationDefaults()
    content |= carried.merged_ids(bos_id, eos_id, pad_id)
    texts = {"config.json": json.dumps(content, indent=2) + "\n"}
    if carried.text is not None:
        texts[GENERATION_FILE] = carried.text
    if len(layout.files) > 1:
        weight_map = {mapping.hf_name: name for name, shard in layout.files.items() for mapping in shard}
        index = {"metadata": {"total_size": layout.total_bytes}, "weight_map": weight_map}
        texts[INDEX_NAME] = json.dumps(index, indent=2) + "\n"
    return texts


def write_weights(path: Path, shard: Sequence[TensorMapping], parameters: Mapping[str, Tensor]) -> None:
    """Write one weight file of a layout.

    Quantized tensors are written as floats, dequantized one at a time, so that the device need not hold them
    all.

    Args:
        path: The file.
        shard: Its tensors.
        parameters: At least the parameters of these tensors, by name, unsharded.
    """

    def stored(mapping: TensorMapping) -> Tensor:
        return mapping.to_hf({name: dequantize(parameters[name]) for name in mapping.names}).cpu()

    save_file({mapping.hf_name: stored(mapping) for mapping in shard}, path, metadata={"format": "pt"})


def _by_writer(
    table: Sequence[TensorMapping],
    parameters: Mapping[str, Tensor],
    num_writers: int,
    writers: Mapping[str, Sequence[int]] | None,
) -> Iterator[tuple[int, list[TensorMapping]]]:
    """Each writer and its tensors; a writer comes once for each group of writers that it is in."""
    if writers is None:
        yield from enumerate(_in_groups(table, parameters, num_writers))
        return
    groups: dict[tuple[int, ...], list[TensorMapping]] = {}
    for mapping in table:
        groups.setdefault(tuple(writers[mapping.names[0]]), []).append(mapping)
    for group, mappings in groups.items():
        yield from zip(group, _in_groups(mappings, parameters, len(group)), strict=True)


def _in_groups(
    table: Sequence[TensorMapping], parameters: Mapping[str, Tensor], count: int
) -> list[list[TensorMapping]]:
    """Consecutive tensors in `count` groups of about equal size; some may be empty."""
    sizes = [sum(parameters[name].nbytes for name in mapping.names) for mapping in table]
    groups: list[list[TensorMapping]] = [[] for _ in range(count)]
    before, total = 0, max(1, sum(sizes))
    for mapping, size in zip(table, sizes, strict=True):
        groups[min(count - 1, (before + size // 2) * count // total)].append(mapping)
        before += size
    return groups


def _into_shards(
    table: Sequence[TensorMapping], parameters: Mapping[str, Tensor], limit: int
) -> list[list[TensorMapping]]:
    """Consecutive tensors of at most `limit` bytes per file; a larger tensor gets a file of its own."""
    shards: list[list[TensorMapping]] = []
    filled = 0
    for mapping in table:
        size = sum(parameters[name].nbytes for name in mapping.names)
        if not shards or (shards[-1] and filled + size > limit):
            shards.append([])
            filled = 0
        shards[-1].append(mapping)
        filled += size
    return shards


def load_pretrained(
    source: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Load a model, in evaluation mode.

    Args:
        source: A model folder, the model.safetensors in it, or a name on the hub.
        device: Where the weights go.
        dtype: Type of the weights. None: fp32, which training wants whatever the file has.

    Returns:
        The model.

    Raises:
        CheckpointError: The folder is missing, damaged or of an unknown kind, or its tensors are not exactly
            those that its config.json describes.
    """
    folder = _folder_of(source)
    config = read_config(folder)
    # Before memory is allocated: a config.json that describes too much must not have its memory allocated.
    with torch.device("meta"):
        _tensors_for(Transformer(config), folder)
    model = empty_model(config, device, dtype or torch.float32)
    load_weights(model, folder)
    return model.eval()


def read_config(folder: Path) -> ModelConfig:
    """The configuration in a folder's config.json.

    Raises:
        CheckpointError: The file is missing, damaged or describes a model that is not supported.
    """
    return config_from_huggingface(_read_json(folder / "config.json"))


def empty_model(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """A model whose weights are allocated but not filled.

    (`Module.to_empty` does the same, and imports sympy for it: half a second of a program's start.)

    Args:
        config: The model's shape.
        device: Where the weights are allocated.
        dtype: Their type.

    Returns:
        The model, in training mode.
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

    Args:
        model: A transformer, wrapped or not.
        folder: A model folder.
        fill: Puts an unsharded tensor into a parameter; another function may keep a shard of it.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape. Nothing is changed then.
    """
    plain, source = unwrap_model(model), Path(folder)
    parameters = dict(plain.named_parameters())
    table = _tensors_for(plain, source)
    with _reading(source):
        for file in sorted({stored.file for stored, _ in table}):
            with safe_open(file, framework="pt") as tensors:
                for stored, mapping in table:
                    if stored.file == file:
                        for name, tensor in mapping.from_hf(tensors.get_tensor(stored.name)).items():
                            fill(parameters[name], tensor)


# Types of numbers that a weight may be stored as, as safetensors names them.
_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor in a file."""

    name: str
    file: Path
    shape: tuple[int, ...]


def _tensors_for(model: TransformerBase, folder: Path) -> list[tuple[_StoredTensor, TensorMapping]]:
    """The folder's tensor for each of the model's parameters.

    Raises CheckpointError where they do not match.
    """
    family = str(_read_json(folder / "config.json").get("model_type"))
    names = (name for name, _ in model.named_parameters())
    table = {mapping.hf_name: mapping for mapping in tensor_mappings(names, family)}
    with _reading(folder):
        found = {_full_name(stored.name, table): stored for stored in _tensors_in(folder)}
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
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, mapping in table.items():
        shape, wanted = found[name].shape, mapping.hf_shape(shapes)
        if shape != wanted:
            raise CheckpointError(
                f"{found[name].name} in {folder} has shape {shape}, but its config.json needs {wanted}"
            )
    return [(found[name], mapping) for name, mapping in table.items()]


def _full_name(stored: str, table: Mapping[str, TensorMapping]) -> str:
    """A tensor's name with its prefix: GPT-2's first files, and models saved without their head, leave out
    the `transformer.` or `model.` in front.
    """
    return next(
        (name for name in (stored, f"transformer.{stored}", f"model.{stored}") if name in table), stored
    )


def _tensors_in(folder: Path) -> Iterator[_StoredTensor]:
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name.endswith(IGNORED_ENDINGS):
                    continue
                stored = tensors.get_slice(name)
                if stored.get_dtype() not in _WEIGHT_DTYPES:
                    raise CheckpointError(
                        f"{name} in {file} is stored as {stored.get_dtype()}; weights must be one of "
                        f"{', '.join(_WEIGHT_DTYPES)}, and quantised models are not supported"
                    )
                yield _StoredTensor(name, file, tuple(stored.get_shape()))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} has its weights as a pickle only ({', '.join(pickles)}), which is not opened: "
                f"{_INSTEAD_OF_PICKLE}"
            )
        raise CheckpointError(
            f"{folder} has no {WEIGHTS_NAME} and no {INDEX_NAME}; it is not a model folder, or its weights "
            "are missing"
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
            f"{folder} lacks {_some(missing)}, which {INDEX_NAME} names; copy the complete folder"
        )
    return [folder / name for name in names]


def _check_tied_head(folder: Path, found: Mapping[str, _StoredTensor]) -> None:
    """A head that is saved although it is tied to the embedding must be equal to it."""
    embedding = next(
        stored for name, stored in found.items() if name.endswith(("wte.weight", "embed_tokens.weight"))
    )
    if not torch.equal(_read_tensor(found["lm_head.weight"]), _read_tensor(embedding)):
        raise CheckpointError(
            f"{folder} has tie_word_embeddings, but its lm_head.weight differs from {embedding.name}; "
            "set tie_word_embeddings to false in config.json"
        )


def _read_tensor(stored: _StoredTensor) -> Tensor:
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
            f"the weights in {folder} are damaged ({error}); take another checkpoint, or download "
            "the file again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"the weights in {folder} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; a model folder has config.json and {WEIGHTS_NAME}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _folder_of(source: str | Path) -> Path:
    """The folder that `source` means, downloaded from the hub where it is a name there."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".safetensors":
        return path.parent
    if path.is_file():
        raise CheckpointError(
            f"{path} is not a model folder, and it is not opened as weights: {_INSTEAD_OF_PICKLE}"
        )
    name = SHORT_NAMES.get(str(source), str(source))
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CheckpointError(
            f"{name} does not exist; give a model folder, or a name on the Hugging Face hub (gpt2, or "
            "owner/name)"
        )
    return download_from_hub(name)


def download_from_hub(name: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """Download files of a hub repository, and nothing else of it.

    huggingface_hub shows progress, resumes, checks hashes and keeps the files for the next time.

    Args:
        name: The repository, `owner/name`.
        files: Patterns of the files: configuration, safetensors, tokenizer.

    Returns:
        The folder of the local snapshot.

    Raises:
        CheckpointError: The repository does not exist, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download  # slow to import

    # HTTPError is that of huggingface_hub's HTTP client, which is another one in some releases.
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except (OSError, HTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name!r} is not a local folder, and it could not be downloaded from the Hugging Face hub: "
            f"{reason} Check the name and the connection (private models: HF_TOKEN), or download the model "
            "elsewhere and give its folder"
        ) from error

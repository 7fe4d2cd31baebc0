"""The datasets that `scripts/download_datasets.py` knows: public corpora of plain text.

An entry gives the address and the licence of a dataset's files. It names files on the Hugging Face hub by
pattern (their sizes and sha256 are then queried from the hub), or by url. Entries with `is_small` are
downloaded when the user names none. Datasets for single domains are listed in
`config/schema/domain_loaders.yaml`.
"""

from __future__ import annotations

import fnmatch
import shlex
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

from llm_trainer.data.catalog.http_download import NoConnectionError, RemoteFile
from llm_trainer.errors import DataError, UsageError


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset.

    Attributes:
        about: What it is, in a line.
        gigabytes: The approximate size of the download.
        licence: The licence of the texts.
        page: The address of the page about it.
        verified: Where its name, files and column were looked up (November 2026).
        text_column: The column that has the text.
        hub: Its name on the Hugging Face hub, if it is there.
        revision: The branch, tag or commit on the hub.
        patterns: Which of its files on the hub to download.
        urls: Its files, if it is not on the hub.
        members: Patterns for the files of an archive that are text.
        is_small: Whether it is downloaded when the user names none.
    """

    about: str
    gigabytes: float
    licence: str
    page: str
    verified: str
    text_column: str = "text"
    hub: str | None = None
    revision: str = "main"
    patterns: tuple[str, ...] = ()
    urls: tuple[RemoteFile, ...] = ()
    members: tuple[str, ...] = ()
    is_small: bool = False


_HUB = "https://huggingface.co/datasets/"


def _on_hub(
    name: str,
    patterns: str,
    about: str,
    gigabytes: float,
    licence: str,
    verified: str,
    text_column: str = "text",
    **more: object,
) -> DatasetEntry:
    facts: dict[str, object] = {
        "hub": name,
        "patterns": (patterns,),
        "page": _HUB + name,
        "text_column": text_column,
        **more,
    }
    return DatasetEntry(about, gigabytes, licence, verified=verified, **facts)  # type: ignore[arg-type]


_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_GUTENBERG = "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/gutenberg.zip"
_IMDB = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"

DATASETS: dict[str, DatasetEntry] = {
    "tiny_shakespeare": DatasetEntry(
        "a megabyte of Shakespeare's plays, the classic first corpus",
        0.001,
        "public domain",
        "https://github.com/karpathy/char-rnn",
        "karpathy/nanoGPT on GitHub, data/shakespeare_char/prepare.py (url)",
        urls=(
            RemoteFile(
                _SHAKESPEARE,
                "input.txt",
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
        is_small=True,
    ),
    "gutenberg_selection": DatasetEntry(
        "18 books of Project Gutenberg, as NLTK selected them",
        0.004,
        "public domain in the USA",
        "https://www.nltk.org/nltk_data/",
        "nltk/nltk_data on GitHub, packages/corpora/gutenberg.zip",
        urls=(RemoteFile(_GUTENBERG, "gutenberg.zip"),),
        members=("gutenberg/*.txt",),
        is_small=True,
    ),
    "wikipedia_simple": _on_hub(
        "wikimedia/wikipedia",
        "20231101.simple/*.parquet",
        "the Simple English Wikipedia of November 2023, one article per document",
        0.16,
        "CC BY-SA 3.0",
        "files of wikimedia/wikipedia on huggingface.co: 20231101.simple/train-00000-of-00001.parquet, "
        "156,885,218 bytes",
        is_small=True,
    ),
    "cosmopedia_100k": _on_hub(
        "HuggingFaceTB/cosmopedia-100k",
        "*.parquet",
        "100,000 textbook pages and stories written by a language model",
        0.3,
        "Apache-2.0",
        "projects on GitHub that load HuggingFaceTB/cosmopedia-100k, split train, column text",
        is_small=True,
    ),
    "tinystories": _on_hub(
        "roneneldan/TinyStories",
        "data/train-*.parquet",
        "2 million short stories in the words of a small child (Eldan and Li 2023)",
        1.0,
        "CDLA-Sharing-1.0",
        "files of roneneldan/TinyStories on huggingface.co, revision f54c09f: "
        "data/train-00000-of-00004-….parquet, column text",
        is_small=True,
    ),
    "imdb_reviews": DatasetEntry(
        "75,000 reviews of films, one file each (Maas et al. 2011)",
        0.08,
        "for research; no licence is stated",
        "https://ai.stanford.edu/~amaas/data/sentiment/",
        "DAI-Lab/fibber on GitHub, fibber/datasets/downloadable_datasets.py (url)",
        urls=(RemoteFile(_IMDB, "aclImdb_v1.tar.gz"),),
        members=("aclImdb/train/*/*.txt",),
    ),
    "codeparrot_valid": _on_hub(
        "codeparrot/codeparrot-clean-valid",
        "*.json.gz",
        "60,000 Python files from GitHub, deduplicated and filtered",
        0.2,
        "each file's own",
        "projects on GitHub that load codeparrot/codeparrot-clean-valid, split train, column content",
        "content",
    ),
    "wikipedia_en": _on_hub(
        "wikimedia/wikipedia",
        "20231101.en/*.parquet",
        "the English Wikipedia of November 2023, one article per document",
        12.0,
        "CC BY-SA 3.0",
        "configurations of wikimedia/wikipedia on huggingface.co: 20231101.en",
    ),
    "c4_realnewslike": _on_hub(
        "allenai/c4",
        "realnewslike/c4-train.*.json.gz",
        "news-like pages of the web, cleaned (the realnewslike part of C4)",
        15.0,
        "ODC-By",
        "files of allenai/c4 on huggingface.co: realnewslike/c4-train.00000-of-00512.json.gz; "
        "size from oumi.ai's page on C4",
    ),
    "openwebtext": _on_hub(
        "Skylion007/openwebtext",
        "plain_text/*train/*.parquet",
        "8 million web pages that Reddit linked to, an open counterpart of GPT-2's corpus",
        24.0,
        "CC0",
        "the hub's parquet conversion of Skylion007/openwebtext: plain_text/train/0000.parquet",
        revision="refs/convert/parquet",
    ),
    "open_web_math": _on_hub(
        "open-web-math/open-web-math",
        "data/*.parquet",
        "6 million web pages with mathematics, formulas kept (Paster et al. 2023)",
        27.0,
        "ODC-By",
        "files of open-web-math/open-web-math on huggingface.co: data/train-00000-of-00114-….parquet",
    ),
    "fineweb_edu_10bt": _on_hub(
        "HuggingFaceFW/fineweb-edu",
        "sample/10BT/*.parquet",
        "10 billion tokens of educational web pages (a sample of FineWeb-Edu)",
        28.0,
        "ODC-By",
        "files of HuggingFaceFW/fineweb-edu on huggingface.co: sample/10BT, "
        "000_00000.parquet to 013_00000.parquet",
    ),
    "fineweb_10bt": _on_hub(
        "HuggingFaceFW/fineweb",
        "sample/10BT/*.parquet",
        "10 billion tokens of web pages (a sample of FineWeb)",
        30.0,
        "ODC-By",
        "hf://datasets/HuggingFaceFW/fineweb/sample/10BT, as its card and projects on GitHub read it",
    ),
}


def select_datasets(names: Sequence[str]) -> dict[str, DatasetEntry]:
    """Return the entries of these names.

    Args:
        names: Names of datasets; `["all"]` selects every one, and an empty list the small ones.

    Raises:
        UsageError: A name is unknown.
    """
    if list(names) == ["all"]:
        return DATASETS
    unknown = [name for name in names if name not in DATASETS]
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], DATASETS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(f"the catalog has no dataset {unknown[0]!r}; {hint}--list prints all of them")
    return (
        {name: DATASETS[name] for name in names}
        if names
        else {name: entry for name, entry in DATASETS.items() if entry.is_small}
    )


def list_remote_files(entry: DatasetEntry) -> tuple[list[RemoteFile], str]:
    """List the files of a dataset.

    Args:
        entry: The dataset.

    Returns:
        The files, and what identifies their version: a commit on the hub, or the first url.

    Raises:
        NoConnectionError: The hub cannot be reached.
        DataError: The hub answers with an error, or no longer has such files.
    """
    if entry.hub is None:
        return list(entry.urls), entry.urls[0].url
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its HTTP client's
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
    )
    from huggingface_hub.hf_api import RepoFile

    hub = HfApi()
    try:
        commit = hub.dataset_info(entry.hub, revision=entry.revision).sha
        listed = list(hub.list_repo_tree(entry.hub, recursive=True, revision=commit, repo_type="dataset"))
    except HfHubHTTPError as error:
        raise DataError(f"the hub answered for {entry.hub}: {str(error).strip().splitlines()[0]}") from None
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NoConnectionError(f"the hub could not be reached ({first})") from None
    found = [
        RemoteFile(
            f"{hub.endpoint}/datasets/{entry.hub}/resolve/{commit}/{urllib.parse.quote(file.path)}",
            file.path,
            file.size,
            file.lfs.sha256 if file.lfs is not None else None,
        )
        for file in listed
        if isinstance(file, RepoFile)
        and any(fnmatch.fnmatchcase(file.path, pattern) for pattern in entry.patterns)
    ]
    if not found:
        raise DataError(f"{entry.hub} has no files {' or '.join(entry.patterns)} any more; see {entry.page}")
    return sorted(found, key=lambda file: file.name), f"{entry.hub}@{commit}"


def manual_download_hint(name: str, entry: DatasetEntry) -> str:
    """Return how to bring a dataset here from a machine with a network, for error messages."""
    if entry.hub is None:
        step = f"download {' and '.join(file.url for file in entry.urls)} into a folder"
    else:
        command = [
            "hf",
            "download",
            entry.hub,
            "--repo-type",
            "dataset",
            "--include",
            *entry.patterns,
            "--local-dir",
            name,
        ]
        revision = [] if entry.revision == "main" else ["--revision", entry.revision]
        step = f"`{shlex.join([*command, *revision])}`"
    return (
        f"On a machine with a network: {step}; then copy the folder to this machine, and add "
        f"--datasets {name} --input FOLDER"
    )

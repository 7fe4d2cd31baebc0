"""Preparation of domains: texts are read, split, tokenized with one tokenizer, and mixed by weight."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from domain_records import RECORDS
from hypothesis import given
from hypothesis import strategies as st

from llm_trainer.config import DataError, UsageError
from llm_trainer.config.schema.domains import DomainBridge
from llm_trainer.data.domains.loaders import DomainText
from llm_trainer.data.domains.pipeline import (
    DOMAINS_FILE,
    VOCABULARY_FILE,
    prepare_builtin_domains,
    prepare_domains,
)
from llm_trainer.data.domains.text_store import TextStore, write_splits
from llm_trainer.data.domains.vocabulary import (
    Term,
    WordCounts,
    log_likelihood_ratio,
    rank_terms,
    tokens_of_terms,
)
from llm_trainer.data.mixture_dataset import MIXTURE_FILE
from llm_trainer.data.prepared_dataset import open_prepared_dataset
from llm_trainer.data.tokenization.tokenizer import Tokenizer

GENERAL = (
    "The cat sat on the mat and the dog looked at it for a while before it went out into the garden again."
)


def records(name: str, count: int) -> list[dict[str, object]]:
    """`count` different records with a dataset's fields."""
    found = []
    for number in range(count):
        record = dict(RECORDS[name][number % len(RECORDS[name])])
        for field in ("problem", "question", "Question", "query", "question_content"):
            if isinstance(record.get(field), str):
                record[field] = f"{record[field]} (number {number})"
        if "conversation" in record:
            record["conversation"] = [{"role": "user", "content": f"{GENERAL} {number}"}]
        found.append(record)
    return found


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A folder with fifty to a hundred records for the loaders of the manual's file."""
    folder = tmp_path / "raw"
    folder.mkdir()
    counts = {
        "load_math": 100,
        "load_numinamath": 60,
        "load_scieval": 80,
        "load_livecodebench": 50,
        "load_quant": 50,
        "load_wildchat": 80,
    }
    for name, count in counts.items():
        lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records(name, count))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def bridge(local: Path, **settings: object) -> DomainBridge:
    values: dict[str, object] = {
        "loaders": {
            "load_math": {},
            "load_numinamath": {},
            "load_scieval": {"n_examples": 70},
            "load_quant": {},
            "load_wildchat": {},
        },
        "domain_weights": {"math": 1.5, "science": 1.0, "general": 0.5},
        "local_dir": str(local),
        "output_dir": str(local.parent / "domains"),
        "tokenizer_vocab_size": 400,
    }
    return DomainBridge(**{**values, **settings})  # type: ignore[arg-type]


def lines_of(folder: Path, split: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (folder / "texts" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_domains_are_split_tokenized_alike_and_mixed_by_weight(local: Path) -> None:
    summary = prepare_domains(bridge(local))
    folder = summary.folder
    assert set(summary.domains) == {"math", "science", "logic", "general"}
    assert summary.domains["math"].examples.keys() == {"train", "validation", "test"}
    assert sum(summary.domains["math"].examples.values()) == 160
    assert summary.domains["math"].sources == {"load_math": 100, "load_numinamath": 60}
    assert sum(summary.domains["science"].examples.values()) == 70
    tokenizer = Tokenizer.load(folder / "math")
    for name, facts in summary.domains.items():
        prepared = open_prepared_dataset(folder / name)
        assert prepared.tokenizer is not None
        assert prepared.tokenizer.hash == tokenizer.hash
        assert len(prepared.train) == facts.tokens["train"]
        assert {record["domain"] for record in lines_of(folder / name, "train")} == {name}
        assert prepared.metadata.documents_kept == sum(facts.examples.values())
    mixture = json.loads((folder / MIXTURE_FILE).read_text(encoding="utf-8"))
    assert mixture["weights"] == {"math": 1.5, "science": 1.0, "logic": 1.0, "general": 0.5}
    assert mixture["members"] == {name: name for name in summary.domains}
    together = open_prepared_dataset(folder)
    assert len(together.train) == sum(facts.tokens["train"] for facts in summary.domains.values())
    assert any("37.5% of the mixture" in line for line in summary.lines())
    small = [name for name, facts in summary.domains.items() if facts.tokens["train"] < 4096]
    assert small
    assert [note.partition(":")[0] for note in summary.notes if "must be shorter" in note] == small


def test_every_record_becomes_a_text_or_is_left_out(local: Path) -> None:
    summary = prepare_domains(
        bridge(local, loaders={"load_wildchat": {"min_length": 110}, "load_math": {"filter_hard": True}})
    )
    for stats in summary.loaders:
        assert stats.records == stats.texts + stats.left_out.total()
    facts = json.loads((summary.folder / DOMAINS_FILE).read_text(encoding="utf-8"))
    wildchat, competition = facts["loaders"]
    assert wildchat["licence"] == "ODC-BY"
    assert wildchat["left_out"]["other toxic"] == 40
    assert competition["left_out"] == {"other difficulty": 50}
    assert sum(sum(domain["examples"].values()) for domain in facts["domains"].values()) == sum(
        one["texts"] for one in facts["loaders"]
    )


def test_the_same_text_of_two_datasets_counts_once(local: Path) -> None:
    (local / "load_numinamath.jsonl").write_text(
        (local / "load_math.jsonl").read_text(encoding="utf-8"), encoding="utf-8"
    )
    summary = prepare_domains(bridge(local, loaders={"load_math": {}, "load_numinamath": {}}))
    assert summary.domains["math"].sources == {"load_math": 100}
    assert summary.loaders[1].left_out == {"repeated": 100}


def test_a_cap_draws_evenly_and_reading_stops_early(local: Path) -> None:
    lines = [json.dumps({"Question": f"number {number}?", "Answer": "yes"}) for number in range(2000)]
    (local / "load_quant.jsonl").write_text("\n".join(lines), encoding="utf-8")
    summary = prepare_domains(bridge(local, loaders={"load_quant": {}}, max_examples_per_domain=100))
    assert sum(summary.domains["logic"].examples.values()) == 100
    assert summary.loaders[0].records == 400
    texts = [
        record["text"]
        for split in ("train", "val", "test")
        for record in lines_of(summary.folder / "logic", split)
    ]
    numbers = [int(text.split()[2].rstrip("?")) for text in texts]
    assert 25 <= sum(number >= 200 for number in numbers) <= 75
    other = prepare_domains(bridge(local, loaders={"load_quant": {}}, max_examples_per_domain=100, seed=1))
    again = [record["text"] for record in lines_of(other.folder / "logic", "train")]
    assert set(again) != set(texts)


def test_a_domain_can_have_its_own_cap(local: Path) -> None:
    loaders = {"load_math": {}, "load_wildchat": {}, "load_quant": {}}
    summary = prepare_domains(
        bridge(local, loaders=loaders, max_examples_per_domain=30, domain_caps={"math": 50, "general": 10})
    )
    assert {name: sum(facts.examples.values()) for name, facts in summary.domains.items()} == {
        "math": 50,
        "general": 10,
        "logic": 30,
    }
    with pytest.raises(UsageError, match="domain_caps"):
        bridge(local, domain_caps={"math": 0})


def test_added_texts_do_not_change_the_splits_of_others(local: Path) -> None:
    def splits(folder: Path) -> dict[str, str]:
        return {
            record["text"]: split for split in ("train", "val", "test") for record in lines_of(folder, split)
        }

    before = splits(prepare_domains(bridge(local, loaders={"load_math": {}})).folder / "math")
    after = splits(
        prepare_domains(bridge(local, loaders={"load_numinamath": {}, "load_math": {}})).folder / "math"
    )
    assert len(after) > len(before)
    assert all(after[text] == split for text, split in before.items())


@pytest.mark.parametrize(
    ("count", "expected"), [(2, [2, 0, 0]), (4, [2, 1, 1]), (10, [8, 1, 1]), (30, [24, 3, 3])]
)
def test_few_texts_are_split_by_rank_so_that_no_split_is_empty(
    count: int, expected: list[int], tmp_path: Path
) -> None:
    with TextStore(tmp_path) as store:
        for number in range(count):
            assert store.add(DomainText(f"text {number}", "math", "load_math"))
        assert not store.add(DomainText("text 0 ", "science", "load_scieval"))
        counts, sources = write_splits(store, "math", tmp_path / "math", DomainBridge())
    assert [counts.get(split, 0) for split in ("train", "validation", "test")] == expected
    assert sources == {"load_math": count}
    assert (tmp_path / "math" / "test.jsonl").exists() == bool(expected[2])


def test_a_second_run_gives_the_same_bytes(local: Path) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        names = ("*/texts/*.jsonl", "*/dataset/*", "*/vocabulary.json", "mixture.json", "domains.json")
        return {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for name in names
            for file in folder.glob(name)
        }

    settings = {"extract_vocab": True, "vocab_size": 20}
    first = prepare_domains(bridge(local, **settings))
    before = contents(first.folder)
    assert contents(prepare_domains(bridge(local, **settings)).folder) == before
    elsewhere = prepare_domains(bridge(local, **settings, output_dir=str(local.parent / "elsewhere")))
    assert contents(elsewhere.folder) == before


def test_terms_are_words_of_the_domain_and_not_of_its_template(local: Path) -> None:
    lines = []
    for number in range(60):
        question = (
            f"What is the hypotenuse of a triangle with legs {number} and 5?"
            if number % 2
            else f"Is the integral of {number}x even?"
        )
        lines.append(
            json.dumps({"problem": question, "solution": f"The cat says {number}.", "level": "Level 1"})
        )
    (local / "load_math.jsonl").write_text("\n".join(lines), encoding="utf-8")
    summary = prepare_domains(
        bridge(local, loaders={"load_math": {}}, extract_vocab=True, vocab_size=10, add_terms=True)
    )
    content = json.loads((summary.folder / "math" / VOCABULARY_FILE).read_text(encoding="utf-8"))
    found = [term["term"] for term in content["terms"]]
    assert {"hypotenuse", "triangle", "integral"} <= set(found)
    assert not {"problem", "solution", "the"} & set(found)
    assert content["terms"] == sorted(content["terms"], key=lambda term: (-term["score"], term["term"]))
    tokenizer = Tokenizer.load(summary.folder / "math")
    text = "the hypotenuse, hypotenuses and\nhypotenuse of triangles"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" hypotenuse")) == 1
    assert len(tokenizer.encode("a hypotenuse")) == 2
    assert open_prepared_dataset(summary.folder / "math").train.largest_id < tokenizer.vocab_size
    without = prepare_domains(bridge(local, loaders={"load_math": {}}))
    assert not (without.folder / "math" / VOCABULARY_FILE).exists()


def test_the_score_is_dunnings() -> None:
    assert log_likelihood_ratio(10, 1000, 10, 1000) == pytest.approx(0.0, abs=1e-9)
    # Observed and expected counts: the word and all others, in each of the two texts.
    cells = {110: 60, 10: 60, 9890: 9940, 9990: 9940}
    by_cells = 2 * sum(observed * math.log(observed / expected) for observed, expected in cells.items())
    assert log_likelihood_ratio(110, 10_000, 10, 10_000) == pytest.approx(by_cells, rel=1e-9)
    assert log_likelihood_ratio(110, 10_000, 10, 10_000) > log_likelihood_ratio(11, 1000, 1, 1000)


@given(st.integers(0, 50), st.integers(1, 500), st.integers(0, 50), st.integers(1, 500))
def test_the_score_is_never_negative_and_symmetric(
    count: int, more: int, other: int, other_more: int
) -> None:
    score = log_likelihood_ratio(count, count + more, other, other + other_more)
    assert score >= -1e-9
    assert score == pytest.approx(
        log_likelihood_ratio(other, other + other_more, count, count + more), abs=1e-9
    )


def test_rare_words_short_words_and_words_of_general_text_are_not_terms() -> None:
    domain = WordCounts.from_texts(
        ["photon photon photon spin spin ox ox ox cat", "cat cat photon quark"] * 3 + ["\\frac{1}{2}"] * 4
    )
    found = rank_terms(domain, WordCounts.from_texts(["cat cat cat cat sat on mats"] * 3), 10)
    assert [term.term for term in found][:1] == ["photon"]
    assert {term.term for term in found} == {"photon", "spin", "quark", "\\frac"}
    assert found[0].count == 12


def test_terms_become_tokens_with_a_space_before_them_best_first() -> None:
    one, other = Term("axon", 5.0, 3, 1.0, 0.0), Term("lemma", 9.0, 3, 1.0, 0.0)
    assert tokens_of_terms([[one], [other, one]], [" axiom"]) == [" lemma", " axon"]
    assert tokens_of_terms([[one, other]], [" lemma"]) == [" axon"]


def test_all_unavailable_datasets_are_named_in_one_error(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaders: dict[str, object] = {
        "load_math": {},
        "load_usaco": {},
        "load_xword": {"path": str(local / "gone")},
    }
    with pytest.raises(
        DataError,
        match=r"(?s)2 of 3.*load_usaco: .*usacobench_formatted.*load_xword: .*gone does not exist.*"
        r"load_math\.jsonl",
    ):
        prepare_domains(bridge(local, loaders=loaders))
    assert not (local.parent / "domains" / MIXTURE_FILE).exists()
    summary = prepare_domains(bridge(local, loaders=loaders, skip_unavailable=True))
    assert set(summary.domains) == {"math"}
    assert sum("is not available" in note for note in summary.notes) == 2


def test_a_domain_without_texts_is_refused_with_the_reasons(local: Path) -> None:
    with pytest.raises(
        DataError, match=r"no text is left(?s:.*)50 left out \(50 shorter than min_length 10000\)"
    ):
        prepare_domains(bridge(local, loaders={"load_quant": {"min_length": 10_000}}))
    with pytest.raises(DataError, match="names no loaders"):
        prepare_domains(bridge(local, loaders={}))


def test_near_duplicates_are_removed_with_deduplicate_near(local: Path) -> None:
    body = " ".join(f"word{number}" for number in range(120))
    lines = [
        json.dumps({"Question": f"{body} and number {number}?", "Answer": "yes"}) for number in range(40)
    ]
    (local / "load_quant.jsonl").write_text("\n".join(lines), encoding="utf-8")
    exact = prepare_domains(bridge(local, loaders={"load_quant": {}}))
    assert open_prepared_dataset(exact.folder / "logic").metadata.documents_kept == 40
    near = prepare_domains(bridge(local, loaders={"load_quant": {}}, deduplicate="near"))
    assert open_prepared_dataset(near.folder / "logic").metadata.documents_kept < 5


def test_a_given_tokenizer_is_used_for_all_domains(
    local: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tiny_tokenizer.save(tmp_path / "mine")
    summary = prepare_domains(bridge(local, tokenizer_path=str(tmp_path / "mine")))
    assert summary.vocab_size == tiny_tokenizer.vocab_size
    assert {
        open_prepared_dataset(summary.folder / name).metadata.tokenizer.hash for name in summary.domains
    } == {tiny_tokenizer.hash}


def test_a_run_that_cannot_read_keeps_the_older_result(local: Path) -> None:
    folder = prepare_domains(bridge(local)).folder
    tokens = len(open_prepared_dataset(folder).train)
    (local / "load_math.jsonl").unlink()
    (local / "load_math.jsonl").mkdir()
    with pytest.raises(DataError, match="load_math"):
        prepare_domains(bridge(local))
    assert len(open_prepared_dataset(folder).train) == tokens


def test_an_interrupted_run_leaves_no_mixture(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_domains(bridge(local))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_trainer.data.domains.pipeline.write_mixture", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_domains(bridge(local))
    assert not (local.parent / "domains" / MIXTURE_FILE).exists()
    monkeypatch.undo()
    assert len(open_prepared_dataset(prepare_domains(bridge(local)).folder).train)


def test_built_in_domains_need_nothing_and_cover_every_domain(tmp_path: Path) -> None:
    settings = {"max_examples_per_domain": 40, "tokenizer_vocab_size": 300, "output_dir": str(tmp_path)}
    summary = prepare_builtin_domains(DomainBridge(**settings), exercises=50)
    assert set(summary.domains) == {"math", "science", "coding", "logic", "reasoning", "general"}
    assert all(sum(facts.examples.values()) == 40 for facts in summary.domains.values())
    kinds = Counter(record["text"].partition(":")[0] for record in lines_of(tmp_path / "math", "train"))
    assert kinds == {"Question": summary.domains["math"].examples["train"]}
    assert any("def " in record["text"] for record in lines_of(tmp_path / "coding", "train"))
    assert len(open_prepared_dataset(tmp_path).train) > 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loaders": {"load_maths": {}}}, "did you mean load_math"),
        ({"loaders": {"load_math": {"max_sample": 3}}}, "did you mean max_samples"),
        ({"loaders": {"load_math": {"max_samples": 0}}}, "load_math.*max_samples.*0"),
        ({"loaders": {"load_math": {"max_samples": "3"}}}, "max_samples.*must be an integer"),
        ({"loaders": {"load_quant": {"difficulty": "hard"}}}, "load_quant has no setting named 'difficulty'"),
        ({"loaders": {"load_olympiad_bench": {"difficulty": "easy"}}}, "its dataset has medium, hard"),
        ({"loaders": {"load_math": {"filter_hard": True, "difficulty": "easy"}}}, "contradict each other"),
        ({"loaders": {"load_math": {"include_cot": True}}}, "no setting named 'include_cot'"),
        ({"domain_weights": {"maths": 1.0}}, "did you mean math"),
        ({"domain_weights": {"math": 0}}, "must be above 0"),
        ({"train_ratio": 0.9, "val_ratio": 0.2, "test_ratio": 0}, "add up to 1.1"),
        ({"train_ratio": 0, "val_ratio": 1, "test_ratio": 0}, "leaves no training data"),
        ({"add_terms": True}, "extract_vocab"),
        ({"custom_loaders": {"load_x": {"text": "{a}"}}}, "names no data"),
        ({"loader_files": ["nowhere.yaml"]}, "nowhere.yaml"),
    ],
)
def test_an_invalid_bridge_is_refused_with_a_reason(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DomainBridge(**settings)  # type: ignore[arg-type]

"""Domain loaders: the records of their datasets become texts, or are left out with a reason."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import yaml
from domain_records import RECORDS
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from llm_trainer.config import DataError, UsageError
from llm_trainer.config.schema.domain_loaders import (
    DomainLoader,
    parse_template,
    read_definitions,
    read_loader_file,
    shipped_loaders,
)
from llm_trainer.config.schema.domains import DomainBridge, LoaderOptions
from llm_trainer.data.domains.loaders import DomainText, LoaderStats, hub_file_url, read_loader
from llm_trainer.data.domains.templates import RecordFormatter, RecordRejected, as_text
from llm_trainer.data.sources.base import Record
from llm_trainer.data.sources.record_reader import RECORD_SUFFIXES, read_local_records


def read(
    name: str, folder: Path, row: DomainLoader | None = None, max_texts: int | None = None, **options: object
) -> tuple[list[DomainText], LoaderStats]:
    stats = LoaderStats(name)
    found = read_loader(
        stats, row or shipped_loaders()[name], LoaderOptions(**options), folder, 42, max_texts
    )
    return list(found), stats


def write_lines(folder: Path, name: str) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS[name]]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


EXPECTED = {
    "load_math": [
        ("math", "Problem: What is $1+1$?\n\nSolution: It is $\\boxed{2}$."),
        ("math", "Problem: How many primes"),
    ],
    "load_numinamath": [("math", "Problem: Solve $x+2=5$.\n\nSolution: So $x=3$.")],
    "load_olympic_arena": [
        ("math", "Problem: Find $2^5$.\n\nSolution: It is 32."),
        ("science", "Problem: What does a scale measure?"),
    ],
    "load_theoremqa": [("math", "Question: Is the sum of two odd numbers even?\n\nAnswer: True")],
    "load_scieval": [("science", "What carries oxygen in blood?\n\nA. Iron\nB. Haemoglobin\n\nAnswer: B")],
    "load_olympiad_bench": [
        ("math", "Problem: Prove that $n^2 \\ge n$.\n\nSolution: For $n \\ge 1$ multiply by $n$."),
        ("science", "A ball is thrown up at 10 m/s.\n\nProblem: How high does it rise?\n\nSolution: 5 m"),
    ],
    "load_jeebench": [
        ("science", "Question: Which is noble?\n(A) N\n(B) Ne\n\nAnswer: B"),
        ("math", "Question: What is 2+3?\n\nAnswer: 5"),
    ],
    "load_agieval": [
        ("reasoning", "Q: What is 3·3? Answer Choices: (A)6 (B)9\nA: Among A through B, the answer is B")
    ],
    "load_gpqa_extended": [
        (
            "science",
            "Question: What binds nucleons?\n\nIt outweighs the repulsion of the protons.\n\n"
            "Answer: The strong force",
        )
    ],
    "load_livecodebench": [
        ("coding", "# A. Sum\n\nRead two numbers and print their sum."),
        ("coding", "# B. Path\n\nPrint the longest path.\n\ndef f():"),
    ],
    "load_quant": [
        ("logic", "Question: Two coins, one head seen: is the other a head?\n\nAnswer: With probability 1/3.")
    ],
    "load_statsqual": [
        ("math", "Question: Show that the mean is unbiased.\n\nSolution: By linearity of expectation.")
    ],
    "load_xword": [
        ("logic", "You solve cryptic crosswords.\n\n### Clue: Noticed minor changes (3)\n\n### Answer: SAW")
    ],
    "load_usaco": [("coding", "Count the cows."), ("coding", "Order the cows.")],
    "load_curated_thoughts": [
        ("reasoning", "Problem: Halve 8.\n\nSolution: 4."),
        ("reasoning", "Problem: Double 8.\n\nSolution: 16."),
        ("reasoning", "Problem: Reverse a list.\n\na[::-1]"),
    ],
    "load_wildchat": [
        (
            "general",
            "User: How do bees find their way back to the hive?\n\nAssistant: By the sun and by landmarks.",
        )
    ],
}


def test_there_are_records_for_every_loader() -> None:
    assert set(RECORDS) == set(EXPECTED) == set(shipped_loaders())


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_loader_reads_texts_from_a_local_file_with_its_fields(name: str, tmp_path: Path) -> None:
    write_lines(tmp_path, name)
    examples, stats = read(name, tmp_path)
    assert len(examples) == len(EXPECTED[name])
    for example, (domain, text) in zip(examples, EXPECTED[name], strict=True):
        assert example.domain == domain
        assert example.text == text if len(example.text) <= len(text) else example.text.startswith(text)
    assert stats.records == len(RECORDS[name]) == stats.texts + stats.left_out.total()
    assert stats.origin == str(tmp_path / f"{name}.jsonl")


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_record_without_a_field_is_left_out_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.jsonl").write_text(
        '{"unrelated": 1, "language": "EN", "modality": "text-only"}\n', encoding="utf-8"
    )
    examples, stats = read(name, tmp_path)
    assert not examples
    assert next(iter(stats.left_out)).startswith("no field ")


@pytest.mark.parametrize("file_format", ["json", "jsonl.gz", "parquet", "arrow", "folder"])
def test_every_file_format_gives_the_same_texts(file_format: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [dict(record) for record in RECORDS["load_wildchat"]]
    if file_format == "json":
        (tmp_path / "load_wildchat.json").write_text(json.dumps(records), encoding="utf-8")
    elif file_format == "jsonl.gz":
        (tmp_path / "wildchat").mkdir()
        with gzip.open(tmp_path / "wildchat" / "a.jsonl.gz", "wt", encoding="utf-8") as opened:
            opened.write("\n".join(map(json.dumps, records)))
    elif file_format == "parquet":
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "wildchat.parquet")
    elif file_format == "arrow":
        table = pa.Table.from_pylist(records)
        with (
            pa.OSFile(str(tmp_path / "wildchat.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    else:
        folder = tmp_path / "load_wildchat"
        (folder / "b").mkdir(parents=True)
        (folder / "a.jsonl").write_text(json.dumps(records[1]) + "\n", encoding="utf-8")
        (folder / "b" / "a.jsonl").write_text(json.dumps(records[0]) + "\n", encoding="utf-8")
        (folder / ".hidden.jsonl").write_text("{", encoding="utf-8")
    examples, _ = read("load_wildchat", tmp_path)
    assert [(example.domain, example.text) for example in examples] == EXPECTED["load_wildchat"]


def test_lists_in_csv_cells_are_read_as_lists(tmp_path: Path) -> None:
    with (tmp_path / "scieval.csv").open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, ["question", "answer"])
        writer.writeheader()
        writer.writerow({"question": "Which?\n\nAnswer:", "answer": '["B"]'})
        writer.writerow({"question": "Who?\n\nAnswer:", "answer": "C"})
    examples, _ = read("load_scieval", tmp_path)
    assert [example.text for example in examples] == ["Which?\n\nAnswer: B", "Who?\n\nAnswer: C"]


def test_what_cannot_be_read_is_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    lines = [
        b'{"Question": "a", "Answer": "b"}',
        b"{",
        b"[1]",
        b'{"Question": "\xff", "Answer": "b"}',
        b'{"Question": "", "Answer": "b"}',
    ]
    (tmp_path / "load_quant.jsonl").write_bytes(b"\n".join([*lines, b'{"Question": "c", "Answer": 3}']))
    examples, stats = read("load_quant", tmp_path)
    assert [example.text for example in examples] == ["Question: a\n\nAnswer: b", "Question: c\n\nAnswer: 3"]
    assert stats.left_out == {"not JSON": 1, "not a record": 1, "not utf-8": 1, "empty field 'Question'": 1}
    assert stats.records == 6


def test_max_samples_takes_the_first_texts_and_n_examples_draws_evenly(tmp_path: Path) -> None:
    lines = [
        json.dumps({"Question": f"question {number}", "Answer": "x" * (number + 1)}) for number in range(200)
    ]
    (tmp_path / "load_quant.jsonl").write_text("\n".join(lines), encoding="utf-8")
    everything = [example.text for example in read("load_quant", tmp_path)[0]]
    first, stats = read("load_quant", tmp_path, max_samples=7)
    assert [example.text for example in first] == everything[:7]
    assert stats.records == 7
    assert len(read("load_quant", tmp_path, max_texts=9)[0]) == 9
    drawn, stats = read("load_quant", tmp_path, n_examples=40)
    texts = [example.text for example in drawn]
    assert texts == [text for text in everything if text in set(texts)]  # in their order
    assert len(texts) == 40
    assert sum(everything.index(text) >= 100 for text in texts) in range(10, 31)
    assert stats.texts + stats.left_out.total() == stats.records == 200
    long, stats = read("load_quant", tmp_path, min_length=100, max_length=150)
    assert all(100 <= len(example.text) <= 150 for example in long)
    assert set(stats.left_out) == {"shorter than min_length 100", "longer than max_length 150"}


@pytest.mark.parametrize(
    ("name", "options", "texts"),
    [
        ("load_olympiad_bench", {"filter_hard": True}, 1),
        ("load_olympiad_bench", {"difficulty": "medium"}, 1),
        ("load_math", {"filter_hard": True}, 1),
        ("load_math", {"difficulty": "level 1"}, 1),
        ("load_math", {"difficulty": "medium"}, 0),
        ("load_livecodebench", {"difficulty": "medium"}, 1),
        ("load_livecodebench", {"difficulty": "hard"}, 0),
        ("load_usaco", {"difficulty": "hard"}, 1),
        ("load_usaco", {"difficulty": "Bronze"}, 1),
    ],
)
def test_difficulty_keeps_records_of_that_level(
    name: str, options: dict[str, object], texts: int, tmp_path: Path
) -> None:
    write_lines(tmp_path, name)
    examples, stats = read(name, tmp_path, **options)
    assert len(examples) == texts
    assert stats.left_out["other difficulty"] == len(RECORDS[name]) - texts


def test_include_cot_adds_the_chain_of_thought(tmp_path: Path) -> None:
    write_lines(tmp_path, "load_curated_thoughts")
    examples, _ = read("load_curated_thoughts", tmp_path, include_cot=True)
    assert [example.text for example in examples] == [
        "Problem: Halve 8.\n\n<think>8/2</think> 4",
        "Problem: Double 8.\n\nAdding 8 and 8 gives 16.",
        "Problem: Reverse a list.\n\nThoughts: A slice does it.\n\na[::-1]",
    ]


def test_the_parts_of_a_dataset_have_domains_of_their_own(tmp_path: Path) -> None:
    for part, domain in (
        ("agieval-sat-math", "math"),
        ("agieval-logiqa-en", "logic"),
        ("agieval-sat-en", "reasoning"),
    ):
        folder = tmp_path / "load_agieval" / part
        folder.mkdir(parents=True)
        (folder / "test.jsonl").write_text(
            json.dumps(dict(RECORDS["load_agieval"][0]) | {"query": domain}), encoding="utf-8"
        )
    examples, _ = read("load_agieval", tmp_path)
    assert {example.text: example.domain for example in examples} == {"math A": "math"} or all(
        example.text.startswith(example.domain) for example in examples
    )
    assert len(examples) == 3


def test_a_folder_in_the_hubs_layout_is_read_through_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "somebody" / "puzzles"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps({"q": f"q{n}", "a": [f"a{n}"]}) for n in range(5)), encoding="utf-8"
    )
    row = DomainLoader(domain="logic", hub=str(folder), text=["{q}", "{a|first}"])
    examples, stats = read("load_puzzles", tmp_path / "nothing", row, max_samples=3)
    assert [example.text for example in examples] == ["q0\n\na0", "q1\n\na1", "q2\n\na2"]
    assert stats.origin.endswith("on the hub")


def test_files_of_a_hub_repository_have_addresses() -> None:
    part = shipped_loaders()["load_livecodebench"].hub[0]
    address = (
        "hf://datasets/livecodebench/code_generation_lite@0fe84c3912ea0c4d4a78037083943e8f0c4dd505/test.jsonl"
    )
    assert hub_file_url(part, part.files[0]) == address


def test_without_a_network_the_error_names_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="simplescaling/s1-teasers"):
        read("load_quant", tmp_path)


def test_a_split_is_an_option_of_the_hub_only(tmp_path: Path) -> None:
    write_lines(tmp_path, "load_quant")
    with pytest.raises(DataError, match="split=test is for the hub"):
        read("load_quant", tmp_path, split="test")
    with pytest.raises(UsageError, match="load_scieval has no setting named 'split'"):
        DomainBridge(loaders={"load_scieval": {"split": "test"}})
    folder = tmp_path / "hub"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"q": split}), encoding="utf-8")
    row = DomainLoader(hub=str(folder), text="{q}")
    assert [example.text for example in read("load_x", tmp_path, row, split="test")[0]] == ["test"]


def test_a_path_that_is_set_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl does not exist"):
        read("load_quant", tmp_path, path=str(tmp_path / "gone.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no records"):
        read("load_quant", tmp_path, path=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("value", "field_format", "text"),
    [
        (None, None, ""),
        (2.5, None, "2.5"),
        (["a", "b"], None, "a\nb"),
        (["a", "b"], "last", "b"),
        ([], "first", ""),
        (["x", "y"], "lettered", "A. x\nB. y"),
        (2, "letter", "C"),
        ("2", "letter", "C"),
        ("B", "letter", "B"),
        (["[1]"], "lines", "[1]"),
        ('["a", "b"]', "lines", "a\nb"),
        ("[not json", "first", "[not json"),
        (
            [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
            "turns",
            "User: hi\n\nAssistant: ho",
        ),
        ({"role": ["user"], "content": ["hi"]}, "turns", "User: hi"),
    ],
)
def test_values_become_texts(value: object, field_format: str | None, text: str) -> None:
    assert as_text(value, field_format) == text


def test_a_value_that_is_not_a_text_is_rejected() -> None:
    with pytest.raises(RecordRejected):
        as_text(b"bytes".__iter__(), None)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["²", "٣", "[1", "[[]]", '{"role": []}']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("name", list(EXPECTED))
@given(data=st.data())
def test_any_record_becomes_a_text_or_is_left_out(name: str, data: st.DataObject) -> None:
    row = shipped_loaders()[name]
    fields = data.draw(st.fixed_dictionaries(dict.fromkeys(row.fields(), VALUES)))
    fields |= {field: values[0] for field, values in row.keep.items()}
    formatter = RecordFormatter(row, LoaderOptions(include_cot=data.draw(st.booleans())))
    try:
        text = formatter.text(fields)
    except RecordRejected:
        return
    assert text.strip()
    text.encode("utf-8")
    assert formatter.domain(fields, "a part") in row.domains()


@pytest.mark.parametrize("suffix", [*RECORD_SUFFIXES, ".jsonl.gz", ".csv.bz2", ".json.zst"])
@given(
    raw=st.binary(max_size=60)
    | st.sampled_from([b"", b"PAR1", b"ARROW1\0\0", b"a,b\n1,\0\n", b"\xef\xbb\xbf{}", b"[{}, 3]", b"{\n}"])
)
def test_reading_continues_after_any_file(
    suffix: str, raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / f"a{suffix}").write_bytes(raw)
    (folder / "z.jsonl").write_text('{"last": 1}', encoding="utf-8")
    found = list(read_local_records(folder))
    assert found[-1] == Record({"last": 1}, "z.jsonl", "z.jsonl, line 1")
    assert all(isinstance(one, Record) or one.reason for one in found)


def test_a_record_that_is_nested_too_deeply_is_left_out() -> None:
    value: object = "x"
    for _ in range(5000):
        value = [value]
    with pytest.raises(RecordRejected, match="nested too deeply"):
        RecordFormatter(shipped_loaders()["load_quant"], LoaderOptions()).text(
            {"Question": value, "Answer": "y"}
        )


def test_braces_can_be_escaped_and_are_checked() -> None:
    assert parse_template("{{a}}") == ["{", "a", "}"]
    for wrong in ("{a", "a}", "{a|sideways}"):
        with pytest.raises(UsageError, match="template"):
            parse_template(wrong)


def test_a_loader_is_added_with_a_yaml_entry_and_no_code(tmp_path: Path) -> None:
    (tmp_path / "recipes.csv").write_text("title,steps\nBread,Knead it.\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        f"load_recipes:\n  domain: cooking\n  path: {tmp_path / 'recipes.csv'}\n"
        "  text: ['# {title}', '{steps}', '{wine?}']\n",
        encoding="utf-8",
    )
    row = read_loader_file(tmp_path / "mine.yaml")["load_recipes"]
    examples, _ = read("load_recipes", tmp_path, row)
    assert examples == [DomainText("# Bread\n\nKnead it.", "cooking", "load_recipes")]
    bridge = DomainBridge(
        loader_files=[str(tmp_path / "mine.yaml")],
        loaders={"load_recipes": {"min_length": 3}},
        domain_weights={"cooking": 2},
    )
    assert bridge.all_loaders()["load_recipes"].domains() == ["cooking"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"hub": "a/b"}, "load_x has no text"),
        ({"text": "{a}"}, "names no data"),
        ({"text": "{a", "path": "p"}, "load_x: the template"),
        ({"text": "{a}", "path": "p", "domain": "../up"}, "the name of a domain consists of"),
        ({"text": "{a}", "path": "p", "difficulty_levels": {"hard": ["x"]}}, "needs difficulty_field"),
        (
            {"text": "{a}", "path": "p", "difficulty_field": "d", "difficulty_levels": {"tough": ["x"]}},
            "tough",
        ),
        ({"text": "{a}", "path": "p", "colour": "red"}, "no setting named 'colour'"),
        ({"text": "{a}", "path": "p", "forms": [{"text": ["{b}"]}]}, "give one"),
        ("hub", "must be a mapping"),
    ],
)
def test_an_invalid_loader_is_refused_with_a_reason(row: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_definitions({"load_x": row}, "mine.yaml")


def test_every_loader_has_a_source_and_a_licence() -> None:
    for name, row in shipped_loaders().items():
        assert row.verified, name
        assert row.licence != "not stated", name
        assert row.about, name


def test_the_documentation_page_has_the_table_and_its_examples_work() -> None:
    (file,) = (ROOT / "docs").rglob("domain_data_bridge.md")
    page = file.read_text(encoding="utf-8")
    for name, row in shipped_loaders().items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.hub[0].name in line
        assert line.endswith(f"| {row.licence} |")
        assert ", ".join(row.domains()) in line
    example = read_definitions(yaml.safe_load(page.split("```yaml\n")[1].split("```")[0]), "the page")[
        "load_recipes"
    ]
    record = {
        "title": "Bread",
        "minutes": 40,
        "steps": ["Knead.", "Bake."],
        "wine": None,
        "language": "en",
        "level": "chef",
    }
    text = RecordFormatter(example, LoaderOptions(filter_hard=True)).text(record)
    assert text == "# Bread\n\nTakes 40 minutes.\n\nKnead.\nBake."
    bridge = DomainBridge(**json.loads(page.split("```json\n")[1].split("```")[0]))
    assert bridge.options("load_math").max_samples == 3000


def test_local_records_name_the_file_and_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n\n{"x": 2}\n', encoding="utf-8")
    found = list(read_local_records(tmp_path))
    assert found == [
        Record({"x": 1}, "a.jsonl", "a.jsonl, line 1"),
        Record({"x": 2}, "a.jsonl", "a.jsonl, line 3"),
    ]

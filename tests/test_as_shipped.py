"""The file a language model was published as is a row, a point, a sentence and a reason for warnings; its numbers are those of others."""

import copy
import csv
import json
import shutil

import helpers
import pytest
from goals import goals, goals_table
from made_up_report import language_model, report  # noqa: F401  a fixture

from compactmind.checkpoint import save_checkpoint
from compactmind.data import write_dataset
from compactmind.evaluation import language
from compactmind.manifest import add_to_manifest, identity_of
from compactmind.report import tables
from compactmind.report.as_shipped import as_shipped, compressed, row_as_shipped, row_of_llama_cpp
from compactmind.report.documents import sections, write_documents
from compactmind.report.figures import latency, perplexity_against_size
from compactmind.report.sentences import sentences, warnings

PUBLISHED = {
    "file": "tiny.Q4_1.gguf", "format": "GGUF", "bytes": 98_362_432, "sha256": "abc", "weights": 1000, "bits_per_weight": 5.85,
    "types": {"Q4_1": {"tensors": 210, "weights": 900, "bits_per_weight": 5.0, "block_size": 32},
              "F32": {"tensors": 61, "weights": 100, "bits_per_weight": 32.0, "block_size": 1}},
}  # fmt: skip


@pytest.fixture
def shipped(report):  # noqa: F811
    """The report of made_up_report, its llama made of a file of 98.4 MB."""
    report["models"] = [row for row in report["models"] if not row["name"].startswith("llama_gptq")]  # what follows counts rows
    dense = report["models"][3]
    dense |= {"size_mb": 269.1, "measured_with": {}, "not_measured": {"peak_memory_mb": "no memory"}, "peak_memory_mb": None}
    dense |= {"against_dense": {"ratio": 1.0, "interval": [1.0, 1.0]}, "machine": "another CPU"}
    report["models"].insert(4, row_as_shipped(dense, PUBLISHED))
    return report


def by_name(rows: dict) -> dict[str, dict]:
    return {row["name"]: row for row in rows["models"]}


def test_what_llama_cpp_makes_is_a_row_and_a_point_and_none_of_our_models(shipped, tmp_path):
    before = compressed(shipped, as_shipped(shipped))
    dense = shipped["models"][3] | {"measured_with": {"weights": "a"}, "identity": "a"}
    row = row_of_llama_cpp(dense, "Q4_0", "1.2")
    row |= {name: by_name(shipped)["llama_w8a8"][name] for name in ("generation", "divergence", "against_dense", "perplexity")}
    shipped["models"].insert(5, row | {"status": "measured", "size_mb": 90.0, "compression_ratio": 2.99})
    assert compressed(shipped, as_shipped(shipped)) == before
    assert [line[0] for line in tables.language_table(shipped).rows].count("llama.cpp Q4_0") == 1
    message = [each for each in sentences(shipped) if each.startswith("llama.cpp Q4_0")]
    assert len(message) == 1 and not any("llama.cpp Q4_0 is" in each for each in warnings(shipped))
    labels = [text.get_text() for text in perplexity_against_size(shipped).legends[0].get_texts()]
    assert any(label.startswith("llama.cpp Q4_0") for label in labels)
    assert all(path.stat().st_size for path in write_documents(shipped, tmp_path))


# --------------------------------------------------------------------------------------------------------------- the row
def test_the_row_has_the_bytes_of_the_file_and_the_quality_of_the_model(shipped):
    row, dense = shipped["models"][4], shipped["models"][3]
    assert as_shipped(shipped) is row and row["name"] == "llama_as_shipped" and row["compared_with"] == "llama"
    assert row["size_mb"] == pytest.approx(98.362432) and row["compression_ratio"] == pytest.approx(269.1 / 98.362432)
    for name in ("perplexity", "perplexity_interval", "protocol", "against_dense", "parameters"):
        assert row[name] == dense[name]
    assert row["generation"] is row["load_seconds"] is row["peak_memory_mb"] is row["directory"] is None
    assert row["kernel"] == "as llama" and not {"measured_with", "not_measured", "machine"} & row.keys()


@pytest.mark.parametrize(
    ("status", "given", "expected"),
    [
        ("not run", {"command": "python 6_evaluate_report.py"}, {"command": "python 6_evaluate_report.py"}),
        ("failed", {"error": "too large"}, {"error": "it has the quality of llama: too large"}),
        ("broken", {"error": "cut", "command": "python download_model.py"},
         {"error": "it has the quality of llama: cut", "command": "python download_model.py"}),
    ],
)  # fmt: skip
def test_without_the_models_numbers_the_row_has_none(shipped, tmp_path, status, given, expected):
    dense = {"name": "llama", "track": "llm", "directory": "models/llama", "status": status, **given}
    row = row_as_shipped(dense, PUBLISHED)
    assert row["status"] == status and {name: row[name] for name in expected} == expected and "size_mb" not in row
    shipped["models"][3:5] = [dense, row]
    assert as_shipped(shipped) is None and not any("dominated" in line for line in warnings(shipped))
    if status == "failed":  # the documents have room for such a row; the tables are those of all
        write_documents(shipped, tmp_path)
    text = expected.get("command") or expected["error"]
    assert [line for line in tables.language_table(shipped).rows if line[0] == "llama_as_shipped" and text in line[1]]


# ------------------------------------------------------------------------------------------------------------- in words
def test_what_there_is_to_beat_in_one_sentence(shipped):
    text = "llama_as_shipped is what every compressed model has to beat: 98.4 MB, 2.74x smaller than llama at no loss"
    assert f"{text}; of 1 made from llama none is smaller and none is better." in sentences(shipped)
    shipped["models"] += [language_model("small", 1.3, size_mb=90.0), language_model("tiny", 1.5, size_mb=40.0)]
    shipped["models"] += [language_model("better", 0.9), language_model("perhaps", 0.995)]
    shipped["models"] += [language_model("of-another", 1.1, size_mb=9.0, compared_with="other")]
    assert f"{text}; of 5 made from llama 2 (small, tiny) are smaller and 1 (better) is better." in sentences(shipped)
    shipped["models"][5:] = []
    assert f"{text}." in sentences(shipped)
    assert not any(line.startswith("llama_as_shipped:") for line in sentences(shipped))


def test_other_models_are_told_beside_it(shipped):
    line = next(line for line in sentences(shipped) if line.startswith("llama_w8a8:"))
    assert "1.60x smaller than llama dequantized (1.63 times the bytes of llama_as_shipped), perplexity +2.00%" in line
    assert not any("as released" in line for line in sentences(shipped))


def test_a_search_for_less_than_the_file_has_is_told(shipped):
    text = " llama_as_shipped is 2.74x smaller at no loss."
    assert next(line for line in sentences(shipped) if "pipelines tried" in line).endswith(f"at 2.60x.{text}")
    shipped["search"]["best"]["measured"]["compression_ratio"] = 2.8
    assert not any(text in line for line in sentences(shipped))


def test_whoever_is_neither_smaller_nor_better_is_dominated(shipped):
    shipped["models"] += [
        language_model("small", 1.3, size_mb=90.0), language_model("better", 0.9), language_model("perhaps", 0.995),
        language_model("slow", 1.3, size_mb=98.5, generation=None), language_model("of-another", 1.1, compared_with="other"),
    ]  # fmt: skip
    result = [line for line in warnings(shipped) if "dominated" in line]
    assert [line.split()[0] for line in result] == ["llama_w8a8", "perhaps", "slow"]
    assert result[0] == (
        "llama_w8a8 is dominated: llama_as_shipped has 98.4 MB instead of 160.0 and a perplexity of 40.00 instead of 40.80; its speed is "
        "left (prefill 1.90x, decode 1.20x against llama; the file's was not measured)."
    )
    assert result[2].endswith("instead of 98.5 and a perplexity of 40.00 instead of 52.00.")


def test_the_row_itself_is_warned_of_in_no_way(shipped):
    text = [line for line in warnings(shipped) if line.startswith("llama_as_shipped")]
    assert text == [] and any(line.startswith("llama was measured on another machine") for line in warnings(shipped))


def test_a_goal_that_the_file_reaches_without_work_says_so(shipped):
    assert shipped["models"][5]["name"] == "llama_w8a8"
    shipped["models"][5] |= {"against_dense": {"ratio": 1.004, "interval": [1.002, 1.006]}, "compression_ratio": 1.7}
    beaten = {goal["goal"]: goal["beaten_by"] for goal in goals(shipped) if goal["beaten_by"]}
    assert beaten == dict.fromkeys(
        ("llama_w8a8 perplexity above dense", "llama_w8a8 bytes of the released"), "llama_as_shipped"
    )
    verdicts = {row[0]: row[3] for row in goals_table(shipped).rows}
    assert verdicts["llama_w8a8 bytes of the released"] == "met, but llama_as_shipped is smaller and no worse"
    assert verdicts["llama_w8a8 prefill of 512 tokens"] == "met"
    shipped["models"][5]["size_mb"] = 90.0
    assert not any(goal["beaten_by"] for goal in goals(shipped))


def test_the_documents_say_what_the_model_is(shipped, tmp_path):
    section = next(section for section in sections(shipped, {}) if section.title == "LLM track")
    assert section.sentences[0].startswith("llama was published as tiny.Q4_1.gguf (GGUF, 98.4 MB;")
    table = section.tables[0]
    cells = dict(zip(table.header, table.rows[1], strict=True))
    assert (cells["model"], cells["MB"], cells["ratio"], cells["kernel"]) == ("llama_as_shipped", "98.4", "2.74x", "as llama")
    assert {cells[name] for name in ("prefill ms", "prefill", "decode ms", "decode", "load s", "peak MB")} == {"-"}
    assert cells["perplexity [95%]"] == table.rows[0][1] and "the bytes of tiny.Q4_1.gguf" in table.note
    write_documents(shipped, tmp_path)
    for name in ("html", "md", "tex"):
        text = (tmp_path / f"final_report.{name}").read_text(encoding="utf-8").replace("\\", "")
        assert "llama_as_shipped" in text and (
            name == "tex" or "2 classifiers and 2 language models" in text.replace("&middot;", "")
        )
    with open(tmp_path / "model_comparison.csv", newline="", encoding="utf-8") as file:
        line = {row["name"]: row for row in csv.DictReader(file)}["llama_as_shipped"]
    assert (line["perplexity"], line["size_mb"], line["prefill_ms"], line["peak_memory_mb"]) == ("40.0", "98.362432", "", "")
    assert not [row for row in tables.stages_table(shipped).rows if row[0] == "llama_as_shipped"]


def test_it_is_a_point_and_no_bar(shipped):
    legend = [text.get_text() for text in perplexity_against_size(shipped).legends[0].get_texts()]
    assert "llama_as_shipped: 40.00, 98 MB, the point to beat" in legend and len(legend) == 3
    places = [line.get_xdata()[0] for line in perplexity_against_size(shipped).axes[0].get_lines()]
    assert pytest.approx(98.362432) in places
    assert not any("llama_as_shipped" in label.get_text() for axes in latency(shipped).axes for label in axes.get_yticklabels())


# ------------------------------------------------------------------------------------------------------------ the script
@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny llama made of a file, and one made from it; no classifiers."""
    folder = tmp_path_factory.mktemp("shipped")
    rows = helpers.make_sentences(12)
    write_dataset(folder / "sst2_data", {"train": rows[:4], "validation": rows[4:8], "test": rows[8:]}, {"source": "made up"})
    helpers.add_llama(folder)
    llama = folder / "models" / "llama"
    add_to_manifest(llama, {"published_as": PUBLISHED | {"bytes": 20_000}})
    stage = {"script": "4_smoothquant_llama.py", "config": {}, "inputs": {"model": identity_of(llama)}}
    model = helpers.released_llama(helpers.make_llama(seed=1, tie_word_embeddings=True, scale=2.0))  # far worse
    save_checkpoint(folder / "models" / "llama_w8a8", model, helpers.make_byte_tokenizer(), kind="dense", parent="llama", stage=stage,
                    dtype="bfloat16")  # fmt: skip
    return folder


@pytest.fixture
def run(workspace, tmp_path, run_here, monkeypatch):
    """Run the report in a copy of the workspace, memory not really measured: (folder, what runs it)."""
    folder = tmp_path / "copy"
    shutil.copytree(workspace, folder)
    monkeypatch.setattr(language, "peak_memory", lambda *_: 1.0)

    def report_here(*arguments):
        status, output = run_here("6_evaluate_report.py", *arguments, cwd=folder)
        path = folder / "results" / "final_report.json"
        return status, output, by_name(helpers.read_json(path)) if path.is_file() else {}

    return folder, report_here


def test_the_script_makes_keeps_and_drops_the_row(run):
    folder, report_here = run
    status, output, rows = report_here()
    assert status == 0, output
    names = list(rows)
    assert names[names.index("llama") + 1] == "llama_as_shipped" and rows["llama"]["published_as"]["file"] == "tiny.Q4_1.gguf"
    row = rows["llama_as_shipped"]
    assert (row["status"], row["size_mb"], row["perplexity"]) == ("measured", 0.02, rows["llama"]["perplexity"])
    assert "llama_as_shipped is what every compressed model has to beat" in output and "llama_w8a8 is dominated" in output
    assert "# llama\n" in (folder / "models" / "llama" / "README.md").read_text()  # the card is the model's

    again = report_here()[2]  # nothing is measured, and it is still there
    assert again == rows
    status, output, _ = report_here("--from_json", "True")
    assert status == 0 and "llama_w8a8 is dominated" in output

    (folder / "zero_shot_data").mkdir()
    problem = {"question": "What is it?", "choices": {"text": ["this", "that"], "label": ["A", "B"]}, "answerKey": "A"}
    (folder / "zero_shot_data" / "arc_easy.jsonl").write_text(2 * (json.dumps(problem) + "\n"))
    status, output, asked = report_here("--zero_shot", "arc_easy", "piqa")
    assert status == 0 and "piqa is left out: zero_shot_data/piqa.jsonl is not there" in output and "perplexity and KL" not in output
    assert len(asked["llama_w8a8"]["zero_shot"]["arc_easy"]["right"]) == 2 and "zero_shot" not in asked["llama_as_shipped"]
    assert 0 < asked["llama_w8a8"]["zero_shot"]["arc_easy"]["against"]["p_holm"] <= 1
    assert asked["llama"]["losses"] == rows["llama"]["losses"] and asked["llama"]["zero_shot"]["arc_easy"]["against"] is None
    assert "piqa was not asked" in (folder / "results" / "final_report.md").read_text().replace("\\", "")
    assert report_here()[2] == asked  # it stays
    assert "'squad' is no task" in report_here("--zero_shot", "squad")[1]

    path = folder / "models" / "llama" / "manifest.json"
    path.write_text(json.dumps({key: value for key, value in helpers.read_json(path).items() if key != "published_as"}))
    status, output, rows = report_here()
    assert status == 0 and "llama_as_shipped" not in rows and "dominated" not in output
    assert rows["llama"]["status"] == "measured" and "published_as" not in rows["llama"]


def test_a_broken_model_has_no_row_of_its_file_and_one_that_cannot_be_measured_has_an_empty_one(run):
    folder, report_here = run
    weights = folder / "models" / "llama" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8] + b"\xff" * 8)
    status, output, rows = report_here()
    assert status == 0 and rows["llama"]["status"] == rows["llama_as_shipped"]["status"] == "broken", output
    assert rows["llama_as_shipped"]["error"].startswith("it has the quality of llama: ")
    weights.write_bytes(content[:100])
    status, output, rows = report_here()
    assert status == 0 and rows["llama"]["status"] == "broken" and "llama_as_shipped" not in rows, output


def test_its_name_is_taken(run):
    folder, report_here = run
    shutil.copytree(folder / "models" / "llama", folder / "models" / "llama_as_shipped")
    status, output, _ = report_here()
    assert status == 1 and "models/llama_as_shipped has the name of the file that llama was published as: rename it" in output
    shutil.move(folder / "models" / "llama_as_shipped", folder / "mine")
    status, output, _ = report_here("--models", "llama_as_shipped=mine")
    assert status == 1 and "llama_as_shipped is the name of a model of the pipeline" in output


def test_rows_are_not_changed_by_being_told(shipped):
    before = copy.deepcopy(shipped)
    sentences(shipped), warnings(shipped), goals({**shipped, "benchmarks": {}})
    assert shipped == before

"""Any labelled table: what is read of it, what is refused, and how it is split."""

import random
import tracemalloc

import pytest
from labelled_tables import topic_rows, write_table

from compactmind.data import Sentence, check_row, stable_share
from compactmind.errors import CompactMindError
from compactmind.labelled import Columns, Part, key_of, names_of, read_file, read_part, split, to_sentences

COLUMNS = Columns(("body",), ("topic",))


# --------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_is_read_alike(tmp_path, suffix):
    rows = topic_rows(8)
    part = read_file(write_table(tmp_path / f"t{suffix}", rows), Columns(("body",), ("topic",), ("claim",)))
    assert part.rows == [(row["body"], row["claim"], row["topic"]) for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_suffix_in_capitals_is_the_same_suffix(tmp_path, suffix):
    rows = topic_rows(8)
    written = write_table(tmp_path / f"t{suffix}", rows)
    part = read_file(written.rename(tmp_path / f"T{suffix.upper()}"), Columns(("body",), ("topic",)))
    assert part.rows == [(row["body"], None, row["topic"]) for row in rows]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([3, 1, 10, 3], ("1", "3", "10")), (["b", "a", "B", "a"], ("B", "a", "b")), ([1.0, 0.0, 1.0, None], ("0", "1")),
        ([True, False, True, False], ("false", "true")), ([-1, 1, 1, -1], ("-1", "1")),
    ],
)  # fmt: skip
def test_labels_are_words_or_whole_numbers_in_their_order(tmp_path, values, names):
    rows = [{"text": f"row {index}", "label": value} for index, value in enumerate(values * 3)]
    part = read_file(write_table(tmp_path / "t.parquet", rows), Columns())
    assert names_of(part) == names
    assert [names[s.label] for s in to_sentences(part, names)] == [label for *_, label in part.rows]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["1.0", "0.0", "", "-1.0", "12."], ["1", "0", "-1", "12"]), (["true", "False", "TRUE"], ["true", "false", "true"]),
        (["0.5", "low", "2.0", "v1.0", "1.0.0"], ["0.5", "low", "2", "v1.0", "1.0.0"]),
    ],
)  # fmt: skip
def test_a_label_is_the_same_class_in_every_kind_of_file(tmp_path, suffix, values, labels):
    rows = [{"text": f"row {index}", "label": value} for index, value in enumerate(values)]
    assert [label for *_, label in read_file(write_table(tmp_path / f"t{suffix}", rows), Columns()).rows] == labels


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_column_of_numbers_with_fractions_is_no_column_of_classes(tmp_path, suffix, as_text):
    values = [None, 1.0, 0.5, 2.5, 5.0]
    rows = [{"text": f"row {i}", "label": v if v is None or not as_text else str(v)} for i, v in enumerate(values * 9)]
    with pytest.raises(CompactMindError, match=f"t{suffix}, row 3: the label 0.5 is a number with a fraction, no class"):
        read_file(write_table(tmp_path / f"t{suffix}", rows), Columns())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a", "topic": "x"}, "t.csv has no column body, only text, topic: choose one with --text_column"),
        ({"body": "a", "kind": "x"}, "t.csv has no column topic, only body, kind: choose one with --label_column"),
        ({"body": 5, "topic": "x"}, "row 1: the text is of type int: '5'"),
        ({"body": "a\ud83d", "topic": "x"}, "row 1: half a surrogate pair"),
        ({"body": "a", "topic": 2.5}, "row 1: the label 2.5 is a number with a fraction"),
        ({"body": "a", "topic": ["x", "y"]}, "row 1: the label is several values"),
        (["a"], "row 1: expected an object with columns, found list"),
    ],
)
def test_what_cannot_be_meant_is_one_line(row, expected):
    with pytest.raises(CompactMindError) as caught:
        read_part("t.csv", [row], COLUMNS)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_rows_that_say_nothing_are_counted_and_left_out():
    rows = topic_rows(6) + [{"body": " ", "topic": "law"}, {"body": None, "topic": "law"}, {"body": "a", "topic": ""}]
    part = read_part("t.csv", rows, COLUMNS)
    assert len(part.rows) == 6 and part.warnings() == [
        "2 rows of t.csv without a text are left out, the first is row 7",
        "1 row of t.csv without a label is left out, the first is row 9",
    ]
    pairs = read_part("t.csv", [{"body": "a", "claim": "", "topic": "x"}], Columns(("body",), ("topic",), ("claim",)))
    assert pairs.rows == [] and pairs.left_out == {"a second text": 1}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["x"] * 9, "one class only ('x')"), ([str(number / 7) for number in range(9)], "9 different values in 9 rows")],
)
def test_what_is_no_column_of_classes_is_refused(labels, expected):
    with pytest.raises(CompactMindError) as caught:
        names_of(Part("t.csv", [(f"text {number}", None, label) for number, label in enumerate(labels)]))
    assert expected in str(caught.value)


def refusal(**tables) -> str:
    """Return the message with which the rows of these tables are refused."""
    with pytest.raises(CompactMindError) as caught:
        split(parts(**tables))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_error_says_what_was_left_out_before_it():
    rows = topic_rows(80)
    assert refusal(train=rows, test=rows) == (
        "the train split (given) has 0 rows of fewer than two classes: more rows are needed (80 rows of train are left out, because a "
        "held-out row asks the same)"
    )
    assert refusal(train=[{**row, "body": " "} for row in rows]) == (
        "train.csv has rows of one class only (none): two are needed (80 rows of train.csv without a text are left out, the first is row 1)"
    )
    some = rows[:40] + [{**row, "topic": ""} for row in rows[40:]]
    assert refusal(train=rows, test=[{**row, "body": f"{row['body']} b"} for row in some if row["topic"] in ("", "law")]).endswith(
        "more rows are needed (40 rows of test.csv without a label are left out, the first is row 11)"
    )


def test_an_error_shows_the_beginning_of_a_long_label_and_of_a_long_column():
    long, rows = "a long label\n" * 9_000, topic_rows(80)
    beginning = repr(long[:57] + "...")
    assert f"one class only ({beginning})" in refusal(train=[{**row, "topic": long} for row in rows])
    assert f"80 different values in 80 rows ({beginning}, " in refusal(train=[{**r, "topic": f"{long}{i}"} for i, r in enumerate(rows)])
    assert f"has the label {beginning} (1 row" in refusal(train=rows, test=[{**rows[0], "topic": long}])
    assert f"they have {beginning}, 'law'" in refusal(
        train=[{**row, "topic": (long, "law")[i % 2]} for i, row in enumerate(rows)], test=[{**rows[0], "topic": "x"}]
    )
    assert len(refusal(train=[{"x": "1", long: "2"}])) < 200  # a table without a header
    with pytest.raises(CompactMindError) as caught:
        check_row("a.csv, row 1", {"text": "good", "label": long})
    assert str(caught.value) == f"a.csv, row 1: label {repr(long)[:57]}... is not 0 (negative) or 1 (positive): 'good'"


# ------------------------------------------------------------------------------------------------------------- splitting
def parts(**rows) -> dict[str, Part]:
    return {name: read_part(f"{name}.csv", part, COLUMNS) for name, part in rows.items()}


def test_what_is_not_given_is_split_off_and_a_row_never_changes_its_split():
    rows = topic_rows(400)
    task, splits, said = split(parts(train=rows))
    assert task.labels == ("food", "law", "space", "sport") and not task.pairs and said == []
    assert sum(map(len, splits.values())) == 400 and 20 <= len(splits["test"]) <= 60 and 20 <= len(splits["validation"]) <= 60
    where = {sentence.text: name for name, part in splits.items() for sentence in part}
    again = split(parts(train=topic_rows(100, seed=5) + rows[::-1][:300]))[1]
    assert all(where.get(sentence.text, name) == name for name, part in again.items() for sentence in part)
    with_test = split(parts(train=rows, test=topic_rows(40, seed=9)))[1]
    assert [s.text for s in with_test["test"]] == [row["body"] for row in topic_rows(40, seed=9)]
    assert 20 <= len(with_test["validation"]) <= 60


def test_rows_that_share_their_first_text_stay_together():
    columns = Columns(("premise",), ("topic",), ("claim",))
    rows = [{"premise": f"premise {number // 4}", "claim": f"claim {number}", "topic": "ab"[number % 2]} for number in range(400)]
    task, splits, _ = split({"train": read_part("t.csv", rows, columns)})
    premises = [{sentence.text for sentence in part} for part in splits.values()]
    assert task.pairs and sum(map(len, premises)) == 100 and sum(map(len, splits.values())) == 400


def test_nothing_that_is_asked_is_trained_on_and_repeats_are_said():
    rows = topic_rows(80)
    train = rows + [rows[0], {**rows[1], "topic": "food"}, *topic_rows(3, seed=9)]
    _, splits, said = split(parts(train=train, validation=topic_rows(20, seed=8), test=topic_rows(20, seed=9)))
    assert len(splits["train"]) == 80 and len(splits["test"]) == 20
    assert said == [
        "1 row of train is left out, because an earlier row is the same",
        "1 row of train is left out, because an earlier row is the same with another label",
        "3 rows of train are left out, because a held-out row asks the same",
    ]
    assert key_of(Sentence(":-)", 0)) != key_of(Sentence(":-(", 0))  # texts without words are not all the same


def test_training_rows_that_differ_in_punctuation_or_case_are_kept_and_none_of_them_is_held_out(tmp_path):
    pairs = [("C", "C++"), ("ok :)", "ok :("), ("us", "US")]
    rows = [{"body": text, "topic": topic} for pair in pairs for text, topic in zip(pair, ("food", "law"), strict=True)]
    rows += [{"body": " C ", "topic": "food"}]
    train = read_file(write_table(tmp_path / "t.csv", rows), COLUMNS)
    held_out = parts(**{name: topic_rows(20, seed=len(name), topics=("food", "law")) for name in ("validation", "test")})
    _, splits, said = split({"train": train, **held_out})
    assert [s.text for s in splits["train"]] == [text for pair in pairs for text in pair]
    assert said[0] == "1 row of train is left out, because an earlier row is the same"
    held_out["test"].rows += [("c#", None, "food"), ("OK", None, "law")]
    assert [s.text for s in split({"train": train, **held_out})[1]["train"]] == ["us", "US"]


def test_rows_that_differ_in_punctuation_are_never_on_two_sides_of_a_split():
    text = next(text for number in range(999) if stable_share(text := f"the only one {number}") < 0.1)
    rows = [*topic_rows(200, topics=("food", "law")), {"body": f"{text} :)", "topic": "food"}, {"body": f"{text} :(", "topic": "space"}]
    _, splits, _ = split(parts(train=rows))
    assert [s.text for s in splits["train"] if text in s.text] == [f"{text} :)", f"{text} :("]  # the one row of space is trained on
    keys = [{key_of(sentence) for sentence in part} for part in splits.values()]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2]) and sum(map(len, splits.values())) == 202


def test_a_label_that_the_training_rows_lack_is_refused():
    test = topic_rows(8, seed=9) + [{"body": "new", "topic": "art"}] * 2
    with pytest.raises(CompactMindError) as caught:
        split(parts(train=topic_rows(80), test=test))
    assert str(caught.value) == (
        "test.csv has the label 'art' (2 rows, the first is row 9), which the training rows lack: they have 'food', 'law', 'space', 'sport'"
    )
    numbers = [{**row, "topic": str(1 + number % 2)} for number, row in enumerate(topic_rows(80))]
    with pytest.raises(CompactMindError, match="label '0'"):  # a name is no index
        split(parts(train=numbers, test=[{"body": "a", "topic": "0"}, {"body": "b", "topic": "1"}]))


@pytest.mark.parametrize("lowest", [0.0, 0.1, 0.2], ids=["as_test", "as_validation", "as_train"])
def test_a_class_of_one_row_is_trained_on_and_said_to_be_rare(lowest):
    text = next(text for number in range(999) if lowest <= stable_share(text := f"the only one {number}") < lowest + 0.1)
    rows = [*topic_rows(200, topics=("food", "law")), {"body": text, "topic": "space"}]
    task, splits, said = split(parts(train=rows))
    assert [s.label for s in splits["train"]].count(2) == 1
    assert not any(s.label == 2 for name in ("validation", "test") for s in splits[name])
    assert "few training rows: space 1: hardly enough to learn from" in said
    assert "validation has no row of space" in said and "test has no row of space" in said


def test_a_large_majority_is_said():
    rows = topic_rows(400, topics=("food",)) + topic_rows(60, seed=1, topics=("law",))
    assert any(line.endswith("of train is food: always saying that is as accurate, so look at macro-F1 beside accuracy")
               for line in split(parts(train=rows))[2])  # fmt: skip


def test_too_few_rows_to_hold_out_ask_for_more_or_a_file():
    with pytest.raises(CompactMindError, match="more rows are needed, or a file of its own"):
        split(parts(train=topic_rows(8)))


def test_long_rows_cost_little():
    rows = [{"body": " ".join(random.Random(row).choices("abcdefgh", k=50_000)), "topic": "xy"[row % 2]} for row in range(12)]
    tracemalloc.start()
    split(parts(train=rows, test=rows[:4], validation=rows[4:8]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # 4 MB of text

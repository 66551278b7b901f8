"""Tables of four topics, with which tests of labelled data begin, and the files they lie in."""

import csv
import json
import random

import helpers
import pandas

TOPICS = {"food": ["bread", "soup"], "law": ["court", "judge"], "space": ["moon", "star"], "sport": ["goal", "team"]}


def topic_rows(count: int, seed: int = 0, topics=tuple(TOPICS)) -> list[dict]:
    """Return different rows with body, claim and topic, topics in turn."""
    source = random.Random(seed)
    rows = []
    for number in range(count):
        topic = topics[number % len(topics)]
        words = source.choices(helpers.NEUTRAL, k=6) + source.choices(TOPICS[topic], k=2)
        rows.append({"body": f"{' '.join(words)} {seed}x{number}", "claim": f"it is about {source.choice(words)}", "topic": topic})
    return rows


def write_table(path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path

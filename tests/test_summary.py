"""What a report opens with: the best at each size, at most five sentences that follow from the numbers, and a picture."""

import itertools

import matplotlib.pyplot as plt
import pytest

from compactmind.report.encoder_figures import accuracy_against_gflops, model_comparison, training_curves
from compactmind.report.opening import opening
from compactmind.report.style import COLOURS, colours_of, families, marker_of, name_points, overlap
from compactmind.report.summary import MOST, best_at_each_size, opening_sentences


def classifier(name: str, accuracy: float, size: float, p: float | None, speedup: float | None = 1.0, **changes) -> dict:
    times = {"median_ms": 10.0, "low_ms": 9.0, "high_ms": 11.0, "speedup": speedup}
    row = {
        "name": name, "track": "encoder", "status": "measured", "kind": "dense", "accuracy": accuracy, "rows": 500,
        "accuracy_interval": [accuracy - 0.02, accuracy + 0.02], "size_mb": size, "latency": {"batch_32": times} if speedup else {},
        "mcnemar_against_reference": None if p is None else {"p_value": p / 2, "p_holm": p}, "gflops": 1.0, "stage": {},
    }  # fmt: skip
    return row | changes


def language(name: str, ratio: float, size: float, half: float = 0.01, prefill: float | None = 1.0, **changes) -> dict:
    phases = {"prefill": {"median_ms": 100.0, "speedup": prefill}, "decode": {"median_ms": 8.0, "speedup": 1.1}}
    row = {
        "name": name, "track": "llm", "status": "measured", "kind": "grouped", "perplexity": 20 * ratio, "size_mb": size,
        "perplexity_interval": [19 * ratio, 21 * ratio], "against_dense": {"ratio": ratio, "interval": [ratio - half, ratio + half]},
        "compared_with": "llama", "protocol": {"windows": 16, "text": "a text"}, "generation": phases if prefill else None, "stage": {},
    }  # fmt: skip
    return row | changes


DENSE = language("llama", 1.0, 200.0, 0.0, kind="dense")
REFERENCE = classifier("student", 0.90, 80.0, None)


def report_of(*rows: dict) -> dict:
    settings = {"latency_batches": [1, 32]}
    return {"models": list(rows), "references": {"encoder": "student", "llm": "llama"}, "settings": settings}


def test_the_best_at_each_size_is_what_no_smaller_one_is_as_good_as():
    sizes = {"large": (9.0, 5.0), "same": (9.0, 5.0), "middle": (5.0, 4.0), "beaten": (6.0, 4.0), "twin": (5.0, 3.0), "small": (2.0, 1.0)}
    rows = {name: {"size_mb": size, "quality": quality} for name, (size, quality) in sizes.items()}
    assert best_at_each_size(rows, lambda row: row["quality"]) == ["small", "middle", "large"]


def test_the_smallest_classifier_that_is_no_worse_and_the_fastest_of_them():
    rows = classifier("tiny", 0.80, 10.0, 0.001, 9.0), classifier("small", 0.89, 20.0, 0.4, 1.5), classifier("quick", 0.89, 30.0, 0.3, 4.0)
    first, second = opening_sentences(report_of(REFERENCE, *rows))
    assert first == (
        "The smallest classifier that is no worse than student (90.0%) as far as 500 test rows can tell is small with 89.0% [87.0%, "
        "91.0%], not distinguishable (p = 0.2, 0.4 among all rows): it takes 20.0 MB instead of 80.0 and is 1.50x faster at batch 32."
    )
    assert second.startswith("The fastest of them is quick with 89.0%") and "4.00x faster than student at batch 32, 30.0 MB" in second


def test_a_better_classifier_counts_and_is_called_better():
    (text,) = opening_sentences(report_of(REFERENCE, classifier("better", 0.95, 20.0, 0.001, None)))
    assert "is better with 95.0%" in text and "better (p = 0.0005, 0.001 among all rows): it takes 20.0 MB instead of 80.0." in text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (classifier("tiny", 0.8, 10.0, 0.001),
         "Every classifier smaller than student (90.0%), 80.0 MB, is measurably worse than it; the most"),
        (classifier("big", 0.91, 99.0, 0.6), "No classifier smaller than student (90.0%), 80.0 MB, was measured; the most accurate of the "
         "others is big with 91.0% [89.0%, 93.0%], 99.0 MB, as fast at batch 32, not distinguishable (p = 0.3, 0.6 among all rows)."),
    ],
)  # fmt: skip
def test_without_a_smaller_classifier_as_good_it_says_so(row, expected):
    assert opening_sentences(report_of(REFERENCE, row))[0].startswith(expected)


def test_language_models_at_each_size():
    rows = [language("equal", 1.002, 90.0), language("worse", 1.05, 60.0, prefill=2.5), language("beaten", 1.2, 70.0),
            language("worst", 1.4, 40.0)]  # fmt: skip
    first, second, third = opening_sentences(report_of(DENSE, *rows))
    assert first == (
        "The smallest language model that is no worse than llama as far as 16 windows can tell is equal: 90.0 MB instead of 200.0, "
        "perplexity +0.20% [-0.80%, +1.20%], not distinguishable from it, 125 tokens/s against 125."
    )
    assert second.startswith("Smaller ones are measurably worse; the best at each size, by perplexity against llama: worse, 60.0 MB, +5.00")
    assert "worst, 40.0 MB" in second and "beaten" not in second and second.index("worse, 60") < second.index("worst")
    assert third.startswith("The fastest is worse: it reads a prompt 2.50x faster than llama") and third.endswith("different from it.")


def test_one_window_has_no_interval_and_tells_no_models_apart():
    alone = {"protocol": {"windows": 1, "text": "a text"}}
    text = opening_sentences(report_of(DENSE | alone, *(language(f"m{n}", 1 + n, 90.0 - n, 0.0, 2.0, **alone) for n in (1, 2))))
    assert text[0] == (
        "One window of text gives no interval: whether a language model differs from llama is not known; by perplexity against it, the "
        "best at each size: m1, 89.0 MB, +100.00%, 125 tokens/s against 125; m2, 88.0 MB, +200.00%, 125 tokens/s against 125."
    )
    assert text[1].endswith("89.0 MB and perplexity +100.00%.")
    assert not any(word in " ".join(text) for word in ("measurably", "distinguishable", "different", "["))


@pytest.mark.parametrize("without", [DENSE | {"generation": None}, DENSE | {"generation": {"decode": None}}])
def test_beside_an_untimed_model_no_times_are_told(without):
    first, *_ = opening_sentences(report_of(without, language("equal", 1.0, 90.0)))
    assert "equal: 90.0 MB" in first and "tokens/s" not in first


def test_a_model_is_told_once():
    (text,) = opening_sentences(report_of(REFERENCE, classifier("big", 0.91, 99.0, 0.6, 3.0)))
    assert "big with 91.0%" in text and "3.00x faster at batch 32" in text


def test_the_published_file_is_told_beside_the_smallest_and_is_no_candidate():
    file = language("llama_as_shipped", 1.0, 50.0, 0.0, None, kind="published")
    first, *_ = opening_sentences(report_of(DENSE, file, language("equal", 1.0, 90.0)))
    assert "is equal: 90.0 MB" in first and first.endswith("; the file that llama was published as has 50.0 MB.")


def test_if_every_smaller_one_is_worse_that_is_said_first():
    rows = [language(f"m{size}", 3 - size / 100, float(size)) for size in range(10, 100, 10)]
    first, second, *_ = opening_sentences(report_of(DENSE, *rows))
    assert first.startswith("No language model smaller than llama (200.0 MB) has its perplexity as far as 16 windows can tell.")
    assert second.count(" MB, ") == 3 and second.endswith("; and 6 smaller ones.")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([{"name": "student", "track": "encoder", "status": "not run", "command": "x"}], []),
        ([REFERENCE], ["One classifier was measured, student with 90.0% [88.0%, 92.0%], 80.0 MB: there is nothing to compare it with."]),
        ([classifier("a", 0.9, 80.0, None)],
         ["One classifier was measured, a with 90.0% [88.0%, 92.0%], 80.0 MB: there is nothing to compare it with."]),
        ([classifier("a", 0.9, 80.0, None), classifier("b", 0.8, 20.0, None)],
         ["The most accurate classifier is a with 90.0% [88.0%, 92.0%], 80.0 MB; the smallest is b with 80.0% [78.0%, 82.0%], 20.0 MB: "
          "none was compared with a reference, so whether they differ is not known."]),
        ([DENSE], ["One language model was measured, llama with perplexity 20.00 [19.00, 21.00], 200.0 MB: "
         "there is nothing to compare it with."]),
        ([language("a", 1.0, 80.0, compared_with=None, against_dense=None),
          language("b", 2.0, 20.0, compared_with=None, against_dense=None)],
         ["The best of 2 language models by perplexity is a with perplexity 20.00 [19.00, 21.00], 80.0 MB: llama, the dense one, was not "
          "measured beside them."]),
    ],
)  # fmt: skip
def test_one_model_no_baseline_nothing(rows, expected):
    report = report_of(*rows)
    assert opening_sentences(report) == expected
    assert (opening(report) is None) == (not expected)


def test_foreign_rows_are_not_put_beside_those_made_from_the_dense_model():
    other = language("my-other", 0.1, 1.0, kind="foreign", compared_with=None, against_dense=None)
    message = opening_sentences(report_of(DENSE, other, language("equal", 1.0, 90.0)))
    assert not any("my-other" in line for line in message) and "equal" in message[0]
    names = {text.get_text() for text in opening(report_of(DENSE, other)).axes[0].texts}
    assert names == {"llama"}


def test_there_are_at_most_five_sentences_and_they_stand_first_with_the_picture():
    many = [classifier(f"c{n}", 0.7 + n / 200, 10.0 + n, 0.5, 1.0 + n) for n in range(30)]
    many += [language(f"l{n}", 2 - n / 31, 10.0 + n, prefill=1.0 + n) for n in range(30)]
    text = opening_sentences(report_of(REFERENCE, *many, DENSE))
    assert len(text) == MOST == 5
    figure = opening(report_of(REFERENCE, *many, DENSE))
    assert [axes.get_title() for axes in figure.axes] == ["Classifiers: higher is better", "Language models: lower is better"]


def test_a_colour_stays_with_its_model_when_another_fails():
    rows = [classifier(f"c{n}", 0.8, 10.0, 0.5) for n in range(25)]
    before = colours_of(report_of(*rows), "encoder")
    assert len(set(before.values())) == 25 and before["c0"] == COLOURS[0]
    rows[3] = {"name": "c3", "track": "encoder", "status": "failed", "error": "x"}
    assert colours_of(report_of(*rows, DENSE), "encoder") == before
    assert marker_of({"kind": "nf4"}) != marker_of({"kind": "dense"}) and marker_of({}) == marker_of({"kind": "new"})


def test_a_family_is_what_one_run_made_in_several_sizes():
    study = {"config": {"study": {"name": "front"}}}
    rows = [language("llama_searched", 1.0, 90.0, stage=study), language("llama_front_4x", 1.0, 50.0, stage=study),
            language("llama_front_3x", 1.0, 70.0, stage=study), language("llama_gptq_3x", 1.0, 66.0),
            language("llama_gptq_4.5x", 1.0, 44.0),
            language("llama_nf4", 1.0, 60.0), language("other_2x", 1.0, 80.0)]  # fmt: skip
    result = families({row["name"]: row for row in rows}, lambda row: row["size_mb"])
    assert result == [["llama_searched", "llama_front_3x", "llama_front_4x"], ["llama_gptq_3x", "llama_gptq_4.5x"]]


@pytest.mark.parametrize("spread", [1.0, 0.05, 0.0])
def test_names_cover_neither_each_other_nor_points(spread):
    places = {f"a_long_name_{n}": (1 + spread * (n % 3), 1 + spread * n) for n in range(8)}
    figure, axes = plt.subplots(figsize=(8, 6), constrained_layout=True)
    axes.scatter(*zip(*places.values(), strict=True))
    axes.set(xlim=(0, 4), ylim=(0, 10))
    name_points(axes, places, dict.fromkeys(places, "#000000"))
    figure.canvas.draw()
    boxes = [text.get_window_extent().extents for text in axes.texts]
    assert len(boxes) >= 4 and (spread < 1 or len(boxes) == 8)
    assert not any(overlap(one, other) for one, other in itertools.combinations(boxes, 2))
    points = [axes.transData.transform(place) for place in places.values()]
    assert not any(overlap(box, (x - 1, y - 1, x + 1, y + 1)) for box in boxes for x, y in points)
    frame = axes.get_window_extent().extents
    assert all(frame[0] <= box[0] and box[2] <= frame[2] and frame[1] <= box[1] and box[3] <= frame[3] for box in boxes)
    plt.close(figure)


@pytest.mark.parametrize("draw", [training_curves, model_comparison, accuracy_against_gflops], ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("count", [2, 9])
def test_titles_and_legends_of_many_long_names_stay_on_the_page(draw, count):
    times = {"median_ms": 12.0, "low_ms": 11.0, "high_ms": 14.0}
    history = [{"epoch": epoch, "accuracy": 0.8 + epoch / 100, "sparsity": 0.4} for epoch in (1, 2)]
    rows = [
        classifier(f"student_pruned_to_{number}_gflops_w8a8", 0.8 + number / 100, 20.0 + number, 0.5, history=history, load_seconds=0.2,
                   latency={"batch_1": times, "batch_32": times})
        for number in range(count)
    ]  # fmt: skip
    figure = draw(report_of(*rows) | {"settings": {"cost_length": 16, "latency_batches": [1, 32]}})
    figure.draw_without_rendering()
    page = figure.bbox
    written = [axes.title for axes in figure.axes] + [axes.xaxis.label for axes in figure.axes] + figure.legends
    for artist in written:
        box = artist.get_window_extent()
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1, (artist, box.x0, box.x1, page.x1)

"""The report as a page, as Markdown and as TeX: they stand alone, say the same and leave out what is not there."""

import html.parser
import re

import made_up_report
import pytest
from made_up_report import search_summary

from compactmind.report import search_figures, tables
from compactmind.report.documents import escape_markdown, escape_tex, render, sections, write_documents
from compactmind.report.figures import FIGURES, draw_all
from compactmind.report.search_figures import front_line
from compactmind.report.sentences import sentences, warnings

report = made_up_report.report


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the documents of that report."""
    folder = tmp_path_factory.mktemp("written")
    write_documents(made_up_report.make_report(), folder)
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would fetch, the cells of every table, and whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.open, self.rows, self.anchors = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.fetched += [given[name] for name in ("src", "href") if name in given]
        self.anchors.add(given.get("id"))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_stands_alone_and_holds_every_number(report, tmp_path):
    report["models"][1]["name"] = "<b>pruned & co</b>"
    write_documents(report, tmp_path)
    text = (tmp_path / "final_report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(place.startswith(("data:image/png;base64,", "#")) for place in page.fetched)
    assert {place[1:] for place in page.fetched if place.startswith("#")} <= page.anchors
    assert sum(place.startswith("data:") for place in page.fetched) == len(FIGURES)
    rows = {row[0]: row for row in reversed(page.rows)}
    assert rows["<b>pruned & co</b>"][1] == "89.3% [88.0%, 92.0%]" and "<b>pruned" not in text
    assert rows["teacher"] == ["teacher", "not run: run `python 1_distill.py`"]
    assert rows["llama_w8a8"][1:6] == [
        "40.80 [37.74, 43.86]",
        "+2.00% [+1.00%, +3.00%]",
        "0.0200 [0.0180, 0.0220]",
        "1.80",
        "95.1%",
    ]
    assert all(sentence in html.unescape(text) for sentence in (*sentences(report), *warnings(report)))


def test_all_documents_say_the_same(report, written):
    texts = {name: (written / f"final_report.{name}").read_text(encoding="utf-8") for name in ("html", "md", "tex")}
    for table in (tables.encoder_table(report), tables.language_table(report)):
        for row in table.rows:
            for cell in row[1:]:
                assert escape_markdown(cell) in texts["md"] and escape_tex(cell) in texts["tex"]
                assert cell in html.unescape(texts["html"])
    pictures = re.findall(r"\]\((.*?)\)", texts["md"])
    assert len(pictures) == len(FIGURES) and all((written / name).is_file() for name in pictures)
    assert texts["tex"].count(r"\begin{table}") == texts["tex"].count(r"\end{table}") > 3
    bodies = re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", texts["tex"], re.S)
    assert bodies
    for columns, body in bodies:
        for line in body.split(r"\\")[:-1]:
            spans = sum(int(number) - 1 for number in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + spans == len(columns) - 1, line
    for line in texts["md"].splitlines():
        assert not line.startswith("| ---") or set(line) <= set("|-: ")


def test_the_front_is_what_can_be_had_at_least_that_small():
    rows = [
        {"compression_ratio": ratio, "perplexity": value}
        for ratio, value in ((2.0, 50.0), (2.2, 70.0), (2.5, 60.0), (3.0, 90.0), (3.0, 95.0))
    ]
    assert front_line(rows) == [(3.0, 90.0), (2.5, 90.0), (2.5, 60.0), (2.0, 60.0), (2.0, 50.0)]
    alike = [{"compression_ratio": ratio, "perplexity": value} for ratio, value in ((2.52422, 70.0), (2.52421, 60.0))]
    assert front_line(alike) == [(2.524, 60.0)]


def test_what_is_drawn_depends_on_the_report_alone(report, written, tmp_path):
    before = {path.name: path.read_bytes() for path in written.glob("*.png")}
    write_documents(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before and len(before) == len(FIGURES)
    report["search"] = report["smoothquant"] = None
    write_documents(report, tmp_path)
    left = {path.stem for path in tmp_path.glob("*.png")}
    assert left == {name for name in FIGURES if not name.startswith("search") and name != "alpha_curve"}


def test_a_figure_without_anything_in_it_is_left_out(report, tmp_path):
    report["search"] = search_summary(importances={}, retraining=[])
    draw_all(report, tmp_path)
    left = {path.stem for path in tmp_path.glob("*.png")}
    assert left == FIGURES.keys() - {"search_importance", "search_retraining_gain"}


@pytest.mark.parametrize("highest", [2.5e-2, 5e-2, 0.5, 5.0, 60.0])
def test_numbers_beside_a_logarithmic_axis_do_not_overlap_and_are_there(highest):
    figure, axes = search_figures._axes(title="")
    axes.plot([0, 1], [1e-2, highest])
    search_figures._log_scale(axes)
    figure.canvas.draw()
    labels = [label for minor in (False, True) for label in axes.yaxis.get_ticklabels(minor=minor) if label.get_text()]
    low, high = axes.get_ylim()
    boxes = sorted((label.get_window_extent() for label in labels if low <= label.get_position()[1] <= high), key=lambda box: box.y0)
    assert len(boxes) >= 2 and all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:], strict=False))


def test_nothing_measured_is_still_a_report(report, tmp_path):
    for row in report["models"]:
        row |= {"status": "not run", "command": "python run_pipeline.py"}
    report |= {"search": None, "smoothquant": None}
    write_documents(report, tmp_path)
    text = (tmp_path / "final_report.html").read_text(encoding="utf-8")
    assert "Nothing has been measured yet" in text and text.count("run `python run_pipeline.py`") == 6
    assert "Warnings" not in [section.title for section in sections(report, {})]


def test_tex_and_markdown_are_escaped():
    assert escape_tex(r"50% & a_b {c} \d <e> #1 ~^$") == (
        r"50\% \& a\_b \{c\} \textbackslash{}d $<$e$>$ \#1 \textasciitilde{}\textasciicircum{}\$"
    )
    assert escape_markdown("a | b_c *d* <e>\nf") == r"a \| b\_c \*d\* \<e\> f"


def test_a_table_for_the_terminal_is_aligned():
    table = tables.Table(
        "Title",
        ["model", "MB", "kernel"],
        [["a", "1.0", "int_mm"], ["longer", "10.0", "f"], ["b", "not run: run `python x.py`"]],
    )
    assert table.as_text().splitlines() == [
        "Title", "model     MB  kernel", "a        1.0  int_mm", "longer  10.0  f", "b       not run: run `python x.py`",
    ]  # fmt: skip


def test_one_document_alone(report, tmp_path):
    assert render("md", report, {}, tmp_path).startswith("# CompactMind report\n")


def test_the_picture_and_the_sentences_open_the_report(report, tmp_path):
    first = sections(report, {"opening": "a caption"})[0]
    assert first.title == "In short" and first.picture == "opening" and 0 < len(first.sentences) <= 5
    (tmp_path / "opening.png").write_bytes(b"a picture")
    for name, mark in (("html", "<img"), ("md", "](opening.png)")):
        text = html.unescape(render(name, report, {"opening": "a caption"}, tmp_path)).replace("\\", "")
        places = [text.index(mark), text.index(first.sentences[0]), text.index("Summary", text.index(first.sentences[0]))]
        assert places == sorted(places)
    assert "@media print" in render("html", report, {}, tmp_path)

"""The report as documents: HTML that stands alone, Markdown beside its pictures, the tables as TeX and CSV. All say the same.

Templates: compactmind/report/templates. What is in them is decided by `sections`.
"""

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compactmind.errors import CompactMindError
from compactmind.files import write_text_atomically
from compactmind.manifest import CARD, MANIFEST, read_manifest
from compactmind.model_card import model_card
from compactmind.origin import origin_of
from compactmind.published import describe_published
from compactmind.report import tables
from compactmind.report.as_shipped import OTHERS, as_shipped
from compactmind.report.figures import FIGURES, draw_all, model_comparison, save_figure
from compactmind.report.literature import check_llama_2
from compactmind.report.sentences import measured, sentences, warnings
from compactmind.report.summary import opening_sentences
from compactmind.report.tables import Table
from compactmind.report.zero_shot import zero_shot_sentences, zero_shot_table

TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
       "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$"}  # fmt: skip


MARKS = ("block_start_string", "block_end_string", "variable_start_string", "variable_end_string", "comment_start_string",
         "comment_end_string")  # fmt: skip


@dataclass
class Section:
    """A part of the report: sentences, then tables, then figures (names in FIGURES)."""

    title: str
    sentences: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    picture: str | None = None
    """A figure that stands before the sentences."""


def sections(report: dict[str, Any], drawn: dict[str, str]) -> list[Section]:
    """Return the parts of the report in order; `drawn`: the figures there are, name -> caption."""
    checked, file = check_llama_2(report), as_shipped(report)
    languages = [describe_published(file["compared_with"], file["published_as"])] if file else []
    search_figures = [name for name in FIGURES if name.startswith("search_")]
    all_sections = [
        Section("In short", opening_sentences(report), picture="opening" if "opening" in drawn else None),
        Section("Summary", sentences(report) or ["Nothing has been measured yet: the tables say what to run."]),
        Section("Warnings", warnings(report)),
        Section(
            "Encoder track", tables=[tables.encoder_table(report), tables.per_class_table(report), tables.confusion_table(report)],
            figures=["final_report", "model_comparison", "latency", "training_curves"],
        ),
        Section(
            "LLM track", [*languages, *([checked] if checked else []), *zero_shot_sentences(report)],
            [tables.language_table(report), zero_shot_table(report), tables.gsm8k_table(report), tables.steps_table(report)],
            ["perplexity_against_size", "divergence_against_size", "divergence_against_speed", "tensor_bits", "alpha_curve"],
        ),
        Section("Search", tables=[tables.search_table(report)], figures=search_figures),
        Section(
            "Beside the literature",
            ["Published numbers were measured by others, on other machines; a row is comparable if data, protocol and model are the same."],
            [tables.literature_table(report)],
        ),
        Section("Protocols", tables=[tables.protocols_table(report)]),
        Section("How it was made", tables=[tables.environment_table(report), tables.stages_table(report)]),
    ]  # fmt: skip
    for section in all_sections:
        section.tables = [table for table in section.tables if table is not None and table.rows]
        section.figures = [name for name in section.figures if name in drawn]
    return [section for section in all_sections if section.sentences or section.tables or section.figures or section.picture]


def escape_tex(text: str) -> str:
    """Return text that TeX prints as it is."""
    return re.sub(r"[\\&%$#_{}~^<>]", lambda match: TEX[match[0]], text)


def escape_markdown(text: str) -> str:
    """Return text that does not end a cell of a Markdown table and is no markup."""
    return re.sub(r"([|*_<>])", r"\\\1", text).replace("\n", " ")


def render(name: str, report: dict[str, Any], drawn: dict[str, str], folder: Path) -> str:
    """Return one document: `name` is html, md or tex. The pictures are read from `folder`."""

    def picture(figure: str) -> str:
        return base64.b64encode((folder / f"{figure}.png").read_bytes()).decode()

    # the braces of TeX are not those of a template
    marks = dict(zip(MARKS, ("<%", "%>", "<<", ">>", "<#", "#>"), strict=True)) if name == "tex" else {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=name == "html", undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, **marks,
    )  # fmt: skip
    environment.filters |= {"tex": escape_tex, "md": escape_markdown, "picture": picture, "anchor": anchor}
    models = {track: measured(report, track).values() for track in ("encoder", "llm")}
    rows = {track: sum(row["kind"] not in OTHERS for row in of_track) for track, of_track in models.items()}
    return environment.get_template(f"report.{name}.j2").render(
        report=report, sections=sections(report, drawn), captions=drawn, rows=rows, left=tables.LEFT
    )


def anchor(title: str) -> str:
    """Return a title as the name of a place in a page."""
    return title.lower().replace(" ", "-")


def write_documents(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every figure, write final_report.html, .md and .tex and model_comparison.csv; return the paths of the first three."""
    drawn = draw_all(report, folder)
    if "model_comparison" in drawn:
        save_figure(model_comparison(report), folder / "model_comparison.pdf")
    paths = [folder / f"final_report.{name}" for name in ("html", "md", "tex")]
    for path in paths:
        write_text_atomically(path, render(path.suffix[1:], report, drawn, folder))
    write_text_atomically(folder / "model_comparison.csv", tables.comparison_csv(report))
    return paths


def write_cards(report: dict[str, Any]) -> None:
    """Put the numbers of every measured checkpoint into the card beside it, never into a folder of another project."""
    for row in report["models"]:
        directory = Path(row["directory"] or "")
        if row["status"] == "measured" and row["directory"] and (directory / MANIFEST).is_file():
            try:
                manifest = read_manifest(directory)
                card = model_card(row["name"], manifest, row, origin_of(directory.parent, manifest), report["data"]["source"]["source"])
                write_text_atomically(directory / CARD, card)
            except (OSError, CompactMindError) as error:
                print(f"{directory / CARD} stays as it is: {error}")

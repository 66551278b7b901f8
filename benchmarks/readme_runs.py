"""The commands and the code of README and docs/ as a tiny workspace can run them, and their runs.

A part of check_readme.py, which says where this project is imported from.
"""

import importlib.util
import re
import shutil
import sys
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from readme_commands import CONFIGS, LAUNCHERS, ROOT, blocks, call_of, commands, simple_commands

SMALLER = {
    "n_trials": ["2"], "eval_windows": ["2"], "calibration_windows": ["4"], "target_compression": ["1.2"],
    "target_speedups": ["1.05", "1.1"], "gsm8k_problems": ["0"], "seq_len": ["32"], "student_layers": ["2"], "latency_repeats": ["1"],
}  # fmt: skip
"""Options whose values are for a real model -> what the tiny one gets."""
PLACES = {"/path/to/model": "models/llama", "/path/to/a/llama": "models/llama", "/path/to/folder": "models/student_distilled"}
NOT_HERE = ("--storage", "--workers", "--replay", "--profile", "--gsm8k_problems", "--zero_shot", "--track", "magnitude", "hub", "gguf")
"""A command with one of these wants a database, a hub, another profile, a package, what is not there yet, or real weights: it is only
read."""
OF_PAIRS = ("--pair ", "pairs.tsv")
"""A command with one of these wants a model of pairs: it is run when the page has made one."""
PAIR_MODEL = "own_data/pairs_models/student_distilled"
CODE_PAGES = ("README.md", "python.md", "checkpoints.md")
"""Pages whose code a newcomer can run as it stands."""


def runnable(command: str) -> list[str] | None:
    """Return what is run in place of a command of the documentation; None where it is only read."""
    words = next(simple_commands(command))
    call = None if any(word in command for word in NOT_HERE) else call_of(words)
    if call is None or not (call[0] in CONFIGS or Path(call[0]).stem in ("classify", "generate")) or words[0] in LAUNCHERS:
        return None
    script, given = call
    if script == "export_onnx.py" and importlib.util.find_spec("onnx") is None:
        return None
    replaced, name = [], None
    for word in given:
        if word == "--chat":  # the tiny tokenizer has no template for it
            continue
        if word.startswith("--"):
            name = word.removeprefix("--")
            replaced += [word, *SMALLER.get(name, [])]
        elif name not in SMALLER:
            word = next((word.replace(long, short) for long, short in PLACES.items() if long in word), word)
            word = re.sub(r'"target_compression": [\d.]+', '"target_compression": 1.2', word)
            word = re.sub(r'("method": "prune", "params": \{)(?!.*round_to)', r'\1"round_to": 8, ', word)
            replaced.append(re.sub(r'"tokens": \d+', '"tokens": 256', word))
    if any(sign in command for sign in OF_PAIRS):
        replaced = [PAIR_MODEL if word == "models/student_distilled" else word for word in replaced]
    profile = ["--profile", "smoke"] if script in CONFIGS else []
    if script.startswith("compactmind/"):
        return [sys.executable, "-m", f"compactmind.{Path(script).stem}", *replaced]
    return [sys.executable, str(ROOT / script), *profile, *replaced]


def input_of(command: str) -> str:
    """Return the file that a command reads from its standard input."""
    match = re.search(r"<\s*(\w+\.\w+)", command)
    return match.group(1) if match else "reviews.txt"


def code_of(text: str) -> str:
    """Return the Python of a page as one program, with a model and a size that are there."""
    content = "\n".join(content for language, content in blocks(text) if language == "python")
    for long, short in PLACES.items():
        content = content.replace(long, short)
    content = re.sub(r"target_compression=[\d.]+", "target_compression=1.2, seq_len=32, eval_windows=2", content)
    return 'sentences = ["a lovely film", "a dull film"]\n' + content


def fill(folder: Path) -> Path:
    """Make what a newcomer has before the first command: tiny models and text of every kind that the pages name."""
    import helpers

    from compactmind.checkpoint import silence_libraries

    silence_libraries()
    workspace = helpers.make_workspace(folder / "workspace", train_rows=300, dev_rows=50)
    helpers.add_llama(workspace, hidden_size=64, intermediate_size=128, scale=0.1)
    roberta = workspace / "local_assets" / "roberta-base"
    helpers.make_encoder("roberta", max_position_embeddings=66, vocab_size=400).save_pretrained(roberta)
    helpers.make_byte_bpe(roberta).save_pretrained(roberta)
    rows = [(each.text, ("dull", "lovely")[each.label]) for each in helpers.make_sentences(360, seed=11)]
    texts = {
        "reviews.txt": "a lovely film\n", "pairs.tsv": "a lovely film\ta dull film\n", "my_text.txt": "\n".join(text for text, _ in rows),
        "my.yaml": "2_prune_finetune:\n  target_sparsity: 0.3\n",
    }  # fmt: skip
    parts = {"train": rows[:280], "validation": rows[280:320], "test": rows[320:]}
    for split, part in parts.items():
        columns = {"topic": "text,topic", "pairs": "headline,sentence,match"}
        for task, head in columns.items():
            lines = [",".join([text, *([text[::-1]] if task == "pairs" else []), label]) for text, label in part]
            texts[f"own_data/{task}_{split}.csv"] = "\n".join([head, *lines]) + "\n"
        mine = "\n".join(["text,review,label,topic", *(f"{text},{text},{label},{label}" for text, label in part)]) + "\n"
        texts |= {"train": {"my.csv": mine}, "test": {"my_test.csv": mine}}.get(split, {})
    for name, text in texts.items():
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text(text, encoding="utf-8")
    return workspace


def run_pages(pages: list[Path]) -> bool:
    """Run what can be run, each page in a copy of a workspace that run_pipeline.py has filled; tell whether all went well.

    What an earlier page has run in just these words is not run again.
    """
    import scripts

    with TemporaryDirectory() as folder:
        fill(Path(folder))
        filled, seen = Path(folder) / "workspace", set()
        with closing(scripts.Launcher(Path(folder))) as launcher:
            well = _run(launcher, [sys.executable, str(ROOT / "run_pipeline.py"), "--profile", "smoke"], filled, "run_pipeline.py")
            for page in pages:
                text = page.read_text(encoding="utf-8")
                runs = [(command, words) for command in commands(text) if (words := runnable(command)) and tuple(words) not in seen]
                runs.sort(key=lambda each: any(sign in each[0] for sign in OF_PAIRS))
                workspace = shutil.copytree(filled, Path(folder) / page.stem)
                if "--dump_config my.yaml" in text:
                    (workspace / "my.yaml").unlink()
                for command, words in runs:
                    if tuple(words) not in seen:
                        seen.add(tuple(words))
                        well &= _run(launcher, words, workspace, f"{page.name}: {command.splitlines()[0]}", input_of(command))
                if page.name in CODE_PAGES:
                    (workspace / "page.py").write_text(code_of(text), encoding="utf-8")
                    well &= _run(launcher, [sys.executable, "page.py"], workspace, f"{page.name}: its code")
                shutil.rmtree(workspace)
    return well


def _run(launcher, words: list[str], folder: Path, name: str, stdin: str = "reviews.txt") -> bool:
    started, output = time.perf_counter(), folder / "said.txt"
    code = launcher.run(words, folder, folder / stdin, output)
    print(f"{'FAILED' if code else 'ran':<7}{time.perf_counter() - started:6.0f} s  {name[:110]}", flush=True)
    if code:
        print("        " + (output.read_text(encoding="utf-8").strip().splitlines() or ["without a word"])[-1], flush=True)
    return not code

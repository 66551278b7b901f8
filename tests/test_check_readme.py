"""What README and docs/ tell a newcomer to do can be done: every command, piece of code and link is read (benchmarks/check_readme.py)."""

import runpy
import sys
from contextlib import closing
from types import SimpleNamespace

import helpers
import pytest
import readme_runs
import scripts

check = SimpleNamespace(**runpy.run_path(str(helpers.REPOSITORY / "benchmarks" / "check_readme.py")), **{
    name: getattr(readme_runs, name) for name in ("runnable", "PAIR_MODEL", "input_of", "code_of")
})  # fmt: skip


@pytest.mark.parametrize("page", check.PAGES, ids=[page.name for page in check.PAGES])
def test_every_command_piece_of_code_and_link_of_a_page_leads_somewhere(page):
    assert check.problems_of_page(page) == []


def test_the_readme_can_be_read_in_ten_minutes_and_every_page_is_in_the_index():
    assert len((helpers.REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    pages = {page.name for page in (helpers.REPOSITORY / "docs").glob("*.md")} - {"index.md"}
    index = (helpers.REPOSITORY / "docs" / "index.md").read_text(encoding="utf-8")
    assert [name for name in sorted(pages) if f"]({name})" not in index] == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](nowhere.md)", "a link leads to nowhere.md, which is not there"),
        ("[a](docs/methods.md#no-such)", "methods.md has no such heading"),
        ("```bash\npython 7_fly.py\n```", "there is no 7_fly.py"),
        ("```bash\npython 2_prune_finetune.py --target_sparcity 0.1\n```", "has no option --target_sparcity"),
        ("```bash\npython 2_prune_finetune.py --target_sparsity 3\n```", "target_sparsity 3 is not in [0, 1)"),
        ("```bash\npython 2_prune_finetune.py \\\n    --criterion magic\n```", "unknown criterion 'magic'"),
        ("```bash\npython 5_bayesian_search.py --pipeline '[\n{\"method\": \"melt\"}]'\n```", "unknown method 'melt'"),
        ("```bash\npython 1_distill.py && python 3_quantize.py --methd nf4\n```", "has no option --methd"),
        ("```bash\naccelerate launch --mixed_precision bf16 9.py\n```", "there is no 9.py"),
        ("```bash\n./run.sh --profile big\n```", "unknown profile 'big'"),
        ("```bash\npip install '.[fly]'\n```", "there is no extra fly"),
        ("```bash\npip install -r requirements-fly.txt\n```", "there is no requirements-fly.txt"),
        ("```bash\nflyctl deploy\n```", "unknown program 'flyctl'"),
        ("```bash\npython classify.py --modle x\n```", "classify.py has no option --modle"),
        ("```bash\npython -m compactmind.clasify\n```", "there is no compactmind/clasify.py"),
        ("```bash\npython benchmarks/bits.py --colour 3\n```", "benchmarks/bits.py has no option --colour"),
        ("Do `python 3_quantize.py\n--methode int8` then", "has no option --methode"),
        ("```python\nfrom compactmind.checkpoint import fly\n```", "compactmind.checkpoint has no fly"),
        ("```python\nx = = 1\n```", "line 1 of the code: invalid syntax"),
        ("```\npython 1_distill.py\n```", "a block of commands says no language"),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |\n", "a row of a table stands alone: | 3 | 4 |"),
        ("```yaml\n2_prune_finetune:\n  lrr: 1\n```", "did you mean lr?"),
    ],
)
def test_what_a_newcomer_could_not_do_is_found(text, said):
    result = check.problems_of_page(helpers.REPOSITORY / "README.md", text)
    assert len(result) == 1 and said in result[0]


def test_commands_are_run_with_what_a_tiny_model_can_take():
    words = check.runnable(
        "python 5_bayesian_search.py --strategy fixed --calibration_windows 32 --model_path /path/to/model --output models/x "
        '--pipeline \'[{"method": "gptq", "params": {"target_compression": 3}}]\'   # a comment'
    )
    assert words[2:] == [
        "--profile", "smoke", "--strategy", "fixed", "--calibration_windows", "4", "--model_path", "models/llama", "--output",
        "models/x", "--pipeline", '[{"method": "gptq", "params": {"target_compression": 1.2}}]',
    ]  # fmt: skip
    pruned = check.runnable("python 5_bayesian_search.py --pipeline '[{\"method\": \"prune\", \"params\": {\"sparsity\": 0.2}}]'")
    assert pruned[-1] == '[{"method": "prune", "params": {"round_to": 8, "sparsity": 0.2}}]'
    assert check.runnable("python 2_prune_finetune.py --target_speedups 2 4 --epochs 3")[-4:] == ["1.05", "1.1", "--epochs", "3"]
    assert check.runnable("python download_model.py --source hub") is None
    assert check.runnable("torchrun --nproc_per_node 2 1_distill.py") is None
    assert check.runnable('python classify.py "a < b" < reviews.txt')[2:] == ["a < b"]
    assert check.runnable('python -m compactmind.generate --chat "Why?"')[1:] == ["-m", "compactmind.generate", "Why?"]
    pair = 'python classify.py --model models/student_distilled "the premise" --pair "the hypothesis"'
    assert check.runnable(pair)[2:4] == ["--model", check.PAIR_MODEL]
    assert check.input_of("python classify.py --json < pairs.tsv > out.jsonl") == "pairs.tsv"
    assert check.input_of("python classify.py a") == "reviews.txt"


def test_the_code_of_a_page_is_one_program_for_what_is_there():
    page = "```python\nx = compress('/path/to/model', target_compression=3)\n```\nthen\n```python\nx.manifest\n```\n```bash\nls\n```"
    _, first, _, second = check.code_of(page).splitlines()
    assert first == "x = compress('models/llama', target_compression=1.2, seq_len=32, eval_windows=2)" and second == "x.manifest"


def test_commands_run_as_forks_end_and_speak_as_they_would_alone(tmp_path):
    (tmp_path / "told.txt").write_text("a line\n", encoding="utf-8")
    (tmp_path / "echo.py").write_text("import os, sys\nprint(input(), os.getcwd(), sys.argv[1:])\nsys.exit('no more')", encoding="utf-8")
    said = tmp_path / "said.txt"
    with closing(scripts.Launcher(tmp_path)) as launcher:
        script = [sys.executable, str(tmp_path / "echo.py"), "--a", "b"]
        assert launcher.run(script, tmp_path, tmp_path / "told.txt", said) == 1
        assert said.read_text(encoding="utf-8") == f"a line {tmp_path} ['--a', 'b']\nno more\n"
        module = [sys.executable, "-m", "compactmind.classify", "--modle"]
        assert launcher.run(module, tmp_path, tmp_path / "told.txt", said) == 2
        assert "unrecognized arguments: --modle" in said.read_text(encoding="utf-8")

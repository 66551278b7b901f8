"""Put a checkpoint on the hub, with its card; unless told to, say what would be put there.

Run:   python publish.py --model models/student_pruned_w8a8 --repository me/small-sentiment
       python publish.py --model models/student_pruned_w8a8 --repository me/small-sentiment --push True      (hf auth login first)
Reads: any directory under models/ that this project has written; every file is compared with its recorded SHA-256
Writes: nothing here; with --push True the repository, private unless --private False, which is made if it is not there
"""

import argparse
from pathlib import Path

from huggingface_hub import HfApi

from compactmind.checkpoint import silence_libraries
from compactmind.console import errors_in_one_line
from compactmind.errors import CompactMindError
from compactmind.manifest import ADDED_LATER, read_manifest
from compactmind.origin import origin_of

TRUTH = {"True": True, "False": False}


def files_of(directory: Path) -> list[Path]:
    """Return what belongs to a checkpoint: the files its manifest vouches for, and what this project adds to one later."""
    manifest = read_manifest(directory, verify=True)
    return [directory / name for name in (*sorted(manifest["files"]), *ADDED_LATER) if (directory / name).is_file()]


def publish(directory: Path, repository: str, push: bool, private: bool) -> None:
    """Print what belongs to a checkpoint and push it if told to. Raises CompactMindError."""
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise CompactMindError(f"repository {repository!r} is no name of the hub: give owner/name")
    files, origin = files_of(directory), origin_of(directory.parent, read_manifest(directory))
    for file in files:
        print(f"{file.stat().st_size / 1e6:10.2f} MB  {file.relative_to(directory)}")
    if origin is None or origin.licence is None:
        whose = origin.name or origin.source if origin else "what it was made from"
        print(f"the licence of {whose} is not known here: look whether it lets you publish this, and write it into {directory}/README.md")
    else:
        print(f"licence {origin.licence}, as {origin.name}")
    to = f"{repository}, {'private' if private else 'public'}"
    if not push:
        print(f"would be pushed to {to}; nothing was: --push True does it")
        return
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        names = [file.relative_to(directory).as_posix() for file in files]
        commit = api.upload_folder(repo_id=repository, folder_path=directory, allow_patterns=names, commit_message=f"{directory.name}")
    except Exception as error:  # noqa: BLE001  no network, no login, not allowed: each is an error class of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CompactMindError(f"{repository} could not be written ({reason}): `hf auth login` first?") from None
    print(f"pushed to {to}: {commit}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--repository", required=True, help="owner/name on the hub")
    parser.add_argument("--push", choices=TRUTH, default="False", help="push it; else say what would be pushed")
    parser.add_argument("--private", choices=TRUTH, default="True", help="whether a new repository is private")
    args = parser.parse_args(arguments)
    silence_libraries()
    with errors_in_one_line():
        publish(args.model, args.repository, TRUTH[args.push], TRUTH[args.private])


if __name__ == "__main__":
    main()

"""How a script reads its command line, shows its settings, checks them and runs. Standard library only, until a stage runs."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from compactmind.settings import setting_problem, without_password

Config = TypeVar("Config")


def parse_command_line(config: Config) -> Config:
    """Return `config` (a config dataclass of common.py) overridden by `--field value`; `--profile NAME` swaps the defaults under the edits.

    Prints usage and exits on an unknown field or a value of the wrong type.
    """
    import tyro  # here, so that importing this needs the standard library alone

    profile = config.profile
    for position, argument in enumerate(sys.argv[1:], start=1):
        if argument == "--profile" and position + 1 < len(sys.argv):
            profile = sys.argv[position + 1]
        elif argument.startswith("--profile="):
            profile = argument.split("=", 1)[1]
    if profile != config.profile:
        untouched = type(config).for_profile(config.profile)
        edits = {f.name: getattr(config, f.name) for f in fields(config)}
        edits = {name: value for name, value in edits.items() if value != getattr(untouched, name)}
        config = type(config).for_profile(profile, **edits)
    return tyro.cli(type(config), default=config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)


def run_stage(main, config: Any, others=None) -> None:
    """Check the settings and run a script's `main(config)`; a problem the user can fix ends in one clear message, not in a traceback.

    `others(config)` is what the processes but the first do where a launcher started several: `main` itself if all share the work, None
    if the script is for one process, and then several are refused.
    """
    from compactmind.checkpoint import silence_libraries
    from compactmind.devices import (
        device_problem,
        is_main_process,
        is_worker,
        leave_the_others,
        number_of_processes,
        process_number,
    )
    from compactmind.errors import CompactMindError
    from compactmind.files import why_unwritable
    from compactmind.tracking import tracking

    silence_libraries()
    script, speaks = Path(sys.argv[0]).name, is_main_process()
    if speaks and not is_worker():  # who started it has said the same
        show(config)
    problem = setting_problem(config) or device_problem()
    if others is None and number_of_processes() > 1:
        problem = f"{script} is for one process and was started as {number_of_processes()}: run `python {script}` without a launcher"
    if problem:
        raise SystemExit(f"error: {problem}" if speaks else 0)  # 0: a launcher ends the others when one fails, the first is to speak
    try:
        with tracking(getattr(config, "track", ""), Path(script).stem, shown_settings(config), config.results_dir):
            (main if speaks else others)(config)
        leave_the_others()
    except CompactMindError as error:
        raise SystemExit(f"error: {error}" if speaks else f"error of process {process_number()}: {error}") from None
    except Exception as error:
        if reason := why_unwritable(error):  # a plot, a database: whatever does not say it better
            raise SystemExit(f"error: {reason}: {getattr(error, 'filename', None) or 'a file'} could not be written") from None
        raise
    except KeyboardInterrupt:
        message = f"\nstopped. Finished checkpoints are whole; `python {script}` goes on where this run was."
        raise SystemExit(message if speaks else 1) from None


def show(config: Any) -> None:
    """Print the resolved settings of a stage."""
    print(f"# {Path(sys.argv[0]).name}, profile {config.profile}")
    shown = (f"{name}={value}" for name, value in shown_settings(config).items() if name not in ("profile", "force", "verify"))
    print(f"# {', '.join(shown)}")


def shown_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a stage as others may see them: without the password of a database."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: without_password(value) if isinstance(value, str) else value for name, value in values.items()}

"""Workers of one machine: what each gets of it, how they end, who is dead, which machines measure together, and --workers as a user
runs it."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import helpers
import optuna
import psutil
import pytest
import scripts
from optuna.trial import TrialState

from compactmind.devices import WORKER
from compactmind.errors import CompactMindError
from compactmind.search import engine, machine, workers
from compactmind.search.engine import counted_trials, is_counted, open_study, retry_interrupted, sampler_seed, search
from compactmind.search.machine import machine_kind, recording_machine_kind, require_kind, this_worker, worker_is_alive
from compactmind.search.space import make_space
from compactmind.search.workers import Share, run_workers, shares, together_on_one_device, visible_gpus

DESCRIBED = {"model": "abc"}
SCRIPT = "5_bayesian_search.py"
posix = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@pytest.fixture
def study(tmp_path):
    return open_study("made up", f"sqlite:///{tmp_path / 'study.db'}", DESCRIBED)


@pytest.fixture
def gone():
    return this_worker() | {"started": this_worker()["started"] - 1000}


def small_space():
    choices = {"prune.sparsity": [0.1, 0.2, 0.3], "prune.criterion": ["l2"], "prune.scope": ["global"]}
    return make_space(("prune",), choices=choices | {"prune.structures": [["channels"]], "prune.blocks": [0]})


# ------------------------------------------------------------------------------------------------------------------- shares
def test_the_cores_are_shared_and_more_workers_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(workers, "number_of_cores", lambda: 7)
    assert shares(3, "cpu") == [Share(2)] * 3 and together_on_one_device(shares(3, "cpu")) == 3
    assert shares(3, "cpu")[0].environment() == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    with pytest.raises(CompactMindError, match="--workers 8 are more than the 7 cores.*at most --workers 7"):
        shares(8, "cpu")


def test_every_worker_has_a_gpu_in_turn(monkeypatch):
    monkeypatch.setattr(workers, "number_of_cores", lambda: 16)
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    assert visible_gpus({}) == ["0", "1"] and visible_gpus({"CUDA_VISIBLE_DEVICES": "5, GPU-ab"}) == ["5", "GPU-ab"]
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["5", "7"])
    planned = shares(3, "cuda")
    assert [share.gpu for share in planned] == ["5", "7", "5"] and together_on_one_device(planned) == 2
    assert planned[1].environment()["CUDA_VISIBLE_DEVICES"] == "7" and planned[1].threads == 5


def test_workers_that_disturb_each_others_times_are_refused(monkeypatch):
    monkeypatch.setattr(workers, "number_of_cores", lambda: 16)
    with pytest.raises(CompactMindError, match="--workers 2 on the same cores disturb each other.*use --workers 1"):
        shares(2, "cpu", ("perplexity", "latency"))
    monkeypatch.setattr(workers, "visible_gpus", lambda: ["0", "1"])
    assert len(shares(2, "cuda", ("latency",))) == 2
    with pytest.raises(CompactMindError, match="on the 2 GPU.*use --workers 2"):
        shares(3, "cuda", ("latency",))


# ------------------------------------------------------------------------------------------------------------ all of them
def test_lines_have_the_worker_before_them_and_one_that_dies_is_said(capfd):
    code = "import os, sys, signal; print(os.environ['COMPACTMIND_WORKER'], os.environ['OMP_NUM_THREADS'], flush=True); "
    code += "number = int(os.environ['COMPACTMIND_WORKER'][0]); number == 2 and os.kill(os.getpid(), signal.SIGKILL); sys.exit(number == 3)"
    codes = run_workers([Share(1), Share(2), Share(3)], [sys.executable, "-c", code])
    assert codes == [0, -9, 1]
    output = capfd.readouterr().out
    for line in ("[1] 1/3 1", "[2] 2/3 2", "[3] 3/3 3", "worker 2/3: 2 thread(s)"):
        assert line in output.splitlines()
    assert "worker 2 was killed by SIGKILL" in output and "worker 3 ended with status 1" in output
    assert "worker 1 " not in output


PARENT = """
import os, sys, time
sys.path.insert(0, {repository!r})
from compactmind.search import workers
child = '''
import os, sys, time
sys.path.insert(0, {repository!r})
from compactmind.search import workers
workers.begin_as_worker()
try:
    print("works", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.5)  # writes what is to be written
    open(os.path.join({folder!r}, "ended_" + os.environ["COMPACTMIND_WORKER"][0]), "w").close()
    raise SystemExit(1)
'''
try:
    workers.run_workers([workers.Share(1)] * 2, [sys.executable, "-c", child])
except KeyboardInterrupt:
    open(os.path.join({folder!r}, "interrupted"), "w").close()
"""


DEAF = """
import sys, threading, time
sys.path.insert(0, {repository!r})
from compactmind.search import workers
workers.SECONDS_TO_HEAR = 0.5
workers.begin_as_worker()

class Slow:
    def __del__(self):
        print("in a destructor", flush=True)
        time.sleep(60)

try:
    slow = Slow()
    del slow
    print("goes on", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(2)  # longer than it is given to hear: it is not told again meanwhile
    print("ends", flush=True)
"""


@posix
def test_a_worker_that_does_not_hear_the_end_is_told_again():
    code, environment = DEAF.format(repository=str(helpers.REPOSITORY)), os.environ | {workers.THREADS[0]: "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "in a destructor\n"
        child.stdin.close()
        assert child.stdout.read() == "goes on\nends\n"
        assert "Exception ignored in" in child.stderr.read()
    assert child.returncode == 0


@posix
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_however_the_first_process_ends_its_workers_end_and_each_once(tmp_path, how):
    code = PARENT.format(repository=str(helpers.REPOSITORY), folder=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, preexec_fn=scripts._heed_interrupts
    ) as parent:
        works = 0
        for line in parent.stdout:
            works += line.endswith("] works\n")
            if works == 2:
                break
        parent.send_signal(how)
        parent.wait(timeout=60)
    wanted = {"ended_1", "ended_2"} | ({"interrupted"} if how != signal.SIGKILL else set())
    until = time.monotonic() + 30
    while wanted - {path.name for path in tmp_path.iterdir()} and time.monotonic() < until:
        time.sleep(0.05)
    assert {path.name for path in tmp_path.iterdir()} == wanted


# ------------------------------------------------------------------------------------------------------------- who is dead
@posix
def test_a_zombie_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = this_worker() | {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    assert worker_is_alive(worker, 0)
    process.kill()
    until = time.monotonic() + 30
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.01)
    assert not worker_is_alive(worker, time.time())  # though its number is still given
    process.wait()


def test_a_process_of_another_container_of_this_name_is_told_by_its_signs_of_life():
    own = this_worker()
    elsewhere = own | {"place": "another boot or container"}
    assert worker_is_alive(own, 0) and worker_is_alive({name: own[name] for name in ("host", "pid", "started")}, 0)
    assert worker_is_alive(elsewhere, time.time()) and not worker_is_alive(elsewhere, time.time() - machine.DEAD_AFTER_SECONDS - 1)


def test_a_trial_that_was_taken_from_a_dead_worker_by_one_that_died_itself_is_queued_by_the_next(study, gone, monkeypatch):
    space = small_space()
    trial = study.ask()
    space.suggest(trial)
    trial.set_user_attr("worker", gone)
    trial.set_user_attr("runs", True)

    def killed(*_, **__):
        raise KeyboardInterrupt  # between the two

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", killed)
        with pytest.raises(KeyboardInterrupt):
            retry_interrupted(study)
    assert study.trials[0].state == TrialState.FAIL and len(study.trials) == 1
    assert retry_interrupted(study) == 0  # the one that took it still lives, and is about to
    by = study.trials[0].user_attrs["queued_again"]
    assert {name: by[name] for name in this_worker()} == this_worker()
    monkeypatch.setattr(engine, "worker_is_alive", lambda worker, seen_at: False)
    assert retry_interrupted(study) == 1 and retry_interrupted(study) == 0
    assert study.trials[1].state == TrialState.WAITING and study.trials[1].user_attrs["retry_of"] == 0
    assert study.trials[1].system_attrs["fixed_params"] == trial.params


def test_a_second_chance_that_had_not_begun_is_no_strike(study, gone):
    space = small_space()
    point = next(space.points())
    for begun in (True, False):
        if begun:
            study.enqueue_trial(point)
        trial = study.ask()
        space.suggest(trial)
        trial.set_user_attr("worker", gone)
        if begun:  # the second was killed before it ran anything
            trial.set_user_attr("runs", True)
        assert retry_interrupted(study) == 1
    search(study, space, 2, lambda notes, steps: [1.0], strategy="random")
    first = counted_trials(study)[0]
    assert [is_counted(trial) for trial in study.trials[:2]] == [False] * 2
    assert first.number == 2 and first.user_attrs["retry_of"] == 1 and first.state == TrialState.COMPLETE


def test_two_runs_that_were_killed_are_enough_however_often_it_was_queued(study, gone):
    space = small_space()
    study.enqueue_trial(next(space.points()))
    for begun in (False, True, False, True):  # killed before it ran anything, or after
        trial = study.ask()
        space.suggest(trial)
        trial.set_user_attr("worker", gone)
        if begun:
            trial.set_user_attr("runs", True)
        retry_interrupted(study)
    assert [is_counted(trial) for trial in study.trials] == [False, False, False, True]
    assert study.trials[3].state == TrialState.FAIL


def test_a_grid_whose_first_worker_was_killed_while_it_queued_is_run_whole(study, monkeypatch):
    space, enqueue = small_space(), optuna.Study.enqueue_trial

    def killed_at_the_second(self, point, **options):
        if self.get_trials(deepcopy=False):
            raise KeyboardInterrupt
        return enqueue(self, point, **options)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            search(study, space, 6, lambda notes, steps: [1.0], strategy="grid")
    assert len(study.trials) == 1
    for _ in range(2):  # and the second time there is nothing to queue
        search(study, space, 6, lambda notes, steps: [1.0], strategy="grid")
        assert len(study.trials) == len(counted_trials(study)) == space.size() == 3


def test_a_worker_among_others_has_a_seed_of_its_own(monkeypatch):
    ended, running = (SimpleNamespace(state=state) for state in (TrialState.COMPLETE, TrialState.RUNNING))
    assert sampler_seed(3, [ended] * 5) == 8
    seeds = set()
    for pid in range(20):
        monkeypatch.setattr(engine, "this_worker", lambda pid=pid: {"pid": pid})
        seeds.add(sampler_seed(3, [ended] * 4 + [running]))
    assert len(seeds) == 20 and all(0 <= seed + 2**20 < 2**32 for seed in seeds)


# ------------------------------------------------------------------------------------------------------- kinds of machines
def test_times_of_two_kinds_of_machines_are_not_compared(study):
    study.ask()
    require_kind(study, ("perplexity", "latency"), "CPU A, AVX2, 2 thread(s)")
    require_kind(study, ("perplexity", "latency"), "CPU A, AVX2, 2 thread(s)")
    with pytest.raises(CompactMindError, match=r"latency in the study 'made up'.*\(CPU A.*than this one \(CPU B\).*--study_name") as error:
        require_kind(study, ("perplexity", "latency"), "CPU B")
    assert "\n" not in str(error.value)
    require_kind(study, ("perplexity", "bytes"), "CPU B")  # the same on every machine


def test_trials_of_two_kinds_that_began_at_once_are_found(study):
    space, said = small_space(), []
    evaluate = recording_machine_kind(lambda notes, steps: [1.0], ("memory",), "CPU A")
    search(study, space, 1, evaluate, strategy="random", finished=said.append)
    assert said[0].user_attrs["machine"] == "CPU A"
    study.set_user_attr("machine", "CPU B")
    with pytest.raises(CompactMindError, match="memory in the study .*CPU A"):
        require_kind(study, ("memory",), "CPU B")


def test_a_kind_says_what_a_time_depends_on(monkeypatch):
    kind = machine_kind("cpu")
    assert "1 thread(s)" in kind and machine.torch.backends.cpu.get_cpu_capability() in kind
    assert "thread" not in machine_kind("cpu", threads=False)
    monkeypatch.setattr(machine.torch.cuda, "get_device_name", lambda: "NVIDIA X")
    assert machine_kind("cuda") == "NVIDIA X"


# --------------------------------------------------------------------------------------------------------------- the script
@pytest.fixture
def run_here(monkeypatch, capfd, tmp_path):
    def run(*arguments):
        return scripts.run_script_here(SCRIPT, *arguments, cwd=tmp_path, monkeypatch=monkeypatch, capfd=capfd)

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--workers", 0), ("workers 0 is not in [1, inf)",)),
        (("--workers", 100000), ("--workers 100000 are more than the", "at most --workers")),
        (("--workers", 2, "--strategy", "fixed"), ("--strategy fixed makes one model", "leave --workers out")),
        (("--workers", 2, "--replay", 3), ("--replay 3 makes one model",)),
        (("--workers", 2, "--objectives", "perplexity", "latency"), ("disturb each other", "--workers 1")),
        (("--storage", "postgresql+psycopg3://me@here/db"), ("postgresql+psycopg3",)),
    ],
    ids=str,
)
def test_workers_that_make_no_sense_are_refused_in_one_line(tmp_path, run_here, monkeypatch, arguments, expected):
    monkeypatch.setattr(workers, "number_of_cores", lambda: 2)
    helpers.add_llama(tmp_path)
    status, output = run_here(*arguments)
    assert status == 1 and all(part in output for part in expected), output
    assert "Traceback" not in output and "trial " not in output
    assert not (tmp_path / "models" / "llama_searched").exists()


def test_what_several_workers_need_together_must_be_there(tmp_path, run_here, monkeypatch):
    from compactmind import room

    monkeypatch.setattr(workers, "number_of_cores", lambda: 64)
    helpers.add_llama(tmp_path)
    status, output = run_here("--workers", 3, "--dry_run", "True")
    needed = float(output.split("memory: ")[1].split(" GB")[0])
    assert status == 0 and "by each of 3 workers" in output and needed > 0
    monkeypatch.setattr(room, "free_memory", lambda device: int(needed / 2 * 1e9))
    assert run_here("--dry_run", "True")[0] == 0  # one fits
    assert not (tmp_path / "results").exists()  # nor is there a study of what was not begun
    status, output = run_here("--workers", 3)
    assert status == 1 and "by each of 3 workers needs" in output and "fewer --workers take less" in output


@pytest.mark.slow
def test_two_workers_search_one_is_killed_and_the_first_process_finishes(tmp_path):
    helpers.add_llama(tmp_path)
    command = scripts._command(SCRIPT, ("--n_trials", 5, "--target_compression", 1.05, "--workers", 2))
    with subprocess.Popen(
        command, cwd=tmp_path, env=scripts.environment(tmp_path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        lines, killed = [], None
        for line in process.stdout:
            lines.append(line)
            if killed is None and line.startswith("[") and "to go" in line:  # a worker has finished a trial
                numbers = {child.environ()[WORKER][0]: child for child in psutil.Process(process.pid).children()}
                killed = line[1]
                numbers[killed].kill()
    output = "".join(lines)
    if "more than the" in output:
        pytest.skip("one core")
    assert process.returncode == 0, output
    assert f"worker {killed} was killed by SIGKILL" in output and "the 1 other(s) go on" in output
    summary = helpers.read_json(tmp_path / "results" / "search" / "summary.json")
    assert summary["trials"] == 5 and not summary["states"]["RUNNING"] and (tmp_path / "models" / "llama_searched").is_dir()
    study = optuna.load_study(study_name="llama-bayesian", storage=f"sqlite:///{tmp_path / 'results/search/study.db'}")
    counted = counted_trials(study)
    assert len(counted) == 5 == len({trial.user_attrs["key"] for trial in counted})
    assert len({trial.user_attrs["worker"]["pid"] for trial in study.trials if "worker" in trial.user_attrs}) == 2
    assert output.count("confirming trial") == output.count("\nconfirming trial")  # by the first process alone


@pytest.mark.slow
def test_ctrl_c_ends_all_and_the_same_command_goes_on(tmp_path, run_here):
    helpers.add_llama(tmp_path)
    arguments = ("--n_trials", 4, "--target_compression", 1.05, "--workers", 2)
    status, output = scripts.run_script_until("to go", signal.SIGINT, SCRIPT, *arguments, cwd=tmp_path)
    assert status == 1 and "ending 2 workers" in output and "goes on where this run was" in output and "Traceback" not in output, output
    study = optuna.load_study(study_name="llama-bayesian", storage=f"sqlite:///{tmp_path / 'results/search/study.db'}")
    assert not any(trial.state == TrialState.RUNNING and "runs" in trial.user_attrs for trial in study.trials), output
    status, output = run_here(*arguments)
    assert status == 0, output
    assert helpers.read_json(tmp_path / "results" / "search" / "summary.json")["trials"] == 4


def test_all_workers_failing_is_a_failure(tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(workers, "number_of_cores", lambda: 2)
    helpers.add_llama(tmp_path)
    monkeypatch.setattr(workers, "_watch", lambda running: [process.kill() or process.wait() for process in running])
    status, output = run_here("--workers", 2, "--n_trials", 2, "--target_compression", 1.05)
    assert status == 1 and "all 2 workers have failed" in output and "the same command goes on" in output
    assert not (tmp_path / "models" / "llama_searched").exists()

"""The launchers: which ends they start again, and real runs under them, killed and preempted."""

import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.faults.trainer import ROOT, Trainer, free_port, last_step

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci/run"])


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck (apt)")
def test_shellcheck_finds_nothing():
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_kubernetes_takes_the_job():
    pytest.importorskip("kubernetes_validate")
    done = subprocess.run(
        [pathlib.Path(sys.executable).with_name("kubernetes-validate"), "-k", "1.31", "--strict",
         LAUNCH / "kubernetes.yaml"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_acts_on_the_exit_codes():
    import yaml

    _, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec = job["spec"]
    rules = {rule["action"]: rule for rule in reversed(spec["podFailurePolicy"]["rules"])}
    assert rules["FailJob"]["onExitCodes"]["values"] == [1, 2]
    ignored = [r["onExitCodes"]["values"] for r in spec["podFailurePolicy"]["rules"]
               if r["action"] == "Ignore" and "onExitCodes" in r]  # fmt: skip
    assert ignored == [[75, 76]]
    (container,) = spec["template"]["spec"]["containers"]
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert given["JAX_NUM_PROCESSES"] == str(spec["completions"]) == str(spec["parallelism"])
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def program(path: pathlib.Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def fake(tmp_path):
    """`fake(script, *codes)`: a launcher over a training that ends with these codes in turn.

    Returns its exit code and the calls of python and scontrol.
    """
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()

    def run(script: str, *codes: int, flags=(), **variables) -> tuple[int, list[str]]:
        calls, left = tmp_path / "calls", tmp_path / "codes"
        left.write_text("".join(f"{code}\n" for code in codes))
        program(
            bin_dir / "python",
            f'echo "python $*" >> {calls}; code=$(head -n 1 {left}); sed -i 1d {left}; exit $code',
        )
        program(bin_dir / "srun", 'while [[ $1 == -* ]]; do shift; done; "$@"')
        for name in ("scontrol", "sbatch"):
            told = f'echo "{name} $* ${{FINISH:-}}" | sed "s/ $//" >> {calls}'
            program(bin_dir / name, f"{told}; [[ ! ${{SBATCH_FAILS:-}} ]]")
        done = subprocess.run(
            ["bash", LAUNCH / script, "--config=configs/tiny_debug.py", "--workdir=a b", *flags],
            env={**os.environ, **variables, "PATH": f"{bin_dir}:{os.environ['PATH']}",
                 "FIRST_PAUSE": "0", "MOST_RESTARTS": "3", "SLURM_JOB_ID": "7",
                 "SLURM_SUBMIT_DIR": str(ROOT)},
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, calls.read_text().splitlines()

    yield run
    shutil.rmtree(ROOT / "slurm-7", ignore_errors=True)


TRAIN = "python -m tinyllama_jax.train --config=configs/tiny_debug.py --workdir=a b"


PREPARE = "python -m tinyllama_jax.prepare {} --config=configs/tiny_debug.py --workdir=a b"


def test_slurm_prepares_in_parts_and_finishes(fake):
    array = {"SLURM_ARRAY_TASK_MAX": "15", "SLURM_ARRAY_JOB_ID": "5", "SLURM_JOB_ACCOUNT": "ours"}
    finish = (
        "sbatch --export=ALL --array=0 --dependency=afterok:5 --kill-on-invalid-dep=yes "
        "--account=ours launch/prepare_slurm.sbatch --config=configs/tiny_debug.py --workdir=a b 1"
    )
    first, seventh = PREPARE.format("--part=0/16"), PREPARE.format("--part=7/16")
    script, marker = "prepare_slurm.sbatch", ROOT / "prepare-5.finish"
    marker.unlink(missing_ok=True)
    try:
        assert fake(script, 0, SLURM_ARRAY_TASK_ID="0", **array) == (0, [finish, first])
        assert fake(script, 1, SLURM_ARRAY_TASK_ID="7", **array) == (1, [finish, first, seventh])
        # Back from the queue, the last job is there already.
        _, calls = fake(script, 0, SLURM_ARRAY_TASK_ID="0", **array)
        assert calls[3:] == [first]
        _, calls = fake(script, 0, SLURM_ARRAY_TASK_ID="0", FINISH="1", **array)
        assert calls[4:] == [PREPARE.format("--finish")]
    finally:
        marker.unlink(missing_ok=True)


def test_a_part_is_done_where_no_job_can_be_submitted(fake):
    array = {"SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "0"}
    status, calls = fake("prepare_slurm.sbatch", 0, SBATCH_FAILS="1", **array)
    assert (status, calls[1:]) == (0, [PREPARE.format("--part=0/2")])
    assert not (ROOT / "prepare-6.finish").exists()


@pytest.mark.parametrize(
    "codes, expected, starts",
    [
        ([0], 0, 1),
        ([1], 1, 1),
        ([2], 2, 1),
        ([75, 75, 0], 0, 3),  # training alone was asked to end
        ([76, 137, 0], 0, 3),
        ([76, 76, 76, 76], 76, 4),
        ([76, 1], 1, 2),
        ([134, 139, 0], 0, 3),  # crashed
        ([143], 143, 1),
    ],
)
def test_what_is_started_again(fake, codes, expected, starts):
    assert fake("single_node.sh", *codes) == (expected, [TRAIN] * starts)


def test_a_rewind_happens_once(fake, tmp_path):
    """Training makes the file that the launcher named when it has gone back."""
    rewound = tmp_path / "rewound"
    flags = ["--resume=15", "--skip_steps", "15:18"]
    variables = {"TINYLLAMA_REWOUND": str(rewound)}
    with_flags = f"{TRAIN} --resume=15 --skip_steps 15:18"
    assert fake("single_node.sh", 76, 0, flags=flags, **variables) == (0, [with_flags] * 2)
    (tmp_path / "calls").unlink()
    rewound.touch()
    assert fake("single_node.sh", 76, 0, flags=flags, **variables) == (0, [TRAIN] * 2)


@pytest.mark.parametrize(
    "codes, expected, calls",
    [
        ([0], 0, [TRAIN]),
        ([76, 0], 0, [TRAIN] * 2),
        ([75], 75, [TRAIN, "scontrol requeue 7"]),
        ([1], 1, [TRAIN]),
    ],
)
def test_slurm_is_asked_to_start_again_what_it_ended(fake, codes, expected, calls):
    assert fake("slurm.sbatch", *codes) == (expected, calls)


def start(trainer: Trainer, run_dir: pathlib.Path, *launcher: str, **variables: str):
    environment = trainer.environment | variables
    environment["PATH"] = f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    environment["FIRST_PAUSE"] = "0"
    return subprocess.Popen(
        [*launcher, "--config=configs/tiny_debug.py", f"--workdir={run_dir}", *trainer.flags,
         "--config.training.micro_batch_size=1", "--config.watchdog.peer_seconds=10"],
        env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def starts(run_dir) -> int:
    try:
        return len(json.loads((run_dir / "environment.json").read_text()))
    except FileNotFoundError:
        return 0


def until_step(run_dir, step, process):
    wait_until(lambda: last_step(run_dir) >= step, process)


def wait_until(seen, process):
    deadline = time.monotonic() + 120
    while not seen():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def children(run_dir) -> list[int]:
    """Training processes of a run."""
    found = subprocess.run(
        ["pgrep", "-f", f"tinyllama_jax.train .*--workdir={run_dir} "], capture_output=True,
        text=True,
    )  # fmt: skip
    python = [int(pid) for pid in found.stdout.split()]
    return [pid for pid in python if os.path.realpath(f"/proc/{pid}/exe").find("python") > 0]


def test_a_run_under_single_node(tmp_path):
    """Killed, it goes on by itself; asked to end, the launcher ends too."""
    trainer, run_dir = Trainer(tmp_path), tmp_path / "run"
    process = start(trainer, run_dir, str(LAUNCH / "single_node.sh"))
    until_step(run_dir, 7, process)
    (child,) = children(run_dir)
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: starts(run_dir) == 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert start(trainer, run_dir, str(LAUNCH / "single_node.sh")).wait(120) == 0
    assert last_step(run_dir) == 40


@pytest.mark.slow
def test_a_run_under_multi_node(tmp_path):
    """Two "hosts" that are this machine, reached by a shell in place of ssh."""
    trainer, run_dir = Trainer(tmp_path), tmp_path / "run"
    program(tmp_path / "shell", 'shift; exec bash -c "$*"')
    (tmp_path / "hosts").write_text("# two of them\none\ntwo\n")
    logs = tmp_path / "logs"
    launcher = [str(LAUNCH / "multi_node.sh"), str(tmp_path / "hosts")]
    variables = {"REMOTE_SHELL": str(tmp_path / "shell"), "COORDINATOR": "localhost",
                 "PORT": str(free_port()), "LOGS": str(logs)}  # fmt: skip
    process = start(trainer, run_dir, *launcher, **variables)
    until_step(run_dir, 7, process)
    os.kill(int((logs / "1.pid").read_text()), signal.SIGKILL)
    wait_until(lambda: starts(run_dir) == 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert "lost process 1 on " in (logs / "0.one.log").read_text()
    assert start(trainer, run_dir, *launcher, **variables).wait(120) == 0
    assert last_step(run_dir) == 40
    # An error that starting again does not mend ends all.
    run_dir = tmp_path / "mistaken"
    process = start(
        trainer, run_dir, *launcher, "--config.data.sources.code.path=/nowhere", **variables
    )
    assert process.wait(60) == 1

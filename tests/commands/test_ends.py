"""How commands end: by signals, on closed and full streams, in folders that are gone, with names that cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import grat, refusal
from sample_benchmarks import ATTENTION

from grat_cli.app import interrupted_by_signals, run

IMAGE = ("image", "a red fox", "--model", "demo")
PLAN = (sys.executable, "-m", "grat_cli", "plan", "demo-b", "--res", "64")


def with_shell(line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `grat plan` as `$@` of a shell's line."""
    return subprocess.run(["bash", "-c", line, "bash", *PLAN], capture_output=True, text=True, **options)


def test_output_to_a_full_device_is_told() -> None:
    done = with_shell('"$@" > /dev/full')
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "error: what was to be printed is lost: cannot write to stdout: no space left on device",
    )
    assert with_shell('"$@" --json 2> /dev/full').returncode == 0


def test_a_reader_that_has_enough_is_no_error() -> None:
    done = with_shell('"$@" 2> err | head -1; echo ${PIPESTATUS[0]}; cat err; rm err', cwd=os.environ.get("TMPDIR"))
    first, *rest = done.stdout.splitlines()
    assert first.startswith("preset")
    assert rest[0] in ("0", "141")  # 0 where all was written before head had enough
    assert "error" not in done.stdout


def test_with_closed_streams_the_others_hold_what_they_should() -> None:
    done = with_shell('"$@" --json 2>&-')
    assert json.loads(done.stdout)["model"] == "demo"
    assert with_shell('"$@" --json <&- >&- 2>&-').returncode == 0


def test_a_closed_stderr_is_no_picture(tmp_path: Path) -> None:
    """The first file that is opened would get its descriptor, and whatever libraries print there."""
    code = (
        "import os; from grat_cli.console.streams import open_closed_descriptors; open_closed_descriptors(); "
        "file = os.open('x', os.O_CREAT | os.O_WRONLY); os.write(2, b'a warning'); os.write(file, b'pixels')"
    )
    subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "x").read_bytes() == b"pixels"


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    before = os.getcwd()
    os.chdir(folder)
    try:
        folder.rmdir()
        for command in (IMAGE, ("plan", "demo-b"), ("info", "x.png"), ("presets",)):
            assert refusal(*command) == "the folder that grat is started in is gone: cd to one that is there"
        assert grat("plan", "--help").code == 0
    finally:
        os.chdir(before)


def interrupted_by(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> list[str]:
    """Sends signals while a plan is made; what was caught on the way out."""
    seen: list[str] = []

    def send(*_: object) -> None:
        try:
            os.kill(os.getpid(), numbers[0])
            threading.Event().wait(1)
        finally:
            for number in numbers[1:]:  # while what is done is kept
                os.kill(os.getpid(), number)
            seen.append("kept")

    monkeypatch.setattr("grat_cli.estimates.planning.forecast", send)
    return seen


@pytest.fixture
def _hang_up_is_heeded() -> Iterator[None]:
    """Whatever these tests were started by: nohup has it ignored, and what it starts inherits that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_hang_up_is_heeded")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_do_what_ctrl_c_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    seen = interrupted_by(monkeypatch, number, signal.SIGTERM, signal.SIGHUP, number)
    with interrupted_by_signals():
        assert refusal("plan", code=130) == "interrupted"
    assert seen == ["kept"]
    assert signal.getsignal(number) is before


def test_what_is_to_be_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grat_cli.estimates.planning.forecast", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interrupted_by_signals():
            assert refusal("plan", code=1).startswith("AttributeError")  # it went on
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_other_threads_signals_are_left_alone() -> None:
    codes: list[int] = []

    def aside() -> None:
        with interrupted_by_signals():
            codes.append(run(["presets", "demo-b", "--quiet"]))

    thread = threading.Thread(target=aside)
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.slow
@pytest.mark.usefixtures("_hang_up_is_heeded")
def test_a_run_that_is_ended_by_a_signal_can_be_gone_on_with(tmp_path: Path) -> None:
    options = [
        "--res",
        "512",
        "--steps",
        "200",
        "--variant",
        "full",
        "--highres",
        "off",
        "--preview",
        "1",
        "--out",
        "fox.png",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "grat_cli", *IMAGE, *options, "--out", "fox.png"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "fox.preview.png").exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        threading.Event().wait(0.05)
    for _ in range(2):  # terminals and shells send one each
        process.send_signal(signal.SIGHUP)
    _, told = process.communicate()
    assert process.returncode == 130
    assert "go on with grat resume fox.checkpoint.safetensors" in told.splitlines()[-1]
    assert os.listdir(tmp_path) == ["fox.checkpoint.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("image", "--a fox"), "a PROMPT that begins with a dash goes to the end, after --: grat image -- '--a fox'"),
        (("image", "--a", "fox"), "grat image ... -- --a"),
        ((*IMAGE, "-a fox"), "grat image ... -- '-a fox'"),
        ((*IMAGE, "--out", "sub/"), "the folder sub does not exist: create it first (mkdir -p sub)"),
        ((*IMAGE, "--out", "a b/"), "create it first (mkdir -p 'a b')"),
        ((*IMAGE, "--init-image", "https://x.org/a.png"), "--init-image https://x.org/a.png: expected a file of this"),
        ((*IMAGE, "--reference", "a.png", "--reference", "https://x.org/a.png"), "--reference https://x.org/a.png: "),
        (("info", "https://x.org/a.png"), "FILE https://x.org/a.png: expected a file of this machine"),
        ((*IMAGE, "--out", f"{'x' * 300}.png"), "a name of 304 bytes is too long: use at most 255"),
        ((*IMAGE, "--out", f"{'x' * 240}.png"), "too long for what is kept beside it: make it 8 bytes shorter"),
        ((*IMAGE, "--out", f"{'é/' * 1500}a.png"), "a path of 4505 bytes is too long: use at most 4095"),
        ((*IMAGE, "--preset", "x" * 300), "there is no preset 'xxxx"),
        ((*IMAGE, "--out", ""), "--out is empty"),
        (("image", "fox \udcff"), "PROMPT fox \\udcff: it is not UTF-8 text"),
        ((*IMAGE, "--negative", "\udcff"), "--negative \\udcff: it is not UTF-8 text"),
        (("video", "fox \udcff"), "PROMPT fox \\udcff: it is not UTF-8 text"),
        ((*IMAGE, "--set", "sampling.steps=010"), "YAML reads 010 as the number 8: write 10 or 8, or '010' in quotes"),
        ((*IMAGE, "--set", "sampling.steps=1_0"), "YAML reads 1_0 as the number 10: write 10, or '1_0' in quotes"),
        (
            (*IMAGE, "--set", "name=2020-01-01"),
            "YAML reads 2020-01-01 as a date: write '2020-01-01' in quotes for",
        ),
    ],
    ids=lambda value: " ".join(value)[-30:].encode("ascii", "replace").decode() if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused_with_what_can(
    arguments: tuple[str, ...], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert complaint in refusal(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["~nobody-of-that-name", "~nobody-of-that-name/x", "x" * 300, "a\0b"])
def test_no_model_has_such_a_name(name: str) -> None:
    for option in (("--model", name), ("--model", f"{name}.safetensors"), ("--model", "x.safetensors", "--base", name)):
        refusal("image", "a fox", *option, code=3)


def test_prompts_are_read_as_utf_8_whatever_the_language(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system's encoding is ASCII, its bytes arrive as lone surrogates."""
    seen: list[str] = []
    monkeypatch.setattr("grat_cli.commands.making.placed", lambda request, *_: seen.append(request.prompt) or request)
    monkeypatch.setattr("grat_cli.commands.making.refuse_unfit", lambda *_: None)
    monkeypatch.setattr("grat_cli.commands.making.make", lambda *_: None)
    typed = "füchs 狐".encode().decode("ascii", "surrogateescape")
    assert grat("image", typed, "--model", "demo").code == 0
    assert seen == ["füchs 狐"]


def test_a_benchmark_whose_rows_all_failed_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(failed: int, skipped: int) -> Any:
        case = ATTENTION.cases[0]
        rows = [
            replace(row, skipped="NaN" if number < failed else "too long", not_finite=number < failed, times_ms=())
            if number < failed + skipped
            else row
            for number, row in enumerate(case.rows)
        ]
        return lambda *_: (replace(ATTENTION, cases=(replace(case, rows=tuple(rows)),)), None)

    monkeypatch.chdir(tmp_path)
    every = len(ATTENTION.cases[0].rows)
    for failed, skipped, code in ((every, 0, 5), (1, every - 1, 5), (1, 0, 0), (0, every, 0)):
        monkeypatch.setattr("grat_cli.bench.levels.run_level", measured(failed, skipped))
        result = grat("bench", "--out", f"{failed}-{skipped}")
        assert result.code == code
        assert ("no variant could be measured; full: NaN" in result.err) == (code == 5)
        assert (tmp_path / f"{failed}-{skipped}.json").is_file()


@pytest.mark.parametrize("command", ["resume", "decode"])
@pytest.mark.parametrize("name", [".", "/", "..", "x" * 250, "missing.png", "sub/"])
def test_there_is_nothing_to_go_on_with_beside_what_is_no_output(command: str, name: str) -> None:
    said = refusal(command, name)
    nothing = said.startswith("there is no checkpoint and there are no latents of ")
    assert nothing or said.startswith(f"{name} is a folder: give a checkpoint or latents in it")


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_advice_names_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("plan", "demo-b", "--picture", name).endswith(".png")
    assert refusal("compare", "a.png", "b.png", "--sheet", name)
    assert refusal("tune", "2", "--target-density", "0.1", "--out", name, "--model", "demo").endswith(".yaml")


def test_where_the_system_knows_ascii_alone_names_are_what_was_typed(tmp_path: Path) -> None:
    env = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env.pop("PYTHONIOENCODING", None)
    command = [*PLAN, "--picture", "é 狐 [x].png".encode()]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir(os.fsencode(tmp_path)) == ["é 狐 [x].png".encode()]
    assert done.stdout.splitlines()[-1] == "é 狐 [x].png".encode()  # so that a script finds it
    assert all(line.isascii() for line in done.stdout.splitlines()[:-1])


def test_a_preview_of_a_process_that_was_killed_is_that_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def step(self: object, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grat_cli.console.progress.LogProgress.step", step)
        options = ("--res", "64", "--steps", "3", "--seed", "3", "--preview", "2", "--out", "fox.png")
        assert grat(*IMAGE, *options).code == 130
    (tmp_path / "fox.preview.png").write_bytes(b"of step 1")
    resumed = grat("resume", "fox.png")
    assert resumed.code == 0, resumed.err
    assert sorted(os.listdir()) == ["fox.json", "fox.png"]

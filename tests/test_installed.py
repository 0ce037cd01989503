"""What an installed engine says about itself: found, asked, its help read and kept."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.installed import (
    Flag,
    Given,
    Program,
    cache_folder,
    given_flags,
    given_values,
    gpus_here,
    library,
    memory_bytes,
    names_of,
    packaged,
    parse_help,
    refuse_reserved,
    tunable,
)
from tuner.space import Choice, Refused

PROGRAM = Program(
    name="engine",
    title="Engine",
    variable="TUNE_ENGINE",
    install="install it",
    expected="the engine executable",
    environment={"QUIET": "1"},
    ask_seconds=20.0,
)


def script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{body}")
    path.chmod(0o755)
    return path


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    monkeypatch.delenv("TUNE_ENGINE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return script(
        tmp_path / "bin" / "engine",
        "import os, sys\n"
        "if 'fail' in sys.argv: sys.exit('no such model')\n"
        "print('usage:', os.environ['QUIET'], os.environ['COLUMNS'], *sys.argv[1:])\n"
        "print('  --seats N', file=sys.stderr)\n",
    )


def test_a_program_that_is_asked_leaves_no_temporary_file(on_path, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    asked = script(tmp_path / "asked", "import tempfile\nprint(tempfile.mkdtemp())")
    assert PROGRAM.run([str(asked)]).startswith(str(tmp_path / "tmp"))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_executable_on_the_path_is_found(on_path):
    assert PROGRAM.path() == str(on_path)


def test_the_variable_goes_before_the_path(on_path, tmp_path, monkeypatch):
    other = script(tmp_path / "other", "")
    monkeypatch.setenv("TUNE_ENGINE", str(other))
    assert PROGRAM.path() == str(other)


def test_a_variable_that_names_no_executable_is_refused_even_with_one_on_the_path(on_path, monkeypatch):
    monkeypatch.setenv("TUNE_ENGINE", "/no/such/file")
    with pytest.raises(Refused, match=r"^TUNE_ENGINE=/no/such/file: expected the engine executable; install it$"):
        PROGRAM.find()


def test_none_at_all_is_refused_with_a_way_on(on_path):
    on_path.unlink()
    assert PROGRAM.find() is None
    with pytest.raises(Refused, match=r"^the engine workload finds no engine on the PATH; install it$"):
        PROGRAM.path()


def test_what_a_run_prints_comes_with_its_own_variables_and_a_fixed_width(on_path):
    assert PROGRAM.run([str(on_path), "--version"]) == "usage: 1 80 --version\n"


def test_standard_error_is_given_where_it_is_asked_for(on_path):
    assert "--seats" in PROGRAM.run([str(on_path)], with_errors=True)


def test_a_run_that_fails_is_refused_with_its_last_line(on_path):
    with pytest.raises(Refused, match=r"engine fail: Engine does not run here \(no such model\); install it$"):
        PROGRAM.run([str(on_path), "fail"])


def test_a_run_that_may_fail_is_not_refused(on_path):
    assert PROGRAM.run([str(on_path), "fail"], with_errors=True, may_fail=True) == "no such model\n"


def test_what_cannot_be_started_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"Engine does not run here .*No such file"):
        PROGRAM.run([str(tmp_path / "gone")])


def test_a_run_that_never_ends_is_refused(tmp_path):
    slow = script(tmp_path / "slow", "import time; time.sleep(60)")
    with pytest.raises(Refused, match=r"Engine does not run here .*timed out"):
        replace(PROGRAM, ask_seconds=0.2).run([str(slow)])


def helped(path, *asks, marker="--seats"):
    return PROGRAM.help([str(path)], asks or [("--help",)], marker=marker, version="1/2")


def counting(tmp_path):
    return script(tmp_path / "bin" / "engine", f"open({str(tmp_path / 'count')!r}, 'a').write('x'); print('--seats N')")


def asked(tmp_path):
    return len((tmp_path / "count").read_text())


def test_help_is_kept_and_not_asked_for_again(on_path, tmp_path):
    path = counting(tmp_path)
    assert helped(path) == helped(path) == "--seats N\n"
    assert asked(tmp_path) == 1


def test_help_of_a_program_that_was_changed_is_asked_for_again(on_path, tmp_path):
    path = counting(tmp_path)
    helped(path)
    os.utime(path, (time.time() + 9, time.time() + 9))
    helped(path)
    assert asked(tmp_path) == 2


def test_kept_help_that_is_damaged_is_asked_for_again(on_path, tmp_path):
    path = counting(tmp_path)
    helped(path)
    (kept,) = (cache_folder() / "engines").iterdir()
    kept.write_text("")
    assert helped(path) == kept.read_text() == "--seats N\n"


def test_a_version_with_a_slash_names_no_folder(on_path, tmp_path):
    helped(counting(tmp_path))
    assert [p.is_file() for p in (cache_folder() / "engines").iterdir()] == [True]


def test_a_cache_that_cannot_be_written_is_no_error(on_path, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    assert helped(counting(tmp_path)) == "--seats N\n"


def test_the_first_way_to_ask_that_lists_the_marker_counts(on_path):
    assert helped(on_path, ("--help",), ("--help=all",), marker="--help=all") == "usage: 1 80 --help=all\n"


def test_another_program_is_refused_by_what_its_help_lacks(on_path):
    with pytest.raises(Refused, match=r"engine --help: expected Engine, but its help lists no --rows; install it$"):
        helped(on_path, marker="--rows")


def test_a_packages_version_is_read_from_its_records(tmp_path):
    (tmp_path / "lib" / "python3.13" / "site-packages" / "engine_cpu-1.2.3.dist-info").mkdir(parents=True)
    assert packaged(str(tmp_path / "bin" / "engine"), "engine", "engine_cpu") == ("engine_cpu", "1.2.3")


def test_a_package_without_records_has_no_version(tmp_path):
    assert packaged(str(tmp_path / "bin" / "engine"), "engine") is None


def test_a_library_that_is_missing_is_refused_with_the_command_that_installs_it():
    with pytest.raises(Refused, match=r"the test workload cannot import no_such_\w+ .*: pip install it$"):
        library("no_such_library", workload="test", install="pip install it")


def test_a_relative_cache_folder_is_ignored(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder() == Path.home() / ".cache" / "tune"


def test_a_help_page_is_read_with_choices_defaults_and_every_name():
    page = (
        "usage: engine [options]\n\noptions:\n"
        "  --dtype {auto,half}, -d {auto,half}\n                        Type of weights. (default: auto)\n"
        "  --seats SEATS         Seats. (default:\n                        4)\n"
        "  --eager, --no-eager   Whether.\n"
    )
    assert parse_help(page) == {
        "--dtype": Flag(("auto", "half"), "auto"),
        "-d": Flag(("auto", "half"), "auto"),
        "--seats": Flag((), "4"),
        "--eager": Flag((), None),
        "--no-eager": Flag((), None),
    }


def test_all_names_of_a_flag_are_known_from_its_entry():
    flags = parse_help("  --seats SEATS, -s SEATS\n    Seats.\n  --other, -o           Other.\n")
    assert names_of(("--seats",), flags) == {"--seats", "-s", "--no-seats"}
    assert names_of(("--nothing", "-s"), flags) == {"--nothing", "--no-nothing", "--seats", "-s"}
    assert flags["--seats"].text == "--seats SEATS, -s SEATS Seats."


KNOWN = ("--port", "--page-size", "-tp", "--tp-size", "-O")


@pytest.mark.parametrize(
    ("words", "found", "as_argparse"),
    [
        (["--port", "80"], {"--port": ("--port", "80")}, None),
        (["--port=80"], {"--port": ("--port", "80")}, None),
        (["--port"], {"--port": ("--port", None)}, None),
        (["--port", "--tp-size=4"], {"--port": ("--port", None), "--tp-size": ("--tp-size", "4")}, None),
        (["--port=80", "--port=81"], {"--port": ("--port", "81")}, None),
        (["--page_size", "1"], {"--page-size": ("--page_size", "1")}, None),
        (["-tp=2", "x"], {"-tp": ("-tp", "2")}, None),
        (["-1", "80", "a-b"], {}, None),
        (["--unheard.of=1"], {"--unheard": ("--unheard.of", "1")}, None),
        (["--po", "80"], {"--po": ("--po", "80")}, {"--port": ("--po", "80")}),
        (["-t", "4"], {"-t": ("-t", "4")}, {"-tp": ("-t", "4")}),
        (["-O3"], {"-O3": ("-O3", None)}, {"-O": ("-O3", "3")}),
        (["-tp2"], {"-tp2": ("-tp2", None)}, None),
    ],
)
def test_flags_and_values_are_found_among_further_arguments_as_the_engine_reads_them(words, found, as_argparse):
    def read(*, argparse):
        return {name: (one.written, one.value) for name, one in given_flags(words, KNOWN, argparse=argparse).items()}

    assert read(argparse=False) == found
    assert read(argparse=True) == (found if as_argparse is None else as_argparse)


def test_a_reserved_flag_is_refused_by_the_name_that_was_typed():
    flags = parse_help("  --port PORT, -p PORT\n    Port.\n")
    with pytest.raises(Refused, match=r"^--engine-arg -p: tune chooses it; leave it out$"):
        refuse_reserved({"-p": Given("-p", "80")}, {"--port": "tune chooses it"}, flags)
    refuse_reserved({"--host": Given("--host", None)}, {"--port": "tune chooses it"}, flags)


def smi(tmp_path, monkeypatch, body):
    script(tmp_path / "bin" / "nvidia-smi", body)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


TWO = "print('0, GPU-a, NVIDIA A, 1024'); print('1, GPU-b, NVIDIA B, 2048'); print('oddly said')"


def test_gpus_are_those_that_nvidia_smi_lists(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    smi(tmp_path, monkeypatch, TWO)
    assert [(gpu.name, gpu.bytes) for gpu in gpus_here()] == [("NVIDIA A", 2**30), ("NVIDIA B", 2**31)]


@pytest.mark.parametrize(("shown", "names"), [("1", ["NVIDIA B"]), ("GPU-a", ["NVIDIA A"]), ("", []), ("7", [])])
def test_gpus_that_cuda_hides_are_not_counted(tmp_path, monkeypatch, shown, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    smi(tmp_path, monkeypatch, TWO)
    assert [gpu.name for gpu in gpus_here()] == names


def test_a_driver_that_fails_shows_no_gpu(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "raise SystemExit('NVIDIA-SMI has failed')")
    assert gpus_here() == ()


def test_memory_is_no_more_than_the_machines():
    assert 0 < memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_memory_is_what_a_control_group_allows(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: "1048576\n")
    assert memory_bytes() == 2**20


def test_a_control_group_without_a_limit_allows_all(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: "max\n")
    assert memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


SIZES = parse_help("  --tp-size N, -tp N\n    Width.\n  --kind KIND\n    Kind.\n")


def values(*words):
    flags, numbers = {"size": ("--tp-size",), "kind": ("--kind",)}, {"size": int}
    return given_values(given_flags(words, SIZES, argparse=True), flags, SIZES, numbers)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tp-size=4", "--kind=4"), {"size": 4, "kind": "4"}),
        (("-tp", "2", "--kind", "x"), {"size": 2, "kind": "x"}),
        (("--tp-s=4",), {"size": 4}),
        (("--tp-size=4", "-tp=8"), {"size": 8}),
        (("-tp=8", "--tp-size=4"), {"size": 4}),
        (("--tp-size",), {}),
        ((), {}),
    ],
)
def test_a_parameter_has_the_value_that_further_arguments_give_to_its_flag_last_by_any_name(words, said):
    assert values(*words) == said


def test_a_further_argument_that_should_be_a_number_and_is_none_is_refused():
    with pytest.raises(Refused, match="--engine-arg --tp-s=four: expected a number"):
        values("--tp-s=four")


def parameter(name):
    return Choice(name=name, meaning=name, default=1, values=(1, 2))


def test_what_this_version_lacks_cannot_have_or_is_fixed_is_left_out_with_the_reason():
    known = parse_help("  --seats N, -s N\n    Seats.\n  --old N\n    Old.\n  --poll N\n    Poll.\n")
    kept, notes = tunable(
        [parameter(name) for name in ("clients", "seats", "page", "new", "poll")],
        {"seats": ("--seats",), "page": ("--page",), "new": ("--new", "--old"), "poll": ("--poll",)},
        engine="X 1",
        known=known,
        given=given_flags(["-s=4"], known, argparse=True),
        barred={"poll": "nothing heeds it"},
    )
    assert [p.name for p in kept] == ["clients", "new"]
    assert notes == [
        "seats is left out: --engine-arg -s fixes it",
        "page is left out: X 1 has no --page",
        "poll is left out: nothing heeds it",
    ]

"""What a study found, written down for other programs: each form is read back by a parser that is not ours."""

import importlib.util
import json
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from commands import in_a_process, typed
from fakes.openai_server import Engine
from hypothesis import given
from hypothesis import strategies as st
from records import LOSSY, SPACE, lossy, trial

from tuner.apply import FORMS, Chosen, Launch, choose, launch_of, not_here, render, save, systemd_word, yaml, yaml_text
from tuner.control import CLOCK, POWER
from tuner.journal import Header, Journal, Pair, Study
from tuner.serving import free_port
from tuner.space import Refused
from tuner.trial import History, Service, Target

ROOT = Path(__file__).parents[1]

NASTY = [
    *("plain", "two words", "", 'quo"te', "it's", "back\\slash", "100%n", "$HOME ${X} $(Y)", ";", "a;b", "#no"),
    *("- x", "tab\there", "line\nbreak", "null", "yes", "ünï 🙂", "\x7f\x1b[31m", "{a: b}", "@x", "!y"),
]

SERVICE = Service(
    argv=(sys.executable, "-m", "http.server", *NASTY),
    env={"OMP_NUM_THREADS": "2", "ODD": '50% of $HOME "x" \\ y'},
    folder="/",
    port=8080,
    image="example/engine:1",
    image_argv=tuple(NASTY),
    paths=("/models/my $model.gguf",),
    gpus=True,
    python="print('hello')",
    modelfile="FROM llama\nPARAMETER num_thread 2",
)


def launch(service=SERVICE, **more):
    about = {
        "name": "llama-1",
        "about": ("made by a test", "a line\nbreak and \x1b[31mred"),
        "command": "engine --threads 2",
        "settings": (),
        "gpus": 2,
        "service": service,
    }
    return Launch(**{**about, **more})


SETTINGS = ("sudo nvidia-smi -i GPU-1,GPU-2 -pl 250", "sudo nvidia-smi -i GPU-1,GPU-2 -lgc 1200,1200")


# --- which setting


BEST = {"parallel": 8, "threads": 2}


def study(ratios=(), *, trials=None, planned=None, folder=Path("results/s")):
    """A study whose confirmation found these ratios of best to default."""
    default, best = trial(0), trial(1, BEST, (0.7, 0.71, 0.69))
    history = History()
    for one in (default, best) if trials is None else trials:
        history = history.add(one)
    pairs = tuple(
        Pair(
            number=n,
            default=trial(0, joules=(1.0,)),
            best=trial(1, BEST, (ratio,)),
            default_first=True,
            config=best.config,
            planned=planned or len(ratios),
        )
        for n, ratio in enumerate(ratios)
    )
    header = Header(
        name="My study_1", workload="llama", target=Target(), proposer="rules", space=tuple(SPACE.record()),
        machine={"cores_logical": "2"},
    )  # fmt: skip
    return Study(folder=folder, header=header, history=history, pairs=pairs)


SAVES = (0.70, 0.71, 0.69, 0.70, 0.72, 0.70)
SAVES_NOT = (0.90, 1.10, 0.95, 1.05, 0.99, 1.01)


def test_the_setting_that_a_confirmation_showed_is_taken():
    chosen = choose(study(SAVES), unconfirmed=False)
    assert chosen.confirmed
    assert chosen.config == {**SPACE.default(), **BEST}
    assert "95 % CI" in chosen.said


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            study(),
            "nothing is confirmed yet; measure it with `tune confirm results/s`; `tune apply results/s --unconfirmed`",
        ),
        (study(SAVES_NOT), "the confirmation showed no saving, so the default stays"),
        (
            study(SAVES[:4], planned=6),
            "4 of 6 pairs of the confirmation are done; go on with `tune confirm results/s --pairs 6`",
        ),
        (study(trials=[trial(0)]), "no setting used less energy than the default: leave the engine as it is"),
        (study(trials=[trial(0, error="crash")]), "nothing could be measured, so there is nothing to apply"),
    ],
)
def test_without_a_shown_saving_nothing_is_applied_and_the_next_command_is_named(found, sentence):
    with pytest.raises(Refused) as raised:
        choose(found, unconfirmed=False)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("found", [study(), study(SAVES_NOT), study(SAVES[:4], planned=6)])
def test_the_best_of_the_search_is_taken_where_somebody_asks_for_it(found):
    chosen = choose(found, unconfirmed=True)
    assert chosen.config == {**SPACE.default(), **BEST}
    assert not chosen.confirmed
    assert chosen.said == "trial 1 is the best of the search; no saving is confirmed"


def test_what_the_best_of_the_search_costs_in_quality_is_said():
    found = study(trials=[lossy(0, "f16", 1.0, 0.0), lossy(1, "q4", 0.7, 0.25)])
    found = replace(found, header=replace(found.header, space=tuple(LOSSY.record())))
    said = "trial 1 is the best of the search (quality_loss 0.25 nats/token); no saving is confirmed"
    assert choose(found, unconfirmed=True).said == said


def test_nothing_measured_is_refused_even_then():
    with pytest.raises(Refused):
        choose(study(trials=[trial(0, error="crash")]), unconfirmed=True)


def test_a_confirmed_setting_stays_confirmed_where_unconfirmed_ones_are_allowed():
    assert choose(study(SAVES), unconfirmed=True).confirmed


# --- the forms


@pytest.mark.parametrize(
    ("service", "offered"),
    [
        (Service(), "command"),
        (Service(argv=("x",)), "command"),
        (Service(argv=("x",), port=1), "command, systemd"),
        (Service(argv=("x",), port=1, image="y"), "command, compose, systemd, kubernetes"),
        (Service(modelfile="FROM x"), "command, modelfile"),
        (Service(python="pass"), "command, python"),
    ],
)
def test_a_form_that_the_engine_lacks_is_refused_with_those_that_it_has(service, offered):
    for form in FORMS:
        if form in offered.split(", "):
            assert render(form, launch(service))
            continue
        with pytest.raises(Refused, match=f"^--as {form}: this engine offers {offered}$"):
            render(form, launch(service))


def test_an_unknown_form_is_refused_with_all_of_them():
    with pytest.raises(Refused, match=r"expected one of command, compose, .*did you mean compose"):
        render("composer", launch())


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(Refused, match="a name in it is no text"):
        render("command", launch(command="engine \udcff"))


@pytest.mark.parametrize("form", FORMS)
def test_no_sentence_of_the_head_breaks_out_of_its_comment(form):
    text = render(form, launch())
    head = text.partition("\n\n")[0]
    assert form == "command" or all(line.startswith("# ") for line in head.splitlines())
    assert "\x1b" not in head


def test_the_command_is_a_command_and_nothing_else():
    assert render("command", launch()) == "engine --threads 2\n"
    assert render("command", launch(settings=SETTINGS)).splitlines() == [*SETTINGS, "engine --threads 2"]


def test_compose_holds_the_very_words(tmp_path):
    pyyaml = pytest.importorskip("yaml", reason="no YAML parser is installed")
    one = pyyaml.safe_load(render("compose", launch()))["services"]["llama-1"]
    undollared = [word.replace("$$", "$") for word in one["command"]]
    assert undollared == NASTY
    assert all("$" not in word.replace("$$", "") for word in one["command"])
    assert one["image"] == "example/engine:1"
    assert one["ports"] == ["127.0.0.1:8080:8080"]
    assert {k: v.replace("$$", "$") for k, v in one["environment"].items()} == SERVICE.env
    assert one["volumes"] == [
        {"type": "bind", "source": "/models/my $$model.gguf", "target": "/models/my $$model.gguf", "read_only": True}
    ]
    devices = one["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]


def test_compose_leaves_out_what_there_is_none_of():
    pyyaml = pytest.importorskip("yaml", reason="no YAML parser is installed")
    text = render("compose", launch(Service(image="x")))
    assert pyyaml.safe_load(text) == {"services": {"llama-1": {"image": "x", "restart": "unless-stopped"}}}


def test_docker_reads_the_compose_file_and_finds_the_same_words(tmp_path):
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    file = tmp_path / "compose.yaml"
    file.write_text(render("compose", launch()))
    asked = [docker, "compose", "-f", str(file), "config", "--format", "json", "--no-interpolate"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [w.replace("$$", "$") for w in json.loads(done.stdout)["services"]["llama-1"]["command"]] == NASTY


def test_kubernetes_has_a_deployment_and_a_service_that_finds_it():
    pyyaml = pytest.importorskip("yaml", reason="no YAML parser is installed")
    deployment, service = pyyaml.safe_load_all(render("kubernetes", launch()))
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    template = deployment["spec"]["template"]
    assert (
        deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"] == service["spec"]["selector"]
    )
    (container,) = template["spec"]["containers"]
    assert [word.replace("$$", "$") for word in container["args"]] == NASTY
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert container["ports"] == [{"name": "http", "containerPort": 8080}]
    assert service["spec"]["ports"] == [{"name": "http", "port": 8080, "targetPort": "http"}]
    assert container["volumeMounts"][0]["name"] == template["spec"]["volumes"][0]["name"]
    assert template["spec"]["volumes"][0]["hostPath"] == {"path": "/models/my $model.gguf"}


def test_kubernetes_needs_no_port_and_no_gpu():
    pyyaml = pytest.importorskip("yaml", reason="no YAML parser is installed")
    (deployment,) = pyyaml.safe_load_all(render("kubernetes", launch(Service(image="x"))))
    assert deployment["spec"]["template"]["spec"] == {"containers": [{"name": "llama-1", "image": "x"}]}


def unquoted(line):
    """The words of a command line of a unit, read as systemd.syntax(7) and systemd.service(5) say; for this test."""
    words, word, quoted, begun, at = [], "", False, False, 0
    while at < len(line):
        c = line[at]
        if c == '"':
            quoted, begun = not quoted, True
        elif c == " " and not quoted:
            words += [word] if begun else []
            word, begun = "", False
        elif c == "\\":
            follows = line[at + 1]
            if follows == "x":
                word, at = word + chr(int(line[at + 2 : at + 4], 16)), at + 3
            else:
                assert follows in '"\\'
                word, at = word + follows, at + 1
            begun = True
        else:
            if c in "%$":
                assert line[at + 1] == c, "a specifier or a variable"
                at += 1
            word, begun = word + c, True
        at += 1
    assert not quoted
    return [*words, word] if begun else words


@given(
    st.lists(
        st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12), max_size=4
    )
)
def test_systemd_reads_back_the_very_words(words):
    line = " ".join(map(systemd_word, words))
    assert "\n" not in line
    assert unquoted(line) == words
    assert ";" not in line.split(" ")


def test_systemd_itself_takes_the_unit(tmp_path):
    tool = shutil.which("systemd-analyze")
    if not tool:
        pytest.skip("systemd is not installed")
    unit = tmp_path / "llama-1.service"
    unit.write_text(render("systemd", launch()))
    done = subprocess.run([tool, "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_unit_starts_the_command_in_its_folder_with_its_variables():
    lines = render("systemd", launch()).splitlines()
    (start,) = (line.removeprefix("ExecStart=") for line in lines if line.startswith("ExecStart="))
    assert unquoted(start) == list(SERVICE.argv)
    assert "WorkingDirectory=/" in lines
    assert "Environment=OMP_NUM_THREADS=2" in lines
    assert 'Environment="ODD=50%% of $HOME \\"x\\" \\\\ y"' in lines


def test_a_program_named_by_a_relative_path_is_looked_for_in_the_folder():
    text = render("systemd", launch(Service(argv=("./serve", "x"), folder="/opt/engine", port=1)))
    assert "ExecStart=/opt/engine/serve x" in text.splitlines()


@pytest.mark.parametrize("form", ["compose", "kubernetes", "modelfile", "python"])
def test_gpu_settings_stand_in_the_head_where_a_form_cannot_make_them(form):
    text = render(form, launch(settings=SETTINGS))
    for setting in SETTINGS:
        assert f"# {setting}" in text.splitlines()


def test_a_unit_sets_the_gpus_as_root_before_it_starts():
    lines = render("systemd", launch(settings=SETTINGS)).splitlines()
    before = [line for line in lines if line.startswith("ExecStartPre=+")]
    assert [line.rpartition("nvidia-smi ")[2] for line in before] == [
        "-i GPU-1,GPU-2 -pl 250",
        "-i GPU-1,GPU-2 -lgc 1200,1200",
    ]
    assert lines.index(before[-1]) < next(n for n, line in enumerate(lines) if line.startswith("ExecStart="))


def test_a_script_compiles_and_a_modelfile_is_the_engines():
    compile(render("python", launch(settings=SETTINGS)), "script", "exec")
    assert render("modelfile", launch()).endswith("\nFROM llama\nPARAMETER num_thread 2\n")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_is_the_same_text_in_yaml(text):
    pyyaml = pytest.importorskip("yaml", reason="no YAML parser is installed")
    assert pyyaml.safe_load(yaml_text(text)) == text


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=6)
TREE = st.recursive(
    TEXT | st.integers() | st.booleans(),
    lambda t: st.lists(t, min_size=1, max_size=3) | st.dictionaries(TEXT, t, min_size=1, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT | st.sampled_from(["yes", "null", "on", "image"]), TREE, min_size=1, max_size=3))
def test_any_tree_is_the_same_tree_in_yaml(tree):
    pyyaml = pytest.importorskip("yaml", reason="no YAML parser is installed")
    assert pyyaml.safe_load(yaml(tree)) == tree


# --- what the runner says


RUNNER = """
from tuner.trial import Service
from records import SPACE
def space(target): return SPACE
def identity(target): return {"engine": "fake", "engine_version": "2", "model": "m"}
def launch(config, target): raise NotImplementedError
def command(config, target): return f"fake --parallel {config['parallel']}"
def service(config, target): return Service(argv=("sleep", str(config["parallel"])), port=9, image="fake:1")
"""


@pytest.fixture
def runner(tmp_path):
    path = tmp_path / "fake.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n" + textwrap.dedent(RUNNER))
    return path


IDENTITY = {"engine": "fake", "engine_version": "2", "model": "m"}


def with_runner(found, runner, **more):
    about = {"workload": str(runner), "identity": IDENTITY, **more}
    return replace(found, header=replace(found.header, **about))


def test_a_launch_names_engine_changes_and_what_was_shown(runner):
    said = []
    found = with_runner(study(SAVES), runner)
    made = launch_of(found, choose(found, unconfirmed=False), said.append)
    assert made.name == "my-study-1"
    assert made.command == "fake --parallel 8"
    assert made.service == Service(argv=("sleep", "8"), port=9, image="fake:1")
    assert made.about[1:3] == ("engine: fake 2, model: m", "changes from the default: parallel 4 -> 8")
    assert made.settings == ()
    assert said == [f"running the code of {runner}"]


@pytest.mark.parametrize(("value", "told"), [(3, True), (8, False)])
def test_what_the_client_has_to_do_is_said_beside_the_servers_launch(runner, value, told):
    own = {"name": "concurrency", "default": 8, "scope": "request"}
    found = with_runner(study(SAVES), runner, space=(own, *SPACE.record()))
    said = []
    made = launch_of(found, Chosen({**SPACE.default(), "concurrency": value}, True, ""), said.append)
    sentence = "concurrency is the client's part: keep 3 requests in flight at a time"
    assert (sentence in said) == (sentence in made.about) == told


def test_another_engine_than_was_tuned_is_said(runner):
    said = []
    found = with_runner(study(SAVES), runner, identity={**IDENTITY, "engine_version": "1"})
    launch_of(found, choose(found, unconfirmed=False), said.append)
    assert "tuned with another engine or model than there is now: engine_version: recorded '1', here '2'" in said


def test_tuned_power_and_clock_are_set_on_the_boards_of_the_study_and_the_engine_never_sees_them(runner):
    record = ({"name": POWER, "default": 300}, {"name": CLOCK, "default": "auto"}, *SPACE.record())
    machine = {"gpu0": "NVIDIA H100 (GPU-1)", "gpu1": "NVIDIA H100 (GPU-2)", "gpus": "2"}
    found = with_runner(study(SAVES), runner, space=record, machine=machine)
    config = {POWER: 250, CLOCK: 1200, **SPACE.default()}
    made = launch_of(found, Chosen(config, True, ""), lambda _: None)
    assert made.settings == SETTINGS
    assert made.gpus == 2
    made = launch_of(found, Chosen({**config, POWER: 300, CLOCK: "auto"}, True, ""), lambda _: None)
    assert made.settings == ()


def test_a_runner_without_services_offers_its_command(runner):
    runner.write_text(runner.read_text().replace("def service", "def other"))
    found = with_runner(study(SAVES), runner)
    made = launch_of(found, choose(found, unconfirmed=False), lambda _: None)
    with pytest.raises(Refused, match=r"this engine offers command$"):
        render("systemd", made)


def test_a_client_is_printed_from_the_journal_alone(tmp_path):
    """Nobody listens at the server's address any more; how it takes prompts and what it serves is in the journal."""
    url = f"http://127.0.0.1:{free_port()}/v1"
    config = {"concurrency": 3}
    chat = {"prompts_as": "chat"}
    trials = [replace(trial(n, {**config, "concurrency": c}), effective=chat) for n, c in enumerate((8, 3))]
    space = ({"name": "concurrency", "default": 8},)
    about = {"target": Target(url=url, prompts=8), "identity": {"model": "m", "engine": "server (x)"}, "space": space}
    found = with_runner(study(trials=trials), "server", **about)
    said = []
    made = launch_of(found, Chosen(config, True, ""), said.append)
    assert said == []
    assert made.about[1] == "engine: server (x), model: m"
    with Engine("chat-only", port=int(url.split(":")[2].split("/")[0]), token_seconds=0.001) as engine:
        for command in (made.command, f"{sys.executable} -c {shlex.quote(render('python', made))}"):
            subprocess.run(["/bin/sh", "-c", command], input="a\nb\nc\nd\n", text=True, check=True, timeout=60)
        assert engine.most_in_flight == 3
        assert {(a["path"], a["model"], a["max_tokens"]) for a in engine.requests} == {
            ("/v1/chat/completions", "m", 32)
        }
        assert len(engine.requests) == 8
    for form in ("systemd", "compose"):
        with pytest.raises(Refused, match=r"this engine offers command, python$"):
            render(form, made)


@pytest.mark.parametrize(
    ("name", "label"), [("A b_C.1", "a-b-c-1"), ("7", "tune-7"), ("---", "tune"), ("x" * 80, "x" * 50)]
)
def test_a_study_of_any_name_makes_a_service_of_a_legal_name(runner, name, label):
    found = with_runner(study(SAVES), runner, name=name)
    assert launch_of(found, choose(found, unconfirmed=False), lambda _: None).name == label


def test_a_program_that_is_not_here_is_said_for_the_forms_that_start_it():
    lacking = launch(replace(SERVICE, argv=("no-such-engine", "serve")))
    said = '"no-such-engine" is not found on this machine: install it first; --as python does without'
    assert {form: not_here(form, lacking) for form in FORMS if not_here(form, lacking)} == {
        "command": said,
        "systemd": said,
    }
    assert not_here("systemd", launch()) is None
    assert not_here("command", launch(Service())) is None


# --- files


def test_a_file_that_is_there_is_kept_unless_forced(tmp_path):
    path = tmp_path / "unit"
    save("first\n", path, force=False)
    with pytest.raises(Refused, match="there is a file; --force overwrites it"):
        save("second\n", path, force=False)
    assert path.read_text() == "first\n"
    save("second\n", path, force=True)
    assert path.read_text() == "second\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_no_file_to_write_to(tmp_path, force):
    with pytest.raises(Refused, match="expected a file, got a folder"):
        save("x", tmp_path, force=force)


# --- the command line


@pytest.fixture
def recorded(tmp_path, runner, monkeypatch):
    """Studies on the disk: `shown` has a confirmation that saves, `plain` has none."""
    monkeypatch.chdir(tmp_path)
    for name, ratios in (("shown", SAVES), ("plain", ())):
        found = with_runner(study(ratios), runner, name=name)
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        with Journal.create(folder, found.header) as journal:
            for event in (*found.history.trials, *found.pairs):
                journal.append(event)
    return tmp_path


def tune(*arguments, by=typed):
    return by("apply", *arguments)


def test_apply_prints_the_launch_and_writes_nothing(recorded):
    before = {p: p.stat().st_mtime_ns for p in recorded.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    done = tune("results/shown", by=in_a_process)
    assert (done.returncode, done.stdout) == (0, "fake --parallel 8\n"), done.stderr
    assert "95 % CI" in done.stderr
    after = {p: p.stat().st_mtime_ns for p in recorded.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert after == before


def test_apply_writes_a_file_once(recorded):
    assert tune("results/shown", "--as", "compose", "--output", "compose.yaml").returncode == 0
    text = (recorded / "compose.yaml").read_text()
    assert 'image: "fake:1"' in text
    done = tune("results/shown", "--as", "systemd", "--output", "compose.yaml")
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert (recorded / "compose.yaml").read_text() == text
    assert tune("results/shown", "--as", "systemd", "--output", "compose.yaml", "--force").returncode == 0
    assert (recorded / "compose.yaml").read_text().startswith("# made by")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["results/plain"], "tune confirm results/plain"),
        (
            ["results/shown", "--as", "modelfile"],
            "--as modelfile: this engine offers command, compose, systemd, kubernetes",
        ),
        (["results/shown", "--as", "word"], "expected one of command"),
        (["results/shown", "--force"], "--force: it goes with --output FILE"),
    ],
)
def test_apply_refuses_with_exit_code_2_and_prints_nothing(recorded, arguments, sentence):
    done = tune(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr


def test_an_unconfirmed_best_is_printed_with_a_warning_where_it_is_asked_for(recorded):
    done = tune("results/plain", "--unconfirmed")
    assert (done.returncode, done.stdout) == (0, "fake --parallel 8\n")
    assert "warning: trial 1 is the best of the search; no saving is confirmed" in done.stderr


# --- llama.cpp


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    spec = importlib.util.spec_from_file_location("llama_to_apply", ROOT / "runners" / "llama.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield module


TINY = Target(size="tiny", prompts=4, prompt_tokens=16, output_tokens=4)


def test_llama_offers_a_server_in_every_form_but_ollamas(llama):
    config = llama.space(TINY).complete({"parallel": 2})
    found = llama.service(config, TINY)
    assert found.argv == tuple(shlex.split(llama.command(config, TINY)))
    assert found.argv[-4:] == ("--port", "8080", "--host", "127.0.0.1")
    assert found.image_argv[-1] == "0.0.0.0"  # noqa: S104 - in a container
    assert found.image == "ghcr.io/ggml-org/llama.cpp:server"
    assert Path(found.paths[0]).is_file()
    for form in set(FORMS) - {"modelfile"}:
        assert render(form, launch(found))


def test_llama_names_the_llama_server_of_the_variable(llama, tmp_path, monkeypatch):
    program = tmp_path / "own-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("TUNE_LLAMA_SERVER", str(program))
    assert llama.service(llama.space(TINY).default(), TINY).argv[0] == str(program)
    monkeypatch.setenv("TUNE_LLAMA_SERVER", str(tmp_path / "nothing"))
    assert llama.service(llama.space(TINY).default(), TINY).argv[0] == "llama-server"


def test_llama_on_a_gpu_takes_the_image_for_it(llama):
    found = llama.service({**llama.space(TINY).default(), "gpu_layers": 3}, TINY)
    assert (found.image, found.gpus) == ("ghcr.io/ggml-org/llama.cpp:server-cuda", True)


def test_llamas_script_serves_and_ends_when_it_is_asked_to(llama):
    config = llama.space(TINY).complete({"parallel": 2, "mmap": False, "flash_attention": "on", "kv_unified": False})
    script = llama.service(config, TINY).python.replace("params.port = 8080", "params.port = 0")
    server = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        address = server.stdout.readline().removeprefix("serving on ").strip()
        with urllib.request.urlopen(f"{address}/health", timeout=20) as answer:  # noqa: S310 - our own address
            assert answer.status == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.journal import (
    FORMAT,
    NAME,
    Changes,
    End,
    Header,
    Journal,
    JournalError,
    Pair,
    Pending,
    Segment,
    lock,
    read,
)
from tuner.space import Refused
from tuner.trial import Decision, Energy, Exchange, Measurement, Proposal, Repeat, Reply, Target, Trial, Work

HEADER = Header(name="s", workload="llama", target=Target(), proposer="rules", machine={"cpu": "X"})

text = st.text(max_size=30)
number = st.floats(allow_nan=False, allow_infinity=False, width=64)
values = st.one_of(st.booleans(), st.integers(-(2**53), 2**53), number, text)
configs = st.dictionaries(text, values, max_size=4)
energies = st.builds(Energy, number, number, number)
works = st.builds(Work, units=st.integers(0, 10**9), prefill_seconds=st.none() | number)
measurements = st.builds(
    Measurement,
    work=works,
    seconds=number,
    energy=st.dictionaries(text, energies, max_size=3),
    quality=st.sampled_from(["measured", "estimated"]),
    meter=text,
    invalid=st.lists(text, max_size=2).map(tuple),
)
replies = st.builds(Reply, text=text, model=text, input_tokens=st.none() | st.integers(0, 10**6))
exchanges = st.builds(Exchange, prompt=text, reply=replies, fault=st.none() | text)
proposals = st.builds(
    Proposal, config=configs, source=text, reason=text, exchanges=st.lists(exchanges, max_size=2).map(tuple)
)
trials = st.builds(
    Trial,
    number=st.integers(0, 10**6),
    config=configs,
    proposal=proposals,
    measurements=st.lists(measurements, max_size=2).map(tuple),
    error=st.none() | text,
    effective=configs,
)
decisions = st.builds(
    Decision,
    action=st.sampled_from(["accept", "reject", "forbid", "stop"]),
    before_trial=st.integers(0, 9),
    remark=text,
)
events = st.one_of(
    trials,
    decisions,
    st.builds(Pending, number=st.integers(0, 9), proposal=proposals),
    st.builds(End, kind=st.sampled_from(["goal", "budget"]), reason=text),
    st.builds(
        Pair,
        number=st.integers(0, 9),
        default=trials,
        best=trials,
        default_first=st.booleans(),
        config=configs,
        planned=st.just(4),
    ),
)


def some_trial(number: int = 0) -> Trial:
    return Trial(number=number, config={"a": 1}, proposal=Proposal(config={"a": 1}, source="rules"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "study"
    path.mkdir()
    return path


@given(st.lists(events, max_size=5))
@settings(max_examples=60, deadline=None)
def test_what_is_appended_is_what_is_read(tmp_path_factory, happened):
    folder = tmp_path_factory.mktemp("study")
    with Journal.create(folder, HEADER) as journal:
        for event in happened:
            journal.append(event)
        live = journal.study
    assert read(folder) == live
    assert live.history.trials == tuple(e for e in happened if isinstance(e, Trial))


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_journal_cut_at_any_byte_after_the_header_reads_as_its_whole_lines(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("study")
    with Journal.create(folder, HEADER) as journal:
        for n in range(3):
            journal.append(some_trial(n))
    content = (folder / NAME).read_bytes()
    header_end = content.index(b"\n") + 1
    cut = header_end + cut % (len(content) - header_end + 1)
    (folder / NAME).write_bytes(content[:cut])
    assert len(read(folder).history) == content[:cut].count(b"\n") - 1


def test_a_torn_last_line_is_cut_off_before_the_next_append(folder):
    with Journal.create(folder, HEADER) as journal:
        journal.append(some_trial(0))
    with (folder / NAME).open("ab") as file:
        file.write(b'{"kind":"trial","body":{"num')
    with Journal.resume(folder) as journal:
        journal.append(some_trial(1))
    assert [t.number for t in read(folder).history.trials] == [0, 1]
    for line in (folder / NAME).read_text().splitlines():
        json.loads(line)


def of_format_1(folder, trials=1):
    """A journal as an older tune wrote it."""
    with Journal.create(folder, HEADER) as journal:
        for n in range(trials):
            journal.append(some_trial(n))
    path = folder / NAME
    path.write_bytes(path.read_bytes().replace(f'"format":{FORMAT}'.encode(), b'"format":1', 1))
    return path


def test_a_journal_of_an_older_format_that_goes_on_says_the_present_one_in_its_first_line(folder):
    path = of_format_1(folder)
    _, *before = path.read_bytes().splitlines()
    with Journal.resume(folder) as journal:
        assert journal.study.header == HEADER
        journal.append(Repeat(trial=some_trial(0), purpose="contender", after=1))
    first, *lines = path.read_bytes().splitlines()
    assert json.loads(first)["format"] == FORMAT
    assert lines[:1] == before
    assert read(folder) == journal.study


def test_a_journal_of_an_older_format_that_is_only_read_stays_as_it_is(folder):
    path = of_format_1(folder)
    before = path.read_bytes()
    assert len(read(folder).history) == 1
    assert path.read_bytes() == before


def test_a_journal_of_an_older_format_loses_nothing_where_its_new_first_line_cannot_be_written(folder, monkeypatch):
    path = of_format_1(folder)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JournalError, match="can be read but not continued"):
        Journal.resume(folder)
    assert path.read_bytes() == before


def test_a_torn_last_line_of_an_older_format_is_cut_off_too(folder):
    path = of_format_1(folder)
    with path.open("ab") as file:
        file.write(b'{"kind":"trial","bo')
    Journal.resume(folder).close()
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["study", "trial"]


def test_an_event_of_a_newer_tune_is_not_called_damage(folder):
    Journal.create(folder, HEADER).close()
    with (folder / NAME).open("ab") as file:
        file.write(b'{"kind":"seance","at":1.0,"body":{}}\n')
    with pytest.raises(Refused, match="line 2 holds 'seance', which this tune does not know; use a newer one"):
        read(folder)


def test_a_torn_middle_line_is_named_by_its_number(folder):
    with Journal.create(folder, HEADER) as journal:
        for n in range(3):
            journal.append(some_trial(n))
    lines = (folder / NAME).read_bytes().split(b"\n")
    lines[2] = lines[2][:20]
    (folder / NAME).write_bytes(b"\n".join(lines))
    with pytest.raises(Refused, match=r"line 3 is damaged .*head -n 2 "):
        read(folder)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no study here"),
        (b"", "header was never finished"),
        (b'{"format":1,"kind":"study","bo', "header was never finished"),
        (b'{"format":99,"kind":"study","body":{}}\n', "written in format 99, this tune reads up to format 3"),
        (b"[]\n", "line 1 is no study header"),
        (b'{"format":1,"kind":"study","body":{}}\n', "line 1 is no study header"),
    ],
)
def test_what_is_no_journal_is_refused_in_one_sentence(folder, content, sentence):
    if content is not None:
        (folder / NAME).write_bytes(content)
    with pytest.raises(Refused, match=sentence):
        read(folder)


def test_a_pending_proposal_is_over_when_its_trial_is_written(folder):
    with Journal.create(folder, HEADER) as journal:
        journal.append(Pending(number=0, proposal=some_trial().proposal))
        assert journal.study.pending_starts == 1
        journal.append(Pending(number=0, proposal=some_trial().proposal))
        assert journal.study.pending_starts == 2
        journal.append(some_trial())
        assert journal.study.pending is None
        assert journal.study.pending_starts == 0


def test_a_stop_that_was_asked_for_is_not_held_against_the_pending_proposal(folder):
    with Journal.create(folder, HEADER) as journal:
        journal.append(Pending(number=0, proposal=some_trial().proposal))
        journal.append(Decision(action="stop", before_trial=0))
        assert journal.study.pending is not None
        assert journal.study.pending_starts == 0


def test_a_segment_brings_its_own_machine_engine_and_space(folder):
    with Journal.create(folder, HEADER) as journal:
        journal.append(
            Segment(
                number=1, differences=("cpu",), machine={"cpu": "Y"}, identity={"engine": "e"}, space=({"name": "p"},)
            )
        )
    study = read(folder)
    assert (study.segment, study.machine, study.identity) == (1, {"cpu": "Y"}, {"engine": "e"})
    assert study.space == ({"name": "p"},)


def test_a_deleted_folder_is_written_again_with_every_line(folder):
    with Journal.create(folder, HEADER) as journal:
        journal.append(some_trial(0))
        (folder / NAME).unlink()
        folder.rmdir()
        journal.append(some_trial(1))
    assert [t.number for t in read(folder).history.trials] == [0, 1]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_in_the_middle_of_an_append_keeps_the_line_and_the_journal(folder, monkeypatch, moment):
    real, struck = os.fsync, []

    def interrupted(descriptor):
        if moment == "after":
            real(descriptor)
        if not struck:
            struck.append(True)
            raise KeyboardInterrupt

    with Journal.create(folder, HEADER) as journal:
        journal.append(some_trial(0))
        monkeypatch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.append(some_trial(1))
        monkeypatch.undo()
        journal.append(Decision(action="stop", before_trial=2))
        assert read(folder) == journal.study
    assert [t.number for t in read(folder).history.trials] == [0, 1]


def test_a_journal_that_somebody_cut_while_it_is_open_is_put_right(folder):
    with Journal.create(folder, HEADER) as journal:
        journal.append(some_trial(0))
        os.truncate(folder / NAME, 10)
        journal.append(some_trial(1))
    assert [t.number for t in read(folder).history.trials] == [0, 1]


def test_changes_of_a_resumed_study_hold_from_then_on(folder):
    with Journal.create(folder, HEADER) as journal:
        journal.append(Changes(trials=20, threshold="0.5x"))
        journal.append(Changes(confirm_pairs=8))
    header = read(folder).header
    assert (header.trials, header.threshold, header.confirm_pairs, header.proposer) == (20, "0.5x", 8, "rules")


def test_a_study_is_never_created_over_another(folder):
    Journal.create(folder, HEADER).close()
    with pytest.raises(JournalError, match="File exists"):
        Journal.create(folder, HEADER)


def test_a_full_disk_keeps_earlier_lines_whole_and_says_how_to_go_on(folder):
    """RLIMIT_FSIZE stops a write in its middle as a full disk does, with EFBIG in place of ENOSPC."""
    with Journal.create(folder, HEADER) as journal:
        journal.append(some_trial(0))
        size = (folder / NAME).stat().st_size
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
            with pytest.raises(JournalError, match=r"1 finished trials are kept.*tune run --resume"):
                journal.append(some_trial(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert (folder / NAME).stat().st_size == size
        journal.append(some_trial(2))
    assert [t.number for t in read(folder).history.trials] == [0, 2]


def test_no_space_left_is_called_a_full_disk(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Journal.create(folder, HEADER) as journal:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(JournalError, match="the disk is full"):
            journal.append(some_trial(0))
        monkeypatch.undo()


def test_a_second_process_is_kept_out_and_told_who_is_in(folder):
    code = f"from tuner.journal import lock\nfrom pathlib import Path\nwith lock(Path({str(folder)!r})): pass"
    with lock(folder):
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"process {os.getpid()} is running this study" in refused.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_lock_dies_with_its_process(folder):
    code = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from tuner.journal import lock
        with lock(Path({str(folder)!r})):
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    with lock(folder):
        pass

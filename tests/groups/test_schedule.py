"""systemd says when a calendar expression comes; groups are due when it has come since they ran."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blockferry.errors import UsageError
from blockferry.groups.definition import Group
from blockferry.groups.oncalendar import Calendar
from blockferry.groups.schedule import Run, due, last_runs, latest_time, record_run

Moment = datetime.datetime
MINUTE, SECOND = datetime.timedelta(minutes=1), datetime.timedelta(seconds=1)
BASE = Moment(2026, 2, 27, 23, 58, 30)

needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze says what is right: install systemd"
)


def systemd(expression: str, base: Moment = BASE, count: int = 3) -> list[Moment] | None:
    """Return the next points after a moment as systemd says, None if it does not understand the expression."""
    command = [
        "systemd-analyze",
        "calendar",
        f"--base-time={base:%Y-%m-%d %H:%M:%S}",
        f"--iterations={count}",
        expression,
    ]
    done = subprocess.run(
        command, env={"TZ": "UTC", "LC_ALL": "C", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None
    found = re.findall(
        r"^ *(?:Next elapse|Iter\S* #\d+): \w+ (\d+-\d+-\d+ \d+:\d+:\d+) UTC$", done.stdout, re.MULTILINE
    )
    assert found or "never" in done.stdout, done.stdout
    return [Moment.fromisoformat(each) for each in found]


def numbers(lowest: int, highest: int) -> st.SearchStrategy[str]:
    number = st.integers(lowest, highest)
    part = st.one_of(
        number.map(str),
        number.map("{:02}".format),
        st.tuples(number, number).map(sorted).map("{0[0]}..{0[1]}".format),
        st.builds("{}/{}".format, number, st.integers(0, highest)),
        st.builds("{}..{}/{}".format, number, number, st.integers(1, 7)),
    )
    return st.one_of(st.just("*"), st.lists(part, min_size=1, max_size=2).map(",".join))


DAYS = ["Mon", "tue", "Wednesday", "THU", "Fri", "Sat", "sunday"]
weekdays = st.one_of(
    st.lists(st.sampled_from(DAYS), min_size=1, max_size=3).map(",".join),
    st.sampled_from(["Mon..Fri", "sat..sunday", "Wed..Wed,Mon", "Fri..Mon"]),
)
years = st.one_of(st.just("*"), st.just("*"), numbers(2024, 2030))
dates = st.one_of(
    st.builds("{}-{}-{}".format, years, numbers(1, 12), numbers(1, 31)),
    st.builds("{}-{}".format, numbers(1, 12), numbers(1, 31)),
)
times = st.one_of(
    st.builds("{}:{}".format, numbers(0, 23), numbers(0, 59)),
    st.builds("{}:{}:{}".format, numbers(0, 23), numbers(0, 59), numbers(0, 59)),
)
expressions = st.tuples(*(st.one_of(st.just(""), words) for words in (weekdays, dates, times))).map(
    lambda words: " ".join(filter(None, words))
)


@needs_systemd
@settings(max_examples=300, deadline=None)
@given(expressions)
def test_what_is_understood_comes_when_systemd_says(expression: str) -> None:
    try:
        calendar = Calendar.parse(expression)
    except UsageError:
        return
    # systemd 252 leaves out midnight where steps do not end with the hour or the day: `*:0/7` comes at 00:07 first.
    steps = "/" in expression
    base = Moment(2026, 2, 27, 11, 58, 30) if steps else BASE
    points = systemd(expression, base)
    assert points is not None, "systemd does not understand it"
    assume(not steps or {point.date() for point in points} <= {base.date()})
    before = calendar.latest(base)
    for point in points:
        assert calendar.latest(point - SECOND) == before
        assert calendar.latest(point) == point
        before = point
    if not points:
        assert calendar.latest(Moment(2199, 12, 31, 23, 59, 59)) == before


SHORT = ["minutely", "hourly", "daily", "weekly", "monthly", "quarterly", "semiannually", "yearly", "annually"]
EXAMPLES = [
    "*:0/15",
    "Mon..Fri 02:30",
    "*-*-01 04:00",
    "Sat",
    "*-02-29 12:00",
    "Mon *-*-1..7 03:00",
    "8..18/2:00:30",
    "05-01",
]


@needs_systemd
@pytest.mark.parametrize("expression", SHORT + EXAMPLES)
def test_the_usual_expressions_are_understood(expression: str) -> None:
    first, second, _third = systemd(expression)
    calendar = Calendar.parse(expression)
    assert calendar.latest(first) == calendar.latest(second - SECOND) == first


@pytest.mark.parametrize(
    ("expression", "matches"),
    [
        ("*:0/15", lambda now: now.minute % 15 == 0),
        ("Mon..Fri 02:30", lambda now: (now.hour, now.minute) == (2, 30) and now.weekday() < 5),
        ("*-*-01,15 4..6:10", lambda now: now.day in {1, 15} and now.hour in {4, 5, 6} and now.minute == 10),
        ("weekly", lambda now: (now.weekday(), now.hour, now.minute) == (0, 0, 0)),
    ],
)
def test_the_latest_point_is_that_which_a_search_by_minutes_finds(expression: str, matches: object) -> None:
    calendar, latest = Calendar.parse(expression), None
    now = Moment(2027, 12, 25)
    for _ in range(20 * 24 * 60):
        latest = now if matches(now) else latest
        if latest:
            assert calendar.latest(now + 59 * SECOND) == latest
        now += MINUTE


def test_a_day_that_most_years_lack_is_found_in_the_year_that_has_it() -> None:
    assert Calendar.parse("*-02-29").latest(Moment(2027, 3, 1)) == Moment(2024, 2, 29)
    assert Calendar.parse("*-02-30").latest(Moment(2027, 3, 1)) is None
    assert Calendar.parse("2030-01-01").latest(Moment(2027, 3, 1)) is None


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("", "empty"),
        ("often", "no weekday"),
        ("25:00", "not within 0 and 23"),
        ("12:60", "not within"),
        ("*-13-01", "not within 1 and 12"),
        ("*:*/5", "write 0/5"),
        ("Fri..Mon", "begins on Monday"),
        ("22..4:00", "not within"),
        ("*:0/0", "not within"),
        ("*:*:7..7", "not within"),
        ("*-*~1", "not understood"),
        ("daily UTC", "no weekday"),
        ("12:00 Europe/Berlin", "'Europe/Berlin' is not understood"),
        ("12:00:00.5", "not understood"),
        ("12", "'12' is not understood"),
        ("1-2-3-4", "not understood"),
    ],
)
def test_what_is_not_understood_is_refused_with_examples(expression: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Calendar.parse(expression)
    assert repr(expression) in caught.value.message
    assert words in caught.value.message
    assert "Mon..Fri 02:30" in caught.value.remedy


# -- due ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLOCKFERRY_STATE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def zone(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


def utc(*fields: int) -> Moment:
    return Moment(*fields, tzinfo=datetime.UTC)


def group(name: str, schedule: str) -> Group:
    return Group.parse(name, {"volume": "/mnt/data", "schedule": schedule}, "there")


def names(groups: list[Group], runs: dict[str, Run], now: Moment) -> list[str]:
    return [each.name for each in due(groups, runs, now)]


in_utc = pytest.mark.parametrize("zone", ["UTC"], indirect=True)
in_berlin = pytest.mark.parametrize("zone", ["Europe/Berlin"], indirect=True)


@in_utc
@pytest.mark.usefixtures("zone")
def test_a_group_is_due_once_its_time_has_come_since_the_last_run_began() -> None:
    groups = [group("a", "daily"), group("b", "hourly"), group("c", "")]
    assert names(groups, {}, utc(2026, 5, 1, 12, 30)) == ["a", "b"]
    runs = {"a": Run(utc(2026, 5, 1, 0, 0, 1), True), "b": Run(utc(2026, 5, 1, 12, 0), True)}
    assert names(groups, runs, utc(2026, 5, 1, 12, 59, 59)) == []
    assert names(groups, runs, utc(2026, 5, 1, 13, 0)) == ["b"]
    assert names(groups, runs, utc(2026, 5, 9)) == ["a", "b"]


@in_utc
@pytest.mark.usefixtures("zone")
def test_missed_times_are_one_run_and_a_failed_one_waits_for_the_next() -> None:
    groups, runs, ran = [group("a", "hourly")], {"a": Run(utc(2026, 5, 1), True)}, 0
    for minute in range(30, 24 * 60, 10):  # the host slept until half past ten
        now = utc(2026, 5, 1, 10) + minute * MINUTE
        if due(groups, runs, now):
            runs["a"] = Run(now, False)
            ran += 1
    assert ran == 1 + 23


@in_utc
@pytest.mark.usefixtures("zone")
def test_a_run_that_began_in_the_future_says_nothing() -> None:
    runs = {"a": Run(utc(2035, 1, 1), True)}
    assert names([group("a", "daily")], runs, utc(2026, 5, 1)) == ["a"]


def test_a_schedule_that_only_systemd_knows_is_named_with_its_group() -> None:
    with pytest.raises(UsageError, match=r"^a: '12:00 Europe/Berlin'"):
        due([group("a", "12:00 Europe/Berlin")], {}, utc(2026, 5, 1))


@in_berlin
@pytest.mark.usefixtures("zone")
def test_schedules_are_in_local_time() -> None:
    assert latest_time("02:30", utc(2026, 7, 1, 12)) == utc(2026, 7, 1, 0, 30)
    assert latest_time("02:30", utc(2026, 12, 1, 12)) == utc(2026, 12, 1, 1, 30)


@in_berlin
@pytest.mark.usefixtures("zone")
@pytest.mark.parametrize("change", [utc(2026, 3, 29), utc(2026, 10, 25)])
def test_when_the_clocks_change_a_daily_group_runs_once(change: Moment) -> None:
    runs, ran = {"a": Run(change - datetime.timedelta(hours=12), True)}, []
    for minute in range(-90, 12 * 60, 5):
        now = change + minute * MINUTE
        if due([group("a", "02:30")], runs, now):
            runs["a"] = Run(now, True)
            ran.append(now)
    assert len(ran) == 1


def test_what_ran_is_remembered_with_its_time_and_end(state: Path) -> None:
    assert last_runs() == {}
    began = Moment(2026, 5, 1, 12, 0, 0, 123456, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    record_run("a", began, ok=True)
    record_run("b", began, ok=True)
    record_run("b", began + MINUTE, ok=False)
    assert last_runs() == {"a": Run(began, True), "b": Run(began + MINUTE, False)}
    assert sorted(path.name for path in state.iterdir()) == [".schedule.lock", "schedule.json"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"runs": 7}', '{"runs": {"a": {"began": "soon", "ok": true}}}', "\udcff"]
)
def test_a_damaged_memory_is_as_none_and_is_mended_by_the_next_run(state: Path, content: str) -> None:
    (state / "schedule.json").write_text(content, errors="surrogateescape")
    assert last_runs() == {}
    record_run("a", utc(2026, 5, 1), ok=True)
    assert list(last_runs()) == ["a"]

"""When something is due, in systemd's words: the part of OnCalendar (systemd.time(7)) that hosts without it can have.

    minutely hourly daily weekly monthly quarterly semiannually yearly      (also annually)
    [WEEKDAYS] [[YEAR-]MONTH-DAY] [HOUR:MINUTE[:SECOND]]                    at least one of them

Weekdays are `Mon,Thu` or `Mon..Fri`. Each of the figures is `*`, or a list (`,`) of numbers, ranges (`1..5`) and steps:
`0/15` is every fifteenth from 0 on, `8..18/2` every second in that range. What is left out is every day, at 00:00:00.
Everything is in local time. What systemd knows beyond that (time zones, `~`, fractions of seconds) is refused here.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Sequence

from blockferry.errors import UsageError

_SHORT = {
    "minutely": "*-*-* *:*:00",
    "hourly": "*-*-* *:00:00",
    "daily": "*-*-* 00:00:00",
    "weekly": "Mon *-*-* 00:00:00",
    "monthly": "*-*-01 00:00:00",
    "quarterly": "*-01,04,07,10-01 00:00:00",
    "semiannually": "*-01,07-01 00:00:00",
    "yearly": "*-01-01 00:00:00",
    "annually": "*-01-01 00:00:00",
}
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_YEARS, _MONTHS, _DAYS, _HOURS, _SIXTY = (1970, 2199), (1, 12), (1, 31), (0, 23), (0, 59)
_PART = re.compile(r"(\d{1,4})(?:\.\.(\d{1,4}))?(?:/(\d{1,4}))?", re.ASCII)
EXAMPLES = (
    "Write hourly, daily, weekly, monthly or for example `Mon..Fri 02:30`, `*-*-01 04:00`, `*:0/15`; "
    "see `systemd-analyze calendar`."
)
"""What to tell whoever wrote something else."""


@dataclasses.dataclass(frozen=True)
class Calendar:
    """Points in local time that come again and again; each field holds its values in rising order."""

    weekdays: frozenset[int]
    """0 is Monday."""
    years: tuple[int, ...]
    months: tuple[int, ...]
    days: tuple[int, ...]
    hours: tuple[int, ...]
    minutes: tuple[int, ...]
    seconds: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Calendar:
        """Read an expression; raise UsageError, with what is understood, if it is none of these."""
        words = _SHORT.get(text.strip().lower(), text).split()
        try:
            if not words:
                raise ValueError("it is empty")
            weekdays = _weekdays(words.pop(0)) if words[0][0].isalpha() else range(7)
            date = words.pop(0) if words and "-" in words[0] else "*-*-*"
            time = words.pop(0) if words and ":" in words[0] else "00:00:00"
            if words:
                raise ValueError(f"{words[0]!r} is not understood")
            years, months, days = _fields(date, "-", ("*",), (_YEARS, _MONTHS, _DAYS))
            hours, minutes, seconds = _fields(time, ":", (), (_HOURS, _SIXTY, _SIXTY))
        except ValueError as error:
            raise UsageError(f"{text!r} is no time that comes again: {error}", remedy=EXAMPLES) from None
        return cls(frozenset(weekdays), years, months, days, hours, minutes, seconds)

    def latest(self, before: datetime.datetime) -> datetime.datetime | None:
        """Return the last point at or before a time, both local and without a zone; None if there was none."""
        today = before.date()
        now = (before.hour, before.minute, before.second)
        time = _last((self.hours, self.minutes, self.seconds), now) if self._has(today) else None
        if time:
            hour, minute, second = time
            return datetime.datetime.combine(today, datetime.time(hour, minute, second))
        day = self._latest_day(today - datetime.timedelta(days=1))
        end = datetime.time(self.hours[-1], self.minutes[-1], self.seconds[-1])
        return datetime.datetime.combine(day, end) if day else None

    def _has(self, day: datetime.date) -> bool:
        """Tell whether there is a point on a day."""
        return (
            day.weekday() in self.weekdays
            and day.year in self.years
            and day.month in self.months
            and day.day in self.days
        )

    def _latest_day(self, until: datetime.date) -> datetime.date | None:
        """Return the last day at or before one that has a point, None if there is none."""
        for year in reversed(self.years):
            if year > until.year:
                continue
            for month in reversed(self.months):
                if (year, month) > (until.year, until.month):
                    continue
                for day in reversed(self.days):
                    found = _date(year, month, day)
                    if found and found <= until and found.weekday() in self.weekdays:
                        return found
        return None


def _date(year: int, month: int, day: int) -> datetime.date | None:
    """Return a date, None if the month has no such day."""
    try:
        return datetime.date(year, month, day)
    except ValueError:
        return None


def _last(fields: Sequence[Sequence[int]], limit: Sequence[int]) -> tuple[int, ...] | None:
    """Return the greatest combination of the fields' values that is not above a limit, None if there is none."""
    if not fields:
        return ()
    for value in reversed(fields[0]):
        if value < limit[0]:
            return (value, *(field[-1] for field in fields[1:]))
        if value == limit[0] and (rest := _last(fields[1:], limit[1:])) is not None:
            return (value, *rest)
    return None


def _weekdays(word: str) -> set[int]:
    """Return the days of `Mon,Wed..Fri`."""
    found: set[int] = set()
    for part in word.split(","):
        first, separator, last = part.partition("..")
        begin, end = _weekday(first), _weekday(last if separator else first)
        if begin > end:
            raise ValueError(f"{part!r}: the week begins on Monday")
        found.update(range(begin, end + 1))
    return found


def _weekday(name: str) -> int:
    """Return the number of a weekday, which is written in full or by three letters."""
    for number, full in enumerate(_WEEKDAYS):
        if name.lower() in {full, full[:3]}:
            return number
    raise ValueError(f"{name!r} is no weekday")


def _fields(
    word: str, separator: str, missing: tuple[str, ...], bounds: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], ...]:
    """Return the values of the three fields of a date, whose first may be missing, or of a time, whose last may be."""
    fields = word.split(separator)
    if len(fields) == len(bounds) - 1:
        fields = [*missing, *fields] if missing else [*fields, "00"]
    if len(fields) != len(bounds):
        raise ValueError(f"{word!r} is not understood")
    return tuple(_values(field, *bound) for field, bound in zip(fields, bounds, strict=True))


def _values(field: str, lowest: int, highest: int) -> tuple[int, ...]:
    """Return the values of one field, such as `*`, `1,4` or `0/15`, in rising order."""
    if field == "*":
        return tuple(range(lowest, highest + 1))
    found: set[int] = set()
    for part in field.split(","):
        match = _PART.fullmatch(part)
        if not match:
            hint = f", write {lowest}{part[1:]}" if part.startswith("*/") else ""
            raise ValueError(f"{part!r} is not understood{hint}")
        first, last, step = (int(each) if each else None for each in match.groups())
        assert first is not None  # noqa: S101  # the expression has it in any case
        end = last if last is not None else highest if step else first
        # A step that is never made, and a range of one, are mistakes to systemd, too; of one, at least in seconds.
        if not lowest <= first <= end <= highest or last == first or step == 0 or (step and first + step > highest):
            raise ValueError(f"{part!r} is not within {lowest} and {highest}")
        found.update(range(first, end + 1, step or 1))
    return tuple(sorted(found))

//! The site's week: at which times of which days which amount of the uplink is allowed, in rclone's form.
//!
//! `Mon-Fri 08:00,20% 19:00,100% Sat,Sun 00:00,60%`: a point is a time and an amount, a day token opens a group for the
//! points after it, and points before any day are for every day. The point in force is the last one at or before now in the
//! week, wrapping: on Saturday, Friday's last one goes on until Saturday has one of its own.
//!
//! Always: a point takes effect at an instant. A local time that the clocks skip takes effect when they jump, one that comes
//! twice takes effect the first time and is not undone when the hour repeats. Never: local times compared with each other
//! to find out what is in force.

mod reader;

use std::fmt;
use std::str::FromStr;

use jiff::civil::{Date, Weekday};
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{Span, Timestamp};

use crate::units::{Rate, Share, UnixMs};

/// How many days back the point in force is looked for: a week, twice, as a day of the week may be missing when a place
/// changes sides of the date line.
const DAYS_BACK: i64 = 15;

/// The days of a week, in the order of the calendar.
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// How much of the uplink is allowed: a share of it, or bytes per second. Prints and parses as `20%`, `5.00 MB/s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    Share(Share),
    Rate(Rate),
}

impl Amount {
    /// Bytes per second on a link of this rate: never more than it carries, and never nothing.
    pub fn of(self, link: Rate) -> Rate {
        let rate = match self {
            Amount::Share(share) => link.share(share),
            Amount::Rate(rate) => rate.min(link),
        };
        Rate(rate.0.max(1))
    }

    /// The same amount, or what is wrong with it on a link of this rate.
    pub fn within(self, link: Rate) -> Result<Amount, String> {
        match self {
            Amount::Rate(rate) if rate > link => Err(format!("{rate} is beyond the uplink's own rate of {link}")),
            amount => Ok(amount),
        }
    }

    /// Text that parses to exactly this amount, to be kept.
    pub fn exact(self) -> String {
        match self {
            Amount::Share(share) => share.to_string(),
            Amount::Rate(rate) => format!("{}B/s", rate.0),
        }
    }
}

impl FromStr for Amount {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("off") {
            return Err(
                "\"off\" is no limit at all in rclone; write 100% for that, or pause the drain to let nothing \
                        out"
                .to_owned(),
            );
        }
        if text.contains('%') {
            return text.parse().map(Amount::Share);
        }
        if text.contains("/s") || text.contains("bps") {
            return text.parse().map(Amount::Rate);
        }
        Err(format!("expected a share such as 20% or a rate such as 5MB/s or 40Mbit/s, found {text:?}"))
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Amount::Share(share) => share.fmt(f),
            Amount::Rate(rate) => rate.fmt(f),
        }
    }
}

/// A time of one day of the week from which an amount is allowed. Prints as `Mon-Fri 08:00, 20%`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// 0 is Monday.
    day: usize,
    /// Minutes since midnight.
    minute: u16,
    pub amount: Amount,
    /// Bytes per second that the amount comes to.
    pub rate: Rate,
    /// The days as they were written, such as `Mon-Fri`.
    days: String,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}, {}", self.days, clock(self.minute), self.amount)
    }
}

/// A week of points, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timetable {
    /// By day and minute, no two of them at the same.
    points: Vec<Point>,
}

/// A time in which one point is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    pub from: UnixMs,
    /// The first moment after it.
    pub until: UnixMs,
    pub rate: Rate,
    pub point: &'a Point,
}

/// What is in force at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Current<'a> {
    pub point: &'a Point,
    /// When the point took effect.
    pub since: UnixMs,
    /// When another rate takes effect; none when it is the same all week.
    pub until: Option<UnixMs>,
}

impl Timetable {
    /// Reads a timetable for a link of this rate, or says all that is wrong with it at once.
    pub fn parse(text: &str, link: Rate) -> Result<Timetable, Vec<String>> {
        reader::read(text, link)
    }

    /// What is in force at `now`.
    pub fn at(&self, zone: &TimeZone, now: UnixMs) -> Option<Current<'_>> {
        let mut changes = self.changes(zone, now);
        let (mut since, mut point) = changes.next().filter(|(at, _)| *at <= now)?;
        let mut until = None;
        // of several at one instant the last one counts, so one that is undone at once is no change
        let mut undecided: Option<(UnixMs, &Point)> = None;
        for (at, next) in changes {
            if at <= now {
                (since, point) = (at, next);
                continue;
            }
            match undecided {
                Some((first, other)) if at > first && other.rate != point.rate => {
                    until = Some(first);
                    break;
                }
                _ => undecided = Some((at, next)),
            }
            if at.0 - now.0 > DAYS_BACK * 86_400_000 {
                break;
            }
        }
        Some(Current { point, since, until })
    }

    /// The segments from `from` until `until`, without gaps, each of some length.
    pub fn segments<'a>(
        &'a self,
        zone: &TimeZone,
        from: UnixMs,
        until: UnixMs,
    ) -> impl Iterator<Item = Segment<'a>> + use<'a> {
        let mut changes = self.changes(zone, from).peekable();
        let (mut begin, mut point) = (from, None::<&Point>);
        std::iter::from_fn(move || {
            while begin < until {
                let next = changes.peek().map_or(until, |(at, _)| (*at).min(until));
                if next > begin
                    && let Some(point) = point
                {
                    let segment = Segment { from: begin, until: next, rate: point.rate, point };
                    begin = next;
                    return Some(segment);
                }
                let (_, next) = changes.next()?;
                point = Some(next);
            }
            None
        })
    }

    /// The points with the instants at which they take effect, in order, from well before `around`: of several at the same
    /// instant the last one counts.
    fn changes<'a>(&'a self, zone: &TimeZone, around: UnixMs) -> impl Iterator<Item = (UnixMs, &'a Point)> + use<'a> {
        let zone = zone.clone();
        let today = zone.to_datetime(around.timestamp()).date();
        let first = today.saturating_sub(Span::new().days(DAYS_BACK));
        std::iter::successors(Some(first), |date| date.tomorrow().ok()).flat_map(move |date| {
            let day = date.weekday().to_monday_zero_offset() as usize;
            let zone = zone.clone();
            self.points.iter().filter(move |point| point.day == day).map(move |point| (point.on(date, &zone), point))
        })
    }

    /// The week as a person would read it, a line for each stretch of a day; days that are alike stand together.
    pub fn week(&self) -> Vec<String> {
        let days: Vec<Vec<(u16, u16, &Point)>> = (0..7).map(|day| self.day(day)).collect();
        let alike = |a: usize, b: usize| {
            let stretches = |day: usize| days[day].iter().map(|(from, until, point)| (*from, *until, point.amount));
            stretches(a).eq(stretches(b))
        };
        let (mut lines, mut day) = (Vec::new(), 0);
        while day < 7 {
            let last = (day..7).take_while(|other| alike(day, *other)).last().unwrap_or(day);
            let mut name = match last - day {
                0 => short(day).to_owned(),
                6 => "every day".to_owned(),
                _ => format!("{}-{}", short(day), short(last)),
            };
            for (from, until, point) in &days[day] {
                let until = if *until == 24 * 60 { "24:00".to_owned() } else { clock(*until) };
                let rate = match point.amount {
                    Amount::Share(_) => format!("  {}", point.rate),
                    Amount::Rate(_) => String::new(),
                };
                lines.push(format!("{name:<9}  {}-{until}  {:>4}{rate}", clock(*from), point.amount.to_string()));
                name.clear();
            }
            day = last + 1;
        }
        lines
    }

    /// The stretches of one day as the clock on the wall shows them: from, until, and whose.
    fn day(&self, day: usize) -> Vec<(u16, u16, &Point)> {
        let first_of_today = self.points.partition_point(|point| point.day < day);
        let mut stretches: Vec<(u16, u16, &Point)> = Vec::new();
        // what yesterday, or last week, left in force
        let carried = self.points[..first_of_today].last().or(self.points.last());
        let own = self.points.iter().filter(|point| point.day == day).map(|point| (point.minute, point));
        for (minute, point) in carried.map(|point| (0, point)).into_iter().chain(own) {
            match stretches.last_mut() {
                Some((_, _, last)) if last.amount == point.amount => continue,
                Some((from, _, _)) if *from == minute => drop(stretches.pop()),
                Some((_, until, _)) => *until = minute,
                None => {}
            }
            stretches.push((minute, 24 * 60, point));
        }
        stretches
    }
}

impl Point {
    /// The instant at which it takes effect on this date.
    fn on(&self, date: Date, zone: &TimeZone) -> UnixMs {
        let local = date.at((self.minute / 60) as i8, (self.minute % 60) as i8, 0, 0);
        let instant = match zone.to_ambiguous_timestamp(local).offset() {
            AmbiguousOffset::Unambiguous { offset } => offset.to_timestamp(local),
            // it comes twice: the first time
            AmbiguousOffset::Fold { before, .. } => before.to_timestamp(local),
            // it does not come: at the jump, which lies between the two readings of it
            AmbiguousOffset::Gap { before, after } => match (after.to_timestamp(local), before.to_timestamp(local)) {
                (Ok(early), Ok(late)) => Ok(jump(zone, early, late)),
                (failed, _) => failed,
            },
        };
        // beyond the calendar's ends, some eight thousand years from here, nothing takes effect
        UnixMs(instant.map_or(i64::MAX, Timestamp::as_millisecond))
    }
}

/// The moment between these two at which the clocks change.
fn jump(zone: &TimeZone, early: Timestamp, late: Timestamp) -> Timestamp {
    let (before, mut low, mut high) = (zone.to_offset(early), early.as_second(), late.as_second());
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        match Timestamp::from_second(middle) {
            Ok(at) if zone.to_offset(at) == before => low = middle,
            _ => high = middle,
        }
    }
    Timestamp::from_second(high).unwrap_or(late)
}

/// `08:00`.
fn clock(minute: u16) -> String {
    format!("{:02}:{:02}", minute / 60, minute % 60)
}

/// `Mon`.
fn short(day: usize) -> &'static str {
    &DAYS[day][..3]
}

/// A day of a date, as this file counts them.
pub fn short_day(day: Weekday) -> &'static str {
    short(day.to_monday_zero_offset() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::civil::DateTime;
    use proptest::prelude::*;

    const LINK: Rate = Rate(25_000_000);

    fn timetable(text: &str) -> Timetable {
        Timetable::parse(text, LINK).unwrap()
    }

    fn zone(name: &str) -> TimeZone {
        TimeZone::get(name).unwrap()
    }

    fn utc(text: &str) -> UnixMs {
        text.parse().unwrap()
    }

    fn amount_at(timetable: &Timetable, zone: &TimeZone, at: &str) -> String {
        timetable.at(zone, utc(at)).unwrap().point.amount.to_string()
    }

    #[test]
    fn a_week_of_groups_wraps_around() {
        let timetable = timetable("Mon-Fri 08:00,20% 19:00,100% sun 12:00,40Mbit/s");
        let berlin = zone("Europe/Berlin");
        // in winter the clocks there are an hour ahead of UTC; 2026-01-05 is a Monday
        for (at, amount) in [
            ("2026-01-05T06:59:59Z", "5.00 MB/s"),
            ("2026-01-05T07:00:00Z", "20%"),
            ("2026-01-05T18:00:00Z", "100%"),
            ("2026-01-06T06:59:59Z", "100%"),
            ("2026-01-10T12:00:00Z", "100%"),
            ("2026-01-11T11:00:00Z", "5.00 MB/s"),
        ] {
            assert_eq!(amount_at(&timetable, &berlin, at), amount, "{at}");
        }
        let friday_evening = timetable.at(&berlin, utc("2026-01-10T12:00:00Z")).unwrap();
        assert_eq!(friday_evening.point.to_string(), "Mon-Fri 19:00, 100%");
        assert_eq!(friday_evening.since, utc("2026-01-09T18:00:00Z"));
        assert_eq!(friday_evening.until, Some(utc("2026-01-11T11:00:00Z")));
    }

    #[test]
    fn what_is_the_same_all_week_has_no_end() {
        let timetable = timetable("08:00,20% 12:00,5MB/s");
        assert_eq!(timetable.at(&TimeZone::UTC, utc("2026-01-05T09:00:00Z")).unwrap().until, None);
    }

    #[test]
    fn a_time_that_is_skipped_takes_effect_at_the_jump() {
        let timetable = timetable("00:00,10% 02:30,20% 04:00,30%");
        for (name, jump, before, after) in [
            ("Europe/Berlin", "2026-03-29T01:00:00Z", "2026-03-29T00:59:59Z", "2026-03-29T01:59:59Z"),
            ("America/New_York", "2026-03-08T07:00:00Z", "2026-03-08T06:59:59Z", "2026-03-08T07:59:59Z"),
        ] {
            let zone = zone(name);
            assert_eq!(amount_at(&timetable, &zone, before), "10%", "{name}");
            assert_eq!(amount_at(&timetable, &zone, jump), "20%", "{name}");
            assert_eq!(timetable.at(&zone, utc(jump)).unwrap().since, utc(jump), "{name}");
            assert_eq!(amount_at(&timetable, &zone, after), "20%", "{name}");
        }
    }

    #[test]
    fn a_time_that_comes_twice_takes_effect_once() {
        let timetable = timetable("00:00,10% 02:30,20% 02:45,30%");
        let berlin = zone("Europe/Berlin");
        for (at, amount) in [
            ("2026-10-25T00:29:59Z", "10%"),
            ("2026-10-25T00:30:00Z", "20%"),
            ("2026-10-25T00:45:00Z", "30%"),
            // the hour repeats, and 02:00 to 02:45 of it is not undone
            ("2026-10-25T01:05:00Z", "30%"),
            ("2026-10-25T01:35:00Z", "30%"),
        ] {
            assert_eq!(amount_at(&timetable, &berlin, at), amount, "{at}");
        }
        let new_york = zone("America/New_York");
        let timetable = Timetable::parse("00:00,10% 01:30,20%", LINK).unwrap();
        assert_eq!(timetable.at(&new_york, utc("2026-11-01T06:10:00Z")).unwrap().since, utc("2026-11-01T05:30:00Z"));
    }

    #[test]
    fn clocks_may_change_by_half_an_hour() {
        let timetable = timetable("00:00,10% 01:45,20% 02:15,30%");
        let lord_howe = zone("Australia/Lord_Howe");
        // back from +11:00 to +10:30 at 02:00, so 01:30 to 02:00 comes twice
        assert_eq!(timetable.at(&lord_howe, utc("2026-04-04T15:10:00Z")).unwrap().since, utc("2026-04-04T14:45:00Z"));
        // forward from 02:00 to 02:30, so 02:15 takes effect at the jump
        assert_eq!(timetable.at(&lord_howe, utc("2026-10-03T15:30:00Z")).unwrap().since, utc("2026-10-03T15:30:00Z"));
        assert_eq!(amount_at(&timetable, &lord_howe, "2026-10-03T15:29:59Z"), "20%");
        assert_eq!(amount_at(&timetable, &lord_howe, "2026-10-03T15:30:00Z"), "30%");
    }

    #[test]
    fn the_day_that_a_place_leaves_out_ends_as_it_would_have() {
        // Friday 2011-12-30 did not come in Samoa
        let apia = zone("Pacific/Apia");
        let friday = timetable("Thu 08:00,10% Fri 08:00,20% 19:00,30% Sat 08:00,40%");
        assert_eq!(amount_at(&friday, &apia, "2011-12-30T09:59:59Z"), "10%");
        assert_eq!(amount_at(&friday, &apia, "2011-12-30T10:00:00Z"), "30%");
        assert_eq!(friday.at(&apia, utc("2011-12-30T10:00:00Z")).unwrap().until, Some(utc("2011-12-30T18:00:00Z")));
        let only_friday = timetable("Fri 08:00,20%");
        assert_eq!(amount_at(&only_friday, &apia, "2012-01-02T00:00:00Z"), "20%");
    }

    #[test]
    fn a_week_is_printed_as_people_read_it() {
        assert_eq!(
            timetable("Mon-Fri 08:00,20% 19:00,100% Sat,Sun 00:00,40Mbit/s").week(),
            [
                "Mon        00:00-08:00  5.00 MB/s",
                "           08:00-19:00   20%  5.00 MB/s",
                "           19:00-24:00  100%  25.0 MB/s",
                "Tue-Fri    00:00-08:00  100%  25.0 MB/s",
                "           08:00-19:00   20%  5.00 MB/s",
                "           19:00-24:00  100%  25.0 MB/s",
                "Sat-Sun    00:00-24:00  5.00 MB/s",
            ]
        );
        assert_eq!(timetable("08:00,20%").week(), ["every day  00:00-24:00   20%  5.00 MB/s"]);
    }

    /// What a clock on the wall would do: it fires every point that it reaches or jumps over, and none again when it is put
    /// back.
    fn by_the_wall(timetable: &Timetable, zone: &TimeZone, from: UnixMs, days: i64) -> Vec<(UnixMs, Option<usize>)> {
        let local = |at: UnixMs| zone.to_datetime(at.timestamp());
        let place = |at: DateTime| {
            let day = at.date().weekday().to_monday_zero_offset() as usize;
            (day, at.hour() as u16 * 60 + at.minute() as u16)
        };
        let (mut furthest, mut in_force, mut seen) = (local(from), None, Vec::new());
        for minute in 0..days * 24 * 60 {
            let at = UnixMs(from.0 + minute * 60_000);
            while furthest < local(at) {
                furthest = furthest.saturating_add(Span::new().minutes(1));
                let fired = timetable.points.iter().position(|p| (p.day, p.minute) == place(furthest));
                in_force = fired.or(in_force);
            }
            seen.push((at, in_force));
        }
        seen
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn the_point_in_force_is_the_one_that_a_clock_on_the_wall_reached_last(
            at in proptest::sample::select(vec![
                ("Europe/Berlin", "2026-03-29T01:00:00Z"),
                ("Europe/Berlin", "2026-10-25T01:00:00Z"),
                ("America/New_York", "2026-03-08T07:00:00Z"),
                ("America/New_York", "2026-11-01T06:00:00Z"),
                ("America/St_Johns", "2006-10-29T02:31:00Z"),
                ("Australia/Lord_Howe", "2026-04-04T15:00:00Z"),
                ("Australia/Lord_Howe", "2026-10-03T15:30:00Z"),
                ("Pacific/Apia", "2011-12-30T10:00:00Z"),
                ("Pacific/Kwajalein", "1993-08-21T12:00:00Z"),
                ("Asia/Kolkata", "2026-01-01T00:00:00Z"),
            ]),
            mut places in proptest::collection::btree_set((0usize..7, 0u16..1440), 1..12),
            near in proptest::collection::btree_set((0usize..7, 0u16..200), 0..6),
        ) {
            places.extend(near);
            let points = places.iter().enumerate().map(|(n, (day, minute))| Point {
                day: *day,
                minute: *minute,
                amount: Amount::Rate(Rate(n as u64 % 5 + 1)),
                rate: Rate(n as u64 % 5 + 1),
                days: String::new(),
            });
            let (timetable, zone) = (Timetable { points: points.collect() }, zone(at.0));
            let transition = utc(at.1);
            // two weeks until every point was reached, even where a day is missing
            let (start, from) = (UnixMs(transition.0 - 16 * 86_400_000), UnixMs(transition.0 - 86_400_000));
            let until = UnixMs(transition.0 + 2 * 86_400_000);
            let segments: Vec<_> = timetable.segments(&zone, from, until).collect();
            prop_assert_eq!(segments.first().map(|s| s.from), Some(from));
            prop_assert_eq!(segments.last().map(|s| s.until), Some(until));
            prop_assert!(segments.iter().all(|s| s.from < s.until));
            prop_assert!(segments.windows(2).all(|two| two[0].until == two[1].from));
            for (at, expected) in by_the_wall(&timetable, &zone, start, 18) {
                if at < from {
                    continue;
                }
                let expected = &timetable.points[expected.unwrap()];
                let segment = segments.iter().find(|s| s.from <= at && at < s.until).unwrap();
                prop_assert_eq!(segment.point, expected, "{}", at);
                if at.0 % 1_380_000 == 0 {
                    let current = timetable.at(&zone, at).unwrap();
                    prop_assert_eq!(current.point, expected);
                    let ends = segments.iter().find(|s| s.from > at && s.rate != expected.rate).map(|s| s.from);
                    prop_assert!(ends.is_none() || current.until == ends, "{:?} {:?}", current.until, ends);
                }
            }
        }
    }
}

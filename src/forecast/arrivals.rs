//! What devices brought so far, and what is to be expected of them.
//!
//! Always: what comes now is a mean over minutes, so that bursts do not make it jump; a day is expected again only while today is
//! like yesterday. Never: a rate from what had come before this ran.

use std::collections::VecDeque;

use super::DAY_MS;
use crate::allowance::Zone;
use crate::units::UnixMs;

/// Seconds over which what arrives now is a mean, so that devices that send all at once do not make it jump.
const RECENT_MS: i64 = 600_000;
const SAMPLE_MS: i64 = 5_000;
/// The day that lies behind is kept in stretches as long as that.
const STRETCHES: usize = (DAY_MS / RECENT_MS) as usize;
/// What comes now may differ from what came at this time yesterday by this factor before yesterday counts for nothing.
const LIKE_YESTERDAY: f64 = 1.25;

/// What devices brought so far: over the last ten minutes, and over a day once it has run for one.
#[derive(Debug, Clone, Default)]
pub struct Arrivals {
    /// Moments, with bytes and uploads accepted until then: the last ten minutes, oldest first.
    recent: VecDeque<(i64, f64, f64)>,
    /// The same every ten minutes: a day and an hour, as some days are longer by that, oldest first.
    day: VecDeque<(i64, f64, f64)>,
}

impl Arrivals {
    /// Notes how much was accepted until `now`, as the books have it.
    pub fn note(&mut self, now: UnixMs, bytes: f64, uploads: f64) {
        let sample = (now.0, bytes, uploads);
        // a clock that was put back, or books that were made anew, begin again
        if self.recent.back().is_some_and(|(at, known, _)| now.0 < *at || bytes < *known) {
            *self = Arrivals::default();
        }
        // what had come before this ran says nothing of how fast it comes
        if self.recent.front().is_some_and(|(_, known, _)| bytes == *known) {
            self.recent.clear();
        }
        // the last one moves on until it is worth keeping
        if self.recent.len() > 2 && self.recent[self.recent.len() - 2].0 + SAMPLE_MS > now.0 {
            self.recent.pop_back();
        }
        self.recent.push_back(sample);
        while self.recent.get(1).is_some_and(|(at, ..)| at + RECENT_MS <= now.0) {
            self.recent.pop_front();
        }
        if self.day.back().is_none_or(|(at, ..)| at + RECENT_MS <= now.0) {
            self.day.push_back(sample);
            if self.day.len() > STRETCHES + 8 {
                self.day.pop_front();
            }
        }
    }

    /// Bytes and uploads per second over the last ten minutes, or as long as there is something to go by.
    pub fn now(&self) -> (f64, f64) {
        match (self.recent.front(), self.recent.back()) {
            (Some(first), Some(last)) => per_second(first, last),
            _ => (0.0, 0.0),
        }
    }

    /// What is to be expected, at a site whose people live by this zone's clocks.
    pub fn expected(&self, zone: &Zone) -> Expected {
        let (bytes_per_second, uploads_per_second) = self.now();
        let even = Expected { bytes_per_second, uploads_per_second, day: Vec::new() };
        let (Some((now, ..)), Some((first, ..))) = (self.recent.back(), self.day.front()) else { return even };
        if now - first < DAY_MS + RECENT_MS {
            return even;
        }
        let mut wall = Wall::new(zone);
        let recently = wall.stretch(now - RECENT_MS / 2);
        let (mut day, mut yesterday) = (vec![None; STRETCHES], 0.0);
        for (first, last) in self.day.iter().zip(self.day.iter().skip(1)) {
            let (middle, (rate, _)) = ((first.0 + last.0) / 2, per_second(first, last));
            let stretch = wall.stretch(middle);
            if stretch == recently && now - middle > DAY_MS / 2 {
                yesterday = rate;
            }
            day[stretch] = Some(rate);
        }
        let alike = bytes_per_second <= yesterday * LIKE_YESTERDAY && yesterday <= bytes_per_second * LIKE_YESTERDAY;
        if !alike {
            return even;
        }
        // an hour that the clocks left out is like the one before
        let mut known = bytes_per_second;
        let day = day.into_iter().map(|rate| {
            known = rate.unwrap_or(known);
            known
        });
        Expected { day: day.collect(), ..even }
    }
}

/// The clock on the wall, for moments mostly in order.
pub(super) struct Wall<'a> {
    zone: &'a Zone,
    offset_ms: i64,
    /// Moments between which the clocks do not change.
    even: std::ops::Range<i64>,
}

impl Wall<'_> {
    pub(super) fn new(zone: &Zone) -> Wall<'_> {
        Wall { zone, offset_ms: 0, even: 0..0 }
    }

    /// Which stretch of the day it is.
    fn stretch(&mut self, at_ms: i64) -> usize {
        if !self.even.contains(&at_ms) {
            let at = UnixMs(at_ms).timestamp();
            self.offset_ms = i64::from(self.zone.rules.to_offset(at).seconds()) * 1000;
            let next = self.zone.rules.following(at).next().map(|change| change.timestamp().as_millisecond());
            self.even = at_ms..next.unwrap_or(i64::MAX);
        }
        ((at_ms + self.offset_ms).rem_euclid(DAY_MS) / RECENT_MS) as usize
    }
}

fn per_second(first: &(i64, f64, f64), last: &(i64, f64, f64)) -> (f64, f64) {
    let seconds = (last.0 - first.0) as f64 / 1000.0;
    if seconds <= 0.0 { (0.0, 0.0) } else { ((last.1 - first.1) / seconds, (last.2 - first.2) / seconds) }
}

/// What devices will bring.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Expected {
    /// As it is now.
    pub bytes_per_second: f64,
    pub uploads_per_second: f64,
    /// Bytes per second in each stretch of a day from midnight on; empty where it stays as it is now.
    pub day: Vec<f64>,
}

impl Expected {
    pub(super) fn at(&self, at_ms: i64, wall: &mut Wall) -> f64 {
        if self.day.is_empty() {
            return self.bytes_per_second;
        }
        self.day.get(wall.stretch(at_ms)).copied().unwrap_or(self.bytes_per_second)
    }

    pub(super) fn mean(&self) -> f64 {
        match self.day.len() {
            0 => self.bytes_per_second,
            n => self.day.iter().sum::<f64>() / n as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    fn zone() -> Zone {
        Zone { rules: TimeZone::get("Europe/Berlin").unwrap(), name: "Europe/Berlin".to_owned() }
    }

    #[test]
    fn bursts_do_not_make_the_mean_jump() {
        let mut arrivals = Arrivals::default();
        for second in 0..3600 {
            arrivals.note(UnixMs(second * 1000), (second / 30) as f64 * 30e6, (second / 30) as f64 * 120.0);
        }
        let (bytes, uploads) = arrivals.now();
        assert!((0.94e6..1.06e6).contains(&bytes) && (3.8..4.2).contains(&uploads), "{bytes} {uploads}");
        arrivals.note(UnixMs(3_700_000), 0.0, 0.0);
        assert_eq!(arrivals.now(), (0.0, 0.0), "other books");
    }

    #[test]
    fn devices_that_begin_late_are_a_rate_from_their_first_seconds_on() {
        let mut arrivals = Arrivals::default();
        (0..300).for_each(|second| arrivals.note(UnixMs(second * 1000), 5e9, 100.0));
        assert_eq!(arrivals.now(), (0.0, 0.0));
        (300..310).for_each(|s| arrivals.note(UnixMs(s * 1000), 5e9 + (s - 299) as f64 * 8e6, 100.0));
        assert_eq!(arrivals.now().0, 8e6);
    }

    #[test]
    fn a_day_that_is_known_is_expected_again() {
        let mut arrivals = Arrivals::default();
        let mut bytes = 0.0;
        for minute in 0..2 * 1440 {
            let by_day = (480..1200).contains(&(minute % 1440));
            bytes += if by_day { 600e6 } else { 60e6 };
            arrivals.note(UnixMs(minute * 60_000), bytes, 0.0);
        }
        let (expected, zone) = (arrivals.expected(&zone()), zone());
        let mut wall = Wall::new(&zone);
        let mut at = |hour: i64| expected.at(hour * 3_600_000, &mut wall);
        assert_eq!(expected.day.len(), STRETCHES);
        assert!(at(4) < 1.1e6 && at(12) > 9.9e6 && at(52) < 1.1e6, "{expected:?}");
        assert!((expected.mean() - 5.5e6).abs() < 0.1e6, "{}", expected.mean());
    }
}

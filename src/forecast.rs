//! Where it ends if devices go on as they do: when the disk is full, when the backlog is gone, and what would change that.
//!
//! It is reckoned from what arrives, what may leave by the timetable and by what operators said, and the room on the disk,
//! stretch by stretch over the coming weeks. A backlog that grows by day and is gone by night is told as such.
//!
//! Always: pure, and the same for whoever asks at the same moment; remedies are reckoned, not general advice. Never: an alarm
//! for a backlog that the coming night takes away.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::allowance::Zone;
use crate::units::{ByteSize, Rate, UnixMs, span};

/// How far it looks.
pub const HORIZON: Duration = Duration::from_secs(60 * 86_400);
/// Bytes on the wire for a byte of a photo while nothing has been measured.
pub const WIRE_FACTOR: f64 = 1.05;

const DAY_MS: i64 = 86_400_000;
const WEEK_MS: i64 = 7 * DAY_MS;
/// Steps within which everything is even: fine for as long as people plan, coarse beyond.
const STEP_MS: i64 = 60_000;
const STEP_BEYOND_MS: i64 = 600_000;
const FINE_MS: i64 = 8 * DAY_MS;
/// What comes in so many seconds is on its way rather than waiting.
const ON_ITS_WAY_SECONDS: f64 = 30.0;

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
struct Wall<'a> {
    zone: &'a Zone,
    offset_ms: i64,
    /// Moments between which the clocks do not change.
    even: std::ops::Range<i64>,
}

impl Wall<'_> {
    fn new(zone: &Zone) -> Wall<'_> {
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
    fn at(&self, at_ms: i64, wall: &mut Wall) -> f64 {
        if self.day.is_empty() {
            return self.bytes_per_second;
        }
        self.day.get(wall.stretch(at_ms)).copied().unwrap_or(self.bytes_per_second)
    }

    fn mean(&self) -> f64 {
        match self.day.len() {
            0 => self.bytes_per_second,
            n => self.day.iter().sum::<f64>() / n as f64,
        }
    }
}

/// What a forecast is made of.
#[derive(Debug, Clone)]
pub struct Site<'a> {
    pub now: UnixMs,
    pub zone: &'a Zone,
    pub link: Rate,
    pub arriving: Expected,
    /// What may leave: stretches without gaps from `now` for as long as it looks.
    pub allowed: &'a [(UnixMs, UnixMs, Option<Rate>)],
    /// What might leave before, for as long as photos are retained.
    pub allowed_before: &'a [(UnixMs, UnixMs, Option<Rate>)],
    /// Bytes on the wire for a byte of a photo.
    pub wire_factor: f64,
    pub backlog_bytes: f64,
    /// Bytes that may still be accepted.
    pub usable_bytes: f64,
    /// Bytes of photos that were uploaded and are still on disk.
    pub retained_bytes: f64,
    /// How long an uploaded photo stays on disk.
    pub retain: Duration,
    /// It is by an operator's word when nothing may leave.
    pub held: bool,
}

/// Where it ends.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    pub outlook: Outlook,
    /// All of it in words.
    pub words: String,
    /// What arrives less what may leave, now; positive while the backlog grows.
    pub growth_bytes_per_second: f64,
    /// By how much the backlog is larger in a day.
    pub growth_bytes_per_day: f64,
    /// Seconds until the disk is full; none when it is not within sixty days.
    pub full_in_seconds: Option<f64>,
    /// Seconds until the backlog is gone for the first time; none when there is none, or when it stays.
    pub clear_in_seconds: Option<f64>,
    /// The largest backlog of the coming day.
    pub peak_day: Peak,
    /// The largest backlog of the coming week.
    pub peak_week: Peak,
    /// What would keep the disk from filling, each by itself.
    pub remedies: Vec<Remedy>,
}

/// The most that waits in a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    pub bytes: f64,
    pub at: UnixMs,
}

impl Default for Peak {
    fn default() -> Peak {
        Peak { bytes: 0.0, at: UnixMs(0) }
    }
}

/// What would close a deficit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// This share of the link at all hours, in percent.
    SharePercent(f64),
    /// The whole link for so many seconds more a day, in the hours that have the least.
    WholeLinkSecondsADay(f64),
    /// Photos of this size, as many as now.
    PhotoBytes(u64),
    /// Nothing may leave at all, by an operator's word.
    Resume,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remedy::SharePercent(percent) => write!(f, "{percent}% of the link would do"),
            Remedy::WholeLinkSecondsADay(seconds) => {
                write!(f, "100% for {} a day", span(Duration::from_secs_f64(*seconds)))
            }
            Remedy::PhotoBytes(bytes) => write!(f, "photos of {}", ByteSize(*bytes)),
            Remedy::Resume => f.write_str("`forebay resume` would let them out"),
        }
    }
}

/// How it looks, from good to bad.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outlook {
    /// The disk does not fill.
    #[default]
    Sound,
    /// It fills, in more than a week.
    Filling,
    FullWithinAWeek,
    FullWithinADay,
}

impl Outlook {
    fn of(full_in_seconds: Option<f64>, easing: f64) -> Outlook {
        match full_in_seconds.map(|seconds| seconds / 86_400.0) {
            None => Outlook::Sound,
            Some(days) if days < easing => Outlook::FullWithinADay,
            Some(days) if days < 7.0 * easing => Outlook::FullWithinAWeek,
            Some(_) => Outlook::Filling,
        }
    }
}

/// How long an outlook must last before it is told of: at the start, and after a change, the means are of little.
const LASTING_MS: i64 = 30_000;
/// An outlook is better again only when there is that much more time than it takes to be worse.
const EASING: f64 = 1.2;

/// Notices when the outlook changes for more than a moment.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    told: Outlook,
    /// Another one, and since when.
    other: Option<(Outlook, UnixMs)>,
}

impl Watch {
    /// The outlook that is to be told of now, and whether it is worse than the one told before.
    pub fn see(&mut self, now: UnixMs, full_in_seconds: Option<f64>) -> Option<(Outlook, bool)> {
        let (strict, easy) = (Outlook::of(full_in_seconds, 1.0), Outlook::of(full_in_seconds, EASING));
        let seen = if strict > self.told { strict } else { easy.min(self.told) };
        if seen == self.told {
            self.other = None;
            return None;
        }
        let since = match self.other {
            Some((other, since)) if other == seen => since,
            _ => now,
        };
        self.other = Some((seen, since));
        if now.0 - since.0 < LASTING_MS {
            return None;
        }
        let worse = seen > self.told;
        (self.told, self.other) = (seen, None);
        Some((seen, worse))
    }
}

/// How the backlog and the disk go on.
struct Course {
    full_at: Option<f64>,
    cleared_at: Option<f64>,
    /// Of the backlog, a day and a week from now.
    after_day: f64,
    after_week: f64,
    peak_day: (f64, f64),
    peak_week: (f64, f64),
    /// When it is gone after the peak of the day.
    gone_after_peak: Option<f64>,
}

impl Forecast {
    /// For a site as it is now.
    pub fn of(site: &Site) -> Forecast {
        let course = course(site);
        let seconds = |ms: f64| ms / 1000.0;
        let moment = |ms: f64| UnixMs(site.now.0 + ms as i64);
        let leaving = site.allowed.first().and_then(|(_, _, rate)| *rate).map_or(0.0, |rate| rate.0 as f64);
        let growth = site.arriving.bytes_per_second - leaving / site.wire_factor;
        let full_in_seconds = course.full_at.map(seconds);
        let mut forecast = Forecast {
            outlook: Outlook::of(full_in_seconds, 1.0),
            words: String::new(),
            growth_bytes_per_second: if site.backlog_bytes > 0.0 { growth } else { growth.max(0.0) },
            growth_bytes_per_day: course.after_day - site.backlog_bytes,
            full_in_seconds,
            clear_in_seconds: course.cleared_at.map(seconds),
            peak_day: Peak { bytes: course.peak_day.0, at: moment(course.peak_day.1) },
            peak_week: Peak { bytes: course.peak_week.0, at: moment(course.peak_week.1) },
            remedies: if course.full_at.is_some() { remedies(site, &course) } else { Vec::new() },
        };
        forecast.words = in_words(site, &course, &forecast);
        forecast
    }

    /// In a word or two, for a line that has much else to say.
    pub fn in_short(&self) -> String {
        match (self.full_in_seconds, self.clear_in_seconds) {
            (Some(full), _) => format!("disk full in {}", span(Duration::from_secs_f64(full))),
            (None, Some(clear)) => format!("backlog gone in {}", span(Duration::from_secs_f64(clear))),
            (None, None) => "the disk does not fill".to_owned(),
        }
    }
}

/// A stretch in which photos left at an even rate: from, until, in milliseconds from now, and bytes per millisecond.
type Left = (f64, f64, f64);

/// What left while it was retained, as far as it is still on disk: backwards from now, as much as was allowed then, or as
/// came where nothing waits.
fn left_before(site: &Site) -> VecDeque<Left> {
    let waits = site.backlog_bytes > site.arriving.bytes_per_second * ON_ITS_WAY_SECONDS;
    let mut missing = site.retained_bytes;
    let mut left = VecDeque::new();
    for (from, until, rate) in site.allowed_before.iter().rev() {
        let (from, until) = ((from.0 - site.now.0) as f64, (until.0 - site.now.0) as f64);
        let capacity = rate.map_or(0.0, |rate| rate.0 as f64) / site.wire_factor;
        let rate = if waits { capacity } else { capacity.min(site.arriving.mean()) } / 1000.0;
        let bytes = (rate * (until - from)).min(missing);
        if bytes > 0.0 {
            left.push_front((until - bytes / rate, until, rate));
            missing -= bytes;
        }
    }
    // more than that was allowed once, or never known
    let known = site.retained_bytes - missing;
    match known > 0.0 {
        true => left.iter_mut().for_each(|(.., rate)| *rate *= site.retained_bytes / known),
        false => {
            let retain = site.retain.as_millis() as f64;
            left.push_front((-retain, 0.0, site.retained_bytes / retain.max(1.0)));
        }
    }
    left
}

fn course(site: &Site) -> Course {
    let horizon = HORIZON.as_millis() as f64;
    let retain = site.retain.as_millis() as f64;
    let (mut left, mut wall) = (left_before(site), Wall::new(site.zone));
    let (mut t, mut backlog, mut used) = (0.0, site.backlog_bytes, 0.0);
    let noise = site.arriving.bytes_per_second * ON_ITS_WAY_SECONDS;
    let mut course = Course {
        full_at: (site.usable_bytes <= 0.0).then_some(0.0),
        cleared_at: None,
        after_day: backlog,
        after_week: backlog,
        peak_day: (backlog, 0.0),
        peak_week: (backlog, 0.0),
        gone_after_peak: None,
    };
    let mut allowed = site.allowed.iter().peekable();
    while t < horizon {
        while allowed.next_if(|(_, until, _)| (until.0 - site.now.0) as f64 <= t).is_some() {}
        let Some((_, until, rate)) = allowed.peek() else { break };
        // all that is even from here to `end`
        let step = if (t as i64) < FINE_MS { STEP_MS } else { STEP_BEYOND_MS };
        let mut end = (((t as i64) / step + 1) * step) as f64;
        end = end.min((until.0 - site.now.0) as f64).min(horizon);
        let arrives = site.arriving.at(site.now.0 + t as i64, &mut wall) / 1000.0;
        let capacity = rate.map_or(0.0, |rate| rate.0 as f64) / site.wire_factor / 1000.0;
        let leaves = if backlog > 0.0 { capacity } else { capacity.min(arrives) };
        if backlog > 0.0 && leaves > arrives {
            end = end.min(t + backlog / (leaves - arrives));
        }
        let mut removed = leaves;
        if retain > 0.0 {
            while left.front().is_some_and(|(_, until, _)| until + retain <= t) {
                left.pop_front();
            }
            removed = 0.0;
            if let Some((from, until, rate)) = left.front() {
                match from + retain <= t {
                    true => (removed, end) = (*rate, end.min(until + retain)),
                    false => end = end.min(from + retain),
                }
            }
        }
        // a moment too short to be told from none would never end
        let ms = (end - t).max(0.001);
        let fuller = arrives - removed;
        if course.full_at.is_none() && used + fuller * ms >= site.usable_bytes {
            course.full_at = Some(t + (site.usable_bytes - used) / fuller);
        }
        used += fuller * ms;
        backlog = (backlog + (arrives - leaves) * ms).max(0.0);
        // below a byte there is nothing
        if backlog < 1.0 {
            backlog = 0.0;
        }
        if retain > 0.0 {
            match left.back_mut() {
                Some((_, until, rate)) if *rate == leaves && *until >= t => *until = t + ms,
                _ => left.push_back((t, t + ms, leaves)),
            }
        }
        t += ms;
        if backlog == 0.0 {
            course.cleared_at = course.cleared_at.or((site.backlog_bytes > noise).then_some(t));
            course.gone_after_peak = course.gone_after_peak.or((course.peak_day.0 > noise).then_some(t));
        }
        if t <= DAY_MS as f64 {
            course.after_day = backlog;
            if backlog > course.peak_day.0 {
                (course.peak_day, course.gone_after_peak) = ((backlog, t), None);
            }
        }
        if t <= WEEK_MS as f64 {
            course.after_week = backlog;
            if backlog > course.peak_week.0 {
                course.peak_week = (backlog, t);
            }
        } else if course.full_at.is_some() {
            break;
        }
    }
    course
}

/// Stretches of the coming week: bytes per second, and seconds.
fn coming_week(site: &Site) -> Vec<(f64, f64)> {
    let end = site.now.0 + WEEK_MS;
    let stretches = site.allowed.iter().filter(|(from, ..)| from.0 < end);
    let rates = stretches.map(|(from, until, rate)| {
        (rate.map_or(0.0, |rate| rate.0 as f64), (until.0.min(end) - from.0).max(0) as f64 / 1000.0)
    });
    rates.collect()
}

fn remedies(site: &Site, course: &Course) -> Vec<Remedy> {
    let mut week = coming_week(site);
    if week.iter().all(|(rate, _)| *rate == 0.0) {
        return if site.held { vec![Remedy::Resume] } else { Vec::new() };
    }
    let pause = week.iter().take_while(|(rate, _)| *rate == 0.0).map(|(_, seconds)| seconds).sum::<f64>();
    if site.held && course.full_at.is_some_and(|full_ms| full_ms <= pause * 1000.0) {
        // what is allowed after the pause comes too late
        return vec![Remedy::Resume];
    }
    let mut remedies = Vec::new();
    let (link, seconds) = (site.link.0 as f64, week.iter().map(|(_, seconds)| seconds).sum::<f64>());
    let needed = site.arriving.mean() * site.wire_factor;
    // a tenth of a percent is noise
    let percent = needed / link * 100.0 - 0.1;
    let percent = if percent < 10.0 { (percent * 10.0).ceil() / 10.0 } else { percent.ceil() };
    let leaves = week.iter().map(|(rate, seconds)| rate * seconds).sum::<f64>() / seconds.max(1.0);
    // where all would leave within the week, no other mean of the week helps
    let grows = needed > leaves;
    if percent <= 100.0 && grows {
        remedies.push(Remedy::SharePercent(percent));
    }
    // from the hours that have the least, for there the whole link brings the most
    let mut missing = (course.after_week - site.backlog_bytes).max(0.0) * site.wire_factor;
    week.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut extra = 0.0;
    for (rate, length) in week {
        let gain = link - rate;
        if missing <= 0.0 || gain <= 0.0 {
            break;
        }
        let taken = length.min(missing / gain);
        extra += taken;
        missing -= taken * gain;
    }
    if missing <= 1.0 && extra > 0.0 && seconds > 0.0 {
        // upwards to the minute
        remedies.push(Remedy::WholeLinkSecondsADay((extra / seconds * 1440.0).ceil() * 60.0));
    }
    if site.arriving.uploads_per_second > 0.0 && needed > 0.0 && grows {
        let photo = site.arriving.bytes_per_second / site.arriving.uploads_per_second;
        let bytes = photo * leaves / needed;
        let digits = 10f64.powf(bytes.max(1.0).log10().floor() - 1.0).max(1.0);
        remedies.push(Remedy::PhotoBytes(((bytes / digits).floor() * digits) as u64));
    }
    remedies
}

fn in_words(site: &Site, course: &Course, forecast: &Forecast) -> String {
    let moment = |ms: f64| site.zone.moment(UnixMs(site.now.0 + ms as i64), site.now);
    let within = |ms: f64| span(Duration::from_millis(ms as u64));
    let size = |bytes: f64| ByteSize(bytes.abs() as u64);
    let growth = forecast.growth_bytes_per_day;
    // a thousandth of what comes in a day is noise, not growth
    let noise = (site.arriving.mean() * 86.4).max(site.arriving.bytes_per_second * ON_ITS_WAY_SECONDS);
    if let Some(full) = course.full_at {
        let grows = if growth > noise { format!("growing by {}/day, ", size(growth)) } else { String::new() };
        let mut words = format!("{grows}the disk is full in {} ({})", within(full), moment(full));
        for (n, remedy) in forecast.remedies.iter().enumerate() {
            words += if n == 0 { "; " } else { ", or " };
            words += &remedy.to_string();
        }
        return words;
    }
    if course.peak_day.0 > noise && course.peak_day.0 > site.backlog_bytes * 1.01 {
        let peak = format!("largest {} at {}", size(course.peak_day.0), moment(course.peak_day.1));
        return match course.gone_after_peak {
            Some(gone) => format!("{peak}, gone by {}", moment(gone)),
            None => format!("growing by {}/day, {peak}; the disk is not full within 60 days", size(growth)),
        };
    }
    match course.cleared_at {
        Some(clear) => {
            let rate = Rate(forecast.growth_bytes_per_second.min(0.0).abs() as u64);
            format!("shrinking by {rate}, gone in {} ({})", within(clear), moment(clear))
        }
        None => "steady".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    fn zone() -> Zone {
        Zone { rules: TimeZone::get("Europe/Berlin").unwrap(), name: "Europe/Berlin".to_owned() }
    }

    /// A Wednesday, 03:12 in Berlin.
    fn now() -> UnixMs {
        "2026-01-07T02:12:00Z".parse().unwrap()
    }

    fn expected(bytes_per_second: f64) -> Expected {
        Expected { bytes_per_second, uploads_per_second: bytes_per_second / 250_000.0, day: Vec::new() }
    }

    fn always(rate: Option<u64>) -> Vec<(UnixMs, UnixMs, Option<Rate>)> {
        vec![(now(), UnixMs(now().0 + HORIZON.as_millis() as i64), rate.map(Rate))]
    }

    fn forecast(arriving: f64, allowed: &[(UnixMs, UnixMs, Option<Rate>)], backlog: f64, usable: f64) -> Forecast {
        Forecast::of(&Site {
            now: now(),
            zone: &zone(),
            link: Rate(25_000_000),
            arriving: expected(arriving),
            allowed,
            allowed_before: &[],
            wire_factor: 1.0,
            backlog_bytes: backlog,
            usable_bytes: usable,
            retained_bytes: 0.0,
            retain: Duration::ZERO,
            held: true,
        })
    }

    #[test]
    fn the_deficit_of_a_full_site_fills_a_terabyte_in_three_and_a_half_days_and_can_be_closed() {
        let forecast = forecast(8_333_333.0, &always(Some(5_000_000)), 0.0, 1e12);
        assert_eq!(
            forecast.words,
            "growing by 288 GB/day, the disk is full in 3d 11h (Sat 14:32); 34% of the link would do, or 100% for 4h 0m \
             a day, or photos of 150 kB"
        );
        assert_eq!(forecast.outlook, Outlook::FullWithinAWeek);
        assert_eq!(forecast.growth_bytes_per_second, 3_333_333.0);
    }

    #[test]
    fn a_backlog_that_shrinks_has_an_end() {
        let forecast = forecast(1e6, &always(Some(5_000_000)), 400e6, 1e12);
        assert!((forecast.clear_in_seconds.unwrap() - 100.0).abs() < 0.1, "{forecast:?}");
        assert_eq!(forecast.words, "shrinking by 4.00 MB/s, gone in 1m 40s (03:13)");
        assert_eq!((forecast.full_in_seconds, forecast.outlook), (None, Outlook::Sound));
    }

    #[test]
    fn noise_is_not_growth() {
        assert_eq!(forecast(5_000_100.0, &always(Some(5_000_000)), 1e6, 1e12).words, "steady");
        assert_eq!(forecast(0.0, &always(Some(5_000_000)), 0.0, 1e12).words, "steady");
    }

    #[test]
    fn what_the_night_takes_away_is_no_alarm() {
        let hours = |h: i64| UnixMs(now().0 + h * 3_600_000);
        let allowed: Vec<_> = (0..120)
            .map(|n| (hours(n * 12), hours(n * 12 + 12), Some(Rate(if n % 2 == 0 { 4_000_000 } else { 20_000_000 }))))
            .collect();
        let forecast = forecast(8e6, &allowed, 0.0, 300e9);
        assert_eq!(forecast.words, "largest 173 GB at 15:12, gone by 19:12");
        assert_eq!((forecast.full_in_seconds, forecast.remedies.len()), (None, 0));
    }

    #[test]
    fn in_a_pause_the_remedy_is_to_resume() {
        let forecast = forecast(8e6, &always(None), 0.0, 1e12);
        assert!(forecast.words.ends_with("; `forebay resume` would let them out"), "{}", forecast.words);
    }

    #[test]
    fn a_site_beyond_its_link_is_not_told_of_shares() {
        let forecast = forecast(30e6, &always(Some(5_000_000)), 0.0, 1e12);
        assert_eq!(forecast.remedies, [Remedy::PhotoBytes(41_000)]);
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

    #[test]
    fn an_outlook_is_told_when_it_lasts_and_is_over_only_when_there_is_time() {
        let mut watch = Watch::default();
        let at = |second: i64| UnixMs(second * 1000);
        let days = |days: f64| Some(days * 86_400.0);
        assert_eq!(watch.see(at(0), days(3.0)), None);
        assert_eq!(watch.see(at(20), None), None);
        assert_eq!(watch.see(at(30), days(3.0)), None, "it began anew");
        assert_eq!(watch.see(at(60), days(3.0)), Some((Outlook::FullWithinAWeek, true)));
        assert_eq!(watch.see(at(61), days(7.5)), None);
        assert_eq!(watch.see(at(200), days(7.5)), None, "hardly better is not better");
        assert_eq!(watch.see(at(300), days(0.9)), None);
        assert_eq!(watch.see(at(330), days(0.9)), Some((Outlook::FullWithinADay, true)));
        assert_eq!(watch.see(at(400), None), None);
        assert_eq!(watch.see(at(430), None), Some((Outlook::Sound, false)));
    }
}

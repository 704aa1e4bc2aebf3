//! Where it ends if devices go on as they do: when the disk is full, when the backlog is gone, and what would change that.
//!
//! It is reckoned from what arrives, what may leave by the timetable and by what operators said, and the room on the disk,
//! stretch by stretch over the coming weeks. A backlog that grows by day and is gone by night is told as such.
//!
//! Always: pure, and the same for whoever asks at the same moment; remedies are reckoned, not general advice. Never: an alarm
//! for a backlog that the coming night takes away.
//!
//! `arrivals.rs` is what devices bring, `outlook.rs` when a change is worth telling.

mod arrivals;
mod outlook;

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::arrivals::Wall;
pub use self::arrivals::{Arrivals, Expected};
pub use self::outlook::{Outlook, Watch};
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
    /// Nothing may leave by an operator's word alone: to resume would help.
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
    // each stretch ends when something does, and so a short time would make as many of them as it goes into the horizon
    let retain = match site.retain.as_millis() as i64 {
        ..STEP_MS => 0.0,
        retain => retain as f64,
    };
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
            let shrinking = -forecast.growth_bytes_per_second as i64;
            // what shrinks later does not do so now
            let now = if shrinking > 0 { format!("shrinking by {}, ", Rate(shrinking as u64)) } else { String::new() };
            format!("{now}gone in {} ({})", within(clear), moment(clear))
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
    fn a_retention_of_a_moment_is_none() {
        let allowed = always(Some(5_000_000));
        let of = |retain| {
            Forecast::of(&Site {
                now: now(),
                zone: &zone(),
                link: Rate(25_000_000),
                arriving: expected(8_333_333.0),
                allowed: &allowed,
                allowed_before: &[],
                wire_factor: 1.0,
                backlog_bytes: 0.0,
                usable_bytes: 1e12,
                retained_bytes: 0.0,
                retain,
                held: true,
            })
        };
        // each millisecond of two months would be looked at
        assert_eq!(of(Duration::from_millis(1)).words, of(Duration::ZERO).words);
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
}

//! How many uploads are on their way at once: as many as fill the allowance, and no more.
//!
//! Always: while the allowance is not filled although more waits to leave, widened on trial, and kept so only if more then
//! arrives; a long round trip is filled so, and a link that is slower than the allowance is not flooded with connections,
//! which would send more and bring less. While it is filled, just enough wait for the pacer to outlast a pause of store or
//! queue; narrowed to that, but not for long to less than fills it. Never: beyond a fixed number, or below one that keeps a quick
//! store busy.

use std::time::Duration;

use tokio::time::Instant;

use crate::units::Rate;

const MIN: usize = 4;
const FIRST: usize = 8;
const MAX: usize = 128;
/// How long a width is watched before it is judged. Uploads that were begun with another one have mostly ended by then.
const PERIOD: Duration = Duration::from_millis(1500);
/// The part of the allowance that counts as filled.
const FILLED: f64 = 0.97;
/// A wider way must bring at least this part of what it is wider by, or of what the allowance was not filled by.
const WORTH: f64 = 0.3;
const WORTH_OF_GAP: f64 = 0.5;
/// When so much of what leaves is sent again, the link is full: more uploads at once would lose more.
const LOSSY: f64 = 0.05;
/// When it is so much, there are too many already.
const VERY_LOSSY: f64 = 0.15;
/// An allowance that is not filled any more within this time after the way was narrowed shows that it was too much.
const NARROW_SHOWS: Duration = Duration::from_secs(5);
/// How long a width that did not help, or was too narrow, is not tried again; it doubles each time.
const REST_MIN: Duration = Duration::from_secs(30);
const REST_MAX: Duration = Duration::from_secs(480);
/// What waits for the pacer is to last for so long while store and queue pause…
const SLACK: Duration = Duration::from_millis(150);
/// …within these limits. With more than that on the mean there are more on their way than the allowance needs; with less
/// than half, fewer.
const WAITING_MIN: f64 = 4.0;
const WAITING_MAX: f64 = 16.0;

/// The width of one drain.
#[derive(Debug)]
pub struct Width {
    uploads: usize,
    began: Option<Instant>,
    /// What was seen when this period began.
    first: Option<Seen>,
    /// Looks, and how many waited for the pacer at all of them.
    looks: u32,
    waiting: usize,
    /// There was more to send at every look.
    backlog: bool,
    trial: Option<Trial>,
    widening: Rest,
    narrowed: Option<Instant>,
    narrowing: Rest,
}

/// When something is tried again that did not help.
#[derive(Debug, Clone, Copy)]
struct Rest {
    next: Duration,
    until: Option<Instant>,
}

impl Rest {
    fn begin(&mut self, now: Instant) {
        // what was learnt long ago says little
        if self.until.is_some_and(|until| now >= until + REST_MAX) {
            self.next = REST_MIN;
        }
        self.until = Some(now + self.next);
        self.next = (self.next * 2).min(REST_MAX);
    }

    fn is_over(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }
}

impl Default for Rest {
    fn default() -> Self {
        Rest { next: REST_MIN, until: None }
    }
}

/// A width that was widened, how many bytes arrived a second before, and by how many the allowance was not filled.
#[derive(Debug, Clone, Copy)]
struct Trial {
    from: usize,
    rate: f64,
    gap: f64,
    /// The first period still has uploads in it that were begun before.
    settled: bool,
}

/// What is seen of the drain at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    pub allowance: Rate,
    /// Paid for since the start.
    pub paid_bytes: u64,
    /// Arrived since the start, what was sent again counted once.
    pub arrived_bytes: u64,
    /// Sent again since the start.
    pub resent_bytes: u64,
    /// How many wait for the pacer.
    pub waiting: usize,
    /// The size of a photo, on the mean.
    pub photo_bytes: u64,
    /// More waits than is on its way.
    pub backlog: bool,
}

impl Seen {
    /// How many should wait for the pacer.
    fn enough(&self) -> f64 {
        let bytes = self.allowance.0 as f64 * SLACK.as_secs_f64();
        (bytes / self.photo_bytes.max(1) as f64).clamp(WAITING_MIN, WAITING_MAX)
    }
}

impl Default for Width {
    fn default() -> Self {
        Width {
            uploads: FIRST,
            began: None,
            first: None,
            looks: 0,
            waiting: 0,
            backlog: true,
            trial: None,
            widening: Rest::default(),
            narrowed: None,
            narrowing: Rest::default(),
        }
    }
}

impl Width {
    /// How many may be on their way.
    pub fn uploads(&self) -> usize {
        self.uploads
    }

    /// Takes in what is seen now.
    pub fn look(&mut self, now: Instant, seen: Seen) {
        self.looks += 1;
        self.waiting += seen.waiting;
        self.backlog &= seen.backlog;
        if self.first.is_some_and(|first| first.allowance != seen.allowance) {
            self.forget();
        }
        let (Some(began), Some(first)) = (self.began, self.first) else { return self.begin(now, seen) };
        let seconds = (now - began).as_secs_f64();
        if seconds >= PERIOD.as_secs_f64() {
            let paid = (seen.paid_bytes - first.paid_bytes) as f64 / seconds;
            let arrived = (seen.arrived_bytes - first.arrived_bytes) as f64 / seconds;
            let resent = (seen.resent_bytes - first.resent_bytes) as f64 / seconds;
            let lost = resent / (arrived + resent).max(1.0);
            let before = self.uploads;
            let gap = (seen.allowance.0 as f64 - paid).max(0.0);
            let filled = paid >= FILLED * seen.allowance.0 as f64;
            self.judge(now, filled, gap, arrived, lost, seen.enough());
            if self.uploads != before {
                tracing::debug!(uploads = self.uploads, before, paid, arrived, lost, "another width");
            }
            self.begin(now, seen);
        }
    }

    /// Nothing is to be learnt from what was seen so far: the drain paused, or its allowance changed.
    pub fn forget(&mut self) {
        (self.trial, self.narrowed) = (None, None);
        self.began = None;
    }

    fn begin(&mut self, now: Instant, seen: Seen) {
        (self.began, self.first) = (Some(now), Some(seen));
        (self.looks, self.waiting, self.backlog) = (0, 0, true);
    }

    /// The allowance was `filled` or not, and not by `gap` bytes a second; so many arrived a second, this part of what left was
    /// sent again, and `enough` should wait for the pacer.
    fn judge(&mut self, now: Instant, filled: bool, gap: f64, rate: f64, lost: f64, enough: f64) {
        let waiting = self.waiting as f64 / f64::from(self.looks.max(1));
        match &mut self.trial {
            Some(trial) if !trial.settled => trial.settled = true,
            Some(trial) => {
                let wider_by = self.uploads as f64 / trial.from as f64 - 1.0;
                let brings = rate >= trial.rate * (1.0 + WORTH * wider_by);
                let fills = filled || rate - trial.rate >= WORTH_OF_GAP * trial.gap;
                let worth = lost < LOSSY && (brings || fills);
                if worth {
                    self.widening = Rest::default();
                } else {
                    self.uploads = trial.from;
                    self.widening.begin(now);
                }
                self.trial = None;
                if worth && !filled && self.backlog {
                    self.widen(gap, rate);
                }
            }
            None if lost > VERY_LOSSY => self.uploads = (self.uploads - self.uploads.div_ceil(4)).max(MIN),
            None if lost > LOSSY => {}
            None if filled && waiting > enough => self.narrow(now),
            None if filled && waiting < enough / 2.0 && self.backlog => {
                let missing = (enough / 2.0 - waiting).ceil() as usize;
                self.uploads = (self.uploads + missing).min(MAX);
            }
            None if filled || !self.backlog => {}
            // by a quarter, as what had been narrowed before it shows late
            None if self.narrowed.take_if(|at| now - *at <= NARROW_SHOWS).is_some() => {
                self.uploads = (self.uploads + self.uploads.div_ceil(4)).min(MAX);
                self.narrowing.begin(now);
            }
            None if self.widening.is_over(now) => self.widen(gap, rate),
            None => {}
        }
    }

    fn widen(&mut self, gap: f64, rate: f64) {
        if self.uploads < MAX {
            self.trial = Some(Trial { from: self.uploads, rate, gap, settled: false });
            self.uploads = (self.uploads + self.uploads.div_ceil(2)).min(MAX);
        }
    }

    fn narrow(&mut self, now: Instant) {
        if self.uploads > MIN && self.narrowing.is_over(now) {
            self.uploads -= 1;
            self.narrowed = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWANCE: Rate = Rate(5_000_000);

    /// The width after some seconds on a way where, of so many uploads at once, so many bytes a second arrive.
    fn after(seconds: u64, rate_of: impl Fn(usize) -> f64) -> Width {
        let (mut width, mut paid, mut arrived, start) = (Width::default(), 0.0, 0.0, Instant::now());
        for tick in 0..seconds * 10 {
            let rate = rate_of(width.uploads()).min(ALLOWANCE.0 as f64);
            let filled = rate >= ALLOWANCE.0 as f64;
            // what is lost on a link that is full grows with the uploads that share it
            let lost = if filled { 0.0 } else { width.uploads() as f64 * 20_000.0 };
            paid += (rate + lost) / 10.0;
            arrived += rate / 10.0;
            let waiting = if filled { width.uploads() / 2 } else { 0 };
            let seen = Seen {
                allowance: ALLOWANCE,
                paid_bytes: paid as u64,
                arrived_bytes: arrived as u64,
                resent_bytes: 0,
                waiting,
                photo_bytes: 250_000,
                backlog: true,
            };
            width.look(start + Duration::from_millis(tick * 100), seen);
        }
        width
    }

    /// The width after half a minute at an allowance that is filled, of photos of this size, `elsewhere` of which wait for
    /// store or queue.
    fn when_filled(allowance: Rate, photo_bytes: u64, elsewhere: usize) -> usize {
        let (mut width, start) = (Width::default(), Instant::now());
        for tick in 0..300 {
            let bytes = allowance.0 / 10 * tick;
            let seen = Seen {
                allowance,
                paid_bytes: bytes,
                arrived_bytes: bytes,
                resent_bytes: 0,
                waiting: width.uploads().saturating_sub(elsewhere),
                photo_bytes,
                backlog: true,
            };
            width.look(start + Duration::from_millis(tick * 100), seen);
        }
        width.uploads()
    }

    #[test]
    fn what_waits_outlasts_a_pause_of_the_store() {
        // 25 MB/s carry 15 photos of 250 kB in 150 ms; at least half of that is kept waiting
        assert_eq!(when_filled(Rate(25_000_000), 250_000, 6), 6 + 8);
        // and of large ones there are never many
        assert_eq!(when_filled(Rate(25_000_000), 5_000_000, 6), 6 + 2);
        assert_eq!(when_filled(ALLOWANCE, 250_000, 3), 3 + 4);
    }

    #[test]
    fn a_long_round_trip_is_filled_within_half_a_minute() {
        // 250 kB every 1.8 s
        let way = |uploads: usize| uploads as f64 * 250_000.0 / 1.8;
        assert!(way(after(30, way).uploads()) >= FILLED * ALLOWANCE.0 as f64);
    }

    #[test]
    fn a_link_slower_than_the_allowance_is_not_flooded() {
        let most = (1..600).map(|seconds| after(seconds, |_| 1_000_000.0).uploads()).max().unwrap();
        assert!(most <= FIRST + FIRST / 2, "{most}");
        assert_eq!(after(30, |_| 1_000_000.0).uploads(), FIRST);
    }

    #[test]
    fn a_link_that_loses_what_it_cannot_carry_is_given_less() {
        let mut width = Width::default();
        let now = Instant::now();
        (0..10).for_each(|_| width.judge(now, false, 4e6, 1_000_000.0, 0.4, 4.0));
        assert_eq!(width.uploads(), MIN);
    }

    #[test]
    fn a_way_that_was_narrowed_too_much_is_wide_again_at_once_and_stays_so() {
        let (mut width, start) = (Width { uploads: 20, ..Width::default() }, Instant::now());
        let needed = 12;
        let narrowest = (1..400).map(|second| {
            width.waiting = if width.uploads >= needed { 6 } else { 0 };
            width.looks = 1;
            let rate = 5e6 * width.uploads.min(needed) as f64 / needed as f64;
            width.judge(start + Duration::from_secs(second), rate == 5e6, 5e6 - rate, rate, 0.0, 4.0);
            width.uploads
        });
        let too_narrow = narrowest.collect::<Vec<_>>().iter().filter(|uploads| **uploads < needed).count();
        // after rests of 30, 60, 120 and 240 seconds
        assert!((1..=4).contains(&too_narrow), "{too_narrow} seconds of 400");
    }

    #[test]
    fn a_trial_that_closes_half_of_the_gap_is_worth_it() {
        let (mut width, now) = (Width::default(), Instant::now());
        for rate in [4.65e6, 4.75e6, 4.83e6] {
            width.judge(now, false, 5e6 - rate, rate, 0.0, 4.0);
        }
        assert!(width.uploads() > FIRST, "twelve have brought what eight could not");
    }

    #[test]
    fn a_trial_that_only_sends_more_again_is_not_worth_it() {
        let (mut width, now) = (Width::default(), Instant::now());
        // what is paid for closes half of the gap, and none of it arrives
        for (gap, lost) in [(0.4e6, 0.0), (0.3e6, 0.02), (0.19e6, 0.045)] {
            width.judge(now, false, gap, 4.6e6, lost, 4.0);
        }
        assert_eq!(width.uploads(), FIRST);
    }

    #[test]
    fn a_quick_store_needs_few() {
        let quick = |uploads: usize| uploads as f64 * 10_000_000.0;
        assert!((MIN..=FIRST).contains(&after(60, quick).uploads()));
    }

    #[test]
    fn it_stays_as_it_is_while_there_is_too_little_to_send() {
        let (mut width, start) = (Width::default(), Instant::now());
        for tick in 0..600 {
            let seen = Seen {
                allowance: ALLOWANCE,
                paid_bytes: tick * 1000,
                arrived_bytes: tick * 1000,
                resent_bytes: 0,
                waiting: 0,
                photo_bytes: 250_000,
                backlog: false,
            };
            width.look(start + Duration::from_millis(tick * 100), seen);
        }
        assert_eq!(width.uploads(), FIRST);
    }
}

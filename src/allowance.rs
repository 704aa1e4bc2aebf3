//! What the drain may put on the wire at a moment, and by which rule: the share, the timetable, or what an operator said.
//!
//! Always: a pause goes before a rate that was set, and that before the timetable, and that before the share; what an
//! operator said ends by itself at its end. Never: more than the uplink carries, and never nothing but in a pause.

use std::fmt;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{ToSpan, Zoned};

use crate::timetable::{Amount, Timetable, short_day};
use crate::units::{Rate, Share, UnixMs};

/// The link, and what uploads may use of it when nobody says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    pub rate: Rate,
    /// In force while there is no timetable.
    pub share: Share,
    pub timetable: Option<Timetable>,
    pub zone: Zone,
}

/// The site's time zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    pub rules: TimeZone,
    /// As people know it, such as `Europe/Berlin`.
    pub name: String,
}

/// What operators said that is in force until they say otherwise, or until it ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Control {
    pub rate: Option<Override>,
    pub pause: Option<Pause>,
}

/// A rate in place of the timetable's or the share's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    pub amount: Amount,
    pub who: String,
    pub since: UnixMs,
    /// None: until it is cleared.
    pub until: Option<UnixMs>,
}

/// Nothing may leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    pub who: String,
    pub since: UnixMs,
    /// None: until it is resumed.
    pub until: Option<UnixMs>,
}

/// The allowance at a moment, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InForce {
    /// Bytes per second; none in a pause.
    pub allowance: Option<Rate>,
    pub rule: Rule,
    /// When the rule ends by itself.
    pub until: Option<UnixMs>,
}

/// What is in force now, and what was said that leads to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    pub in_force: InForce,
    pub control: Control,
}

/// When what an operator says ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It does not.
    Never,
    /// So long after it was said.
    After(Duration),
    At(UnixMs),
}

/// By which rule an allowance is what it is. In words by `Display`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rule {
    Share { share: Share, link: Rate },
    Timetable { point: String, until: Option<Moment> },
    Set { amount: Amount, link: Rate, who: String, since: Moment, until: Option<Moment> },
    Paused { who: String, since: Moment, until: Option<Moment> },
}

/// A moment and how people say it: `03:12` today, `Wed 03:12` within a week, else with its date.
#[derive(Debug, Clone)]
pub struct Moment {
    pub at: UnixMs,
    words: String,
}

impl PartialEq for Moment {
    /// It is the same moment on the day after, when it is said in other words.
    fn eq(&self, other: &Moment) -> bool {
        self.at == other.at
    }
}

impl Eq for Moment {}

impl Zone {
    /// How people at the site say `at`, seen from `now`.
    pub fn moment(&self, at: UnixMs, now: UnixMs) -> Moment {
        let local = |at: UnixMs| Zoned::new(at.timestamp(), self.rules.clone());
        let (at_local, now_local) = (local(at), local(now));
        let time = at_local.strftime("%H:%M");
        let days = |n: i64| now_local.date().saturating_add(n.days());
        let words = match at_local.date() {
            date if date == now_local.date() => time.to_string(),
            date if date > days(-6) && date < days(7) => format!("{} {time}", short_day(date.weekday())),
            date => format!("{date} {time}"),
        };
        Moment { at, words }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ends = |f: &mut fmt::Formatter<'_>, until: &Option<Moment>| match until {
            Some(until) => write!(f, " until {until}"),
            None => Ok(()),
        };
        match self {
            Rule::Share { share, link } => write!(f, "{share} of {}", link.in_mbit()),
            Rule::Timetable { point, until } => {
                write!(f, "timetable: {point}")?;
                until.as_ref().map_or(Ok(()), |until| write!(f, ", until {until}"))
            }
            Rule::Set { amount, link, who, since, until } => {
                match amount {
                    Amount::Share(share) => write!(f, "{share} of {}", link.in_mbit())?,
                    Amount::Rate(rate) => write!(f, "{rate}")?,
                }
                write!(f, ", set by {who} at {since}")?;
                ends(f, until)
            }
            Rule::Paused { who, since, until } => {
                write!(f, "paused by {who} since {since}")?;
                ends(f, until)
            }
        }
    }
}

/// Whether something said until then still holds.
fn holds(until: Option<UnixMs>, now: UnixMs) -> bool {
    until.is_none_or(|until| now < until)
}

impl Uplink {
    /// What is allowed at `now`, and by which rule.
    pub fn in_force(&self, now: UnixMs, control: &Control) -> InForce {
        let moment = |at: UnixMs| self.zone.moment(at, now);
        if let Some(Pause { who, since, until }) = control.pause.as_ref().filter(|pause| holds(pause.until, now)) {
            let rule = Rule::Paused { who: who.clone(), since: moment(*since), until: until.map(moment) };
            return InForce { allowance: None, rule, until: *until };
        }
        if let Some(set) = control.rate.as_ref().filter(|set| holds(set.until, now)) {
            let rule = Rule::Set {
                amount: set.amount,
                link: self.rate,
                who: set.who.clone(),
                since: moment(set.since),
                until: set.until.map(moment),
            };
            return InForce { allowance: Some(set.amount.of(self.rate)), rule, until: set.until };
        }
        if let Some(current) = self.timetable.as_ref().and_then(|timetable| timetable.at(&self.zone.rules, now)) {
            let rule = Rule::Timetable { point: current.point.to_string(), until: current.until.map(moment) };
            return InForce { allowance: Some(current.point.rate), rule, until: current.until };
        }
        let rule = Rule::Share { share: self.share, link: self.rate };
        InForce { allowance: Some(Amount::Share(self.share).of(self.rate)), rule, until: None }
    }

    /// The allowance from `from` until `until` as far as it is known now: stretches without gaps, none where it is paused.
    pub fn segments(&self, from: UnixMs, until: UnixMs, control: &Control) -> Vec<(UnixMs, UnixMs, Option<Rate>)> {
        let end = |said: Option<Option<UnixMs>>| match said {
            None => from,
            Some(end) => end.unwrap_or(until).clamp(from, until.max(from)),
        };
        let paused_until = end(control.pause.as_ref().map(|pause| pause.until));
        let set_until = end(control.rate.as_ref().map(|set| set.until)).max(paused_until);
        let mut segments = vec![(from, paused_until, None)];
        if let Some(set) = &control.rate {
            segments.push((paused_until, set_until, Some(set.amount.of(self.rate))));
        }
        match &self.timetable {
            Some(timetable) => segments.extend(
                timetable.segments(&self.zone.rules, set_until, until).map(|s| (s.from, s.until, Some(s.rate))),
            ),
            None => segments.push((set_until, until, Some(Amount::Share(self.share).of(self.rate)))),
        }
        segments.retain(|(from, until, _)| from < until);
        segments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uplink(timetable: &str) -> Uplink {
        let rate = Rate(25_000_000);
        let timetable = (!timetable.is_empty()).then(|| Timetable::parse(timetable, rate).unwrap());
        let name = "Europe/Berlin".to_owned();
        let zone = Zone { rules: TimeZone::get(&name).unwrap(), name };
        Uplink { rate, share: "20%".parse().unwrap(), timetable, zone }
    }

    fn at(text: &str) -> UnixMs {
        text.parse().unwrap()
    }

    fn set(until: Option<UnixMs>) -> Option<Override> {
        let since = at("2026-01-07T02:12:00Z");
        Some(Override { amount: "100%".parse().unwrap(), who: "anna".to_owned(), since, until })
    }

    #[test]
    fn each_rule_says_what_it_is() {
        let now = at("2026-01-07T02:30:00Z"); // a Wednesday
        let (plain, week) = (uplink(""), uplink("Mon-Fri 01:00,20% 19:00,50%"));
        let hour = Some(at("2026-01-07T03:12:00Z"));
        let pause = Some(Pause { who: "ben".to_owned(), since: at("2026-01-06T22:00:00Z"), until: None });
        let ended = Some(at("2026-01-07T02:30:00Z"));
        for (uplink, control, rate, words) in [
            (&plain, Control::default(), Some(5_000_000), "20% of 200 Mbit/s"),
            (&week, Control::default(), Some(5_000_000), "timetable: Mon-Fri 01:00, 20%, until 19:00"),
            (
                &week,
                Control { rate: set(hour), pause: None },
                Some(25_000_000),
                "100% of 200 Mbit/s, set by anna at 03:12 until 04:12",
            ),
            (
                &week,
                Control { rate: set(ended), pause: None },
                Some(5_000_000),
                "timetable: Mon-Fri 01:00, 20%, until 19:00",
            ),
            (&plain, Control { rate: set(None), pause }, None, "paused by ben since Tue 23:00"),
        ] {
            let in_force = uplink.in_force(now, &control);
            assert_eq!((in_force.allowance, in_force.rule.to_string()), (rate.map(Rate), words.to_owned()));
        }
    }

    #[test]
    fn what_is_coming_is_known_in_stretches() {
        let (from, until) = (at("2026-01-07T06:00:00Z"), at("2026-01-08T06:00:00Z"));
        let uplink = uplink("08:00,20% 19:00,100%");
        let control = Control {
            rate: set(Some(at("2026-01-07T09:00:00Z"))),
            pause: Some(Pause { who: "ben".to_owned(), since: from, until: Some(at("2026-01-07T08:00:00Z")) }),
        };
        let segments = uplink.segments(from, until, &control);
        assert_eq!(
            segments.iter().map(|(from, _, rate)| (from.to_string(), rate.map(|r| r.0))).collect::<Vec<_>>(),
            [
                ("2026-01-07T06:00:00.000Z".to_owned(), None),
                ("2026-01-07T08:00:00.000Z".to_owned(), Some(25_000_000)),
                ("2026-01-07T09:00:00.000Z".to_owned(), Some(5_000_000)),
                ("2026-01-07T18:00:00.000Z".to_owned(), Some(25_000_000)),
            ]
        );
        assert!(segments.windows(2).all(|two| two[0].1 == two[1].0) && segments[3].1 == until);
        for (from, until, rate) in &segments {
            assert_eq!(uplink.in_force(*from, &control).allowance, *rate);
            assert_eq!(uplink.in_force(UnixMs(until.0 - 1), &control).allowance, *rate);
        }
    }
}

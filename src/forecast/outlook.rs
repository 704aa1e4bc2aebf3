//! How it looks, in a word, and when that is worth telling.
//!
//! Always: told once it has lasted for a while. Never: told again and again for a forecast that swings about a limit.

use serde::{Deserialize, Serialize};

use crate::units::UnixMs;

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
    pub(super) fn of(full_in_seconds: Option<f64>, easing: f64) -> Outlook {
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

#[cfg(test)]
mod tests {
    use super::*;

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

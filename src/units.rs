//! Bytes, rates, shares, spans and moments: parsed from what people write, printed as people read them.
//!
//! Always: decimal prefixes are powers of 1000 and `Ki`, `Mi`, `Gi`, `Ti` powers of 1024; `bit` is an eighth of a byte.
//! Never: a float where bytes are counted.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The fastest link that a rate may describe: 100 Gbit/s.
pub const RATE_MAX: Rate = Rate(12_500_000_000);

/// A number of bytes. Prints as `250 kB`, `3.33 MB`; parses `10MiB`, `250kB`, `1048576`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ByteSize(pub u64);

/// Bytes per second. Prints as `5.00 MB/s`; parses `200Mbit/s`, `25MB/s`, `5MiB/s`, `200Mbps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rate(pub u64);

/// A part of a whole, above 0% and up to 100%, kept in parts per million. Prints and parses as `20%`, `12.5%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Share(u32);

/// Room that must stay free: a share of the whole disk, or a number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserve {
    Share(Share),
    Bytes(ByteSize),
}

/// A moment, in whole milliseconds since 1970 UTC. In JSON it is RFC 3339 text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMs(pub i64);

impl Rate {
    /// The part of this rate that `share` allows, rounded down so that the product is never above the exact one.
    pub fn share(self, share: Share) -> Rate {
        Rate((u128::from(self.0) * u128::from(share.0) / 1_000_000) as u64)
    }

    /// The same rate in megabits per second.
    pub fn mbit(self) -> f64 {
        self.0 as f64 * 8.0 / 1e6
    }

    /// As people call a link's rate, in megabits to the thousandth: `200 Mbit/s`, `0.5 Mbit/s`.
    pub fn in_mbit(self) -> String {
        format!("{} Mbit/s", (self.mbit() * 1000.0).round() / 1000.0)
    }
}

impl Share {
    /// Nothing. It is not parsed; a setting that may be 0% says so itself.
    pub const NONE: Share = Share(0);
    /// 50%.
    pub const HALF: Share = Share(500_000);
    /// The whole: 100%.
    pub const WHOLE: Share = Share(1_000_000);

    /// This part of so many bytes, rounded down.
    pub fn of(self, bytes: u64) -> u64 {
        (u128::from(bytes) * u128::from(self.0) / 1_000_000) as u64
    }

    /// As a fraction of one.
    pub fn fraction(self) -> f64 {
        f64::from(self.0) / 1e6
    }
}

impl Reserve {
    /// The part of `total` that must stay free.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Reserve::Share(share) => (u128::from(total) * u128::from(share.0) / 1_000_000) as u64,
            Reserve::Bytes(bytes) => bytes.0,
        }
    }
}

impl UnixMs {
    /// The present, by this machine's clock.
    pub fn now() -> Self {
        UnixMs(jiff::Timestamp::now().as_millisecond())
    }

    /// The moment as a calendar knows it; out-of-range values are held at the calendar's ends.
    pub fn timestamp(self) -> jiff::Timestamp {
        jiff::Timestamp::from_millisecond(self.0).unwrap_or(if self.0 < 0 {
            jiff::Timestamp::MIN
        } else {
            jiff::Timestamp::MAX
        })
    }

    /// Time from `earlier` to this moment; zero when `earlier` is later.
    pub fn since(self, earlier: UnixMs) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0).max(0) as u64)
    }
}

/// Splits `10.5MiB` into the number and the unit behind it.
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 = number.parse().ok()?;
    number.is_finite().then_some((number, unit.trim()))
}

/// What a prefix multiplies by: `k`, `M`, `G`, `T` or `Ki`, `Mi`, `Gi`, `Ti`. Case of the letter does not matter.
fn prefix(text: &str) -> Option<f64> {
    Some(match text.to_ascii_lowercase().as_str() {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        "t" => 1e12,
        "ki" => 1024.0,
        "mi" => 1024f64.powi(2),
        "gi" => 1024f64.powi(3),
        "ti" => 1024f64.powi(4),
        _ => return None,
    })
}

impl FromStr for ByteSize {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected bytes such as 10MiB, 250kB or 1048576, found {text:?}");
        let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
        let scale = prefix(unit.strip_suffix('B').unwrap_or(unit)).ok_or_else(wrong)?;
        let bytes = number * scale;
        if bytes > (1u64 << 60) as f64 {
            return Err(format!("{text:?} is more than an exbibyte"));
        }
        Ok(ByteSize(bytes as u64))
    }
}

impl FromStr for Rate {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected a rate such as 200Mbit/s or 25MB/s, found {text:?}");
        let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
        let (scale, bits) = if let Some(p) = unit.strip_suffix("bit/s").or_else(|| unit.strip_suffix("bps")) {
            (prefix(p).ok_or_else(wrong)?, 8.0)
        } else if let Some(p) = unit.strip_suffix("B/s") {
            (prefix(p).ok_or_else(wrong)?, 1.0)
        } else {
            return Err(wrong());
        };
        let bytes = number * scale / bits;
        if bytes < 1.0 {
            return Err(format!("{text:?} is a rate of nothing; expected more than 0"));
        }
        if bytes > RATE_MAX.0 as f64 {
            return Err(format!("{text:?} is beyond 100 Gbit/s"));
        }
        Ok(Rate(bytes as u64))
    }
}

impl FromStr for Share {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected a share above 0% and up to 100%, such as 20%, found {text:?}");
        let number = text.trim().strip_suffix('%').ok_or_else(wrong)?;
        let percent: f64 = number.trim().parse().map_err(|_| wrong())?;
        let millionths = (percent * 1e4).round();
        if !(1.0..=1e6).contains(&millionths) {
            return Err(wrong());
        }
        Ok(Share(millionths as u32))
    }
}

impl FromStr for Reserve {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "0%" {
            return Ok(Reserve::Bytes(ByteSize(0)));
        }
        if text.contains('%') {
            return text.parse().map(Reserve::Share);
        }
        text.parse()
            .map(Reserve::Bytes)
            .map_err(|_| format!("expected a share of the disk such as 5%, or bytes such as 20GB, found {text:?}"))
    }
}

impl FromStr for UnixMs {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<jiff::Timestamp>()
            .map(|t| UnixMs(t.as_millisecond()))
            .map_err(|_| format!("expected an RFC 3339 time such as 2026-11-21T08:30:00Z, found {text:?}"))
    }
}

/// No span is longer: it could not be added to any moment.
const SPAN_MAX: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Parses a span such as `60s`, `10m`, `1h30m`, `7d`; `0` is none.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    if text.trim() == "0" {
        return Ok(Duration::ZERO);
    }
    match humantime::parse_duration(text.trim()) {
        Ok(span) if span <= SPAN_MAX => Ok(span),
        Ok(_) => Err(format!("expected a hundred years at most, found {text:?}")),
        Err(_) => Err(format!("expected a span such as 60s, 10m, 1h30m or 7d, found {text:?}")),
    }
}

/// Prints a span in its two largest units, as a person would say it: `3d 12h`, `4m 10s`, `0s`.
pub fn span(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{}s", seconds),
        (0, 0, m) => format!("{m}m {}s", seconds % 60),
        (0, h, m) => format!("{h}h {m}m"),
        (d, h, _) => format!("{d}d {h}h"),
    }
}

/// `bytes` with the decimal prefix that keeps three digits in sight.
fn scaled(bytes: f64) -> (f64, &'static str) {
    let steps = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match steps.iter().find(|(scale, _)| bytes >= *scale) {
        Some((scale, unit)) => (bytes / scale, unit),
        None => (bytes, "B"),
    }
}

/// Three significant digits: `3.33`, `33.3`, `333`.
fn three_digits(value: f64) -> String {
    match value {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, unit) = scaled(self.0 as f64);
        if unit == "B" { write!(f, "{} B", self.0) } else { write!(f, "{} {unit}", three_digits(value)) }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", ByteSize(self.0))
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", f64::from(self.0) / 1e4)
    }
}

impl fmt::Display for Reserve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reserve::Share(share) => share.fmt(f),
            Reserve::Bytes(bytes) => bytes.fmt(f),
        }
    }
}

impl fmt::Display for UnixMs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3}", self.timestamp())
    }
}

impl Serialize for UnixMs {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for UnixMs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_link_allows_five_megabytes_a_second() {
        let rate: Rate = "200Mbit/s".parse().unwrap();
        assert_eq!(rate.share("20%".parse().unwrap()), Rate(5_000_000));
    }

    #[test]
    fn rates_are_read_in_bits_and_bytes() {
        for (text, bytes) in
            [("200Mbit/s", 25_000_000), ("200 Mbps", 25_000_000), ("5MB/s", 5_000_000), ("1MiB/s", 1_048_576)]
        {
            assert_eq!(text.parse::<Rate>().unwrap(), Rate(bytes), "{text}");
        }
    }

    #[test]
    fn a_rate_of_nothing_or_beyond_every_link_is_refused() {
        for text in ["0Mbit/s", "101Gbit/s", "-5MB/s", "fast", "5", "", "NaNMB/s"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn shares_end_at_the_whole() {
        for text in ["0%", "100.1%", "20", "%", "-1%", "NaN%"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
        assert_eq!("12.5%".parse::<Share>().unwrap().to_string(), "12.5%");
    }

    #[test]
    fn sizes_are_read_and_printed() {
        assert_eq!("10MiB".parse(), Ok(ByteSize(10 * 1024 * 1024)));
        assert_eq!("250kB".parse(), Ok(ByteSize(250_000)));
        assert_eq!("17".parse(), Ok(ByteSize(17)));
        assert_eq!(ByteSize(3_333_333).to_string(), "3.33 MB");
        assert_eq!(ByteSize(999).to_string(), "999 B");
    }

    #[test]
    fn spans_read_as_people_say_them() {
        assert_eq!(span(Duration::from_secs(302_400)), "3d 12h");
        assert_eq!(span(Duration::from_secs(59)), "59s");
        assert_eq!(parse_span("7d").unwrap(), Duration::from_secs(7 * 86_400));
        assert!(parse_span("soon").is_err());
        assert!(parse_span("100y").is_err() && parse_span("99y").is_ok(), "a year of humantime's is a little longer");
    }

    #[test]
    fn a_moment_survives_its_text() {
        let moment = UnixMs(1_763_000_000_123);
        assert_eq!(moment.to_string().parse(), Ok(moment));
    }
}

//! A timetable as people write it, read token by token.
//!
//! Always: everything that is wrong is told at once, each with the part that is wrong. Never: a panic, whatever is written.

use super::{Amount, DAYS, Point, Timetable, clock};
use crate::units::Rate;

/// Reads a timetable for a link of this rate, or says all that is wrong with it at once.
pub(super) fn read(text: &str, link: Rate) -> Result<Timetable, Vec<String>> {
    let mut reader = Reader { link, groups: Vec::new(), points: Vec::new(), errors: Vec::new() };
    text.split_whitespace().for_each(|token| reader.token(token));
    reader.finish()
}

/// What has been read of a timetable so far.
struct Reader {
    link: Rate,
    groups: Vec<Group>,
    points: Vec<Point>,
    errors: Vec<String>,
}

struct Group {
    token: String,
    /// Empty when the token could not be read; then its points are read all the same, for what is wrong with them.
    days: Vec<usize>,
    has_points: bool,
}

impl Reader {
    fn token(&mut self, token: &str) {
        let glued = token
            .char_indices()
            .find(|(at, c)| *c == '-' && token[at + 1..].starts_with(|next: char| next.is_ascii_digit()) && *at > 0);
        if token.starts_with(|c: char| c.is_ascii_digit()) || token.starts_with(':') {
            let (days, name) = match self.groups.last_mut() {
                None => ((0..7).collect(), "every day".to_owned()),
                Some(group) => {
                    group.has_points = true;
                    (group.days.clone(), group.token.clone())
                }
            };
            self.point(token, token, &days, &name);
        } else if token.split(',').next().is_some_and(|first| first.eq_ignore_ascii_case("off")) {
            self.errors.extend(token.parse::<Amount>().err());
        } else if let Some((at, _)) = glued {
            let (name, point) = (&token[..at], &token[at + 1..]);
            match days(name) {
                Ok(days) => self.point(token, point, &days, name),
                Err(wrong) => self.errors.push(format!("{token:?}: {wrong}")),
            }
        } else {
            let days = days(token).unwrap_or_else(|wrong| {
                self.errors.push(wrong);
                Vec::new()
            });
            for group in &self.groups {
                if let Some(day) = days.iter().find(|day| group.days.contains(day)) {
                    let day = DAYS[*day];
                    self.errors.push(format!("{day} stands in two groups, {:?} and {token:?}; keep one", group.token));
                }
            }
            self.groups.push(Group { token: token.to_owned(), days, has_points: false });
        }
    }

    /// Reads `HH:MM,AMOUNT` for these days; `token` is what was written.
    fn point(&mut self, token: &str, point: &str, days: &[usize], name: &str) {
        let (time, amount) = match point.split_once(',') {
            Some((time, amount)) => (time, Some(amount).filter(|amount| !amount.is_empty())),
            None => (point, None),
        };
        let minute = minute(time);
        if minute.is_none() {
            self.errors.push(format!("{token:?}: there is no time {time:?}; expected 00:00 to 23:59, as HH:MM"));
        }
        let amount = match amount {
            None => Err("there is no amount; expected a time and an amount, such as 08:00,20%".to_owned()),
            Some(text) => text.parse().and_then(|amount: Amount| amount.within(self.link)),
        };
        let amount = amount.map_err(|wrong| self.errors.push(format!("{token:?}: {wrong}"))).ok();
        let (Some(minute), Some(amount)) = (minute, amount) else { return };
        let mut twice = None;
        for day in days {
            if self.points.iter().any(|other| (other.day, other.minute) == (*day, minute)) {
                twice = twice.or(Some(*day));
                continue;
            }
            let rate = amount.of(self.link);
            self.points.push(Point { day: *day, minute, amount, rate, days: name.to_owned() });
        }
        if let Some(day) = twice {
            self.errors.push(format!("{token:?}: {} {} is there twice; keep one", DAYS[day], clock(minute)));
        }
    }

    fn finish(mut self) -> Result<Timetable, Vec<String>> {
        for group in self.groups.iter().filter(|group| !group.has_points) {
            let token = &group.token;
            self.errors.push(format!("{token:?} has no points; expected some after it, such as {token} 08:00,20%"));
        }
        if self.errors.is_empty() && self.points.is_empty() {
            self.errors.push("there are no points; expected some, such as Mon-Fri 08:00,20% 19:00,100%".to_owned());
        }
        self.points.sort_by_key(|point| (point.day, point.minute));
        if self.errors.is_empty() { Ok(Timetable { points: self.points }) } else { Err(self.errors) }
    }
}

/// The days of `Mon`, `Mon-Fri`, `Fri-Mon` or `Sat,Sun`.
fn days(token: &str) -> Result<Vec<usize>, String> {
    let mut days = Vec::new();
    for part in token.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (day(first, token)?, day(last, token)?),
            None => (day(part, token)?, day(part, token)?),
        };
        let count = (last + 7 - first) % 7 + 1;
        for day in (first..first + count).map(|day| day % 7) {
            if days.contains(&day) {
                return Err(format!("{token:?} has {} twice", DAYS[day]));
            }
            days.push(day);
        }
    }
    Ok(days)
}

fn day(text: &str, token: &str) -> Result<usize, String> {
    DAYS.iter()
        .position(|name| text.eq_ignore_ascii_case(name) || text.eq_ignore_ascii_case(&name[..3]))
        .ok_or_else(|| format!("{token:?}: there is no day {text:?}; expected Mon, Tue, Wed, Thu, Fri, Sat or Sun"))
}

/// Minutes since midnight of `HH:MM`.
fn minute(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str| -> Option<u16> {
        let two_digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        two_digits.then(|| text.parse().ok())?
    };
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Rate = Rate(25_000_000);

    fn timetable(text: &str) -> Timetable {
        Timetable::parse(text, LINK).unwrap()
    }

    fn errors(text: &str) -> Vec<String> {
        Timetable::parse(text, LINK).unwrap_err()
    }

    #[test]
    fn days_are_written_in_many_ways() {
        let points = |text: &str| {
            let timetable = timetable(text);
            timetable.points.iter().map(|p| (p.day, p.minute, p.rate)).collect::<Vec<_>>()
        };
        assert_eq!(points("Fri-Mon 08:00,20%"), points("sat,SUN,friday,Monday 08:00,5MB/s"));
        assert_eq!(points("Mon-08:00,20% Mon-19:00,100%"), points("Mon 08:00,20% 19:00,100%"));
        assert_eq!(points("Mon-Sun 08:00,20%"), points("08:00,20%"));
        assert_eq!(points("00:00,20% Sat 12:00,50%").len(), 8);
    }

    #[test]
    fn everything_wrong_is_told_at_once_with_the_part_that_is_wrong() {
        let all = errors(
            "Mom 08:00,20% Mon-Fri 25:00,20% 08:60,20% 8,20% 09:00,120% 10:00,0% 11:00,0MB/s 12:00,101Gbit/s \
             13:00,300Mbit/s 14:00 15:00, 16:00,off 17:00,fast Fri-Sat Sat,Sun 08:00,20% 08:00,30% Wed-08:00,1%",
        );
        for (part, what) in [
            ("Mom", "there is no day"),
            ("25:00,20%", "there is no time"),
            ("08:60,20%", "there is no time"),
            ("8,20%", "there is no time"),
            ("09:00,120%", "up to 100%"),
            ("10:00,0%", "above 0%"),
            ("11:00,0MB/s", "a rate of nothing"),
            ("12:00,101Gbit/s", "beyond 100 Gbit/s"),
            ("13:00,300Mbit/s", "beyond the uplink's own rate of 25.0 MB/s"),
            ("14:00", "there is no amount"),
            ("15:00,", "there is no amount"),
            ("16:00,off", "write 100%"),
            ("17:00,fast", "such as 20%"),
            ("Fri-Sat", "Friday stands in two groups"),
            ("Sat,Sun", "Saturday stands in two groups"),
            ("Fri-Sat", "has no points"),
            ("08:00,30%", "Saturday 08:00 is there twice"),
        ] {
            assert!(
                all.iter().any(|e| e.contains(&format!("{part:?}")) && e.contains(what)),
                "{part} {what}: {all:#?}"
            );
        }
        assert_eq!(all.len(), 17, "{all:#?}");
        for (text, what) in
            [("", "no points"), ("off", "write 100%"), ("Mon,Mon 08:00,20%", "twice"), ("Mon-08:00", "no amount")]
        {
            let all = errors(text);
            assert!(all.len() == 1 && all[0].contains(what), "{text}: {all:?}");
        }
    }

    #[test]
    fn nothing_that_is_written_makes_it_panic() {
        for text in
            ["ä-8", "-08:00,20%", "é8:00,20%", ",,", "Mon-", "08:00,20%%", "Mon--08:00,20%", "８:00,20%", "0é:00,1%"]
        {
            assert!(Timetable::parse(text, LINK).is_err(), "{text}");
        }
    }
}

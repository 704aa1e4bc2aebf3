//! A week of a site in seconds, by a clock of its own: what the forecast said at each hour, held against what then happened.
//!
//! The site is a model that knows nothing of the forecast but the timetable: a thousand devices that send photo by photo, a
//! drain that sends whole photos by what each second allows, and a disk. `make week` prints what was said and what came.

use std::collections::VecDeque;
use std::time::Duration;

use forebay::allowance::{Control, Uplink, Zone};
use forebay::forecast::{Arrivals, Forecast, HORIZON, Site};
use forebay::timetable::Timetable;
use forebay::units::{Rate, UnixMs};
use jiff::tz::TimeZone;

const LINK: Rate = Rate(25_000_000);
const DEVICES: usize = 1000;
const PHOTO_BYTES: u64 = 250_000;
/// Bytes on the wire for a byte of a photo.
const WIRE: f64 = 1.05;
const HOUR: usize = 3600;
const DAY: usize = 24 * HOUR;
const WEEK: usize = 7 * DAY;
/// By how much a forecast may be wrong.
const ERROR_MAX: f64 = 0.05;

struct Scenario {
    name: &'static str,
    /// The first second of the week, a Monday's midnight in Berlin; the clocks change on its Sunday.
    monday: &'static str,
    timetable: &'static str,
    /// How often devices send by night, of how often they do by day.
    night: f64,
    disk_bytes: f64,
    retain_seconds: usize,
    /// From when on forecasts are asked for.
    ask_from: usize,
    /// What is expected to happen, so that the comparison is of something.
    fills: bool,
    clears: bool,
}

/// Numbers that look like chance, the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// What was seen of the site at a moment, and what was forecast.
struct Asked {
    second: usize,
    said: Forecast,
}

struct Lived {
    /// Of each minute: bytes that wait, and bytes on disk.
    minutes: Vec<(f64, f64)>,
    asked: Vec<Asked>,
    /// The largest backlog that is only on its way.
    on_its_way: f64,
}

/// Photos of a thousand devices, each on its own time: every thirty seconds with some jitter, less often by night.
fn live(scenario: &Scenario, seconds: usize) -> Lived {
    let start: UnixMs = scenario.monday.parse().unwrap();
    let zone = Zone { rules: TimeZone::get("Europe/Berlin").unwrap(), name: "Europe/Berlin".to_owned() };
    let timetable = Timetable::parse(scenario.timetable, LINK).unwrap();
    let moment = |second: usize| UnixMs(start.0 + second as i64 * 1000);
    let mut rates = timetable.segments(&zone.rules, start, moment(seconds)).peekable();
    let uplink =
        Uplink { rate: LINK, share: "20%".parse().unwrap(), timetable: Some(timetable.clone()), zone: zone.clone() };
    let retain = Duration::from_secs(scenario.retain_seconds as u64);

    let mut dice = Dice(0x5eed_cafe);
    let mut wheel: Vec<Vec<u16>> = vec![Vec::new(); 512];
    (0..DEVICES).for_each(|device| wheel[dice.roll(30) as usize].push(device as u16));
    let mut waiting: VecDeque<u32> = VecDeque::new();
    let mut retained: VecDeque<(usize, u64)> = VecDeque::new();
    let (mut waiting_bytes, mut retained_bytes, mut credit) = (0u64, 0u64, 0.0);
    let (mut accepted_bytes, mut accepted) = (0u64, 0u64);
    let mut arrivals = Arrivals::default();
    let mut lived = Lived { minutes: Vec::new(), asked: Vec::new(), on_its_way: 20e6 };

    for second in 0..seconds {
        let hour = zone.rules.to_datetime(moment(second - second % 60).timestamp()).hour();
        let pace = if (6..22).contains(&hour) { 1.0 } else { scenario.night };
        for device in std::mem::take(&mut wheel[second % 512]) {
            let bytes = PHOTO_BYTES * 8 / 10 + dice.roll(PHOTO_BYTES * 4 / 10);
            waiting.push_back(bytes as u32);
            (waiting_bytes, accepted_bytes, accepted) = (waiting_bytes + bytes, accepted_bytes + bytes, accepted + 1);
            let pause = (28 + dice.roll(5)) as f64 / pace;
            wheel[(second + pause.round() as usize) % 512].push(device);
        }

        while rates.next_if(|segment| segment.until <= moment(second)).is_some() {}
        credit += rates.peek().unwrap().rate.0 as f64;
        let mut left = 0;
        while let Some(bytes) = waiting.front() {
            let cost = f64::from(*bytes) * WIRE;
            if cost > credit {
                break;
            }
            credit -= cost;
            left += u64::from(*bytes);
            waiting.pop_front();
        }
        if waiting.is_empty() {
            credit = 0.0; // what is not used is gone
        }
        waiting_bytes -= left;
        retained_bytes += left;
        retained.push_back((second, left));
        while let Some((_, bytes)) = retained.front().filter(|(at, _)| at + scenario.retain_seconds <= second) {
            retained_bytes -= bytes;
            retained.pop_front();
        }

        if second % 10 == 9 {
            arrivals.note(moment(second + 1), accepted_bytes as f64, accepted as f64);
        }
        if second % 60 == 59 {
            lived.minutes.push((waiting_bytes as f64, (waiting_bytes + retained_bytes) as f64));
        }
        let now = second + 1;
        if now >= scenario.ask_from && now < WEEK && now % (3 * HOUR) == 30 * 60 {
            let (from, until) = (moment(now), UnixMs(moment(now).0 + HORIZON.as_millis() as i64));
            let before = UnixMs(from.0 - retain.as_millis() as i64);
            let said = Forecast::of(&Site {
                now: from,
                zone: &zone,
                link: LINK,
                arriving: arrivals.expected(&zone),
                allowed: &uplink.segments(from, until, &Control::default()),
                allowed_before: &uplink.segments(before, from, &Control::default()),
                wire_factor: WIRE,
                backlog_bytes: waiting_bytes as f64,
                usable_bytes: scenario.disk_bytes - (waiting_bytes + retained_bytes) as f64,
                retained_bytes: retained_bytes as f64,
                retain,
                held: false,
            });
            lived.asked.push(Asked { second: now, said });
        }
    }
    lived
}

/// Plays a scenario and holds each forecast against what came; the table, and the errors beyond the limit.
fn compare(scenario: &Scenario) {
    let began = std::time::Instant::now();
    let lived = live(scenario, WEEK + 2 * DAY);
    let day_bytes = DEVICES as f64 * 2.0 * 1440.0 * PHOTO_BYTES as f64;
    let minute_of = |second: usize| second / 60 - 1;
    let hours = |seconds: Option<f64>| seconds.map_or("-".to_owned(), |s| format!("{:.2} h", s / 3600.0));
    println!("\n{}: {}", scenario.name, scenario.timetable);
    println!("  {:<8} {:>22} {:>22} {:>24}   said", "hour", "full in", "gone in", "GB more in a day");
    let (mut worst, mut compared, mut wrong) = ([0.0f64; 3], [0; 3], Vec::new());
    for Asked { second, said } in &lived.asked {
        let first = minute_of(*second);
        let after = |minute: usize| ((minute - first) * 60) as f64;
        let later = |what: &dyn Fn(&(f64, f64)) -> bool| {
            (first..lived.minutes.len()).find(|minute| what(&lived.minutes[*minute])).map(after)
        };
        let full = later(&|(_, disk)| *disk >= scenario.disk_bytes);
        if full == Some(0.0) {
            break; // it is full: nothing is left to foretell
        }
        let gone = later(&|(waiting, _)| *waiting < lived.on_its_way).filter(|seconds| *seconds > 0.0);
        let grown = lived.minutes.get(first + 1440).map(|(waiting, _)| waiting - lived.minutes[first].0);

        // a minute is as fine as the model is looked at
        let off = |said: f64, came: f64| ((said - came).abs() - 60.0).max(0.0) / came;
        let mut note = |kind: usize, error: f64| {
            worst[kind] = worst[kind].max(error);
            compared[kind] += 1;
            if error > ERROR_MAX {
                wrong.push(format!("hour {}: {error:.3} of kind {kind}: {}", second / HOUR, said.words));
            }
        };
        match (said.full_in_seconds, full) {
            (Some(said), Some(came)) => note(0, off(said, came)),
            (None, Some(_)) => note(0, 1.0),
            // beyond the end of the model
            (Some(said), None) if said < after(lived.minutes.len() - 1) * (1.0 - ERROR_MAX) => note(0, 1.0),
            _ => {}
        }
        // less than what comes in half a minute is on its way
        if lived.minutes[first].0 > 300e6 {
            match (said.clear_in_seconds, gone) {
                (Some(said), Some(came)) => note(1, off(said, came)),
                (None, Some(_)) => note(1, 1.0),
                (Some(said), None) if said < after(lived.minutes.len() - 1) * (1.0 - ERROR_MAX) => note(1, 1.0),
                _ => {}
            }
        }
        if let Some(came) = grown {
            note(2, (said.growth_bytes_per_day - came).abs() / came.abs().max(day_bytes / 5.0));
        }
        if second % (12 * HOUR) == HOUR / 2 {
            println!(
                "  {:<8} {:>10} {:>11} {:>10} {:>11} {:>11.1} {:>12.1}   {}",
                format!("{:.1}", *second as f64 / HOUR as f64),
                hours(said.full_in_seconds),
                hours(full),
                hours(said.clear_in_seconds),
                hours(gone),
                said.growth_bytes_per_day / 1e9,
                grown.unwrap_or(f64::NAN) / 1e9,
                said.words
            );
        }
    }
    println!(
        "  largest errors: full {:.1}% of {}, gone {:.1}% of {}, growth {:.1}% of {}; {:.1} s",
        worst[0] * 100.0,
        compared[0],
        worst[1] * 100.0,
        compared[1],
        worst[2] * 100.0,
        compared[2],
        began.elapsed().as_secs_f64()
    );
    assert!(wrong.is_empty(), "{}: {wrong:#?}", scenario.name);
    assert_eq!((compared[0] > 5, compared[1] > 5), (scenario.fills, scenario.clears), "{}", scenario.name);
}

const SPRING: &str = "2026-03-22T23:00:00Z";
const AUTUMN: &str = "2026-10-18T22:00:00Z";

#[test]
fn a_constant_deficit() {
    compare(&Scenario {
        name: "a constant deficit",
        monday: SPRING,
        timetable: "00:00,20%",
        night: 1.0,
        disk_bytes: 1.9e12,
        retain_seconds: 0,
        ask_from: HOUR,
        fills: true,
        clears: false,
    });
}

#[test]
fn a_day_that_the_night_makes_up_for() {
    compare(&Scenario {
        name: "a day that the night makes up for",
        monday: SPRING,
        timetable: "08:00,20% 20:00,70%",
        night: 1.0,
        disk_bytes: 1e12,
        retain_seconds: 0,
        ask_from: HOUR,
        fills: false,
        clears: true,
    });
}

#[test]
fn a_deficit_despite_the_timetable_and_a_night_of_an_hour_more() {
    compare(&Scenario {
        name: "a deficit despite the timetable, clocks put back",
        monday: AUTUMN,
        timetable: "Mon-Fri 08:00,15% 20:00,45% Sat,Sun 00:00,30% 02:30,35%",
        night: 1.0,
        disk_bytes: 0.72e12,
        retain_seconds: 0,
        ask_from: HOUR,
        fills: true,
        clears: false,
    });
}

#[test]
fn a_deficit_with_photos_retained_for_a_day() {
    compare(&Scenario {
        name: "a deficit, photos retained for a day",
        monday: SPRING,
        timetable: "08:00,15% 20:00,30% Sun 02:30,40%",
        night: 1.0,
        disk_bytes: 2.4e12,
        retain_seconds: DAY,
        ask_from: HOUR,
        fills: true,
        clears: false,
    });
}

#[test]
fn devices_that_send_less_by_night() {
    compare(&Scenario {
        name: "devices that send less by night, known for a day",
        monday: AUTUMN,
        timetable: "00:00,20%",
        night: 0.4,
        disk_bytes: 1.2e12,
        retain_seconds: 0,
        ask_from: 25 * HOUR,
        fills: true,
        clears: false,
    });
}

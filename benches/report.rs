//! What was measured, as lines while it goes on, as a file for programs and as a page for people.
//!
//! Always: medians with their spread, each contestant's rounds in the file, and those that lose.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use crate::machine::Machine;

/// One thing that was measured of one or more contestants.
#[derive(Debug, Serialize)]
pub struct Measured {
    pub what: String,
    pub unit: String,
    pub contestants: Vec<Contestant>,
    /// What Forebay, the first contestant, is held to, if to anything.
    pub targets: Vec<Target>,
}

/// One contestant's figure in each round.
#[derive(Debug, Serialize)]
pub struct Contestant {
    pub name: String,
    pub rounds: Vec<f64>,
}

/// What the first contestant's median is held to.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// At least so many times the second contestant's.
    TimesAtLeast(f64),
    /// At most so many times the second contestant's.
    TimesAtMost(f64),
    /// At most this.
    AtMost(f64),
}

impl Contestant {
    pub fn median(&self) -> f64 {
        let mut rounds = self.rounds.clone();
        rounds.sort_by(f64::total_cmp);
        match rounds.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => rounds[count / 2],
            count => (rounds[count / 2 - 1] + rounds[count / 2]) / 2.0,
        }
    }

    /// The least and the most of all rounds.
    fn spread(&self) -> (f64, f64) {
        self.rounds.iter().fold((f64::INFINITY, 0.0), |(least, most), round| (round.min(least), round.max(most)))
    }
}

impl Measured {
    /// The first contestant's median by the second's.
    fn ratio(&self) -> Option<f64> {
        Some(self.contestants.first()?.median() / self.contestants.get(1)?.median())
    }

    /// What each target says, and whether it is met.
    fn verdicts(&self) -> Vec<(String, bool)> {
        let (Some(first), ratio) = (self.contestants.first(), self.ratio().unwrap_or(f64::NAN)) else {
            return Vec::new();
        };
        let first = first.median();
        let verdict = |target: &Target| match target {
            Target::TimesAtLeast(times) => (format!("at least {times} times"), ratio >= *times),
            Target::TimesAtMost(times) => (format!("at most {times} times"), ratio <= *times),
            Target::AtMost(most) => (format!("at most {} {}", figure(*most), self.unit), first <= *most),
        };
        self.targets.iter().map(verdict).collect()
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("{} ({})", self.what, self.unit)];
        for contestant in &self.contestants {
            let (least, most) = contestant.spread();
            lines.push(format!(
                "  {:<44} {:>10}   {} to {} in {} rounds",
                contestant.name,
                figure(contestant.median()),
                figure(least),
                figure(most),
                contestant.rounds.len()
            ));
        }
        let ratio = self.ratio().map(|ratio| format!("ratio {ratio:.2}"));
        let verdicts = self.verdicts().into_iter();
        let verdicts =
            verdicts.map(|(target, met)| format!("target: {target}: {}", if met { "met" } else { "NOT MET" }));
        let said: Vec<String> = ratio.into_iter().chain(verdicts).collect();
        if !said.is_empty() {
            lines.push(format!("  {}", said.join("; ")));
        }
        lines
    }
}

/// All that was measured in one run.
#[derive(Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub when: String,
    pub measured: Vec<Measured>,
}

impl Report {
    /// Adds one, and tells it.
    pub fn add(&mut self, measured: Measured) {
        println!();
        measured.lines().iter().for_each(|line| println!("{line}"));
        self.measured.push(measured);
    }

    /// Writes `results.json` and `page.html` into `folder`.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        std::fs::write(folder.join("results.json"), serde_json::to_vec_pretty(self)?)?;
        std::fs::write(folder.join("page.html"), self.page())
    }

    fn page(&self) -> String {
        let mut page = String::from(
            "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>Forebay: what was measured</title>\n<style>\n\
             body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b2733}\n\
             table{border-collapse:collapse;width:100%;margin:.3rem 0 1.6rem}td,th{padding:.25rem .6rem;text-align:left;\
             border-bottom:1px solid #d8dee4}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}\n\
             .bar{background:#3b7dd8;height:.7rem;display:block;min-width:1px}.other{background:#a9b4c0}\n\
             .met{color:#19713a}.missed{color:#b3261e;font-weight:600}\n</style>\n<h1>Forebay: what was measured</h1>\n",
        );
        let _ = writeln!(page, "<p>{}</p><ul>", text(&self.when));
        for line in self.machine.lines() {
            let _ = writeln!(page, "<li>{}</li>", text(&line));
        }
        page.push_str(
            "</ul>\n<p>Medians of all rounds; contestants take turns, on the same disk and the same cores.</p>\n",
        );
        for measured in &self.measured {
            let _ = writeln!(
                page,
                "<h2>{}</h2>\n<table><tr><th><th class=\"n\">{}<th class=\"n\">least to most<th>",
                text(&measured.what),
                text(&measured.unit)
            );
            let longest = measured.contestants.iter().map(Contestant::median).fold(0.0, f64::max);
            for (n, contestant) in measured.contestants.iter().enumerate() {
                let (least, most) = contestant.spread();
                let _ = writeln!(
                    page,
                    "<tr><td>{}<td class=\"n\">{}<td class=\"n\">{} to {}<td width=\"30%\">\
                     <span class=\"bar{}\" style=\"width:{:.1}%\"></span>",
                    text(&contestant.name),
                    figure(contestant.median()),
                    figure(least),
                    figure(most),
                    if n == 0 { "" } else { " other" },
                    contestant.median() * 100.0 / longest
                );
            }
            page.push_str("</table>\n");
            let ratio = measured.ratio().map_or(String::new(), |ratio| format!("Ratio {ratio:.2}. "));
            let verdicts = measured.verdicts().into_iter().map(|(target, met)| {
                let (class, word) = if met { ("met", "met") } else { ("missed", "not met") };
                format!("Target: {}: <span class=\"{class}\">{word}</span>. ", text(&target))
            });
            let verdict: String = verdicts.collect();
            let _ = writeln!(page, "<p>{ratio}{verdict}</p>");
        }
        page
    }
}

/// Three digits that count.
pub fn figure(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn text(plain: &str) -> String {
    plain.replace('&', "&amp;").replace('<', "&lt;")
}

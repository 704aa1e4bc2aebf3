//! The settings: each one's name, default and help, and the text that it has, with where that came from.
//!
//! Always: flag over environment over default; a secret may come from a file named by `<NAME>_FILE`; a variable that is no setting is an
//! error. Never: a secret shown, or a text understood.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use crate::crash_points;

/// One setting, as `sample.env`, `--help` and `forebay config` show it.
#[derive(Debug)]
pub struct Setting {
    /// The variable, such as `FOREBAY_LISTEN`.
    pub variable: &'static str,
    /// The flag, such as `listen`.
    pub flag: &'static str,
    /// The text it has when nobody sets it; empty is none.
    pub default: &'static str,
    /// Its value is never shown, and may come from a file.
    pub secret: bool,
    pub help: &'static str,
}

const fn setting(variable: &'static str, flag: &'static str, default: &'static str, help: &'static str) -> Setting {
    Setting { variable, flag, default, secret: false, help }
}

/// Every setting there is, in the order in which they are shown.
pub static SETTINGS: &[Setting] = &[
    setting("FOREBAY_LISTEN", "listen", "127.0.0.1:8080", "Where devices send their photos"),
    setting(
        "FOREBAY_CONSOLE_LISTEN",
        "console-listen",
        "127.0.0.1:8081",
        "Where the operator looks: status and metrics",
    ),
    setting("FOREBAY_DATA_DIR", "data-dir", "./forebay-data", "The spool, and the SQLite queue"),
    Setting {
        variable: "FOREBAY_QUEUE_URL",
        flag: "queue-url",
        default: "sqlite",
        secret: true,
        help: "sqlite (in the data dir), or postgres://user:password@host/database",
    },
    setting("FOREBAY_S3_BUCKET", "s3-bucket", "", "The bucket that photos go to"),
    setting("FOREBAY_S3_PREFIX", "s3-prefix", "", "What every object key starts with"),
    setting("FOREBAY_S3_KEY", "s3-key", "{device}/{yyyy}/{mm}/{dd}/{id}.{ext}", "The object key's template"),
    setting(
        "FOREBAY_S3_PATH_STYLE",
        "s3-path-style",
        "auto",
        "auto, always or never: auto is path style when an endpoint is set",
    ),
    setting("FOREBAY_UPLINK_RATE", "uplink-rate", "200Mbit/s", "The site's uplink"),
    setting("FOREBAY_UPLINK_SHARE", "uplink-share", "20%", "The share of it that uploads may use"),
    setting(
        "FOREBAY_DRAIN_TIMETABLE",
        "drain-timetable",
        "",
        "Shares or rates by day and time, in place of the share, such as Mon-Fri 08:00,20% 19:00,100%",
    ),
    setting(
        "FOREBAY_TIMEZONE",
        "timezone",
        "",
        "The site's time zone, such as Europe/Berlin; by default the machine's own",
    ),
    setting(
        "FOREBAY_DRAIN_ORDER",
        "drain-order",
        "balanced",
        "oldest, newest, or balanced: devices take turns, and fresh photos share what leaves with the backlog",
    ),
    setting(
        "FOREBAY_DRAIN_FRESH_SHARE",
        "drain-fresh-share",
        "50%",
        "In balanced order, the share of what leaves that goes to the newest photos",
    ),
    setting("FOREBAY_UPLOAD_MAX_BYTES", "upload-max-bytes", "10MiB", "The largest photo that is accepted"),
    setting("FOREBAY_BODY_TIMEOUT", "body-timeout", "2m", "The longest a device may take to send one photo"),
    setting("FOREBAY_RETAIN", "retain", "0s", "How long an uploaded photo stays on disk"),
    setting(
        "FOREBAY_RECORD_RETAIN",
        "record-retain",
        "7d",
        "How long the record of an uploaded photo stays in the queue",
    ),
    setting(
        "FOREBAY_SPOOL_RESERVE",
        "spool-reserve",
        "5%",
        "Free disk (and inodes) below which new photos are refused",
    ),
    setting("FOREBAY_SPOOL_MAX", "spool-max", "", "The most bytes that the spool may hold, whatever the disk has"),
    setting(
        "FOREBAY_SPOOL_FULL",
        "spool-full",
        "refuse",
        "When the disk is full: refuse, shed-oldest, or thin (give up queued photos, oldest first or evenly per device)",
    ),
    setting("FOREBAY_LOG", "log", "info", "The log filter, such as info or forebay=debug"),
    setting("FOREBAY_LOG_FORMAT", "log-format", "text", "text or json"),
];

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Default,
    Environment,
    File(PathBuf),
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::Environment => f.write_str("environment"),
            Origin::File(path) => write!(f, "file {}", path.display()),
            Origin::Flag => f.write_str("flag"),
        }
    }
}

/// One setting's text as it is in force.
#[derive(Debug, Clone)]
pub struct Value {
    pub setting: &'static Setting,
    pub text: String,
    pub origin: Origin,
}

impl Value {
    /// The text, with a secret's password replaced.
    pub fn shown(&self) -> String {
        if self.setting.secret { redacted(&self.text) } else { self.text.clone() }
    }
}

/// `postgres://user:***@host/db`: scheme, user and place, nothing that may be a password or part of one; text in which these cannot
/// be told apart is hidden whole, unless it is a plain word.
fn redacted(text: &str) -> String {
    if text.chars().all(|c| c.is_ascii_alphanumeric()) {
        return text.to_owned();
    }
    let told_apart = || {
        let (scheme, rest) = text.split_once("://")?;
        let authority = rest.split(['/', '?', '#']).next()?;
        let (who, host) = authority.rsplit_once('@')?;
        let user = who.split(':').next()?;
        let behind = &rest[authority.len()..];
        let path = behind.split(['?', '#']).next()?;
        // a password that was not escaped may go on behind what looks like the host
        let goes_on = path.contains('@') || (who.contains(':') && behind.contains('@'));
        (!goes_on).then(|| format!("{scheme}://{user}:***@{host}{path}"))
    };
    told_apart().unwrap_or_else(|| "***".to_owned())
}

/// What a configuration is read from.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// By flag name.
    pub flags: BTreeMap<String, String>,
    pub environment: BTreeMap<String, String>,
}

impl Source {
    /// The flags given, over this process's environment.
    pub fn process(flags: BTreeMap<String, String>) -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.to_string_lossy().into_owned())))
            .collect();
        Source { flags, environment }
    }

    /// Who runs this process, for others to know: the user's name, or number.
    pub fn user(&self) -> String {
        let named = ["USER", "LOGNAME"].iter().filter_map(|name| self.environment.get(*name)).find(|n| !n.is_empty());
        named.cloned().unwrap_or_else(|| format!("user {}", rustix::process::getuid().as_raw()))
    }

    /// Each setting's text and origin. Errors are unreadable files, names given twice, and unknown variables.
    pub fn values(&self) -> (Vec<Value>, Vec<String>) {
        let mut errors = self.unknown_variables();
        let values = SETTINGS.iter().map(|setting| self.value(setting, &mut errors)).collect();
        (values, errors)
    }

    fn value(&self, setting: &'static Setting, errors: &mut Vec<String>) -> Value {
        let of = |text: &str, origin| Value { setting, text: text.to_owned(), origin };
        if let Some(text) = self.flags.get(setting.flag) {
            return of(text, Origin::Flag);
        }
        // compose files and unit files hand down unset variables as empty ones
        let plain = self.environment.get(setting.variable).filter(|text| !text.is_empty());
        let file_variable = format!("{}_FILE", setting.variable);
        let file = self.environment.get(&file_variable).filter(|text| setting.secret && !text.is_empty());
        match (plain, file) {
            (Some(_), Some(_)) => {
                errors.push(format!("{} and {file_variable} are both set; keep one", setting.variable));
                of(setting.default, Origin::Default)
            }
            (Some(text), None) => of(text, Origin::Environment),
            (None, Some(path)) => match std::fs::read_to_string(path) {
                Ok(text) => of(text.trim(), Origin::File(path.into())),
                Err(error) => {
                    errors.push(format!("{file_variable}: cannot read {path}: {error}"));
                    of(setting.default, Origin::Default)
                }
            },
            (None, None) => of(setting.default, Origin::Default),
        }
    }

    /// A misspelt variable would otherwise be silently without effect.
    fn unknown_variables(&self) -> Vec<String> {
        let known = |name: &str| {
            Some(name) == crash_points::VARIABLE
                || SETTINGS
                    .iter()
                    .any(|s| name == s.variable || (s.secret && name.strip_suffix("_FILE") == Some(s.variable)))
        };
        // Kubernetes gives every pod such variables when a service is called forebay
        let injected = |name: &str, text: &str| {
            name.starts_with("FOREBAY_SERVICE_")
                || name.starts_with("FOREBAY_PORT_")
                || (name == "FOREBAY_PORT" && text.contains("://"))
        };
        self.environment
            .iter()
            .filter(|(name, text)| name.starts_with("FOREBAY_") && !known(name) && !injected(name, text))
            .map(|(name, _)| format!("{name}: there is no such setting; `forebay config` lists them all"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_queues_url_nothing_is_shown_that_may_be_of_its_password() {
        for (url, shown) in [
            ("sqlite", "sqlite"),
            ("postgres://anna:secret@db:5432/forebay?sslmode=require", "postgres://anna:***@db:5432/forebay"),
            ("postgres://anna:se@cret@db/forebay", "postgres://anna:***@db/forebay"),
            ("postgres://anna@db/forebay?password=se@cret", "postgres://anna:***@db/forebay"),
            ("postgres:///forebay?host=/run&user=anna&password=se@cret", "***"),
            ("postgres://anna:se/cr@et@db/forebay", "***"),
            ("postgres://anna:s@e/cr@et@db/forebay", "***"),
            ("postgres://anna:s@e?cr@et@db/forebay", "***"),
            ("postgres://anna:s@e#cr@et@db/forebay", "***"),
            ("postgres://anna:se?cret@db/forebay", "***"),
        ] {
            assert_eq!(redacted(url), shown);
        }
    }
}

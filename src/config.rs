//! The configuration: every setting, its default, where each value came from, and all that is wrong with them at once.
//!
//! Always: flag over environment over default; a secret may come from a file named by `<NAME>_FILE`; every error is
//! reported together, by name, with what was expected. Never: a secret in any output, and no other file reads the
//! environment (AWS's own variables are the SDK's to read; only the presence of an endpoint is looked at here).

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use jiff::tz::TimeZone;

use crate::allowance::{Uplink, Zone};
use crate::crash_points::{self, Armed};
use crate::order::Order;
use crate::shedding::WhenFull;
use crate::timetable::Timetable;
use crate::units::{ByteSize, RATE_MAX, Rate, Reserve, Share, parse_span};
use crate::upload::KeyTemplate;

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

/// The whole configuration, valid.
#[derive(Debug, Clone)]
pub struct Config {
    pub listen: SocketAddr,
    pub console_listen: SocketAddr,
    pub data_dir: PathBuf,
    pub queue: QueueUrl,
    /// None where no bucket is named; the roles that need one are refused at start.
    pub bucket: Option<BucketConfig>,
    pub keys: KeyTemplate,
    pub uplink: Uplink,
    pub order: Order,
    /// In balanced order, what goes to the newest photos.
    pub fresh_share: Share,
    pub upload_max: ByteSize,
    pub body_timeout: Duration,
    pub retain: Duration,
    pub record_retain: Duration,
    pub spool: SpoolLimits,
    pub when_full: WhenFull,
    pub log: LogConfig,
    /// No operator's setting, and none that is listed: always empty in a build without the feature `crash-points`.
    pub crash_points: Vec<Armed>,
}

/// Where the queue is.
#[derive(Clone, PartialEq, Eq)]
pub enum QueueUrl {
    /// A file in the data dir.
    Sqlite(PathBuf),
    /// A Postgres URL. It may hold a password, so it is never printed.
    Postgres(String),
}

impl fmt::Debug for QueueUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QueueUrl::Sqlite(path) => write!(f, "sqlite {}", path.display()),
            QueueUrl::Postgres(_) => f.write_str("postgres"),
        }
    }
}

/// Where photos go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketConfig {
    pub name: String,
    pub prefix: String,
    pub path_style: bool,
}

/// How to reach a store that is given, not configured by AWS's own variables: the embedded one.
#[derive(Clone)]
pub struct Endpoint {
    pub url: String,
    pub access_key: String,
    pub secret_key: String,
}

/// How much room the spool may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolLimits {
    pub reserve: Reserve,
    pub max: Option<ByteSize>,
}

/// What is logged, and in which form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    pub filter: String,
    pub json: bool,
    /// An OpenTelemetry collector is named, so traces and metrics go there too.
    pub otlp: bool,
}

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

/// All that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<String>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} error{}", self.0.len(), if self.0.len() == 1 { "" } else { "s" })?;
        self.0.iter().try_for_each(|error| write!(f, "\n  {error}"))
    }
}

impl std::error::Error for ConfigErrors {}

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

impl Config {
    /// Reads and checks everything.
    pub fn load(source: &Source) -> Result<Config, ConfigErrors> {
        let (values, errors) = source.values();
        let mut read = Reader { values, errors };

        let listen = read.parsed("FOREBAY_LISTEN", address);
        let console_listen = read.parsed("FOREBAY_CONSOLE_LISTEN", address);
        let data_dir = PathBuf::from(read.text("FOREBAY_DATA_DIR"));
        let queue = read.parsed("FOREBAY_QUEUE_URL", |text| queue_url(text, &data_dir));
        let path_style = read.parsed("FOREBAY_S3_PATH_STYLE", |text| match text {
            "auto" => Ok(["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]
                .iter()
                .any(|name| source.environment.get(*name).is_some_and(|text| !text.is_empty()))),
            "always" => Ok(true),
            "never" => Ok(false),
            other => Err(format!("expected auto, always or never, found {other:?}")),
        });
        let prefix = read.text("FOREBAY_S3_PREFIX");
        let keys = read.parsed("FOREBAY_S3_KEY", |text| KeyTemplate::new(&prefix, text));
        let bucket_name = read.parsed("FOREBAY_S3_BUCKET", bucket_name);
        let rate: Option<Rate> = read.parsed("FOREBAY_UPLINK_RATE", str::parse);
        let share = read.parsed("FOREBAY_UPLINK_SHARE", str::parse);
        let zone = read.parsed("FOREBAY_TIMEZONE", zone);
        let timetable = match read.text("FOREBAY_DRAIN_TIMETABLE") {
            text if text.trim().is_empty() => None,
            text => Timetable::parse(&text, rate.unwrap_or(RATE_MAX))
                .map_err(|all| {
                    read.errors.extend(all.iter().map(|wrong| format!("FOREBAY_DRAIN_TIMETABLE: {wrong}")));
                })
                .ok(),
        };
        let order = read.parsed("FOREBAY_DRAIN_ORDER", str::parse);
        let fresh_share = read.parsed("FOREBAY_DRAIN_FRESH_SHARE", |text| match text.trim() {
            "0%" => Ok(Share::NONE),
            text => text.parse(),
        });
        let upload_max = read.parsed("FOREBAY_UPLOAD_MAX_BYTES", |text| {
            text.parse().and_then(|size: ByteSize| match size.0 {
                1..=134_217_728 => Ok(size),
                _ => Err(format!("expected from 1 byte to 128MiB, found {text:?}")),
            })
        });
        let body_timeout = read.parsed("FOREBAY_BODY_TIMEOUT", |text| match parse_span(text)? {
            Duration::ZERO => Err("expected more than no time at all".to_owned()),
            // a file that is unfinished for an hour has no writer any more
            span if span > BODY_TIMEOUT_MAX => Err(format!("expected half an hour at most, found {text:?}")),
            span => Ok(span),
        });
        let retain = read.parsed("FOREBAY_RETAIN", |text| span_within(text, Duration::ZERO));
        let record_retain = read.parsed("FOREBAY_RECORD_RETAIN", |text| span_within(text, Duration::from_secs(3600)));
        let reserve = read.parsed("FOREBAY_SPOOL_RESERVE", str::parse);
        let spool_max = read.parsed("FOREBAY_SPOOL_MAX", |text| match text {
            "" => Ok(None),
            text => text.parse().map(Some),
        });
        let when_full = read.parsed("FOREBAY_SPOOL_FULL", str::parse);
        let filter = read.parsed("FOREBAY_LOG", |text| match tracing_subscriber::EnvFilter::try_new(text) {
            Ok(_) => Ok(text.to_owned()),
            Err(wrong) => Err(format!("expected a filter such as info or forebay=debug, found {text:?}: {wrong}")),
        });
        let json = read.parsed("FOREBAY_LOG_FORMAT", |text| match text {
            "text" => Ok(false),
            "json" => Ok(true),
            other => Err(format!("expected text or json, found {other:?}")),
        });
        let otlp = source.environment.iter().any(|(name, text)| {
            name.starts_with("OTEL_EXPORTER_OTLP_") && name.ends_with("ENDPOINT") && !text.is_empty()
        });

        let armed = crash_points::VARIABLE.and_then(|name| Some((name, source.environment.get(name)?)));
        let crash_points = armed.map_or(Ok(Vec::new()), |(name, text)| {
            crash_points::parse(text).map_err(|wrong| read.errors.push(format!("{name}: {wrong}")))
        });

        let errors = read.errors;
        let config = (|| {
            let (keys, path_style) = (keys?, path_style?);
            Some(Config {
                listen: listen?,
                console_listen: console_listen?,
                data_dir,
                queue: queue?,
                bucket: bucket_name?.map(|name| BucketConfig { name, prefix: keys.prefix().to_owned(), path_style }),
                keys,
                uplink: Uplink { rate: rate?, share: share?, timetable, zone: zone? },
                order: order?,
                fresh_share: fresh_share?,
                upload_max: upload_max?,
                body_timeout: body_timeout?,
                retain: retain?,
                record_retain: record_retain?,
                spool: SpoolLimits { reserve: reserve?, max: spool_max? },
                when_full: when_full?,
                log: LogConfig { filter: filter?, json: json?, otlp },
                crash_points: crash_points.ok()?,
            })
        })();
        match config {
            Some(config) if errors.is_empty() => Ok(config),
            _ => Err(ConfigErrors(errors)),
        }
    }

    /// The bucket, for a role that cannot do without.
    pub fn require_bucket(&self) -> Result<&BucketConfig, ConfigErrors> {
        self.bucket.as_ref().ok_or_else(|| {
            ConfigErrors(vec![
                "FOREBAY_S3_BUCKET (or --s3-bucket): expected the name of the bucket that photos go to, found none"
                    .into(),
            ])
        })
    }
}

/// Looks settings up by name and gathers what is wrong with them.
struct Reader {
    values: Vec<Value>,
    errors: Vec<String>,
}

impl Reader {
    fn text(&self, variable: &str) -> String {
        let value = self.values.iter().find(|value| value.setting.variable == variable);
        debug_assert!(value.is_some(), "{variable} is not in SETTINGS");
        value.map(|value| value.text.clone()).unwrap_or_default()
    }

    fn parsed<T>(&mut self, variable: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        parse(&self.text(variable)).map_err(|wrong| self.errors.push(format!("{variable}: {wrong}"))).ok()
    }
}

/// A span from `least` up to ten years.
fn span_within(text: &str, least: Duration) -> Result<Duration, String> {
    let most = Duration::from_secs(10 * 365 * 86_400);
    match parse_span(text)? {
        span if span < least => Err(format!("expected at least {}, found {text:?}", crate::units::span(least))),
        span if span > most => Err(format!("expected ten years at most, found {text:?}")),
        span => Ok(span),
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("expected an address and port such as 0.0.0.0:8080, found {text:?}"))
}

/// Empty is the machine's own, which the library finds by TZ and /etc/localtime, and which is UTC where neither says.
fn zone(text: &str) -> Result<Zone, String> {
    if text.is_empty() {
        let machines = Some(TimeZone::system()).filter(|rules| !rules.is_unknown());
        let told = std::env::var("TZ").unwrap_or_default();
        if machines.is_none() && !told.is_empty() {
            return Err(format!(
                "it is not set, and the machine's own, TZ={told}, cannot be read; set it, such as to Europe/Berlin"
            ));
        }
        // a machine that says nothing goes by UTC
        let rules = machines.unwrap_or(TimeZone::UTC);
        let name = format!("{}, the machine's own", rules.iana_name().unwrap_or("one without a name"));
        return Ok(Zone { rules, name });
    }
    let rules = TimeZone::get(text).map_err(|_| {
        let part = text.rsplit('/').next().unwrap_or(text).trim().replace(' ', "_").to_ascii_lowercase();
        let near = |name: &str| !part.is_empty() && name.to_ascii_lowercase().contains(&part);
        let hint = jiff::tz::db().available().find(|name| near(name.as_str()));
        let hint = hint.map_or(String::new(), |name| format!("; is it {name}?"));
        format!("there is no time zone {text:?}; expected an IANA name such as Europe/Berlin{hint}")
    })?;
    let name = rules.iana_name().unwrap_or(text).to_owned();
    Ok(Zone { rules, name })
}

fn queue_url(text: &str, data_dir: &std::path::Path) -> Result<QueueUrl, String> {
    match text {
        "sqlite" => Ok(QueueUrl::Sqlite(data_dir.join("queue.sqlite"))),
        _ if text.starts_with("postgres://") || text.starts_with("postgresql://") => {
            Ok(QueueUrl::Postgres(text.to_owned()))
        }
        // the text may hold a password, so it is not repeated
        _ => Err("expected sqlite or postgres://user:password@host/database".to_owned()),
    }
}

/// The longest that a body may take to come.
const BODY_TIMEOUT_MAX: Duration = Duration::from_secs(1800);

/// Empty is none. S3's own rules for names, in short.
fn bucket_name(text: &str) -> Result<Option<String>, String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    match text {
        "" => Ok(None),
        _ if (3..=63).contains(&text.len()) && text.chars().all(allowed) => Ok(Some(text.to_owned())),
        _ => Err(format!("expected a bucket's name (3 to 63 lower-case letters, digits, '-' and '.'), found {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(environment: &[(&str, &str)]) -> Source {
        Source {
            flags: BTreeMap::new(),
            environment: environment.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        }
    }

    #[test]
    fn nothing_set_is_a_valid_configuration() {
        let config = Config::load(&source(&[])).unwrap();
        let in_force = config.uplink.in_force(crate::units::UnixMs::now(), &Default::default());
        assert_eq!(in_force.allowance, Some(Rate(5_000_000)));
        assert!(config.bucket.is_none());
    }

    #[test]
    fn every_error_is_reported_at_once_by_name() {
        let wrong = source(&[
            ("FOREBAY_LISTEN", "everywhere"),
            ("FOREBAY_UPLINK_RATE", "0Mbit/s"),
            ("FOREBAY_UPLINK_SHARE", "120%"),
            ("FOREBAY_S3_KEY", "{device}.jpg"),
            ("FOREBAY_UPLOAD_MAX_BYTES", "2TB"),
            ("FOREBAY_RETIAN", "1h"),
        ]);
        let ConfigErrors(errors) = Config::load(&wrong).unwrap_err();
        for name in [
            "FOREBAY_LISTEN",
            "FOREBAY_UPLINK_RATE",
            "FOREBAY_UPLINK_SHARE",
            "FOREBAY_S3_KEY",
            "FOREBAY_UPLOAD_MAX_BYTES",
            "FOREBAY_RETIAN",
        ] {
            assert!(errors.iter().any(|e| e.starts_with(name)), "{name} is missing from {errors:?}");
        }
        assert_eq!(errors.len(), 6);
    }

    #[test]
    fn a_timetable_is_read_in_the_sites_time_zone_and_all_that_is_wrong_with_it_is_told() {
        let week = ("FOREBAY_DRAIN_TIMETABLE", "Mon-Fri 08:00,20% 19:00,100%");
        let uplink = Config::load(&source(&[week, ("FOREBAY_TIMEZONE", "america/new_york")])).unwrap().uplink;
        assert_eq!(uplink.zone.name, "America/New_York");
        assert!(uplink.timetable.is_some());
        let wrong = source(&[
            ("FOREBAY_DRAIN_TIMETABLE", "Mon-Fri 8,20% 19:00,300Mbit/s Mon"),
            ("FOREBAY_TIMEZONE", "CEST/berlin"),
        ]);
        let ConfigErrors(errors) = Config::load(&wrong).unwrap_err();
        let of = |name: &str| errors.iter().filter(|error| error.starts_with(name)).count();
        assert_eq!((of("FOREBAY_DRAIN_TIMETABLE: "), of("FOREBAY_TIMEZONE: ")), (4, 1), "{errors:?}");
        assert!(errors.iter().any(|error| error.ends_with("is it Europe/Berlin?")), "{errors:?}");
        assert_eq!(Config::load(&source(&[])).unwrap().uplink.timetable, None);
    }

    #[test]
    fn the_fresh_share_may_be_nothing_or_all() {
        for (text, share) in [("0%", Share::NONE), ("50%", Share::HALF), ("100%", Share::WHOLE)] {
            assert_eq!(Config::load(&source(&[("FOREBAY_DRAIN_FRESH_SHARE", text)])).unwrap().fresh_share, share);
        }
        let wrong = source(&[("FOREBAY_DRAIN_FRESH_SHARE", "101%"), ("FOREBAY_DRAIN_ORDER", "random")]);
        assert_eq!(Config::load(&wrong).unwrap_err().0.len(), 2);
    }

    #[test]
    fn a_flag_wins_over_the_environment() {
        let mut source = source(&[("FOREBAY_UPLINK_SHARE", "30%")]);
        source.flags.insert("uplink-share".into(), "40%".into());
        assert_eq!(Config::load(&source).unwrap().uplink.share, "40%".parse().unwrap());
    }

    #[test]
    fn a_secret_is_never_shown_and_may_come_from_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "postgres://forebay:s3cret@db/forebay?password=s3cret\n").unwrap();
        let source = source(&[("FOREBAY_QUEUE_URL_FILE", file.path().to_str().unwrap())]);
        let config = Config::load(&source).unwrap();
        assert!(matches!(config.queue, QueueUrl::Postgres(_)));
        let (values, _) = source.values();
        let shown: Vec<String> = values.iter().map(Value::shown).collect();
        assert!(shown.contains(&"postgres://forebay:***@db/forebay".to_owned()), "{shown:?}");
        assert!(!format!("{shown:?}{config:?}").contains("s3cret"));
    }

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

    #[test]
    fn crash_points_are_armed_by_a_variable_that_is_not_listed() {
        let config = Config::load(&source(&[("FOREBAY_CRASH_POINTS", "spool.sync:abort:3")])).unwrap();
        assert_eq!(config.crash_points, crash_points::parse("spool.sync:abort:3").unwrap());
        let ConfigErrors(errors) = Config::load(&source(&[("FOREBAY_CRASH_POINTS", "spool.sink:abort")])).unwrap_err();
        assert!(errors.len() == 1 && errors[0].starts_with("FOREBAY_CRASH_POINTS: expected one of"), "{errors:?}");
        assert!(SETTINGS.iter().all(|setting| setting.variable != "FOREBAY_CRASH_POINTS"));
    }

    #[test]
    fn variables_that_kubernetes_injects_are_let_be() {
        assert!(Config::load(&source(&[("FOREBAY_SERVICE_HOST", "10.0.0.1"), ("FOREBAY_PORT_8080_TCP", "x")])).is_ok());
        assert!(Config::load(&source(&[("FOREBAY_PORT", "tcp://10.0.0.1:8080")])).is_ok());
        assert!(Config::load(&source(&[("FOREBAY_PORT", "8080")])).is_err(), "no such setting");
    }
}

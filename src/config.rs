//! The configuration: what the settings' texts (`settings.rs`) mean, and all that is wrong with them at once.
//!
//! Always: every error is reported together, by name, with what was expected. Never: a secret in any output, and nobody else reads
//! the environment (AWS's own variables are the SDK's to read; only the presence of an endpoint is looked at here).

mod settings;

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

pub use self::settings::{Origin, SETTINGS, Setting, Source, Value};

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
    use std::collections::BTreeMap;

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
            ("FOREBAY_BODY_TIMEOUT", "31m"),
            ("FOREBAY_RETAIN", "101y"),
        ]);
        let ConfigErrors(errors) = Config::load(&wrong).unwrap_err();
        for name in [
            "FOREBAY_LISTEN",
            "FOREBAY_UPLINK_RATE",
            "FOREBAY_UPLINK_SHARE",
            "FOREBAY_S3_KEY",
            "FOREBAY_UPLOAD_MAX_BYTES",
            "FOREBAY_RETIAN",
            "FOREBAY_BODY_TIMEOUT",
            "FOREBAY_RETAIN",
        ] {
            assert!(errors.iter().any(|e| e.starts_with(name)), "{name} is missing from {errors:?}");
        }
        assert_eq!(errors.len(), 8);
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

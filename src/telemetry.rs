//! Logs, traces and metrics, and the names of the metrics.
//!
//! Always: one meter provider with a Prometheus reader, and OTLP beside it when OpenTelemetry's own variables name a
//! collector; units stand last in a metric's name. Never: a device id as a label (there are a thousand), never a secret.

use std::io::IsTerminal;
use std::sync::OnceLock;

use opentelemetry::metrics::{Counter, Gauge, Histogram};
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry::{Context, KeyValue, global};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::LogConfig;
use crate::error::{Error, Result};
use crate::forecast::HORIZON;
use crate::status::Status;
use crate::upload::State;

/// What was started, to be read from and to be stopped.
pub struct Telemetry {
    registry: prometheus::Registry,
    meters: SdkMeterProvider,
    tracers: Option<SdkTracerProvider>,
}

/// Starts logs, metrics and, if a collector is named, OTLP. Once per process, before anything is measured. Must be called in
/// a tokio runtime.
pub fn start(config: &LogConfig) -> Result<Telemetry> {
    let failed = |cause: String| Error::unavailable("cannot start telemetry", cause);
    let filter = EnvFilter::try_new(&config.filter)
        .map_err(|e| Error::Refused(format!("FOREBAY_LOG: expected a filter such as info or forebay=debug: {e}")))?;
    // of a parameter of the queue's URL that it does not know sqlx logs the value, which may be a password with a misspelt name
    let quiet = "sqlx_postgres::options=off".parse().map_err(|e| failed(format!("{e}")))?;
    let filter = filter.add_directive(quiet);
    let resource = Resource::builder().with_service_name("forebay").build();

    let registry = prometheus::Registry::new();
    let reader = opentelemetry_prometheus::exporter()
        .with_registry(registry.clone())
        .without_units() // the names have them already
        .without_counter_suffixes()
        .without_target_info()
        .scope_info_enabled(false)
        .build()
        .map_err(|e| failed(e.to_string()))?;
    let mut meters = SdkMeterProvider::builder().with_resource(resource.clone()).with_reader(reader);
    let mut tracers = None;
    if config.otlp {
        let exporter =
            opentelemetry_otlp::MetricExporter::builder().with_http().build().map_err(|e| failed(e.to_string()))?;
        meters = meters.with_periodic_exporter(exporter);
        let exporter =
            opentelemetry_otlp::SpanExporter::builder().with_http().build().map_err(|e| failed(e.to_string()))?;
        tracers = Some(SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build());
    }
    let meters = meters.build();
    global::set_meter_provider(meters.clone());

    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match config.json {
        true => lines.json().flatten_event(true).boxed(),
        false => lines.with_ansi(std::io::stderr().is_terminal()).with_target(false).boxed(),
    };
    let spans = tracers.as_ref().map(|provider| tracing_opentelemetry::layer().with_tracer(provider.tracer("forebay")));
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .with(spans)
        .try_init()
        .map_err(|e| failed(e.to_string()))?;
    Ok(Telemetry { registry, meters, tracers })
}

impl Telemetry {
    /// The registry behind `/metrics`.
    pub fn registry(&self) -> prometheus::Registry {
        self.registry.clone()
    }

    /// Sends what is left to the collector. Blocks for a few seconds at most.
    pub fn stop(self) {
        if let Some(tracers) = self.tracers {
            let _ = tracers.shutdown();
        }
        let _ = self.meters.shutdown();
    }
}

/// All metrics as Prometheus reads them.
pub fn encode(registry: &prometheus::Registry) -> Result<String> {
    prometheus::TextEncoder::new()
        .encode_to_string(&registry.gather())
        .map_err(|e| Error::unavailable("cannot encode the metrics", e))
}

/// Every metric there is.
pub struct Metrics {
    /// Answers to devices, by status.
    ingest_answers: Counter<u64>,
    /// From the request's head to the answer, by status.
    ingest_answer_duration: Histogram<f64>,
    /// Bytes of photos acknowledged as new.
    ingest_photo_bytes: Counter<u64>,
    /// Photos acknowledged while the queue was away.
    ingest_journaled: Counter<u64>,
    /// Attempts of the drain, by outcome.
    drain_attempts: Counter<u64>,
    /// Bytes that the drain put on the wire.
    drain_sent_bytes: Counter<u64>,
    drain_allowance: Gauge<u64>,
    drain_paused: Gauge<u64>,
    uploads: Gauge<i64>,
    shed_bytes: Gauge<i64>,
    backlog_uploads: Gauge<i64>,
    backlog_bytes: Gauge<i64>,
    backlog_oldest_age: Gauge<f64>,
    spool_free: Gauge<u64>,
    spool_usable: Gauge<u64>,
    spool_full_in: Gauge<f64>,
    forecast_full_in: Gauge<f64>,
    forecast_clear_in: Gauge<f64>,
    forecast_growth: Gauge<f64>,
    queue_reachable: Gauge<u64>,
}

/// The metrics of this process. They go nowhere unless [`start`] was called before.
pub fn metrics() -> &'static Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS.get_or_init(|| {
        let meter = global::meter("forebay");
        let counter = |name: &'static str, what: &'static str| meter.u64_counter(name).with_description(what).build();
        let gauge = |name: &'static str, what: &'static str| meter.u64_gauge(name).with_description(what).build();
        let signed = |name: &'static str, what: &'static str| meter.i64_gauge(name).with_description(what).build();
        let float = |name: &'static str, what: &'static str| meter.f64_gauge(name).with_description(what).build();
        Metrics {
            ingest_answers: counter("forebay_ingest_answers_total", "Answers to devices, by status"),
            ingest_answer_duration: meter
                .f64_histogram("forebay_ingest_answer_duration_seconds")
                .with_description("Time from a request's head to its answer")
                .with_boundaries(vec![0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0])
                .build(),
            ingest_photo_bytes: counter("forebay_ingest_photo_bytes_total", "Bytes of photos acknowledged as new"),
            ingest_journaled: counter("forebay_ingest_journaled_total", "Photos acknowledged while the queue was away"),
            drain_attempts: counter("forebay_drain_attempts_total", "Attempts to upload, by outcome"),
            drain_sent_bytes: counter(
                "forebay_drain_sent_bytes_total",
                "Bytes put on the wire, heads and repeats included",
            ),
            drain_allowance: gauge("forebay_drain_allowance_bytes_per_second", "What the drain may put on the wire"),
            drain_paused: gauge("forebay_drain_paused", "1 while the environment keeps the drain from pouring"),
            uploads: signed("forebay_uploads", "Uploads, by state"),
            shed_bytes: signed("forebay_shed_bytes", "Bytes of photos given up because the disk was full"),
            backlog_uploads: signed("forebay_backlog_uploads", "Uploads that wait to leave"),
            backlog_bytes: signed("forebay_backlog_bytes", "Bytes that wait to leave"),
            backlog_oldest_age: float("forebay_backlog_oldest_age_seconds", "Age of the oldest upload that waits"),
            spool_free: gauge("forebay_spool_free_bytes", "Free bytes on the spool's disk"),
            spool_usable: gauge(
                "forebay_spool_usable_bytes",
                "Bytes that may be accepted before the reserve is reached",
            ),
            spool_full_in: float(
                "forebay_spool_full_in_seconds",
                "Time until the disk is full; sixty days when it does not fill",
            ),
            forecast_full_in: float(
                "forebay_forecast_full_in_seconds",
                "Time until the disk is full, by timetable and all; sixty days when it does not fill",
            ),
            forecast_clear_in: float(
                "forebay_forecast_clear_in_seconds",
                "Time until the backlog is gone; 0 when it is, sixty days when it stays",
            ),
            forecast_growth: float(
                "forebay_forecast_growth_bytes_per_day",
                "By how much the backlog is larger in a day; below 0 when it shrinks",
            ),
            queue_reachable: gauge("forebay_queue_reachable", "1 when the queue answers"),
        }
    })
}

impl Metrics {
    /// A device was answered with `status` after `seconds`.
    pub fn answered(&self, status: u16, seconds: f64) {
        let label = [KeyValue::new("status", i64::from(status))];
        self.ingest_answers.add(1, &label);
        self.ingest_answer_duration.record(seconds, &label);
    }

    /// A new photo was acknowledged.
    pub fn acknowledged(&self, photo_bytes: u64) {
        self.ingest_photo_bytes.add(photo_bytes, &[]);
    }

    /// A photo was acknowledged while the queue was away.
    pub fn journaled(&self) {
        self.ingest_journaled.add(1, &[]);
    }

    /// An attempt to upload ended: `uploaded`, `already_there`, `refused`, `damaged`, `environment`, `given_up`.
    pub fn attempted(&self, outcome: &'static str) {
        self.drain_attempts.add(1, &[KeyValue::new("outcome", outcome)]);
    }

    /// Bytes were put on the wire.
    pub fn sent(&self, bytes: u64) {
        self.drain_sent_bytes.add(bytes, &[]);
    }

    /// Sets every gauge from a snapshot.
    pub fn observe(&self, status: &Status) {
        use crate::status::Condition;
        if status.drain.condition != Condition::Elsewhere {
            self.drain_allowance.record(status.drain.allowance_bytes_per_second, &[]);
            let outage =
                matches!(status.drain.condition, Condition::Paused { .. } | Condition::Held { outage: Some(_), .. });
            self.drain_paused.record(u64::from(outage), &[]);
        }
        self.queue_reachable.record(u64::from(status.queue.reachable), &[]);
        if status.queue.reachable {
            let books = &status.books;
            for (state, count) in [
                (State::Queued, books.queued),
                (State::Uploading, books.uploading),
                (State::Uploaded, books.uploaded),
                (State::Dead, books.dead),
                (State::Shed, books.shed),
            ] {
                self.uploads.record(count.uploads, &[KeyValue::new("state", state.as_str())]);
            }
            self.shed_bytes.record(books.shed.bytes, &[]);
            self.backlog_uploads.record(status.backlog.uploads, &[]);
            self.backlog_bytes.record(status.backlog.bytes, &[]);
            self.backlog_oldest_age.record(status.backlog.oldest_age_seconds, &[]);
            let forecast = &status.forecast;
            // a gauge of infinity is not shown at /metrics at all; the end of what is looked at stands for never
            let horizon = HORIZON.as_secs_f64();
            let full_in = forecast.full_in_seconds.unwrap_or(horizon);
            self.spool_full_in.record(full_in, &[]);
            self.forecast_full_in.record(full_in, &[]);
            let stays = forecast.peak_day.bytes > 0.0 && forecast.growth_bytes_per_day > 0.0;
            let clear_in = forecast.clear_in_seconds.unwrap_or(if stays { horizon } else { 0.0 });
            self.forecast_clear_in.record(clear_in, &[]);
            self.forecast_growth.record(forecast.growth_bytes_per_day, &[]);
        }
        self.spool_free.record(status.spool.free_bytes, &[]);
        self.spool_usable.record(status.spool.usable_bytes, &[]);
    }
}

/// W3C trace context is read from and written to text under this name.
const TRACEPARENT: &str = "traceparent";

struct One<'a>(Option<&'a str>);

impl Extractor for One<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.filter(|_| key == TRACEPARENT)
    }
    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

struct Written(Option<String>);

impl Injector for Written {
    fn set(&mut self, key: &str, value: String) {
        if key == TRACEPARENT {
            self.0 = Some(value);
        }
    }
}

fn context_of(traceparent: &str) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &One(Some(traceparent)))
}

/// Makes `span` a child of the request's trace.
pub fn continue_trace(span: &Span, traceparent: &str) {
    let _ = span.set_parent(context_of(traceparent));
}

/// Links `span` to the trace in which its upload was accepted.
pub fn link_trace(span: &Span, traceparent: &str) {
    let context = context_of(traceparent);
    let linked = context.span().span_context().clone();
    if linked.is_valid() {
        span.add_link(linked);
    }
}

/// The trace context of `span`, to be kept with its upload; none when nothing is traced.
pub fn traceparent_of(span: &Span) -> Option<String> {
    let mut written = Written(None);
    TraceContextPropagator::new().inject_context(&span.context(), &mut written);
    written.0
}

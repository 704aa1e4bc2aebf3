//! What an operator may say while it runs: another rate, a pause, and the end of either.
//!
//! Always: it is kept in the queue, so that whichever process pours follows it within a second, a restarted one too; every
//! answer is the state afterwards, as `GET /rate` gives it. Never: a change by a request that a browser sends for a page of
//! another site.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Console;
use crate::allowance::End;
use crate::error::Result as CallResult;
use crate::http::problem::{Kind, Problem};
use crate::status::RateStatus;
use crate::timetable::Amount;
use crate::units::{UnixMs, parse_span};

/// The longest body that is read; what may be said is far shorter.
pub const BODY_BYTES_MAX: usize = 4096;
/// The longest that something said for a time may hold.
const SPAN_MAX: Duration = Duration::from_secs(30 * 86_400);
/// The longest name of whoever says it, in characters.
const WHO_CHARS_MAX: usize = 100;
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);

type Answer = Result<Json<RateStatus>, Problem>;
type Body = Result<Bytes, BytesRejection>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetRate {
    rate: String,
    r#for: Option<String>,
    until: Option<String>,
    who: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetPause {
    r#for: Option<String>,
    until: Option<String>,
    who: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

/// Refuses what a browser sends for a page: the console has none that changes anything.
pub async fn from_no_page(request: Request, next: Next) -> Response {
    let from_a_page =
        request.headers().contains_key(header::ORIGIN) || request.headers().contains_key("sec-fetch-site");
    if from_a_page && !request.method().is_safe() {
        return Problem::new(Kind::Forbidden, "pages may not change anything here; use `forebay rate` or curl")
            .into_response();
    }
    next.run(request).await
}

pub async fn show(State(console): State<Console>) -> Answer {
    let control = answered(console.queue.control()).await?;
    Ok(Json(RateStatus::new(&console.uplink, &control, UnixMs::now())))
}

pub async fn set(State(console): State<Console>, headers: HeaderMap, body: Body) -> Answer {
    let said: SetRate = json(&headers, body)?;
    let amount = said.rate.parse().and_then(|amount: Amount| amount.within(console.uplink.rate));
    let amount = amount.map_err(|wrong| out_of_range("rate", wrong))?;
    let (end, who) = (end(said.r#for, said.until)?, who(said.who)?);
    answered(console.queue.set_rate(amount, &who, end)).await?;
    tracing::info!(rate = %amount, who, "an operator set a rate");
    show(State(console)).await
}

pub async fn clear(State(console): State<Console>) -> Answer {
    answered(console.queue.clear_rate()).await?;
    tracing::info!("an operator cleared the rate that was set");
    show(State(console)).await
}

pub async fn pause(State(console): State<Console>, headers: HeaderMap, body: Body) -> Answer {
    let said: SetPause = json(&headers, body)?;
    let (end, who) = (end(said.r#for, said.until)?, who(said.who)?);
    answered(console.queue.set_pause(&who, end)).await?;
    tracing::info!(who, "an operator paused the drain");
    show(State(console)).await
}

pub async fn resume(State(console): State<Console>, headers: HeaderMap, body: Body) -> Answer {
    let Nothing {} = json(&headers, body)?;
    answered(console.queue.clear_pause()).await?;
    tracing::info!("an operator resumed the drain");
    show(State(console)).await
}

/// The console knows no passwords: who reaches it may use it. A page of another site that is open in an operator's browser
/// must not: a form or a script there can send POST to any address, but only as text, as a form, or without a body. For
/// `application/json`, PUT and DELETE the browser asks the console first whether it may, and gets no yes. A page whose name was
/// made to lead here is not asked, but says in `Origin` that it is a page; see [`from_no_page`].
fn json<T: DeserializeOwned>(headers: &HeaderMap, body: Body) -> Result<T, Problem> {
    let said = headers.get(header::CONTENT_TYPE);
    let kind = said.and_then(|kind| kind.to_str().ok()).unwrap_or("");
    // without a body there is nothing to say of it; a page of another site would say `Origin`
    let nothing = said.is_none() && body.as_ref().is_ok_and(|body| body.is_empty());
    if !nothing && !kind.split(';').next().unwrap_or("").trim().eq_ignore_ascii_case("application/json") {
        let detail = format!("expected a body with Content-Type: application/json, found {kind:?}");
        return Err(Problem::new(Kind::UnsupportedMediaType, detail));
    }
    let body = body.map_err(|wrong| match wrong.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Problem::new(Kind::TooLarge, format!("expected a body of {BODY_BYTES_MAX} bytes at most"))
        }
        _ => Problem::new(Kind::MalformedBody, "the body ended before its end"),
    })?;
    let body: &[u8] = if body.is_empty() { b"{}" } else { &body };
    serde_json::from_slice(body).map_err(|wrong| Problem::new(Kind::MalformedBody, wrong.to_string()))
}

fn out_of_range(field: &str, wrong: impl std::fmt::Display) -> Problem {
    Problem::new(Kind::OutOfRange, format!("{field}: {wrong}"))
}

fn end(span: Option<String>, until: Option<String>) -> Result<End, Problem> {
    let limits = "expected 30d at most from now, and in the future";
    match (span, until) {
        (None, None) => Ok(End::Never),
        (Some(_), Some(_)) => Err(out_of_range("until", "expected for or until, found both")),
        (Some(text), None) => match parse_span(&text).map_err(|wrong| out_of_range("for", wrong))? {
            // what the queue counts in is milliseconds
            span if span.as_millis() > 0 && span <= SPAN_MAX => Ok(End::After(span)),
            _ => Err(out_of_range("for", format!("{limits}, found {text:?}"))),
        },
        (None, Some(text)) => {
            let at: UnixMs = text.parse().map_err(|wrong| out_of_range("until", wrong))?;
            match at.since(UnixMs::now()) {
                left if left > Duration::ZERO && left <= SPAN_MAX => Ok(End::At(at)),
                _ => Err(out_of_range("until", format!("{limits}, found {text:?}"))),
            }
        }
    }
}

fn who(said: Option<String>) -> Result<String, Problem> {
    let who = said.unwrap_or_default().trim().to_owned();
    if who.chars().count() > WHO_CHARS_MAX || who.chars().any(char::is_control) {
        let limits = format!("expected {WHO_CHARS_MAX} characters at most, and none that cannot be seen");
        return Err(out_of_range("who", limits));
    }
    Ok(if who.is_empty() { "somebody".to_owned() } else { who })
}

/// What the queue says, in time.
async fn answered<T>(call: impl Future<Output = CallResult<T>>) -> Result<T, Problem> {
    let away = "what operators say is kept in the queue, and the queue does not answer; try again, or see status";
    match tokio::time::timeout(QUEUE_TIMEOUT, call).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => {
            tracing::warn!(%error, "what an operator asks cannot be done");
            Err(Problem::new(Kind::QueueAway, away))
        }
        Err(_) => Err(Problem::new(Kind::QueueAway, away)),
    }
}

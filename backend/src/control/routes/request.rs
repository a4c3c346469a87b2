//! What a request brings, taken apart: bodies within their limits, queries, names in paths. What is at fault is named.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use super::super::error::{ApiError, Result};
use super::super::types::ErrorKind;

/// The largest body of a request.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// How long a client may take to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// A body of JSON, read whole within its limits.
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request<Body>, _: &S) -> Result<Self> {
        parse(&body_of(request).await?).map(Self)
    }
}

/// The body of a request.
async fn body_of(request: Request<Body>) -> Result<Bytes> {
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
    let body = tokio::time::timeout(BODY_TIMEOUT, body)
        .await
        .map_err(|_| {
            bad_request(
                StatusCode::REQUEST_TIMEOUT,
                "the body did not arrive in time",
            )
        })?;
    let bytes = body
        .map_err(|error| {
            if error.downcast_ref::<LengthLimitError>().is_some() {
                let what = format!("the body is larger than {BODY_BYTES_MAX} bytes");
                bad_request(StatusCode::PAYLOAD_TOO_LARGE, what)
            } else {
                bad_request(
                    StatusCode::BAD_REQUEST,
                    format!("the body broke off: {error}"),
                )
            }
        })?
        .to_bytes();
    Ok(bytes)
}

/// As [`JsonBody`]; no body at all stands for an empty object.
pub struct JsonOrNothing<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonOrNothing<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request<Body>, _: &S) -> Result<Self> {
        let bytes = body_of(request).await?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        parse(text).map(Self)
    }
}

/// The options in a query string.
pub struct QueryOf<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for QueryOf<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(query)) => Ok(Self(query)),
            Err(error) => {
                let (field, what) = in_query(&error.body_text());
                Err(ApiError::invalid(&field, what))
            }
        }
    }
}

/// The name of a volume in the path of a route.
pub struct VolumeName(pub String);

impl<S: Send + Sync> FromRequestParts<S> for VolumeName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(error) => Err(bad_request(error.status(), error.body_text()).of("name")),
        }
    }
}

/// The names of a volume and of its snapshot in the path of a route.
pub struct SnapshotName {
    /// The volume.
    pub volume: String,
    /// Its snapshot.
    pub snapshot: String,
}

impl<S: Send + Sync> FromRequestParts<S> for SnapshotName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path((volume, snapshot))) => Ok(Self { volume, snapshot }),
            Err(error) => Err(bad_request(error.status(), error.body_text()).of("snapshot")),
        }
    }
}

/// The number of a job in the path of a route.
pub struct JobNumber(pub u64);

impl<S: Send + Sync> FromRequestParts<S> for JobNumber {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(Self(id)),
            Err(_) => Err(ApiError::invalid(
                "id",
                "the number of a job is a whole number",
            )),
        }
    }
}

/// A request that is at fault as a whole.
fn bad_request(status: StatusCode, message: impl Into<String>) -> ApiError {
    ApiError::new(status, ErrorKind::Invalid, message)
}

/// The value that a JSON text describes, or an error that names the field.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    let mut text = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut text).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() {
            let field = if path == "." {
                named_in(&inner.to_string())
            } else {
                path
            };
            ApiError::invalid(&field, inner.to_string())
        } else {
            bad_request(
                StatusCode::BAD_REQUEST,
                format!("the body is not JSON: {inner}"),
            )
        }
    })?;
    text.end().map_err(|error| {
        bad_request(
            StatusCode::BAD_REQUEST,
            format!("the body is more than one JSON value: {error}"),
        )
    })?;
    Ok(value)
}

/// The field that a message of serde is about, if it quotes one ("missing field `name`"); else the body itself.
fn named_in(message: &str) -> String {
    message.split('`').nth(1).unwrap_or("body").to_owned()
}

/// The field that a message about a query is about, quoted as by serde or put before a colon ("way: unknown ..."), and what
/// there is to say about it.
fn in_query(message: &str) -> (String, String) {
    let text = message
        .rsplit_once("query string: ")
        .map_or(message, |(_, text)| text);
    let (field, what) = match text.split_once(": ") {
        Some((field, what)) if field.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') => {
            (field.to_owned(), what)
        }
        _ => (named_in(text), text),
    };
    (field, in_words(what))
}

/// What a message of serde says, in the words of people who know of no variants.
fn in_words(message: &str) -> String {
    message
        .replace("unknown variant", "there is no value")
        .replace("unknown field", "there is no option")
        .replace("provided string was not", "it is not")
        .replace("missing field", "missing option")
        .replace('`', "\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_query_is_told_in_words() {
        for (text, field, what) in [
            (
                "Failed to deserialize query string: way: unknown variant `odd`, expected `up` or `down`",
                "way",
                "there is no value \"odd\", expected \"up\" or \"down\"",
            ),
            (
                "Failed to deserialize query string: dry_run: provided string was not `true` or `false`",
                "dry_run",
                "it is not \"true\" or \"false\"",
            ),
            (
                "Failed to deserialize query string: rate_bytes_per_s: invalid digit found in string",
                "rate_bytes_per_s",
                "invalid digit found in string",
            ),
            (
                "Failed to deserialize query string: missing field `from`",
                "from",
                "missing option \"from\"",
            ),
            (
                "Failed to deserialize query string: odd: unknown field `odd`, expected `volume`",
                "odd",
                "there is no option \"odd\", expected \"volume\"",
            ),
        ] {
            assert_eq!(in_query(text), (field.into(), what.into()));
        }
    }
}

//! Requests of control clients to the real router over a real store.
//!
//! Input: requests, separated by empty lines; the first line of each is its method and target, the rest its body. `$D` stands
//! for the folder in which all lies.
//!
//! What must hold: every request has an answer, errors as JSON; none is a fault of the daemon itself (500); the check finds
//! nothing wrong afterwards.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use axum::body::Body;
use http_body_util::BodyExt;
use hyper::body::Bytes;
use hyper::service::Service;
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::service::TowerToHyperService;
use stratablk::control::commands::Commands;
use stratablk::control::gate::Gate;
use stratablk::control::routes;
use stratablk::control::types::ErrorBody;
use stratablk_layers::check::{CheckOptions, check};
use stratablk_layers::file::Media;
use stratablk_layers::file::host::{HostMedia, HostOptions};
use stratablk_layers::store::Store;
use tokio::runtime::{Builder, Runtime};

use crate::store::{Template, options};

/// Requests of an input, at most.
const REQUESTS_MAX: usize = 12;

thread_local! {
    /// The store, made by the first input, and what runs the router.
    static TEMPLATE: RefCell<Option<(Template, Runtime)>> = const { RefCell::new(None) };
}

/// A request.
type Asked = (Method, Uri, Vec<u8>);

/// Takes a request apart. `None` if a server would not get to see it, or it could touch what is not ours.
fn parse(text: &[u8], dir: &str) -> Option<Asked> {
    let (line, body) = match text.iter().position(|byte| *byte == b'\n') {
        Some(end) => (text.get(..end)?, text.get(end + 1..)?),
        None => (text, &[][..]),
    };
    let line = std::str::from_utf8(line).ok()?;
    let (method, target) = line.split_once(' ')?;
    let mut replaced = Vec::with_capacity(body.len());
    let mut rest = body;
    while let Some((byte, after)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(b"$D") {
            replaced.extend_from_slice(dir.as_bytes());
            rest = after;
        } else {
            replaced.push(*byte);
            rest = after;
        }
    }
    if let Ok(value) = serde_json::from_slice(&replaced)
        && !is_harmless(&value, dir)
    {
        return None;
    }
    Some((method.parse().ok()?, target.parse().ok()?, replaced))
}

/// Whether all paths lie in our folder.
fn is_harmless(value: &serde_json::Value, dir: &str) -> bool {
    use serde_json::Value as V;
    match value {
        V::String(text) => {
            let inside = text
                .strip_prefix(dir)
                .is_some_and(|rest| rest.starts_with('/') && !rest.contains(".."));
            inside || !text.contains('/')
        }
        V::Array(values) => values.iter().all(|value| is_harmless(value, dir)),
        V::Object(fields) => fields.values().all(|value| is_harmless(value, dir)),
        _ => true,
    }
}

/// The requests of an input.
fn requests(mut bytes: &[u8], dir: &str) -> Vec<Asked> {
    let mut found = Vec::new();
    while !bytes.is_empty() && found.len() < REQUESTS_MAX {
        let end = bytes.windows(2).position(|pair| pair == b"\n\n");
        let (text, rest) = match end {
            Some(end) => (bytes.get(..end), bytes.get(end + 2..)),
            None => (Some(bytes), None),
        };
        found.extend(text.and_then(|text| parse(text, dir)));
        bytes = rest.unwrap_or_default();
    }
    found
}

/// One input.
///
/// # Panics
/// If something does not hold that must.
pub fn run(bytes: &[u8]) {
    TEMPLATE.with_borrow_mut(|template| {
        let (template, runtime) = template.get_or_insert_with(|| {
            let runtime = Builder::new_current_thread().enable_time().build();
            (Template::new("control", false), runtime.expect("a runtime"))
        });
        let dir = template.path().to_str().expect("a plain name").to_owned();
        let asked = requests(bytes, &dir);
        if asked.is_empty() {
            return;
        }
        template.restore();
        let store = Store::open(&template.store(), options()).expect("a sound store");
        let commands = Arc::new(Commands::new(store, template.store(), 1));
        let work = Arc::clone(&commands);
        let jobs = thread::spawn(move || work.run_jobs());
        let router =
            TowerToHyperService::new(routes::router(Arc::new(Gate::new(Arc::clone(&commands)))));
        for (method, uri, body) in asked {
            let what = format!("{method} {uri} {}", String::from_utf8_lossy(&body));
            let mut request = Request::new(Body::from(body));
            *request.method_mut() = method.clone();
            *request.uri_mut() = uri.clone();
            runtime.block_on(async {
                let reply = router
                    .call(request)
                    .await
                    .unwrap_or_else(|never| match never {});
                let status = reply.status();
                if status.is_success() && uri.path() == "/v1/events" {
                    // Goes on for ever.
                    return;
                }
                let body = reply
                    .into_body()
                    .collect()
                    .await
                    .expect("a whole reply")
                    .to_bytes();
                judge(&what, &method, status, &body);
            });
        }
        drop(router);
        commands.close().expect("all is durable");
        jobs.join().expect("the jobs end");
        drop(commands);
        assert_sound(&template.store());
    });
}

/// Judges a reply.
fn judge(what: &str, method: &Method, status: StatusCode, body: &Bytes) {
    let text = String::from_utf8_lossy(body);
    assert!(
        status != StatusCode::INTERNAL_SERVER_ERROR,
        "{what}: {status} {text}"
    );
    assert!(
        !status.is_redirection() && !status.is_informational(),
        "{what}: {status}"
    );
    if !status.is_success() && *method != Method::HEAD {
        let error: Result<ErrorBody, _> = serde_json::from_slice(body);
        let error = error.unwrap_or_else(|error| panic!("{what}: {status} {text}: {error}"));
        assert!(!error.error.message.is_empty(), "{what}: {status}");
    }
}

/// Checks the store.
fn assert_sound(dir: &Path) {
    let media = HostMedia::new(dir.to_owned(), HostOptions { io_uring: false }).expect("a folder");
    let media: Arc<dyn Media> = Arc::new(media);
    let report = check(dir, &media, CheckOptions::default()).expect("a store");
    assert!(report.is_sound(), "{:?}", report.findings);
}

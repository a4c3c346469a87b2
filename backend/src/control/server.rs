//! Accepts connections on the control socket and serves HTTP/1.1 on each, within limits on everything a client decides.

use std::io::ErrorKind;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use super::crowd::{Crowd, ReplyBody, RequestBody, Standing};
use super::spare::Spare;
use super::stall::StallLimit;

/// Connections at once.
pub const CONNECTIONS_MAX: usize = 256;
/// Bytes of the head of a request.
pub const HEAD_BYTES_MAX: usize = 64 << 10;
/// Header lines of a request.
const HEADERS_MAX: usize = 64;
/// How long a client may take to send the head of its next request, or keep a connection idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client may leave a reply unread.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long replies under way may take once the daemon is about to exit.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);
/// The wait after a failed accept (no file descriptors left), so that it does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The reply to a connection too many.
const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n\
    Content-Length: 98\r\n\r\n\
    {\"error\":{\"kind\":\"unavailable\",\"field\":null,\"message\":\"too many control connections; close some\"}}";

/// Serves until `stop` turns true, then lets replies under way end.
///
/// Where there is no place or no descriptor for a newcomer, the connection whose client is waited for longest is closed. If
/// requests of all of them are worked on, a newcomer is refused (places), or waits for one of them (descriptors).
pub async fn serve(
    listener: UnixListener,
    mut spare: Spare,
    router: Router,
    mut stop: watch::Receiver<bool>,
) {
    let mut crowd = Crowd::default();
    // Whether the host has refused a descriptor, and not given back what was spared since: told once.
    let mut out_of_descriptors = false;
    loop {
        let accepted = tokio::select! {
            () = told(&mut stop) => break,
            Some(()) = crowd.one_ended() => {
                spare.refill();
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                // Not before: what was given away is for this one.
                out_of_descriptors &= !spare.refill();
                if crowd.len() < CONNECTIONS_MAX || crowd.make_way() {
                    let standing = Arc::new(Standing::new());
                    let (router, stop) = (router.clone(), stop.clone());
                    let served = connection(stream, router, stop, Arc::clone(&standing));
                    crowd.admit(standing, served);
                } else {
                    // Fits into the socket's buffer, or the client does without.
                    drop(stream.try_write(TOO_MANY));
                }
            }
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) => {
                let no_descriptor = matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::MFILE | Errno::NFILE)
                );
                if !no_descriptor || !out_of_descriptors {
                    tracing::warn!("the control socket cannot accept: {error}");
                }
                out_of_descriptors = no_descriptor;
                // The host says so before it looks whether anybody waits.
                if no_descriptor && newcomer_waits(&listener) {
                    if spare.give() {
                        continue;
                    }
                    crowd.make_way();
                }
                tokio::select! {
                    () = told(&mut stop) => break,
                    Some(()) = crowd.one_ended() => {}
                    () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                }
            }
        }
    }
    drop(listener);
    if tokio::time::timeout(GOODBYE_TIMEOUT, crowd.all_ended())
        .await
        .is_err()
    {
        tracing::debug!("control connections cut off");
    }
}

/// Whether somebody waits to be accepted.
fn newcomer_waits(listener: &UnixListener) -> bool {
    let mut entries = [PollFd::new(listener, PollFlags::IN)];
    // Whoever cannot be asked for counts as there: then somebody makes way in vain.
    poll(&mut entries, Some(&Timespec::default())).map_or(true, |ready| ready > 0)
}

/// Waits until it is time to stop, or until nobody is left to say so.
async fn told(stop: &mut watch::Receiver<bool>) {
    // The guard that comes back must not be held across a wait.
    drop(stop.wait_for(|stop| *stop).await);
}

/// Serves one connection to its end.
async fn connection(
    stream: UnixStream,
    router: Router,
    mut stop: watch::Receiver<bool>,
    standing: Arc<Standing>,
) {
    let io = TokioIo::new(StallLimit::new(
        stream,
        STALL_TIMEOUT,
        Arc::clone(&standing),
    ));
    let service = service_fn(|request: Request<Incoming>| {
        let ours = Arc::clone(&standing);
        let request = request.map(|body| RequestBody::new(body, Arc::clone(&standing)));
        let reply = TowerToHyperService::new(router.clone()).call(request);
        async move {
            let reply = reply.await;
            reply.map(|reply| reply.map(|body| ReplyBody::new(body, ours)))
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(HEAD_BYTES_MAX)
            .max_header_size(HEAD_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .serve_connection(io, service)
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = told(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // The client's doing: it left in mid-request, or sent what is not HTTP.
        tracing::debug!("control connection: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::TOO_MANY;

    #[test]
    fn the_refusal_tells_its_length() {
        let text = String::from_utf8_lossy(TOO_MANY);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_default();
        assert!(
            head.contains(&format!("Content-Length: {}", body.len())),
            "{}",
            body.len()
        );
        assert!(serde_json::from_str::<crate::control::types::ErrorBody>(body).is_ok());
    }
}

//! The command line's side of the control socket: one request on one connection.

use std::io;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::control::socket;
use crate::control::types::{ErrorBody, ErrorDetail, ErrorKind};

/// Bytes of a reply. Far above that of a store with a hundred thousand snapshots.
const REPLY_BYTES_MAX: usize = 256 << 20;

/// Why a request has no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error(
        "no daemon at {path} ({source}); start one with `stratablk serve --store DIR`, or say where it is with --control"
    )]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The host refused the connection for another reason.
    #[error("control socket {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("control socket {path}: {what}; whether the command was carried out is not known")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What happened.
        what: String,
    },
    /// The daemon refused or failed.
    #[error("{}", .0.message)]
    Refused(ErrorDetail),
}

/// A daemon's control socket.
#[derive(Debug)]
pub struct Client {
    /// Where it is.
    path: PathBuf,
}

impl Client {
    /// A client of the daemon at this socket; connects at each request.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Sends a request and returns the body of the reply.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn call(
        &self,
        method: Method,
        target: &str,
        body: Option<&Value>,
    ) -> Result<Value, ClientError> {
        let (stream, runtime) = self.connect()?;
        let (status, bytes) = runtime
            .block_on(async {
                let reply = exchange(stream, method, target, body).await?;
                let status = reply.status();
                Ok((status, whole(reply.into_body()).await?))
            })
            .map_err(|error: Fault| self.broken(error))?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| {
            self.broken(format!(
                "status {status} with a body that is not JSON ({error})"
            ))
        })?;
        if status.is_success() {
            return Ok(value);
        }
        Err(refused(status, value))
    }

    /// Asks for something long and hands the body of the reply on, piece by piece, as it comes. The inner result is that of
    /// `sink`, which ends it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn stream(
        &self,
        target: &str,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<io::Result<()>, ClientError> {
        let (stream, runtime) = self.connect()?;
        let streamed = runtime.block_on(async {
            let reply = exchange(stream, Method::GET, target, None).await?;
            let status = reply.status();
            let mut body = reply.into_body();
            if !status.is_success() {
                return Ok(Err((status, whole(body).await?)));
            }
            while let Some(frame) = body.frame().await {
                if let Ok(data) = frame?.into_data()
                    && let Err(error) = sink(&data)
                {
                    return Ok(Ok(Err(error)));
                }
            }
            Ok(Ok(Ok(())))
        });
        match streamed.map_err(|error: Fault| self.broken(error))? {
            Ok(done) => Ok(done),
            Err((status, bytes)) => Err(refused(
                status,
                serde_json::from_slice(&bytes).unwrap_or(Value::Null),
            )),
        }
    }

    /// A connection, and what waits for it.
    fn connect(
        &self,
    ) -> Result<(std::os::unix::net::UnixStream, tokio::runtime::Runtime), ClientError> {
        let stream = socket::connect(&self.path).map_err(|source| {
            let path = self.path.clone();
            match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NoDaemon { path, source }
                }
                _ => ClientError::Connect { path, source },
            }
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| self.broken(error))?;
        Ok((stream, runtime))
    }

    /// The conversation broke off.
    fn broken(&self, what: impl ToString) -> ClientError {
        ClientError::Broken {
            path: self.path.clone(),
            what: what.to_string(),
        }
    }
}

/// Whatever goes wrong on a connection.
type Fault = Box<dyn std::error::Error + Send + Sync>;

/// What a daemon said that refused.
fn refused(status: StatusCode, value: Value) -> ClientError {
    ClientError::Refused(match serde_json::from_value::<ErrorBody>(value) {
        Ok(body) => body.error,
        Err(_) => ErrorDetail {
            kind: ErrorKind::Internal,
            field: None,
            message: format!("the daemon answered with status {status}"),
        },
    })
}

/// Sends one request on a new connection and waits for the head of its reply.
async fn exchange(
    stream: std::os::unix::net::UnixStream,
    method: Method,
    target: &str,
    body: Option<&Value>,
) -> Result<Response<Incoming>, Fault> {
    stream.set_nonblocking(true)?;
    let io = TokioIo::new(UnixStream::from_std(stream)?);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    // Ends with the connection; its fault also shows at the sender.
    tokio::spawn(connection);
    let body = body.map_or_else(Bytes::new, |value| value.to_string().into());
    let request = Request::builder()
        .method(method)
        .uri(target)
        .header(header::HOST, "localhost")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))?;
    Ok(sender.send_request(request).await?)
}

/// The whole body of a reply.
async fn whole(body: Incoming) -> Result<Bytes, Fault> {
    let body = Limited::new(body, REPLY_BYTES_MAX);
    Ok(body.collect().await?.to_bytes())
}

/// A name as one segment of a path or the value of a query.
pub fn encoded(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::encoded;

    #[test]
    fn names_are_one_segment() {
        assert_eq!(encoded("web-1.a_b"), "web-1.a_b");
        assert_eq!(encoded("a/b?c d\u{e9}"), "a%2Fb%3Fc%20d%C3%A9");
    }
}

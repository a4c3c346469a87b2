//! The control socket as any HTTP client sees it: raw requests against the real server on an empty store.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod http;
mod jobs;
mod snapshots;
mod status;
mod volumes;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};
use stratablk::control::commands::Commands;
use stratablk::control::gate::Gate;
use stratablk::control::socket::ControlSocket;
use stratablk::control::spare::Spare;
use stratablk::control::{routes, server::serve};
use stratablk_layers::store::{Store, StoreOptions};
use tempfile::TempDir;
use tokio::sync::watch;

/// How long a reply may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// A server on an empty store.
struct Server {
    /// Its control socket.
    path: PathBuf,
    /// Ends it.
    stop: watch::Sender<bool>,
    /// Its threads: the one that serves, and the one that carries out jobs.
    threads: Vec<JoinHandle<()>>,
    /// The store behind it.
    commands: Arc<Commands>,
    /// The way to it.
    gate: Arc<Gate>,
    /// Everything lies in here.
    dir: TempDir,
}

impl Server {
    /// Starts it.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store_dir = dir.path().join("store");
        let store = Store::open(&store_dir, StoreOptions::default()).unwrap();
        let path = dir.path().join("control.sock");
        let (socket, listener) = ControlSocket::bind(&path, None).unwrap();
        let (stop, stopped) = watch::channel(false);
        let commands = Arc::new(Commands::new(store, store_dir, 1));
        let work = Arc::clone(&commands);
        let jobs = thread::spawn(move || work.run_jobs());
        let gate = Arc::new(Gate::new(Arc::clone(&commands)));
        let way = Arc::clone(&gate);
        let serve = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                listener.set_nonblocking(true).unwrap();
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                let router = routes::router(way);
                serve(listener, Spare::new(), router, stopped).await;
            });
            drop(socket);
        });
        Self {
            path,
            stop,
            threads: vec![serve, jobs],
            commands,
            gate,
            dir,
        }
    }

    /// A new connection.
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    /// Sends bytes and returns the status, the head and the body of the reply.
    fn send(&self, request: &[u8]) -> (u16, String, String) {
        let mut stream = self.connect();
        // The server may refuse before it has read all.
        let _ = stream.write_all(request);
        reply(stream)
    }

    /// Sends a request with a body and returns the status and the JSON of the reply.
    fn ask(&self, method: &str, target: &str, body: &str) -> (u16, Value) {
        let length = body.len();
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        );
        let (status, head, body) = self.send(format!("{head}{body}").as_bytes());
        let json = serde_json::from_str(&body);
        (
            status,
            json.unwrap_or_else(|error| panic!("{error}: {head}\n\n{body}")),
        )
    }

    /// Waits until no job is under way, and none is about to be.
    #[track_caller]
    fn idle(&self) {
        let deadline = std::time::Instant::now() + DEADLINE;
        loop {
            let (_, list) = self.ask("GET", "/v1/jobs", "");
            let jobs = list["jobs"].as_array().unwrap();
            let at_work = |job: &Value| job["state"] == "queued" || job["state"] == "running";
            let (_, tree) = self.ask("GET", "/v1/tree", "");
            let layers = tree["layers"].as_array().unwrap();
            let unnamed = |layer: &Value| layer["kind"] == "unnamed";
            if !jobs.iter().any(at_work) && !layers.iter().any(unnamed) {
                return;
            }
            assert!(std::time::Instant::now() < deadline, "{list}");
        }
    }

    /// Sends a request that must be refused with this status, for this field, and change nothing. Returns the message.
    #[track_caller]
    fn refused(&self, request: (&str, &str, &str), status: u16, field: Option<&str>) -> String {
        let before = self.ask("GET", "/v1/volumes", "");
        let (got, body) = self.ask(request.0, request.1, request.2);
        assert_eq!(got, status, "{request:?}: {body}");
        assert_eq!(body["error"]["field"], json!(field), "{request:?}: {body}");
        assert_eq!(self.ask("GET", "/v1/volumes", ""), before, "{request:?}");
        body["error"]["message"].as_str().unwrap().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        let closed = self.commands.close();
        assert!(closed.is_ok() || thread::panicking(), "{closed:?}");
        for ended in self.threads.drain(..) {
            assert!(ended.join().is_ok() || thread::panicking());
        }
    }
}

/// Reads a reply to the end of its connection.
fn reply(mut stream: UnixStream) -> (u16, String, String) {
    let mut bytes = Vec::new();
    // A connection that is reset after its reply has still delivered it.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no head: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_owned(), body.to_owned())
}

/// Reads server-sent events until one of this name comes, and returns its data. Others are passed over.
fn event(lines: &mut impl Iterator<Item = String>, name: &str) -> Value {
    let wanted = format!("event: {name}");
    lines.find(|line| *line == wanted).unwrap();
    let data = lines.find(|line| line.starts_with("data: ")).unwrap();
    serde_json::from_str(&data["data: ".len()..]).unwrap()
}

/// The lines of a new event stream.
fn events(s: &Server) -> impl Iterator<Item = String> {
    let mut stream = s.connect();
    stream
        .write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stream)).map(Result::unwrap);
    // Whatever happens after the head of the reply is heard.
    lines.find(String::is_empty).unwrap();
    lines
}

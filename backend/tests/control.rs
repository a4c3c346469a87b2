//! The control socket as any HTTP client sees it: raw requests against the real server on an empty store.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};
use stratablk::control::commands::Commands;
use stratablk::control::gate::Gate;
use stratablk::control::socket::ControlSocket;
use stratablk::control::{routes, server};
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
        let gate = Gate::new(Arc::clone(&commands));
        let serve = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                listener.set_nonblocking(true).unwrap();
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                server::serve(listener, routes::router(Arc::new(gate)), stopped).await;
            });
            drop(socket);
        });
        Self {
            path,
            stop,
            threads: vec![serve, jobs],
            commands,
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

#[test]
fn a_volume_by_hand() {
    let s = Server::new();
    let (status, volume) = s.ask(
        "POST",
        "/v1/volumes",
        r#"{"name":"web","size_bytes":1048576}"#,
    );
    assert_eq!((status, &volume["name"]), (201, &json!("web")), "{volume}");
    let (status, shown) = s.ask("GET", "/v1/volumes/web", "");
    assert_eq!((status, &shown), (200, &volume));
    let (status, report) = s.ask("POST", "/v1/snapshots", r#"{"name":"s1","all":true}"#);
    assert_eq!(status, 201, "{report}");
    let (_, list) = s.ask("GET", "/v1/snapshots?volume=web", "");
    assert_eq!(list["snapshots"], report["snapshots"]);
    let from = r#"{"name":"copy","from":{"volume":"web","snapshot":"s1"}}"#;
    assert_eq!(s.ask("POST", "/v1/volumes", from).0, 201);
    let (_, tree) = s.ask("GET", "/v1/tree", "");
    assert_eq!(tree["layers"].as_array().unwrap().len(), 3);
    let socket = s.dir.path().join("web.sock");
    let attach = json!({ "socket": socket }).to_string();
    let (status, volume) = s.ask("PUT", "/v1/volumes/web/attachment", &attach);
    assert_eq!(
        (status, &volume["attachment"]["queues"]),
        (200, &json!(8)),
        "{volume}"
    );
    assert_eq!(s.ask("DELETE", "/v1/volumes/web/attachment", "").0, 200);
    assert_eq!(s.ask("DELETE", "/v1/volumes/web", "").0, 200);
    assert_eq!(s.ask("GET", "/v1/volumes/web", "").0, 404);
    let (_, status) = s.ask("GET", "/v1/status", "");
    assert_eq!(
        (&status["volumes"], &status["pid"]),
        (&json!(1), &json!(std::process::id()))
    );
}

#[test]
fn a_bad_body_is_refused_by_the_name_of_its_field() {
    let s = Server::new();
    let volumes = |body| ("POST", "/v1/volumes", body);
    s.refused(
        volumes(r#"{"name":"w","size_byte":512}"#),
        422,
        Some("size_byte"),
    );
    s.refused(volumes(r#"{"size_bytes":512}"#), 422, Some("name"));
    s.refused(
        volumes(r#"{"name":"w","size_bytes":"10G"}"#),
        422,
        Some("size_bytes"),
    );
    s.refused(
        volumes(r#"{"name":"w","size_bytes":-1}"#),
        422,
        Some("size_bytes"),
    );
    s.refused(
        volumes(r#"{"name":"w","size_bytes":100}"#),
        422,
        Some("size_bytes"),
    );
    s.refused(volumes(r#"{"name":"w"}"#), 422, Some("size_bytes"));
    s.refused(
        volumes(r#"{"name":"w","size_bytes":512,"base":"/x"}"#),
        422,
        Some("size_bytes"),
    );
    s.refused(
        volumes(r#"{"name":"w","base":"relative"}"#),
        422,
        Some("base"),
    );
    s.refused(
        volumes(r#"{"name":"w","from":{"snapshot":"v"}}"#),
        422,
        Some("from"),
    );
    s.refused(
        volumes(r#"{"name":"w","from":{"volume":"v"}}"#),
        404,
        Some("volume"),
    );
    s.refused(
        volumes(r#"{"name":"w","size_bytes":512,"type":"fast"}"#),
        422,
        Some("type"),
    );
    s.refused(
        volumes(r#"{"name":"a/b","size_bytes":512}"#),
        422,
        Some("name"),
    );
    s.refused(volumes("[]"), 422, Some("body"));
    s.refused(volumes(""), 400, None);
    s.refused(volumes("{"), 400, None);
    s.refused(volumes(r#"{"name":"w","size_bytes":512} {}"#), 400, None);

    let snapshots = |body| ("POST", "/v1/snapshots", body);
    s.refused(snapshots(r#"{"name":"s"}"#), 422, Some("volumes"));
    s.refused(
        snapshots(r#"{"name":"s","all":true,"volumes":["w"]}"#),
        422,
        Some("all"),
    );
    s.refused(
        snapshots(r#"{"name":"s","volumes":["w"]}"#),
        404,
        Some("volume"),
    );

    s.ask("POST", "/v1/volumes", r#"{"name":"w","size_bytes":512}"#);
    let attach = |body| ("PUT", "/v1/volumes/w/attachment", body);
    s.refused(attach(r#"{"socket":"relative"}"#), 422, Some("socket"));
    s.refused(attach(r#"{"socket":"/a\u0000b"}"#), 422, Some("socket"));
    s.refused(attach(r#"{"socket":"/s","queues":0}"#), 422, Some("queues"));
    s.refused(
        attach(r#"{"socket":"/s","queues":65}"#),
        422,
        Some("queues"),
    );
    s.refused(
        attach(r#"{"socket":"/s","queues":70000}"#),
        422,
        Some("queues"),
    );
    s.refused(
        attach(r#"{"socket":"/s","readonly":true}"#),
        422,
        Some("readonly"),
    );
}

#[test]
fn what_no_route_has_is_refused_in_json() {
    let s = Server::new();
    s.refused(("GET", "/", ""), 404, None);
    s.refused(("GET", "/v1/nothing", ""), 404, None);
    s.refused(("GET", "/v2/volumes", ""), 404, None);
    s.refused(("PATCH", "/v1/volumes", ""), 405, None);
    s.refused(
        ("DELETE", "/v1/volumes/nobody/attachment", ""),
        404,
        Some("volume"),
    );
    s.refused(("GET", "/v1/tree?volume=nobody", ""), 404, Some("volume"));
    s.refused(("GET", "/v1/tree?volumes=w", ""), 422, Some("volumes"));
    s.refused(("GET", "/v1/volumes/..", ""), 404, Some("volume"));
    s.refused(("GET", "/v1/volumes/%ff", ""), 400, Some("name"));
}

#[test]
fn sizes_are_bounded() {
    let s = Server::new();
    let large = format!(r#"{{"name":"{}"}}"#, "n".repeat(routes::BODY_BYTES_MAX));
    let (status, _, body) = s.send(
        format!(
            "POST /v1/volumes HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{large}",
            large.len()
        )
        .as_bytes(),
    );
    assert_eq!(status, 413, "{body}");

    let header = format!(
        "GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
        "x".repeat(server::HEAD_BYTES_MAX)
    );
    assert_eq!(s.send(header.as_bytes()).0, 431);
    let headers = format!(
        "GET / HTTP/1.1\r\nHost: x\r\n{}\r\n",
        "X: y\r\n".repeat(200)
    );
    assert_eq!(s.send(headers.as_bytes()).0, 431);
    assert_eq!(s.send(b"\x16\x03\x01 not HTTP at all\r\n\r\n").0, 400);
    assert_eq!(s.ask("GET", "/v1/volumes", "").0, 200);
}

#[test]
fn connections_are_bounded_and_given_back() {
    let s = Server::new();
    let held: Vec<UnixStream> = (0..server::CONNECTIONS_MAX).map(|_| s.connect()).collect();
    // The server accepts in order, so this one comes when all others have been.
    let (status, _, body) = reply(s.connect());
    assert_eq!(status, 503, "{body}");
    assert!(serde_json::from_str::<Value>(&body).is_ok(), "{body}");
    for stream in &held {
        stream.shutdown(Shutdown::Write).unwrap();
    }
    for mut stream in held {
        let _ = stream.read_to_end(&mut Vec::new());
    }
    // The last of them may still be on its way out.
    let deadline = std::time::Instant::now() + DEADLINE;
    while s
        .send(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .0
        != 200
    {
        assert!(std::time::Instant::now() < deadline);
    }
}

#[test]
fn a_connection_serves_many_requests_and_survives_a_bad_one() {
    let s = Server::new();
    let mut stream = s.connect();
    let bad = "POST /v1/volumes HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}";
    let good = "GET /v1/volumes HTTP/1.1\r\nHost: x\r\n\r\n";
    let last = "GET /v1/volumes HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream
        .write_all(format!("{good}{bad}{last}").as_bytes())
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let codes: Vec<_> = text
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|reply| &reply[..3])
        .collect();
    assert_eq!(codes, ["200", "422", "200"], "{text}");
}

#[test]
fn stats_tell_of_the_cache_and_of_each_volume() {
    let s = Server::new();
    s.ask("POST", "/v1/volumes", r#"{"name":"web","size_bytes":512}"#);
    s.ask("POST", "/v1/volumes", r#"{"name":"db","size_bytes":512}"#);
    let socket = s.dir.path().join("web.sock");
    let attach = json!({ "socket": socket }).to_string();
    s.ask("PUT", "/v1/volumes/web/attachment", &attach);
    let (status, stats) = s.ask("GET", "/v1/stats", "");
    assert_eq!(status, 200, "{stats}");
    let cache = json!({
        "size_bytes": 256 << 20, "used_bytes": 0, "dirty_bytes": 0, "hits": 0, "misses": 0, "fills": 0, "bypasses": 0,
        "writes": 0, "write_backs": 0, "evictions": 0, "retries": 0, "parks": 0,
    });
    assert_eq!(stats["cache"], cache);
    let requests = json!({
        "reads": 0, "writes": 0, "flushes": 0, "discards": 0, "read_bytes": 0, "written_bytes": 0, "errors": 0,
    });
    let volumes = json!([
        { "name": "db", "state": null, "requests": null },
        { "name": "web", "state": "listening", "requests": requests },
    ]);
    assert_eq!(stats["volumes"], volumes);
}

#[test]
fn metrics_are_what_prometheus_reads() {
    let s = Server::new();
    s.ask("POST", "/v1/volumes", r#"{"name":"web","size_bytes":512}"#);
    let (status, head, body) =
        s.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!(status, 200);
    assert!(
        head.to_ascii_lowercase()
            .contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(
        body.contains("stratablk_volume_size_bytes{volume=\"web\"} 512\n"),
        "{body}"
    );
    assert!(body.contains("stratablk_cache_bytes 268435456\n"), "{body}");
}

#[test]
fn the_description_has_exactly_the_routes() {
    let s = Server::new();
    let (_, description) = s.ask("GET", "/v1/openapi.json", "");
    let paths = description["paths"].as_object().unwrap();
    let mut described: Vec<String> = Vec::new();
    for (path, methods) in paths {
        described.extend(
            methods
                .as_object()
                .unwrap()
                .keys()
                .map(|m| format!("{m} {path}")),
        );
    }
    described.sort();
    let mut expected = [
        "delete /v1/volumes/{name}",
        "delete /v1/volumes/{name}/attachment",
        "get /metrics",
        "delete /v1/snapshots/{volume}/{snapshot}",
        "get /v1/diff",
        "get /v1/events",
        "get /v1/jobs",
        "get /v1/jobs/{id}",
        "get /v1/usage",
        "patch /v1/jobs/{id}",
        "patch /v1/volumes/{name}",
        "post /v1/imports",
        "post /v1/jobs/{id}/cancel",
        "post /v1/jobs/{id}/pause",
        "post /v1/jobs/{id}/resume",
        "post /v1/volumes/{name}/flatten",
        "post /v1/volumes/{name}/restore",
        "get /v1/openapi.json",
        "get /v1/snapshots",
        "get /v1/stats",
        "get /v1/status",
        "get /v1/tree",
        "get /v1/volumes",
        "get /v1/volumes/{name}",
        "post /v1/snapshots",
        "post /v1/volumes",
        "put /v1/volumes/{name}/attachment",
    ];
    expected.sort_unstable();
    assert_eq!(described, expected);
    for route in described {
        let (method, path) = route.split_once(' ').unwrap();
        let method = method.to_ascii_uppercase();
        let request = format!(
            "{method} {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            path.replace("{name}", "nobody").replace("{id}", "1")
        );
        let mut stream = s.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        let status = &head[9..];
        assert_ne!(status, b"405", "{route}");
        assert!(status != b"404" || path.contains('{'), "{route}");
    }
    // A type that only the event stream uses.
    assert!(description["components"]["schemas"]["Event"].is_object());
}

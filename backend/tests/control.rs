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

/// A path at which there can be no socket is the client's fault, and not one of the daemon. (Found by the fuzzer.)
#[test]
fn a_socket_where_none_can_be_is_refused() {
    let s = Server::new();
    s.ask("POST", "/v1/volumes", r#"{"name":"w","size_bytes":4096}"#);
    let dir = s.dir.path().display();
    for path in [
        format!("{dir}/none/w.sock"),
        format!("{dir}/store/catalog.db/w.sock"),
    ] {
        let body = json!({ "socket": path }).to_string();
        let request = ("PUT", "/v1/volumes/w/attachment", body.as_str());
        let message = s.refused(request, 422, Some("socket"));
        assert!(message.contains(&path), "{message}");
    }
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

#[test]
fn restoring_by_hand() {
    let s = Server::new();
    for volume in ["web", "db"] {
        let body = json!({ "name": volume, "size_bytes": 1 << 20 }).to_string();
        assert_eq!(s.ask("POST", "/v1/volumes", &body).0, 201);
    }
    let both = r#"{"name":"s1","volumes":["web","db"]}"#;
    assert_eq!(s.ask("POST", "/v1/snapshots", both).0, 201);
    let mut heard = events(&s);
    let restore = |body| ("POST", "/v1/volumes/web/restore", body);
    let (status, report) = s.ask(
        "POST",
        "/v1/volumes/web/restore",
        r#"{"snapshot":"s1","keep":"s2"}"#,
    );
    assert_eq!(status, 200, "{report}");
    assert_eq!(report["volumes"], json!(["db", "web"]));
    assert_eq!(report["kept"].as_array().unwrap().len(), 2);
    assert!(report["elapsed_ns"].as_u64().unwrap() > 0);
    let told = event(&mut heard, "volumes-restored");
    assert_eq!(told["volumes"], json!(["db", "web"]));
    assert_eq!(
        (&told["snapshot"], &told["kept"]),
        (&json!("s1"), &json!("s2"))
    );

    let (_, report) = s.ask(
        "POST",
        "/v1/volumes/web/restore",
        r#"{"snapshot":"s2","only":true}"#,
    );
    assert_eq!(report["volumes"], json!(["web"]));
    assert_eq!(report["kept"], json!([]));

    s.refused(restore("{}"), 422, Some("snapshot"));
    s.refused(
        restore(r#"{"snapshot":"s1","kept":"x"}"#),
        422,
        Some("kept"),
    );
    s.refused(restore(r#"{"snapshot":"never"}"#), 404, Some("snapshot"));
    s.refused(
        restore(r#"{"snapshot":"s1","keep":"s2"}"#),
        409,
        Some("keep"),
    );
    s.refused(
        restore(r#"{"snapshot":"s1","keep":"a/b"}"#),
        422,
        Some("keep"),
    );
    let nobody = ("POST", "/v1/volumes/nobody/restore", r#"{"snapshot":"s1"}"#);
    s.refused(nobody, 404, Some("volume"));
}

#[test]
fn deleting_a_snapshot_by_hand() {
    let s = Server::new();
    s.ask(
        "POST",
        "/v1/volumes",
        r#"{"name":"web","size_bytes":1048576}"#,
    );
    for name in ["s1", "s2", "s3"] {
        let body = json!({ "name": name, "all": true }).to_string();
        assert_eq!(s.ask("POST", "/v1/snapshots", &body).0, 201);
    }
    let delete = |target| ("DELETE", target, "");
    s.refused(delete("/v1/snapshots/web/never"), 404, Some("snapshot"));
    s.refused(delete("/v1/snapshots/nobody/s1"), 404, Some("volume"));
    s.refused(
        delete("/v1/snapshots/web/s1?dryrun=true"),
        422,
        Some("dryrun"),
    );
    s.refused(
        delete("/v1/snapshots/web/s1?dry_run=perhaps"),
        422,
        Some("dry_run"),
    );
    s.refused(
        delete("/v1/snapshots/web/s1?way=sideways"),
        422,
        Some("way"),
    );
    s.refused(
        delete("/v1/snapshots/web/s1?into_base=true"),
        422,
        Some("into_base"),
    );
    let no_rate = delete("/v1/snapshots/web/s1?rate_bytes_per_s=0");
    s.refused(no_rate, 422, Some("rate_bytes_per_s"));

    let (status, plan) = s.ask("DELETE", "/v1/snapshots/web/s1?dry_run=true", "");
    assert_eq!((status, &plan["dry_run"]), (200, &json!(true)), "{plan}");
    assert_eq!(plan["fate"]["kind"], "joined", "{plan}");
    assert_eq!(plan["fate"]["child_name"], "web@s2");
    assert_eq!(plan["jobs"], json!([]));
    let ways = plan["fate"]["ways"].as_array().unwrap();
    let chosen = ways.iter().filter(|way| way["chosen"] == true).count();
    assert_eq!(chosen, 1, "{plan}");
    let (_, list) = s.ask("GET", "/v1/snapshots?volume=web", "");
    assert_eq!(list["snapshots"].as_array().unwrap().len(), 3, "a dry run");

    let mut heard = events(&s);
    let (status, report) = s.ask("DELETE", "/v1/snapshots/web/s1", "");
    assert_eq!(status, 200, "{report}");
    let told = event(&mut heard, "snapshot-deleted");
    assert_eq!(
        (&told["volume"], &told["snapshot"]),
        (&json!("web"), &json!("s1"))
    );
    let (_, list) = s.ask("GET", "/v1/snapshots?volume=web", "");
    assert_eq!(list["snapshots"].as_array().unwrap().len(), 2);
}

#[test]
fn a_job_is_told_of_until_it_is_done() {
    let s = Server::new();
    s.ask(
        "POST",
        "/v1/volumes",
        r#"{"name":"web","size_bytes":1048576}"#,
    );
    for name in ["s1", "s2"] {
        let body = json!({ "name": name, "all": true }).to_string();
        s.ask("POST", "/v1/snapshots", &body);
    }
    let mut heard = events(&s);
    let (_, report) = s.ask("DELETE", "/v1/snapshots/web/s1", "");
    let job = &report["jobs"][0];
    assert_eq!(
        (&job["kind"], &job["subject"]),
        (&json!("merge"), &json!("web@s1")),
        "{report}"
    );
    let began = event(&mut heard, "job-began");
    assert_eq!(began["job"]["id"], job["id"]);
    let ended = event(&mut heard, "job-ended");
    assert_eq!(
        (&ended["job"]["id"], &ended["job"]["state"]),
        (&job["id"], &json!("done"))
    );

    let target = format!("/v1/jobs/{}", job["id"]);
    let (status, shown) = s.ask("GET", &target, "");
    assert_eq!((status, &shown["state"]), (200, &json!("done")));
    let (_, list) = s.ask("GET", "/v1/jobs", "");
    assert_eq!(list["jobs"], json!([shown]));
    let (_, tree) = s.ask("GET", "/v1/tree", "");
    assert_eq!(
        tree["layers"].as_array().unwrap().len(),
        2,
        "s2 and the active layer"
    );
    let (_, _, metrics) = s.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(
        metrics.contains("stratablk_jobs{state=\"done\"} 1\n"),
        "{metrics}"
    );

    let change = |body| ("PATCH", target.as_str(), body);
    s.refused(change("{}"), 422, Some("rate_bytes_per_s"));
    s.refused(
        change(r#"{"rate_bytes_per_s":0}"#),
        422,
        Some("rate_bytes_per_s"),
    );
    s.refused(change(r#"{"rate":1}"#), 422, Some("rate"));
    for how in ["pause", "cancel", "resume"] {
        let (status, refusal) = s.ask("POST", &format!("{target}/{how}"), "");
        assert_eq!(status, 422, "a job that is done: {how}: {refusal}");
        s.refused(
            ("POST", &format!("/v1/jobs/77/{how}"), ""),
            404,
            Some("job"),
        );
    }
    s.refused(
        ("PATCH", "/v1/jobs/77", r#"{"rate_bytes_per_s":null}"#),
        404,
        Some("job"),
    );
    s.refused(("GET", "/v1/jobs/77", ""), 404, Some("job"));
    s.refused(("GET", "/v1/jobs/first", ""), 422, Some("id"));
}

#[test]
fn types_and_sizes_by_hand() {
    let s = Server::new();
    let (_, volume) = s.ask(
        "POST",
        "/v1/volumes",
        r#"{"name":"web","size_bytes":1048576,"type":"writethrough"}"#,
    );
    assert_eq!(volume["type"], "writethrough", "{volume}");
    let patch = |body| ("PATCH", "/v1/volumes/web", body);
    let message = s.refused(
        (
            "POST",
            "/v1/snapshots",
            r#"{"name":"s1","volumes":["web"]}"#,
        ),
        422,
        Some("volumes"),
    );
    assert!(message.contains("writethrough"), "{message}");
    let mut heard = events(&s);
    let (status, volume) = s.ask("PATCH", "/v1/volumes/web", r#"{"type":"immutable"}"#);
    assert_eq!(
        (status, &volume["type"]),
        (200, &json!("immutable")),
        "{volume}"
    );
    assert_eq!(
        event(&mut heard, "volume-type-changed")["type"],
        "immutable"
    );
    let (_, tree) = s.ask("GET", "/v1/tree", "");
    assert_eq!(tree["layers"][0]["content_of"], json!(["web"]), "{tree}");
    assert_eq!(tree["layers"][0]["kind"], "content");
    assert_eq!(tree["layers"][1]["active_type"], "immutable");
    let (status, volume) = s.ask("PATCH", "/v1/volumes/web", r#"{"type":"normal"}"#);
    assert_eq!(
        (status, &volume["type"]),
        (200, &json!("normal")),
        "{volume}"
    );

    // What it started from is joined with it.
    s.idle();
    let (status, volume) = s.ask("PATCH", "/v1/volumes/web", r#"{"size_bytes":2097152}"#);
    assert_eq!(
        (status, &volume["size_bytes"]),
        (200, &json!(2 << 20)),
        "{volume}"
    );
    assert_eq!(event(&mut heard, "volume-resized")["size_bytes"], 2 << 20);
    s.refused(patch(r#"{"size_bytes":1048576}"#), 422, Some("size_bytes"));
    let (status, _) = s.ask(
        "PATCH",
        "/v1/volumes/web",
        r#"{"size_bytes":1048576,"shrink":true}"#,
    );
    assert_eq!(status, 200);

    s.refused(patch("{}"), 422, Some("type"));
    s.refused(
        patch(r#"{"type":"normal","size_bytes":512}"#),
        422,
        Some("type"),
    );
    s.refused(
        patch(r#"{"type":"normal","force":true}"#),
        422,
        Some("force"),
    );
    s.refused(patch(r#"{"type":"fast"}"#), 422, Some("type"));
    s.refused(patch(r#"{"size_bytes":100}"#), 422, Some("size_bytes"));
    let nobody = ("PATCH", "/v1/volumes/nobody", r#"{"type":"normal"}"#);
    s.refused(nobody, 404, Some("volume"));
}

#[test]
fn attachments_of_a_multiattach_volume_by_hand() {
    let s = Server::new();
    let template = r#"{"name":"template","size_bytes":1048576,"type":"multiattach"}"#;
    assert_eq!(s.ask("POST", "/v1/volumes", template).0, 201);
    let target = "/v1/volumes/template/attachment";
    let attach = |socket: &str, more: Value| {
        let mut body = json!({ "socket": s.dir.path().join(socket) });
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        s.ask("PUT", target, &body.to_string())
    };
    let (status, made) = attach("a.sock", json!({}));
    assert_eq!(status, 200, "{made}");
    let named = (&made["name"], &made["attached_from"]);
    assert_eq!(named, (&json!("template-1"), &json!("template")));
    let again = attach("a.sock", json!({})).1;
    assert_eq!(again["name"], "template-1", "the same again");
    let (_, other) = attach("b.sock", json!({ "as": "vm2" }));
    assert_eq!(other["name"], "vm2");
    let (status, refusal) = attach("b.sock", json!({}));
    assert_eq!(status, 200, "the same again: {refusal}");
    let (status, refusal) = attach("b.sock", json!({ "queues": 1 }));
    assert_eq!(status, 409, "the socket is taken: {refusal}");
    let (_, list) = s.ask("GET", "/v1/volumes", "");
    let names: Vec<_> = list["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| &v["name"])
        .collect();
    assert_eq!(
        names,
        ["template", "template-1", "vm2"],
        "nothing is left of a refusal"
    );

    let keep = |name| format!("/v1/volumes/vm2/attachment?keep_as={name}");
    s.refused(("DELETE", &keep("template"), ""), 409, Some("keep_as"));
    s.refused(("DELETE", &keep("a%2Fb"), ""), 422, Some("keep_as"));
    s.refused(("DELETE", target, ""), 409, None);
    let (status, kept) = s.ask("DELETE", &keep("kept"), "");
    assert_eq!(
        (status, &kept["volume"]["name"]),
        (200, &json!("kept")),
        "{kept}"
    );
    assert_eq!(kept["volume"]["attached_from"], Value::Null);
    let (status, gone) = s.ask("DELETE", "/v1/volumes/template-1/attachment", "");
    assert_eq!((status, &gone["volume"]), (200, &Value::Null), "{gone}");
    assert_eq!(s.ask("GET", "/v1/volumes/template-1", "").0, 404);

    let body = json!({ "socket": s.dir.path().join("c.sock"), "as": "x" }).to_string();
    let normal = ("PUT", "/v1/volumes/kept/attachment", body.as_str());
    s.refused(normal, 422, Some("as"));
    s.ask(
        "PUT",
        "/v1/volumes/kept/attachment",
        &json!({ "socket": s.dir.path().join("c.sock") }).to_string(),
    );
    let normal = ("DELETE", "/v1/volumes/kept/attachment?keep_as=y", "");
    s.refused(normal, 422, Some("keep_as"));
}

#[test]
fn flattening_importing_and_sizes_by_hand() {
    let s = Server::new();
    let image = s.dir.path().join("disk.img");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let body = json!({ "name": "web", "image": image }).to_string();
    let (status, import) = s.ask("POST", "/v1/imports", &body);
    assert_eq!(status, 202, "{import}");
    assert_eq!(import["volume"]["name"], "web");
    assert_eq!(import["job"]["kind"], "import");
    let done = |id: &Value| {
        let deadline = std::time::Instant::now() + DEADLINE;
        loop {
            let (_, job) = s.ask("GET", &format!("/v1/jobs/{id}"), "");
            match job["state"].as_str().unwrap_or_default() {
                "done" => return job,
                "queued" | "running" => assert!(std::time::Instant::now() < deadline, "{job}"),
                _ => panic!("{job}"),
            }
        }
    };
    let job = done(&import["job"]["id"]);
    assert_eq!(job["bytes_done"], 1 << 20, "{job}");
    assert_eq!(s.ask("GET", "/v1/volumes/web", "").1["base"], Value::Null);

    let clone = r#"{"name":"copy","from":{"volume":"web"}}"#;
    let (status, copy) = s.ask("POST", "/v1/volumes", clone);
    assert_eq!((status, &copy["depth"]), (201, &json!(2)), "{copy}");
    let (_, usage) = s.ask("GET", "/v1/usage?volume=copy", "");
    assert_eq!(usage["volumes"].as_array().unwrap().len(), 1);
    assert_eq!(usage["volumes"][0]["shared_bytes"], 1 << 20, "{usage}");
    let (status, job) = s.ask(
        "POST",
        "/v1/volumes/copy/flatten",
        r#"{"rate_bytes_per_s":1073741824}"#,
    );
    assert_eq!((status, &job["kind"]), (202, &json!("flatten")), "{job}");
    done(&job["id"]);
    s.idle();
    let (_, usage) = s.ask("GET", "/v1/usage", "");
    assert_eq!(usage["volumes"][0]["shared_bytes"], 0, "{usage}");
    assert_eq!(s.ask("GET", "/v1/volumes/copy", "").1["depth"], 1);

    let import = |body| ("POST", "/v1/imports", body);
    s.refused(
        import(r#"{"name":"x","image":"relative"}"#),
        422,
        Some("image"),
    );
    s.refused(
        import(r#"{"name":"x","image":"/not/there"}"#),
        422,
        Some("image"),
    );
    s.refused(import(r#"{"name":"x"}"#), 422, Some("image"));
    let rate = r#"{"name":"x","image":"/x","rate_bytes_per_s":0}"#;
    s.refused(import(rate), 422, Some("rate_bytes_per_s"));
    let taken = json!({ "name": "web", "image": image }).to_string();
    s.refused(import(&taken), 409, Some("name"));
    let flatten = |target| ("POST", target, "");
    s.refused(flatten("/v1/volumes/nobody/flatten"), 404, Some("volume"));
    let rates = ("POST", "/v1/volumes/web/flatten", r#"{"rate":5}"#);
    s.refused(rates, 422, Some("rate"));
    s.refused(("GET", "/v1/usage?volume=nobody", ""), 404, Some("volume"));
}

#[test]
fn differences_come_line_by_line() {
    let s = Server::new();
    let image = s.dir.path().join("disk.img");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let body = json!({ "name": "web", "base": image }).to_string();
    s.ask("POST", "/v1/volumes", &body);
    s.ask("POST", "/v1/snapshots", r#"{"name":"s1","all":true}"#);
    let get = |target: &str| {
        let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        s.send(request.as_bytes())
    };
    let (status, head, body) = get("/v1/diff?from=web@s1&to=web");
    assert_eq!(
        (status, body.as_str()),
        (200, "0\r\n\r\n"),
        "nothing was written, so no chunk but the last: {head}"
    );
    assert!(
        head.to_ascii_lowercase()
            .contains("content-type: application/x-ndjson"),
        "{head}"
    );
    s.refused(("GET", "/v1/diff", ""), 422, Some("from"));
    s.refused(("GET", "/v1/diff?from=web@", ""), 422, Some("from"));
    s.refused(("GET", "/v1/diff?from=web@s1&to=@", ""), 422, Some("to"));
    s.refused(
        ("GET", "/v1/diff?from=web@never", ""),
        404,
        Some("snapshot"),
    );
    s.refused(
        ("GET", "/v1/diff?from=web@s1&til=web", ""),
        422,
        Some("til"),
    );
}

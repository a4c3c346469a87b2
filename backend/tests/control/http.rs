//! Requests, bodies and connections as such.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use stratablk::control::{events, gate, routes, server};

use crate::Server;

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
        let body = serde_json::json!({ "socket": path }).to_string();
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

/// What a client may do that keeps its place: nothing, half a head, half a body, a large reply that it does not read, one
/// request that was answered.
const IDLE: [&str; 5] = [
    "",
    "GET /v1/status HTTP/1.1\r\nHos",
    "POST /v1/volumes HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    "GET /v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",
];

#[test]
fn who_keeps_a_place_for_nothing_makes_way() {
    let s = Server::new();
    let mut held: Vec<UnixStream> = Vec::new();
    let asked = std::time::Instant::now();
    for count in 0..server::CONNECTIONS_MAX * 2 {
        let mut stream = s.connect();
        let request = IDLE[count % IDLE.len()];
        // Until no more of it fits: the reply to each of them finds less room in the socket than it needs.
        for _ in 0..if request.contains("openapi") { 16 } else { 1 } {
            stream.write_all(request.as_bytes()).unwrap();
        }
        held.push(stream);
        if count % 64 == 0 {
            assert_eq!(s.ask("GET", "/v1/status", "").0, 200);
        }
    }
    assert_eq!(s.ask("GET", "/v1/volumes", "").0, 200);
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "{:?}",
        asked.elapsed()
    );
    // The first ones were closed, the last ones were not.
    let first = held.first_mut().unwrap();
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
    let last = held.last_mut().unwrap();
    last.set_nonblocking(true).unwrap();
    assert_eq!(
        last.read(&mut [0]).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
}

/// Those whose requests are worked on keep their places: here, the most event streams that there may be.
#[test]
fn who_is_served_keeps_the_place() {
    let s = Server::new();
    let listen = |_| {
        let mut stream = s.connect();
        let request = "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n";
        stream.write_all(request.as_bytes()).unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(&head[9..], b"200");
        stream
    };
    let listeners: Vec<UnixStream> = (0..events::LISTENERS_MAX).map(listen).collect();
    let _crowd: Vec<UnixStream> = (0..server::CONNECTIONS_MAX).map(|_| s.connect()).collect();
    let body = r#"{"name":"told","size_bytes":4096}"#;
    assert_eq!(s.ask("POST", "/v1/volumes", body).0, 201);
    for mut stream in listeners {
        let mut text = String::new();
        while !text.contains("volume-created") {
            let mut bytes = [0; 512];
            let count = stream.read(&mut bytes).unwrap();
            assert!(count > 0, "closed: {text}");
            text += &String::from_utf8_lossy(&bytes[..count]);
        }
    }
}

#[test]
fn commands_that_wait_are_bounded_and_keep_others_off_no_connection() {
    const MORE: usize = 8;
    let s = Server::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let held = runtime.unwrap().block_on(s.gate.hold(Duration::MAX));
    assert!(held.is_some());
    let places = gate::COMMANDS_MAX as usize + gate::WAITING_MAX;
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        for _ in 0..places + MORE {
            let tell = tell.clone();
            let s = &s;
            scope.spawn(move || tell.send(s.ask("GET", "/v1/status", "")).unwrap());
        }
        drop(tell);
        for _ in 0..MORE {
            let (status, body) = told.recv().unwrap();
            assert_eq!(status, 503, "{body}");
            assert_eq!(body["error"]["kind"], "unavailable");
            let message = body["error"]["message"].as_str().unwrap();
            assert!(message.contains("try again"), "{message}");
        }
        // What needs no command goes on, and so do newcomers.
        assert_eq!(s.ask("GET", "/v1/openapi.json", "").0, 200);
        drop(held);
        for _ in 0..places {
            assert_eq!(told.recv().unwrap().0, 200);
        }
    });
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
        "post /v1/scrubs",
        "post /v1/volumes/{name}/flatten",
        "post /v1/volumes/{name}/recover",
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

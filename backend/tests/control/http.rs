//! Requests, bodies and connections as such.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use serde_json::Value;
use stratablk::control::{routes, server};

use crate::{DEADLINE, Server, reply};

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

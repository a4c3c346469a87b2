//! Figures of the daemon.

use serde_json::json;

use crate::Server;

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

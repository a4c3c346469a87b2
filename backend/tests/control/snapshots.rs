//! Snapshots, and what differs between them.

use serde_json::json;

use crate::{Server, event, events};

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

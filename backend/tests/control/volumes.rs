//! Volumes: their types, sizes and attachments.

use serde_json::{Value, json};

use crate::{Server, event, events};

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
    let odd = s.refused(patch(r#"{"size_bytes":1}"#), 422, Some("size_bytes"));
    assert!(odd.starts_with("size_bytes: 1 bytes"), "{odd}");
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

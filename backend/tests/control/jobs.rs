//! Jobs, and the events that tell of them.

use serde_json::{Value, json};

use crate::{DEADLINE, Server, event, events};

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

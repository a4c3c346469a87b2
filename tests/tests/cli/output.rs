//! Usage and output.

use std::path::PathBuf;
use std::process::Stdio;

use serde_json::Value;
use stratablk_tests::daemon::{Ran, run, stratablk, temp_dir};

use crate::Fixture;

#[test]
fn what_is_not_understood_exits_with_2() {
    let usage = |words: &[&str]| {
        let ran = run(words);
        assert_eq!(
            (ran.code, ran.stdout.as_str()),
            (Some(2), ""),
            "{words:?}: {}",
            ran.stderr
        );
        ran.stderr
    };
    usage(&[]);
    usage(&["frobnicate"]);
    usage(&["volume", "create", "web"]);
    usage(&["volume", "create", "web", "--size", "ten"]);
    usage(&["snapshot", "create", "s1"]);
    usage(&["serve"]);
    let control = PathBuf::from("/run/stratablk/control.sock");
    if !control.exists() {
        assert!(usage(&["volume", "list"]).contains("--control"));
    }
}

#[test]
fn without_a_daemon_the_message_says_how_to_start_one() {
    let dir = temp_dir();
    let control = dir.path().join("control.sock");
    let message = run(["--control", control.to_str().unwrap(), "volume", "list"]).refused();
    assert!(
        message.contains("stratablk serve") && message.contains("control.sock"),
        "{message}"
    );
}

#[test]
fn errors_are_json_too_where_json_was_asked_for() {
    let f = Fixture::new();
    let error: Value =
        serde_json::from_str(&f.line("volume show nobody --json").refused()).unwrap();
    assert_eq!(error["error"]["kind"], "not_found");
    assert_eq!(error["error"]["field"], "volume");
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("nobody")
    );
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let f = Fixture::new();
    f.line("volume create web --size 1M").ok();
    let mut command = stratablk([
        "volume",
        "list",
        "--control",
        f.daemon.control().to_str().unwrap(),
    ]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ran = Ran::from(
        command
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap(),
    );
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
}

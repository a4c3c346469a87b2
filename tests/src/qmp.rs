//! QEMU's control protocol, as far as a migration needs it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long QEMU may take over anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to the control socket of a QEMU.
#[derive(Debug)]
pub struct Qmp {
    /// What is sent.
    stream: UnixStream,
    /// What comes.
    lines: BufReader<UnixStream>,
    /// Events that nobody has waited for yet.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects to a QEMU that is being started.
    ///
    /// # Panics
    /// When it does not come.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            std::thread::yield_now();
        };
        let timeout = stream.set_read_timeout(Some(PATIENCE));
        timeout.expect("a timeout that can be set");
        let lines = BufReader::new(stream.try_clone().expect("a descriptor"));
        let mut qmp = Self {
            stream,
            lines,
            events: Vec::new(),
        };
        let greeting = qmp.line();
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        qmp.run("qmp_capabilities", &json!({}));
        qmp
    }

    /// What comes next.
    #[track_caller]
    fn line(&mut self) -> Value {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line);
        assert!(
            read.as_ref().is_ok_and(|&read| read > 0),
            "QEMU says nothing: {read:?}"
        );
        serde_json::from_str(&line).expect("JSON")
    }

    /// Runs a command, which must not fail.
    ///
    /// # Panics
    /// When it does, with what QEMU says of it.
    #[track_caller]
    pub fn run(&mut self, command: &str, arguments: &Value) -> Value {
        let mut text = json!({"execute": command, "arguments": arguments}).to_string();
        text.push('\n');
        let sent = self.stream.write_all(text.as_bytes());
        sent.expect("QEMU listens");
        loop {
            let line = self.line();
            if let Some(answer) = line.get("return") {
                return answer.clone();
            }
            assert!(line.get("error").is_none(), "{command}: {line}");
            self.events.push(line);
        }
    }

    /// Waits until this machine is left by a migration.
    ///
    /// # Panics
    /// When that fails, with the cause that QEMU gives.
    #[track_caller]
    pub fn wait_migrated(&mut self) {
        loop {
            let events = std::mem::take(&mut self.events);
            let is_migration = |event: &&Value| event["event"] == "MIGRATION";
            for event in events.iter().filter(is_migration) {
                match event["data"]["status"].as_str() {
                    Some("completed") => return,
                    Some("failed" | "cancelled") => {
                        panic!("{event}: {}", self.run("query-migrate", &json!({})));
                    }
                    _ => {}
                }
            }
            let line = self.line();
            self.events.push(line);
        }
    }

    /// Waits until the machine fares like this: `running`, `inmigrate`, `postmigrate` and so on.
    ///
    /// # Panics
    /// When it does not come to that.
    #[track_caller]
    pub fn wait_for_status(&mut self, wanted: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if status == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{status}, and not {wanted}");
            std::thread::yield_now();
        }
    }

    /// How the machine fares.
    #[track_caller]
    fn status(&mut self) -> String {
        let status = self.run("query-status", &json!({}));
        status["status"].as_str().unwrap_or_default().to_owned()
    }
}

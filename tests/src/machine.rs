//! A real Linux guest under QEMU, started and ended by `scripts/guest`.
//!
//! A test gives it disks and a shell script, waits for lines that the script prints, and answers on the script's standard
//! input. When a test fails, what the guest printed and the end of its console log are shown.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::lines::{Lines, Silence};
use crate::wait::readable;

/// How long a guest may take to print the next line that a test waits for: a guest on emulated processors, on a machine
/// that is busy with other things.
pub const GUEST_PATIENCE: Duration = Duration::from_secs(120);
/// How long a guest may live. `scripts/guest` sees to that, should the test be stopped in a debugger or killed.
const LIFETIME_S: &str = "240";
/// How long a guest may take to vanish once it was told to.
const END_PATIENCE: Duration = Duration::from_secs(30);
/// Lines of the console that are shown when a test fails.
const CONSOLE_LINES: usize = 40;

/// A disk of a guest.
#[derive(Clone, Debug)]
pub struct GuestDisk {
    /// The vhost-user socket of its back-end.
    pub socket: PathBuf,
    /// The virtqueues that the guest uses.
    pub queues: u16,
}

/// A guest that runs.
#[derive(Debug)]
pub struct Machine {
    /// What to call it in messages.
    name: String,
    /// `scripts/guest`, whose child is QEMU.
    script: Child,
    /// The standard input of the script in the guest.
    input: Option<ChildStdin>,
    /// What the script in the guest prints.
    output: Lines,
    /// What QEMU and `scripts/guest` complain about.
    complaints: Lines,
    /// The log of the guest's serial console.
    console: PathBuf,
    /// Whether the end was seen.
    ended: bool,
    /// Whether all that is known was shown already.
    reported: bool,
}

impl Machine {
    /// Boots a guest with these disks (/dev/vda, /dev/vdb, ...) that runs `commands` with bash. Its console log goes to
    /// `dir`.
    pub fn boot(dir: &Path, name: &str, disks: &[GuestDisk], commands: &str) -> Self {
        Self::boot_with(dir, name, disks, &[], commands)
    }

    /// The same with more arguments of `scripts/guest`.
    pub fn boot_with(
        dir: &Path,
        name: &str,
        disks: &[GuestDisk],
        more: &[&str],
        commands: &str,
    ) -> Self {
        let mut arguments: Vec<String> = more.iter().map(|&more| more.into()).collect();
        for disk in disks {
            let (socket, queues) = (disk.socket.display(), disk.queues);
            arguments.extend(["--disk".into(), format!("{socket},queues={queues}")]);
        }
        Self::start(
            dir,
            name,
            &arguments,
            &["--".into(), "-c".into(), commands.into()],
        )
    }

    /// Lets the firmware boot from a disk and waits until this text is seen on the serial port.
    ///
    /// # Panics
    /// When it is not seen in time.
    #[track_caller]
    pub fn boot_firmware(dir: &Path, name: &str, disk: &GuestDisk, until: &str) -> Vec<String> {
        let (socket, queues) = (disk.socket.display(), disk.queues);
        let arguments = [
            "--firmware-disk".into(),
            format!("{socket},queues={queues}"),
            "--until".into(),
            until.into(),
        ];
        Self::start(dir, name, &arguments, &[]).finish()
    }

    /// Starts `scripts/guest`.
    fn start(dir: &Path, name: &str, arguments: &[String], commands: &[String]) -> Self {
        let console = dir.join(format!("{name}.console"));
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/guest");
        let mut script = Command::new(&program)
            .args(arguments)
            .arg("--log")
            .arg(&console)
            .args(["--timeout", LIFETIME_S])
            .args(commands)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let output = Lines::of(script.stdout.take().expect("it is piped"));
        let complaints = Lines::of(script.stderr.take().expect("it is piped"));
        Self {
            name: name.to_owned(),
            input: script.stdin.take(),
            script,
            output,
            complaints,
            console,
            ended: false,
            reported: false,
        }
    }

    /// The next line from the guest that starts like this.
    ///
    /// # Panics
    /// When the guest ends before or does not print one in time.
    #[track_caller]
    pub fn wait_for(&mut self, start: &str) -> String {
        match self.output.wait_for(start, GUEST_PATIENCE) {
            Ok(line) => line,
            Err(silence) => self.fail(&format!("no line {start:?}: {silence:?}")),
        }
    }

    /// Like `wait_for`, but for as long as is said, and without a complaint if the line does not come.
    ///
    /// # Panics
    /// When the guest ends meanwhile.
    #[track_caller]
    pub fn wait_briefly_for(&mut self, start: &str, patience: Duration) -> Option<String> {
        match self.output.wait_for(start, patience) {
            Ok(line) => Some(line),
            Err(Silence::Late) => None,
            Err(Silence::Ended) => self.fail(&format!("it ended before {start:?}")),
        }
    }

    /// Gives the script in the guest a line to read.
    ///
    /// # Panics
    /// When the guest is gone.
    #[track_caller]
    pub fn say(&mut self, line: &str) {
        let input = self.input.as_mut().expect("it was not ended");
        if let Err(error) = writeln!(input, "{line}").and_then(|()| input.flush()) {
            self.fail(&format!("it does not listen: {error}"));
        }
    }

    /// Waits for the end of the script in the guest, which must succeed, and returns all that it printed.
    ///
    /// # Panics
    /// When it fails, or does not end in time.
    #[track_caller]
    pub fn finish(mut self) -> Vec<String> {
        drop(self.input.take());
        let ended = self.output.wait_for_end(GUEST_PATIENCE);
        match self.wait() {
            None => self.fail("it does not end"),
            Some(status) if ended.is_err() || !status.success() => {
                self.fail(&format!("it ended with {status}"));
            }
            Some(_) => {}
        }
        self.output.seen().to_vec()
    }

    /// Takes the power away: QEMU is gone on return, in the middle of whatever the guest was doing.
    ///
    /// # Panics
    /// When there is no QEMU, or it does not go.
    #[track_caller]
    pub fn kill(mut self) -> Vec<String> {
        let Some(qemu) = self.qemu() else {
            self.fail("it is not running");
        };
        kill_process(qemu, Signal::KILL).expect("a process of ours");
        let status = self.wait();
        // That is how scripts/guest says that QEMU died.
        if status.and_then(|status| status.code()) != Some(125) {
            self.fail(&format!("scripts/guest ended with {status:?}"));
        }
        self.output.seen().to_vec()
    }

    /// The process id of QEMU: the child of `scripts/guest` with that name.
    fn qemu(&self) -> Option<Pid> {
        let parent = format!("PPid:\t{}", self.script.id());
        let processes = fs::read_dir("/proc").expect("/proc");
        processes.filter_map(Result::ok).find_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            // A process may end while we look.
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            let ours = status.starts_with("Name:\tqemu-system")
                && status.lines().any(|line| line == parent);
            ours.then(|| Pid::from_raw(pid)).flatten()
        })
    }

    /// Waits for the end of `scripts/guest`; `None` if it does not come in time.
    fn wait(&mut self) -> Option<ExitStatus> {
        drop(self.input.take());
        // Its number belongs to it until we have taken its status.
        let pidfd = pidfd_open(Pid::from_child(&self.script), PidfdFlags::empty());
        [self.ended] = readable([pidfd.expect("a pidfd").as_fd()], END_PATIENCE);
        self.ended
            .then(|| self.script.wait().expect("a child of ours"))
    }

    /// Fails the test, with all that is known of this guest.
    #[track_caller]
    fn fail(&mut self, what: &str) -> ! {
        self.reported = true;
        let diagnosis = self.diagnosis();
        panic!("guest {}: {what}\n{diagnosis}", self.name);
    }

    /// What is known of this guest, for the message of a failed test.
    fn diagnosis(&mut self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let mut tail: Vec<_> = console.lines().rev().take(CONSOLE_LINES).collect();
        tail.reverse();
        format!(
            "---- it printed:\n{}\n---- scripts/guest said:\n{}\n---- end of its console:\n{}\n----",
            self.output.seen().join("\n"),
            self.complaints.seen().join("\n"),
            tail.join("\n")
        )
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() && !self.reported {
            let diagnosis = self.diagnosis();
            eprintln!("guest {}:\n{diagnosis}", self.name);
        }
        if self.ended {
            return;
        }
        // It cleans up after itself when asked to end; after a SIGKILL it could not.
        let asked = kill_process(Pid::from_child(&self.script), Signal::TERM);
        if asked.is_ok() && self.wait().is_some() {
            return;
        }
        drop(self.script.kill());
        drop(self.script.wait());
    }
}

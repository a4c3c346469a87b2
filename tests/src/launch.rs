//! Starts a back-end on an image of its own and ends it with the test.
//!
//! The back-end is `stratablk`, from `$STRATABLK_BIN` or from beside the test programs. With `STRATABLK_TEST_SERVER=qsd`
//! it is `qemu-storage-daemon` instead, which shows whether a test or the back-end is wrong. `STRATABLK_TEST_ARGS` holds
//! more arguments for `stratablk serve`, for instance `--no-io-uring`.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use tempfile::TempDir;

use crate::daemon::stratablk;
use crate::disk::Disk;
use crate::guest::{Guest, GuestOptions};
use crate::pattern;
use crate::process::Process;
use crate::wait::until;

/// How a back-end is started.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// The size of the image.
    pub sectors: u64,
    /// The queues on offer.
    pub queues: u16,
    /// Whether the guest may only read.
    pub read_only: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            sectors: 4096,
            queues: 2,
            read_only: false,
        }
    }
}

/// Which program serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Ours.
    Stratablk,
    /// QEMU's, to check the tests against.
    QemuStorageDaemon,
}

impl Program {
    /// The one that the environment asks for.
    pub fn chosen() -> Self {
        match std::env::var("STRATABLK_TEST_SERVER").as_deref() {
            Ok("qsd") => Self::QemuStorageDaemon,
            _ => Self::Stratablk,
        }
    }
}

/// A back-end that runs.
#[derive(Debug)]
pub struct Server {
    /// The process.
    pub process: Process,
    /// The folder of image, socket and log, gone with the test.
    dir: TempDir,
    /// How it was started.
    options: ServerOptions,
}

impl Server {
    /// Starts with usual options.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(ServerOptions::default())
    }

    /// Starts on a fresh image full of [`pattern::base`] and waits until it listens.
    ///
    /// # Panics
    /// When it does not listen in time.
    #[track_caller]
    pub fn start_with(options: ServerOptions) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("stratablk-")
            .tempdir()
            .expect("a folder");
        fs::write(dir.path().join("image"), pattern::base(0, options.sectors)).expect("an image");
        let process = spawn(dir.path(), options);
        let mut server = Self {
            process,
            dir,
            options,
        };
        server.wait_until_ready();
        server
    }

    /// Starts anew on the same image and socket, after the process was ended.
    #[track_caller]
    pub fn restart(&mut self) {
        assert!(!self.process.is_alive(), "end it first");
        self.process = spawn(self.dir.path(), self.options);
        self.wait_until_ready();
    }

    /// Waits until the socket accepts.
    #[track_caller]
    fn wait_until_ready(&mut self) {
        let ready =
            until(|| !self.process.is_alive() || UnixStream::connect(self.socket()).is_ok());
        assert!(
            ready && self.process.is_alive(),
            "the back-end does not start:\n{}",
            self.log()
        );
    }

    /// The folder of this test.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// The raw image.
    pub fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// The number of its open descriptors once no front-end is connected and it has settled.
    ///
    /// # Panics
    /// When it does not settle.
    #[track_caller]
    pub fn idle_fds(&self) -> usize {
        let mut last = 0;
        let mut same = 0;
        let settled = until(|| {
            let now = self.process.open_fds();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            same >= 10
        });
        assert!(settled, "the number of descriptors settles");
        last
    }

    /// What it wrote to stderr.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// The size of the disk.
    pub fn sectors(&self) -> u64 {
        self.options.sectors
    }

    /// A session with usual options.
    #[track_caller]
    pub fn guest(&self) -> Guest {
        self.guest_with(GuestOptions::default())
    }

    /// A session.
    #[track_caller]
    pub fn guest_with(&self, options: GuestOptions) -> Guest {
        Guest::start(&self.socket(), options)
    }

    /// A disk with usual options.
    #[track_caller]
    pub fn disk(&self) -> Disk {
        Disk::connect(&self.socket())
    }

    /// Checks that it still lives and serves the last sector, which no test writes, to a new front-end. The test must have
    /// dropped its own connection: one front-end is served at a time.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn assert_serves(&mut self) {
        assert!(
            self.process.is_alive(),
            "the back-end is gone:\n{}",
            self.log()
        );
        let last = self.options.sectors - 1;
        assert_eq!(
            self.disk().read(last, 1),
            pattern::base(last, 1),
            "sector {last}"
        );
    }

    /// Checks with a new front-end that sectors hold what the image does: the same conditions as for `assert_serves`.
    ///
    /// # Panics
    /// When they do not.
    #[track_caller]
    pub fn assert_base(&self, sector: u64, count: u64, what: &str) {
        let bytes = self.disk().read(sector, count);
        pattern::assert_same(&bytes, &pattern::base(sector, count), what);
    }

    /// Checks that it soon has no more descriptors open than `idle`.
    ///
    /// # Panics
    /// When it has.
    #[track_caller]
    pub fn assert_fds_closed(&self, idle: usize) {
        assert!(
            until(|| self.process.open_fds() <= idle),
            "descriptors leaked"
        );
    }

    /// The same, and that no guest's memory stays mapped.
    ///
    /// # Panics
    /// When one does.
    #[track_caller]
    pub fn assert_nothing_kept(&self, idle: usize) {
        self.assert_fds_closed(idle);
        assert!(
            until(|| self.process.memfd_mappings() == 0),
            "mappings leaked"
        );
    }

    /// Ends it as an operator does and returns its exit status.
    ///
    /// # Panics
    /// When it does not end in time.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        self.process.terminate();
        assert!(
            until(|| !self.process.is_alive()),
            "it does not end:\n{}",
            self.log()
        );
        self.process.child.wait().expect("a child of ours")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of the back-end:\n{}", self.log());
        }
    }
}

/// Starts the process.
fn spawn(dir: &Path, options: ServerOptions) -> Process {
    let (image, socket) = (dir.join("image"), dir.join("socket"));
    let mut command = match Program::chosen() {
        Program::Stratablk => {
            let mut command = stratablk(["serve", "--blk-file"]);
            command.arg(image).arg("--socket-path").arg(socket);
            // Gone with the test, however the daemon ends.
            command
                .args(["--cache-size", "16M", "--cache-dir"])
                .arg(dir);
            command.arg("--queues").arg(options.queues.to_string());
            if options.read_only {
                command.arg("--read-only");
            }
            if let Ok(more) = std::env::var("STRATABLK_TEST_ARGS") {
                command.args(more.split_whitespace());
            }
            command
        }
        Program::QemuStorageDaemon => {
            let mut command = Command::new("qemu-storage-daemon");
            let read_only = if options.read_only { "on" } else { "off" };
            let writable = if options.read_only { "off" } else { "on" };
            command.arg("--blockdev").arg(format!(
                "driver=file,filename={},node-name=f,discard=unmap,read-only={read_only}",
                image.display()
            ));
            command.arg("--export").arg(format!(
                "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable={writable},num-queues={}",
                socket.display(),
                options.queues
            ));
            command
        }
    };
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"))
        .expect("a log file");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    let child = command
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Process { child }
}

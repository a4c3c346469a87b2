//! `stratablk-confined`: plays a thread of the daemon that was taken over. It confines itself as that thread is
//! confined, then tries one thing and prints what came of it: `done`, or the error's number. Some things end it by SIGSYS.
//!
//! The directory that it is given holds `store/`, `base/`, `sockets/`, `other/` and `allowed/`; see `tests/confined.rs`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use clap::Parser;
use rustix::process::{Pid, test_kill_process};
use stratablk::confine::{self, Mode, Places, Role, Settings};

/// Confines itself as a thread of the daemon, then tries one thing.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The thread: control, work, attachment, worker or files; `none` confines nothing.
    role: String,
    /// What to try.
    attempt: String,
    /// Where the files lie.
    #[arg(long)]
    dir: PathBuf,
    /// A port of this host where somebody listens.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Another process of this user.
    #[arg(long, default_value_t = 1)]
    pid: i32,
    /// Whether the operator says where images and sockets may be: in `allowed/`.
    #[arg(long)]
    bounded: bool,
}

/// Makes a system call with numbers that point to nothing of ours.
fn call(number: libc::c_long, arguments: [libc::c_long; 6]) -> io::Result<()> {
    let [a, b, c, d, e, f] = arguments;
    #[expect(unsafe_code, reason = "system calls that nothing wraps")]
    // SAFETY: each of the calls below is given numbers only, and addresses that no program has, so it touches no memory of this
    // one; a mapping that it makes is of its own.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Makes a system call that goes wrong if it is carried out at all: then it was not refused.
fn reaches_kernel(number: libc::c_long) -> io::Result<()> {
    match call(number, [-1, -1, -1, -1, 0, 0]) {
        Err(error) if [Some(libc::ENOSYS), Some(libc::EACCES)].contains(&error.raw_os_error()) => {
            Err(error)
        }
        _ => Ok(()),
    }
}

/// What was opened before the thread was confined.
struct Prepared {
    /// A file of the store.
    file: File,
    /// Two ends of a connection.
    pair: (UnixStream, UnixStream),
}

/// What every thread needs: memory, waiting, clocks, its log, open files, and a panic that is caught.
fn works(prepared: &mut Prepared) -> io::Result<()> {
    let large = vec![1_u8; 64 << 20];
    let many: Vec<Vec<u8>> = (1..2_000).map(|bytes| vec![2; bytes * 16]).collect();
    drop((large, many));
    thread::park_timeout(Duration::from_millis(1));
    let file = &mut prepared.file;
    file.rewind()?;
    file.write_all(b"data")?;
    file.sync_data()?;
    file.set_len(4096)?;
    file.rewind()?;
    let mut back = String::new();
    file.read_to_string(&mut back)?;
    eprintln!("a line of the log");
    let panicked = catch_unwind(|| panic!("on purpose"));
    if panicked.is_ok() || !back.starts_with("data") {
        return Err(io::Error::other("went wrong"));
    }
    Ok(())
}

/// Two threads that meet.
fn starts_threads() -> io::Result<()> {
    let barrier = Arc::new(Barrier::new(2));
    let theirs = Arc::clone(&barrier);
    let other = thread::Builder::new().name("other".into()).spawn(move || {
        confine::enter(Role::Worker);
        theirs.wait();
    })?;
    barrier.wait();
    other.join().map_err(|_| io::Error::other("it panicked"))
}

/// Tries one thing.
fn attempt(arguments: &Arguments, prepared: &mut Prepared) -> io::Result<()> {
    let at = |name: &str| arguments.dir.join(name);
    let write = |path: PathBuf| OpenOptions::new().write(true).open(path).map(drop);
    match arguments.attempt.as_str() {
        "work" => works(prepared),
        "message" => {
            prepared.pair.0.write_all(b"m")?;
            prepared.pair.1.read_exact(&mut [0])
        }
        "start-threads" => starts_threads(),
        "read-secret" => fs::read(at("other/secret")).map(drop),
        "read-base" => fs::read(at("base/image")).map(drop),
        "write-base" => write(at("base/image")),
        "read-allowed" => fs::read(at("allowed/image")).map(drop),
        "write-allowed" => write(at("allowed/image")),
        "read-store" => fs::read(at("store/file")).map(drop),
        "make-in-store" => fs::write(at("store/new"), "new"),
        "make-dir-in-store" => fs::create_dir(at("store/dir")),
        "make-outside" => fs::write(at("other/new"), "new"),
        "make-in-allowed" => fs::write(at("allowed/new"), "new"),
        "remove-secret" => fs::remove_file(at("other/secret")),
        "remove-socket" => fs::remove_file(at("sockets/s")),
        "make-socket" => UnixListener::bind(at("sockets/new")).map(drop),
        "make-socket-in-allowed" => UnixListener::bind(at("allowed/new")).map(drop),
        "link" => symlink("/etc/passwd", at("store/link")),
        "exec" => Err(Command::new("/bin/echo").arg("done").exec()),
        "fork" => Command::new("/bin/true").status().map(drop),
        "tcp" => TcpStream::connect(("127.0.0.1", arguments.port)).map(drop),
        "kill" => {
            let pid = Pid::from_raw(arguments.pid).ok_or(io::ErrorKind::InvalidInput)?;
            Ok(test_kill_process(pid)?)
        }
        "new-code" => {
            let code = libc::c_long::from(libc::PROT_READ | libc::PROT_EXEC);
            let flags = libc::c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            call(libc::SYS_mmap, [0, 4096, code, flags, -1, 0])
        }
        "ring" => reaches_kernel(libc::SYS_io_uring_setup),
        "ptrace" => reaches_kernel(libc::SYS_ptrace),
        "mount" => reaches_kernel(libc::SYS_mount),
        "bpf" => reaches_kernel(libc::SYS_bpf),
        "setns" => reaches_kernel(libc::SYS_setns),
        "other-memory" => reaches_kernel(libc::SYS_process_vm_writev),
        "keys" => reaches_kernel(libc::SYS_keyctl),
        "handle" => reaches_kernel(libc::SYS_open_by_handle_at),
        other => Err(io::Error::other(format!("no attempt {other}"))),
    }
}

/// Confines this thread as one of the daemon, if it is to be.
fn confine_as(role: &str, dir: &Path) -> Result<(), String> {
    let socket = dir.join("sockets/s");
    confine::enter(match role {
        "control" => Role::Control,
        "work" => Role::Work,
        "attachment" => Role::Attachment {
            socket: Some(&socket),
        },
        "worker" => Role::Worker,
        "files" => Role::Files,
        "none" => return Ok(()),
        other => return Err(format!("no role {other}")),
    });
    Ok(())
}

/// Confines the process and a thread, and tries.
fn run(arguments: Arguments) -> Result<(), String> {
    let dir = arguments.dir.clone();
    let text = |error: io::Error| error.to_string();
    let settings = Settings {
        mode: Mode::Require,
        ..Settings::default()
    };
    if arguments.role != "none" {
        confine::begin(&settings, &dir.join("store"), &[]).map_err(|error| error.to_string())?;
    }
    let allow = if arguments.bounded {
        vec![dir.join("allowed")]
    } else {
        Vec::new()
    };
    confine::settle(Places {
        store: dir.join("store"),
        cache: None,
        control: dir.join("store/control.sock"),
        allow,
        ..Places::default()
    });
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(dir.join("store/file"));
    let mut prepared = Prepared {
        file: file.map_err(text)?,
        pair: UnixStream::pair().map_err(text)?,
    };
    let thread = thread::Builder::new().name("tried".into()).spawn(move || {
        confine_as(&arguments.role, &arguments.dir)?;
        match attempt(&arguments, &mut prepared) {
            Ok(()) => println!("done"),
            Err(error) => println!("{}", error.raw_os_error().ok_or(error.to_string())?),
        }
        Ok(())
    });
    let ended = thread.map_err(text)?.join();
    ended.map_err(|_| "the thread panicked".to_owned())?
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("stratablk-confined: {what}");
            ExitCode::FAILURE
        }
    }
}

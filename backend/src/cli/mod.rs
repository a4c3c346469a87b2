//! The command line: parses it, does what it says, prints the result, and turns it all into an exit code.
//!
//! Results go to stdout, as text or (`--json`) as exactly one JSON document. Errors go to stderr, as a line or as
//! `{"error": {...}}`. The exit code is 0 if it was done, 1 if it was refused or failed, 2 if it was not understood, 3 if
//! a scrub that was waited for found damage, 130 if a wait was interrupted.

pub mod args;
mod cache;
mod check;
mod client;
mod jobs;
mod joined;
mod output;
mod progress;
mod scrub;
mod size;
mod snapshots;
mod stats;
mod table;
mod tree;
mod volumes;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use hyper::Method;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use stratablk_layers::store::StoreOptions;

use self::args::{CheckArgs, Cli, Command, ServeArgs, SourceArgs, with_serve_implied};
use self::client::{Client, ClientError, encoded};
use crate::config::{DiskSocket, OneDisk, ServeConfig, Target, inherit_socket};
use crate::confine;
use crate::control::types::{ErrorBody, ErrorDetail, ErrorKind, Tree, VolumeType};
use crate::daemon;

/// The control socket where nothing else is said, if it is there.
const CONTROL_DEFAULT: &str = "/run/stratablk/control.sock";
/// Refused or failed.
const EXIT_FAILED: u8 = 1;
/// Not understood.
const EXIT_USAGE: u8 = 2;
/// A scrub has found damage.
const EXIT_DAMAGED: u8 = 3;
/// Interrupted by Ctrl-C (128 and the number of SIGINT).
const EXIT_INTERRUPTED: u8 = 130;

/// How a command failed.
#[derive(Debug)]
enum Failure {
    /// It was refused or failed: exit code 1.
    Failed(ErrorDetail),
    /// It was not understood: exit code 2.
    Usage(String),
    /// Somebody ended the wait for it with Ctrl-C: exit code 130, as of any command that is interrupted.
    Interrupted(String),
}

impl Failure {
    /// A failure in words, of this kind.
    fn of(kind: ErrorKind, message: impl ToString) -> Self {
        Self::Failed(plain(kind, message.to_string()))
    }
}

/// An error that is about no field.
const fn plain(kind: ErrorKind, message: String) -> ErrorDetail {
    ErrorDetail {
        kind,
        field: None,
        message,
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(detail) => Self::Failed(detail),
            ClientError::NoDaemon { .. } => Self::of(ErrorKind::Unavailable, error),
            ClientError::Connect { .. } | ClientError::Broken { .. } => {
                Self::of(ErrorKind::Io, error)
            }
        }
    }
}

/// What a command has to say when it is done.
struct Done {
    /// For `--json`.
    json: Value,
    /// For people.
    text: String,
    /// 0, or another code for a result that is bad news.
    code: u8,
}

impl Done {
    /// Good news.
    const fn new(json: Value, text: String) -> Self {
        Self {
            json,
            text,
            code: 0,
        }
    }
}

/// Does what the arguments say.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(with_serve_implied(args)) {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody may be reading; the code says it as well.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(EXIT_USAGE));
        }
    };
    let json = cli.json;
    match dispatch(cli) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(done)) => print(&done, json),
        Err(failure) => report(failure, json),
    }
}

/// Prints a result. A reader that has gone (`| head`) is no failure of the command.
fn print(done: &Done, json: bool) -> ExitCode {
    let mut out = io::stdout().lock();
    let written = if json {
        serde_json::to_string_pretty(&done.json)
            .map_err(io::Error::from)
            .and_then(|text| writeln!(out, "{text}"))
    } else {
        out.write_all(done.text.as_bytes())
    };
    match written.and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("stratablk: the result could not be printed: {error}");
            ExitCode::from(EXIT_FAILED)
        }
        _ => ExitCode::from(done.code),
    }
}

/// Prints a failure and returns its code.
fn report(failure: Failure, json: bool) -> ExitCode {
    let (detail, code) = match failure {
        Failure::Failed(detail) => (detail, EXIT_FAILED),
        Failure::Usage(message) => (plain(ErrorKind::Invalid, message), EXIT_USAGE),
        Failure::Interrupted(message) => (plain(ErrorKind::Unavailable, message), EXIT_INTERRUPTED),
    };
    if json {
        eprintln!("{}", json!(ErrorBody { error: detail }));
    } else {
        eprintln!("stratablk: {}", detail.message);
    }
    ExitCode::from(code)
}

/// Carries the command out. `None` if it has printed what there was to print.
fn dispatch(cli: Cli) -> Result<Option<Done>, Failure> {
    if cli.print_capabilities {
        return Ok(Some(capabilities()));
    }
    let command = match cli.command {
        Some(command) => command,
        None => {
            let mut help = Cli::command();
            return Err(Failure::Usage(format!(
                "no command given\n\n{}",
                help.render_help()
            )));
        }
    };
    match command {
        Command::Serve(args) => serve(*args, cli.control, cli.json).map(|()| None),
        Command::Check(args) => check_store(&args).map(Some),
        Command::Stats(args) => {
            let client = Client::new(&control_path(cli.control)?);
            stats::run(&client, &args, cli.json)
        }
        Command::Diff { from, to } => {
            let client = Client::new(&control_path(cli.control)?);
            snapshots::diff(&client, &from, to.as_ref()).map(|()| None)
        }
        command => {
            let client = Client::new(&control_path(cli.control)?);
            ask(&client, command, cli.json).map(Some)
        }
    }
}

/// What management software reads before it starts a vhost-user back-end program.
fn capabilities() -> Done {
    let json = json!({ "type": "block", "features": ["read-only", "blk-file"] });
    let text = format!("{json}\n");
    Done::new(json, text)
}

/// Names the control socket for those who talk to a daemon. Not for the daemon: whoever has it in the environment talks to one,
/// and a second one must not take that one's place.
const CONTROL_VARIABLE: &str = "STRATABLK_CONTROL";

/// The control socket to talk to.
fn control_path(given: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let named = || {
        let path = std::env::var_os(CONTROL_VARIABLE)?;
        (!path.is_empty()).then(|| PathBuf::from(path))
    };
    if let Some(path) = given.or_else(named) {
        return Ok(path);
    }
    let default = Path::new(CONTROL_DEFAULT);
    if default.exists() {
        return Ok(default.to_owned());
    }
    Err(Failure::Usage(format!(
        "which daemon? Give its control socket with --control PATH or in STRATABLK_CONTROL; \
         it is DIR/control.sock of `stratablk serve --store DIR` ({CONTROL_DEFAULT} is not there)"
    )))
}

/// Runs the daemon.
fn serve(args: ServeArgs, control: Option<PathBuf>, json: bool) -> Result<(), Failure> {
    // Before anything opens a file that could get the number.
    let inherited = args.fd.map(|fd| {
        inherit_socket(fd).map_err(|error| {
            Failure::of(
                ErrorKind::Invalid,
                format!("--fd {fd}: {error}; pass an open Unix socket"),
            )
        })
    });
    let inherited = inherited.transpose()?;
    let filter = args
        .log
        .parse::<tracing_subscriber::EnvFilter>()
        .map_err(|error| {
            Failure::Usage(format!(
                "--log {:?}: {error}; try info or stratablk=debug",
                args.log
            ))
        })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        .init();
    let cache = args.cache.options()?;
    check_allowed("--allow", &args.confine.allow)?;
    check_allowed("--allow-read", &args.confine.allow_read)?;

    let target = match (args.store, args.blk_file) {
        (Some(dir), None) => Target::Store(dir),
        (None, Some(file)) => {
            let socket = match (args.socket_path, inherited) {
                (Some(path), None) => DiskSocket::Path(path),
                (None, Some(fd)) => DiskSocket::Inherited(fd),
                _ => return Err(Failure::Usage("give either --socket-path or --fd".into())),
            };
            let (queues, read_only) = (args.queues, args.read_only);
            Target::Disk(OneDisk {
                file,
                socket,
                queues,
                read_only,
            })
        }
        _ => return Err(Failure::Usage("give either --store or --blk-file".into())),
    };
    daemon::run(ServeConfig {
        target,
        control,
        control_group: args.control_group,
        socket_group: args.socket_group,
        confine: args.confine.into(),
        workers: args.workers.map(usize::from),
        store_options: StoreOptions {
            direct_io: args.direct_io,
            no_io_uring: args.no_io_uring,
            cache,
            sums_rate: args.checksum_rate.0,
            on_thread: Some(|| confine::enter(confine::Role::Files)),
        },
        takeover: args.takeover,
        json,
    })
    .map_err(|error| Failure::of(error.kind(), error))
}

/// Refuses directories that are not there: nothing beneath a later one could be used, since the kernel knows the directory
/// and not its name.
fn check_allowed(option: &str, dirs: &[PathBuf]) -> Result<(), Failure> {
    let refuse = |dir: &Path, what: String| {
        let text = format!(
            "{option} {}: {what}; make the directory before the daemon starts",
            dir.display()
        );
        Err(Failure::of(ErrorKind::Invalid, text))
    };
    for dir in dirs {
        match std::fs::metadata(dir) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return refuse(dir, "not a directory".into()),
            Err(error) => return refuse(dir, error.to_string()),
        }
    }
    Ok(())
}

/// Verifies a store.
fn check_store(args: &CheckArgs) -> Result<Done, Failure> {
    let outcome = check::run(args)
        .map_err(|error| Failure::Failed(crate::control::error::ApiError::from(error).detail))?;
    let code = if outcome.sound { 0 } else { EXIT_FAILED };
    Ok(Done {
        json: outcome.json,
        text: outcome.text,
        code,
    })
}

/// Asks the daemon for what a command wants.
fn ask(client: &Client, command: Command, json: bool) -> Result<Done, Failure> {
    match command {
        Command::Volume(command) => volumes::run(client, command, json),
        Command::Snapshot(command) => snapshots::run(client, command, json),
        Command::Job(command) => jobs::run(client, command, json),
        Command::Clone { from, name } => {
            let source = SourceArgs {
                size: None,
                base: None,
                from: Some(from),
            };
            volumes::create(client, name, source, VolumeType::Normal)
        }
        Command::Import { image, name, wait } => volumes::import(client, &image, name, wait, json),
        Command::Tree { volume, all } => {
            let json = client.call(Method::GET, &filtered("/v1/tree", volume.as_deref()), None)?;
            let tree: Tree = read(&json)?;
            let text = if tree.layers.is_empty() {
                "no layers yet\n".to_owned()
            } else {
                tree::draw(&tree, all)
            };
            Ok(Done::new(json, text))
        }
        Command::Scrub { volume, wait, .. } => scrub::run(client, volume, wait, json),
        Command::Du { volumes } => volumes::usage(client, volumes),
        Command::Serve(_) | Command::Check(_) | Command::Stats(_) | Command::Diff { .. } => Err(
            Failure::of(ErrorKind::Internal, "this command is carried out elsewhere"),
        ),
    }
}

/// The route of a volume.
fn volume_target(name: &str) -> String {
    format!("/v1/volumes/{}", encoded(name))
}

/// A route, restricted to a volume if one is given.
fn filtered(route: &str, volume: Option<&str>) -> String {
    volume.map_or_else(
        || route.to_owned(),
        |name| format!("{route}?volume={}", encoded(name)),
    )
}

/// A path for the daemon, whose working directory is another one.
fn absolute(option: &str, path: &Path) -> Result<String, Failure> {
    let absolute = std::path::absolute(path).map_err(|error| {
        Failure::of(
            ErrorKind::Invalid,
            format!("{option} {}: {error}", path.display()),
        )
    })?;
    absolute.into_os_string().into_string().map_err(|path| {
        let what = format!("{option} {}: the path must be UTF-8", path.display());
        Failure::of(ErrorKind::Invalid, what)
    })
}

/// A reply as its type.
fn read<T: DeserializeOwned>(json: &Value) -> Result<T, Failure> {
    T::deserialize(json).map_err(|error| {
        let what = format!("the daemon's reply is not what this version expects: {error}");
        Failure::of(ErrorKind::Internal, what)
    })
}

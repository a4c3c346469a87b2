//! Stands between a driver that knows nothing of the death of its device and daemons that die: it passes the driver's messages
//! on, adds an inflight buffer, and tells the next daemon what the driver has said, with the ring indices of that moment.
//!
//! So rings, requests and completions are those of code that nobody wrote for this test.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use tempfile::TempDir;

use super::lasting::{Base, ask, gone, tell};
use super::rig::QUEUES;
use crate::daemon::temp_dir;
use crate::inflight::{Inflight, Shape};
use crate::request::protocol;
use crate::wire::{Message, NEED_REPLY, REPLY, VERSION, Wire, code};

/// What the driver has said.
#[derive(Debug)]
struct Said {
    request: u32,
    payload: Vec<u8>,
    file: Option<File>,
}

impl Said {
    /// A number of 32 bits in it.
    fn half(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.payload[at..at + 4].try_into().expect("4 bytes"))
    }

    /// One of 64 bits.
    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.payload[at..at + 8].try_into().expect("8 bytes"))
    }
}

/// What outlives a daemon.
#[derive(Debug, Default)]
struct State {
    /// The connection to the daemon, while there is one.
    daemon: Option<Wire>,
    /// All that was said, in order.
    said: Vec<Said>,
    /// The buffer that goes from daemon to daemon.
    inflight: Option<Inflight>,
}

/// The relay.
#[derive(Debug)]
pub struct Relay {
    state: Arc<Mutex<State>>,
    /// Where the driver connects.
    socket: PathBuf,
    /// Holds the socket.
    _dir: TempDir,
}

impl Relay {
    /// Waits for a driver, whose messages go to the daemon behind a socket.
    ///
    /// # Errors
    /// The daemon is gone.
    pub fn start(daemon: &Path) -> io::Result<Self> {
        let dir = temp_dir();
        let socket = dir.path().join("relay.sock");
        let listener = UnixListener::bind(&socket)?;
        let state = State {
            daemon: Some(Wire::connect(daemon)?),
            ..State::default()
        };
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        // Ends with the driver.
        thread::spawn(move || pass_on(&listener, &shared));
        Ok(Self {
            state,
            socket,
            _dir: dir,
        })
    }

    /// Where the driver connects.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Lets the daemon go.
    pub fn disconnect(&self) {
        lock(&self.state).daemon = None;
    }

    /// Tells another daemon everything.
    ///
    /// # Errors
    /// It is gone, or refuses.
    pub fn reconnect(&self, daemon: &Path, base: Base) -> io::Result<()> {
        let mut state = lock(&self.state);
        let wire = Wire::connect(daemon)?;
        state.repeat(&wire, base)?;
        state.daemon = Some(wire);
        Ok(())
    }

    /// Whether as much has come back on all rings as was offered.
    pub fn is_even(&self) -> bool {
        let state = lock(&self.state);
        let queues = 0..u32::try_from(QUEUES).expect("few");
        queues
            .into_iter()
            .all(|queue| state.index(queue, Base::Used) == state.index(queue, Base::Available))
    }
}

/// The state, whatever became of the other thread.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes messages on until the driver hangs up, or a daemon does in the midst of the set-up, which the driver then notices.
fn pass_on(listener: &UnixListener, state: &Mutex<State>) {
    let Ok((stream, _)) = listener.accept() else {
        return;
    };
    let Ok(driver) = Wire::from_stream(stream) else {
        return;
    };
    loop {
        // Between the set-up and its end it says nothing.
        crate::wait::readable([driver.as_fd()], std::time::Duration::from_secs(3600));
        let Ok(Some(message)) = driver.receive() else {
            return;
        };
        if lock(state).pass(&driver, message).is_err() {
            return;
        }
    }
}

impl State {
    /// Passes a message on, and its answer back.
    fn pass(&mut self, driver: &Wire, message: Message) -> io::Result<()> {
        let mut said = Said {
            request: message.request,
            payload: message.payload,
            file: message.file,
        };
        match said.request {
            code::SET_PROTOCOL_FEATURES => {
                let features = said.word(0) | protocol::INFLIGHT_SHMFD;
                said.payload = features.to_le_bytes().to_vec();
            }
            code::SET_VRING_NUM if self.inflight.is_none() => self.get_inflight(&said)?,
            _ => {}
        }
        let daemon = self.daemon.as_ref().ok_or_else(gone)?;
        let files: Vec<_> = said.file.iter().map(AsFd::as_fd).collect();
        daemon.send(said.request, message.flags, &said.payload, &files)?;
        let is_question = matches!(
            said.request,
            code::GET_FEATURES
                | code::GET_PROTOCOL_FEATURES
                | code::GET_QUEUE_NUM
                | code::GET_CONFIG
                | code::GET_MAX_MEM_SLOTS
                | code::GET_VRING_BASE
        );
        if is_question || message.flags & NEED_REPLY != 0 {
            let reply = daemon.receive()?.ok_or_else(gone)?;
            driver.send(reply.request, VERSION | REPLY, &reply.payload, &[])?;
        }
        if !is_question {
            self.said.push(said);
        }
        Ok(())
    }

    /// Gets a buffer for rings of the size that a message names.
    fn get_inflight(&mut self, num: &Said) -> io::Result<()> {
        let daemon = self.daemon.as_ref().ok_or_else(gone)?;
        let queues = u16::try_from(QUEUES).expect("few");
        let size = u16::try_from(num.half(4)).map_err(io::Error::other)?;
        let shape = Shape::of(queues, size);
        let inflight = Inflight::of_reply(ask(daemon, code::GET_INFLIGHT_FD, &shape.encode())?);
        hand_over(daemon, &inflight)?;
        self.inflight = Some(inflight);
        Ok(())
    }

    /// Says everything again.
    fn repeat(&self, wire: &Wire, base: Base) -> io::Result<()> {
        ask(wire, code::GET_FEATURES, &[])?;
        ask(wire, code::GET_PROTOCOL_FEATURES, &[])?;
        let mut inflight = self.inflight.as_ref();
        // Up to the protocol features nobody answers.
        let is_last = |said: &Said| said.request == code::SET_PROTOCOL_FEATURES;
        let plain = self.said.iter().position(is_last).ok_or_else(gone)?;
        for (at, said) in self.said.iter().enumerate() {
            let files: Vec<_> = said.file.iter().map(AsFd::as_fd).collect();
            if at <= plain {
                wire.send(said.request, VERSION, &said.payload, &files)?;
                continue;
            }
            match said.request {
                code::SET_VRING_BASE => {
                    let queue = said.half(0);
                    let index = self.index(queue, base).ok_or_else(gone)?;
                    let payload = crate::frontend::vring_state(queue, u32::from(index));
                    tell(wire, said.request, &payload, &files)?;
                    continue;
                }
                code::SET_VRING_NUM => {
                    if let Some(inflight) = inflight.take() {
                        hand_over(wire, inflight)?;
                    }
                }
                _ => {}
            }
            tell(wire, said.request, &said.payload, &files)?;
        }
        Ok(())
    }

    /// An index of a ring, as it stands in memory.
    fn index(&self, queue: u32, which: Base) -> Option<u16> {
        let mut said = self.said.iter();
        let addresses =
            said.find(|said| said.request == code::SET_VRING_ADDR && said.half(0) == queue)?;
        let ring = addresses.word(match which {
            Base::Used => 16,
            Base::Available => 24,
        });
        self.said
            .iter()
            .filter(|said| said.request == code::ADD_MEM_REG)
            .find_map(|region| {
                // Padding, guest address, size, address, place in the file.
                let (size, address) = (region.word(16), region.word(24));
                let within = ring.checked_sub(address).filter(|within| *within < size)?;
                let mut bytes = [0; 2];
                // Behind the flags.
                let at = region.word(32) + within + 2;
                region.file.as_ref()?.read_exact_at(&mut bytes, at).ok()?;
                Some(u16::from_le_bytes(bytes))
            })
    }
}

/// Gives a daemon the buffer.
fn hand_over(wire: &Wire, inflight: &Inflight) -> io::Result<()> {
    let shape = inflight.shape.encode();
    tell(wire, code::SET_INFLIGHT_FD, &shape, &[inflight.as_fd()])
}

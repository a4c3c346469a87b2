//! Tests of an attachment through its socket, over a disk that answers when told to.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod adopted;
mod several;

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use rustix::event::EventfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use stratablk_layers::units::Sector;

use super::sessions::SESSIONS_MAX;
use super::*;
use crate::virtio::test_guest::TestGuest;
use crate::worker::provider::MachineStart;
use crate::worker::test_disk::FakeDisk;

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(10);

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_ENABLE: u32 = 18;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_BACKEND_REQ_FD: u32 = 21;
const RESET_DEVICE: u32 = 34;
/// Protocol features: MQ, REPLY_ACK, BACKEND_REQ, CONFIG, RESET_DEVICE.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13;
/// VERSION_1 and the protocol features bit.
const FEATURES: u64 = 1 << 32 | 1 << 30;

/// A front-end.
struct FrontEnd(UnixStream);

impl FrontEnd {
    /// Sends bytes with descriptors.
    fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let buffers = [IoSlice::new(bytes)];
        rustix::net::sendmsg(&self.0, &buffers, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    fn send(&self, code: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_raw(&message(code, flags, payload), fds).unwrap();
    }

    /// The payload of the next reply; `None` if the connection is closed instead.
    fn reply(&self) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        (&self.0).read_exact(&mut header).ok()?;
        let [.., s0, s1, s2, s3] = header;
        let len = u32::from_le_bytes([s0, s1, s2, s3]);
        let mut payload = vec![0; usize::try_from(len).unwrap()];
        (&self.0).read_exact(&mut payload).ok()?;
        Some(payload)
    }

    /// Sends a message that asks for an acknowledgement. `None`: the connection was closed instead.
    fn told(&self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Option<bool> {
        self.send(code, 9, payload, fds);
        Some(self.reply()? == [0; 8])
    }

    fn ask(&self, code: u32, payload: &[u8]) -> Vec<u8> {
        self.send(code, 1, payload, &[]);
        self.reply().unwrap()
    }

    /// Claims the device and negotiates.
    fn greet(&self) {
        self.ask(GET_FEATURES, &[]);
        self.send(SET_PROTOCOL_FEATURES, 1, &PROTOCOL.to_le_bytes(), &[]);
        assert_eq!(self.told(SET_OWNER, &[], &[]), Some(true));
        assert_eq!(
            self.told(SET_FEATURES, &FEATURES.to_le_bytes(), &[]),
            Some(true)
        );
    }

    /// Starts ring 0 in this guest's memory. Returns its kick.
    fn start_ring(&self, guest: &TestGuest) -> OwnedFd {
        let kick = self.set_up_ring(guest);
        assert_eq!(self.told(SET_VRING_ENABLE, &state(0, 1), &[]), Some(true));
        kick
    }

    /// Says all of ring 0 in this guest's memory, but does not enable it. Returns its kick.
    fn set_up_ring(&self, guest: &TestGuest) -> OwnedFd {
        let (regions, files) = guest.regions();
        let mut table = Vec::new();
        table.extend(u32::try_from(regions.len()).unwrap().to_le_bytes());
        table.extend([0; 4]);
        for region in regions {
            for word in [region.guest.0, region.len, region.user, region.offset] {
                table.extend(word.to_le_bytes());
            }
        }
        let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        assert_eq!(self.told(SET_MEM_TABLE, &table, &fds), Some(true));
        let addresses = guest.addresses();
        assert_eq!(self.told(SET_VRING_NUM, &state(0, 16), &[]), Some(true));
        let mut address = state(0, 0);
        for word in [
            addresses.descriptors,
            addresses.used,
            addresses.available,
            0,
        ] {
            address.extend(word.to_le_bytes());
        }
        assert_eq!(self.told(SET_VRING_ADDR, &address, &[]), Some(true));
        let kick = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        assert_eq!(
            self.told(SET_VRING_KICK, &[0; 8], &[kick.as_fd()]),
            Some(true)
        );
        kick
    }
}

fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let mut bytes = Vec::new();
    for word in [code, flags, len] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// The payload of a message about a ring.
fn state(index: u32, value: u32) -> Vec<u8> {
    [index.to_le_bytes(), value.to_le_bytes()].concat()
}

/// An attachment to a fake disk.
struct Bench {
    disk: Arc<FakeDisk>,
    handle: Option<AttachmentHandle>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(patience: Patience) -> Self {
        let disk = FakeDisk::new(true);
        let provider = Arc::new(AlwaysOpen(Arc::clone(&disk)));
        Self::with(provider, disk, patience)
    }

    /// An attachment to a disk that is lent out.
    fn lent(lender: &Arc<Lender>) -> Self {
        let disk = FakeDisk::new(true);
        Self::with(Arc::clone(lender), disk, Patience::default())
    }

    fn with(provider: Arc<impl DiskProvider>, disk: Arc<FakeDisk>, patience: Patience) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let options = AttachOptions {
            queues: 2,
            patience,
            ..AttachOptions::default()
        };
        let source = SocketSource::Listen(path.clone());
        let handle = Attachment::start(provider, source, options).unwrap();
        Self {
            disk,
            handle: Some(handle),
            path,
            _dir: dir,
        }
    }

    /// Waits until no front-end is connected and its session was cleaned up.
    fn wait_left(&self) {
        let start = Instant::now();
        while self.handle().status().connected {
            assert!(start.elapsed() < DEADLINE);
            std::thread::yield_now();
        }
    }

    fn connect(&self) -> FrontEnd {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        FrontEnd(stream)
    }

    fn handle(&self) -> &AttachmentHandle {
        self.handle.as_ref().unwrap()
    }

    /// Stops, which must not take long.
    fn stop(&mut self) {
        let start = Instant::now();
        self.handle.take().unwrap().stop();
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(!self.path.exists());
    }

    /// A front-end is served.
    fn assert_serves(&self) {
        self.connect().greet();
    }
}

/// What a session did with its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Did {
    Open(MachineStart),
    Close,
    Leave,
}

/// Gives out a fake disk, and takes notes.
#[derive(Debug)]
struct Lender {
    disk: Arc<FakeDisk>,
    did: Mutex<Vec<Did>>,
    /// Whether the disk cannot be opened.
    refuses: AtomicBool,
}

impl Lender {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            disk: FakeDisk::new(true),
            did: Mutex::default(),
            refuses: AtomicBool::new(false),
        })
    }

    fn note(&self, did: Did) {
        self.did.lock().unwrap().push(did);
    }

    /// What was done since the last time.
    fn take(&self) -> Vec<Did> {
        std::mem::take(&mut *self.did.lock().unwrap())
    }
}

impl DiskProvider for Lender {
    type Disk = FakeDisk;

    fn name(&self) -> &str {
        "lent"
    }

    fn capacity(&self) -> Sector {
        Sector(1000)
    }

    fn read_only(&self) -> bool {
        false
    }

    fn open(&self, start: MachineStart) -> io::Result<Arc<FakeDisk>> {
        self.note(Did::Open(start));
        if self.refuses.load(Ordering::Relaxed) {
            return Err(io::Error::other("as the test wants it"));
        }
        assert_eq!(Arc::strong_count(&self.disk), 1, "nobody else has it");
        Ok(Arc::clone(&self.disk))
    }

    fn closed(&self) {
        assert_eq!(Arc::strong_count(&self.disk), 1, "nobody has it any more");
        self.note(Did::Close);
    }

    fn machine_left(&self) {
        self.note(Did::Leave);
    }
}

/// Nobody waits this long in a test.
const FOR_EVER: Patience = Patience {
    message: Duration::from_secs(3600),
    rival: Duration::from_secs(3600),
};

#[test]
fn stopping_waits_for_no_front_end() {
    let connects: [fn(&Bench) -> Option<FrontEnd>; 5] = [
        |_| None,
        |bench| Some(bench.connect()),
        |bench| {
            let front_end = bench.connect();
            front_end
                .send_raw(&message(SET_OWNER, 1, &[])[..5], &[])
                .unwrap();
            Some(front_end)
        },
        |bench| {
            let front_end = bench.connect();
            front_end
                .send_raw(&message(SET_FEATURES, 1, &[0; 8])[..15], &[])
                .unwrap();
            Some(front_end)
        },
        |bench| {
            let front_end = bench.connect();
            front_end.greet();
            Some(front_end)
        },
    ];
    for connect in connects {
        let mut bench = Bench::new(FOR_EVER);
        let front_end = connect(&bench);
        bench.stop();
        if let Some(front_end) = front_end {
            assert_eq!(front_end.reply(), None, "closed");
        }
    }
}

#[test]
fn a_front_end_that_never_reads_holds_up_no_stop() {
    let mut bench = Bench::new(FOR_EVER);
    let front_end = bench.connect();
    front_end.greet();
    front_end.0.set_nonblocking(true).unwrap();
    let question = message(GET_FEATURES, 1, &[]);
    let start = Instant::now();
    // Both directions fill up; then nothing more is taken for a while.
    let mut refusals = 0;
    while refusals < 1000 {
        assert!(start.elapsed() < DEADLINE);
        match (&front_end.0).write_all(&question) {
            Ok(()) => refusals = 0,
            Err(_) => {
                refusals += 1;
                std::thread::yield_now();
            }
        }
    }
    bench.stop();
}

#[test]
fn an_unfinished_message_has_a_deadline() {
    let bench = Bench::new(Patience {
        message: Duration::from_millis(50),
        rival: Duration::from_secs(3600),
    });
    for bytes in [
        &message(SET_OWNER, 1, &[])[..5],
        &message(SET_FEATURES, 1, &[0; 8])[..15],
        &[],
    ] {
        let front_end = bench.connect();
        if !bytes.is_empty() {
            front_end.send_raw(bytes, &[]).unwrap();
        }
        assert_eq!(front_end.reply(), None, "closed");
    }
    bench.assert_serves();
}

#[test]
fn a_message_may_come_in_pieces() {
    let bench = Bench::new(Patience::default());
    let front_end = bench.connect();
    for byte in message(GET_FEATURES, 1, &[]) {
        front_end.send_raw(&[byte], &[]).unwrap();
    }
    assert!(front_end.reply().is_some());
    front_end.greet();
    for byte in message(SET_FEATURES, 9, &FEATURES.to_le_bytes()) {
        front_end.send_raw(&[byte], &[]).unwrap();
    }
    assert_eq!(front_end.reply(), Some(vec![0; 8]));
    // A header in two pieces, of which the first brings a descriptor.
    let kick = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let bytes = message(SET_VRING_KICK, 9, &[0; 8]);
    front_end.send_raw(&bytes[..4], &[kick.as_fd()]).unwrap();
    front_end.send_raw(&bytes[4..], &[]).unwrap();
    assert_eq!(front_end.reply(), Some(vec![0; 8]));
}

#[test]
fn a_refused_message_costs_the_session_only_if_it_cannot_be_told() {
    let bench = Bench::new(Patience::default());
    let front_end = bench.connect();
    front_end.greet();
    assert_eq!(
        front_end.told(SET_VRING_NUM, &state(0, 3), &[]),
        Some(false)
    );
    assert_eq!(
        front_end.told(SET_VRING_NUM, &state(7, 16), &[]),
        Some(false)
    );
    assert_eq!(
        front_end.told(SET_VRING_NUM, &state(0, 16), &[]),
        Some(true)
    );
    front_end.send(SET_VRING_NUM, 1, &state(0, 3), &[]);
    assert_eq!(front_end.reply(), None, "closed");
    bench.assert_serves();
}

#[test]
fn a_resize_is_told_while_rings_run_and_not_otherwise() {
    let bench = Bench::new(Patience::default());
    bench.handle().notify_resize().unwrap();
    let front_end = bench.connect();
    front_end.greet();
    let (theirs, ours) = UnixStream::pair().unwrap();
    let told = front_end.told(SET_BACKEND_REQ_FD, &[], &[ours.as_fd()]);
    assert_eq!(told, Some(true));
    drop(ours);
    bench.handle().notify_resize().unwrap();
    let guest = TestGuest::new(16);
    let _kick = front_end.start_ring(&guest);
    assert_eq!(bench.handle().status().rings_running, 1);
    bench.handle().notify_resize().unwrap();
    front_end.ask(GET_VRING_BASE, &state(0, 0));
    bench.handle().notify_resize().unwrap();
    drop(front_end);
    let mut messages = Vec::new();
    (&theirs).read_to_end(&mut messages).unwrap();
    assert_eq!(
        messages,
        message(2, 1, &[]),
        "one message, while the ring was running"
    );
}

#[test]
fn a_panic_of_a_worker_ends_its_session_and_no_other() {
    let bench = Bench::new(Patience::default());
    let front_end = bench.connect();
    front_end.greet();
    let guest = TestGuest::new(16);
    let kick = front_end.start_ring(&guest);
    bench.disk.state().panic = true;
    guest.offer(0);
    rustix::io::write(&kick, &[1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    assert_eq!(front_end.reply(), None, "closed");
    bench.disk.state().panic = false;
    bench.assert_serves();
}

#[test]
fn one_connection_can_be_inherited() {
    let (theirs, ours) = UnixStream::pair().unwrap();
    let disk = FakeDisk::new(true);
    let handle = start_disk(
        disk,
        SocketSource::Fd(ours.into()),
        AttachOptions::default(),
    )
    .unwrap();
    theirs.set_read_timeout(Some(DEADLINE)).unwrap();
    let front_end = FrontEnd(theirs);
    front_end.greet();
    assert!(handle.status().connected && !handle.status().ended);
    drop(front_end);
    let start = Instant::now();
    while !handle.status().ended {
        assert!(start.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
    assert_eq!(handle.status().sessions, 1);
}

#[test]
fn impossible_numbers_of_queues_are_refused() {
    for queues in [0, QUEUES_MAX + 1, u16::MAX] {
        let (_theirs, ours) = UnixStream::pair().unwrap();
        let options = AttachOptions {
            queues,
            ..AttachOptions::default()
        };
        let refused = start_disk(FakeDisk::new(true), SocketSource::Fd(ours.into()), options);
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
fn a_disk_is_open_while_rings_run() {
    use Did::{Close, Leave, Open};
    use MachineStart::{Again, Fresh};
    let lender = Lender::new();
    let mut bench = Bench::lent(&lender);
    bench.assert_serves();
    bench.wait_left();
    assert_eq!(lender.take(), [], "no ring ran");

    let front_end = bench.connect();
    front_end.greet();
    let guest = TestGuest::new(16);
    let _kick = front_end.start_ring(&guest);
    assert_eq!(lender.take(), [Open(Fresh)]);
    assert_eq!(
        front_end.told(SET_VRING_ENABLE, &state(0, 0), &[]),
        Some(true)
    );
    assert_eq!(lender.take(), [], "a disabled ring may go on");
    front_end.ask(GET_VRING_BASE, &state(0, 0));
    assert_eq!(lender.take(), [Close]);
    front_end.ask(GET_VRING_BASE, &state(0, 0));
    assert_eq!(lender.take(), []);
    let _kick = front_end.start_ring(&guest);
    assert_eq!(lender.take(), [Open(Again)]);
    assert_eq!(front_end.told(RESET_DEVICE, &[], &[]), Some(true));
    assert_eq!(lender.take(), [Close]);
    front_end.greet();
    let _kick = front_end.start_ring(&guest);
    drop(front_end);
    bench.wait_left();
    assert_eq!(lender.take(), [Open(Again), Close, Leave]);

    let front_end = bench.connect();
    front_end.greet();
    let _kick = front_end.start_ring(&guest);
    bench.stop();
    assert_eq!(
        lender.take(),
        [Open(Fresh), Close],
        "we left, not the machine"
    );
}

#[test]
fn a_machine_that_goes_on_is_told_from_one_that_starts() {
    use Did::{Close, Leave, Open};
    let lender = Lender::new();
    let bench = Bench::lent(&lender);
    let start = |base: u32, guest: &TestGuest| {
        let front_end = bench.connect();
        front_end.greet();
        assert_eq!(
            front_end.told(SET_VRING_BASE, &state(0, base), &[]),
            Some(true)
        );
        let kick = front_end.start_ring(guest);
        (front_end, kick)
    };
    let left = |connection: (FrontEnd, OwnedFd)| {
        drop(connection);
        bench.wait_left();
        lender.take()
    };
    let guest = TestGuest::new(16);
    let connection = start(0, &guest);
    assert_eq!(left(connection), [Open(MachineStart::Fresh), Close, Leave]);
    let connection = start(3, &guest);
    assert_eq!(
        left(connection),
        [Open(MachineStart::Continued), Close, Leave]
    );
    // A base that has wrapped.
    guest.leave_used(15, 0, 1);
    let connection = start(0, &guest);
    assert_eq!(
        left(connection),
        [Open(MachineStart::Continued), Close, Leave]
    );
    // Nobody has said anything of ring 1 when ring 0 starts but its base.
    let fresh = TestGuest::new(16);
    let front_end = bench.connect();
    front_end.greet();
    assert_eq!(
        front_end.told(SET_VRING_BASE, &state(1, 9), &[]),
        Some(true)
    );
    let kick = front_end.start_ring(&fresh);
    assert_eq!(
        left((front_end, kick)),
        [Open(MachineStart::Continued), Close, Leave]
    );
}

#[test]
fn a_disk_that_cannot_be_opened_costs_the_ring_and_not_the_session() {
    use Did::{Close, Leave, Open};
    let lender = Lender::new();
    let bench = Bench::lent(&lender);
    lender.refuses.store(true, Ordering::Relaxed);
    let front_end = bench.connect();
    front_end.greet();
    let guest = TestGuest::new(16);
    let _kick = front_end.set_up_ring(&guest);
    let enable = || front_end.told(SET_VRING_ENABLE, &state(0, 1), &[]);
    assert_eq!(enable(), Some(false));
    assert_eq!(bench.handle().status().rings_running, 0);
    lender.refuses.store(false, Ordering::Relaxed);
    assert_eq!(enable(), Some(true));
    assert_eq!(bench.handle().status().rings_running, 1);
    drop(front_end);
    bench.wait_left();
    let fresh = Open(MachineStart::Fresh);
    assert_eq!(lender.take(), [fresh, fresh, Close, Leave]);
}

//! Tests of the guard, on memory that is taken away and memory that is nobody's.

#![expect(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;

use vm_memory::volatile_memory::VolatileMemory;

use super::super::mapping::Mapping;
use super::*;

/// Tells the test program that it is the child which is to die, and how.
const CHILD: &str = "STRATABLK_TEST_FAULT";
/// Bytes of a page, at least.
const PAGE: usize = 4096;

fn memfd(len: usize) -> File {
    let fd = rustix::fs::memfd_create("guard", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len as u64).unwrap();
    file
}

fn map(file: &File, len: usize) -> Mapping {
    Mapping::shared(file, 0, len as u64).unwrap()
}

fn read(mapping: &Mapping, offset: usize) -> u8 {
    let mut byte = [0xff];
    mapping.get_slice(offset, 1).unwrap().copy_to(&mut byte);
    byte[0]
}

fn write(mapping: &Mapping, offset: usize, byte: u8) {
    mapping.get_slice(offset, 1).unwrap().copy_from(&[byte]);
}

#[test]
fn a_region_that_is_cut_holds_zeroes_and_is_noted() {
    let (file, other) = (memfd(8 * PAGE), memfd(PAGE));
    let (mapping, neighbour) = (map(&file, 8 * PAGE), map(&other, PAGE));
    let late = map(&file, 8 * PAGE);
    for byte in 0..8 * PAGE {
        write(&mapping, byte, 7);
    }
    write(&neighbour, 0, 9);
    file.set_len(PAGE as u64).unwrap();
    let before = losses();
    assert_eq!(read(&mapping, 0), 7, "what is left is left");
    assert!(!mapping.is_lost());
    assert_eq!(read(&mapping, PAGE), 0);
    assert_ne!(losses(), before);
    assert!(mapping.is_lost());
    assert_eq!(read(&mapping, 0), 0, "all of it goes at once");
    write(&mapping, 5 * PAGE, 1);
    assert_eq!(
        read(&mapping, 5 * PAGE),
        1,
        "the void takes what it is given"
    );
    assert!(!late.is_lost() && !neighbour.is_lost());
    assert_eq!((read(&late, 0), read(&neighbour, 0)), (7, 9));
    // The place of a lost region is as good as new for the next one.
    drop(mapping);
    let again = map(&other, PAGE);
    assert!(!again.is_lost());
    assert_eq!(read(&again, 0), 9);
}

#[test]
fn threads_lose_one_region_while_others_come_and_go() {
    const THREADS: usize = 4;
    const ROUNDS: usize = 50;
    for round in 0..ROUNDS {
        let file = memfd(64 * PAGE);
        let mapping = map(&file, 64 * PAGE);
        write(&mapping, 0, 1);
        file.set_len(0).unwrap();
        thread::scope(|scope| {
            for number in 0..THREADS {
                let mapping = &mapping;
                scope.spawn(move || {
                    let own = memfd(2 * PAGE);
                    let short_lived = map(&own, 2 * PAGE);
                    for page in 0..64 {
                        let offset = (page * 7 + number + round) % 64 * PAGE;
                        assert_eq!(read(mapping, offset), 0);
                        assert!(mapping.is_lost());
                    }
                    write(&short_lived, PAGE, 3);
                    assert!(!short_lived.is_lost());
                    own.set_len(0).unwrap();
                    assert_eq!(read(&short_lived, PAGE), 0);
                    assert!(short_lived.is_lost());
                });
            }
        });
    }
}

#[test]
fn an_entry_that_is_being_changed_claims_nothing() {
    let entry = Entry::empty();
    assert_eq!(entry.claims(0), None, "no region");
    entry.change(0x5000, 0x2000);
    assert_eq!(entry.claims(0x4fff), None);
    assert_eq!(entry.claims(0x5000), Some((0x5000, 0x2000)));
    assert_eq!(entry.claims(0x6fff), Some((0x5000, 0x2000)));
    assert_eq!(entry.claims(0x7000), None);
    entry.version.fetch_add(1, Ordering::Relaxed);
    assert_eq!(entry.claims(0x5000), None, "half of it may be another's");
}

/// Faults or is sent a signal as the parent wants it; must not return.
fn fault(how: &str) {
    if how != "runtime" {
        // As in a process whose runtime takes no signals.
        set_action(Some(&default_action())).unwrap();
    }
    let guarded = map(&memfd(PAGE), PAGE);
    if how == "sent" {
        #[expect(unsafe_code, reason = "sends a signal")]
        // SAFETY: takes a number.
        unsafe {
            libc::raise(libc::SIGBUS)
        };
        return;
    }
    let file = memfd(PAGE);
    let flags = MapFlags::SHARED;
    #[expect(unsafe_code, reason = "memory that is not guarded")]
    // SAFETY: a new mapping at an address of the kernel's choice.
    let place =
        unsafe { rustix::mm::mmap(ptr::null_mut(), PAGE, ProtFlags::READ, flags, &file, 0) };
    let place = place.unwrap().cast::<u8>();
    file.set_len(0).unwrap();
    #[expect(unsafe_code, reason = "faults")]
    // SAFETY: mapped; that the page is gone is what this is about.
    let byte = unsafe { place.read_volatile() };
    drop((guarded, byte));
}

#[test]
fn a_fault_elsewhere_still_kills() {
    if let Ok(how) = std::env::var(CHILD) {
        return fault(&how);
    }
    for how in ["runtime", "default", "sent"] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "vhost::guard::tests::a_fault_elsewhere_still_kills",
            ])
            .env(CHILD, how)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{how}: {status}");
    }
}

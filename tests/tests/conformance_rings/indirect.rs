//! Indirect tables (line 17).

use stratablk_tests::disk::Disk;
use stratablk_tests::guest::{GuestOptions, Verdict};
use stratablk_tests::launch::Server;
use stratablk_tests::pattern;
use stratablk_tests::request::feature::RING_INDIRECT;
use stratablk_tests::request::{S_OK, T_FLUSH, T_IN};
use stratablk_tests::ring::{DESCRIPTOR_BYTES, Descriptor, F_INDIRECT, F_WRITE, indirect};

use crate::{assert_chain_refused, submit_raw};

/// Line 17: a chain in an indirect table is carried out.
#[test]
fn c17_indirect_chains_work() {
    let server = Server::start();
    let mut guest = server.guest();
    assert_ne!(
        guest.features & RING_INDIRECT,
        0,
        "INDIRECT_DESC is offered"
    );
    for sector in 0..20 {
        let buffers = guest.read_of(sector);
        let table = indirect(&guest.memory, &buffers);
        assert!(
            matches!(submit_raw(&mut guest, &[table]), Verdict::Returned(used) if used.len == 513)
        );
        guest.assert_read(&buffers, sector);
    }
}

/// Line 17: the WRITE flag of the descriptor of a table means nothing.
#[test]
fn c17_write_flag_of_a_table_is_ignored() {
    let server = Server::start();
    let mut guest = server.guest();
    let buffers = guest.read_of(9);
    let table = indirect(&guest.memory, &buffers);
    let verdict = submit_raw(
        &mut guest,
        &[Descriptor {
            flags: F_INDIRECT | F_WRITE,
            ..table
        }],
    );
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    guest.assert_read(&buffers, 9);
}

/// Line 17: normal descriptors may come before the one with the table.
#[test]
fn c17_normal_descriptors_before_a_table_work() {
    let server = Server::start();
    let mut guest = server.guest();
    let buffers = guest.read_of(12);
    let [first, rest] = buffers[0].split(5);
    let table = indirect(&guest.memory, &[rest, buffers[1], buffers[2]]);
    let verdict = submit_raw(&mut guest, &[Descriptor::of(first), table]);
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    guest.assert_read(&buffers, 12);
    let buffers = guest.read_of(13);
    let table = indirect(&guest.memory, &buffers[2..]);
    let normal = [
        Descriptor::of(buffers[0]),
        Descriptor::of(buffers[1]),
        table,
    ];
    let verdict = submit_raw(&mut guest, &normal);
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    guest.assert_read(&buffers, 13);
}

/// Line 17: a table in a table is refused.
#[test]
fn c17_nested_tables_are_refused() {
    let mut server = Server::start();
    assert_chain_refused(&mut server, "a table in a table", |guest, status| {
        let inner = indirect(&guest.memory, &[guest.header(T_FLUSH, 0), status]);
        let outer = guest.memory.readable(&inner.encode());
        vec![Descriptor::table(outer.gpa, outer.len)]
    });
    assert_chain_refused(&mut server, "a table that holds itself", |guest, _| {
        let gpa = guest.memory.allocate(DESCRIPTOR_BYTES, 16);
        let itself = Descriptor::table(gpa, 16);
        guest.memory.write(gpa, &itself.encode());
        vec![itself]
    });
}

/// Line 17: tables of no length, of a length that is not whole descriptors, or outside memory are refused.
#[test]
fn c17_odd_tables_are_refused() {
    let mut server = Server::start();
    for bytes in [0, 1, 8, 15, 17, 31, 33, 40, u32::MAX] {
        assert_chain_refused(
            &mut server,
            &format!("a table of {bytes} bytes"),
            |guest, status| {
                let table = indirect(&guest.memory, &[guest.header(T_FLUSH, 0), status]);
                vec![Descriptor {
                    len: bytes,
                    ..table
                }]
            },
        );
    }
    for addr in [0, 1 << 45, u64::MAX - 15, u64::MAX - 31] {
        assert_chain_refused(&mut server, &format!("a table at {addr:#x}"), |_, _| {
            vec![Descriptor::table(addr, 32)]
        });
    }
    assert_chain_refused(&mut server, "a table over the end of memory", |guest, _| {
        vec![Descriptor::table(guest.memory.end() - 16, 32)]
    });
}

/// Line 17: a descriptor with a table and a successor is refused: nothing may follow a table.
#[test]
fn c17_a_table_ends_its_chain() {
    let mut server = Server::start();
    assert_chain_refused(
        &mut server,
        "a descriptor behind a table",
        |guest, status| {
            let read = guest.read_of(0);
            let table = indirect(&guest.memory, &read[..2]);
            vec![table, Descriptor::of(status)]
        },
    );
}

/// Line 17: inside a table `next` counts from the table's start; beyond its end it is refused, in a circle it ends.
#[test]
fn c17_links_inside_a_table_are_checked() {
    let mut server = Server::start();
    for next in [2, 3, 100, u16::MAX] {
        assert_chain_refused(
            &mut server,
            &format!("a link to {next} of 2"),
            |guest, status| {
                let first = Descriptor::of(guest.header(T_FLUSH, 0)).then(next);
                let bytes = [first.encode(), Descriptor::of(status).encode()].concat();
                let table = guest.memory.readable(&bytes);
                vec![Descriptor::table(table.gpa, table.len)]
            },
        );
    }
    assert_chain_refused(&mut server, "a circle in a table", |guest, status| {
        let first = Descriptor::of(guest.header(T_FLUSH, 0)).then(1);
        let bytes = [first.encode(), Descriptor::of(status).then(1).encode()].concat();
        let table = guest.memory.readable(&bytes);
        vec![Descriptor::table(table.gpa, table.len)]
    });
}

/// Line 17: a table may be as long as the ring, whatever part of it the chain uses.
#[test]
fn c17_tables_as_long_as_the_ring_work() {
    let server = Server::start();
    let mut guest = server.guest();
    let count = u32::from(guest.rings[0].size);
    let area = guest.memory.writable((count - 2) * 512 + 1);
    let [data, status] = area.split(area.len - 1);
    let buffers = [vec![guest.header(T_IN, 0)], data.pieces(512), vec![status]].concat();
    assert_eq!(u32::try_from(buffers.len()), Ok(count));
    let table = indirect(&guest.memory, &buffers);
    let verdict = submit_raw(&mut guest, &[table]);
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    assert_eq!(guest.last_byte(status), S_OK);
    pattern::assert_same(
        &guest.memory.bytes(data),
        &pattern::base(0, u64::from(count) - 2),
        "a read",
    );
}

/// Line 17: a table of an enormous number of descriptors, all valid, costs its guest a request and no more.
#[test]
fn c17_enormous_tables_are_refused() {
    let mut server = Server::start();
    let before = server.process.resident_kib();
    assert_chain_refused(&mut server, "32768 descriptors", |guest, status| {
        let byte = guest.memory.readable(&[0]);
        let buffers: Vec<_> = std::iter::repeat_n(byte, 32_767).chain([status]).collect();
        vec![indirect(&guest.memory, &buffers)]
    });
    assert!(
        server.process.resident_kib() < before + 64 * 1024,
        "memory did not grow"
    );
}

/// Line 17: as many segments as `seg_max` allows fit one request also where the ring is shorter, as Linux makes them.
#[test]
fn c17_seg_max_segments_fit_a_short_ring() {
    let server = Server::start();
    let mut guest = server.guest_with(GuestOptions {
        ring_size: 16,
        ..GuestOptions::default()
    });
    let bytes = guest.front_end.config(12, 4);
    let count = u32::from_le_bytes(bytes.try_into().expect("4 bytes")).min(1022);
    let area = guest.memory.writable(count * 512 + 1);
    let [data, status] = area.split(area.len - 1);
    let buffers = [vec![guest.header(T_IN, 0)], data.pieces(512), vec![status]].concat();
    let table = indirect(&guest.memory, &buffers);
    let verdict = submit_raw(&mut guest, &[table]);
    assert!(matches!(verdict, Verdict::Returned(_)), "{verdict:?}");
    assert_eq!(guest.last_byte(status), S_OK);
    pattern::assert_same(
        &guest.memory.bytes(data),
        &pattern::base(0, u64::from(count)),
        "a read",
    );
}

/// A disk works through a table for every request, as Linux guests do.
#[test]
fn c17_a_disk_through_the_usual_wrapper() {
    let server = Server::start();
    let mut disk = Disk::new(server.guest());
    disk.write(1, &pattern::stamped(4, 1, 100));
    pattern::assert_same(&disk.read(1, 100), &pattern::stamped(4, 1, 100), "the disk");
}

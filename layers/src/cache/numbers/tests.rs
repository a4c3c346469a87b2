#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::collections::HashSet;

use super::*;

/// A file with an empty table.
fn empty() -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MARKS_AT + MARKS_BYTES).unwrap();
    Arc::new(file)
}

fn open(file: &Arc<File>) -> Numbers {
    Numbers::open(file.clone(), Path::new("arena")).unwrap()
}

/// A table that no write goes to.
fn read_only() -> (tempfile::NamedTempFile, Numbers) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut numbers = open_at(file.path(), true);
    numbers.number(layer(1)).unwrap();
    numbers = open_at(file.path(), false);
    (file, numbers)
}

fn open_at(path: &Path, write: bool) -> Numbers {
    let file = File::options().read(true).write(write).open(path).unwrap();
    if write {
        file.set_len(MARKS_AT + MARKS_BYTES).unwrap();
    }
    Numbers::open(Arc::new(file), path).unwrap()
}

fn layer(n: u128) -> LayerId {
    LayerId(Uuid::from_u128(0xa1 << 120 | n))
}

#[test]
fn a_layer_has_one_number_and_keeps_it() {
    let file = empty();
    for numbers in [Numbers::private(), open(&file)] {
        for n in 1..=100 {
            assert_eq!(numbers.number(layer(n.into())).unwrap(), LayerNumber(n));
        }
        for n in 1..=100 {
            assert_eq!(numbers.number(layer(n.into())).unwrap(), LayerNumber(n));
            assert_eq!(numbers.layer(LayerNumber(n)), Some(layer(n.into())));
        }
        for n in [0, 101, LAYER_NUMBER_MAX, u32::MAX] {
            assert_eq!(numbers.layer(LayerNumber(n)), None);
        }
    }
    let again = open(&file);
    let expected: Vec<_> = (1..=100)
        .map(|n| (LayerNumber(n), layer(n.into())))
        .collect();
    assert_eq!(again.layers(), expected);
    assert_eq!(again.number(layer(101)).unwrap(), LayerNumber(101));
}

#[test]
fn a_forgotten_number_is_given_again() {
    let file = empty();
    let numbers = open(&file);
    for n in 1..=5 {
        numbers.number(layer(n)).unwrap();
    }
    numbers.forget(layer(4)).unwrap();
    numbers.forget(layer(2)).unwrap();
    numbers.forget(layer(2)).unwrap();
    numbers.forget(layer(77)).unwrap();
    assert_eq!(numbers.layer(LayerNumber(2)), None);
    for numbers in [open(&file), numbers] {
        let left: Vec<_> = numbers
            .layers()
            .iter()
            .map(|(number, _)| number.0)
            .collect();
        assert_eq!(left, [1, 3, 5]);
        // The file changes under whoever comes second, which has an index of its own.
        for expected in [2, 4, 6] {
            assert_eq!(
                numbers.number(layer(expected.into())).unwrap(),
                LayerNumber(expected)
            );
        }
    }
}

#[test]
fn an_entry_is_that_of_the_specification() {
    let file = empty();
    let numbers = open(&file);
    let id = LayerId(Uuid::from_bytes(*b"the layer's uuid"));
    numbers.number(layer(1)).unwrap();
    numbers.number(id).unwrap();
    let mut entry = [0; 32];
    file.read_exact_at(&mut entry, 4096 + 32).unwrap();
    assert_eq!(&entry[..16], b"the layer's uuid");
    let crc = crc32c::crc32c(b"\x02\0\0\0the layer's uuid");
    assert_eq!(entry[16..20], crc.to_le_bytes());
    assert_eq!(entry[20..], [0; 12]);
    assert_eq!(TABLE_BYTES, 32 << 20);
}

/// A process may be killed after any byte of an entry: there is the entry or none.
#[test]
fn half_an_entry_is_none() {
    let (id, number) = (
        LayerId(Uuid::from_bytes(*b"the layer's uuid")),
        LayerNumber(1),
    );
    let (whole, none) = (encode(number, id), [0; ENTRY_BYTES]);
    let mut seen = HashSet::new();
    for (before, after) in [(none, whole), (whole, none)] {
        for written in 0..=ENTRY_BYTES {
            let mut entry = before;
            entry[..written].copy_from_slice(&after[..written]);
            let expected = (entry == whole).then_some(id);
            assert_eq!(decode(number, &entry), expected, "{written}");
            seen.insert(entry);
            // A few of them in a table, which takes longer.
            if ![0, 1, 16, 19, 20, 32].contains(&written) {
                continue;
            }

            let file = empty();
            file.write_all_at(&entry, TABLE_AT).unwrap();
            let numbers = open(&file);
            assert_eq!(numbers.layer(number), expected);
            // And its number is as good as any.
            let next = if expected.is_some() { 2 } else { 1 };
            assert_eq!(numbers.number(layer(9)).unwrap(), LayerNumber(next));
            assert_eq!(open(&file).layers(), numbers.layers());
        }
    }
    // The entries were not all the same.
    assert!(seen.len() > 30, "{}", seen.len());
}

#[test]
fn a_changed_or_moved_entry_is_none() {
    let entry = encode(LayerNumber(3), layer(3));
    assert_eq!(decode(LayerNumber(3), &entry), Some(layer(3)));
    for number in [0, 2, 4, u32::MAX] {
        assert_eq!(decode(LayerNumber(number), &entry), None);
    }
    for bit in 0..ENTRY_BYTES * 8 {
        let mut changed = entry;
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(decode(LayerNumber(3), &changed), None, "bit {bit}");
    }
    let nil = encode(LayerNumber(3), LayerId(Uuid::nil()));
    assert_eq!(decode(LayerNumber(3), &nil), None);
    assert_eq!(decode(LayerNumber(3), &entry[..31]), None);
}

#[test]
fn a_layer_with_two_numbers_is_damage() {
    let file = empty();
    for number in [5, 3000].map(LayerNumber) {
        let entry = encode(number, layer(1));
        file.write_all_at(&entry, position(number)).unwrap();
    }
    let error = Numbers::open(file, Path::new("arena")).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(
        error.to_string().contains("the numbers 5 and 3000"),
        "{error}"
    );
}

#[test]
fn the_last_number_is_found_and_the_gaps_are_used() {
    let file = empty();
    let last = LayerNumber(LAYER_NUMBER_MAX);
    file.write_all_at(&encode(last, layer(1)), TABLE_AT + TABLE_BYTES - 32)
        .unwrap();
    let numbers = open(&file);
    assert_eq!(numbers.layers(), [(last, layer(1))]);
    assert_eq!(numbers.number(layer(2)).unwrap(), LayerNumber(1));
    assert_eq!(numbers.number(layer(3)).unwrap(), LayerNumber(2));
}

#[test]
fn a_full_table_says_so() {
    let numbers = Numbers::new(None, LayerNumber(3));
    for n in 1..=3 {
        numbers.number(layer(n)).unwrap();
    }
    let error = numbers.number(layer(4)).unwrap_err();
    assert!(
        error.to_string().contains("all 3 layer numbers are taken"),
        "{error}"
    );
    assert_eq!(numbers.number(layer(2)).unwrap(), LayerNumber(2));
    numbers.forget(layer(2)).unwrap();
    assert_eq!(numbers.number(layer(4)).unwrap(), LayerNumber(2));
    assert!(numbers.number(layer(2)).is_err());
}

#[test]
fn the_nil_uuid_is_no_layer() {
    let numbers = Numbers::private();
    let error = numbers.number(LayerId(Uuid::nil())).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    assert_eq!(numbers.layers(), []);
}

#[test]
fn what_cannot_be_written_does_not_happen() {
    let (_file, numbers) = read_only();
    assert!(matches!(
        numbers.number(layer(2)),
        Err(Error::Io { op: "write", .. })
    ));
    assert!(matches!(
        numbers.forget(layer(1)),
        Err(Error::Io { op: "write", .. })
    ));
    assert_eq!(numbers.layers(), [(LayerNumber(1), layer(1))]);
}

#[test]
fn threads_agree() {
    let file = empty();
    let numbers = open(&file);
    let ask = || {
        let given = (1..=200).map(|n| numbers.number(layer(n)).unwrap());
        given.collect::<Vec<_>>()
    };
    let answers = std::thread::scope(|scope| {
        let askers = [0; 4].map(|_| scope.spawn(ask));
        askers.map(|asker| asker.join().unwrap())
    });
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!(answers[0].iter().collect::<HashSet<_>>().len(), 200);
    assert_eq!(open(&file).layers(), numbers.layers());
}

#[test]
fn a_failed_layer_stays_marked_until_it_is_cleared_or_gone() {
    let file = empty();
    let numbers = open(&file);
    for n in 1..=4 {
        numbers.number(layer(n)).unwrap();
    }
    assert_eq!(numbers.failed(), []);
    numbers.set_failed(LayerNumber(2), true).unwrap();
    numbers.set_failed(LayerNumber(3), true).unwrap();
    numbers.set_failed(LayerNumber(3), true).unwrap();
    numbers.set_failed(LayerNumber(4), true).unwrap();
    assert_eq!(numbers.failed(), [layer(2), layer(3), layer(4)]);
    let again = open(&file);
    assert_eq!(again.failed(), [layer(2), layer(3), layer(4)]);
    again.set_failed(LayerNumber(4), false).unwrap();
    again.forget(layer(3)).unwrap();
    assert_eq!(again.failed(), [layer(2)]);
    assert_eq!(open(&file).failed(), [layer(2)]);
    // The next layer of the number has nothing to do with it; not even if the mark was left.
    file.write_all_at(&[1], MARKS_AT + 2).unwrap();
    let again = open(&file);
    assert_eq!(again.failed(), [layer(2)]);
    assert_eq!(again.number(layer(9)).unwrap(), LayerNumber(3));
    assert_eq!(again.failed(), [layer(2)]);
    assert_eq!(open(&file).failed(), [layer(2)]);
    // The last number has its place in front of the sets.
    assert!(mark_position(LayerNumber(LAYER_NUMBER_MAX)) < 34 << 20);
    assert_eq!(mark_position(LayerNumber(1)), 33_558_528);
}

#[test]
fn the_two_marks_of_a_layer_are_apart_and_an_unknown_one_says_that_it_has_failed() {
    let file = empty();
    let numbers = open(&file);
    for n in 1..=3 {
        numbers.number(layer(n)).unwrap();
    }
    numbers.set_past(LayerNumber(1), true).unwrap();
    numbers.set_past(LayerNumber(2), true).unwrap();
    numbers.set_failed(LayerNumber(2), true).unwrap();
    let found = |numbers: &Numbers| (numbers.past(), numbers.failed());
    let both = (vec![LayerNumber(1), LayerNumber(2)], vec![layer(2)]);
    assert_eq!(found(&numbers), both);
    assert_eq!(found(&numbers.copy()), both);
    let again = open(&file);
    assert_eq!(found(&again), both);
    again.set_past(LayerNumber(2), false).unwrap();
    again.set_past(LayerNumber(1), false).unwrap();
    assert_eq!(found(&open(&file)), (vec![], vec![layer(2)]));
    file.write_all_at(&[4], MARKS_AT).unwrap();
    let unknown = open(&file);
    assert_eq!(found(&unknown), (vec![], vec![layer(1), layer(2)]));
    // A recovery ends that too.
    unknown.set_failed(LayerNumber(1), false).unwrap();
    assert_eq!(found(&open(&file)), (vec![], vec![layer(2)]));
}

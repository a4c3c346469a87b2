//! Several processes and one arena: this program starts itself again.

use super::*;

/// Plays the process that is killed: with an arena in which everything is marked.
#[test]
fn child_with_an_arena() {
    let Some(place) = place_for_child() else {
        return;
    };
    let arena = Arena::create(&place, 3).unwrap();
    mark_all(&arena);
    arena.numbers().number(layer(7)).unwrap();
    println!("\nmarked");
    // Ends by being killed, or with its parent.
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn an_arena_outlives_a_killed_process() {
    let home = Home::new();
    let mut child = child("child_with_an_arena", &home);
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut lines = lines.map(Result::unwrap);
    assert!(lines.any(|line| line == "marked"));
    // It lives, so the arena is its own.
    assert!(matches!(
        Arena::adopt(&home.place()),
        Err(Error::Busy { .. })
    ));
    assert!(matches!(
        Arena::create(&home.place(), 3),
        Err(Error::Busy { .. })
    ));
    child.kill().unwrap();
    child.wait().unwrap();
    let arena = Arena::adopt(&home.place()).unwrap().unwrap();
    assert!(all_marked(&arena));
    assert_eq!(arena.numbers().layer(LayerNumber(1)), Some(layer(7)));
}

/// Plays the process that is killed while it gives and takes numbers, and says so after each.
#[test]
fn child_with_changing_numbers() {
    let Some(place) = place_for_child() else {
        return;
    };
    let arena = Arena::create(&place, 1).unwrap();
    let mut out = io::stdout().lock();
    writeln!(out).unwrap();
    for n in 1.. {
        let number = arena.numbers().number(layer(n)).unwrap();
        // A pipe that is closed is the end of it.
        if writeln!(out, "has {n} {number}").is_err() {
            return;
        }
        if n.is_multiple_of(3) {
            let _ = writeln!(out, "loses {}", n / 3);
            arena.numbers().forget(layer(n / 3)).unwrap();
        }
    }
}

#[test]
fn numbers_that_were_given_outlive_a_killed_process() {
    for round in 0..12usize {
        let home = Home::new();
        let mut child = child("child_with_changing_numbers", &home);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut lines = lines
            .map(Result::unwrap)
            .filter(|line| line.starts_with("has") || line.starts_with("loses"));
        let mut said: Vec<_> = lines.by_ref().take(1 + round * 97).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        // And what it said meanwhile. A line goes into a pipe whole or not at all.
        said.extend(lines);
        let mut given = std::collections::HashMap::new();
        for line in &said {
            let words: Vec<u128> = line
                .split(' ')
                .skip(1)
                .map(|word| word.parse().unwrap())
                .collect();
            match words[..] {
                [n, number] => drop(given.insert(n, number)),
                [n] => drop(given.remove(&n)),
                _ => panic!("{line:?}"),
            }
        }
        let arena = Arena::adopt(&home.place()).unwrap().unwrap();
        assert!(!given.is_empty());
        for (n, number) in given {
            let number = LayerNumber(u32::try_from(number).unwrap());
            assert_eq!(
                arena.numbers().layer(number),
                Some(layer(n)),
                "round {round}"
            );
        }
    }
}

/// Plays the process that is killed while it makes an arena or removes one.
#[test]
fn child_with_many_arenas() {
    let Some(place) = place_for_child() else {
        return;
    };
    let mut out = io::stdout().lock();
    writeln!(out).unwrap();
    loop {
        let arena = Arena::create(&place, 40).unwrap();
        if writeln!(out, "made").is_err() {
            return;
        }
        arena.remove().unwrap();
    }
}

#[test]
fn an_arena_is_made_whole_or_not_at_all() {
    for round in 0..12 {
        let home = Home::new();
        let mut child = child("child_with_many_arenas", &home);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap).filter(|line| line == "made");
        assert!(lines.nth(round).is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        match Arena::adopt(&home.place()).unwrap() {
            Some(arena) => assert_eq!(arena.sets(), 40),
            None => assert_eq!(Arena::create(&home.place(), 1).unwrap().sets(), 1),
        }
    }
}

#[test]
fn one_process_at_a_time() {
    let home = Home::new();
    let first = Arena::create(&home.place(), 1).unwrap();
    // A lock belongs to an open file, so that one process can stand for two.
    for error in [
        Arena::adopt(&home.place()).unwrap_err(),
        Arena::create(&home.place(), 1).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Busy { .. }), "{error}");
        assert!(
            error.to_string().contains("in use by another process"),
            "{error}"
        );
    }
    drop(first);
    let second = Arena::adopt(&home.place()).unwrap().unwrap();
    assert!(matches!(
        Arena::adopt(&home.place()),
        Err(Error::Busy { .. })
    ));
    drop(second);
}

/// Plays a process that may write only small files.
#[test]
fn child_with_small_files() {
    let Some(place) = place_for_child() else {
        return;
    };
    let limit = Rlimit {
        current: Some(32 << 20),
        maximum: Some(32 << 20),
    };
    setrlimit(Resource::Fsize, limit).unwrap();
    let error = Arena::create(&place, 1).unwrap_err();
    println!("\n{error}");
}

#[test]
fn a_limit_on_files_is_an_error_and_not_the_end() {
    let home = Home::new();
    let output = child("child_with_small_files", &home)
        .wait_with_output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{} {text}", output.status);
    assert!(
        text.contains("no file may be longer than 32.0 MiB (RLIMIT_FSIZE)"),
        "{text}"
    );
    assert!(!home.path().exists(), "nothing is left of it");
}

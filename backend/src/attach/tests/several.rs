//! Several front-ends at one socket.

use super::*;

/// Waits until so many front-ends are connected.
fn wait_connected(bench: &Bench, count: usize) {
    let start = Instant::now();
    while bench.handle().status().connections != count {
        assert!(start.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
}

/// A front-end that has claimed the device and said all of ring 0, which it has not enabled.
fn about_to_start(bench: &Bench, guest: &TestGuest, base: u32) -> (FrontEnd, OwnedFd) {
    let front_end = bench.connect();
    front_end.greet();
    let told = front_end.told(SET_VRING_BASE, &state(0, base), &[]);
    assert_eq!(told, Some(true));
    let kick = front_end.set_up_ring(guest);
    (front_end, kick)
}

/// Enables ring 0. Returns whether it runs.
fn enable(front_end: &FrontEnd) -> bool {
    front_end
        .told(SET_VRING_ENABLE, &state(0, 1), &[])
        .expect("a session that goes on")
}

#[test]
fn the_rings_of_one_run_at_a_time_and_go_over_to_the_next() {
    use Did::{Close, Leave, Open};
    let lender = Lender::new();
    let mut bench = Bench::lent(&lender);
    let (here, there) = (TestGuest::new(16), TestGuest::new(16));
    let (source, _kick) = about_to_start(&bench, &here, 0);
    assert!(enable(&source));
    let (destination, _kick) = about_to_start(&bench, &there, 3);
    let start = Instant::now();
    assert!(!enable(&destination), "the other one's rings run");
    assert!(start.elapsed() >= TURN_PATIENCE, "they had no time to stop");
    assert_eq!(lender.take(), [Open(MachineStart::Fresh)]);
    let status = bench.handle().status();
    assert_eq!((status.connections, status.rings_running), (2, 1));

    // One that is waited for stops meanwhile.
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| enable(&destination));
        source.ask(GET_VRING_BASE, &state(0, 0));
        assert!(waits.join().unwrap());
    });
    assert_eq!(lender.take(), [Close, Open(MachineStart::Continued)]);
    drop(source);
    wait_connected(&bench, 1);
    assert_eq!(lender.take(), [], "the machine is somewhere else");
    assert_eq!(bench.handle().status().rings_running, 1);
    drop(destination);
    bench.wait_left();
    assert_eq!(lender.take(), [Close, Leave]);
    bench.stop();
}

#[test]
fn a_front_end_that_is_lost_makes_way_for_the_one_that_waits() {
    let bench = Bench::new(Patience::default());
    let (here, there) = (TestGuest::new(16), TestGuest::new(16));
    let (source, _kick) = about_to_start(&bench, &here, 0);
    assert!(enable(&source));
    let (destination, _kick) = about_to_start(&bench, &there, 0);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| enable(&destination));
        drop(source);
        assert!(waits.join().unwrap());
    });
}

#[test]
fn stopping_waits_for_none_of_several() {
    let mut bench = Bench::new(FOR_EVER);
    let (here, there) = (TestGuest::new(16), TestGuest::new(16));
    let (source, _kick) = about_to_start(&bench, &here, 0);
    assert!(enable(&source));
    let silent = bench.connect();
    let (destination, _kick) = about_to_start(&bench, &there, 0);
    // It waits for its turn.
    destination.send(SET_VRING_ENABLE, 9, &state(0, 1), &[]);
    let start = Instant::now();
    bench.stop();
    assert!(
        start.elapsed() < TURN_PATIENCE,
        "the stop waited for the turn"
    );
    assert_eq!(source.reply(), None, "closed");
    assert_eq!(silent.reply(), None, "closed");
    let refused = destination.reply();
    assert!(refused.is_none_or(|reply| reply != [0; 8]));
}

#[test]
fn a_resize_is_told_to_all_whose_rings_run() {
    let bench = Bench::new(Patience::default());
    let guest = TestGuest::new(16);
    let _idle = about_to_start(&bench, &guest, 0);
    let front_end = bench.connect();
    front_end.greet();
    let (theirs, ours) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(DEADLINE)).unwrap();
    let told = front_end.told(SET_BACKEND_REQ_FD, &[], &[ours.as_fd()]);
    assert_eq!(told, Some(true));
    let _kick = front_end.start_ring(&guest);
    let _later = about_to_start(&bench, &guest, 0);
    bench.handle().notify_resize().unwrap();
    let mut found = [0; 12];
    (&theirs).read_exact(&mut found).unwrap();
    assert_eq!(found[..], message(2, 1, &[]));
}

#[test]
fn a_hundred_silent_front_ends_hold_up_nobody() {
    let mut bench = Bench::new(Patience {
        message: Duration::from_secs(3600),
        rival: Duration::from_millis(20),
    });
    let guest = TestGuest::new(16);
    let serving = bench.connect();
    serving.greet();
    let _kick = serving.start_ring(&guest);
    let idle = bench.connect();
    idle.greet();
    let silent: Vec<FrontEnd> = (0..100).map(|_| bench.connect()).collect();
    bench.assert_serves();
    assert!(bench.handle().status().connections <= SESSIONS_MAX);
    // Neither one that serves a guest nor one that waits for its guest was in the way.
    for front_end in [&serving, &idle] {
        assert_eq!(front_end.told(SET_OWNER, &[], &[]), Some(true));
    }
    assert_eq!(silent.first().unwrap().reply(), None, "closed");
    bench.stop();
}

#[test]
fn one_idle_front_end_makes_way_when_all_places_are_taken_and_no_other() {
    let bench = Bench::new(Patience {
        message: Duration::from_millis(300),
        rival: Duration::from_secs(3600),
    });
    let idle: Vec<FrontEnd> = (0..SESSIONS_MAX).map(|_| bench.connect()).collect();
    for front_end in &idle {
        front_end.greet();
    }
    bench.assert_serves();
    let goes_on = |front_end: &&FrontEnd| {
        let sent = front_end.send_raw(&message(SET_OWNER, 9, &[]), &[]);
        sent.is_ok() && front_end.reply().is_some()
    };
    assert_eq!(idle.iter().filter(goes_on).count(), SESSIONS_MAX - 1);
}

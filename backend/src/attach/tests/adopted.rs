//! Front-ends that another process has served.

use std::os::unix::net::UnixListener;

use super::*;
use crate::vhost::handler::hand_over::Facts;
use crate::vhost::session::adopt::Adopted;

/// For so long nothing happens.
const QUIET: Duration = Duration::from_millis(50);

/// Lets everything run when it is dropped, so that a failed test ends.
struct Raise(Arc<Release>);

impl Drop for Raise {
    fn drop(&mut self) {
        self.0.raise();
    }
}

#[test]
fn a_machine_has_not_left_before_it_is_certain_who_serves_it() {
    let lender = Lender::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let (ours, _theirs) = UnixStream::pair().unwrap();
    // There is no such ring.
    let facts = Facts {
        begun: true,
        started: vec![7],
        ..Facts::default()
    };
    let session = HandedSession {
        connection: ours.into(),
        facts,
        messages: Vec::new(),
    };
    let handed = HandedAttachment {
        socket: HandedSocket {
            listener: UnixListener::bind(&path).unwrap().into(),
            path,
            inode: (0, 0),
        },
        sessions: vec![session],
    };
    let (told, fared) = mpsc::channel();
    let release = Arc::new(Release::default());
    let options = AttachOptions::default();
    let handle = Attachment::adopt(Arc::clone(&lender), handed, options, &told, &release).unwrap();
    drop(told);
    let raise = Raise(Arc::clone(&release));
    let fared_first = fared.recv().unwrap();
    assert!(
        matches!(fared_first.how, Adopted::Failed(_)),
        "{fared_first:?}"
    );
    assert!(fared.recv().is_err(), "it is told once");
    let start = Instant::now();
    while start.elapsed() < QUIET {
        assert_eq!(lender.take(), []);
        assert_eq!(handle.status().connections, 1);
        thread::yield_now();
    }
    drop(raise);
    while handle.status().connections > 0 {
        assert!(start.elapsed() < DEADLINE);
        thread::yield_now();
    }
    assert_eq!(lender.take(), [Did::Leave]);
}

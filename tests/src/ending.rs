//! Waits for the end of a child process, with a deadline.

use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Waits for the end of a child; `None` if it did not come in time.
///
/// # Panics
/// When the host has no resources for it.
pub fn wait_for_end(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    // Its number is not given to another process before we have taken its status.
    let ended = child.try_wait().expect("a child of ours");
    if ended.is_some() {
        return ended;
    }
    let pidfd = pidfd_open(pid.expect("a pid"), PidfdFlags::empty()).expect("a pidfd");
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).expect("a short time fits");
        let mut entry = [PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut entry, Some(&left)) {
            Ok(0) => return None,
            Ok(_) => return Some(child.wait().expect("a child of ours")),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll failed: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn an_end_is_seen_and_a_process_that_goes_on_is_left_alone() {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .spawn()
            .expect("cat");
        assert_eq!(wait_for_end(&mut child, Duration::from_millis(20)), None);
        drop(child.stdin.take());
        let status = wait_for_end(&mut child, Duration::from_secs(10));
        assert!(status.is_some_and(|status| status.success()));
        let again = wait_for_end(&mut child, Duration::from_secs(10));
        assert_eq!(again, status, "also when asked again");
    }
}

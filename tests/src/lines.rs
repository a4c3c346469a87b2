//! The lines that a process prints, as they come, with a deadline on every wait.

use std::io::{BufRead, BufReader, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Reads a stream on a thread of its own, so that its writer never waits for us.
#[derive(Debug)]
pub struct Lines {
    /// What the thread has read and nobody has looked at yet.
    receiver: Receiver<String>,
    /// What was looked at, oldest first.
    seen: Vec<String>,
}

/// Why no line came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The time was up.
    Late,
    /// The stream has ended.
    Ended,
}

impl Lines {
    /// Starts to read.
    pub fn of(stream: impl Read + Send + 'static) -> Self {
        let (sender, receiver) = channel();
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream
                .read_until(b'\n', &mut line)
                .is_ok_and(|bytes| bytes > 0)
            {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                if sender.send(text).is_err() {
                    return;
                }
            }
        });
        Self {
            receiver,
            seen: Vec::new(),
        }
    }

    /// The next line that starts like this; the ones before it are passed over.
    ///
    /// # Errors
    /// None came in time, or the stream ended before.
    pub fn wait_for(&mut self, start: &str, patience: Duration) -> Result<String, Silence> {
        let deadline = Instant::now() + patience;
        loop {
            let line = self.next(deadline)?;
            if line.starts_with(start) {
                return Ok(line);
            }
        }
    }

    /// Waits for the end of the stream.
    ///
    /// # Errors
    /// `Late` if it did not come in time.
    pub fn wait_for_end(&mut self, patience: Duration) -> Result<(), Silence> {
        let deadline = Instant::now() + patience;
        loop {
            match self.next(deadline) {
                Ok(_) => {}
                Err(Silence::Ended) => return Ok(()),
                Err(Silence::Late) => return Err(Silence::Late),
            }
        }
    }

    /// Everything that has been read so far.
    pub fn seen(&mut self) -> &[String] {
        self.seen.extend(self.receiver.try_iter());
        &self.seen
    }

    /// The next line.
    fn next(&mut self, deadline: Instant) -> Result<String, Silence> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.receiver.recv_timeout(left) {
            Ok(line) => {
                self.seen.push(line.clone());
                Ok(line)
            }
            Err(RecvTimeoutError::Timeout) => Err(Silence::Late),
            Err(RecvTimeoutError::Disconnected) => Err(Silence::Ended),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_in_order_and_the_end_is_told_from_silence() {
        let patience = Duration::from_secs(10);
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let mut lines = Lines::of(reader);
        std::io::Write::write_all(&mut writer, b"one\ntwo\r\nthree").expect("a reader");
        assert_eq!(lines.wait_for("tw", patience), Ok("two".to_owned()));
        assert_eq!(
            lines.wait_for("one", Duration::from_millis(20)),
            Err(Silence::Late)
        );
        drop(writer);
        assert_eq!(lines.wait_for("one", patience), Err(Silence::Ended));
        assert_eq!(lines.seen(), ["one", "two", "three"]);
    }
}

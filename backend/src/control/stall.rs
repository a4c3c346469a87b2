//! A connection whose client must keep reading: a write that finds no room for too long fails, so that a client which
//! never reads its replies gives its connection back.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::crowd::Standing;

/// A stream with a limit on how long a write may wait for room.
#[derive(Debug)]
pub struct StallLimit<S> {
    /// The stream.
    inner: S,
    /// How long a write may wait.
    patience: Duration,
    /// When the wait under way ends; not polled while no write waits.
    deadline: Pin<Box<Sleep>>,
    /// Whether a write waits.
    waiting: bool,
    /// Where it is told that the client does not read.
    standing: Arc<Standing>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> StallLimit<S> {
    /// Limits the writes of a stream.
    pub fn new(inner: S, patience: Duration, standing: Arc<Standing>) -> Self {
        Self {
            inner,
            patience,
            deadline: Box::pin(tokio::time::sleep(patience)),
            waiting: false,
            standing,
        }
    }

    /// Passes the outcome of a write on, unless the wait for it has become too long.
    fn limit<T>(
        &mut self,
        cx: &mut Context<'_>,
        outcome: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        self.standing.stalls(outcome.is_pending());
        if outcome.is_ready() {
            self.waiting = false;
            return outcome;
        }
        if !self.waiting {
            self.waiting = true;
            self.deadline.as_mut().reset(Instant::now() + self.patience);
        }
        ready!(self.deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for StallLimit<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for StallLimit<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.limit(cx, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.limit(cx, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.inner).poll_flush(cx);
        self.limit(cx, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    /// A stream with that limit.
    fn limited(stream: DuplexStream, patience: Duration) -> StallLimit<DuplexStream> {
        StallLimit::new(stream, patience, Arc::new(Standing::new()))
    }

    #[tokio::test]
    async fn a_client_that_never_reads_is_given_up() {
        let (ours, _theirs) = tokio::io::duplex(16);
        let mut limited = limited(ours, Duration::from_millis(10));
        let error = limited.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_client_that_reads_gets_all() {
        let (ours, mut theirs) = tokio::io::duplex(16);
        let mut limited = limited(ours, Duration::from_secs(10));
        let writer = tokio::spawn(async move { limited.write_all(&[7; 4096]).await });
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, [7; 4096]);
        writer.await.unwrap().unwrap();
    }
}

//! Who is connected to the control socket, and who makes way when there is no place left.
//!
//! A connection either has the daemon work on its request, or the daemon waits for its client: for a request, for the rest
//! of a body, for a reply to be read. Who is waited for longest is closed for a newcomer; one whose request is being worked
//! on never is. So clients that say nothing, or never read, however many, keep nobody else out.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use hyper::body::{Body, Frame, SizeHint};
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::Instant;

/// What one connection is about.
#[derive(Debug)]
pub struct Standing(Mutex<State>);

/// What the lock guards.
#[derive(Debug)]
struct State {
    /// Since when the client has something to send; `None` while its request is worked on.
    awaited: Option<Instant>,
    /// Since when it has something to read, if that does not fit into the socket any more.
    unread: Option<Instant>,
}

impl Standing {
    /// That of a client that has just come: it is to send a request.
    pub fn new() -> Self {
        Self(Mutex::new(State {
            awaited: Some(Instant::now()),
            unread: None,
        }))
    }

    /// Locks the state. It is whole even if a thread panicked with the lock.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client has something to send from now on.
    fn awaits(&self) {
        self.state().awaited = Some(Instant::now());
    }

    /// The client has sent all that its request needs.
    fn works(&self) {
        self.state().awaited = None;
    }

    /// Whether a write finds no room, because the client does not read.
    pub fn stalls(&self, stalled: bool) {
        let mut state = self.state();
        if stalled != state.unread.is_some() {
            state.unread = stalled.then(Instant::now);
        }
    }

    /// Since when the client is waited for, if it is.
    fn since(&self) -> Option<Instant> {
        let state = self.state();
        state.awaited.into_iter().chain(state.unread).min()
    }
}

/// The body of a request: until it is there or nobody wants it any more, the client is waited for.
#[derive(Debug)]
pub struct RequestBody<B> {
    /// The body.
    inner: B,
    /// Whose.
    standing: Arc<Standing>,
}

impl<B: Body> RequestBody<B> {
    /// The body of a request whose head has come.
    pub fn new(inner: B, standing: Arc<Standing>) -> Self {
        if inner.is_end_stream() {
            standing.works();
        } else {
            standing.awaits();
        }
        Self { inner, standing }
    }
}

impl<B: Body + Unpin> Body for RequestBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if matches!(polled, Poll::Ready(None)) {
            self.standing.works();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<B> Drop for RequestBody<B> {
    fn drop(&mut self) {
        self.standing.works();
    }
}

/// The body of a reply: once it is gone, the next request is waited for.
#[derive(Debug)]
pub struct ReplyBody<B> {
    /// The body.
    inner: B,
    /// Whose.
    standing: Arc<Standing>,
}

impl<B> ReplyBody<B> {
    /// The body of a reply that is about to be sent.
    pub const fn new(inner: B, standing: Arc<Standing>) -> Self {
        Self { inner, standing }
    }
}

impl<B: Body + Unpin> Body for ReplyBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<B> Drop for ReplyBody<B> {
    fn drop(&mut self) {
        self.standing.awaits();
    }
}

/// All connections.
#[derive(Debug, Default)]
pub struct Crowd {
    /// Their tasks, also of those that were told to end.
    tasks: JoinSet<()>,
    /// Those that were not.
    members: BTreeMap<Id, (Arc<Standing>, AbortHandle)>,
}

impl Crowd {
    /// How many have a place.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Gives a connection a place; `serve` serves it to its end.
    pub fn admit(
        &mut self,
        standing: Arc<Standing>,
        serve: impl Future<Output = ()> + Send + 'static,
    ) {
        let task = self.tasks.spawn(serve);
        self.members.insert(task.id(), (standing, task));
    }

    /// Closes the connection whose client is waited for longest. Returns whether there was one.
    pub fn make_way(&mut self) -> bool {
        let waiting =
            |(id, (standing, _)): (&Id, &(Arc<Standing>, _))| Some((standing.since()?, *id));
        let oldest = self.members.iter().filter_map(waiting).min();
        let gone = oldest.and_then(|(_, id)| self.members.remove(&id));
        if let Some((_, task)) = &gone {
            task.abort();
        }
        gone.is_some()
    }

    /// Waits for a connection to end. `None` at once if there is none.
    pub async fn one_ended(&mut self) -> Option<()> {
        let ended = self.tasks.join_next_with_id().await?;
        let id = ended.map_or_else(|error: JoinError| error.id(), |(id, ())| id);
        self.members.remove(&id);
        Some(())
    }

    /// Waits for all of them.
    pub async fn all_ended(&mut self) {
        while self.one_ended().await.is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::time::Duration;

    use super::*;

    /// A member whose client is waited for since then.
    fn member(crowd: &mut Crowd, since: Option<Instant>) -> Arc<Standing> {
        let standing = Arc::new(Standing::new());
        standing.state().awaited = since;
        crowd.admit(Arc::clone(&standing), pending());
        standing
    }

    /// How long members live that have this reference to their standing beside ours.
    fn is_in(crowd: &Crowd, standing: &Arc<Standing>) -> bool {
        let mut members = crowd.members.values();
        members.any(|(member, _)| Arc::ptr_eq(member, standing))
    }

    #[tokio::test]
    async fn who_is_waited_for_longest_makes_way_and_who_is_worked_for_never() {
        let mut crowd = Crowd::default();
        let now = Instant::now();
        let ago = |seconds| now.checked_sub(Duration::from_secs(seconds));
        let [young, old, busy] = [ago(1), ago(5), None].map(|since| member(&mut crowd, since));
        assert!(crowd.make_way());
        assert!(!is_in(&crowd, &old) && is_in(&crowd, &young) && is_in(&crowd, &busy));
        crowd.one_ended().await;
        assert!(crowd.make_way());
        crowd.one_ended().await;
        assert!(!crowd.make_way(), "a request is worked on");
        assert_eq!(crowd.len(), 1);
        busy.stalls(true);
        assert!(crowd.make_way(), "a reply that is not read");
        crowd.all_ended().await;
        assert_eq!(crowd.len(), 0);
    }

    #[test]
    fn a_connection_is_waited_for_until_its_request_is_there_and_again_after_its_reply() {
        let standing = Arc::new(Standing::new());
        assert!(standing.since().is_some(), "the first request");
        let body = || http_body_util::Full::new(axum::body::Bytes::from_static(b"{}"));
        let request = RequestBody::new(body(), Arc::clone(&standing));
        assert!(standing.since().is_some(), "its body");
        drop(request);
        assert!(standing.since().is_none(), "worked on");
        let reply = ReplyBody::new(body(), Arc::clone(&standing));
        assert!(standing.since().is_none(), "worked on");
        standing.stalls(true);
        let stalled = standing.since();
        standing.stalls(true);
        assert_eq!(standing.since(), stalled, "one wait");
        standing.stalls(false);
        drop(reply);
        assert!(standing.since().is_some(), "the next request");
        let none = http_body_util::Empty::<axum::body::Bytes>::new();
        let _request = RequestBody::new(none, Arc::clone(&standing));
        assert!(standing.since().is_none(), "it has no body");
    }
}

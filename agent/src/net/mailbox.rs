//! How threads of the network are told things: in order, by many, until the last one who could tell is gone.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// What arrives.
#[derive(Debug)]
enum Letter<T> {
    /// Somebody told this.
    Told(T),
    /// Nobody is left who could tell anything.
    End,
}

/// The side that tells. Clones are one mailbox.
#[derive(Debug)]
pub struct Mailbox<T>(Arc<Inner<T>>);

#[derive(Debug)]
struct Inner<T> {
    sender: Sender<Letter<T>>,
}

/// The side that listens.
#[derive(Debug)]
pub struct Inbox<T>(Receiver<Letter<T>>);

/// Tells too, but keeps no thread alive: for those whose news matter only as long as others have some.
#[derive(Debug)]
pub struct Informer<T>(Weak<Inner<T>>);

/// Both sides.
pub fn mailbox<T>() -> (Mailbox<T>, Inbox<T>) {
    let (sender, receiver) = channel();
    (Mailbox(Arc::new(Inner { sender })), Inbox(receiver))
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Mailbox<T> {
    /// Tells. A thread that has ended hears nothing, and nobody misses it.
    pub fn tell(&self, news: T) {
        let _ = self.0.sender.send(Letter::Told(news));
    }

    /// A side that tells without keeping the thread alive.
    pub fn informer(&self) -> Informer<T> {
        Informer(Arc::downgrade(&self.0))
    }
}

impl<T> Drop for Inner<T> {
    fn drop(&mut self) {
        let _ = self.sender.send(Letter::End);
    }
}

impl<T> Informer<T> {
    /// Tells; false when nobody listens any more.
    pub fn tell(&self, news: T) -> bool {
        let Some(inner) = self.0.upgrade() else { return false };
        !matches!(inner.sender.send(Letter::Told(news)), Err(SendError(_)))
    }

    /// Whether anybody listens.
    pub fn is_heard(&self) -> bool {
        self.0.strong_count() > 0
    }
}

/// Why nothing was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nothing {
    /// Not yet.
    Yet,
    /// And never again.
    Ever,
}

impl<T> Inbox<T> {
    /// Waits for news, at most so long when a time is given.
    ///
    /// # Errors
    /// There are none.
    pub fn receive(&self, within: Option<Duration>) -> Result<T, Nothing> {
        let letter = match within {
            None => self.0.recv().map_err(|_| Nothing::Ever),
            Some(within) => self.0.recv_timeout(within).map_err(|error| match error {
                RecvTimeoutError::Timeout => Nothing::Yet,
                RecvTimeoutError::Disconnected => Nothing::Ever,
            }),
        };
        match letter? {
            Letter::Told(news) => Ok(news),
            Letter::End => Err(Nothing::Ever),
        }
    }

    /// Hands over what follows shortly: until nothing came for `quiet`, or `latest` is over. Returns false at the end of
    /// all news.
    pub fn coalesce(&self, quiet: Duration, latest: Duration, mut each: impl FnMut(T)) -> bool {
        let deadline = Instant::now() + latest;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.receive(Some(left.min(quiet))) {
                Ok(news) => each(news),
                Err(Nothing::Yet) => return true,
                Err(Nothing::Ever) => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_informer_keeps_nobody_listening_and_is_told_when_nobody_does() {
        let (mailbox, inbox) = mailbox();
        let (other, informer) = (mailbox.clone(), mailbox.informer());
        assert!(informer.tell(1));
        other.tell(2);
        drop(mailbox);
        assert_eq!((inbox.receive(None), inbox.receive(None)), (Ok(1), Ok(2)));
        assert_eq!(inbox.receive(Some(Duration::ZERO)), Err(Nothing::Yet));
        drop(other);
        assert_eq!(inbox.receive(None), Err(Nothing::Ever));
        assert!(!informer.tell(3) && !informer.is_heard());
    }
}

//! One watch per collection for all who follow it: the service proxy, the DNS responder, the overlay; and the copy on
//! disk that they all begin with.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::recall::{Collection, Recorder};
use crate::watch::{Event, Object, Target, Watcher};

/// Gets every event; must not block.
pub(super) type Follower = Box<dyn Fn(Event) + Send + Sync>;

/// Has all collections listed anew: for a follower that cannot trust what it knows.
#[derive(Debug, Clone)]
pub(super) struct Relist(watch::Sender<u64>);

impl Relist {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    pub(super) fn ask(&self) {
        self.0.send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// A collection, what is known of it from before, and who writes it down.
pub(super) struct Feed {
    pub(super) collection: Collection,
    /// `None` when it was never listed completely.
    pub(super) known: Option<Vec<Object>>,
    pub(super) recorder: Recorder,
    /// The collection's number at the recorder.
    pub(super) index: usize,
}

impl Feed {
    /// Hands what is known to the followers, then watches until shutdown and hands over every event.
    pub(super) fn follow(
        self,
        client: &kube::Client,
        followers: Vec<Follower>,
        relist: &Relist,
        shutdown: &CancellationToken,
    ) {
        if followers.is_empty() {
            return;
        }
        let (client, mut relist, shutdown) = (client.clone(), relist.0.subscribe(), shutdown.clone());
        tokio::spawn(async move {
            let tell = |event: &Event| followers.iter().for_each(|follower| follower(event.clone()));
            if let Some(known) = self.known {
                tell(&Event::Restarted);
                known.into_iter().for_each(|object| tell(&Event::Applied(object)));
                tell(&Event::Synced);
            }
            loop {
                let mut watcher = Watcher::new(client.clone(), Target::all(self.collection.path));
                loop {
                    let event = tokio::select! {
                        () = shutdown.cancelled() => return,
                        changed = relist.changed() => match changed {
                            Ok(()) => break,
                            Err(_) => return,
                        },
                        event = watcher.next() => event,
                    };
                    tell(&event);
                    self.recorder.tell((self.index, event));
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::recall::{NODES, recall};

    #[tokio::test]
    async fn without_any_server_followers_get_what_was_last_known() {
        let root = tempfile::tempdir().unwrap();
        let object = Object {
            namespace: String::new(),
            name: "a".into(),
            uid: String::new(),
            json: r#"{"metadata":{"name":"a"}}"#.into(),
        };
        let (recorder, _) = recall(root.path(), &[NODES]).unwrap();
        for event in [Event::Restarted, Event::Applied(object), Event::Synced] {
            recorder.tell((0, event));
        }
        drop(recorder);
        let complete = root.path().join("nodes/complete");
        while !complete.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let (recorder, mut known) = recall(root.path(), &[NODES]).unwrap();
        let silent = tower::service_fn(|_: http::Request<kube::client::Body>| {
            std::future::pending::<Result<http::Response<kube::client::Body>, std::convert::Infallible>>()
        });
        let client = kube::Client::new(silent, "default");
        let (sender, mut seen) = tokio::sync::mpsc::unbounded_channel();
        let (relist, shutdown) = (Relist::new(), CancellationToken::new());
        let feed = Feed { collection: NODES, known: known.remove(0), recorder, index: 0 };
        feed.follow(&client, vec![Box::new(move |event| drop(sender.send(event)))], &relist, &shutdown);
        assert!(matches!(seen.recv().await, Some(Event::Restarted)));
        assert!(matches!(seen.recv().await, Some(Event::Applied(object)) if object.name == "a"));
        assert!(matches!(seen.recv().await, Some(Event::Synced)));
    }
}

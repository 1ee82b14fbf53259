//! Watches that outlive their server.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Method;
use serde_json::{Value, json};

use super::client::Client;
use super::hosts::Cluster;
use crate::assert_eventually;

const PATH: &str = "/api/v1/namespaces/default/configmaps";

/// What a watcher tells of its way.
#[derive(Debug)]
enum Said {
    /// No server answers.
    Nothing,
    /// A server began to answer.
    Watching(SocketAddr),
    /// Type, name and revision.
    Event(String, String, u64),
}

/// Watches from a revision at whichever server it is told, from where it was, until nobody listens.
async fn follow(mut client: Client, mut revision: u64, target: Arc<Mutex<SocketAddr>>, tell: Sender<Said>) {
    let mut heard = true;
    while heard {
        let server = *target.lock().unwrap();
        client.turn_to(server);
        let path = format!("{PATH}?watch=1&resourceVersion={revision}");
        let Ok(mut lines) = client.lines(&path).await else {
            heard = tell.send(Said::Nothing).is_ok();
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        heard = tell.send(Said::Watching(server)).is_ok();
        while heard && let Some(event) = lines.next().await {
            let meta = &event["object"]["metadata"];
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            revision = text(&meta["resourceVersion"]).parse().unwrap_or(revision);
            heard = tell.send(Said::Event(text(&event["type"]), text(&meta["name"]), revision)).is_ok();
        }
    }
}

/// Creates objects with these numbers through a server, each until it is there.
fn create(cluster: &Cluster, server: usize, numbers: std::ops::Range<u32>) {
    for n in numbers {
        let object = json!({"metadata": {"name": format!("watched-{n:03}")}});
        assert_eventually!(60, "an object is created", {
            match cluster.call(server, Method::POST, PATH, Some(&object)) {
                Ok((201 | 409, _)) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }
}

/// The names of `count` additions, all of them in order, and where the watcher was.
fn listen(said: &Receiver<Said>, count: u32, names: &mut Vec<String>, last: &mut u64) {
    for _ in 0..count {
        loop {
            match said.recv_timeout(Duration::from_secs(60)).expect("the watcher hears of it") {
                Said::Watching(_) | Said::Nothing => {}
                Said::Event(kind, name, revision) => {
                    assert_eq!(kind, "ADDED", "{name}");
                    assert!(revision > *last, "{name}: {revision} after {last}");
                    *last = revision;
                    names.push(name);
                    break;
                }
            }
        }
    }
}

#[test]
fn a_watch_goes_on_at_a_server_that_is_behind() {
    let mut cluster = Cluster::of(3, 1, &["--disable-agent"]);
    let first = cluster.wait_leader();
    let [behind, third] = cluster.servers().into_iter().filter(|s| *s != first).collect::<Vec<_>>()[..] else {
        unreachable!("three servers")
    };
    let (_, list) = cluster.get(first, PATH).unwrap();
    let begin: u64 = list["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();

    let (tell, said) = channel();
    let target = Arc::new(Mutex::new(cluster.hosts[first].api()));
    let client = Client::new(cluster.credential(), cluster.hosts[first].api());
    let watched = target.clone();
    let watcher = cluster.client(cluster.clients()[0], move || follow(client, begin, watched, tell));

    let (mut names, mut last) = (Vec::new(), begin);
    create(&cluster, first, 0..10);
    cluster.part(&[behind], &[first, third]);
    create(&cluster, first, 10..40);
    listen(&said, 40, &mut names, &mut last);

    // The watcher turns to a server that has never heard of the revision where it is.
    let other = cluster.hosts[behind].api();
    *target.lock().unwrap() = other;
    cluster.hosts[first].kill9();
    loop {
        match said.recv_timeout(Duration::from_secs(60)).expect("the other server answers") {
            Said::Watching(server) if server == other => break,
            Said::Watching(_) | Said::Nothing => {}
            event @ Said::Event(..) => panic!("{event:?}"),
        }
    }
    cluster.switch.heal();
    create(&cluster, third, 40..60);
    listen(&said, 20, &mut names, &mut last);
    let wanted: Vec<String> = (0..60).map(|n| format!("watched-{n:03}")).collect();
    assert_eq!(names, wanted);

    drop(said);
    cluster.hosts[behind].kill9();
    watcher.join().unwrap();
}

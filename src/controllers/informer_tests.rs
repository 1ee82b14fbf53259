use std::collections::VecDeque;
use std::convert::Infallible;

use http::{Request, Response};
use http_body_util::Full;
use kube::client::Body;
use serde_json::json;
use tower::service_fn;

use super::*;
use crate::controllers::resource::PODS;

fn pod(name: &str, revision: u64) -> serde_json::Value {
    json!({"metadata": {"name": name, "namespace": "n", "uid": name, "resourceVersion": revision.to_string()}})
}

fn list(items: &[serde_json::Value], revision: u64, token: &str) -> (u16, String) {
    (200, json!({"metadata": {"resourceVersion": revision.to_string(), "continue": token}, "items": items}).to_string())
}

fn events(events: &[(&str, serde_json::Value)]) -> (u16, String) {
    let lines = events.iter().map(|(kind, object)| json!({"type": kind, "object": object}).to_string() + "\n");
    (200, lines.collect())
}

/// An API that gives these answers, one by one, and then hangs; notes what was asked.
fn client(answers: Vec<(u16, String)>) -> (kube::Client, Arc<Mutex<Vec<String>>>) {
    let answers = Arc::new(Mutex::new(VecDeque::from(answers)));
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = asked.clone();
    let service = service_fn(move |request: Request<Body>| {
        let (answers, log) = (answers.clone(), log.clone());
        async move {
            let query = request.uri().query().unwrap_or_default().to_owned();
            let query = query.split("&timeoutSeconds").next().unwrap_or_default().to_owned();
            log.lock().push(query);
            let answer = answers.lock().pop_front();
            let Some((code, body)) = answer else { return std::future::pending().await };
            Ok::<_, Infallible>(Response::builder().status(code).body(Full::new(Bytes::from(body))).unwrap())
        }
    });
    (kube::Client::new(service, "default"), asked)
}

/// Runs an informer over these answers until the API has none left; tells what a subscriber heard.
async fn heard(answers: Vec<(u16, String)>) -> (Vec<String>, Vec<String>) {
    let expected = answers.len() + 1;
    let (client, asked) = client(answers);
    let cancel = CancellationToken::new();
    let informers = Informers::new(client, cancel.clone(), TaskTracker::new());
    let informer = informers.of(&PODS);
    let heard: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = heard.clone();
    let _subscription = informer.subscribe(move |delta| {
        let sign = match (&delta.old, &delta.new) {
            (None, _) => '+',
            (Some(_), Some(_)) => '~',
            (_, None) => '-',
        };
        log.lock().push(format!("{sign}{}", delta.latest().unwrap().key.name()));
    });
    while asked.lock().len() < expected {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cancel.cancel();

    (heard.lock().clone(), asked.lock().clone())
}

#[tokio::test]
async fn pages_are_listed_and_the_watch_goes_on_from_their_revision() {
    let (heard, asked) = heard(vec![
        list(&[pod("a", 1)], 5, "next"),
        list(&[pod("b", 2)], 5, ""),
        events(&[
            ("MODIFIED", pod("a", 6)),
            ("DELETED", pod("b", 7)),
            ("BOOKMARK", json!({"metadata": {"resourceVersion": "9"}})),
        ]),
    ])
    .await;
    assert_eq!(heard, ["+a", "+b", "~a", "-b"]);
    assert_eq!(asked[1], "limit=500&continue=next");
    assert_eq!(asked[2], "watch=true&allowWatchBookmarks=true&resourceVersion=5");
    assert_eq!(asked[3], "watch=true&allowWatchBookmarks=true&resourceVersion=9");
}

#[tokio::test]
async fn an_expired_revision_lists_again_and_tells_what_changed_meanwhile() {
    let expired = json!({"kind": "Status", "code": 410, "message": "too old"});
    let (heard, asked) = heard(vec![
        list(&[pod("a", 1), pod("b", 2)], 5, ""),
        events(&[("ERROR", expired)]),
        list(&[pod("b", 8), pod("c", 9)], 9, ""),
    ])
    .await;
    assert_eq!(heard, ["+a", "+b", "~b", "+c", "-a"]);
    assert_eq!(asked[2], "limit=500");
}

#[tokio::test]
async fn a_refused_list_is_tried_again() {
    let (heard, _) = heard(vec![(503, "{}".to_owned()), (500, String::new()), list(&[pod("a", 1)], 5, "")]).await;
    assert_eq!(heard, ["+a"]);
}

#[test]
fn lines_are_cut_wherever_the_chunks_end() {
    let mut lines = Lines::default();
    let mut out = Vec::new();
    for chunk in ["{\"a\"", ":1}\n\n{", "}\n{}", "\n"] {
        lines.push(Bytes::from_static(chunk.as_bytes()));
        while let Some(line) = lines.next() {
            out.push(String::from_utf8(line.to_vec()).unwrap());
        }
    }
    assert_eq!(out, ["{\"a\":1}", "{}", "{}"]);
}

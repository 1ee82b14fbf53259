//! `/exec` and `/attach`: the streams of a process over a WebSocket.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream::SplitSink;
use futures::{SinkExt, StreamExt};
use http::{Request, Response};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Mutex, mpsc};
use tokio_tungstenite::tungstenite::protocol::Message;

use super::channel::{self, CLOSE, Protocol, Socket};
use super::query::Query;
use super::{Body, Refusal};
use crate::runtime::{
    AttachRequest, BoxRead, BoxWrite, ExecRequest, Runtime, RuntimeError, StreamSession, TerminalSize,
};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// Bytes per frame.
const CHUNK: usize = 32 * 1024;

/// What to connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A new process.
    Exec,
    /// The container's own.
    Attach,
}

#[derive(Debug, Clone, Copy)]
struct Wanted {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

/// Switches to WebSocket and connects.
///
/// # Errors
/// When the request asks for nothing or cannot be upgraded.
pub fn answer(
    runtime: Arc<dyn Runtime>,
    request: Request<Incoming>,
    id: String,
    query: &Query,
    mode: Mode,
    container_tty: bool,
) -> Result<Response<Body>, Refusal> {
    // The kubelet's own spelling, and the API's.
    let either = |a: &str, b: &str| query.is_set(a) || query.is_set(b);
    let tty = if mode == Mode::Attach { container_tty } else { query.is_set("tty") };
    let wanted = Wanted {
        stdin: either("input", "stdin"),
        stdout: either("output", "stdout"),
        stderr: either("error", "stderr") && !tty,
        tty,
    };
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return Err(Refusal::bad_request("you must specify at least 1 of stdin, stdout, stderr"));
    }
    let command: Vec<String> = query.all("command").map(ToOwned::to_owned).collect();
    let (response, protocol, socket) = channel::upgrade(request)?;
    tokio::spawn(async move {
        let socket = match socket.await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!(%error, "exec connection not upgraded");
                return;
            }
        };
        let session = match mode {
            Mode::Exec => {
                let Wanted { stdin, stdout, stderr, tty } = wanted;
                runtime.exec(&ExecRequest { container_id: id, command, tty, stdin, stdout, stderr }).await
            }
            Mode::Attach => {
                let Wanted { stdin, stdout, stderr, .. } = wanted;
                runtime.attach(&AttachRequest { container_id: id, stdin, stdout, stderr }).await
            }
        };
        connect(socket, protocol, wanted, session, mode).await;
    });
    Ok(response)
}

type Sink = Arc<Mutex<SplitSink<Socket, Message>>>;

async fn connect(
    socket: Socket,
    protocol: Protocol,
    wanted: Wanted,
    session: Result<StreamSession, RuntimeError>,
    mode: Mode,
) {
    let (sink, mut source) = socket.split();
    let sink: Sink = Arc::new(Mutex::new(sink));
    // An empty frame tells the client that the connection stands.
    let first = if wanted.stdout {
        STDOUT
    } else if wanted.stderr {
        STDERR
    } else {
        ERROR
    };
    let _ = send(&sink, protocol, first, &[]).await;
    let outcome = match session {
        Err(error) => Err(error),
        Ok(session) => {
            let StreamSession { stdin, stdout, stderr, resize, exit } = session;
            let input = read_client(&mut source, protocol, stdin, resize, wanted.tty);
            let output = async {
                let copies = [(STDOUT, stdout), (STDERR, stderr)]
                    .into_iter()
                    .filter_map(|(channel, stream)| stream.map(|stream| copy(stream, &sink, protocol, channel)));
                let (_, result) = futures::future::join(futures::future::join_all(copies), exit).await;
                result
            };
            tokio::select! {
                result = output => result,
                // The client has gone: dropping the session ends the process (exec) or disconnects (attach).
                () = input => return,
            }
        }
    };
    let last = error_frame(protocol, outcome, mode);
    if let Some(last) = last {
        let _ = send(&sink, protocol, ERROR, &last).await;
    }
    let mut sink = sink.lock().await;
    let _ = sink.send(crate::websocket::goodbye()).await;
    let _ = sink.close().await;
}

async fn send(sink: &Sink, protocol: Protocol, channel: u8, data: &[u8]) -> Result<(), ()> {
    sink.lock().await.send(protocol.encode(channel, data)).await.map_err(|_| ())
}

async fn copy(mut stream: BoxRead, sink: &Sink, protocol: Protocol, channel: u8) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match stream.read(&mut buffer).await {
            Ok(read) if read > 0 => {
                if send(sink, protocol, channel, &buffer[..read]).await.is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}

/// Feeds the process; returns when the client is gone.
async fn read_client(
    source: &mut futures::stream::SplitStream<Socket>,
    protocol: Protocol,
    stdin: Option<BoxWrite>,
    resize: mpsc::Sender<TerminalSize>,
    tty: bool,
) {
    let (feed, input) = mpsc::channel::<Bytes>(4);
    let mut feed = stdin.is_some().then_some(feed);
    // A process that does not read must not keep us from noticing that the client has gone.
    let writer = async {
        if let Some(stdin) = stdin {
            write_stdin(stdin, input).await;
        }
        std::future::pending::<()>().await;
    };
    let reader = async {
        while let Some(Ok(message)) = source.next().await {
            if message.is_close() {
                return;
            }
            match protocol.decode(&message) {
                Some((STDIN, data)) if !data.is_empty() => {
                    if let Some(open) = &feed
                        && open.send(data).await.is_err()
                    {
                        feed = None;
                    }
                }
                Some((RESIZE, data)) if tty => {
                    if let Some(size) = terminal_size(&data) {
                        let _ = resize.try_send(size);
                    }
                }
                Some((CLOSE, data)) if protocol.close && data.first() == Some(&STDIN) => feed = None,
                _ => {}
            }
        }
    };
    tokio::select! {
        () = reader => {}
        () = writer => {}
    }
}

async fn write_stdin(mut stdin: BoxWrite, mut input: mpsc::Receiver<Bytes>) {
    while let Some(data) = input.recv().await {
        if stdin.write_all(&data).await.is_err() || stdin.flush().await.is_err() {
            // The process has closed it; what comes is dropped.
            return;
        }
    }
    let _ = stdin.shutdown().await;
}

fn terminal_size(data: &[u8]) -> Option<TerminalSize> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Size {
        width: u16,
        height: u16,
    }
    let size: Size = serde_json::from_slice(data).ok()?;
    (size.width > 0 && size.height > 0).then_some(TerminalSize { width: size.width, height: size.height })
}

/// What the error channel says at the end; the oldest protocols say nothing when all went well.
fn error_frame(protocol: Protocol, outcome: Result<i32, RuntimeError>, mode: Mode) -> Option<Vec<u8>> {
    let status: Value = match outcome {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(_) if mode == Mode::Attach => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(error) => {
            let verb = if mode == Mode::Exec { "executing command in" } else { "attaching to" };
            let message = format!("Internal error occurred: error {verb} container: {error}");
            json!({
                "metadata": {}, "status": "Failure", "reason": "InternalError", "code": 500, "message": message,
                "details": {"causes": [{"message": format!("error {verb} container: {error}")}]},
            })
        }
    };
    if protocol.status {
        return Some(status.to_string().into_bytes());
    }
    let failed = status["status"] == "Failure";
    failed.then(|| status["message"].as_str().unwrap_or_default().as_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_channel_carries_the_exit_code() {
        let v5 = Protocol { name: "v5.channel.k8s.io", base64: false, status: true, close: true };
        let frame: Value = serde_json::from_slice(&error_frame(v5, Ok(7), Mode::Exec).unwrap()).unwrap();
        assert_eq!(frame["details"]["causes"][0], json!({"reason": "ExitCode", "message": "7"}));
        let ok: Value = serde_json::from_slice(&error_frame(v5, Ok(0), Mode::Exec).unwrap()).unwrap();
        assert_eq!(ok["status"], "Success");
        let old = Protocol { status: false, ..v5 };
        assert_eq!(error_frame(old, Ok(0), Mode::Exec), None);
    }
}

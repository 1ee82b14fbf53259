//! `pods/log` over a WebSocket, for browsers: the log in messages, binary or base64.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use coracle_agent::websocket;
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, Response, StatusCode};
use http_body_util::{BodyExt, BodyStream, Empty};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Message, Role};

use crate::apiserver::body::Body;
use crate::apiserver::status::Status;

/// What may be offered; the first is meant when nothing is.
const PROTOCOLS: [&str; 2] = ["binary.k8s.io", "base64.binary.k8s.io"];

/// The agreed form of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    protocol: Option<&'static str>,
}

impl Form {
    /// The first offer that we speak.
    ///
    /// # Errors
    /// 403 when there is none among the offers.
    pub fn choose(headers: &HeaderMap) -> Result<Form, Status> {
        let offers = websocket::offers(headers);
        let protocol = offers.iter().find_map(|offer| PROTOCOLS.into_iter().find(|known| known == offer));
        if protocol.is_none() && !offers.is_empty() {
            let text = format!("requested protocol(s) are not supported: {offers:?}; supports {PROTOCOLS:?}");
            return Err(Status::new(StatusCode::FORBIDDEN, "Forbidden", text));
        }
        Ok(Form { protocol })
    }

    fn message(self, data: &Bytes) -> Message {
        match self.protocol {
            Some("base64.binary.k8s.io") => Message::Text(STANDARD.encode(data).into()),
            _ => Message::Binary(data.clone()),
        }
    }
}

/// Switches protocols and sends `log` until it ends or the client has gone.
///
/// # Errors
/// 400 when the request is no handshake.
pub fn answer(
    headers: &HeaderMap,
    form: Form,
    upgrade: Option<hyper::upgrade::OnUpgrade>,
    log: hyper::body::Incoming,
) -> Result<Response<Body>, Status> {
    let refused = || Status::bad_request("this connection cannot be upgraded");
    let response = websocket::switch::<Empty<Bytes>>(headers, form.protocol).ok_or_else(refused)?;
    let upgrade = upgrade.ok_or_else(refused)?;
    tokio::spawn(async move {
        match upgrade.await {
            Ok(upgraded) => {
                let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
                send(socket, form, log).await;
            }
            Err(error) => tracing::debug!(%error, "log connection not upgraded"),
        }
    });
    Ok(response.map(|_| Body::empty()))
}

async fn send<S>(socket: WebSocketStream<S>, form: Form, log: hyper::body::Incoming)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (mut sink, mut source) = socket.split();
    let outward = async {
        // An empty message tells the client that the connection stands.
        if sink.send(form.message(&Bytes::new())).await.is_err() {
            return;
        }
        let mut pieces = BodyStream::new(log.map_err(drop));
        while let Some(Ok(frame)) = pieces.next().await {
            let Ok(data) = frame.into_data() else { continue };
            if sink.send(form.message(&data)).await.is_err() {
                return;
            }
        }
        let _ = sink.send(websocket::goodbye()).await;
    };
    // What the client says does not matter, that it has gone does.
    let inward = async { while let Some(Ok(_)) = source.next().await {} };
    tokio::select! {
        () = outward => {}
        () = inward => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header;

    #[test]
    fn messages_are_binary_unless_base64_is_asked_for() {
        let choose = |offer: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            if let Some(offer) = offer {
                headers.insert(header::SEC_WEBSOCKET_PROTOCOL, offer.parse().unwrap());
            }
            Form::choose(&headers)
        };
        let data = Bytes::from_static(b"hi");
        assert_eq!(choose(None).unwrap().message(&data), Message::Binary(data.clone()));
        assert_eq!(choose(Some("x, binary.k8s.io")).unwrap().message(&data), Message::Binary(data.clone()));
        assert_eq!(choose(Some("base64.binary.k8s.io")).unwrap().message(&data), Message::Text("aGk=".into()));
        assert_eq!(choose(Some("v4.channel.k8s.io")).unwrap_err().code(), 403);
    }
}

//! The channel protocols of exec, attach and port-forward over WebSocket: one byte of channel number, then data.
//!
//! | protocol | frames | error channel | closing standard input |
//! | --- | --- | --- | --- |
//! | `v5.channel.k8s.io` | binary | Status | frame 255 with the channel's number |
//! | `v4.channel.k8s.io` | binary | Status | not possible |
//! | `channel.k8s.io` | binary | text | not possible |
//! | `v4.base64.channel.k8s.io`, `base64.channel.k8s.io` | text: digit, base64 | as above | not possible |

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Message, Role};

use super::{Body, Refusal};
use crate::websocket;

/// Number of the frame that closes another channel (v5).
pub const CLOSE: u8 = 255;

/// How frames are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protocol {
    /// The name that was agreed on.
    pub name: &'static str,
    /// Text frames with base64 instead of binary ones.
    pub base64: bool,
    /// The error channel carries a Status.
    pub status: bool,
    /// Channels can be closed one by one.
    pub close: bool,
}

/// All protocols, the best first.
const PROTOCOLS: [Protocol; 5] = [
    Protocol { name: "v5.channel.k8s.io", base64: false, status: true, close: true },
    Protocol { name: "v4.channel.k8s.io", base64: false, status: true, close: false },
    Protocol { name: "v4.base64.channel.k8s.io", base64: true, status: true, close: false },
    Protocol { name: "channel.k8s.io", base64: false, status: false, close: false },
    Protocol { name: "base64.channel.k8s.io", base64: true, status: false, close: false },
];

impl Protocol {
    /// The best of those that the client offers; a client that offers none speaks the oldest.
    pub fn choose(headers: &HeaderMap) -> Result<(Self, bool), Refusal> {
        let offers = websocket::offers(headers);
        if offers.is_empty() {
            return Ok((PROTOCOLS[3], false));
        }
        let best = PROTOCOLS.iter().find(|protocol| offers.contains(&protocol.name));
        best.map(|protocol| (*protocol, true))
            .ok_or_else(|| Refusal::bad_request(format!("unable to upgrade: no supported protocol in {offers:?}")))
    }

    /// A frame.
    pub fn encode(self, channel: u8, data: &[u8]) -> Message {
        if self.base64 {
            let mut text = String::with_capacity(1 + data.len().div_ceil(3) * 4);
            text.push(char::from(b'0' + channel));
            STANDARD.encode_string(data, &mut text);
            return Message::Text(text.into());
        }
        let mut bytes = Vec::with_capacity(1 + data.len());
        bytes.push(channel);
        bytes.extend_from_slice(data);
        Message::Binary(bytes.into())
    }

    /// Channel and data of a frame; `None` for what is neither.
    pub fn decode(self, message: &Message) -> Option<(u8, Bytes)> {
        match message {
            Message::Binary(bytes) if !self.base64 => {
                let channel = *bytes.first()?;
                Some((channel, bytes.slice(1..)))
            }
            Message::Text(text) if self.base64 => {
                let (channel, data) = text.as_str().split_at_checked(1)?;
                let channel = channel.parse().ok()?;
                Some((channel, STANDARD.decode(data).ok()?.into()))
            }
            Message::Text(text) => {
                let bytes = text.as_bytes();
                Some((*bytes.first()?, Bytes::copy_from_slice(&bytes[1..])))
            }
            _ => None,
        }
    }
}

/// A WebSocket to the API server.
pub type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// The answer that switches protocols, and the socket once it has.
#[allow(clippy::type_complexity, reason = "the future cannot be named")]
pub fn upgrade(
    request: Request<Incoming>,
) -> Result<(Response<Body>, Protocol, impl Future<Output = Result<Socket, hyper::Error>> + Send + use<>), Refusal> {
    let (protocol, named) = Protocol::choose(request.headers())?;
    let (response, socket) = accept(request, named.then_some(protocol.name))?;
    Ok((response, protocol, socket))
}

/// Becomes a WebSocket of this sub-protocol.
#[allow(clippy::type_complexity, reason = "the future cannot be named")]
pub fn accept(
    mut request: Request<Incoming>,
    protocol: Option<&'static str>,
) -> Result<(Response<Body>, impl Future<Output = Result<Socket, hyper::Error>> + Send + use<>), Refusal> {
    let response = websocket::switch::<Empty<Bytes>>(request.headers(), protocol);
    let response = response.ok_or_else(|| Refusal::bad_request("you must specify a WebSocket upgrade"))?;
    let upgraded = hyper::upgrade::on(&mut request);
    let socket = async move {
        let stream = TokioIo::new(upgraded.await?);
        Ok(WebSocketStream::from_raw_socket(stream, Role::Server, None).await)
    };
    Ok((response.map(|body| body.map_err(|never| match never {}).boxed()), socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header;

    #[test]
    fn frames_cross_in_every_protocol() {
        for protocol in PROTOCOLS {
            let (channel, data) = protocol.decode(&protocol.encode(1, b"hello")).unwrap();
            assert_eq!((channel, data.as_ref()), (1, b"hello".as_ref()), "{}", protocol.name);
        }
        assert_eq!(PROTOCOLS[2].encode(2, b"hi"), Message::Text("2aGk=".into()));
    }

    #[test]
    fn the_best_offered_protocol_is_chosen() {
        let offer = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, text.parse().unwrap());
            Protocol::choose(&headers)
        };
        assert_eq!(offer("v4.channel.k8s.io, v5.channel.k8s.io").unwrap().0.name, "v5.channel.k8s.io");
        assert_eq!(offer("channel.k8s.io").unwrap().0.name, "channel.k8s.io");
        assert!(offer("chat").is_err());
        assert!(!Protocol::choose(&HeaderMap::new()).unwrap().1);
    }
}

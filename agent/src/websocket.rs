//! The server's side of the WebSocket handshake (RFC 6455 section 4.2), for whoever answers requests.

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use tokio_tungstenite::tungstenite::Utf8Bytes;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message};

/// Whether a request wants to become a WebSocket.
#[must_use]
pub fn is_wanted(headers: &HeaderMap) -> bool {
    let says = |name: header::HeaderName, word: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.to_ascii_lowercase().contains(word))
    };
    says(header::UPGRADE, "websocket") && says(header::CONNECTION, "upgrade")
}

/// A browser's bearer token, which travels as a sub-protocol but is none.
const TOKEN: &str = "base64url.bearer.authorization.k8s.io.";

/// The sub-protocols that the client offers, in its order.
#[must_use]
pub fn offers(headers: &HeaderMap) -> Vec<&str> {
    headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(str::trim))
        .filter(|offer| !offer.is_empty() && !offer.starts_with(TOKEN))
        .collect()
}

/// The answer that switches protocols; `None` when the request is no handshake.
#[must_use]
pub fn switch<B: Default>(headers: &HeaderMap, protocol: Option<&'static str>) -> Option<Response<B>> {
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|_| is_wanted(headers))?;
    let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes())).ok()?;
    let mut response = Response::new(B::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    if let Some(protocol) = protocol {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    Some(response)
}

/// The end that clients read as the end of all streams; a close frame without a code is an error to them.
#[must_use]
pub fn goodbye() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_is_answered_as_the_rfc_says() {
        let mut headers = HeaderMap::new();
        assert!(switch::<()>(&headers, None).is_none());
        headers.insert(header::UPGRADE, "WebSocket".parse().unwrap());
        headers.insert(header::CONNECTION, "keep-alive, Upgrade".parse().unwrap());
        assert!(switch::<()>(&headers, None).is_none(), "without a key");
        headers.insert(header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ==".parse().unwrap());
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, "a, b".parse().unwrap());
        headers.append(header::SEC_WEBSOCKET_PROTOCOL, "c".parse().unwrap());
        let response = switch::<()>(&headers, Some("b")).unwrap();
        assert_eq!(response.headers()[header::SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_eq!(response.headers()[header::SEC_WEBSOCKET_PROTOCOL], "b");
        assert_eq!(offers(&headers), ["a", "b", "c"]);
    }
}

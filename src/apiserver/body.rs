//! The one body type of requests and responses.

use bytes::Bytes;
use futures::Stream;
use http_body::{Body as HttpBody, Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};

/// Any error a body may end with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A request or response body: nothing, one piece of bytes (no allocation), or a boxed stream.
pub struct Body(Inner);

enum Inner {
    Empty,
    Full(Bytes),
    Boxed(Pin<Box<dyn HttpBody<Data = Bytes, Error = BoxError> + Send>>),
}

impl Body {
    /// A body without bytes.
    pub fn empty() -> Body {
        Body(Inner::Empty)
    }

    /// A body of known bytes.
    pub fn full(bytes: impl Into<Bytes>) -> Body {
        let bytes = bytes.into();
        if bytes.is_empty() { Body::empty() } else { Body(Inner::Full(bytes)) }
    }

    /// Wraps any other body, e.g. `hyper::body::Incoming`.
    pub fn new<B>(body: B) -> Body
    where
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        Body(Inner::Boxed(Box::pin(http_body_util::BodyExt::map_err(body, Into::into))))
    }

    /// A body of unknown length that sends each item as it comes.
    pub fn stream<S>(stream: S) -> Body
    where
        S: Stream<Item = Result<Bytes, BoxError>> + Send + 'static,
    {
        Body::new(http_body_util::StreamBody::new(futures::StreamExt::map(stream, |item| item.map(Frame::data))))
    }

    /// Collects the whole body, at most `limit` bytes.
    ///
    /// # Errors
    /// [`CollectError::TooLarge`] above the limit, [`CollectError::Read`] when the peer breaks off.
    pub async fn collect(self, limit: usize) -> Result<Bytes, CollectError> {
        match self.0 {
            Inner::Empty => Ok(Bytes::new()),
            Inner::Full(bytes) if bytes.len() > limit => Err(CollectError::TooLarge { limit }),
            Inner::Full(bytes) => Ok(bytes),
            Inner::Boxed(mut body) => {
                let mut pieces: Vec<Bytes> = Vec::new();
                let mut length = 0usize;
                while let Some(frame) = std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await {
                    let Ok(data) = frame.map_err(CollectError::Read)?.into_data() else { continue };
                    length += data.len();
                    if length > limit {
                        return Err(CollectError::TooLarge { limit });
                    }
                    pieces.push(data);
                }
                Ok(match pieces.len() {
                    0 => Bytes::new(),
                    1 => pieces.swap_remove(0),
                    _ => pieces.concat().into(),
                })
            }
        }
    }
}

/// Why a body could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    #[error("limit is {limit}")]
    TooLarge { limit: usize },
    #[error("the body broke off")]
    Read(#[source] BoxError),
}

impl Default for Body {
    fn default() -> Body {
        Body::empty()
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Body {
        Body::full(bytes)
    }
}

impl From<String> for Body {
    fn from(text: String) -> Body {
        Body::full(text)
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Body {
        Body::full(bytes)
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Inner::Empty => Poll::Ready(None),
            Inner::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                self.0 = Inner::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Inner::Boxed(body) => body.as_mut().poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Empty => true,
            Inner::Full(_) => false,
            Inner::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Empty => SizeHint::with_exact(0),
            Inner::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Inner::Boxed(body) => body.size_hint(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn collects_up_to_the_limit() {
        assert_eq!(Body::full("abc").collect(3).await.unwrap(), "abc");
        assert!(matches!(Body::full("abcd").collect(3).await, Err(CollectError::TooLarge { limit: 3 })));
        let pieces = futures::stream::iter([Ok(Bytes::from("ab")), Ok(Bytes::from("cd"))]);
        assert!(matches!(Body::stream(pieces).collect(3).await, Err(CollectError::TooLarge { .. })));
    }
}

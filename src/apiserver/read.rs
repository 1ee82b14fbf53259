//! get and list: bytes from the store with the resource version spliced in. Nothing is parsed unless the client wants
//! another shape than what is stored.

use super::body::Body;
use super::call::{Call, partial_metadata, respond};
use super::codec;
use super::fields;
use super::negotiate::{self, Format, View};
use super::object;
use super::options::{ListOptions, VersionMatch, parse_revision};
use super::resources::Resource;
use super::scan::{self, RawLabels};
use super::selector::Lookup;
use super::status::Status;
use super::table;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{Bytes, BytesMut};
use coracle_store::{KeyValue, RangeRequest, StoreError, prefix_end};
use http::{Response, StatusCode};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

/// How long a read waits for a revision that this server does not have yet.
const FUTURE_WAIT: Duration = Duration::from_secs(3);
/// Size of the pieces in which long lists are sent; small enough that the allocator does not map and unmap each one.
const PIECE: usize = 64 * 1024;
/// Most keys read at once while a selector leaves most of them out.
const PAGE_MAX: usize = 10_000;

const CONTINUE_EXPIRED: &str = "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and now may show up in the list.";
const LIST_EXPIRED: &str = "The resourceVersion for the provided list is too old.";

/// The verb get.
pub async fn get(call: &Call<'_>) -> Result<Response<Body>, Status> {
    let version = parse_revision(call.query.get("resourceVersion").unwrap_or_default())
        .map_err(|e| Status::new(StatusCode::INTERNAL_SERVER_ERROR, "", e.to_string()))?;
    fresh(call, version).await?;
    let kv = call.server.backend().get(&call.key())?.ok_or_else(|| call.not_found())?;
    call.stored(StatusCode::OK, &kv.value, kv.mod_revision)
}

/// Waits until the store shows what a read at this resource version must see: none for everything acknowledged,
/// 0 for anything, else at least that revision.
pub async fn fresh(call: &Call<'_>, version: Option<u64>) -> Result<(), Status> {
    let backend = call.server.backend();
    match version {
        Some(wanted) if backend.store().revision() >= wanted => return Ok(()),
        _ => backend.barrier().await?,
    };
    let Some(wanted) = version else { return Ok(()) };
    let deadline = tokio::time::Instant::now() + FUTURE_WAIT;
    while backend.store().revision() < wanted {
        if tokio::time::Instant::now() >= deadline {
            return Err(Status::too_large_resource_version(wanted, backend.store().revision()));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Whether a stored object satisfies the selectors.
pub fn selected(options: &ListOptions, json: &[u8]) -> bool {
    if !options.labels.is_empty() && !options.labels.matches(&RawLabels::of(json) as &dyn Lookup) {
        return false;
    }
    options.fields.is_empty() || options.fields.matches(|field| field_value(json, field))
}

/// The value of a selectable field of a stored object.
pub fn field_value<'a>(json: &'a [u8], field: &str) -> Cow<'a, str> {
    let renamed = match field {
        // An event's source is its component, or who reports it.
        "source" => {
            let component = scan::text(json, &["source", "component"]).filter(|c| !c.is_empty());
            return component.or_else(|| scan::text(json, &["reportingComponent"])).unwrap_or_default();
        }
        "reportingController" => "reportingComponent",
        other => other,
    };
    let regarding;
    let renamed = match renamed.strip_prefix("regarding.") {
        Some(rest) => {
            regarding = format!("involvedObject.{rest}");
            regarding.as_str()
        }
        None => renamed,
    };
    let path: Vec<&str> = renamed.split('.').collect();
    scan::text(json, &path).unwrap_or(Cow::Borrowed(fields::zero(field)))
}

/// A continue token: where the next page starts and at which revision.
#[derive(serde::Serialize, serde::Deserialize)]
struct Token {
    v: String,
    rv: i64,
    start: String,
    /// How many objects follow, so that not each page counts them again. Ours; upstream's tokens have no such field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    left: Option<u64>,
}

/// Where a list goes on.
#[derive(Debug, PartialEq, Eq)]
struct Next {
    key: Bytes,
    /// None for a token that gave up consistency.
    revision: Option<u64>,
    left: Option<u64>,
}

fn encode_token(prefix: &[u8], after: &[u8], revision: i64, left: Option<u64>) -> String {
    let start = String::from_utf8_lossy(after.strip_prefix(prefix).unwrap_or(after)).into_owned() + "\0";
    let token = Token { v: "meta.k8s.io/v1".to_owned(), rv: revision, start, left };
    URL_SAFE_NO_PAD.encode(serde_json::to_string(&token).unwrap_or_default())
}

fn decode_token(prefix: &[u8], token: &str) -> Result<Next, Status> {
    let invalid =
        |why: String| Status::bad_request(format!("invalid continue token: continue key is not valid: {why}"));
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|e| invalid(e.to_string()))?;
    let token: Token = serde_json::from_slice(&bytes).map_err(|e| invalid(e.to_string()))?;
    if token.v != "meta.k8s.io/v1" {
        return Err(invalid(format!("server does not recognize this encoded version {}", token.v)));
    }
    if token.rv == 0 {
        return Err(invalid("incorrect encoded start resourceVersion (version meta.k8s.io/v1)".to_owned()));
    }
    if token.start.is_empty() {
        return Err(invalid("encoded start key empty (version meta.k8s.io/v1)".to_owned()));
    }
    // The store's keys hold no zero byte: the first key after `k` is not below `k` followed by 1.
    let start = token.start.trim_start_matches('/');
    let start = start.strip_suffix('\0').map_or_else(|| start.to_owned(), |s| format!("{s}\u{1}"));
    if start.contains('\0') || start.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(invalid(token.start));
    }
    let mut key = BytesMut::from(prefix);
    key.extend_from_slice(start.as_bytes());
    let revision = u64::try_from(token.rv).ok();
    Ok(Next { key: key.freeze(), revision, left: token.left.filter(|_| revision.is_some()) })
}

/// What a list found.
pub struct Page {
    pub kvs: Vec<KeyValue>,
    pub revision: u64,
    pub continue_token: String,
    pub remaining: Option<u64>,
}

/// Reads the page of a collection that the options ask for.
pub async fn page(call: &Call<'_>, options: &ListOptions) -> Result<Page, Status> {
    let resource = call.resource;
    let prefix = resource.collection_key(call.namespace());
    let (mut start, mut left) = (prefix.clone(), None);
    let revision;
    if options.continue_token.is_empty() {
        let wanted = options.revision()?;
        fresh(call, wanted).await?;
        let exact = options.version_match == Some(VersionMatch::Exact)
            || (options.version_match.is_none() && options.limit > 0);
        revision = wanted.filter(|w| exact && *w > 0);
    } else {
        if !options.resource_version.is_empty() && options.resource_version != "0" {
            return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
        }
        Next { key: start, revision, left } = decode_token(&prefix, &options.continue_token)?;
        fresh(call, revision).await?;
    }
    if let Some(name) =
        options.fields.exact("metadata.name").filter(|_| revision.is_none() && options.continue_token.is_empty())
        && let Some(page) = single(call, options, name)?
    {
        return Ok(page);
    }
    collect(call, options, &prefix, Next { key: start, revision, left })
}

/// A list that can only hold one object; none when it spans all namespaces.
fn single(call: &Call<'_>, options: &ListOptions, name: &str) -> Result<Option<Page>, Status> {
    let namespace = call.namespace();
    if (call.resource.is_namespaced() && namespace.is_empty()) || name.is_empty() {
        return Ok(None);
    }
    let revision = call.server.backend().store().revision();
    let kv = call.server.backend().get(&call.resource.key(namespace, name))?;
    let kvs = kv.into_iter().filter(|kv| selected(options, &kv.value)).collect();
    Ok(Some(Page { kvs, revision, continue_token: String::new(), remaining: None }))
}

fn collect(
    call: &Call<'_>,
    options: &ListOptions,
    prefix: &Bytes,
    Next { key: mut start, mut revision, left }: Next,
) -> Result<Page, Status> {
    let end = prefix_end(prefix);
    let limit = usize::try_from(options.limit).unwrap_or(usize::MAX);
    let mut page = Page { kvs: Vec::new(), revision: 0, continue_token: String::new(), remaining: None };
    let mut fetch = limit;
    loop {
        let request = RangeRequest {
            start: start.clone(),
            end: end.clone(),
            revision,
            limit: fetch,
            keys_only: false,
            count: limit > 0 && !options.selects() && left.is_none(),
        };
        let response = match call.server.backend().store().range(&request) {
            Ok(response) => response,
            Err(StoreError::Compacted { .. }) if options.continue_token.is_empty() => {
                return Err(Status::expired(LIST_EXPIRED));
            }
            Err(StoreError::Compacted { .. }) => {
                let after = start.strip_suffix(b"\x01").unwrap_or(&start);
                return Err(Status::expired(CONTINUE_EXPIRED).with_continue(encode_token(prefix, after, -1, None)));
            }
            Err(StoreError::FutureRevision { revision: newest }) => {
                return Err(Status::too_large_resource_version(revision.unwrap_or(0), newest));
            }
            Err(error) => return Err(Status::internal(error)),
        };
        page.revision = response.revision;
        revision = Some(response.revision);
        if limit == 0 && !options.selects() {
            page.kvs = response.kvs;
            return Ok(page);
        }
        let (mut last, fetched, mut left_over) = (Bytes::new(), response.kvs.len(), false);
        for kv in response.kvs {
            if limit > 0 && page.kvs.len() == limit {
                left_over = true;
                break;
            }
            last = kv.key.clone();
            if selected(options, &kv.value) {
                page.kvs.push(kv);
            }
        }
        let more = response.more || left_over;
        if !more || limit == 0 || fetched == 0 {
            return Ok(page);
        }
        if page.kvs.len() >= limit {
            if !options.selects() {
                page.remaining = Some(left.unwrap_or(response.count).saturating_sub(limit as u64));
            }
            let revision = i64::try_from(page.revision).unwrap_or(i64::MAX);
            page.continue_token = encode_token(prefix, &last, revision, page.remaining);
            return Ok(page);
        }
        let mut next = BytesMut::from(&last[..]);
        next.extend_from_slice(b"\x01");
        start = next.freeze();
        fetch = (fetch * 2).min(PAGE_MAX);
    }
}

/// The verb list.
pub async fn list(call: &Call<'_>) -> Result<Response<Body>, Status> {
    let options = ListOptions::new(call.query, call.resource, false)?;
    let accepted = negotiate::negotiate(call.headers, true)?;
    let page = page(call, &options).await?;
    let plain = accepted.view == View::Object
        && accepted.format == Format::Json
        && codec::is_stored_form(call.resource, call.info.version);
    if plain {
        return Ok(stream(call, page));
    }
    let mut meta = json!({ "resourceVersion": page.revision.to_string() });
    if !page.continue_token.is_empty() {
        meta["continue"] = json!(page.continue_token);
    }
    if let Some(remaining) = page.remaining {
        meta["remainingItemCount"] = json!(remaining);
    }
    let mut items = Vec::with_capacity(page.kvs.len());
    for kv in &page.kvs {
        let mut item = object::decode_kv(kv)?;
        codec::from_storage(call.resource, call.info.version, &mut item);
        items.push(item);
    }
    let shown = match accepted.view {
        View::Object => {
            for item in items.iter_mut().filter_map(Value::as_object_mut) {
                item.remove("apiVersion");
                item.remove("kind");
            }
            json!({
                "kind": format!("{}List", call.resource.kind),
                "apiVersion": call.resource.api_version(call.info.version),
                "metadata": meta,
                "items": items,
            })
        }
        View::Metadata => json!({
            "kind": "PartialObjectMetadataList",
            "apiVersion": format!("meta.k8s.io/{}", accepted.meta_version),
            "metadata": meta,
            "items": items.iter().map(|i| partial_metadata(i, accepted.meta_version)).collect::<Vec<_>>(),
        }),
        View::Table => {
            table::render(call.resource, &items, meta, table::Include::of(call.query)?, accepted.meta_version)
        }
    };
    call.format(StatusCode::OK, accepted, &shown)
}

/// The pieces of a list, made as they are sent.
struct Pieces {
    resource: Arc<Resource>,
    head: Option<Vec<u8>>,
    kvs: std::vec::IntoIter<KeyValue>,
    first: bool,
    done: bool,
}

impl Pieces {
    fn next_piece(&mut self) -> Option<Bytes> {
        if self.done {
            return None;
        }
        let waiting: usize = self.kvs.as_slice().iter().take(2 * PIECE / 512).map(|kv| kv.value.len() + 48).sum();
        let mut out = BytesMut::with_capacity(waiting.min(PIECE + 16 * 1024) + 512);
        if let Some(head) = self.head.take() {
            out.extend_from_slice(&head);
        }
        while out.len() < PIECE {
            let Some(kv) = self.kvs.next() else {
                out.extend_from_slice(b"]}\n");
                self.done = true;
                break;
            };
            if !std::mem::take(&mut self.first) {
                out.extend_from_slice(b",");
            }
            let spliced = object::splice_item(&self.resource, &kv.value, kv.mod_revision, &mut out);
            // Written under another storage version: only its apiVersion differs.
            if !spliced && let Ok(item) = object::decode_kv(&kv) {
                out.extend_from_slice(item.to_string().as_bytes());
            }
        }
        Some(out.freeze())
    }
}

fn stream(call: &Call<'_>, page: Page) -> Response<Body> {
    let mut head = format!(
        "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{{\"resourceVersion\":\"{}\"",
        call.resource.kind,
        call.resource.api_version(call.info.version),
        page.revision
    );
    if !page.continue_token.is_empty() {
        head.push_str(&format!(",\"continue\":\"{}\"", page.continue_token));
    }
    if let Some(remaining) = page.remaining {
        head.push_str(&format!(",\"remainingItemCount\":{remaining}"));
    }
    head.push_str("},\"items\":[");
    let mut pieces = Pieces {
        resource: call.resource.clone(),
        head: Some(head.into_bytes()),
        kvs: page.kvs.into_iter(),
        first: true,
        done: false,
    };
    let first = pieces.next_piece().unwrap_or_default();
    let body = if pieces.done {
        Body::full(first)
    } else {
        let rest = std::iter::from_fn(move || pieces.next_piece());
        Body::stream(futures::stream::iter(std::iter::once(first).chain(rest).map(Ok)))
    };
    respond(StatusCode::OK, negotiate::JSON, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_tokens() {
        let token = encode_token(b"/registry/core/pods/", b"/registry/core/pods/default/a", 7, None);
        let bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
        assert_eq!(bytes, br#"{"v":"meta.k8s.io/v1","rv":7,"start":"default/a\u0000"}"#);
        let key = Bytes::from_static(b"/registry/core/pods/default/a\x01");
        let next = decode_token(b"/registry/core/pods/", &token).unwrap();
        assert_eq!(next, Next { key: key.clone(), revision: Some(7), left: None });
        let counted = encode_token(b"/registry/core/pods/", b"/registry/core/pods/default/a", 7, Some(40));
        let next = decode_token(b"/registry/core/pods/", &counted).unwrap();
        assert_eq!(next, Next { key, revision: Some(7), left: Some(40) });
        let inconsistent = encode_token(b"/p/", b"/p/a", -1, Some(3));
        let next = decode_token(b"/p/", &inconsistent).unwrap();
        assert_eq!((next.revision, next.left), (None, None));
        let evil = URL_SAFE_NO_PAD.encode(r#"{"v":"meta.k8s.io/v1","rv":7,"start":"../secrets/a"}"#);
        assert_eq!(decode_token(b"/p/", &evil).unwrap_err().code(), 400);
    }

    #[test]
    fn fields_of_stored_objects() {
        let node = br#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n"},"spec":{}}"#;
        assert_eq!(field_value(node, "spec.unschedulable"), "false");
        assert_eq!(field_value(node, "metadata.name"), "n");
        let event = br#"{"metadata":{},"involvedObject":{"name":"p"},"source":{},"reportingComponent":"k"}"#;
        assert_eq!(field_value(event, "regarding.name"), "p");
        assert_eq!(field_value(event, "source"), "k");
        assert_eq!(field_value(event, "reportingController"), "k");
    }
}

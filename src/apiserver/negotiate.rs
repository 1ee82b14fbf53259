//! Content negotiation: what the client accepts and in which shape it wants objects.

use super::status::Status;
use http::HeaderMap;

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Yaml,
    Protobuf,
}

impl Format {
    /// The media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Format::Json => JSON,
            Format::Yaml => YAML,
            Format::Protobuf => PROTOBUF,
        }
    }
}

/// In which shape an object is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    Object,
    /// `meta.k8s.io/v1` Table.
    Table,
    /// `meta.k8s.io/v1` PartialObjectMetadata, and its list for collections.
    Metadata,
}

/// The answer of a negotiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub format: Format,
    pub view: View,
    /// Version of `meta.k8s.io` for the view: `v1` or `v1beta1`.
    pub meta_version: &'static str,
}

/// JSON's media type.
pub const JSON: &str = "application/json";
/// YAML's media type.
pub const YAML: &str = "application/yaml";
/// The media type of Kubernetes' protobuf envelope.
pub const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
/// Media types of answers and bodies.
pub const MEDIA_TYPES: [&str; 3] = [JSON, YAML, PROTOBUF];

/// One clause of an `Accept` header.
#[derive(Debug)]
pub struct Clause<'a> {
    /// `type/subtype`.
    pub media_type: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
    quality: f32,
}

impl Clause<'_> {
    /// A parameter; empty when absent.
    pub fn parameter(&self, name: &str) -> &str {
        self.parameters.iter().find(|(k, _)| *k == name).map_or("", |(_, v)| v)
    }

    /// The supported format that the clause stands for.
    pub fn format(&self) -> Option<Format> {
        Some(match self.media_type {
            JSON | "*/*" | "application/*" => Format::Json,
            YAML => Format::Yaml,
            PROTOBUF => Format::Protobuf,
            _ => return None,
        })
    }
}

/// The clauses of an `Accept` header, best first.
pub fn clauses(headers: &HeaderMap) -> Vec<Clause<'_>> {
    let header = headers.get(http::header::ACCEPT).and_then(|h| h.to_str().ok()).unwrap_or("*/*");
    let header = if header.trim().is_empty() { "*/*" } else { header };
    let mut clauses: Vec<Clause<'_>> = header
        .split(',')
        .map(|clause| {
            let mut parts = clause.split(';').map(str::trim);
            let media_type = parts.next().unwrap_or_default();
            let parameters: Vec<_> = parts.filter_map(|p| p.split_once('=')).collect();
            let quality = parameters.iter().find(|(k, _)| *k == "q").and_then(|(_, v)| v.parse().ok()).unwrap_or(1.0);
            Clause { media_type, parameters, quality }
        })
        .collect();
    clauses.sort_by(|a, b| b.quality.total_cmp(&a.quality));
    clauses
}

/// Chooses format and view. `tables` says whether this answer can be a table or metadata (not for most subresources).
///
/// # Errors
/// 406 when nothing fits.
pub fn negotiate(headers: &HeaderMap, tables: bool) -> Result<Accepted, Status> {
    // The common case without allocations.
    if let Some(JSON | "*/*" | "application/json, */*") =
        headers.get(http::header::ACCEPT).map(|h| h.to_str().unwrap_or_default())
    {
        return Ok(Accepted { format: Format::Json, view: View::Object, meta_version: "v1" });
    }
    let mut protobuf = None;
    for clause in clauses(headers) {
        let Some(format) = clause.format() else { continue };
        let view = match clause.parameter("as") {
            "" => View::Object,
            "Table" if tables => View::Table,
            "PartialObjectMetadata" | "PartialObjectMetadataList" if tables => View::Metadata,
            _ => continue,
        };
        let meta_version = match (view, clause.parameter("g"), clause.parameter("v")) {
            (View::Object, ..) | (_, "meta.k8s.io", "v1") => "v1",
            (_, "meta.k8s.io", "v1beta1") => "v1beta1",
            _ => continue,
        };
        let accepted = Accepted { format, view, meta_version };
        if format != Format::Protobuf {
            return Ok(accepted);
        }
        // JSON is what is stored: protobuf is made only for those who take nothing else.
        protobuf = protobuf.or(Some(accepted));
    }
    protobuf.ok_or_else(|| Status::not_acceptable(&MEDIA_TYPES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(header: &str) -> Result<Accepted, Status> {
        let mut headers = HeaderMap::new();
        headers.insert(http::header::ACCEPT, header.parse().unwrap());
        negotiate(&headers, true)
    }

    #[test]
    fn the_first_clause_that_fits_wins() {
        let table = accept("application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json").unwrap();
        assert_eq!((table.view, table.meta_version), (View::Table, "v1"));
        let both = accept("application/vnd.kubernetes.protobuf,application/json").unwrap();
        assert_eq!(both.format, Format::Json);
        assert_eq!(accept("application/vnd.kubernetes.protobuf").unwrap().format, Format::Protobuf);
        assert_eq!(accept("application/yaml;q=0.1, application/json").unwrap().format, Format::Json);
        assert_eq!(accept("text/html, */*").unwrap().format, Format::Json);
        assert_eq!(accept("text/html").unwrap_err().code(), 406);
        assert_eq!(negotiate(&HeaderMap::new(), true).unwrap().format, Format::Json);
    }
}

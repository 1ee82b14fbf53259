//! Request bodies to values: format, group, version and kind, strict fields. Texts and their order are those of upstream's
//! `serializer/json` and of the create and update handlers.

use serde::Deserialize;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::node::{Schema, TypeId};
use super::{proto, syntax, typed, yaml};

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Yaml,
    /// `application/vnd.kubernetes.protobuf`; it has no unknown fields to report.
    Protobuf,
}

/// The `fieldValidation` query parameter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    Ignore,
    /// What upstream assumes when the parameter is absent.
    #[default]
    Warn,
    Strict,
}

impl FieldValidation {
    /// `None` for an unknown level; empty and absent mean [`FieldValidation::Warn`].
    pub fn parse(text: &str) -> Option<FieldValidation> {
        match text {
            "" | "Warn" => Some(FieldValidation::Warn),
            "Ignore" => Some(FieldValidation::Ignore),
            "Strict" => Some(FieldValidation::Strict),
            _ => None,
        }
    }
}

/// The kind that the URL of the request takes.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    pub group: &'a str,
    pub version: &'a str,
    pub kind: &'a str,
    pub node: TypeId,
}

/// A body that decoded.
#[derive(Debug)]
pub struct Decoded {
    /// In Go form, with `apiVersion` and `kind` of the expected kind.
    pub value: Value,
    /// Texts for `Warning: 299 - "..."` headers.
    pub warnings: Vec<String>,
}

/// A body that does not decode. All are 400 `BadRequest`; `Display` is upstream's message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not even group, version and kind could be read.
    #[error("the object provided is unrecognized (must be of type {wanted}): {cause} ({summary})")]
    Unrecognized { wanted: String, cause: String, summary: String },
    #[error("{kind} in version {version:?} cannot be handled as a {wanted}: {cause}")]
    Unusable { kind: String, version: String, wanted: String, cause: String },
    #[error("the API version in the data ({found}) does not match the expected API version ({wanted})")]
    Version { found: String, wanted: String },
}

/// Decodes a body that should be of one kind. Absent `apiVersion` and `kind` are taken from `expected`.
///
/// # Errors
/// [`DecodeError`] for malformed bodies, values of wrong types, other kinds, and strict findings under
/// [`FieldValidation::Strict`].
pub fn decode(
    schema: &Schema,
    expected: &Expected<'_>,
    body: &[u8],
    format: Format,
    validation: FieldValidation,
) -> Result<Decoded, DecodeError> {
    let unrecognized =
        |cause: String| DecodeError::Unrecognized { wanted: expected.kind.to_owned(), cause, summary: summary(body) };
    let strict = validation != FieldValidation::Ignore;
    let document = match format {
        Format::Protobuf => return protobuf(schema, expected, body, unrecognized),
        Format::Json => Document::Json(body),
        Format::Yaml => {
            let (value, duplicates) = yaml::to_json(body).map_err(unrecognized)?;
            Document::Yaml(value, duplicates)
        }
    };
    let meta = document.meta().map_err(unrecognized)?;
    let meta = meta.with_defaults(expected).map_err(unrecognized)?;
    meta.check(schema, expected)?;
    let (mut value, mut findings) =
        document.typed(schema, expected.node, strict).map_err(|cause| meta.unusable(expected, cause))?;
    if let Some(cause) = findings.error {
        return Err(meta.unusable(expected, cause));
    }
    if let (true, Document::Yaml(_, Some(duplicates))) = (strict, &document) {
        findings.strict.insert(0, duplicates.clone());
    }
    if validation == FieldValidation::Strict && !findings.strict.is_empty() {
        let cause = format!("strict decoding error: {}", findings.strict.join(", "));
        return Err(meta.unusable(expected, cause));
    }
    meta.check_version(expected)?;
    name_kind(&mut value, expected);
    Ok(Decoded { value, warnings: findings.strict })
}

/// The body of a server-side apply, YAML or JSON, as it stands; with what a strict reader says about duplicate fields.
///
/// # Errors
/// Upstream's text, for 400.
pub fn configuration(body: &[u8]) -> Result<(Value, Option<String>), String> {
    let wrap = |text: String| format!("error converting YAML to JSON: {text}");
    let (value, duplicates) = yaml::to_json(body).map_err(|e| format!("error decoding YAML: {}", wrap(e)))?;
    if !(value.is_object() || value.is_null()) {
        let found = json_type(&value);
        return Err(format!(
            "error decoding YAML: error unmarshaling JSON: while decoding JSON: json: cannot unmarshal {found} into Go value of type map[string]interface {{}}"
        ));
    }
    Ok((value, duplicates.map(wrap)))
}

fn protobuf(
    schema: &Schema,
    expected: &Expected<'_>,
    body: &[u8],
    unrecognized: impl Fn(String) -> DecodeError,
) -> Result<Decoded, DecodeError> {
    let unknown = proto::open(body).map_err(|e| unrecognized(e.to_string()))?;
    let meta = Meta { api_version: unknown.api_version, kind: unknown.kind };
    let meta = meta.with_defaults(expected).map_err(&unrecognized)?;
    meta.check(schema, expected)?;
    let value = proto::decode(schema, expected.node, unknown.raw);
    let mut value = value.map_err(|e| meta.unusable(expected, e.to_string()))?;
    meta.check_version(expected)?;
    name_kind(&mut value, expected);
    Ok(Decoded { value, warnings: Vec::new() })
}

fn name_kind(value: &mut Value, expected: &Expected<'_>) {
    if let Value::Object(map) = value {
        map.insert("apiVersion".to_owned(), Value::String(api_version(expected.group, expected.version)));
        map.insert("kind".to_owned(), Value::String(expected.kind.to_owned()));
    }
}

/// `v1`, `apps/v1`
pub fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// Versions that upstream still decodes but does not serve.
const FORMER_VERSIONS: [(&str, &str); 13] = [
    ("apps", "v1beta1"),
    ("apps", "v1beta2"),
    ("autoscaling", "v2beta1"),
    ("autoscaling", "v2beta2"),
    ("batch", "v1beta1"),
    ("policy", "v1beta1"),
    ("discovery.k8s.io", "v1beta1"),
    ("events.k8s.io", "v1beta1"),
    ("networking.k8s.io", "v1beta1"),
    ("node.k8s.io", "v1beta1"),
    ("rbac.authorization.k8s.io", "v1beta1"),
    ("scheduling.k8s.io", "v1beta1"),
    ("storage.k8s.io", "v1beta1"),
];

enum Document<'a> {
    Json(&'a [u8]),
    /// The document and the text about duplicate keys.
    Yaml(Value, Option<String>),
}

impl Document<'_> {
    fn meta(&self) -> Result<Meta, String> {
        let prefix = |e: String| format!("couldn't get version/kind; json parse error: {e}");
        let found = match self {
            Document::Json(body) => {
                let mut source = serde_json::Deserializer::from_slice(body);
                let found = MetaSeed.deserialize(&mut source).and_then(|found| source.end().map(|()| found));
                found.map_err(|e| prefix(syntax::describe(body, &e)))?
            }
            Document::Yaml(value, _) => MetaSeed.deserialize(value).map_err(|e| prefix(e.to_string()))?,
        };
        found.map_err(prefix)
    }

    fn typed(&self, schema: &Schema, id: TypeId, strict: bool) -> Result<(Value, typed::Findings), String> {
        match self {
            Document::Json(body) => {
                let mut source = serde_json::Deserializer::from_slice(body);
                typed::decode(schema, id, strict, &mut source).map_err(|e| syntax::describe(body, &e))
            }
            Document::Yaml(value, _) => typed::decode(schema, id, strict, value).map_err(|e| e.to_string()),
        }
    }
}

/// `apiVersion` and `kind` of a body.
struct Meta {
    api_version: String,
    kind: String,
}

struct Gvk {
    group: String,
    version: String,
    kind: String,
}

impl Meta {
    fn with_defaults(self, expected: &Expected<'_>) -> Result<Gvk, String> {
        let (group, version) = match self.api_version.matches('/').count() {
            0 => ("", self.api_version.as_str()),
            1 => self.api_version.split_once('/').unwrap_or_default(),
            _ => return Err(format!("unexpected GroupVersion string: {}", self.api_version)),
        };
        let (mut group, mut version) = (group.to_owned(), version.to_owned());
        if version.is_empty() && (group.is_empty() || group == expected.group) {
            (group, version) = (expected.group.to_owned(), expected.version.to_owned());
        }
        let kind = if self.kind.is_empty() { expected.kind.to_owned() } else { self.kind };
        Ok(Gvk { group, version, kind })
    }
}

impl Gvk {
    fn unusable(&self, expected: &Expected<'_>, cause: String) -> DecodeError {
        DecodeError::Unusable {
            kind: self.kind.clone(),
            version: self.version.clone(),
            wanted: expected.kind.to_owned(),
            cause,
        }
    }

    /// Another kind than expected: unknown ones and known ones have their own texts.
    fn check(&self, schema: &Schema, expected: &Expected<'_>) -> Result<(), DecodeError> {
        if self.everywhere(expected) {
            return Ok(());
        }
        if self.kind == expected.kind && self.group == expected.group {
            let known = self.version == expected.version
                || schema.by_gvk(&self.group, &self.version, &self.kind).is_some()
                || FORMER_VERSIONS.contains(&(self.group.as_str(), self.version.as_str()));
            if known {
                return Ok(());
            }
        }
        let cause = match schema.by_gvk(&self.group, &self.version, &self.kind) {
            Some(other) => {
                let (group, wanted) = (expected.group.split('.').next().unwrap_or_default(), expected.kind);
                let internal = if group.is_empty() { "core" } else { group };
                format!("converting ({}) to ({internal}.{wanted}): unknown conversion", schema.go_type(other))
            }
            None => format!(
                "no kind {:?} is registered for version {:?} in scheme \"pkg/api/legacyscheme/scheme.go:30\"",
                self.kind,
                api_version(&self.group, &self.version)
            ),
        };
        Err(self.unusable(expected, cause))
    }

    /// `DeleteOptions` are of every group and version.
    fn everywhere(&self, expected: &Expected<'_>) -> bool {
        self.kind == "DeleteOptions" && expected.kind == self.kind
    }

    fn check_version(&self, expected: &Expected<'_>) -> Result<(), DecodeError> {
        if self.everywhere(expected) {
            return Ok(());
        }
        if self.version == expected.version && self.group == expected.group {
            return Ok(());
        }
        Err(DecodeError::Version {
            found: api_version(&self.group, &self.version),
            wanted: api_version(expected.group, expected.version),
        })
    }
}

/// Reads only `apiVersion` and `kind`; everything else is skipped. The inner error is Go's text for a wrong type.
struct MetaSeed;

impl<'de> DeserializeSeed<'de> for MetaSeed {
    type Value = Result<Meta, String>;

    fn deserialize<D: serde::Deserializer<'de>>(self, source: D) -> Result<Self::Value, D::Error> {
        source.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MetaSeed {
    type Value = Result<Meta, String>;

    fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut meta = Meta { api_version: String::new(), kind: String::new() };
        let mut error = None;
        while let Some(key) = access.next_key::<std::borrow::Cow<'de, str>>()? {
            let target = match &*key {
                "apiVersion" => &mut meta.api_version,
                "kind" => &mut meta.kind,
                _ => {
                    access.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            match Value::deserialize(access.next_value::<Value>()?) {
                Ok(Value::String(text)) => *target = text,
                Ok(Value::Null) | Err(_) => {}
                Ok(other) => {
                    let found = json_type(&other);
                    error.get_or_insert(format!(
                        "json: cannot unmarshal {found} into Go struct field .{key} of type string"
                    ));
                }
            }
        }
        Ok(error.map_or(Ok(meta), Err))
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
        Ok(Ok(Meta { api_version: String::new(), kind: String::new() }))
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Err(not_an_object("bool")))
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Err(not_an_object("number")))
    }

    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Err(not_an_object("number")))
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Err(not_an_object("number")))
    }

    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<Self::Value, E> {
        Ok(Err(not_an_object("string")))
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        while access.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Err(not_an_object("array")))
    }
}

fn not_an_object(found: &str) -> String {
    let wanted = "struct { APIVersion string \"json:\\\"apiVersion,omitempty\\\"\"; Kind string \"json:\\\"kind,omitempty\\\"\" }";
    format!("json: cannot unmarshal {found} into Go value of type {wanted}")
}

/// Go's name for the type of a JSON value.
pub(super) fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The start of a body, as upstream quotes it: text when it looks like JSON, else hex.
fn summary(body: &[u8]) -> String {
    const LIMIT: usize = 30;
    let head = &body[..body.len().min(LIMIT)];
    let text = match body.first() {
        None => return "<empty>".to_owned(),
        Some(b'{') => String::from_utf8_lossy(head).into_owned(),
        Some(_) => head.iter().map(|b| format!("{b:02x}")).collect(),
    };
    if body.len() > LIMIT { text + " ..." } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::builtin;

    fn read(kind: (&str, &str, &str), body: &str, validation: FieldValidation) -> Result<Decoded, String> {
        read_as(kind, body, Format::Json, validation)
    }

    fn read_as(
        (group, version, kind): (&str, &str, &str),
        body: &str,
        format: Format,
        validation: FieldValidation,
    ) -> Result<Decoded, String> {
        let schema = builtin();
        let expected = Expected { group, version, kind, node: schema.by_gvk(group, version, kind).unwrap() };
        decode(schema, &expected, body.as_bytes(), format, validation).map_err(|e| e.to_string())
    }

    const POD: (&str, &str, &str) = ("", "v1", "Pod");
    const DEPLOYMENT: (&str, &str, &str) = ("apps", "v1", "Deployment");

    #[test]
    fn unknown_fields_warn_or_fail_as_asked() {
        let body = r#"{"kind":"Deployment","apiVersion":"apps/v1","spec":{"foo":1,"replicas":1,"replicas":2}}"#;
        let warned = read(DEPLOYMENT, body, FieldValidation::Warn).unwrap();
        assert_eq!(warned.warnings, [r#"unknown field "spec.foo""#, r#"duplicate field "spec.replicas""#]);
        assert!(read(DEPLOYMENT, body, FieldValidation::Ignore).unwrap().warnings.is_empty());
        assert_eq!(
            read(DEPLOYMENT, body, FieldValidation::Strict).unwrap_err(),
            r#"Deployment in version "v1" cannot be handled as a Deployment: strict decoding error: unknown field "spec.foo", duplicate field "spec.replicas""#
        );
    }

    #[test]
    fn malformed_json_is_described_in_gos_words() {
        for (body, text) in [
            ("", "couldn't get version/kind; json parse error: unexpected end of JSON input (<empty>)"),
            ("{", "couldn't get version/kind; json parse error: unexpected end of JSON input ({)"),
            (
                r#"{"a":x}"#,
                r#"couldn't get version/kind; json parse error: invalid character 'x' looking for beginning of value ({"a":x})"#,
            ),
            ("{} x", "couldn't get version/kind; json parse error: invalid character 'x' after top-level value ({} x)"),
            (
                r#"{"kind":1}"#,
                r#"couldn't get version/kind; json parse error: json: cannot unmarshal number into Go struct field .kind of type string ({"kind":1})"#,
            ),
        ] {
            let expected = format!("the object provided is unrecognized (must be of type Pod): {text}");
            assert_eq!(read(POD, body, FieldValidation::Warn).unwrap_err(), expected);
        }
    }

    #[test]
    fn another_kind_or_version_is_refused() {
        let error = |body| read(POD, body, FieldValidation::Warn).unwrap_err();
        assert_eq!(
            error(r#"{"kind":"Service","apiVersion":"v1"}"#),
            r#"Service in version "v1" cannot be handled as a Pod: converting (v1.Service) to (core.Pod): unknown conversion"#
        );
        assert_eq!(
            read(DEPLOYMENT, r#"{"kind":"Deployment","apiVersion":"apps/v1beta1"}"#, FieldValidation::Warn)
                .unwrap_err(),
            "the API version in the data (apps/v1beta1) does not match the expected API version (apps/v1)"
        );
        assert_eq!(
            error(r#"{"kind":"Nope","apiVersion":"v9"}"#),
            r#"Nope in version "v9" cannot be handled as a Pod: no kind "Nope" is registered for version "v9" in scheme "pkg/api/legacyscheme/scheme.go:30""#
        );
    }

    #[test]
    fn kind_and_version_are_filled_in() {
        let value = read(DEPLOYMENT, r#"{"metadata":{"name":"x"}}"#, FieldValidation::Strict).unwrap().value;
        assert_eq!((&value["apiVersion"], &value["kind"]), (&"apps/v1".into(), &"Deployment".into()));
    }

    #[test]
    fn yaml_decodes_to_the_same_value() {
        let yaml = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  containers:\n  - name: c\n    image: i\n";
        let json = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"},"spec":{"containers":[{"name":"c","image":"i"}]}}"#;
        let from_yaml = read_as(POD, yaml, Format::Yaml, FieldValidation::Strict).unwrap().value;
        assert_eq!(from_yaml, read(POD, json, FieldValidation::Strict).unwrap().value);
    }

    #[test]
    fn duplicate_yaml_keys_are_a_strict_error() {
        let yaml = "apiVersion: v1\nkind: ConfigMap\ndata:\n  a: x\n  a: y\n";
        let kind = ("", "v1", "ConfigMap");
        let decoded = read_as(kind, yaml, Format::Yaml, FieldValidation::Warn).unwrap();
        assert_eq!(decoded.warnings, ["yaml: unmarshal errors:\n  line 5: key \"a\" already set in map"]);
        assert_eq!(decoded.value["data"]["a"], "y");
        assert!(read_as(kind, yaml, Format::Yaml, FieldValidation::Strict).is_err());
    }

    #[test]
    fn protobuf_bodies_decode_like_the_others() {
        let schema = builtin();
        let body = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p"},"spec":{"containers":[{"name":"c"}]}}"#;
        let from_json = read(POD, body, FieldValidation::Strict).unwrap().value;
        let node = schema.by_gvk("", "v1", "Pod").unwrap();
        let expected = Expected { group: "", version: "v1", kind: "Pod", node };
        let packed = proto::encode(schema, node, &from_json);
        let decoded = decode(schema, &expected, &packed, Format::Protobuf, FieldValidation::Strict).unwrap();
        assert_eq!(decoded.value, from_json);
        let error = decode(schema, &expected, b"{}", Format::Protobuf, FieldValidation::Strict).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the object provided is unrecognized (must be of type Pod): provided data does not appear to be a protobuf message, expected prefix [107 56 115 0] ({})"
        );
    }

    #[test]
    fn an_applied_configuration_is_taken_as_it_stands() {
        let (value, duplicates) = configuration(b"spec:\n  replicas: 1\n  replicas: 2\n").unwrap();
        assert_eq!(value, serde_json::json!({"spec": {"replicas": 2}}));
        let text =
            "error converting YAML to JSON: yaml: unmarshal errors:\n  line 3: key \"replicas\" already set in map";
        assert_eq!(duplicates.as_deref(), Some(text));
        assert!(configuration(b"[]").is_err());
    }
}

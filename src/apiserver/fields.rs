//! Field selectors: the grammar of `fieldSelector=` with upstream's texts, and which fields a kind allows.

use super::resources::Resource;

/// All terms must hold; none at all matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<Term>,
}

/// `field=value` or `field!=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Term {
    pub field: String,
    pub value: String,
    pub equals: bool,
}

impl FieldSelector {
    /// Parses `a=b,c!=d`; `\` escapes `\`, `,` and `=` in values.
    ///
    /// # Errors
    /// Upstream's text for what is wrong.
    pub fn parse(text: &str) -> Result<FieldSelector, String> {
        let mut parts = split_terms(text);
        parts.sort_unstable();
        let mut terms = Vec::new();
        for part in parts.into_iter().filter(|p| !p.is_empty()) {
            let Some((field, equals, value)) = split_term(part) else {
                return Err(format!("invalid selector: '{text}'; can't understand '{part}'"));
            };
            terms.push(Term { field: field.to_owned(), value: unescape(value)?, equals });
        }
        // Upstream leaves out an empty `has` term only for both parts empty.
        terms.retain(|t| !(t.equals && t.field.is_empty() && t.value.is_empty()));
        Ok(FieldSelector { terms })
    }

    /// Checks the fields against what the kind allows, and maps old names to new ones.
    ///
    /// # Errors
    /// Upstream's text for the field that is not allowed.
    pub fn for_resource(mut self, resource: &Resource) -> Result<FieldSelector, String> {
        for term in &mut self.terms {
            let field = term.field.as_str();
            if matches!(field, "metadata.name" | "metadata.namespace") {
                continue;
            }
            if field == "spec.host" && resource.plural == "pods" {
                term.field = "spec.nodeName".to_owned();
            } else if !resource.fields.iter().any(|f| f == field) {
                return Err(refusal(resource, field));
            }
        }
        Ok(self)
    }

    /// Whether it matches everything.
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// The terms, all of which must hold.
    pub fn terms(&self) -> &[Term] {
        &self.terms
    }

    /// The one value that `field` must have, if the selector says so.
    pub fn exact(&self, field: &str) -> Option<&str> {
        self.terms.iter().find(|t| t.field == field && t.equals).map(|t| t.value.as_str())
    }

    /// Whether an object with these field values satisfies it; a missing field is empty.
    pub fn matches<'a>(&self, lookup: impl Fn(&str) -> std::borrow::Cow<'a, str>) -> bool {
        self.terms.iter().all(|t| (lookup(&t.field) == t.value) == t.equals)
    }
}

fn refusal(resource: &Resource, field: &str) -> String {
    match (&*resource.group, &*resource.kind) {
        ("batch", "Job") => format!("field label \"{field}\" not supported for Job"),
        ("resource.k8s.io", kind @ "ResourceSlice") => {
            let version = &resource.storage_version;
            format!("field label not supported for {}/{version}, Kind={kind}: {field}", resource.group)
        }
        _ if resource.fields.is_empty() => {
            format!("\"{field}\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"")
        }
        _ => format!("field label not supported: {field}"),
    }
}

/// What a field reads as when the object does not have it: Go's zero value of its type.
pub fn zero(field: &str) -> &'static str {
    match field {
        "spec.unschedulable" | "spec.hostNetwork" => "false",
        "status.successful" | "status.replicas" => "0",
        _ => "",
    }
}

fn split_terms(text: &str) -> Vec<&str> {
    if text.is_empty() {
        return Vec::new();
    }
    let mut terms = Vec::new();
    let (mut start, mut escaped) = (0, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ',' => {
                terms.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms
}

fn split_term(term: &str) -> Option<(&str, bool, &str)> {
    for (at, _) in term.char_indices() {
        let rest = &term[at..];
        for (operator, equals) in [("!=", false), ("==", true), ("=", true)] {
            if let Some(value) = rest.strip_prefix(operator) {
                return Some((&term[..at], equals, value));
            }
        }
    }
    None
}

fn unescape(value: &str) -> Result<String, String> {
    let mut out = String::with_capacity(value.len());
    let mut characters = value.chars();
    while let Some(c) = characters.next() {
        match c {
            '\\' => match characters.next() {
                Some(c @ ('\\' | ',' | '=')) => out.push(c),
                Some(c) => return Err(format!("invalid field selector: invalid escape sequence: \\{c}")),
                None => return Err("invalid field selector: invalid escape sequence: \\".to_owned()),
            },
            ',' | '=' => {
                return Err(format!("invalid field selector: unescaped character in value: {}", c as u32));
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::resources::RESOURCES;

    #[test]
    fn grammar() {
        let selector = FieldSelector::parse(r"metadata.name=a\,b,spec.nodeName!=").unwrap();
        assert_eq!(selector.exact("metadata.name"), Some("a,b"));
        assert!(selector.matches(|f| if f == "metadata.name" { "a,b".into() } else { "n".into() }));
        assert!(!selector.matches(|f| if f == "metadata.name" { "a,b".into() } else { "".into() }));
        assert_eq!(FieldSelector::parse("x").unwrap_err(), "invalid selector: 'x'; can't understand 'x'");
        assert!(FieldSelector::parse(r"a=b\c").is_err());
    }

    #[test]
    fn fields_of_a_kind() {
        let find = |plural: &str| RESOURCES.iter().find(|r| r.plural == plural).unwrap().clone();
        let parse = |text: &str, plural: &str| FieldSelector::parse(text).unwrap().for_resource(&find(plural));
        assert!(parse("spec.nodeName=n", "pods").is_ok());
        assert_eq!(parse("spec.x=n", "pods").unwrap_err(), "field label not supported: spec.x");
        assert_eq!(
            parse("data=n", "configmaps").unwrap_err(),
            r#""data" is not a known field selector: only "metadata.name", "metadata.namespace""#
        );
    }
}

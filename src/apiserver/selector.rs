//! Label selectors: the grammar of `labelSelector=` with upstream's texts, and matching.

use super::field::{FieldError, aggregate};
use super::names;

/// Where labels are looked up.
pub trait Lookup {
    /// The value of a key.
    fn lookup(&self, key: &str) -> Option<&str>;
}

impl Lookup for std::collections::BTreeMap<String, String> {
    fn lookup(&self, key: &str) -> Option<&str> {
        self.get(key).map(String::as_str)
    }
}

impl Lookup for serde_json::Map<String, serde_json::Value> {
    fn lookup(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(serde_json::Value::as_str)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
    GreaterThan,
    LessThan,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

impl Requirement {
    fn matches(&self, labels: &dyn Lookup) -> bool {
        let value = labels.lookup(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|v| self.values.iter().any(|wanted| wanted == v)),
            Operator::NotIn => value.is_none_or(|v| !self.values.iter().any(|wanted| wanted == v)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::GreaterThan | Operator::LessThan => {
                let (Some(actual), Some(limit)) = (
                    value.and_then(|v| v.parse::<i64>().ok()),
                    self.values.first().and_then(|v| v.parse::<i64>().ok()),
                ) else {
                    return false;
                };
                if self.operator == Operator::GreaterThan { actual > limit } else { actual < limit }
            }
        }
    }
}

/// All requirements must hold; none at all matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

impl LabelSelector {
    /// Parses `a=b,c in (d,e),!f`.
    ///
    /// # Errors
    /// Upstream's text for what is wrong.
    pub fn parse(text: &str) -> Result<LabelSelector, String> {
        let mut parser = Parser { tokens: scan(text), position: 0 };
        Ok(LabelSelector { requirements: parser.parse()? })
    }

    /// A selector that wants exactly these labels (a Service's or a replication controller's `spec.selector`).
    pub fn from_map(labels: &serde_json::Map<String, serde_json::Value>) -> LabelSelector {
        let requirements = labels
            .iter()
            .map(|(key, value)| Requirement {
                key: key.clone(),
                operator: Operator::In,
                values: vec![value.as_str().unwrap_or_default().to_owned()],
            })
            .collect();
        LabelSelector { requirements }
    }

    /// A `metav1.LabelSelector` object; none when an operator is unknown.
    pub fn from_object(object: &serde_json::Value) -> Option<LabelSelector> {
        let mut selector = match object.get("matchLabels").and_then(|l| l.as_object()) {
            Some(labels) => LabelSelector::from_map(labels),
            None => LabelSelector::default(),
        };
        for expression in object.get("matchExpressions").and_then(|e| e.as_array()).into_iter().flatten() {
            let operator = match expression.get("operator")?.as_str()? {
                "In" => Operator::In,
                "NotIn" => Operator::NotIn,
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                _ => return None,
            };
            let values = expression.get("values").and_then(|v| v.as_array());
            selector.requirements.push(Requirement {
                key: expression.get("key")?.as_str()?.to_owned(),
                operator,
                values: values.into_iter().flatten().filter_map(|v| v.as_str()).map(str::to_owned).collect(),
            });
        }
        Some(selector)
    }

    /// Whether it matches everything.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Whether these labels satisfy it.
    pub fn matches(&self, labels: &dyn Lookup) -> bool {
        self.requirements.iter().all(|r| r.matches(labels))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Error,
    End,
    ClosedPar,
    Comma,
    Not,
    DoubleEquals,
    Equals,
    GreaterThan,
    Identifier,
    In,
    LessThan,
    NotEquals,
    NotIn,
    OpenPar,
}

fn symbol(text: &str) -> Option<Token> {
    Some(match text {
        ")" => Token::ClosedPar,
        "," => Token::Comma,
        "!" => Token::Not,
        "==" => Token::DoubleEquals,
        "=" => Token::Equals,
        ">" => Token::GreaterThan,
        "in" => Token::In,
        "<" => Token::LessThan,
        "!=" => Token::NotEquals,
        "notin" => Token::NotIn,
        "(" => Token::OpenPar,
        _ => return None,
    })
}

fn is_special(c: u8) -> bool {
    matches!(c, b'=' | b'!' | b'(' | b')' | b',' | b'>' | b'<')
}

fn is_blank(c: u8) -> bool {
    matches!(c, b' ' | b'\t' | b'\r' | b'\n')
}

fn scan(text: &str) -> Vec<(Token, String)> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let mut at = 0;
    loop {
        while at < bytes.len() && is_blank(bytes[at]) {
            at += 1;
        }
        let start = at;
        match bytes.get(at) {
            None | Some(0) => {
                tokens.push((Token::End, String::new()));
                return tokens;
            }
            Some(c) if is_special(*c) => {
                // The longest run of symbols that is a token.
                let mut found = None;
                while at < bytes.len() && is_special(bytes[at]) {
                    match symbol(&text[start..=at]) {
                        Some(token) => found = Some(token),
                        None if found.is_some() => break,
                        None => {}
                    }
                    at += 1;
                }
                let literal = &text[start..at];
                tokens.push(match found {
                    Some(token) => (token, literal.to_owned()),
                    None => (Token::Error, format!("error expected: keyword found '{literal}'")),
                });
            }
            Some(_) => {
                while at < bytes.len() && bytes[at] != 0 && !is_special(bytes[at]) && !is_blank(bytes[at]) {
                    at += 1;
                }
                let literal = &text[start..at];
                tokens.push((symbol(literal).unwrap_or(Token::Identifier), literal.to_owned()));
            }
        }
    }
}

struct Parser {
    tokens: Vec<(Token, String)>,
    position: usize,
}

impl Parser {
    /// The current token; past the end it stays at the end. As a value, `in` and `notin` are identifiers.
    fn look(&self, as_value: bool) -> (Token, &str) {
        let index = self.position.min(self.tokens.len() - 1);
        let (token, literal) = &self.tokens[index];
        let token = match token {
            Token::In | Token::NotIn if as_value => Token::Identifier,
            other => *other,
        };
        (token, literal)
    }

    fn take(&mut self, as_value: bool) -> (Token, String) {
        let (token, literal) = self.look(as_value);
        let taken = (token, literal.to_owned());
        self.position += 1;
        taken
    }

    fn parse(&mut self) -> Result<Vec<Requirement>, String> {
        let mut requirements = Vec::new();
        loop {
            match self.look(true) {
                (Token::Identifier | Token::Not, _) => {
                    let requirement =
                        self.requirement().map_err(|error| format!("unable to parse requirement: {error}"))?;
                    requirements.push(requirement);
                    match self.take(true) {
                        (Token::End, _) => break,
                        (Token::Comma, _) => {
                            let (token, literal) = self.look(true);
                            if token != Token::Identifier && token != Token::Not {
                                return Err(format!("found '{literal}', expected: identifier after ','"));
                            }
                        }
                        (_, literal) => {
                            return Err(format!("found '{literal}', expected: ',' or 'end of string'"));
                        }
                    }
                }
                (Token::End, _) => break,
                (_, literal) => {
                    return Err(format!("found '{literal}', expected: !, identifier, or 'end of string'"));
                }
            }
        }
        requirements.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(requirements)
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let (mut token, mut literal) = self.take(true);
        let negated = token == Token::Not;
        if negated {
            (token, literal) = self.take(true);
        }
        if token != Token::Identifier {
            return Err(format!("found '{literal}', expected: identifier"));
        }
        let key_errors = names::qualified_name(&literal);
        if !key_errors.is_empty() {
            return Err(FieldError::invalid("<nil>", literal, key_errors.join("; ")).to_string());
        }
        let key = literal;
        if matches!(self.look(true).0, Token::End | Token::Comma) || negated {
            let operator = if negated { Operator::DoesNotExist } else { Operator::Exists };
            return Ok(Requirement { key, operator, values: Vec::new() });
        }
        let (operator, exact) = match self.take(false) {
            (Token::In, _) => (Operator::In, false),
            (Token::NotIn, _) => (Operator::NotIn, false),
            (Token::Equals | Token::DoubleEquals, _) => (Operator::In, true),
            (Token::NotEquals, _) => (Operator::NotIn, true),
            (Token::GreaterThan, _) => (Operator::GreaterThan, true),
            (Token::LessThan, _) => (Operator::LessThan, true),
            (_, literal) => {
                return Err(format!("found '{literal}', expected: in, notin, =, ==, !=, gt, lt"));
            }
        };
        let mut values = if exact { vec![self.exact_value()?] } else { self.value_list()? };
        values.sort();
        values.dedup();
        check_values(&key, operator, &values)?;
        Ok(Requirement { key, operator, values })
    }

    fn exact_value(&mut self) -> Result<String, String> {
        if matches!(self.look(true).0, Token::End | Token::Comma) {
            return Ok(String::new());
        }
        match self.take(true) {
            (Token::Identifier, literal) => Ok(literal),
            (_, literal) => Err(format!("found '{literal}', expected: identifier")),
        }
    }

    fn value_list(&mut self) -> Result<Vec<String>, String> {
        let (token, literal) = self.take(true);
        if token != Token::OpenPar {
            return Err(format!("found '{literal}' expected: '('"));
        }
        let (token, literal) = self.look(true);
        let literal = literal.to_owned();
        match token {
            Token::Identifier | Token::Comma => {
                let values = self.identifiers()?;
                if self.take(true).0 != Token::ClosedPar {
                    return Err(format!("found '{literal}', expected: ')'"));
                }
                Ok(values)
            }
            Token::ClosedPar => {
                self.position += 1;
                Ok(vec![String::new()])
            }
            _ => Err(format!("found '{literal}', expected: ',', ')' or identifier")),
        }
    }

    fn identifiers(&mut self) -> Result<Vec<String>, String> {
        let mut values = Vec::new();
        loop {
            match self.take(true) {
                (Token::Identifier, literal) => {
                    values.push(literal);
                    match self.look(true) {
                        (Token::Comma, _) => {}
                        (Token::ClosedPar, _) => return Ok(values),
                        (_, literal) => return Err(format!("found '{literal}', expected: ',' or ')'")),
                    }
                }
                (Token::Comma, _) => {
                    if values.is_empty() {
                        values.push(String::new());
                    }
                    match self.look(true).0 {
                        Token::ClosedPar => {
                            values.push(String::new());
                            return Ok(values);
                        }
                        Token::Comma => values.push(String::new()),
                        _ => {}
                    }
                }
                (_, literal) => return Err(format!("found '{literal}', expected: ',', or identifier")),
            }
        }
    }
}

fn check_values(key: &str, operator: Operator, values: &[String]) -> Result<(), String> {
    let mut errors = Vec::new();
    if matches!(operator, Operator::GreaterThan | Operator::LessThan) {
        for (index, value) in values.iter().enumerate() {
            if value.parse::<i64>().is_err() {
                let detail = "for 'Gt', 'Lt' operators, the value must be an integer";
                errors.push(FieldError::invalid(format!("values[{index}]"), value.as_str(), detail));
            }
        }
    }
    for (index, value) in values.iter().enumerate() {
        let wrong = names::label_value(value);
        if !wrong.is_empty() {
            errors.push(FieldError::invalid(format!("values[{index}][{key}]"), value.as_str(), wrong.join("; ")));
        }
    }
    aggregate(errors.iter().map(ToString::to_string)).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn matching() {
        let web = labels(&[("app", "web"), ("tier", "1")]);
        for (selector, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier", true),
            ("app!=web", false),
            ("missing!=x", true),
            ("app in (db, web)", true),
            ("app notin (db,web)", false),
            ("missing notin (a)", true),
            ("!missing", true),
            ("!app", false),
            ("tier>0", true),
            ("tier<1", false),
            ("app=", false),
            ("in in (in)", false),
        ] {
            assert_eq!(LabelSelector::parse(selector).unwrap().matches(&web), expected, "{selector}");
        }
    }

    #[test]
    fn errors_read_as_upstreams() {
        for (selector, text) in [
            ("a b", "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt"),
            ("a,", "found '', expected: identifier after ','"),
            ("a in b", "unable to parse requirement: found 'b' expected: '('"),
            ("=a", "found '=', expected: !, identifier, or 'end of string'"),
            ("a=b c", "found 'c', expected: ',' or 'end of string'"),
            (
                "a>x",
                "unable to parse requirement: values[0]: Invalid value: \"x\": for 'Gt', 'Lt' operators, the value must be an integer",
            ),
        ] {
            assert_eq!(LabelSelector::parse(selector).unwrap_err(), text, "{selector}");
        }
        let error = LabelSelector::parse("a=-b").unwrap_err();
        assert!(error.starts_with(r#"unable to parse requirement: values[0][a]: Invalid value: "-b": a valid label"#));
        let error = LabelSelector::parse("-a=b").unwrap_err();
        assert!(
            error.starts_with(r#"unable to parse requirement: <nil>: Invalid value: "-a": name part must"#),
            "{error}"
        );
    }
}

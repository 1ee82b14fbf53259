//! Labels and the selectors over them: the one implementation that controllers and scheduler share.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

/// Labels, sorted by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(Box<[(Box<str>, Box<str>)]>);

impl Labels {
    /// Value of a label.
    pub fn get(&self, key: &str) -> Option<&str> {
        let index = self.0.binary_search_by(|(candidate, _)| (**candidate).cmp(key)).ok()?;
        Some(&self.0[index].1)
    }

    /// All labels, ordered by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (&**key, &**value))
    }

    /// Labels from pairs.
    pub fn from_pairs<K: AsRef<str>, V: AsRef<str>>(pairs: impl IntoIterator<Item = (K, V)>) -> Labels {
        let mut labels: Vec<(Box<str>, Box<str>)> =
            pairs.into_iter().map(|(key, value)| (key.as_ref().into(), value.as_ref().into())).collect();
        labels.sort();
        Labels(labels.into())
    }

    /// The labels of decoded metadata.
    pub fn from_map(map: Option<&BTreeMap<String, String>>) -> Labels {
        map.map(Labels::from_pairs).unwrap_or_default()
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Labels, D::Error> {
        struct LabelsVisitor;
        impl<'de> Visitor<'de> for LabelsVisitor {
            type Value = Labels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Labels, A::Error> {
                let mut labels: Vec<(Box<str>, Box<str>)> = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    labels.push(entry);
                }
                labels.sort();
                Ok(Labels(labels.into()))
            }
        }
        deserializer.deserialize_map(LabelsVisitor)
    }
}

/// How a requirement compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// The label has one of the values.
    In,
    /// The label is missing or has none of the values.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is missing.
    DoesNotExist,
    /// The label is an integer greater than the value (node selectors only).
    Gt,
    /// The label is an integer less than the value (node selectors only).
    Lt,
}

impl Operator {
    /// The operator of that name.
    pub fn parse(name: &str) -> Option<Operator> {
        Some(match name {
            "In" => Operator::In,
            "NotIn" => Operator::NotIn,
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            "Gt" => Operator::Gt,
            "Lt" => Operator::Lt,
            _ => return None,
        })
    }
}

/// One requirement on one label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// Key of the label.
    pub key: Box<str>,
    /// How it compares.
    pub operator: Operator,
    /// The values compared with.
    pub values: Box<[Box<str>]>,
}

impl Requirement {
    /// Whether the label's value (or its absence) satisfies this.
    pub fn matches_value(&self, value: Option<&str>) -> bool {
        match (self.operator, value) {
            (Operator::Exists, value) => value.is_some(),
            (Operator::DoesNotExist, value) => value.is_none(),
            (Operator::In, Some(value)) => self.values.iter().any(|candidate| **candidate == *value),
            (Operator::NotIn, Some(value)) => !self.values.iter().any(|candidate| **candidate == *value),
            (Operator::NotIn, None) => true,
            (Operator::Gt | Operator::Lt, Some(value)) => {
                let limit = self.values.first().and_then(|limit| limit.parse::<i64>().ok());
                match (value.parse::<i64>(), limit) {
                    (Ok(value), Some(limit)) if self.operator == Operator::Gt => value > limit,
                    (Ok(value), Some(limit)) => value < limit,
                    _ => false,
                }
            }
            (Operator::In | Operator::Gt | Operator::Lt, None) => false,
        }
    }
}

/// A conjunction of requirements. The empty one selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    requirements: Box<[Requirement]>,
}

impl Selector {
    /// A selector of these requirements.
    pub fn new(requirements: Vec<Requirement>) -> Selector {
        Selector { requirements: requirements.into() }
    }

    /// `None` selects nothing: that is what a missing label selector means.
    pub fn of_label_selector(selector: Option<&LabelSelector>) -> Option<Selector> {
        let selector = selector?;
        let mut requirements = Vec::new();
        for (key, value) in selector.match_labels.iter().flatten() {
            requirements.push(equals(key, value));
        }
        for expression in selector.match_expressions.iter().flatten() {
            requirements.push(Requirement {
                key: expression.key.as_str().into(),
                operator: Operator::parse(&expression.operator)?,
                values: expression.values.iter().flatten().map(|value| value.as_str().into()).collect(),
            });
        }
        Some(Selector::new(requirements))
    }

    /// A map of labels, all of which must be equal.
    pub fn of_map<'a>(map: impl IntoIterator<Item = (&'a String, &'a String)>) -> Selector {
        Selector::new(map.into_iter().map(|(key, value)| equals(key, value)).collect())
    }

    pub(super) fn of_map_json(json: &str) -> Option<Selector> {
        let map: BTreeMap<String, String> = serde_json::from_str(json).ok()?;
        Some(Selector::of_map(&map))
    }

    pub(super) fn of_label_selector_json(json: &str) -> Option<Selector> {
        let selector: LabelSelector = serde_json::from_str(json).ok()?;
        Selector::of_label_selector(Some(&selector))
    }

    /// This selector with further requirements.
    pub fn and(self, further: impl Iterator<Item = Requirement>) -> Selector {
        Selector { requirements: self.requirements.into_iter().chain(further).collect() }
    }

    /// Whether all requirements hold.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|requirement| requirement.matches_value(labels.get(&requirement.key)))
    }

    /// Whether this selects everything.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }
}

fn equals(key: &str, value: &str) -> Requirement {
    Requirement { key: key.into(), operator: Operator::In, values: Box::new([value.into()]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requirement(operator: Operator, values: &[&str]) -> Requirement {
        Requirement { key: "k".into(), operator, values: values.iter().map(|value| (*value).into()).collect() }
    }

    #[test]
    fn operators_follow_upstream_on_missing_labels() {
        let some = Labels::from_pairs([("k", "3")]);
        let none = Labels::default();
        for (operator, values, with, without) in [
            (Operator::In, &["3"][..], true, false),
            (Operator::NotIn, &["3"], false, true),
            (Operator::Exists, &[], true, false),
            (Operator::DoesNotExist, &[], false, true),
            (Operator::Gt, &["2"], true, false),
            (Operator::Lt, &["2"], false, false),
        ] {
            let selector = Selector::new(vec![requirement(operator, values)]);
            assert_eq!((selector.matches(&some), selector.matches(&none)), (with, without), "{operator:?}");
        }
    }

    #[test]
    fn a_missing_selector_selects_nothing_and_an_empty_one_everything() {
        assert_eq!(Selector::of_label_selector(None), None);
        assert!(Selector::of_label_selector(Some(&LabelSelector::default())).unwrap().matches(&Labels::default()));
    }
}

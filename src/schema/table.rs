//! Reads `table.txt`, whose format `generate.py` documents, into the type graph.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::LazyLock;

use super::default;
use super::node::{Field, Gvk, Kind, ListType, Node, PatchStrategy, Schema, Text, TypeId};

static TABLE: &str = include_str!("table.txt");

/// All types of Kubernetes 1.35, read on first use.
pub fn builtin() -> &'static Schema {
    static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
        // The text is compiled in and a test reads it: it cannot be malformed at run time.
        #[allow(clippy::expect_used)]
        read(TABLE).expect("the built-in table is well-formed")
    });
    &SCHEMA
}

/// A malformed table.
#[derive(Debug, thiserror::Error)]
#[error("schema table, line {line}: {what}")]
pub struct TableError {
    /// Counted from 1.
    pub line: usize,
    pub what: &'static str,
}

fn read(text: &'static str) -> Result<Schema, TableError> {
    let mut reader = Reader::new(text);
    reader.declare()?;
    reader.define()?;
    Ok(reader.finish())
}

/// What makes two unnamed lists or maps the same type.
type Shape = (Kind, TypeId, ListType, Text, bool);

struct Embed {
    owner: TypeId,
    inner: TypeId,
    tag: u16,
}

struct Reader {
    text: &'static str,
    schema: Schema,
    named: HashMap<(&'static str, &'static str), TypeId>,
    scalars: HashMap<&'static str, TypeId>,
    shapes: HashMap<Shape, TypeId>,
    /// Structs that a field declares atomic, or granular, against their type.
    overridden: HashMap<TypeId, TypeId>,
    embeds: Vec<Embed>,
    /// Direct fields of each struct, in the order of the table.
    own: Vec<(TypeId, Vec<Field>)>,
}

impl Reader {
    fn new(text: &'static str) -> Reader {
        let schema = Schema { text: Cow::Borrowed(text), ..Schema::default() };
        let mut reader = Reader {
            text,
            schema,
            named: HashMap::with_capacity(1024),
            scalars: HashMap::new(),
            shapes: HashMap::with_capacity(512),
            overridden: HashMap::new(),
            embeds: Vec::new(),
            own: Vec::with_capacity(800),
        };
        for (word, kind) in SCALARS {
            let id = reader.add(*kind);
            reader.scalars.insert(*word, id);
        }
        reader
    }

    fn text_of(&self, part: &str) -> Text {
        let start = part.as_ptr() as usize - self.text.as_ptr() as usize;
        Text { start: start as u32, len: part.len() as u32 }
    }

    fn add(&mut self, kind: Kind) -> TypeId {
        let id = TypeId(self.schema.nodes.len() as u32);
        self.schema.nodes.push(Node {
            kind,
            package: Text::default(),
            name: Text::default(),
            item: id,
            fields: 0..0,
            keys: 0..0,
            list_type: ListType::Atomic,
            atomic: false,
            has_defaults: false,
            hook: None,
        });
        id
    }

    fn node_mut(&mut self, id: TypeId) -> &mut Node {
        &mut self.schema.nodes[id.0 as usize]
    }

    /// First pass: names of all structs.
    fn declare(&mut self) -> Result<(), TableError> {
        let (mut alias, mut prefix) = ("", "");
        for (line, words) in lines(self.text) {
            let mut words = words.split_ascii_whitespace();
            match words.next() {
                Some("package") => {
                    alias = words.next().ok_or(TableError { line, what: "package without alias" })?;
                    prefix = words.next().ok_or(TableError { line, what: "package without prefix" })?;
                }
                Some("alias") | None => {}
                Some(name) => {
                    let id = self.add(Kind::Struct);
                    let package = self.text_of(alias.rsplit('/').next().unwrap_or(alias));
                    let text = self.text_of(name);
                    let entry = (self.text_of(prefix), text, id);
                    self.schema.names.push(entry);
                    let node = self.node_mut(id);
                    (node.package, node.name) = (package, text);
                    self.named.insert((alias, name), id);
                    for word in words {
                        self.struct_attribute(line, id, word)?;
                    }
                }
            }
        }
        if let Some(props) = self.named.get(&("apiextensions/v1", "JSONSchemaProps")).copied() {
            for word in ["orbool", "orarray", "orstrings"] {
                if let Some(id) = self.scalars.get(word).copied() {
                    self.node_mut(id).item = props;
                }
            }
        }
        self.aliases()
    }

    fn struct_attribute(&mut self, line: usize, id: TypeId, word: &'static str) -> Result<(), TableError> {
        let Some(gvk) = word.strip_prefix("gvk=") else {
            self.node_mut(id).atomic = word == "atomic";
            return Ok(());
        };
        let mut parts = gvk.splitn(3, '/').map(|p| self.text_of(p));
        let (Some(group), Some(version), Some(kind)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(TableError { line, what: "gvk needs three parts" });
        };
        drop(parts);
        self.schema.gvks.push(Gvk { group, version, kind, node: id });
        Ok(())
    }

    /// Named scalars, lists and maps. One may refer to another that stands in a package further down, hence the rounds.
    fn aliases(&mut self) -> Result<(), TableError> {
        let mut open: Vec<(usize, &'static str, &'static str, &'static str)> = Vec::new();
        let mut package = "";
        for (line, words) in lines(self.text) {
            let mut words = words.split_ascii_whitespace();
            match (words.next(), words.next(), words.next()) {
                (Some("package"), Some(alias), _) => package = alias,
                (Some("alias"), Some(name), Some(target)) => open.push((line, package, name, target)),
                _ => {}
            }
        }
        while !open.is_empty() {
            let before = open.len();
            open.retain(|(line, package, name, target)| {
                let Ok((inner, _)) = self.resolve(*line, package, target, Attributes::default()) else { return true };
                let mut node = self.schema.node(inner).clone();
                node.package = self.text_of(package.rsplit('/').next().unwrap_or(package));
                node.name = self.text_of(name);
                let id = TypeId(self.schema.nodes.len() as u32);
                self.schema.nodes.push(node);
                self.named.insert((package, name), id);
                false
            });
            if open.len() == before {
                return Err(TableError { line: open[0].0, what: "alias of an unknown type" });
            }
        }
        Ok(())
    }

    /// Second pass: fields.
    fn define(&mut self) -> Result<(), TableError> {
        let (mut package, mut owner) = ("", None);
        for (index, text) in self.text.lines().enumerate() {
            let line = index + 1;
            if text.starts_with('#') {
                continue;
            }
            let Some(words) = text.strip_prefix(' ') else {
                let mut words = text.split_ascii_whitespace();
                match words.next() {
                    Some("package") => package = words.next().unwrap_or_default(),
                    Some("alias") | None => {}
                    Some(name) => {
                        owner = self.named.get(&(package, name)).copied();
                        if let Some(id) = owner {
                            self.own.push((id, Vec::with_capacity(8)));
                        }
                    }
                }
                continue;
            };
            let Some(owner) = owner else { return Err(TableError { line, what: "field outside a type" }) };
            self.member(line, package, owner, words)?;
        }
        Ok(())
    }

    fn member(
        &mut self,
        line: usize,
        package: &'static str,
        owner: TypeId,
        text: &'static str,
    ) -> Result<(), TableError> {
        let mut words = text.split(' ');
        let (Some(name), Some(target)) = (words.next(), words.next()) else {
            return Err(TableError { line, what: "field without type" });
        };
        if name == "+" {
            let (inner, _) = self.resolve(line, package, target, Attributes::default())?;
            let tag = words.next().and_then(|w| w.strip_prefix('#')).and_then(|w| w.parse().ok()).unwrap_or(0);
            self.embeds.push(Embed { owner, inner, tag });
            return Ok(());
        }
        let flags = words.next().unwrap_or("-");
        let mut attributes = Attributes::default();
        let (mut tag, mut patch, mut merge_key) = (0, PatchStrategy::default(), Text::default());
        let (mut default, mut default_public) = (None, false);
        let mut rest = text.get(name.len() + target.len() + flags.len() + 3..).unwrap_or_default();
        while !rest.is_empty() {
            let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
            if let Some(json) = rest.strip_prefix('=').or_else(|| rest.strip_prefix(":=")) {
                // A default is the last attribute and may contain spaces.
                let value = serde_json::from_str(json).map_err(|_| TableError { line, what: "default is not JSON" })?;
                default = Some(self.schema.defaults.len() as u32);
                default_public = rest.starts_with('=');
                self.schema.defaults.push(value);
                break;
            } else if let Some(number) = word.strip_prefix('#') {
                tag = number.parse().map_err(|_| TableError { line, what: "tag is not a number" })?;
            } else if let Some(list) = word.strip_prefix("list=") {
                attributes.list = Some(list);
            } else if let Some(map) = word.strip_prefix("map=") {
                attributes.atomic_map = Some(map == "atomic");
            } else if let Some(strategy) = word.strip_prefix("patch=") {
                let (names, key) = strategy.split_once(':').unwrap_or((strategy, &strategy[..0]));
                patch = patch_strategy(names);
                merge_key = self.text_of(key);
            } else {
                return Err(TableError { line, what: "unknown attribute" });
            }
            rest = after;
        }
        let (node, pointer) = self.resolve(line, package, target, attributes)?;
        let field = Field {
            name: self.text_of(name),
            merge_key,
            node,
            tag,
            embedded: None,
            required: flags.contains('!'),
            pointer,
            omit_empty: flags.contains('?'),
            omit_zero: flags.contains('0'),
            patch,
            atomic_list: attributes.list == Some("atomic"),
            default_public,
            default,
        };
        match self.own.last_mut() {
            Some((_, fields)) => fields.push(field),
            None => return Err(TableError { line, what: "field outside a type" }),
        }
        Ok(())
    }

    /// The node of a type text, and whether it is a pointer.
    fn resolve(
        &mut self,
        line: usize,
        package: &'static str,
        text: &'static str,
        attributes: Attributes,
    ) -> Result<(TypeId, bool), TableError> {
        let (text, pointer) = text.strip_prefix('*').map_or((text, false), |t| (t, true));
        let bracketed = text.get(1..text.len().saturating_sub(1)).unwrap_or_default();
        let id = match text.as_bytes().first() {
            Some(b'[') => {
                let (item, _) = self.resolve(line, package, bracketed, Attributes::default())?;
                self.list(item, attributes.list.unwrap_or_default())
            }
            Some(b'{') => {
                let (item, _) = self.resolve(line, package, bracketed, Attributes::default())?;
                let atomic = attributes.atomic_map.unwrap_or(false);
                self.shape((Kind::Map, item, ListType::Atomic, Text::default(), atomic))
            }
            _ => self.name(line, package, text)?,
        };
        let kind = self.schema.kind(id);
        if let (Some(atomic), Kind::Struct) = (attributes.atomic_map, kind)
            && atomic != self.schema.node(id).atomic
        {
            return Ok((self.overridden(id, atomic), pointer));
        }
        if let (Kind::List, Some(list), false) = (kind, attributes.list, text.starts_with('[')) {
            // A named list type whose field says how items are told apart.
            let (item, name) = (self.schema.node(id).item, (self.schema.node(id).package, self.schema.node(id).name));
            let copy = self.list(item, list);
            if list != "atomic" {
                let node = self.node_mut(copy);
                (node.package, node.name) = name;
                return Ok((copy, pointer));
            }
        }
        Ok((id, pointer))
    }

    fn list(&mut self, item: TypeId, list: &'static str) -> TypeId {
        let (list_type, keys) = match list.split_once(':') {
            Some((_, keys)) => (ListType::Map, keys),
            None if list == "set" => (ListType::Set, ""),
            None => (ListType::Atomic, ""),
        };
        let keys_text = if keys.is_empty() { Text::default() } else { self.text_of(keys) };
        let known = self.shapes.len();
        let id = self.shape((Kind::List, item, list_type, keys_text, false));
        if self.shapes.len() > known && !keys.is_empty() {
            let start = self.schema.keys.len() as u32;
            for key in keys.split(',') {
                let text = self.text_of(key);
                self.schema.keys.push(text);
            }
            let end = self.schema.keys.len() as u32;
            self.node_mut(id).keys = start..end;
        }
        id
    }

    fn shape(&mut self, shape: Shape) -> TypeId {
        if let Some(id) = self.shapes.get(&shape) {
            return *id;
        }
        let id = self.add(shape.0);
        let node = self.node_mut(id);
        (node.item, node.list_type, node.atomic) = (shape.1, shape.2, shape.4);
        self.shapes.insert(shape, id);
        id
    }

    /// A struct that one field declares atomic or granular against its type. `finish` fills in its fields.
    fn overridden(&mut self, id: TypeId, atomic: bool) -> TypeId {
        if let Some(copy) = self.overridden.get(&id) {
            return *copy;
        }
        let copy = TypeId(self.schema.nodes.len() as u32);
        let mut node = self.schema.node(id).clone();
        node.atomic = atomic;
        self.schema.nodes.push(node);
        self.overridden.insert(id, copy);
        copy
    }

    fn name(&self, line: usize, package: &'static str, text: &'static str) -> Result<TypeId, TableError> {
        let key = text.rsplit_once('.').unwrap_or((package, text));
        let found = self.scalars.get(text).or_else(|| self.named.get(&key));
        found.copied().ok_or(TableError { line, what: "unknown type" })
    }

    /// Splices embedded structs, lays the fields out and closes over what has defaults.
    fn finish(mut self) -> Schema {
        let own: HashMap<TypeId, Vec<Field>> = std::mem::take(&mut self.own).into_iter().collect();
        let mut owners: Vec<TypeId> = own.keys().copied().collect();
        owners.sort();
        for id in owners {
            let mut fields = self.spliced(&own, id);
            fields.sort_by(|a, b| self.schema.str(a.name).cmp(self.schema.str(b.name)));
            let start = self.schema.fields.len() as u32;
            self.schema.fields.append(&mut fields);
            let end = self.schema.fields.len() as u32;
            self.node_mut(id).fields = start..end;
        }
        for (id, copy) in std::mem::take(&mut self.overridden) {
            self.node_mut(copy).fields = self.schema.node(id).fields.clone();
        }
        let mut schema = self.schema;
        let text = self.text;
        let at = |t: Text| &text[t.start as usize..(t.start + t.len) as usize];
        schema.gvks.sort_by_key(|g| (at(g.group), at(g.version), at(g.kind)));
        schema.names.sort_by_key(|(prefix, name, _)| (at(*prefix), at(*name)));
        for (index, name) in default::hook_names().enumerate() {
            if let Some(id) = schema.by_name(name) {
                schema.nodes[id.0 as usize].hook = Some(index as u8);
            }
        }
        mark_defaults(&mut schema);
        schema
    }

    fn spliced(&self, own: &HashMap<TypeId, Vec<Field>>, id: TypeId) -> Vec<Field> {
        let mut fields = own.get(&id).cloned().unwrap_or_default();
        for embed in self.embeds.iter().filter(|e| e.owner == id) {
            fields.extend(self.spliced(own, embed.inner).into_iter().map(|mut field| {
                field.embedded = Some((embed.inner, embed.tag));
                field
            }));
        }
        fields
    }
}

#[derive(Clone, Copy, Default)]
struct Attributes {
    list: Option<&'static str>,
    atomic_map: Option<bool>,
}

const SCALARS: &[(&str, Kind)] = &[
    ("string", Kind::String),
    ("bool", Kind::Bool),
    ("int32", Kind::Int32),
    ("int64", Kind::Int64),
    ("float64", Kind::Float64),
    ("bytes", Kind::Bytes),
    ("time", Kind::Time),
    ("microtime", Kind::MicroTime),
    ("quantity", Kind::Quantity),
    ("intstr", Kind::IntOrString),
    ("raw", Kind::Raw),
    ("any", Kind::Any),
    ("orbool", Kind::SchemaOrBool),
    ("orarray", Kind::SchemaOrArray),
    ("orstrings", Kind::SchemaOrStrings),
    ("fields", Kind::Fields),
];

/// Lines that are neither fields nor comments, numbered from 1.
fn lines(text: &'static str) -> impl Iterator<Item = (usize, &'static str)> {
    text.lines().enumerate().filter(|(_, l)| !l.starts_with([' ', '#'])).map(|(i, l)| (i + 1, l))
}

fn patch_strategy(names: &str) -> PatchStrategy {
    let mut strategy = PatchStrategy::default();
    for name in names.split(',') {
        match name {
            "merge" => strategy.merge = true,
            "replace" => strategy.replace = true,
            "retainKeys" => strategy.retain_keys = true,
            _ => {}
        }
    }
    strategy
}

/// `has_defaults` of a type: a default of its own, or one below. Types refer to each other in circles, hence the rounds.
fn mark_defaults(schema: &mut Schema) {
    loop {
        let mut changed = false;
        for index in 0..schema.nodes.len() {
            let node = &schema.nodes[index];
            if node.has_defaults {
                continue;
            }
            let below = |id: TypeId| schema.nodes[id.0 as usize].has_defaults;
            let own = node.hook.is_some()
                || schema.fields(TypeId(index as u32)).iter().any(|f| f.default.is_some() || below(f.node))
                || (matches!(node.kind, Kind::List | Kind::Map) && below(node.item))
                || (node.kind == Kind::Map && schema.kind(node.item) == Kind::Quantity);
            schema.nodes[index].has_defaults = own;
            changed |= own;
        }
        if !changed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_table_reads() {
        let schema = read(TABLE).unwrap();
        assert!(schema.names.len() > 700 && schema.gvks.len() > 150);
    }

    #[test]
    fn a_pod_has_the_fields_that_types_go_gives_it() {
        let schema = builtin();
        let pod = schema.by_gvk("", "v1", "Pod").unwrap();
        let spec = schema.field(pod, "spec").unwrap().node;
        assert_eq!(schema.go_type(spec), "v1.PodSpec");
        let containers = schema.field(spec, "containers").unwrap();
        assert!(containers.required && containers.patch.merge);
        assert_eq!(schema.merge_key(containers), "name");
        assert_eq!(schema.node(containers.node).list_type, ListType::Map);
        assert_eq!(schema.list_keys(containers.node).collect::<Vec<_>>(), ["name"]);
        assert_eq!(schema.go_type(containers.node), "[]v1.Container");
        let container = schema.item(containers.node).unwrap();
        let ports = schema.field(container, "ports").unwrap();
        assert_eq!(schema.list_keys(ports.node).collect::<Vec<_>>(), ["containerPort", "protocol"]);
        let policy = schema.field(container, "imagePullPolicy").unwrap();
        assert_eq!(schema.go_type(policy.node), "v1.PullPolicy");
    }

    #[test]
    fn embedded_structs_are_spliced_with_their_protobuf_number() {
        let schema = builtin();
        let volume = schema.by_name("io.k8s.api.core.v1.Volume").unwrap();
        let config_map = schema.field(volume, "configMap").unwrap();
        let (source, tag) = config_map.embedded.unwrap();
        assert_eq!((schema.go_name(source), tag), ("VolumeSource", 2));
        assert!(config_map.pointer);
    }

    #[test]
    fn a_field_can_override_how_a_type_is_owned() {
        let schema = builtin();
        let selector = schema.by_name("io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector").unwrap();
        assert!(schema.node(selector).atomic);
        let volume = schema.by_name("io.k8s.api.core.v1.PersistentVolumeSpec").unwrap();
        let claim = schema.field(volume, "claimRef").unwrap().node;
        assert!(!schema.node(claim).atomic && !schema.fields(claim).is_empty());
        assert!(schema.node(schema.by_name("io.k8s.api.core.v1.ObjectReference").unwrap()).atomic);
        assert!(schema.by_name("io.k8s.api.core.v1.NoSuchThing").is_none());
    }

    #[test]
    fn a_malformed_table_is_refused_with_its_line() {
        let error = read("package a/v1 x.a.v1\nT\n f nonsense -\n").unwrap_err();
        assert_eq!(error.to_string(), "schema table, line 3: unknown type");
    }
}

//! The type graph: structs with fields, lists, maps and scalars, in a few flat arrays.

use std::ops::Range;

use serde_json::Value;

/// Index of a [`Node`] in its [`Schema`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TypeId(pub(super) u32);

/// A piece of the schema's text: offset and length in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Text {
    pub(super) start: u32,
    pub(super) len: u32,
}

/// What a value of a type looks like in JSON, and which rules it follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    String,
    Bool,
    Int32,
    Int64,
    Float64,
    /// base64 in JSON.
    Bytes,
    /// RFC 3339 in seconds.
    Time,
    /// RFC 3339 in microseconds.
    MicroTime,
    Quantity,
    IntOrString,
    /// An embedded object of any type (`runtime.RawExtension`).
    Raw,
    /// Any JSON value.
    Any,
    /// `JSONSchemaPropsOrBool`; `item` is the schema type, as in the next two.
    SchemaOrBool,
    /// `JSONSchemaPropsOrArray`
    SchemaOrArray,
    /// `JSONSchemaPropsOrStringArray`
    SchemaOrStrings,
    /// `metav1.FieldsV1`: an object that is kept as it is.
    Fields,
    Struct,
    List,
    /// Keys are strings.
    Map,
}

impl Kind {
    /// The Go type of an unnamed scalar.
    pub(super) fn go_type(self) -> &'static str {
        match self {
            Kind::String => "string",
            Kind::Bool => "bool",
            Kind::Int32 => "int32",
            Kind::Int64 => "int64",
            Kind::Float64 => "float64",
            Kind::Bytes => "[]uint8",
            Kind::Time => "v1.Time",
            Kind::MicroTime => "v1.MicroTime",
            Kind::Quantity => "resource.Quantity",
            Kind::IntOrString => "intstr.IntOrString",
            Kind::Raw => "runtime.RawExtension",
            Kind::Any => "interface {}",
            Kind::Fields => "v1.FieldsV1",
            Kind::SchemaOrBool => "v1.JSONSchemaPropsOrBool",
            Kind::SchemaOrArray => "v1.JSONSchemaPropsOrArray",
            Kind::SchemaOrStrings => "v1.JSONSchemaPropsOrStringArray",
            Kind::Struct | Kind::List | Kind::Map => "",
        }
    }
}

/// How the items of a list are told apart (`x-kubernetes-list-type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ListType {
    /// Also when the schema says nothing.
    #[default]
    Atomic,
    Set,
    /// Items are objects, told apart by [`Schema::list_keys`].
    Map,
}

/// What strategic merge patch does with a field (`x-kubernetes-patch-strategy`); several can hold at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PatchStrategy {
    pub merge: bool,
    pub replace: bool,
    pub retain_keys: bool,
}

/// A type. Lists and maps have `item`; structs have `fields`.
#[derive(Clone, Debug)]
pub struct Node {
    pub kind: Kind,
    /// Last part of the Go package and name in it; empty for unnamed types.
    pub(super) package: Text,
    pub(super) name: Text,
    pub(super) item: TypeId,
    pub(super) fields: Range<u32>,
    pub(super) keys: Range<u32>,
    pub list_type: ListType,
    /// Structs and maps that have one owner as a whole (`x-kubernetes-map-type: atomic`).
    pub atomic: bool,
    /// The type or one below it has a default (static or conditional).
    pub has_defaults: bool,
    /// Index into the conditional defaults of `default.rs`.
    pub(super) hook: Option<u8>,
}

/// A field of a struct, also one that an embedded struct brings.
#[derive(Clone, Debug)]
pub struct Field {
    pub(super) name: Text,
    pub(super) merge_key: Text,
    /// Type of the value.
    pub node: TypeId,
    /// Number in protobuf, 0 for none (`apiVersion` and `kind` travel outside).
    pub tag: u16,
    /// The embedded struct that brings the field, and its number in protobuf.
    pub embedded: Option<(TypeId, u16)>,
    /// OpenAPI lists it as required.
    pub required: bool,
    /// A Go pointer: zero values are kept, absence is possible.
    pub pointer: bool,
    /// Go leaves it out when it is empty.
    pub omit_empty: bool,
    /// Go leaves it out when it is the zero value, structs included.
    pub omit_zero: bool,
    pub patch: PatchStrategy,
    /// The schema says that the list is atomic; without it that is only assumed.
    pub atomic_list: bool,
    /// OpenAPI shows the default.
    pub default_public: bool,
    pub(super) default: Option<u32>,
}

impl Field {
    /// Go writes the field even when nothing was set.
    pub(super) fn always(&self, kind: Kind) -> bool {
        use Kind::{IntOrString, MicroTime, Quantity, Raw, Struct, Time};
        let structured = matches!(kind, Struct | Time | MicroTime | Quantity | IntOrString | Raw);
        !self.omit_zero && (!self.omit_empty || (structured && !self.pointer))
    }
}

/// Group, version and kind of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gvk {
    pub group: Text,
    pub version: Text,
    pub kind: Text,
    pub node: TypeId,
}

/// A set of types that refer to each other. The built-in one is [`super::builtin`].
#[derive(Debug, Default)]
pub struct Schema {
    pub(super) text: std::borrow::Cow<'static, str>,
    pub(super) nodes: Vec<Node>,
    /// Fields of one struct are adjacent and sorted by name.
    pub(super) fields: Vec<Field>,
    pub(super) keys: Vec<Text>,
    pub(super) defaults: Vec<Value>,
    /// Sorted by group, version, kind.
    pub(super) gvks: Vec<Gvk>,
    /// Structs by OpenAPI name, sorted: prefix (`io.k8s.api.core.v1`), name (`Pod`).
    pub(super) names: Vec<(Text, Text, TypeId)>,
}

impl Schema {
    pub(super) fn str(&self, text: Text) -> &str {
        &self.text[text.start as usize..(text.start + text.len) as usize]
    }

    /// The type of a kind. `group` is empty for the core group.
    pub fn by_gvk(&self, group: &str, version: &str, kind: &str) -> Option<TypeId> {
        let wanted = (group, version, kind);
        let at =
            self.gvks.binary_search_by(|g| (self.str(g.group), self.str(g.version), self.str(g.kind)).cmp(&wanted));
        at.ok().map(|i| self.gvks[i].node)
    }

    /// A type by its OpenAPI name, for example `io.k8s.api.core.v1.PodSpec`.
    pub fn by_name(&self, name: &str) -> Option<TypeId> {
        let (prefix, last) = name.rsplit_once('.')?;
        let at = self.names.binary_search_by(|(p, n, _)| (self.str(*p), self.str(*n)).cmp(&(prefix, last)));
        at.ok().map(|i| self.names[i].2)
    }

    /// Group, version, kind and type of every kind.
    pub fn kinds(&self) -> impl Iterator<Item = (&str, &str, &str, TypeId)> {
        self.gvks.iter().map(|g| (self.str(g.group), self.str(g.version), self.str(g.kind), g.node))
    }

    /// OpenAPI prefix, name and type of every struct.
    pub fn structs(&self) -> impl Iterator<Item = (&str, &str, TypeId)> {
        self.names.iter().map(|(p, n, id)| (self.str(*p), self.str(*n), *id))
    }

    pub fn node(&self, id: TypeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub fn kind(&self, id: TypeId) -> Kind {
        self.node(id).kind
    }

    /// Item type of a list, value type of a map.
    pub fn item(&self, id: TypeId) -> Option<TypeId> {
        let node = self.node(id);
        matches!(node.kind, Kind::List | Kind::Map).then_some(node.item)
    }

    /// Fields of a struct, sorted by name; empty for anything else.
    pub fn fields(&self, id: TypeId) -> &[Field] {
        let range = &self.node(id).fields;
        &self.fields[range.start as usize..range.end as usize]
    }

    pub fn field(&self, id: TypeId, name: &str) -> Option<&Field> {
        self.field_at(id, name).map(|(_, field)| field)
    }

    /// The field and its index among [`Schema::fields`].
    pub(super) fn field_at(&self, id: TypeId, name: &str) -> Option<(usize, &Field)> {
        let fields = self.fields(id);
        let at = fields.binary_search_by(|f| self.str(f.name).cmp(name)).ok()?;
        Some((at, &fields[at]))
    }

    pub fn field_name(&self, field: &Field) -> &str {
        self.str(field.name)
    }

    /// Key that strategic merge patch matches list items by; empty when items are scalars.
    pub fn merge_key(&self, field: &Field) -> &str {
        self.str(field.merge_key)
    }

    pub fn field_default(&self, field: &Field) -> Option<&Value> {
        field.default.map(|i| &self.defaults[i as usize])
    }

    /// Names of the fields that tell the items of a [`ListType::Map`] list apart.
    pub fn list_keys(&self, id: TypeId) -> impl Iterator<Item = &str> {
        let range = &self.node(id).keys;
        self.keys[range.start as usize..range.end as usize].iter().map(|k| self.str(*k))
    }

    /// The Go type as error texts print it: `v1.PodSpec`, `[]v1.Container`, `map[string]string`.
    pub fn go_type(&self, id: TypeId) -> String {
        let node = self.node(id);
        match node.kind {
            _ if node.name.len > 0 => format!("{}.{}", self.str(node.package), self.str(node.name)),
            Kind::List => format!("[]{}", self.go_type(node.item)),
            Kind::Map => format!("map[string]{}", self.go_type(node.item)),
            kind => kind.go_type().to_owned(),
        }
    }

    /// The Go type without its package: `PodSpec`.
    pub fn go_name(&self, id: TypeId) -> &str {
        self.str(self.node(id).name)
    }
}

#!/usr/bin/env python3
"""Writes table.txt (all API types of Kubernetes 1.35) and openapi/descriptions.txt.gz from published sources.

    python3 src/schema/generate.py            # reads ~/go/pkg/mod, fetched by `go mod download MODULE@VERSION`

Inputs, all from the Go module proxy (`go mod download` checks them against sum.golang.org; the files that are read are
pinned below once more, by sha256 over name and content of each):

  k8s.io/kubernetes                api/openapi-spec/v3/*.json: required, list and map types, patch strategies, GVKs, texts
  k8s.io/api, apimachinery,        Go structs of the same types: omitempty, pointers, named types, protobuf tags. They
  apiextensions-apiserver,         decide what Go drops and what it always writes, and what its decoding errors say;
  kube-aggregator                  no OpenAPI document holds them.

The defaults that upstream sets in Go code (`SetDefaults_*`) are not in any of these: they are listed in defaults.txt
(static ones, merged into the table here) and coded in default.rs (conditional ones).

Table format, one line each (see table.rs for the reader):

  package ALIAS OPENAPI-PREFIX          the types that follow belong to it; other packages refer to them as ALIAS.Type
  alias NAME TYPE                       a named scalar or list type of Go (its name shows in decoding errors)
  TYPE [atomic] [gvk=GROUP/VERSION/KIND]...
   NAME TYPE FLAGS [#TAG] [list=..] [map=..] [patch=..] [=DEFAULT] [:=DEFAULT]
   + TYPE #TAG                          an embedded struct whose fields are spliced in; TAG is its protobuf field

  TYPE     string bool int32 int64 float64 bytes time microtime quantity intstr raw any fields, an alias, a struct,
           orbool orarray orstrings (a JSONSchemaProps or a boolean, a list of them, a list of strings),
           [TYPE] list, {TYPE} map by string, *TYPE pointer
  FLAGS    ? omitempty   0 omitzero   ! required   - neither
  list=    map:KEY,KEY | set | atomic      map= atomic | granular      patch= STRATEGY[,STRATEGY][:MERGEKEY]
  =        default that OpenAPI shows and the server sets       :=  default that only the server sets
"""
import glob, gzip, hashlib, json, os, re, sys

MODCACHE = os.path.join(os.environ.get("GOMODCACHE", os.path.expanduser("~/go/pkg/mod")), "k8s.io")
HERE = os.path.dirname(os.path.abspath(__file__))
PINS = {
    "kubernetes@v1.35.4/api/openapi-spec/v3": "43c9add1c1f5f14823efefcf9d8e235d4ec33bd495a1065b466244dd0d7d8657",
    "api@v0.35.4": "4be3608b51d13399982a402536fc389ea22d7e750474968f49ce2f9b67cdca6b",
    "apimachinery@v0.35.4/pkg/apis/meta/v1": "d647c11d6658a2bdc82b5f8aea3b34ebbf1a950bf286aaaa8f990e4146dd8daf",
    "apimachinery@v0.35.4/pkg/version": "ed83e5e9c39d111ae7dc61ccd1d5ba0b65e4cff607a7acdaf488047a38802bb6",
    "apiextensions-apiserver@v0.35.4/pkg/apis/apiextensions/v1": "29764f42af39f3a559faec02e4de72b97ca7ca088816993cca238f98749e9585",
    "kube-aggregator@v0.35.4/pkg/apis/apiregistration/v1": "56ed365dd7bafa8c9e2a10d684d2726f3786bd6fba436d56366102a48f3fce95",
}
META = "io.k8s.apimachinery.pkg.apis.meta.v1"
# Types that decode by their own rules: no struct in the table.
SPECIAL = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": "quantity",
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": "intstr",
    "io.k8s.apimachinery.pkg.runtime.RawExtension": "raw",
    META + ".Time": "time",
    META + ".MicroTime": "microtime",
    META + ".FieldsV1": "fields",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON": "any",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool": "orbool",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray": "orarray",
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray": "orstrings",
}
SCALARS = {"string": "string", "bool": "bool", "int32": "int32", "int64": "int64", "int": "int64", "uint32": "int64",
           "float64": "float64", "byte": "byte", "interface{}": "any"}


def fail(text):
    sys.exit("generate.py: " + text)


def pinned(folder, pattern):
    """The files of a pinned folder, after checking their hash."""
    files = sorted(f for f in glob.glob(os.path.join(MODCACHE, folder, pattern)) if not f.endswith("_test.go"))
    if not files:
        fail(f"{folder} is not in {MODCACHE}: run `go mod download k8s.io/{folder.split('/')[0]}`")
    digest = hashlib.sha256()
    for name in files:
        digest.update(os.path.relpath(name, MODCACHE).encode() + b"\0" + open(name, "rb").read())
    if PINS[folder] != digest.hexdigest():
        if "--repin" not in sys.argv:
            fail(f"{folder} has hash {digest.hexdigest()}, expected {PINS[folder]}")
        PINS[folder] = digest.hexdigest()
    return files


def openapi_schemas():
    schemas = {}
    for name in pinned("kubernetes@v1.35.4/api/openapi-spec/v3", "*.json"):
        for key, schema in json.load(open(name)).get("components", {}).get("schemas", {}).items():
            schemas.setdefault(key, schema)
    return schemas


def folder_of(package):
    """Pinned folder and glob of the Go sources of an OpenAPI package."""
    if package.startswith("io.k8s.api."):
        return "api@v0.35.4", package[len("io.k8s.api."):].replace(".", "/") + "/*.go"
    if package.startswith("io.k8s.apimachinery."):
        return "apimachinery@v0.35.4/" + package[len("io.k8s.apimachinery."):].replace(".", "/"), "*.go"
    if package.startswith("io.k8s.apiextensions-apiserver."):
        return "apiextensions-apiserver@v0.35.4/pkg/apis/apiextensions/v1", "*.go"
    return "kube-aggregator@v0.35.4/pkg/apis/apiregistration/v1", "*.go"


def package_of_import(path):
    for prefix, openapi in (("k8s.io/api/", "io.k8s.api."), ("k8s.io/apimachinery/", "io.k8s.apimachinery."),
                            ("k8s.io/apiextensions-apiserver/", "io.k8s.apiextensions-apiserver."),
                            ("k8s.io/kube-aggregator/", "io.k8s.kube-aggregator.")):
        if path.startswith(prefix):
            return openapi + path[len(prefix):].replace("/", ".")
    return None


class GoPackage:
    """Structs and named types of one Go package, by a line parser that knows the style of types.go."""

    def __init__(self, package):
        self.structs, self.names = {}, {}
        folder, pattern = folder_of(package)
        if folder == "api@v0.35.4":
            pinned(folder, "*/*/types*.go")
            files = [f for f in glob.glob(os.path.join(MODCACHE, folder, pattern)) if not f.endswith("_test.go")]
        else:
            files = pinned(folder, pattern)
        for name in sorted(files):
            base = os.path.basename(name)
            if not base.startswith(("zz_", "generated", "types_swagger")):
                self.read(package, open(name).read())

    def read(self, package, text):
        imports = {}
        block = re.search(r"^import \((.*?)^\)", text, re.S | re.M)
        lines = block.group(1).splitlines() if block else []
        for line in lines + re.findall(r"^import (.*)$", text, re.M):
            m = re.match(r'\s*(\w+)?\s*"([^"]+)"', line)
            if m and package_of_import(m.group(2)):
                parts = m.group(2).split("/")
                imports[m.group(1) or parts[-1]] = package_of_import(m.group(2))
        def resolve(t):
            if t[:2] == "[]":
                inner = resolve(t[2:])
                return "bytes" if inner == "byte" else f"[{inner}]"
            if t[0] == "*":
                return "*" + resolve(t[1:])
            if t.startswith("map["):
                return "{" + resolve(t[t.index("]") + 1:]) + "}"
            if t in SCALARS:
                return SCALARS[t]
            if "." in t:
                left, right = t.split(".", 1)
                if left == "types" and right == "UID":
                    return "meta/v1.UID"
                if left == "types":
                    return "string"
                return imports.get(left, left) + "." + right
            return package + "." + t
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        for m in re.finditer(r"^type (\w+) struct \{\n(.*?)^\}", text, re.S | re.M):
            fields = []
            for line in m.group(2).splitlines():
                line = line.strip()
                f = re.match(r"(?:(\w+)\s+)?([\w.\[\]*{}]+)\s+`(.*)`", line)
                e = re.match(r"([\w.]+)$", line)
                if line.startswith("//") or not line:
                    continue
                if e:
                    fields.append(dict(name="", go=resolve(e.group(1)), options=["inline"], tag=None))
                    continue
                if not f:
                    fail(f"cannot read line of {package}.{m.group(1)}: {line}")
                tags = dict(re.findall(r'(\w+):"([^"]*)"', f.group(3)))
                parts = tags.get("json", "").split(",")
                proto = re.match(r"\w+,(\d+)", tags.get("protobuf", ""))
                if parts[0] == "-":
                    continue
                fields.append(dict(name=parts[0], go=resolve(f.group(2)), options=parts[1:],
                                   tag=int(proto.group(1)) if proto else None))
            self.structs[m.group(1)] = fields
        for m in re.finditer(r"^type (\w+) (=\s*)?([\w.\[\]*{}]+)\s*$", text, re.M):
            if m.group(3).startswith("struct"):
                self.structs[m.group(1)] = []
            elif m.group(3) != "interface":
                self.names[m.group(1)] = resolve(m.group(3))
        for block in re.finditer(r"^type \(\n(.*?)^\)", text, re.S | re.M):
            for m in re.finditer(r"^\t(\w+) (\w+)$", block.group(1), re.M):
                self.names[m.group(1)] = resolve(m.group(2))


class Writer:
    def __init__(self, schemas):
        self.schemas, self.go, self.out = schemas, {}, []
        packages = sorted({k.rsplit(".", 1)[0] for k in schemas if k not in SPECIAL})
        self.alias = {p: "/".join(p.rsplit(".", 2)[-2:]) for p in packages}
        self.alias["io.k8s.apimachinery.pkg.version"] = "version"
        for p in packages:
            self.go[p] = GoPackage(p)
        if len(set(self.alias.values())) != len(packages):
            fail("package aliases collide")
        self.aliases_used = {}

    def name(self, full, package):
        if full in SPECIAL:
            return SPECIAL[full]
        p, t = full.rsplit(".", 1)
        return t if p == package else f"{self.alias[p]}.{t}"

    def type_text(self, go, package):
        if go[0] == "*":
            return "*" + self.type_text(go[1:], package)
        if go[0] == "[":
            return "[" + self.type_text(go[1:-1], package) + "]"
        if go[0] == "{":
            return "{" + self.type_text(go[1:-1], package) + "}"
        if go in SCALARS.values() or go in ("bytes", "any"):
            return go
        if go == "meta/v1.UID":
            self.aliases_used[META, "UID"] = "string"
            return "UID" if package == META else go
        if go in SPECIAL or go in self.schemas:
            return self.name(go, package)
        p, t = go.rsplit(".", 1)
        named = self.go.get(p) and self.go[p].names.get(t)
        if not named:
            fail(f"unknown Go type {go}")
        self.aliases_used[p, t] = self.type_text(named, p)
        return self.name(go, package)

    def struct_fields(self, full):
        p, t = full.rsplit(".", 1)
        if t not in self.go[p].structs and t in self.go[p].names:
            return self.struct_fields(self.go[p].names[t])
        if t not in self.go[p].structs:
            fail(f"no Go struct for {full}")
        return self.go[p].structs[t]

    def is_embedded(self, f):
        return "inline" in f["options"] or not f["name"]

    def struct(self, full, package, static):
        schema = self.schemas.get(full, {})
        properties = schema.get("properties", {})
        head = full.rsplit(".", 1)[1]
        if schema.get("x-kubernetes-map-type"):
            head += " " + schema["x-kubernetes-map-type"]
        gvks = schema.get("x-kubernetes-group-version-kind", [])
        if len(gvks) < 20:
            for g in gvks:
                head += f" gvk={g['group']}/{g['version']}/{g['kind']}"
        lines, seen = [head], set()
        for f in self.struct_fields(full):
            if self.is_embedded(f):
                inner = f["go"].lstrip("*")
                if inner.endswith(".TypeMeta") or inner == "TypeMeta":
                    for n in ("apiVersion", "kind"):
                        lines.append(f" {n} string ?")
                        seen.add(n)
                    continue
                lines.append(f" + {self.name(inner, package)}" + (f" #{f['tag']}" if f["tag"] else ""))
                self.embedded.append(inner)
                seen |= self.splice(full, inner)
                continue
            seen.add(f["name"])
            lines.append(self.field(full, schema, f, package, static))
        if full in self.schemas and seen != set(properties):
            fail(f"{full}: fields differ from OpenAPI: {seen ^ set(properties)}")
        return lines

    def splice(self, full, inner):
        """Names that the embedded struct brings; remembers where OpenAPI describes them."""
        names = set()
        for g in self.struct_fields(inner):
            if self.is_embedded(g):
                self.embedded.append(g["go"])
                names |= self.splice(full, g["go"])
            else:
                names.add(g["name"])
                self.parents.setdefault((inner, g["name"]), (full, g["name"]))
        return names

    def field(self, full, schema, f, package, static):
        p = schema.get("properties", {}).get(f["name"])
        required = f["name"] in schema.get("required", [])
        if p is None:
            outer, _ = self.parents[full, f["name"]]
            p = self.schemas[outer]["properties"][f["name"]]
            required = f["name"] in self.schemas[outer].get("required", [])
        flags = ("?" if "omitempty" in f["options"] else "") + ("0" if "omitzero" in f["options"] else "") + ("!" if required else "")
        line = f" {f['name']} {self.type_text(f['go'], package)} {flags or '-'}"
        if f["tag"]:
            line += f" #{f['tag']}"
        if p.get("x-kubernetes-list-type"):
            line += " list=" + p["x-kubernetes-list-type"]
            if p.get("x-kubernetes-list-map-keys"):
                line += ":" + ",".join(p["x-kubernetes-list-map-keys"])
        if p.get("x-kubernetes-map-type"):
            line += " map=" + p["x-kubernetes-map-type"]
        if p.get("x-kubernetes-patch-strategy"):
            line += " patch=" + p["x-kubernetes-patch-strategy"]
            if p.get("x-kubernetes-patch-merge-key"):
                line += ":" + p["x-kubernetes-patch-merge-key"]
        default = p.get("default")
        # The generator of OpenAPI shows the zero value of what Go always writes: that follows from the flags.
        implied = default in ("", 0, {}, False) and f["go"][0] != "*" and ("omitempty" not in f["options"] or default == {})
        if default is not None and not implied:
            line += " =" + json.dumps(default)
        own = static.pop((self.name(full, ""), f["name"]), None)
        if own and " =" not in line:
            line += " :=" + own
        return line

    def table(self, static):
        order = sorted(self.alias, key=lambda p: (p != META, p != "io.k8s.api.core.v1", p))
        bodies = {}
        self.parents, self.embedded = {}, []
        for p in order:
            lines = []
            for full in sorted(k for k in self.schemas if k.rsplit(".", 1)[0] == p and k not in SPECIAL):
                if self.schemas[full].get("properties") is None and full.rsplit(".", 1)[1] in self.go[p].names:
                    continue
                lines += self.struct(full, p, static)
            bodies[p] = lines
        for full in sorted(set(self.embedded) - set(self.schemas)):
            p = full.rsplit(".", 1)[0]
            bodies[p] += self.struct(full, p, static)
        if static:
            fail(f"defaults.txt names unknown fields: {sorted(static)}")
        out = []
        for p in order:
            out.append(f"package {self.alias[p]} {p}")
            for (q, t), text in sorted(self.aliases_used.items()):
                if q == p:
                    out.append(f"alias {t} {text}")
            out += bodies[p]
        return out


def static_defaults():
    """defaults.txt: `ALIAS.Type` lines followed by ` field JSON` lines."""
    result, current = {}, None
    for line in open(os.path.join(HERE, "defaults.txt")):
        line = line.rstrip("\n")
        if not line.strip() or line.startswith("#"):
            continue
        if line[0] != " ":
            current = line.split()
        else:
            name, value = line.strip().split(" ", 1)
            for c in current:
                result[c, name] = json.dumps(json.loads(value), separators=(",", ":"))
    return result


def write_descriptions(schemas):
    """`=NAME TEXT` for a type, `FIELD TEXT` for its fields; backslash and newline escaped. Read it with zcat."""
    escape = lambda text: text.replace("\\", "\\\\").replace("\n", "\\n")
    lines = []
    for name in sorted(schemas):
        schema = schemas[name]
        lines.append(("=" + name + " " + escape(schema.get("description", ""))).rstrip())
        for field, p in sorted(schema.get("properties", {}).items()):
            if p.get("description"):
                lines.append(field + " " + escape(p["description"]))
    with open(os.path.join(HERE, "openapi", "descriptions.txt.gz"), "wb") as f:
        f.write(gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0))


def main():
    schemas = openapi_schemas()
    lines = Writer(schemas).table(static_defaults())
    with open(os.path.join(HERE, "table.txt"), "w") as f:
        f.write("# Written by generate.py from Kubernetes 1.35.4; the format is described there. Do not edit.\n")
        f.write("\n".join(lines) + "\n")
    write_descriptions(schemas)
    if "--repin" in sys.argv:
        print(json.dumps(PINS, indent=4))


if __name__ == "__main__":
    main()
